"""Shared layers: batch statistics of valid rows, attention, products and GELU against oracles."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from mmjax.models import layers
from mmjax.models.layers import MaskedBatchNorm, attend

# ---------------------------------------------------------------- batch norm


def _norm(x, mask, stats=None, train=True, **fields):
    layer = MaskedBatchNorm(**fields)
    params = {'scale': jnp.linspace(0.5, 2.0, x.shape[-1]), 'bias': jnp.ones(x.shape[-1])}
    stats = stats or {'mean': jnp.zeros(x.shape[-1]), 'variance': jnp.ones(x.shape[-1])}
    apply = lambda x: layer.apply(
        {'params': params, 'batch_stats': stats}, x, mask, train=train, mutable=['batch_stats']
    )
    y, new = jax.jit(apply)(x)
    return np.asarray(y), jax.tree.map(np.asarray, new['batch_stats'])


@pytest.mark.parametrize('shape', [(7, 4), (7, 3, 2, 4)], ids=['rows', 'pictures'])
def test_batch_norm_statistics_are_those_of_valid_rows(shape):
    x = np.random.default_rng(0).normal(3.0, 2.0, shape)
    mask = np.array([1, 0, 1, 1, 0, 1, 1], bool)
    dirty = x.copy()
    dirty[~mask] = np.nan
    y, stats = _norm(jnp.float32(dirty), mask)
    valid = x[mask].reshape(-1, 4)
    mean, variance = valid.mean(0), valid.var(0)
    expected = (x[mask] - mean) / np.sqrt(variance + 1e-5) * np.linspace(0.5, 2.0, 4) + 1.0
    np.testing.assert_allclose(y[mask], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(stats['mean'], 0.1 * mean, rtol=1e-5)
    np.testing.assert_allclose(stats['variance'], 0.9 + 0.1 * variance, rtol=1e-5)


def test_batch_norm_without_a_valid_row_uses_and_keeps_the_running_statistics():
    x = jnp.float32(np.random.default_rng(0).normal(size=(4, 3)))
    before = {'mean': jnp.float32([1, 2, 3]), 'variance': jnp.float32([1, 4, 9])}
    y, after = _norm(x, np.zeros(4, bool), before)
    chex.assert_trees_all_equal(after, jax.tree.map(np.asarray, before))
    expected, _ = _norm(x, None, before, train=False)
    np.testing.assert_allclose(y, expected, rtol=1e-5)


def test_batch_norm_is_exact_far_from_zero_once_the_running_mean_is_near():
    x = np.random.default_rng(0).normal(1e4, 0.1, (64, 3)).astype(np.float32)
    before = {'mean': jnp.full(3, 1e4), 'variance': jnp.ones(3)}
    _, after = _norm(jnp.asarray(x), None, before, momentum=0.0)
    np.testing.assert_allclose(after['variance'], x.astype(np.float64).var(0), rtol=1e-3)


def test_batch_norm_sends_no_gradient_through_masked_rows():
    mask = np.array([1, 1, 0, 1], bool)
    layer = MaskedBatchNorm()
    variables = jax.jit(functools.partial(layer.init, train=True))(
        jax.random.key(0), jnp.zeros((4, 2)), mask
    )

    def loss(x):
        y, _ = layer.apply(variables, x, mask, train=True, mutable=['batch_stats'])
        return jnp.sum(jnp.where(mask[:, None], y, 0) ** 3)

    gradient = jax.jit(jax.grad(loss))(jnp.float32(np.random.default_rng(0).normal(size=(4, 2))))
    assert not gradient[2].any() and np.abs(gradient[mask]).min() > 0


def test_batch_norm_refuses_a_mask_that_does_not_fit():
    with pytest.raises(ValueError, match='mask'):
        _norm(jnp.zeros((4, 3)), np.ones(3, bool))


# ---------------------------------------------------------------- attention


def test_attention_matches_a_float64_softmax_and_survives_a_full_mask():
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(2, 3, 2, 4)), *rng.normal(size=(2, 2, 5, 2, 4))
    mask = rng.random((2, 1, 3, 5)) > 0.4
    mask[:, :, :, 0] = True
    logits = np.where(mask, np.einsum('bqhd,bkhd->bhqk', q, k) / 2.0, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum('bhqk,bkhd->bqhd', weights, v)
    q, k, v = (jnp.float32(x) for x in (q, k, v))
    for implementation in ('xla', 'auto'):
        found = attend(q, k, v, mask, implementation=implementation)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    blind = attend(q, k, v, np.zeros_like(mask))
    np.testing.assert_allclose(blind, np.broadcast_to(v.mean(1)[:, None], blind.shape), rtol=1e-5)


def test_query_heads_share_key_heads_in_groups_and_gradients_are_those_of_jax():
    rng = np.random.default_rng(1)
    q, k, v = (jnp.float32(rng.normal(size=(2, n, h, 4))) for n, h in ((3, 6), (5, 2), (5, 2)))
    mask = rng.random((2, 1, 1, 5)) > 0.3
    mask[..., 0] = True
    both = []
    for function in (attend, lambda *x: jax.nn.dot_product_attention(*x[:3], mask=x[3])):
        loss = lambda *x, function=function: (function(*x, mask) ** 3).sum()
        both.append(jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(q, k, v))
    chex.assert_trees_all_close(*both, rtol=1e-5, atol=1e-5)


def test_attention_refuses_what_cudnn_cannot_do():
    x = jnp.zeros((1, 2, 1, 8), jnp.bfloat16)
    with pytest.raises(ValueError, match=r'cudnn.* needs a GPU'):
        attend(x, x, x, implementation='cudnn')
    with pytest.raises(ValueError, match='flash'):
        attend(x, x, x, implementation='flash')


def test_attention_in_float16_works_where_the_backend_has_no_such_product():
    rng = np.random.default_rng(0)
    query, key, value = (rng.normal(size=(2, 5, 3, 8)) for _ in range(3))
    mask = rng.random((2, 1, 1, 5)) < 0.7
    mask[..., 0] = True
    scores = np.einsum('bqhd,bkhd->bhqk', query, key) / np.sqrt(8)
    weights = np.exp(np.where(mask, scores, -np.inf))
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum('bhqk,bkhd->bqhd', weights, value)
    half = [jnp.asarray(x, jnp.float16) for x in (query, key, value)]
    found = jax.jit(attend)(*half, jnp.asarray(mask))
    assert found.dtype == jnp.float16
    np.testing.assert_allclose(found.astype(jnp.float32), expected, atol=5e-3)


@pytest.mark.parametrize('axes', [(), (5,), (2, 5)], ids=str)
def test_a_linear_layer_is_flax_s_in_values_and_gradients(axes):
    x = np.random.default_rng(0).normal(size=(*axes, 4)).astype(np.float32)
    ours, theirs = layers.Dense(3), nn.Dense(3)
    variables = theirs.init(jax.random.key(1), x)
    chex.assert_trees_all_equal_shapes(variables, ours.init(jax.random.key(1), x))
    run = lambda module: jax.value_and_grad(
        lambda v, x: jnp.sum(jnp.sin(module.apply(v, x))), (0, 1)
    )(variables, x)
    chex.assert_trees_all_close(run(ours), run(theirs), rtol=1e-5)
    assert ours.apply(variables, x).shape == (*axes, 3)


@pytest.mark.parametrize('approximate', [False, True])
@pytest.mark.parametrize('backend', ['cpu', 'gpu'])
def test_gelu_and_its_slope_are_those_of_float64(monkeypatch, backend, approximate):
    monkeypatch.setattr(jax, 'default_backend', lambda: backend)
    x = np.linspace(-6, 6, 241)
    if approximate:
        inner = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
        cdf = (1 + np.tanh(inner)) / 2
        slope = (1 - np.tanh(inner) ** 2) / 2 * np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * x**2)
    else:
        cdf = scipy.stats.norm.cdf(x)
        slope = scipy.stats.norm.pdf(x)
    run = jax.jit(lambda x: layers.gelu(x, approximate))
    given = jnp.float32(x)
    np.testing.assert_allclose(run(given), x * cdf, atol=1e-6)
    found = jax.grad(lambda x: run(x).sum())(given)
    np.testing.assert_allclose(found, cdf + x * slope, atol=3e-6)
    rows = jax.vmap(jax.checkpoint(run))(given[1:].reshape(3, -1))
    np.testing.assert_array_equal(rows.reshape(-1), run(given)[1:])


@pytest.mark.parametrize(('rate', 'width'), [(0.3, 64), (0.3, 65), (0.05, 1), (0.999, 33)])
def test_dropout_drops_its_share_and_keeps_the_mean(rate, width):
    x, run = jnp.full((4000, width), 2.0), layers.Dropout(rate)
    rngs = lambda seed: {'dropout': jax.random.key(seed)}
    drop = lambda seed, x=x: run.apply({}, x, deterministic=False, rngs=rngs(seed))
    found = np.asarray(drop(0))
    dropped = found == 0
    error = (rate * (1 - rate) / found.size) ** 0.5
    assert abs(dropped.mean() - rate) < 4 * error + 2**-16
    np.testing.assert_allclose(found[~dropped], 2 / (1 - round(rate * 2**16) / 2**16), rtol=1e-6)
    np.testing.assert_array_equal(drop(0), found)
    assert (drop(1) != found).any()
    if width > 1:  # halves of one random word are not alike
        pairs = np.corrcoef(dropped[:, 0], dropped[:, 1])[0, 1]
        rows = np.corrcoef(dropped[:-1, 0], dropped[1:, 0])[0, 1]
        assert max(abs(pairs), abs(rows)) < 4 / 4000**0.5
    changes = jax.grad(lambda x: drop(0, x).sum())(x)
    np.testing.assert_allclose(changes, found / 2, rtol=1e-6)


@pytest.mark.parametrize('rate', [-0.1, 1.0, 1.5])
def test_a_dropout_rate_is_in_0_to_1(rate):
    with pytest.raises(ValueError, match=f'dropout rate is {rate}, not in'):
        layers.Dropout(rate).apply({}, jnp.ones(3), deterministic=True)


def test_dropout_of_nothing_and_in_evaluation():
    x = jnp.ones((3, 5), jnp.bfloat16)
    run = lambda rate, **how: layers.Dropout(rate).apply({}, x, **how)
    np.testing.assert_array_equal(run(0.5, deterministic=True), x)
    np.testing.assert_array_equal(run(0.0, deterministic=False), x)
    kept = layers.Dropout(0.5).apply(
        {}, x, deterministic=False, rngs={'dropout': jax.random.key(0)}
    )
    assert kept.dtype == jnp.bfloat16 and set(np.unique(np.float32(kept))) == {0, 2}
