"""Measures how much each modality of an input counts in an embedding: swaps, twins, a verdict."""

from collections.abc import Mapping

import numpy as np

from mmjax.evals.retrieval import TOLERANCE

BALANCED = 'every modality counts'


def verdicts(names: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Returns the sentences on each verdict, as `Task.verdicts` has them.

    Args:
      names: modality → what a person calls it.
    """
    out = {BALANCED: ('good', 'Another input of any modality changes what the model says.')}
    for name, word in names.items():
        out[f'ignores_{name}'] = ('bad', f'Another {word} hardly changes what the model says.')
    return out


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


def tower_scores(
    embeddings: Mapping[str, tuple[np.ndarray, np.ndarray]],
) -> dict[str, float | str]:
    """Returns swap cosines and verdict of towers that embed each modality by itself.

    Another input there gives another embedding: `swap_cosine_<modality>` is the mean cosine of the
    embeddings of two different items, 1 for a tower that ignores its input. In O(n·d).

    Args:
      embeddings: modality → (float [n, d] of any length, item [n]). A modality with fewer than two
        items is left out.
    """
    swaps = {}
    for name, (rows, items) in embeddings.items():
        _, item = np.unique(items, return_inverse=True)
        units = _units(rows)
        sums = np.zeros((item.max(initial=-1) + 1, units.shape[1]))
        np.add.at(sums, item, units)
        counts = np.bincount(item)
        pairs = len(units) ** 2 - float(np.sum(counts.astype(float) ** 2))
        if pairs:
            swaps[name] = float((np.sum(sums.sum(0) ** 2) - np.sum(sums**2)) / pairs)
    out: dict[str, float | str] = {f'swap_cosine_{name}': value for name, value in swaps.items()}
    return out | ({'modality_verdict': verdict(swaps, 0.0)} if swaps else {})


def _units(rows: np.ndarray) -> np.ndarray:
    rows = np.asarray(rows, np.float64)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norms > 0, norms, 1)
