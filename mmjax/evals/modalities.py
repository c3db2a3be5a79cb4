"""Measures how much each modality of an input counts in an embedding: swaps, twins, a verdict."""

from collections.abc import Mapping

import numpy as np

from mmjax.evals.retrieval import TOLERANCE

BALANCED = 'every modality counts'


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns float64 [n], the cosine of each row of `a` with that of `b`; 0 with a zero row.

    >>> cosines(np.array([[3.0, 0.0]]), np.array([[1.0, 1.0]])).round(3).tolist()
    [0.707]

    Args:
      a, b: float [n, d], of any length.
    """
    return np.sum(_units(a) * _units(b), axis=1)


def twin_accuracy(queries: np.ndarray, right: np.ndarray, wrong: np.ndarray) -> float:
    """Returns the fraction of queries nearer to their own row than to its twin; a tie counts half.

    Twins are inputs that are equal in all modalities but one. A query that knows that modality
    tells them apart only if their embeddings keep it. Chance is .5; NaN without queries.

    >>> query, twins = np.array([[1.0, 0.1]]), np.array([[[1.0, 0.0]], [[0.0, 1.0]]])
    >>> twin_accuracy(query, *twins)
    1.0

    Args:
      queries, right, wrong: float [n, d], of any length.
    """
    margin = cosines(queries, right) - cosines(queries, wrong)
    credit = np.where(np.abs(margin) <= TOLERANCE, 0.5, margin > 0)
    return float(credit.mean()) if len(credit) else float('nan')


def verdict(swap_cosines: Mapping[str, float], other: float, *, least: float = 0.05) -> str:
    """Names the modalities that an embedding ignores.

    A swap puts one modality of another example in. It moves an embedding by 1 − cosine, at most
    about as far as to the embedding of that other example. A modality is ignored if its swap moves
    less than `least` of that.

    >>> verdict({'vision': 0.744, 'text': 0.9986}, 0.4)
    'ignores_text'

    Args:
      swap_cosines: modality → mean cosine of the embedding before and after the swap.
      other: mean cosine of the embeddings of two different examples.
      least: fraction.

    Returns:
      'ignores_<modality>', several joined by ', ', or 'every modality counts'.
    """
    distance = max(1 - other, 1e-9)
    names = [name for name, cosine in swap_cosines.items() if (1 - cosine) / distance < least]
    return ', '.join(f'ignores_{name}' for name in names) or BALANCED


def _units(rows: np.ndarray) -> np.ndarray:
    rows = np.asarray(rows, np.float64)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norms > 0, norms, 1)
