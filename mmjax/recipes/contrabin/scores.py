"""Scores of the ContraBin recipe: retrieval in pools, across optimisation levels, a probe."""

import collections
import functools
import itertools
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from mmjax.engine.task import Evaluator, Scores, gather
from mmjax.evals import gallery, modalities
from mmjax.evals.probe import linear_probe
from mmjax.recipes.contrabin.data import LEVELS, TEXTS, CodeFunctions, sample

VERDICTS = modalities.verdicts({text: text for text in TEXTS})
PROBE_ROWS = 2000  # training functions that a probe learns from
SIMILARITY_ROWS = 64  # functions drawn
PROJECTION_ROWS = 600
GREY = '0.8'


class CodeScores(Evaluator):
    """Scores a split, one binary per function, with the same metrics in every stage.

    Retrieval: functions are dealt at random (always alike) to pools of `pool`; a query of one
    modality searches the pool's other modality. What fills no pool is left out and counted; a
    smaller split is one pool. Functions without comment take no part where one is needed:
    `comment_pool` is what is left of the smallest pool then, with chances of its own. Levels: the
    binaries of a pool at one level search those at another. Losses: each pool is a batch;
    `final_loss` has the primary ones alone, which mean the same in every stage. `<text>_full`:
    fraction of texts that use all the tokens there are, most of which were cut.

    Args:
      functions: the split.
      train: the split that a probe learns from.
      weights: primary loss → its final weight.
      batch_size: rows per batch.
      pool: functions that a query is compared with.
      normalize: whether embeddings are used with length 1.
    """

    methods = ('embed_binary',)

    def __init__(
        self,
        functions: CodeFunctions,
        train: CodeFunctions,
        weights: Mapping[str, float],
        batch_size: int,
        pool: int,
        normalize: bool,
    ):
        self.dataset = functions.subset(functions.one_each())
        self.functions = functions
        self.train = train
        self.batch_size = batch_size
        self.weights = weights
        self.normalize = normalize
        rows = len(self.dataset)
        size = min(pool, rows)
        order = np.random.default_rng(0).permutation(rows)
        self.pools = order[: rows // size * size].reshape(-1, size)

    def loss_batches(self):
        return list(self.pools)

    def run(self, predict, *, final, results):
        outputs = {text: results.outputs[text] for text in TEXTS}
        if self.normalize:
            outputs = {text: _unit(x) for text, x in outputs.items()}
        has = results.batch['has_comment']
        rows, size = len(self.dataset), self.pools.shape[1]
        metrics = {
            'functions': rows,
            'pool': size,
            'left_out': rows - self.pools.size,
            'r1_chance': 1 / size,
            'r10_chance': min(10 / size, 1.0),
            'final_loss': sum(w * results.losses[name] for name, w in self.weights.items()),
            **self._full,
            **_commented(has, self.pools),
        }
        for a, b in itertools.permutations(TEXTS, 2):
            metrics |= _pair(outputs, a, b, has, self.pools)
        everywhere = np.ones(rows, bool)
        present = {text: has if text == 'comment' else everywhere for text in TEXTS}
        item = np.arange(rows)
        metrics |= modalities.tower_scores(
            {text: (outputs[text][mask], item[mask]) for text, mask in present.items()}
        )
        metrics |= self._levels(predict)
        metrics |= self._probe(predict, outputs['binary'])
        figures = {}
        if final:
            labels = [self.dataset.record(row)['label'] for row in range(rows)]
            figures = {
                'similarity': similarity(outputs, self.pools[0], has),
                'projection': projection(outputs, has, labels),
            }
        return Scores(metrics, figures)

    @functools.cached_property
    def _full(self) -> dict[str, float]:
        """Returns the fraction of each text whose last token is real."""
        rng = np.random.default_rng(0)
        examples = (self.dataset.example(row, rng, False) for row in range(len(self.dataset)))
        means = np.mean([[one[f'{text}_mask'][-1] for text in TEXTS] for one in examples], axis=0)
        return {f'{text}_full': float(mean) for text, mean in zip(TEXTS, means, strict=True)}

    def _levels(self, predict) -> dict[str, float]:
        """Returns mAP between binaries of one pool's functions at two levels."""
        index = self.functions.index
        dealt = self.dataset.index['identity'][self.pools]
        rows = np.flatnonzero(np.isin(index['identity'], dealt) & (index['level'] >= 0))
        if len(np.unique(index['level'][rows])) < 2:
            return {}
        data = self.functions.subset(rows)
        embeddings, _ = gather(predict, 'embed_binary', data, self.batch_size)
        identity = data.index['identity']
        level = data.index['level']
        maps = collections.defaultdict(list)
        for pool in dealt:
            here = np.isin(identity, pool)
            for a, b in itertools.permutations(np.unique(level), 2):
                q = here & (level == a)
                g = here & (level == b)
                if np.isin(identity[q], identity[g]).any():
                    scores = gallery.rank(embeddings[q], embeddings[g], identity[q], identity[g])
                    maps[f'binary_{LEVELS[a]}_{LEVELS[b]}_map'.lower()].append(scores.map)
        metrics = {name: float(np.mean(values)) for name, values in maps.items()}
        if metrics:
            metrics['binary_levels_map'] = float(np.mean(list(metrics.values())))
        return metrics

    def _probe(self, predict, binaries) -> dict[str, float]:
        """Returns how well a linear map of binary embeddings predicts the label."""
        labels = self.dataset.index['label']
        rows = self.train.one_each()
        rows = rows[self.train.index['label'][rows] != 0]
        data = self.train.subset(rows[sample(len(rows), PROBE_ROWS)])
        known = np.unique(data.index['label'])
        if len(known) < 2 or not np.isin(labels, known).any():
            return {}
        embeddings, _ = gather(predict, 'embed_binary', data, self.batch_size)
        scored = labels != 0
        accuracy, majority = linear_probe(
            embeddings, data.index['label'], binaries[scored], labels[scored]
        )
        return {'probe_accuracy': accuracy, 'probe_majority': majority}


def _commented(has, pools) -> dict[str, float]:
    """Returns the smallest pool that is left where comments are needed, and its chances.

    Empty where all functions of every pool that is scored have one.
    """
    sizes = has[pools].sum(1)
    least = int(min(sizes[sizes > 1], default=pools.shape[1]))
    if least == pools.shape[1]:
        return {}
    chances = {f'comment_r{k}_chance': min(k / least, 1.0) for k in (1, 10)}
    return {'comment_pool': least, **chances}


def _pair(outputs, a: str, b: str, has, pools) -> dict[str, float]:
    """Returns R@1/5/10 and MRR of queries `a` against `b`, averaged over the pools."""
    scores = []
    for pool in pools:
        if 'comment' in (a, b):
            pool = pool[has[pool]]
        if len(pool) > 1:
            scores.append(gallery.rank(outputs[a][pool], outputs[b][pool], pool, pool))
    if not scores:
        return {}
    recall = {f'{a}_{b}_r{k}': float(np.mean([s.rank[k] for s in scores])) for k in (1, 5, 10)}
    # Of one right answer per query, average precision is the reciprocal of its rank.
    return recall | {f'{a}_{b}_mrr': float(np.mean([s.map for s in scores]))}


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9)


