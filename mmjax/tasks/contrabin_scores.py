"""Scores of the ContraBin recipe: retrieval in pools, across optimisation levels, and a probe."""

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from mmjax.data.code import LEVELS, TEXTS
from mmjax.evals import gallery as search
from mmjax.evals.probe import linear_probe
from mmjax.losses.term import Term
from mmjax.task import Evaluator, Scores, gather

PAIRS = (
    ('source', 'binary'), ('comment', 'binary'), ('source', 'comment'),
    ('binary', 'source'), ('binary', 'comment'), ('comment', 'source'),
)  # fmt: skip
PROBED = 2000  # training functions that a probe learns from


class CodeScores(Evaluator):
    """Scores a split with the same metrics whatever the stage, so that they can be compared.

    Retrieval: functions are dealt at random (always alike) to pools of `pool`, one binary each; a
    query of one modality asks the pool's other modality. What fills no pool is left out and
    counted; a smaller split is one pool. Levels: the binaries of a pool at one level ask those at
    another. Losses: every term over each pool as one batch. `<text>_full`: share of texts that use
    all the tokens there are, most of which were cut.
    """

    def __init__(self, task, functions, train, *, batch_size: int, pool: int):
        self.task, self.functions, self.train = task, functions, train
        self.batch_size, self.pool = batch_size, pool
        self._terms = jax.jit(task.every_term)

    def run(self, apply, *, final):
        rows = self.functions.one_each()
        order = np.random.default_rng(0).permutation(len(rows))
        size = min(self.pool, len(rows))
        pools = order[: len(order) // size * size].reshape(-1, size)
        chosen = self.functions.subset(rows)
        keys = ('identity', 'told', 'has_comment', *(f'{text}_mask' for text in TEXTS))
        outputs, batch = gather(apply, 'encode', chosen, self.batch_size, keys)
        metrics = {'functions': len(rows), 'pool': size, 'left_out': len(rows) - pools.size}
        metrics |= {'r1_chance': 1 / size, 'r10_chance': min(10 / size, 1.0)}
        for text in TEXTS:
            metrics[f'{text}_full'] = float(batch.pop(f'{text}_mask')[:, -1].mean())
        metrics |= self._losses(outputs, batch, pools)
        has = batch['has_comment']
        for a, b in PAIRS:
            metrics |= _pair(outputs, a, b, has, pools)
        metrics |= self._levels(apply, rows[pools])
        metrics |= self._probe(apply, outputs, chosen)
        drawn = {}
        if final:
            drawn = {
                'similarity': _similarity(outputs, pools[0][:64]),
                'projection': _projection(outputs, chosen),
                'interpolation': _weights(outputs, has),
            }
        return Scores(metrics, drawn)

    def _losses(self, outputs, batch, pools):
        """Returns the mean over the pools of every term, of both interpolations."""
        found = []
        for pool in pools:
            one = {name: jnp.asarray(x[pool]) for name, x in (outputs | batch).items()}
            one['mask'] = jnp.ones(len(pool), bool)
            terms = self._terms(one)
            found.append(
                {n: float(t.mean() if isinstance(t, Term) else t) for n, t in terms.items()}
            )
        out = {name: float(np.mean([f[name] for f in found])) for name in found[0]}
        return out | {'loss': sum(w * out[name] for name, w in self.task.weights.items())}

    def _levels(self, apply, pools):
        """Returns mAP between binaries of one pool's functions at two levels."""
        index = self.functions.index
        kept = np.unique(index['identity'][pools])
        rows = np.flatnonzero(np.isin(index['identity'], kept) & (index['level'] >= 0))
        if len(np.unique(index['level'][rows])) < 2:
            return {}
        data = self.functions.subset(rows)
        encoded, _ = gather(apply, 'embed_binary', data, self.batch_size)
        identity, level = data.index['identity'], data.index['level']
        out, every = {}, []
        for a in np.unique(level):
            for b in np.unique(level):
                scores = []
                for pool in pools if a != b else ():
                    inside = np.isin(identity, index['identity'][pool])
                    q, g = (inside & (level == x) for x in (a, b))
                    if np.isin(identity[q], identity[g]).any():
                        scores.append(
                            search.rank(encoded[q], encoded[g], identity[q], identity[g]).map
                        )
                if scores:
                    every.append(float(np.mean(scores)))
                    out[f'binary_{LEVELS[a].lower()}_{LEVELS[b].lower()}_map'] = every[-1]
        return out | ({'binary_levels_map': float(np.mean(every))} if every else {})

    def _probe(self, apply, outputs, chosen):
        """Returns how well a linear map of binary embeddings tells the label."""
        told = chosen.index['label'] != 0
        rows = self.train.one_each()
        rows = rows[self.train.index['label'][rows] != 0][:PROBED]
        if not told.any() or len(np.unique(self.train.index['label'][rows])) < 2:
            return {}
        data = self.train.subset(rows)
        encoded, _ = gather(apply, 'embed_binary', data, self.batch_size)
        labels = chosen.index['label'][told]
        if not np.isin(labels, data.index['label']).any():
            return {}
        found = linear_probe(encoded, data.index['label'], outputs['binary'][told], labels)
        return {'probe_accuracy': found.accuracy, 'probe_majority': found.majority}


def _pair(outputs, a: str, b: str, has, pools) -> dict[str, float]:
    """Returns R@1/5/10 and MRR of queries `a` against `b`, averaged over the pools."""
    found = []
    for pool in pools:
        if 'comment' in (a, b):
            pool = pool[has[pool]]
        if len(pool) > 1:
            found.append(search.rank(outputs[a][pool], outputs[b][pool], pool, pool))
    if not found:
        return {}
    out = {f'{a}_{b}_r{k}': float(np.mean([f.rank[k] for f in found])) for k in (1, 5, 10)}
    # Of one right answer a query, average precision is the reciprocal of its rank.
    return out | {f'{a}_{b}_mrr': float(np.mean([f.map for f in found]))}


def _similarity(outputs, rows):
    figure = Figure(figsize=(8, 4), layout='constrained')
    figure.set_label(
        'Cosines of binaries (down) and of source and comment (across) of 64 functions.'
    )
    unit = lambda x: x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9)
    for axis, name in zip(figure.subplots(1, 2), ('source', 'comment'), strict=True):
        cosines = unit(outputs['binary'][rows]) @ unit(outputs[name][rows]).T
        image = axis.imshow(cosines, vmin=-1, vmax=1, cmap='RdBu_r')
        axis.set(xlabel=name, ylabel='binary')
    figure.colorbar(image)
    return figure


