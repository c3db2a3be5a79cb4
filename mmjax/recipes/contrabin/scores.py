"""Scores of the ContraBin recipe: retrieval in pools, across optimisation levels, and a probe."""

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.engine.task import Evaluator, Scores, gather
from mmjax.evals import gallery as search
from mmjax.evals.probe import linear_probe
from mmjax.losses.term import Term
from mmjax.recipes.contrabin import figures
from mmjax.recipes.contrabin.data import LEVELS, TEXTS, sample

PAIRS = (
    ('source', 'binary'),
    ('comment', 'binary'),
    ('source', 'comment'),
    ('binary', 'source'),
    ('binary', 'comment'),
    ('comment', 'source'),
)
PROBED = 2000  # training functions that a probe learns from


class CodeScores(Evaluator):
    """Scores a split with the same metrics whatever the stage, so that they can be compared.

    Retrieval: functions are dealt at random (always alike) to pools of `pool`, one binary each; a
    query of one modality asks the pool's other modality. What fills no pool is left out and
    counted; a smaller split is one pool. Functions without comment take no part where it is asked:
    `comment_pool` is what is left of the least pool then, with its own chances. Levels: the
    binaries of a pool at one level ask those at another. Losses: every term over each pool as one
    batch. `<text>_full`: share of texts that use all the tokens there are, most of which were cut.
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
        keys = ('identity', 'comment_id', 'has_comment', *(f'{text}_mask' for text in TEXTS))
        outputs, batch = gather(apply, 'encode', chosen, self.batch_size, keys)
        metrics = {'functions': len(rows), 'pool': size, 'left_out': len(rows) - pools.size}
        metrics |= {'r1_chance': 1 / size, 'r10_chance': min(10 / size, 1.0)}
        for text in TEXTS:
            metrics[f'{text}_full'] = float(batch.pop(f'{text}_mask')[:, -1].mean())
        metrics |= self._losses(outputs, batch, pools)
        has = batch['has_comment']
        metrics |= _commented(has, pools)
        for a, b in PAIRS:
            metrics |= _pair(outputs, a, b, has, pools)
        metrics |= self._levels(apply, rows[pools])
        metrics |= self._probe(apply, outputs, chosen)
        drawn = {}
        if final:
            labels = [chosen.record(row)['label'] for row in range(len(chosen))]
            drawn = {
                'similarity': figures.similarity(outputs, pools[0], has),
                'projection': figures.projection(outputs, has, labels),
                'interpolation': figures.weights(outputs, has),
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
        dealt = index['identity'][pools]
        rows = np.flatnonzero(np.isin(index['identity'], dealt) & (index['level'] >= 0))
        if len(np.unique(index['level'][rows])) < 2:
            return {}
        data = self.functions.subset(rows)
        encoded, _ = gather(apply, 'embed_binary', data, self.batch_size)
        identity, level = data.index['identity'], data.index['level']
        members = _by_pool_and_level(identity, level, dealt)
        out, every = {}, []
        for a in np.unique(level):
            for b in np.unique(level):
                scores = []
                for by_level in members if a != b else ():
                    q, g = by_level[a], by_level[b]
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
        rows = rows[self.train.index['label'][rows] != 0]
        rows = rows[sample(len(rows), PROBED)]
        if not told.any() or len(np.unique(self.train.index['label'][rows])) < 2:
            return {}
        data = self.train.subset(rows)
        encoded, _ = gather(apply, 'embed_binary', data, self.batch_size)
        labels = chosen.index['label'][told]
        if not np.isin(labels, data.index['label']).any():
            return {}
        found = linear_probe(encoded, data.index['label'], outputs['binary'][told], labels)
        return {'probe_accuracy': found.accuracy, 'probe_majority': found.majority}


def _by_pool_and_level(identity, level, dealt) -> list[list[np.ndarray]]:
    """Returns [pool][level] → rows; dealt [pools, functions] are the identities of each pool."""
    order = np.argsort(dealt, axis=None)
    pool = order[np.searchsorted(dealt.ravel(), identity, sorter=order)] // dealt.shape[1]
    place = pool * len(LEVELS) + level
    ends = np.cumsum(np.bincount(place, minlength=len(dealt) * len(LEVELS)))
    parts = np.split(np.argsort(place, kind='stable'), ends[:-1])
    return [parts[start : start + len(LEVELS)] for start in range(0, len(parts), len(LEVELS))]


def _commented(has, pools) -> dict[str, float]:
    """Returns the least pool that is left where comments are asked, and its chances; {} if all."""
    sizes = has[pools].sum(1)
    least = int(min(sizes[sizes > 1], default=pools.shape[1]))
    if least == pools.shape[1]:
        return {}
    chances = {f'comment_r{k}_chance': min(k / least, 1.0) for k in (1, 10)}
    return {'comment_pool': least, **chances}


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