# Figures ---------------------------------------------------------------------------------------


def similarity(outputs: Mapping[str, np.ndarray], pool: np.ndarray, has: np.ndarray) -> Figure:
    """Draws cosines of binaries with sources, and with the comments that there are.

    Args:
      outputs: embeddings by modality, float [functions, features].
      pool: int, rows of the functions to draw, of which the first 64 are.
      has: bool [functions], whether there is a comment.
    """
    figure = Figure(figsize=(8, 4), layout='constrained')
    figure.set_label(
        'Cosines of binaries (down) and of source and comment (across), up to '
        f'{SIMILARITY_ROWS} functions.'
    )
    axes = figure.subplots(1, 2)
    for axis, name in zip(axes, ('source', 'comment'), strict=True):
        rows = (pool if name == 'source' else pool[has[pool]])[:SIMILARITY_ROWS]
        cosines = _unit(outputs['binary'][rows]) @ _unit(outputs[name][rows]).T
        axis.set(xlabel=name, ylabel='binary')
        if cosines.size:
            image = axis.imshow(cosines, vmin=-1, vmax=1, cmap='RdBu_r')
    figure.colorbar(image, ax=axes)
    return figure


def projection(outputs: Mapping[str, np.ndarray], has: np.ndarray, labels: Sequence[str]) -> Figure:
    """Draws the two main directions of all three modalities, and binaries coloured by label.

    Args:
      outputs, has: as `similarity`; the first 600 functions are drawn.
      labels: of those functions, '' for none; the 20 most frequent have colours.
    """
    has = has[:PROJECTION_ROWS]
    embeddings = {name: outputs[name][:PROJECTION_ROWS] for name in TEXTS}
    embeddings['comment'] = embeddings['comment'][has]
    joined = np.concatenate(list(embeddings.values()))
    _, _, directions = np.linalg.svd(joined - joined.mean(0), full_matrices=False)
    points = {name: (x - joined.mean(0)) @ directions[:2].T for name, x in embeddings.items()}
    figure = Figure(figsize=(9, 4), layout='constrained')
    figure.set_label('Embeddings along their two main directions: by modality, binaries by label.')
    left, right = figure.subplots(1, 2)
    for name, xy in points.items():
        left.scatter(*xy.T, s=6, label=name, alpha=0.6)
    left.legend(fontsize=7)
    labels = np.array(labels[:PROJECTION_ROWS])
    palette = matplotlib.colormaps['tab20'].colors
    counts = collections.Counter(filter(None, labels.tolist()))
    known = sorted(label for label, _ in counts.most_common(len(palette)))
    groups = [('none or others', GREY, ~np.isin(labels, known))]
    groups += [(one, colour, labels == one) for one, colour in zip(known, palette, strict=False)]
    for label, colour, rows in groups:
        if rows.any():
            right.scatter(*points['binary'][rows].T, s=6, color=[colour], label=label)
    if known:
        right.legend(fontsize=6, loc='upper left', bbox_to_anchor=(1, 1))
    return figure
