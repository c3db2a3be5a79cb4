"""An n-gram language model of symbol sequences, for beam search and for scoring whole sentences.

Interpolated Kneser-Ney smoothing with one discount an order: after a context h,

  p(w | h) = max(c(hw) − D, 0)/c(h) + D·n(h)/c(h) · p(w | h without its first symbol)

where n(h) is the number of symbols seen after h. The longest n-grams, and those that begin with the
start of a sentence, have their counts as c; shorter ones the number of symbols they were seen
after. Below the unigrams stands the uniform distribution, so that every symbol has some mass.
D = n₁/(n₁ + 2n₂), n₁ and n₂ the n-grams counted once and twice, kept within 0.1–0.9 for data too
small to have both.

Source: Kneser & Ney 1995, https://doi.org/10.1109/ICASSP.1995.479394; interpolated as in Chen &
Goodman 1999, https://doi.org/10.1006/csla.1999.0128.
"""

import collections
import dataclasses
from collections.abc import Sequence

import numpy as np

LARGEST_TABLE = 5000


@dataclasses.dataclass(frozen=True)
class NGram:
    """Probabilities of the next symbol, in 1 … size − 1; 0 is the start or the end of a sentence.

    0 is the blank of CTC elsewhere, which no sentence holds. `counts` maps a context of at most
    order − 1 symbols to {next symbol: count}, and `discounts[n]` belongs to contexts of n symbols.
    """

    order: int
    size: int
    counts: dict[tuple[int, ...], dict[int, int]]
    discounts: tuple[float, ...]

    def probabilities(self, context: Sequence[int]) -> np.ndarray:
        """Returns float64 [size] that sum to 1: of each next symbol, and of the end at 0.

        Args:
          context: what came before, of which the last order − 1 symbols count. A sentence begins
            with a 0.
        """
        context = tuple(context)[-(self.order - 1) :]
        result = np.full(self.size, 1 / self.size)
        for start in range(len(context), -1, -1):
            seen = self.counts.get(context[start:])
            if seen is None:  # then no longer context was seen either
                break
            symbols = np.fromiter(seen, np.int64, len(seen))
            values = np.fromiter(seen.values(), np.float64, len(seen))
            discount, total = self.discounts[len(context) - start], values.sum()
            result *= discount * len(seen) / total
            result[symbols] += (values - discount) / total
        return result

    def score(self, sentence: Sequence[int]) -> float:
        """Returns ln p(sentence, end), the end of the sentence included.

        Raises:
          ValueError: a symbol outside 1 … size − 1.
        """
        _check([sentence], self.size)
        padded = [0, *sentence, 0]
        logs = [np.log(self.probabilities(padded[:i])[padded[i]]) for i in range(1, len(padded))]
        return float(np.sum(logs))

    def table(self) -> np.ndarray:
        """Returns float32 [size, size] ln p(next | last) of a bigram model, for `beam_search`.

        Raises:
          ValueError: another order, or more than 5000 symbols (100 MB); such models can still
            `score` the sentences a beam search returns.
        """
        if self.order != 2 or self.size > LARGEST_TABLE:
            raise ValueError(
                f'a table needs order 2 and at most {LARGEST_TABLE} symbols, got order '
                f'{self.order} and {self.size} symbols'
            )
        rows = [np.log(self.probabilities([last])) for last in range(self.size)]
        return np.array(rows, np.float32)


def estimate(sentences: Sequence[Sequence[int]], size: int, *, order: int = 2) -> NGram:
    """Counts n-grams and returns the smoothed model.

    Args:
      sentences: symbols in 1 … size − 1; a sentence may be empty.
      size: V, the blank included.
      order: 2 or 3.

    Raises:
      ValueError: no sentence, another order, or a symbol outside 1 … size − 1.
    """
    if order not in (2, 3) or not len(sentences):
        raise ValueError(f'need order 2 or 3 and sentences, got order {order}, {len(sentences)}')
    _check(sentences, size)
    counts = [collections.Counter() for _ in range(order)]  # of contexts of 0, 1, … symbols
    for sentence in sentences:
        padded = (0, *sentence, 0)
        for end in range(2, len(padded) + 1):
            start = max(end - order, 0)
            counts[end - start - 1][padded[start:end]] += 1
    # Shorter n-grams, longest first: how many different symbols stood before each.
    for length in range(order - 1, 0, -1):
        counts[length - 1].update(gram[1:] for gram in counts[length])
    contexts = collections.defaultdict(dict)
    for grams in counts:
        for gram, count in grams.items():
            contexts[gram[:-1]][gram[-1]] = count
    return NGram(order, size, dict(contexts), tuple(_discount(grams) for grams in counts))


def _discount(grams):
    of = collections.Counter(grams.values())
    return float(np.clip(of[1] / (of[1] + 2 * of[2]), 0.1, 0.9)) if of[1] else 0.1


def _check(sentences, size):
    for number, sentence in enumerate(sentences):
        wrong = [symbol for symbol in sentence if not 0 < symbol < size]
        if wrong:
            raise ValueError(f'sentence {number} holds {wrong[0]}, outside 1 … {size - 1}')
