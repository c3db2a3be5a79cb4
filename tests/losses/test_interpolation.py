"""ContraBin's primary loss against float64 NumPy, its collapse, its stall and its tiled form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.losses import contrastive, interpolation
from tests.losses.test_contrastive import assert_term, close, data, infonce, numeric_gradient, unit

primary = jax.jit(interpolation.primary, static_argnames=('chunk', 'normalize'))
CHUNKS = [None, 5]  # 13 rows: three strips, padded by 2
SOFTNESS = [0.0, 0.3, 1.0]


def softmax(x):
    odds = np.exp(x - x.max(1, keepdims=True))
    return odds / odds.sum(1, keepdims=True)


def log_softmax(x):
    x = x - x.max(1, keepdims=True)
    return x - np.log(np.exp(x).sum(1, keepdims=True))


def oracle(a, b, mask, temperature, softness, normalize=True):
    """The definition on the whole matrices of the valid rows; returns (total, count)."""
    a, b = a[mask], b[mask]
    if normalize:
        a, b = unit(a), unit(b)
    logits = a @ b.T / temperature
    targets = softmax((a @ a.T + b @ b.T) / (2 * temperature))
    targets = (1 - softness) * np.eye(len(a)) + softness * targets
    by_row = -np.sum(targets * log_softmax(logits))
    by_column = -np.sum(targets.T * log_softmax(logits.T))
    return (by_row + by_column) / 2, len(a)


# Values and gradients


@functools.cache
def gradients_of_total(normalize, chunk):
    def total(a, b, mask, temperature, softness):
        term = primary(
            a, b, mask, temperature=temperature, softness=softness, normalize=normalize, chunk=chunk
        )
        return term.total, term

    return jax.jit(jax.grad(total, (0, 1, 3, 4), has_aux=True))


@pytest.mark.parametrize('softness', SOFTNESS)
@pytest.mark.parametrize(('normalize', 'chunk'), [(True, None), (True, 5), (False, 5)])
def test_primary_is_the_definition(normalize, chunk, softness):
    a, b, _, mask = data()
    dirty = np.where(mask[:, None], a, np.nan).astype(np.float32)
    gradients, term = gradients_of_total(normalize, chunk)(
        dirty, b.astype(np.float32), mask, 0.5, softness
    )
    assert_term(term, oracle(a, b, mask, 0.5, softness, normalize))
    value = lambda a=a, b=b, t=0.5, s=softness: oracle(a, b, mask, t, s, normalize)[0]
    close(gradients[0], numeric_gradient(lambda x: value(a=x), a))
    close(gradients[1], numeric_gradient(lambda x: value(b=x), b))
    close(gradients[2], numeric_gradient(lambda x: value(t=x), 0.5))
    close(gradients[3], numeric_gradient(lambda x: value(s=x), softness))


def test_hard_targets_are_infonce_with_and_without_jit():
    a, b, _, mask = data()
    a, b = jnp.float32(a), jnp.float32(b)
    expected = infonce(a, b, mask, temperature=0.1)
    for function in (interpolation.primary, primary):
        term = function(a, b, mask, temperature=0.1, softness=0.0)
        np.testing.assert_allclose(term.total, expected.total, rtol=1e-6)
        assert term.count == expected.count


def test_published_loss_depends_on_the_batch():
    # Outputs of LayerNorm at the start, T = .1: some hundreds, where the collapse value is 2.77.
    values, mask = [], np.ones(16, bool)
    for seed in range(3):
        a, b = np.random.default_rng(seed).normal(size=(2, 16, 256))
        a, b = ((x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True) for x in (a, b))
        a, b = a.astype(np.float32), b.astype(np.float32)
        term = primary(a, b, mask, temperature=0.1, normalize=False)
        assert_term(term, oracle(*np.float64([a, b]), mask, 0.1, 1.0, normalize=False))
        values.append(float(term.mean()))
    np.testing.assert_allclose(values, [307.73, 273.15, 307.24], atol=0.01)
    assert float(primary(a, b, mask, temperature=0.1).mean()) < 5


@pytest.mark.parametrize('softness', SOFTNESS)
@pytest.mark.parametrize('chunk', CHUNKS)
def test_a_loss_near_zero_keeps_its_digits(chunk, softness):
    # Logits are near 100: what is left of a difference of theirs has an error of 1e-5.
    rng = np.random.default_rng(0)
    a = np.eye(13) + 0.02 * rng.normal(size=(13, 13))
    b = a + 0.02 * rng.normal(size=(13, 13))
    a[1], b[1] = (x[0] + 0.4 * x[1] for x in (a, b))  # a neighbour, to be told apart
    a, b = a.astype(np.float32), b.astype(np.float32)
    mask = np.ones(13, bool)
    expected = oracle(*np.float64([a, b]), mask, 0.01, softness)
    assert 0 < expected[0] < 0.1
    term = primary(a, b, mask, temperature=0.01, softness=softness, chunk=chunk)
    assert_term(term, expected, rtol=1e-4)


def test_bfloat16_input_gives_float32_terms():
    a, b, _, mask = data()
    a, b = jnp.asarray(a, jnp.bfloat16), jnp.asarray(b, jnp.bfloat16)
    term = primary(a, b, mask, temperature=0.5)
    assert_term(term, oracle(*np.float64([a, b]), mask, 0.5, 1.0))


# Labels


def labelled_oracle(a, b, labels, mask, temperature, softness):
    """Pair by pair: the rows of one label share the one-hot part of the targets."""
    rows, total = np.flatnonzero(mask), 0.0
    soft = {}
    for i in rows:
        odds = [np.exp((a[i] @ a[j] + b[i] @ b[j]) / (2 * temperature)) for j in rows]
        soft |= {(i, j): odd / sum(odds) for j, odd in zip(rows, odds, strict=True)}
    for i in rows:
        alike = [j for j in rows if labels[j] == labels[i]]
        by_row = np.log(sum(np.exp(a[i] @ b[j] / temperature) for j in rows))
        by_column = np.log(sum(np.exp(a[j] @ b[i] / temperature) for j in rows))
        for j in rows:
            hard = (j in alike) / len(alike)
            total += (
                ((1 - softness) * hard + softness * soft[i, j])
                * (by_row - a[i] @ b[j] / temperature)
                / 2
            )
            total += (
                ((1 - softness) * hard + softness * soft[j, i])
                * (by_column - a[j] @ b[i] / temperature)
                / 2
            )
    return total, len(rows)


@pytest.mark.parametrize('softness', SOFTNESS)
@pytest.mark.parametrize('chunk', CHUNKS)
def test_rows_of_one_label_share_the_one_hot_part(chunk, softness):
    a, b, labels, mask = data()
    assert 1 < len(set(labels[mask])) < mask.sum() and set(labels[~mask]) & set(labels[mask])
    dirty = np.where(mask[:, None], a, np.nan).astype(np.float32)

    def total(a, b):
        term = interpolation.primary(
            a, b, mask, temperature=0.3, softness=softness, labels=jnp.asarray(labels), chunk=chunk
        )
        return term.total, term

    gradients, term = jax.jit(jax.grad(total, (0, 1), has_aux=True))(dirty, b.astype(np.float32))
    value = lambda a=a, b=b: labelled_oracle(unit(a), unit(b), labels, mask, 0.3, softness)
    assert_term(term, value())
    close(gradients[0], numeric_gradient(lambda x: value(a=x)[0], a))
    close(gradients[1], numeric_gradient(lambda x: value(b=x)[0], b))


def test_labels_that_all_differ_change_nothing():
    a, b, _, mask = data()
    options = dict(temperature=0.1, softness=0.3)
    plain = primary(a, b, mask, **options)
    term = primary(a, b, mask, labels=np.arange(13)[::-1].copy(), **options)
    assert term == plain


def test_one_label_for_all_leaves_the_logarithm_of_their_number():
    rows, mask = np.random.default_rng(0).normal(size=(1, 6)).repeat(8, 0), np.arange(8) != 2
    term = primary(rows, rows, mask, temperature=0.1, softness=0.0, labels=np.zeros(8, int))
    np.testing.assert_allclose(term.mean(), np.log(7), rtol=1e-6)


# Tiles


@functools.cache
def gradient_of_mean(chunk):
    def mean(a, b, mask, temperature):
        term = primary(a, b, mask, temperature=temperature, softness=0.5, chunk=chunk)
        return term.mean(), term

    return jax.jit(jax.value_and_grad(mean, (0, 1, 3), has_aux=True))


def test_tiled_form_is_the_plain_form():
    a, b, _, mask = data(n=150, d=16)
    for temperature in (0.5, 0.07, 0.01):
        arguments = a.astype(np.float32), b.astype(np.float32), mask, temperature
        (_, expected), expected_gradients = gradient_of_mean(None)(*arguments)
        (_, actual), gradients = gradient_of_mean(64)(*arguments)
        np.testing.assert_allclose(actual.total, expected.total, rtol=1e-5)
        assert actual.count == expected.count
        for found, wanted in zip(gradients, expected_gradients, strict=True):
            close(found, wanted)


def test_memory_grows_with_the_rows_not_their_square():
    def temporary(n):
        rows = jax.ShapeDtypeStruct((n, 8), jnp.float32)
        mask = jax.ShapeDtypeStruct((n,), bool)
        compiled = gradient_of_mean(128).lower(rows, rows, mask, 0.1).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    small, large = temporary(1024), temporary(4096)
    assert large < 4.2 * small
    assert large < 4096 * 4096 * 4 / 4


# Bounds, collapse, stall


@pytest.mark.parametrize('softness', SOFTNESS)
@pytest.mark.parametrize('normalize', [True, False])
def test_collapse_is_ln_n_without_a_gradient_whatever_the_softness(softness, normalize):
    rows, mask = jnp.full((8, 6), 0.7), np.arange(8) != 2
    value = lambda a, b: primary(
        a, b, mask, temperature=0.1, softness=softness, normalize=normalize
    ).mean()
    found, gradients = jax.value_and_grad(value, (0, 1))(rows, rows)
    np.testing.assert_allclose(found, contrastive.infonce_collapse(7), rtol=1e-6)
    assert max(float(jnp.abs(x).max()) for x in gradients) < 1e-5


def test_equal_sides_leave_the_entropy_of_the_targets():
    n, temperature = 8, 0.3
    rows = (np.eye(n) - 1 / n).astype(np.float32)
    term = primary(rows, rows, np.ones(n, bool), temperature=temperature)
    p = softmax(np.where(np.eye(n) > 0, 1.0, -1 / (n - 1)) / temperature)[0]
    np.testing.assert_allclose(term.mean(), -np.sum(p * np.log(p)), rtol=1e-5)
    cold = primary(rows, rows, np.ones(n, bool), temperature=0.02)
    assert 0 <= float(cold.mean()) < 1e-6  # the bound of every softness


def test_stall_of_soft_targets_from_nearly_equal_features():
    rng = np.random.default_rng(0)
    start = jnp.float32(unit(rng.normal(size=32)[None] + 0.01 * rng.normal(size=(32, 32))))
    assert 0.9998 < float((start[::2] @ start[1::2].T).mean()) < 0.99995
    mask, collapse = np.ones(16, bool), contrastive.infonce_collapse(16)

    @jax.jit
    def train(softness):
        def value(x):
            return primary(x[::2], x[1::2], mask, temperature=0.1, softness=softness).mean()

        def step(x, _):
            loss, gradient = jax.value_and_grad(value)(x)
            return x - gradient, (loss, jnp.linalg.norm(gradient))

        return jax.lax.scan(step, start, None, 300)[1]

    soft, mixed, hard = (jax.tree.map(np.asarray, train(s)) for s in (1.0, 0.5, 0.0))
    assert soft[1][0] < 1e-3 * hard[1][0]  # the first gradient
    assert mixed[1][0] > 0.4 * hard[1][0]
    assert np.abs(soft[0] - collapse).max() < 1e-3
    assert hard[0][-1] < 0.1 and mixed[0][-1] < 0.5 * collapse


# Masks and faults


@pytest.mark.parametrize('chunk', CHUNKS)
@pytest.mark.parametrize('valid', [0, 1])
def test_fewer_than_two_rows_are_zero_with_count_zero_and_a_zero_gradient(chunk, valid):
    a, b, _, _ = data()
    mask = np.arange(len(a)) < valid
    value = lambda a, b: primary(a, b, mask, temperature=0.1, softness=0.5, chunk=chunk)
    dirty = np.where(mask[:, None], a, np.inf).astype(np.float32)
    term, b = value(dirty, b.astype(np.float32)), b.astype(np.float32)
    assert term.total == term.count == 0
    for gradient in jax.grad(lambda *x: value(*x).mean(), (0, 1))(dirty, b):
        np.testing.assert_array_equal(gradient, np.zeros_like(gradient))


@pytest.mark.usefixtures('unchecked_shapes')
def test_wrong_arguments_are_named():
    a, b, _, mask = data()
    with pytest.raises(ValueError, match=r'one shape, got \(13, 5\) and \(12, 5\)'):
        interpolation.primary(a, b[1:], mask, temperature=0.1)
    with pytest.raises(ValueError, match='temperature must be above 0'):
        interpolation.primary(a, b, mask, temperature=0)
    for softness in (-0.1, 1.5, float('nan')):
        with pytest.raises(ValueError, match='softness must be from 0 to 1'):
            interpolation.primary(a, b, mask, temperature=0.1, softness=softness)
