"""Search and scores of queries against a gallery: exact, tile by tile, with ties broken at random.

Ties are broken at random, and every score is its expected value. For a match with cosine s,
candidates above s + `retrieval.TOLERANCE` stand before it, and those within the tolerance of s tie
with it, in an order drawn at random: `ties.py` has the closed forms, which are the mean over all
orders. So embeddings that have collapsed to one point score exactly chance, never 1.
"""

import dataclasses
import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from mmjax.evals import ties
from mmjax.evals.retrieval import mean, unit


@dataclasses.dataclass(frozen=True)
class GalleryScores:
    """Scores of the queries that have a match in the gallery; fractions in 0–1.

    `rank[k]` is the fraction with a match among the first k, `chance[k]` what a random
    order gives, `cmc` the curve at 1, 2, …, 50 (or the largest k). `map` is the mean of average
    precision over the whole ranking, `minp` that of (matches)/(rank of the last right one),
    Ye et al. 2020, https://arxiv.org/abs/2001.04193. Means are NaN where no query is scored.

    A scored query has a value in each of `scored` (its row), `ap`, `inp`, `hits[k]` (its credit at
    k) and `first` (the mean rank, from 1, of its first match). `left_out` counts the
    queries without a match.
    """

    rank: dict[int, float]
    map: float
    minp: float
    cmc: np.ndarray
    chance: dict[int, float]
    scored: np.ndarray
    ap: np.ndarray
    inp: np.ndarray
    hits: dict[int, np.ndarray]
    first: np.ndarray
    left_out: int


