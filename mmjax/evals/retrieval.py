"""Recall of each query's partner, within its page and over a whole set, with ties broken at random.

A partner that ties with t other candidates is ranked as if the tie were broken at random: with g
candidates above it, it is among the first k with probability clip((k − g) / (t + 1), 0, 1). So
embeddings that have collapsed to one point score exactly chance, never 1. Cosines closer than
`TOLERANCE` are ties, since float32 products of equal vectors differ in the last bit.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

TOLERANCE = 1e-6


@dataclasses.dataclass(frozen=True)
class WithinGroups:
    """Recall among the rows of the same group. Groups of one row are trivially right: left out.

    `recall[k]` and `chance[k]` are fractions in 0–1 (NaN where no group has two rows); chance is
    the mean of min(k, n)/n over the same queries. `correct` is the credit at k = 1 of each scored
    query and `groups` its group, for `bootstrap_by_group`. `chance_error` is the standard error at
    k = 1 of guessing at random, √(Σ 1/n·(1 − 1/n)) / queries. `left_out` counts groups of one row.
    """

    recall: dict[int, float]
    chance: dict[int, float]
    correct: np.ndarray
    groups: np.ndarray
    chance_error: float
    left_out: int


def within_groups(
    queries: np.ndarray, gallery: np.ndarray, groups: np.ndarray, *, ks: Sequence[int] = (1, 5, 10)
) -> WithinGroups:
    """Scores each query against the gallery rows of its own group; the right answer of i is i.

    Args:
      queries, gallery: float [n, d], of any length; rows are compared by cosine.
      groups: int [n], the page of each row.
      ks: cut-offs.

    Raises:
      ValueError: shapes that do not fit, or values that are not finite.
    """
    queries, gallery = _units(queries, gallery)
    groups = np.asarray(groups)
    if groups.shape != (len(queries),):
        raise ValueError(f'groups must be [{len(queries)}], got {list(groups.shape)}')
    _, index, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    pages = np.split(np.argsort(index, kind='stable'), np.cumsum(sizes)[:-1])
    scored = [rows for rows in pages if len(rows) > 1]
    rows = np.concatenate(scored) if scored else np.zeros(0, int)
    candidates = sizes[index[rows]]
    ranks = [_ranks(queries[r], gallery[r], chunk=1024) for r in scored]
    above, ties = np.concatenate(ranks, axis=1) if ranks else np.zeros((2, 0))
    credits = {k: _credit(above, ties, k) for k in {1, *ks}}
    guess = 1 / candidates
    return WithinGroups(
        recall={k: mean(credits[k]) for k in ks},
        chance={k: mean(np.minimum(k, candidates) / candidates) for k in ks},
        correct=credits[1],
        groups=groups[rows],
        chance_error=float(np.sqrt(np.sum(guess * (1 - guess))) / len(rows)) if scored else np.nan,
        left_out=int(np.sum(sizes == 1)),
    )


def paired(
    queries: np.ndarray, gallery: np.ndarray, *, ks: Sequence[int] = (1, 5, 10), chunk: int = 1024
) -> dict[int, float]:
    """Returns {k: R@k} of every query against the whole gallery; the right answer of i is i.

    Chance is min(k, n)/n. Memory is linear: `chunk` queries are compared at a time.

    Args:
      queries, gallery: float [n, d], of any length; rows are compared by cosine.
      ks: cut-offs.
      chunk: queries per tile.

    Raises:
      ValueError: no rows, shapes that do not fit, or values that are not finite.
    """
    queries, gallery = _units(queries, gallery)
    if not len(queries):
        raise ValueError('paired retrieval needs one row or more, got none')
    above, ties = _ranks(queries, gallery, chunk)
    return {k: mean(_credit(above, ties, k)) for k in ks}


def bootstrap_by_group(
    correct: np.ndarray, groups: np.ndarray, *, samples: int = 1000, seed: int = 0
) -> float:
    """Returns the standard error of mean(correct), by resampling whole groups with replacement.

    Panels of one page are not independent, so pages are what is drawn. Infinite with fewer than two
    groups: nothing is known then.

    Args:
      correct: float [n], the credit of each query.
      groups: int [n].
    """
    correct = np.asarray(correct, np.float64)
    names, index = np.unique(groups, return_inverse=True)
    if correct.shape != index.shape:
        raise ValueError(f'correct {correct.shape} and groups {index.shape} must be of one length')
    if len(names) < 2:
        return float('inf')
    sums = np.bincount(index, correct)
    sizes = np.bincount(index)
    rng = np.random.default_rng(seed)
    means = np.empty(samples)
    for sample in range(samples):
        drawn = rng.integers(len(names), size=len(names))
        means[sample] = sums[drawn].sum() / sizes[drawn].sum()
    return float(means.std(ddof=1))


def _units(queries, gallery):
    if queries.ndim != 2 or queries.shape != gallery.shape:
        raise ValueError(
            f'queries and gallery must be [n, d] of one shape, got {queries.shape} and '
            f'{gallery.shape}'
        )
    return _unit(queries, 'queries'), _unit(gallery, 'gallery')


def _unit(rows, name):
    rows = np.asarray(rows, np.float32)
    bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if len(bad):
        raise ValueError(f'{name}: row {bad[0]} is not finite ({len(bad)} of {len(rows)} rows)')
    return unit(rows)


def unit(rows: np.ndarray) -> np.ndarray:
    """Returns rows [n, d] of length 1; a zero row stays, which ties with everything: chance."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norms > 0, norms, 1)


def _ranks(queries, gallery, chunk):
    """Returns per query how many wrong candidates stand above the right one and how many tie."""
    above, ties = np.empty((2, len(queries)), np.int64)
    for start in range(0, len(queries), chunk):
        rows = slice(start, start + chunk)
        scores = queries[rows] @ gallery.T
        partner = np.arange(start, start + len(scores))
        margin = scores - scores[np.arange(len(partner)), partner][:, None]
        above[rows] = np.sum(margin > TOLERANCE, axis=1)
        ties[rows] = np.sum(np.abs(margin) <= TOLERANCE, axis=1) - 1
    return above, ties


def _credit(above, ties, k):
    return np.clip((k - above) / (ties + 1), 0, 1)


def mean(values) -> float:
    """Returns the mean of values, NaN without any."""
    return float(np.mean(values)) if len(values) else float('nan')
