"""Expected scores of rankings whose tied candidates stand in an order drawn at random.

A match is in a class of candidates that tie with it. The class has `size` candidates, of
which `right` are right, it included; `before` candidates stand before the class, of which
`right_before` are right. Each score is the mean over all orders of the class, in closed form.
Source: McSherry & Najork, ECIR 2008, https://doi.org/10.1007/978-3-540-78646-7_38.
"""

from collections.abc import Iterator

import numpy as np

from mmjax.evals.retrieval import TOLERANCE


class Rankings:
    """Counts what stands before and beside each match of some queries.

    Args:
      query: int [n], the query of each match, in 0 … queries − 1.
      cosines: float32 [n], of each with its query.
      queries: how many.
    """

    def __init__(self, query: np.ndarray, cosines: np.ndarray, queries: int):
        order = np.lexsort((-cosines, query))
        self.query = query[order]
        cosines = cosines[order]
        self.sizes = np.bincount(query, minlength=queries)
        self.ends = np.cumsum(self.sizes)
        self.spans = [slice(*span) for span in zip(self.ends - self.sizes, self.ends, strict=True)]
        self.high = cosines + np.float32(TOLERANCE)
        self.low = cosines - np.float32(TOLERANCE)
        self.before, self.size = np.zeros((2, len(cosines)), np.int64)
        self.add([cosines[span][::-1] for span in self.spans])
        self.right_before = self.before.copy()
        self.right = self.size.copy()

    def add(self, wrong: np.ndarray):
        """Counts wrong candidates: float32 [queries, m] cosines, each row ascending."""
        for line, span in zip(wrong, self.spans, strict=True):
            higher = len(line) - np.searchsorted(line, self.high[span], 'right')
            self.before[span] += higher
            self.size[span] += len(line) - np.searchsorted(line, self.low[span], 'left') - higher

    def scores(self) -> tuple[np.ndarray, ...]:
        """Returns [queries] arrays, 0 for a query without a match.

        The number of matches; average precision; (matches)/(rank of the last one);
        and `before`, `size` and `right` of the class of the best one.
        """
        precisions = precision(self.before, self.size, self.right_before, self.right)
        queries = len(self.sizes)
        matched = np.flatnonzero(self.sizes)
        ap = np.bincount(self.query, precisions, queries) / np.maximum(self.sizes, 1)
        classes = np.stack([self.before, self.size, self.right])
        best = np.zeros((3, queries), np.int64)
        inp = np.zeros(queries)
        best[:, matched] = classes[:, self.ends[matched] - self.sizes[matched]]
        inp[matched] = [inverse_last(*worst) for worst in classes[:, self.ends[matched] - 1].T]
        return self.sizes, ap, inp * self.sizes, *best


def precision(before, size, right_before, right) -> np.ndarray:
    """Returns the mean precision at a match of each class; average precision sums them.

    The candidate is at each position p of its class with probability 1/size, after
    (p − 1)(right − 1)/(size − 1) other right ones of the class on average:
    Σ_p (right_before + 1 + (p − 1)(right − 1)/(size − 1)) / (size · (before + p)).
    Right to 1e-9 in rankings of a million.

    Args:
      before, size, right_before, right: int [n], one class each.
    """
    count = np.max(before + size, initial=0)
    harmonic = np.concatenate([[0], np.cumsum(1 / np.arange(1, count + 1))])
    spread = np.where(size > 1, (right - 1) / np.maximum(size - 1, 1), 1)
    # A difference of harmonic numbers would lose digits where most classes are: of one candidate.
    inverse = np.where(size > 1, harmonic[before + size] - harmonic[before], 1 / (before + 1))
    return (spread * size + inverse * (right_before + 1 - spread * (before + 1))) / size


def inverse_last(before: int, size: int, right: int) -> float:
    """Returns the mean of 1/rank of the last match of one class.

    Its position p has the probability binom(p − 1, right − 1)/binom(size, right).
    """
    p = np.arange(size, right - 1, -1)
    earlier = np.cumprod(1 - right / p)  # the probability that the last one is before p
    return float(np.sum(np.append(1, earlier[:-1]) * right / p / (before + p)))


def hits(before, size, right, depth: int) -> Iterator[np.ndarray]:
    """Yields, for k = 1 … depth, the probability [n] of a match among the first k.

    The classes are those of the best matches. 1 − binom(size − m, right)/binom(size, right)
    with m = clip(k − before, 0, size) candidates of the class among the first k.

    Args:
      before, size, right: int [n], one class each.
    """
    missed = np.ones(len(size))
    for k in range(1, depth + 1):
        drawn = k - 1 - before  # candidates of the class that stand before position k
        wrong = (size - right - drawn) / np.maximum(size - drawn, 1)
        missed = missed * np.where(drawn >= 0, wrong, 1)  # stays 0 once no wrong one is left
        yield 1 - missed
