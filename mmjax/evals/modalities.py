"""Measures how much each modality of an input counts in an embedding: swaps, twins, a verdict."""

import itertools
from collections.abc import Iterable, Mapping

import numpy as np

from mmjax.evals.retrieval import unit

BALANCED = 'balanced'
UNKNOWN = 'unknown'  # too few examples, or values that are not finite


def verdicts(names: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Returns the sentences on each verdict, as `Task.verdicts` has them.

    Args:
      names: modality → what a person calls it.
    """
    out = {
        BALANCED: ('good', 'Another input of any modality changes what the model says.'),
        UNKNOWN: ('warn', 'Too few examples, or values that are not finite.'),
    }
    for count in range(1, len(names) + 1):
        for ignored in itertools.combinations(names, count):
            word = ' or '.join(names[name] for name in ignored)
            out[_joined(ignored)] = ('bad', f'Another {word} hardly changes what the model says.')
    return out


def _joined(names: Iterable[str]) -> str:
    return ', '.join(f'ignores_{name}' for name in names)


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns float64 [n], the cosine of each row of `a` with that of `b`; 0 with a zero row.

    >>> cosines(np.array([[3.0, 0.0]]), np.array([[1.0, 1.0]])).round(3).tolist()
    [0.707]

    Args:
      a, b: float [n, d], of any length.
    """
    return np.sum(unit(np.asarray(a, np.float64)) * unit(np.asarray(b, np.float64)), axis=1)


def twin_accuracy(
    queries: np.ndarray, right: np.ndarray, wrong: np.ndarray, *, margin: float = 0.02
) -> float:
    """Returns the fraction of queries nearer to their own row than to its twin.

    Twins are inputs that are equal in all modalities but one. A query that knows that modality
    tells them apart only if their embeddings keep it. Where the modality weighs next to nothing the
    cosines are almost equal: differences up to `margin` count half. Chance is .5; NaN without
    queries. A model that mixes in noise from the modality passes; a probe shows that it is noise.

    >>> query, twins = np.array([[1.0, 0.1]]), np.array([[[1.0, 0.0]], [[0.0, 1.0]]])
    >>> twin_accuracy(query, *twins)
    1.0

    Args:
      queries, right, wrong: float [n, d], of any length.
      margin: of cosines.
    """
    gain = cosines(queries, right) - cosines(queries, wrong)
    credit = np.where(np.abs(gain) <= margin, 0.5, gain > 0)
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
      least: fraction. Where different examples have cosines above .999, all are ignored.

    Returns:
      'ignores_<modality>', several joined by ', '; 'balanced'; 'unknown' for what is not finite.
    """
    if not np.isfinite([*swap_cosines.values(), other]).all():
        return UNKNOWN
    distance = 1 - other
    ignored = [
        name
        for name, cosine in swap_cosines.items()
        if distance < 1e-3 or (1 - cosine) / distance < least
    ]
    return _joined(ignored) or BALANCED


def tower_scores(
    embeddings: Mapping[str, tuple[np.ndarray, np.ndarray]],
) -> dict[str, float | str]:
    """Returns swap cosines and verdict of towers that embed each modality by itself.

    Another input there gives another embedding: `swap_cosine_<modality>` is the mean cosine of the
    embeddings of two different items, 1 for a tower that ignores its input. A tower is said to
    ignore it above .999: cosines of .9 are common among good embeddings. In O(n·d).

    Args:
      embeddings: modality → (float [n, d] of any length, item [n]). A modality with fewer than two
        items is left out.
    """
    swaps = {}
    for name, (rows, items) in embeddings.items():
        _, item = np.unique(items, return_inverse=True)
        units = unit(np.asarray(rows, np.float64))
        sums = np.zeros((item.max(initial=-1) + 1, units.shape[1]))
        np.add.at(sums, item, units)
        counts = np.bincount(item)
        pairs = len(units) ** 2 - float(np.sum(counts.astype(float) ** 2))
        if pairs:
            swaps[name] = float((np.sum(sums.sum(0) ** 2) - np.sum(sums**2)) / pairs)
    out: dict[str, float | str] = {f'swap_cosine_{name}': value for name, value in swaps.items()}
    return out | ({'modality_verdict': verdict(swaps, 0.0, least=1e-3)} if swaps else {})