def search(
    queries: np.ndarray,
    gallery: np.ndarray,
    k: int,
    *,
    chunk_queries: int = 1024,
    chunk_gallery: int = 4096,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns float32 [q, k] cosines and int64 [q, k] rows of the nearest gallery rows, best first.

    Of equal cosines the lower row comes first, whatever the tiles: products are taken in float64
    and rounded to float32, so that equal rows have equal cosines. Memory holds one tile; a gallery
    in a `np.memmap` is read tile by tile, once for each `chunk_queries` queries.

    Args:
      queries, gallery: float [q, d] and [g, d], of any length; a zero row has cosine 0.
      k: how many, 1 or more; more than g is g.
      chunk_queries, chunk_gallery: rows and columns of a tile.

    Raises:
      ValueError: no gallery, shapes that do not fit, values that are not finite, or a k below 1.
    """
    queries, gallery = _checked(queries, gallery, chunk_gallery, [k])
    k = min(k, len(gallery))
    scores = np.empty((len(queries), k), np.float32)
    rows = np.empty((len(queries), k), np.int64)
    for start in range(0, len(queries), chunk_queries):
        batch = slice(start, start + chunk_queries)
        units = _unit(queries[batch])
        best = np.empty((len(units), 0), np.float32)
        nearest = np.empty((len(units), 0), np.int64)
        for column in range(0, len(gallery), chunk_gallery):
            tile = units @ _unit(gallery[column : column + chunk_gallery]).T
            columns = np.broadcast_to(column + np.arange(tile.shape[1]), tile.shape)
            best = np.hstack([best, tile.astype(np.float32)])
            nearest = np.hstack([nearest, columns])
            # Stable, and rows of earlier tiles stand to the left: equal cosines stay in row order.
            order = np.argsort(-best, axis=1, kind='stable')[:, :k]
            best, nearest = (np.take_along_axis(x, order, axis=1) for x in (best, nearest))
        scores[batch] = best
        rows[batch] = nearest
    return scores, rows


def rank(
    queries: np.ndarray,
    gallery: np.ndarray,
    query_ids: np.ndarray,
    gallery_ids: np.ndarray,
    *,
    query_rows: np.ndarray | None = None,
    gallery_rows: np.ndarray | None = None,
    ks: Sequence[int] = (1, 5, 10),
    chunk_queries: int = 1024,
    chunk_gallery: int = 4096,
) -> GalleryScores:
    """Scores every query against the whole gallery; images of its identity are its matches.

    Rankings are never cut: the cosines of a query's matches come first, then each tile says
    how many of the others stand before them. Memory holds one tile and the matches of
    `chunk_queries` queries. The queries may be texts, one an identity or more.

    Args:
      queries, gallery: float [q, d] and [g, d], of any length, by cosine; a `np.memmap` will do.
      query_ids, gallery_ids: integers or strings [q] and [g], the identity.
      query_rows, gallery_rows: integers or strings [q] and [g], the image itself; a gallery row
        that is the query's own image is no candidate for it. Both or none.
      ks: cut-offs of 1 or more.
      chunk_queries, chunk_gallery: rows and columns of a tile.

    Raises:
      ValueError: no gallery, shapes that do not fit, values that are not finite, or ks below 1.
    """
    queries, gallery = _checked(queries, gallery, chunk_gallery, ks)
    if (query_rows is None) != (gallery_rows is None):
        raise ValueError('query_rows and gallery_rows go together, got one of them')
    q = len(queries)
    g = len(gallery)
    ids = _codes(query_ids, gallery_ids, q, g)
    if query_rows is None:
        query_rows = np.zeros(q, int)
        gallery_rows = np.ones(g, int)
    images = _codes(query_rows, gallery_rows, q, g)
    of_identity = _partners(*ids)
    of_image = _partners(*images)
    parts = []
    for start in range(0, max(q, 1), chunk_queries):
        batch = np.arange(start, min(start + chunk_queries, q))
        query, row = of_identity(batch)
        same_image = of_image(batch)
        other = images[0][batch[query]] != images[1][row]
        hidden = np.hstack([(query, row), same_image])
        units = _unit(queries[batch]).astype(np.float32)
        counts = _chunk(units, gallery, query[other], row[other], hidden, chunk_gallery)
        candidates = g - np.bincount(same_image[0], minlength=len(batch))
        parts.append((candidates, *counts))
    candidates, sizes, ap, inp, before, tied, right = map(np.concatenate, zip(*parts, strict=True))
    scored = np.flatnonzero(sizes)
    ap, inp, before, tied, right = (x[scored] for x in (ap, inp, before, tied, right))
    depth = max([50, *ks])
    hits = dict(enumerate(ties.hits(before, tied, right, depth), 1))
    guesses = list(ties.hits(0 * before, candidates[scored], sizes[scored], depth))
    return GalleryScores(
        rank={k: mean(hits[k]) for k in ks},
        map=mean(ap),
        minp=mean(inp),
        cmc=np.array([mean(credit) for credit in hits.values()]),
        chance={k: mean(guesses[k - 1]) for k in ks},
        scored=scored,
        ap=ap,
        inp=inp,
        hits={k: hits[k] for k in ks},
        first=before + (tied + 1) / (right + 1),
        left_out=q - len(scored),
    )


def figure(queries: Sequence, results: Sequence, right: Sequence, titles: Sequence[str]) -> Figure:
    """Draws each query and its first ten results in one row, right in green, wrong in red.

    Args:
      queries: images [height, width, 3], uint8 or floats in 0–1, or texts.
      results: for each query the images it finds, best first; those past the tenth are not fig.
      right: for each query whether each of them is right.
      titles: for each query the line above it. Lists of different lengths are a ValueError.
    """
    widest = max([min(len(images), 10) for images in results], default=1)
    height = max(len(queries), 1)
    fig = Figure(figsize=(1.2 * (widest + 1), 1.5 * height), layout='constrained')
    fig.set_label('Queries (left) and what they find, best first: green is right, red is wrong.')
    axes = fig.subplots(height, widest + 1, squeeze=False)
    for axis in axes.flat:
        axis.axis('off')
    rows = zip(axes[: len(queries)], queries, results, right, titles, strict=True)
    for line, query, images, truth, title in rows:
        line[0].set_title(textwrap.fill(title, 22, max_lines=2), fontsize=7)
        if isinstance(query, str):
            line[0].text(0, 1, textwrap.fill(query, 20, max_lines=8), fontsize=6, va='top')
        else:
            line[0].imshow(query)
        pairs = list(zip(images, truth, strict=True))
        for axis, (image, is_right) in zip(line[1:], pairs, strict=False):
            axis.imshow(image)
            axis.axis('on')
            axis.set(xticks=[], yticks=[])
            for spine in axis.spines.values():
                spine.set(color='tab:green' if is_right else 'tab:red', linewidth=3)
    return fig


def _checked(queries, gallery, chunk_gallery, ks):
    queries, gallery = np.asarray(queries), np.asarray(gallery)  # a view of a memmap, no copy
    if queries.ndim != 2 or gallery.ndim != 2 or queries.shape[1] != gallery.shape[1]:
        shapes = f'{queries.shape} and {gallery.shape}'
        raise ValueError(f'queries and gallery must be [q, d] and [g, d], got {shapes}')
    if not len(gallery):
        raise ValueError('the gallery needs one row or more, got none')
    if min(ks, default=1) < 1:
        raise ValueError(f'k must be 1 or more, got {min(ks)}')
    for name, rows in (('queries', queries), ('gallery', gallery)):
        for start in range(0, len(rows), chunk_gallery):
            bad = np.flatnonzero(~np.isfinite(rows[start : start + chunk_gallery]).all(axis=1))
            if len(bad):
                raise ValueError(f'{name}: row {start + bad[0]} is not finite')
    return queries, gallery


def _unit(rows):
    return unit(np.asarray(rows, np.float64))  # so that no float32 length over- or underflows


def _codes(query_keys, gallery_keys, q, g):
    """Returns [q] and [g] integers that are equal where the keys are."""
    keys = np.asarray(query_keys), np.asarray(gallery_keys)
    shapes = [list(x.shape) for x in keys]
    if shapes != [[q], [g]]:
        raise ValueError(f'ids and rows must be [{q}] and [{g}], got {shapes[0]} and {shapes[1]}')
    kinds = {x.dtype.kind for x in keys if len(x)}
    if len(kinds) > 1 or not kinds <= set('iuU'):  # joined, 1 and '1' would become equal
        raise ValueError(f'ids and rows must be integers or strings of one kind, got {kinds}')
    return np.split(np.unique(np.concatenate(keys), return_inverse=True)[1], [q])


def _partners(query_codes, gallery_codes):
    """Returns a function: rows of queries → (position in them, gallery row) of all equal codes."""
    order = np.argsort(gallery_codes, kind='stable')
    sides = 'left', 'right'
    first, last = (np.searchsorted(gallery_codes, query_codes, s, sorter=order) for s in sides)

    def of(rows):
        sizes = last[rows] - first[rows]
        offsets = np.repeat(first[rows] - np.cumsum(sizes) + sizes, sizes)
        return np.repeat(np.arange(len(rows)), sizes), order[np.arange(sizes.sum()) + offsets]

    return of


def _chunk(units, gallery, query, row, hidden, chunk):
    """Returns the `ties.Rankings.scores` of one tile of queries.

    `query`, `row` are the right pairs. They are `hidden` in the tiles, with what is no candidate,
    and counted apart, so that rounding never makes a precision larger than 1.
    """
    cosines = np.empty(len(row), np.float32)
    for start in range(0, len(row), chunk):
        pair = slice(start, start + chunk)
        matches = _unit(gallery[row[pair]]).astype(np.float32)
        cosines[pair] = np.einsum('pd,pd->p', units[query[pair]], matches)
    rankings = ties.Rankings(query, cosines, len(units))
    hidden = hidden[:, np.argsort(hidden[1], kind='stable')]
    for start in range(0, len(gallery), chunk):
        tile = units @ _unit(gallery[start : start + chunk]).astype(np.float32).T
        inside = hidden[:, slice(*np.searchsorted(hidden[1], [start, start + chunk]))]
        tile[inside[0], inside[1] - start] = -np.inf
        tile.sort(axis=1)
        rankings.add(tile)
    return rankings.scores()