def _projection(outputs, chosen, most=600):
    """Draws the two main directions of all three modalities; binaries coloured by label."""
    names = ('source', 'comment', 'binary')
    rows = np.concatenate([outputs[name][:most] for name in names])
    centred = rows - rows.mean(0)
    _, _, directions = np.linalg.svd(centred, full_matrices=False)
    flat = np.split(centred @ directions[:2].T, len(names))
    figure = Figure(figsize=(9, 4), layout='constrained')
    figure.set_label('Embeddings along their two main directions: by modality, binaries by label.')
    left, right = figure.subplots(1, 2)
    for name, points in zip(names, flat, strict=True):
        left.scatter(*points.T, s=6, label=name, alpha=0.6)
    left.legend(fontsize=7)
    labels = [chosen.record(row)['label'] for row in range(len(flat[2]))]
    known = sorted(set(labels))
    places = [known.index(label) % 20 for label in labels]
    right.scatter(*flat[2].T, s=6, c=places, cmap='tab20')
    for label in known[:20]:
        right.scatter([], [], s=12, color=f'C{known.index(label) % 10}', label=label or 'none')
    return figure


def _weights(outputs, has):
    figure = Figure(figsize=(6, 3), layout='constrained')
    figure.set_label('Share of the source in the interpolation with its comment, by function.')
    axis = figure.subplots()
    for kind in ('linear', 'nonlinear'):
        values = outputs[f'lambda_{kind}'][has]
        axis.hist(values, bins=np.linspace(0, 1, 51), alpha=0.6, label=kind)
    axis.set(xlabel='λ', ylabel='functions')
    axis.legend()
    return figure
