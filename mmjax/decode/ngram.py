"""A bigram language model of symbol sequences, for beam search.

Interpolated Kneser-Ney smoothing with one discount an order: with c(hw) how often w came after h,
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

LARGEST = 5000  # symbols of a table, of 100 MB


def bigrams(sentences: Sequence[Sequence[int]], size: int) -> np.ndarray:
    """Returns float32 [size, size] ln p(next | last), for `ctc.beam_search`.

    Index 0, the blank of CTC, which no sentence holds, is the start as `last`, the end as `next`.

    Args:
      sentences: symbols in 1 … size − 1; a sentence may be empty.
      size: V, the blank included.

    Raises:
      ValueError: no sentence, a symbol outside 1 … size − 1, or more than 5000 symbols.
    """
    if not len(sentences) or size > LARGEST:
        raise ValueError(
            f'a table needs sentences and at most {LARGEST} symbols, got {len(sentences)} '
            f'sentences and {size} symbols'
        )
    counts = np.zeros((size, size))
    for number, sentence in enumerate(sentences):
        wrong = [symbol for symbol in sentence if not 0 < symbol < size]
        if wrong:
            raise ValueError(f'sentence {number} holds {wrong[0]}, outside 1 … {size - 1}')
        for pair in itertools.pairwise((0, *sentence, 0)):
            counts[pair] += 1
    single = _smoothed((counts > 0).sum(0, keepdims=True), 1 / size)
    return np.log(_smoothed(counts, single)).astype(np.float32)


def _smoothed(counts: np.ndarray, below: np.ndarray | float) -> np.ndarray:
    """Returns probabilities [n, V] of counts [n, V]; `below`: those of the next lower order."""
    once, twice = (counts == 1).sum(), (counts == 2).sum()
    discount = np.clip(once / (once + 2 * twice), 0.1, 0.9) if once else 0.1
    total, seen = counts.sum(1, keepdims=True), (counts > 0).sum(1, keepdims=True)
    kept = np.maximum(counts - discount, 0) + discount * seen * below
    return np.where(total > 0, kept / np.maximum(total, 1), below)
