"""Scores of a classifier: accuracy with its interval, macro precision, recall, F1, confusions."""

import math

import numpy as np
from matplotlib.figure import Figure


def score(
    truth: np.ndarray, answers: np.ndarray, classes: int
) -> tuple[dict[str, float], np.ndarray]:
    """Compares answers with the truth, int [n] both, in 0 … classes − 1.

    Returns:
      Fractions in 0–1, and the confusions, int [classes, classes], truth down, answer across.
      `accuracy_low` and `accuracy_high` bound the accuracy (Wilson, 95 %). `precision`, `recall`
      and `f1` are macro means over the classes that occur, as truth or as answer; of a class never
      answered (or never true) the precision (or recall) is 0. `majority` is what the most frequent
      truth gets.

    Raises:
      ValueError: no rows, shapes that do not fit, or a class out of range.
    """
    truth = np.asarray(truth)
    answers = np.asarray(answers)
    if truth.ndim != 1 or truth.shape != answers.shape or not len(truth):
        raise ValueError(f'truth and answers must be [n], n > 0: {truth.shape}, {answers.shape}')
    if min(truth.min(), answers.min()) < 0 or max(truth.max(), answers.max()) >= classes:
        raise ValueError(f'a class is outside 0 … {classes - 1}')
    confusion = np.zeros((classes, classes), np.int64)
    np.add.at(confusion, (truth, answers), 1)
    correct = np.diag(confusion)
    true = confusion.sum(1)
    answered = confusion.sum(0)
    occurs = (true + answered) > 0
    precision = correct / np.maximum(answered, 1)
    recall = correct / np.maximum(true, 1)
    f1 = 2 * correct / np.maximum(true + answered, 1)
    low, high = wilson(int(correct.sum()), len(truth))
    fractions = {
        'accuracy': correct.sum() / len(truth),
        'accuracy_low': low,
        'accuracy_high': high,
        'precision': precision[occurs].mean(),
        'recall': recall[occurs].mean(),
        'f1': f1[occurs].mean(),
        'majority': true.max() / len(truth),
    }
    return {name: float(value) for name, value in fractions.items()}, confusion


def wilson(correct: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Returns the score interval of a proportion (Wilson 1927): 95 % at the default z."""
    p = correct / n
    square = z * z
    centre = (p + square / (2 * n)) / (1 + square / n)
    half = z / (1 + square / n) * math.sqrt(p * (1 - p) / n + square / (4 * n * n))
    return max(centre - half, 0.0), min(centre + half, 1.0)


def figure(confusion: np.ndarray, names: list[str]) -> Figure:
    """Draws a confusion matrix with its counts."""
    fig = Figure(figsize=(1.6 + 0.8 * len(names),) * 2, layout='constrained')
    fig.set_label('How often each class (down) was taken for each (across).')
    axis = fig.subplots()
    axis.imshow(confusion, cmap='Blues')
    for row, column in np.ndindex(*confusion.shape):
        dark = confusion[row, column] > confusion.max() / 2
        axis.text(
            column,
            row,
            str(confusion[row, column]),
            ha='center',
            va='center',
            color='white' if dark else 'black',
        )
    axis.set_xticks(range(len(names)), names)
    axis.set_yticks(range(len(names)), names)
    axis.set(xlabel='answer', ylabel='truth')
    return fig
