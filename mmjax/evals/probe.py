"""A linear probe: how well a linear classifier predicts a label from frozen embeddings."""

import numpy as np


def linear_probe(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    *,
    decay: float = 1.0,
) -> tuple[float, float]:
    """Fits one-against-all ridge regression on `train` and scores `test`.

    Features are centred and scaled by the training rows; a constant one stays 0. Ties go to the
    class that comes first.

    Args:
      train, test: float [n, d] and [m, d].
      train_labels, test_labels: int [n] and [m], any values.
      decay: the penalty, as a multiple of one row's weight.

    Returns:
      Fractions in 0–1 of the test rows whose label training has: how many are right, and how many
      the most frequent training label would get.

    Raises:
      ValueError: fewer than two training classes, or no test row of one of them.

    Source: Hastie, Tibshirani and Friedman, The Elements of Statistical Learning, §4.2.
    """
    train = np.asarray(train, np.float64)
    test = np.asarray(test, np.float64)
    classes, targets = np.unique(train_labels, return_inverse=True)
    known = np.isin(test_labels, classes)
    if len(classes) < 2 or not known.any():
        raise ValueError(
            f'a probe needs two training classes and a row to score, got {len(classes)} and '
            f'{known.sum()}'
        )
    mean = train.mean(0)
    std = train.std(0)
    scale = np.where(std > 0, std, np.inf)
    x = (train - mean) / scale
    y = np.eye(len(classes))[targets]
    gram = x.T @ x + decay * np.eye(x.shape[1])
    weights = np.linalg.solve(gram, x.T @ (y - y.mean(0)))
    scores = (test[known] - mean) / scale @ weights + y.mean(0)
    correct = classes[scores.argmax(1)] == np.asarray(test_labels)[known]
    majority = classes[np.bincount(targets).argmax()]
    return float(correct.mean()), float(np.mean(np.asarray(test_labels)[known] == majority))
