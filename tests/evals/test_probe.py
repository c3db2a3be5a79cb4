"""The linear probe against scipy's least squares, and what it must not be fooled by."""

import numpy as np
import pytest
import scipy.optimize

from mmjax.evals.probe import linear_probe


def rows(seed, n=60, d=5, classes=3, apart=0.0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=n)
    return rng.normal(size=(n, d)) + apart * np.eye(classes, d)[labels], labels


@pytest.mark.parametrize('seed', range(5))
def test_it_finds_the_minimum_of_ridge_regression(seed):
    x, y = rows(seed, apart=1.0)
    test, truth = rows(seed + 100, apart=1.0)
    decay = 3.0
    unit = (x - x.mean(0)) / x.std(0)

    def loss(weights, target):
        residual = unit @ weights[:-1] + weights[-1] - target
        return np.sum(residual**2) + decay * np.sum(weights[:-1] ** 2)

    scores = []
    for name in range(3):
        found = scipy.optimize.minimize(loss, np.zeros(6), args=(y == name,), tol=1e-12).x
        scores.append((test - x.mean(0)) / x.std(0) @ found[:-1] + found[-1])
    expected = np.mean(np.argmax(scores, 0) == truth)
    assert linear_probe(x, y, test, truth, decay=decay)[0] == pytest.approx(expected)


def test_noise_scores_like_chance_and_separate_classes_like_one():
    x, y = rows(0, n=400)
    test, truth = rows(1, n=4000)
    assert abs(linear_probe(x, y, test, truth)[0] - 1 / 3) < 0.05
    x, y = rows(0, n=400, apart=9.0)
    test, truth = rows(1, n=400, apart=9.0)
    assert linear_probe(x, y, test, truth)[0] == 1.0


def test_labels_that_training_lacks_are_left_out_and_any_integers_will_do():
    x, y = rows(0, apart=9.0)
    test, truth = rows(1, apart=9.0)
    names = np.array([-7, 1 << 40, 12])
    strange = np.where(np.arange(len(truth)) < 10, 99, names[truth])
    accuracy, majority = linear_probe(x, names[y], test, strange)
    assert accuracy == 1.0
    most = names[np.bincount(y).argmax()]
    assert majority == pytest.approx(np.mean(strange[10:] == most))


def test_a_constant_feature_changes_nothing():
    x, y = rows(3, apart=1.0)
    test, truth = rows(4, apart=1.0)
    wide = lambda a, value: np.hstack([a, np.full((len(a), 1), value)])
    plain = linear_probe(x, y, test, truth)
    assert linear_probe(wide(x, 5.0), y, wide(test, 1e9), truth) == plain


@pytest.mark.parametrize('labels', [[0, 0, 0], [1, 2, 1]])
def test_nothing_to_probe_is_an_error(labels):
    with pytest.raises(ValueError, match='two training classes and a row to score'):
        linear_probe(np.eye(3), np.array(labels), np.eye(3), np.array([7, 7, 7]))
