"""A bigram language model of symbol sequences, for beam search.

Interpolated Kneser-Ney smoothing with one discount per order: with c(hw) how often w came after h,
c(h) their sum and n(h) the number of different symbols after h,

  p(w | h) = max(c(hw) − D₂, 0)/c(h) + D₂·n(h)/c(h) · p(w)
  p(w)     = max(c(w) − D₁, 0)/c + D₁·n/c · 1/V

where c(w) is the number of different symbols that w came after, c their sum and n the number of
symbols that came after any. Every symbol has some mass, and after an unseen h it is p(w).
D = n₁/(n₁ + 2n₂), n₁ and n₂ the counts of one and of two, kept within 0.1–0.9 for data too small
to have both.

Source: Kneser & Ney 1995, https://doi.org/10.1109/ICASSP.1995.479394; interpolated as in Chen &
Goodman 1999, https://doi.org/10.1006/csla.1999.0128.
"""

import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

MAX_SYMBOLS = 5000  # a table of 100 MB


def bigrams(sentences: Sequence[Sequence[int]], size: int) -> Float[np.ndarray, '{size} {size}']:
    """Estimates float32 ln p(next | last), for `ctc.beam_search`.

    Index 0, the blank of CTC, which no sentence holds, is the start as `last`, the end as `next`.

    >>> table = bigrams([[1, 2], [1, 2], [1]], 3)
    >>> [round(float(p), 2) for p in np.exp(table[1])]  # after 1: the end, 1 or 2
    [0.33, 0.03, 0.63]

    Args:
      sentences: symbols in 1 … size − 1; a sentence may be empty.
      size: symbols, the blank included.

    Raises:
      ValueError: no sentence, a symbol outside 1 … size − 1, or more than 5000 symbols.
    """
    if not len(sentences) or size > MAX_SYMBOLS:
        raise ValueError(
            f'a table needs sentences and at most {MAX_SYMBOLS} symbols, got {len(sentences)} '
            f'sentences and {size} symbols'
        )
    counts = np.zeros((size, size))
    for number, sentence in enumerate(sentences):
        invalid = [symbol for symbol in sentence if not 0 < symbol < size]
        if invalid:
            raise ValueError(f'sentence {number} holds {invalid[0]}, outside 1 … {size - 1}')
        for pair in itertools.pairwise((0, *sentence, 0)):
            counts[pair] += 1
    unigrams = _smoothed((counts > 0).sum(0, keepdims=True), 1 / size)
    return np.log(_smoothed(counts, unigrams)).astype(np.float32)


def _smoothed(counts: np.ndarray, lower_order: np.ndarray | float) -> np.ndarray:
    """Returns probabilities [n, V] of counts [n, V]; `lower_order`: those of the order below."""
    once = (counts == 1).sum()
    twice = (counts == 2).sum()
    discount = np.clip(once / (once + 2 * twice), 0.1, 0.9) if once else 0.1
    total = counts.sum(1, keepdims=True)
    distinct = (counts > 0).sum(1, keepdims=True)
    mass = np.maximum(counts - discount, 0) + discount * distinct * lower_order
    return np.where(total > 0, mass / np.maximum(total, 1), lower_order)
