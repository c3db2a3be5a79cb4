"""CTC against the sum over all alignments, rows that cannot be aligned, and its regulariser."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mmjax.losses import ctc

ctc_rows = jax.jit(ctc.ctc_rows, static_argnames='blank')


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


def spelled(path, blank=0):
    return tuple(symbol for symbol, _ in itertools.groupby(path) if symbol != blank)


@functools.cache
def paths(frames, size, labels, blank):
    every = itertools.product(range(size), repeat=frames)
    return np.array([path for path in every if spelled(path, blank) == labels])


def all_paths(logits, labels, blank=0):
    """−log of the summed probability of every path that spells the labels, in float64."""
    log_p = log_softmax(logits)
    chosen = paths(*log_p.shape, tuple(labels), blank)
    return -np.logaddexp.reduce(log_p[np.arange(len(log_p)), chosen].sum(axis=1))


def batch(rows, frames=5, size=3, seed=0):
    """Arrays of rows (frames, labels); padding holds NaN frames and labels that look like real."""
    rng = np.random.default_rng(seed)
    width = max(len(labels) for _, labels in rows) + 1
    logits = rng.normal(size=(len(rows), frames, size)).astype(np.float32) * 2
    mask = np.arange(frames) < np.array([n for n, _ in rows])[:, None]
    logits[~mask] = np.nan
    label_mask = np.arange(width) < np.array([len(labels) for _, labels in rows])[:, None]
    labels = np.array([(*y, *[y[-1] if y else 1] * (width - len(y))) for _, y in rows], np.int32)
    return logits, mask, labels, label_mask


ROWS = [(5, (1, 2)), (5, (1, 1)), (3, (1, 1)), (4, (2, 2, 1)), (5, ()), (1, (2,)), (5, (2, 1, 2))]


@pytest.mark.parametrize('blank', [0, 1])
def test_rows_are_the_sum_over_all_alignments(blank):
    swap = {0: 0, 1: 1, 2: 2} if blank == 0 else {1: 0, 2: 2}
    rows = [(n, tuple(swap[y] for y in labels)) for n, labels in ROWS]
    logits, mask, labels, label_mask = batch(rows)
    losses, feasible = ctc_rows(logits, mask, labels, label_mask, blank=blank)
    expected = [all_paths(x[:n], y, blank) for x, (n, y) in zip(logits, rows, strict=True)]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert losses.dtype == jnp.float32 and np.all(feasible) and feasible.dtype == bool


def test_no_labels_at_all_is_all_blank():
    logits, mask, _, _ = batch([(5, ()), (2, ())])
    none = np.zeros((2, 0), np.int32)
    losses, feasible = ctc_rows(logits, mask, none, none.astype(bool))
    expected = [-log_softmax(x[:n])[:, 0].sum() for x, n in zip(logits, (5, 2), strict=True)]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert np.all(feasible)


def test_gradient_is_that_of_finite_differences():
    logits, mask, labels, label_mask = batch(ROWS)

    def total(x):
        return jnp.sum(ctc_rows(x, mask, labels, label_mask)[0])

    gradient = np.asarray(jax.jit(jax.grad(total))(logits))
    np.testing.assert_array_equal(gradient[~mask], 0)
    for row, (n, y) in enumerate(ROWS):
        x = logits[row, :n].astype(np.float64)
        for cell in np.ndindex(x.shape):
            move = np.zeros_like(x)
            move[cell] = 1e-5
            slope = (all_paths(x + move, y) - all_paths(x - move, y)) / 2e-5
            np.testing.assert_allclose(gradient[row][cell], slope, atol=2e-5)


# T < L + repeats, no frames, and labels that are the blank or no symbol at all.
INFEASIBLE = [(2, (1, 1)), (2, (1, 2, 1)), (4, (1, 1, 1)), (0, (1,)), (5, (1, 0)), (5, (3,))]


def test_rows_that_cannot_be_aligned_are_counted_and_poison_nothing():
    rows = [*INFEASIBLE, *ROWS, (0, ())]
    logits, mask, labels, label_mask = batch(rows)
    logits[: len(INFEASIBLE)] = np.nan  # whatever they hold
    exists = np.ones(len(rows), bool)

    def mean(x):
        losses, feasible = ctc_rows(x, mask, labels, label_mask)
        term, diagnostics = ctc.ctc(losses, label_mask.sum(axis=1), feasible, exists)
        return term.mean(), (losses, feasible, term, diagnostics)

    (_, found), gradient = jax.jit(jax.value_and_grad(mean, has_aux=True))(logits)
    losses, feasible, term, diagnostics = found
    np.testing.assert_array_equal(feasible, [False] * 6 + [True] * 8)
    np.testing.assert_array_equal(losses[:6], 0)
    assert losses[-1] == 0
    np.testing.assert_array_equal(gradient[:6], 0)
    assert np.isfinite(gradient).all() and np.all(np.any(gradient[6:-1], axis=(1, 2)))
    expected = [all_paths(x[:n], y) for x, (n, y) in zip(logits[6:-1], ROWS, strict=True)]
    np.testing.assert_allclose(term.total, np.sum(expected), rtol=1e-5)
    assert term.count == 8 and diagnostics['infeasible'] == 6


def test_term_counts_rows_that_exist_and_per_label_divides_each_row():
    losses = np.array([6.0, 3.0, np.nan, 0.0, 5.0], np.float32)
    lengths = np.array([3, 0, 2, 4, 2])
    feasible, mask = np.array([1, 1, 1, 0, 1], bool), np.array([1, 1, 0, 1, 1], bool)
    term, diagnostics = jax.jit(ctc.ctc)(losses, lengths, feasible, mask)
    assert (term.total, term.count) == (14, 3)
    assert diagnostics['infeasible'] == 1
    np.testing.assert_allclose(diagnostics['ctc_per_label'], (6 / 3 + 3 / 1 + 5 / 2) / 3, rtol=1e-6)
    term, diagnostics = ctc.ctc(losses, lengths, feasible, np.zeros(5, bool))
    assert term.total == term.count == diagnostics['ctc_per_label'] == 0
    assert diagnostics['infeasible'] == 0


def test_certain_rows_are_clamped_at_zero_and_keep_their_gradient():
    rng = np.random.default_rng(0)
    labels = rng.integers(1, 8, size=(64, 3)).astype(np.int32)
    path = np.zeros((64, 12), np.int64)
    path[:, 2::4] = labels
    logits = np.float32(rng.uniform(9, 20, size=(64, 1, 1)) * np.eye(8)[path])
    mask, label_mask = np.ones((64, 12), bool), np.ones((64, 3), bool)
    raw = jax.jit(optax.ctc_loss)(logits, 1.0 - mask, labels, 1.0 - label_mask)
    below = np.asarray(raw) < 0
    assert below.any()  # otherwise this test shows nothing

    def total(x):
        losses, _ = ctc_rows(x, mask, labels, label_mask)
        return jnp.sum(losses), losses

    gradient, losses = jax.jit(jax.grad(total, has_aux=True))(logits)
    assert np.all(losses >= 0) and np.all(losses[below] == 0)
    assert np.all(np.any(gradient[below], axis=(1, 2)))


def test_a_row_of_very_wrong_logits_keeps_its_loss():
    logits = np.zeros((1, 60, 3), np.float32)
    logits[..., 1:] = -1e4
    labels, ones = np.tile([[1, 2]], 10).astype(np.int32), np.ones((1, 20), bool)
    losses, _ = ctc_rows(logits, np.ones((1, 60), bool), labels, ones)
    # 20 of 60 frames cost 10⁴ each; the paths that do are too few to matter.
    np.testing.assert_allclose(losses, 2e5, rtol=1e-3)


def test_blank_penalty_lowers_the_blanks_logits():
    logits, mask, labels, label_mask = batch(ROWS)
    lowered = logits.copy()
    lowered[..., 0] -= 1.5
    losses, _ = ctc_rows(logits, mask, labels, label_mask, blank_penalty=1.5)
    expected = [all_paths(x[:n], y) for x, (n, y) in zip(lowered, ROWS, strict=True)]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_bfloat16_logits_give_float32_losses():
    logits, mask, labels, label_mask = batch(ROWS)
    low = jnp.asarray(logits, jnp.bfloat16)
    losses, _ = ctc_rows(low, mask, labels, label_mask)
    same, _ = ctc_rows(np.asarray(low, np.float32), mask, labels, label_mask)
    assert losses.dtype == jnp.float32
    np.testing.assert_array_equal(losses, same)


def test_products_with_labels_are_not_rounded_on_accelerators():
    logits, mask, labels, label_mask = batch(ROWS)
    program = ctc_rows.lower(logits, mask, labels, label_mask).as_text()
    assert 'dot_general' in program
    products = [line for line in program.splitlines() if 'dot_general' in line]
    assert all('HIGHEST' in line for line in products)


def test_smoothing_is_the_divergence_from_uniform():
    logits, mask, _, _ = batch([(5, ()), (2, ()), (0, ())], size=4)
    logits[1, 0] = 3.0  # uniform
    logits[1, 1] = [200, 0, 0, 0]  # certain

    def total(x):
        sums, counts = ctc.smoothing(x, mask)
        return jnp.sum(sums), (sums, counts)

    gradient, (sums, counts) = jax.jit(jax.grad(total, has_aux=True))(logits)
    log_p = log_softmax(logits[0])
    expected = np.sum(np.exp(log_p) * (log_p - np.log(1 / 4)))
    np.testing.assert_allclose(sums, [expected, np.log(4), 0], rtol=1e-5)
    np.testing.assert_array_equal(counts, [5, 2, 0])
    assert np.isfinite(gradient).all() and not np.any(gradient[~mask]) and np.any(gradient[0])


@pytest.mark.usefixtures('unchecked_shapes')
def test_wrong_shapes_are_named():
    logits, mask, labels, label_mask = batch(ROWS)
    with pytest.raises(ValueError, match=r'bool mask \[B, T\]'):
        ctc.ctc_rows(logits, mask.astype(np.float32), labels, label_mask)
    with pytest.raises(ValueError, match=r'labels must be \[7, L\]'):
        ctc.ctc_rows(logits, mask, labels, label_mask[:, 1:])
    with pytest.raises(ValueError, match=r'logits must be \[B, T, V\]'):
        ctc.smoothing(logits[0], mask)
