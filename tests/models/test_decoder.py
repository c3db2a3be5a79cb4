"""The decoder: published sizes, padding anywhere, causality, and a cache that changes nothing."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.models import decoder
from mmjax.models.decoder import Decoder

V, W, A = 23, 16, 5  # vocabulary, width, tokens of an answer
SIZES = {
    'vocabulary': V,
    'width': W,
    'depth': 2,
    'heads': 4,
    'kv_heads': 2,
    'mlp_width': 24,
    'theta': 100.0,
}


@functools.cache
def _random(model):
    """Variables with every leaf random, so that no zero or one at the start hides a term."""
    init = functools.partial(model.init, train=False)
    shapes = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 2, W)), jnp.ones((1, 2)))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.4, x.shape), x.dtype), shapes)


@functools.cache  # equal models share one compilation
def _jitted(model):
    return jax.jit(functools.partial(model.apply, train=False))


def _encode(model, embeddings, mask):
    return np.asarray(_jitted(model)(_random(model), embeddings, mask))


def _given():
    """Embeddings [4, 7, W] and a mask with padding on the right, in the middle, and a lone one."""
    embeddings = np.random.default_rng(1).normal(size=(4, 7, W)).astype(np.float32)
    mask = ['1111111', '1110000', '1110110', '1000000']
    return embeddings, np.array([[c == '1' for c in row] for row in mask])


@pytest.mark.parametrize(
    ('model', 'count'),
    [
        (Decoder(vocabulary=151936, tied=True), 494_032_768),
        # The same with 151,674 words, twice; the whole InternVL2.5-1B is said to have 938 million.
        (Decoder(), 494_032_768 + (2 * 151_674 - 151_936) * 896),
    ],
    ids=['qwen', 'internvl'],
)
def test_published_sizes_have_the_published_parameter_counts(model, count):
    inputs = jax.ShapeDtypeStruct((1, 3, 896), jnp.float32), jax.ShapeDtypeStruct((1, 3), bool)
    init = functools.partial(model.init, train=False)
    leaves = jax.tree.leaves(jax.eval_shape(init, jax.random.key(0), *inputs))
    assert sum(x.size for x in leaves) == count
    assert {x.dtype for x in leaves} == {jnp.dtype('float32')}


def test_rotation_is_a_complex_product():
    rng = np.random.default_rng(0)
    x, positions = rng.normal(size=(2, 3, 4, 6)), rng.integers(0, 3000, (2, 3))
    turn = np.exp(1j * positions[..., None] * 1e6 ** (-np.arange(3) / 3))[:, :, None]
    expected = (x[..., :3] + 1j * x[..., 3:]) * turn
    found = decoder.rotate(jnp.float32(x), decoder.rotary(jnp.asarray(positions), 6, 1e6))
    expected = np.concatenate([expected.real, expected.imag], -1)
    np.testing.assert_allclose(found, expected, atol=1e-3)  # angles of 3000 in float32


# ------------------------------------------- padding and order


def test_padding_anywhere_has_no_influence():
    model, (embeddings, mask) = Decoder(**SIZES), _given()
    hidden = _encode(model, embeddings, mask)
    chex.assert_tree_all_finite(hidden)
    noise = np.where(mask[..., None], embeddings, 9.0)
    np.testing.assert_array_equal(hidden[mask], _encode(model, noise, mask)[mask])
    # The real ones alone, with what padding there is moved to the left.
    order = np.argsort(mask, 1, kind='stable')
    moved = np.take_along_axis(embeddings, order[..., None], 1)
    left = _encode(model, moved, np.take_along_axis(mask, order, 1))
    inverse = np.argsort(order, 1)[..., None]
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    close(np.take_along_axis(left, inverse, 1)[mask], hidden[mask])
    alone = _encode(model, embeddings[2:3, mask[2]], np.ones((1, 5), bool))
    close(alone[0], hidden[2, mask[2]])


def test_nothing_sees_what_comes_after_it_and_everything_what_is_before():
    model, (embeddings, mask) = Decoder(**SIZES), _given()
    hidden = _encode(model, embeddings, mask)
    changed = embeddings.copy()
    changed[:, 2] += 1.0
    difference = np.abs(_encode(model, changed, mask) - hidden).max(-1)
    assert not difference[:, :2].any() and not difference[3, 0]
    assert (difference[:3, 2:][mask[:3, 2:]] > 1e-4).all()


# ------------------------------------------- the cache


def _cached(model, prefix, tokens, embeddings, mask):
    """Logits [batch, beams, 1 + A, V] after the prefix and after each token, step by step."""

    @jax.jit
    def run(variables, embeddings, mask, tokens):
        apply = functools.partial(model.apply, variables)
        last, prefix = apply(embeddings, mask, method='prefill')
        batch, beams, length = tokens.shape

        def body(suffix, index):
            token = apply(tokens[:, :, index], method='embed')
            hidden, suffix = apply(token, prefix, suffix, index, method='step')
            return suffix, apply(hidden, method='logits')

        suffix = model.suffix(batch, beams, length + 2)  # longer than needed
        suffix, later = jax.lax.scan(body, suffix, jnp.arange(length))
        first = jnp.broadcast_to(apply(last, method='logits')[:, None], later.shape[1:])
        return jnp.concatenate([first[:, :, None], jnp.moveaxis(later, 0, 2)], 2), prefix, suffix

    return run(_random(model), embeddings[:, :prefix], mask[:, :prefix], tokens)


def _uncached(model, prefix, tokens, embeddings, mask):
    variables, (batch, beams, length) = _random(model), tokens.shape
    apply = functools.partial(model.apply, variables)
    every = lambda x: np.repeat(x[:, :prefix], beams, 0)
    added = np.asarray(apply(tokens.reshape(batch * beams, length), method='embed'))
    joined = np.concatenate([every(embeddings), added], 1)
    real = np.concatenate([every(mask), np.ones((batch * beams, length), bool)], 1)
    hidden = _encode(model, joined, real)
    last = [np.flatnonzero(row[:prefix])[-1] for row in real]
    at = np.concatenate(
        [np.array(last)[:, None], prefix + np.tile(np.arange(length), (len(last), 1))], 1
    )
    hidden = np.take_along_axis(hidden, at[:, :, None], 1)
    return np.asarray(apply(hidden, method='logits')).reshape(batch, beams, 1 + length, -1)


@pytest.mark.parametrize(
    ('prefix', 'fields'),
    [(7, {}), (4, {'tied': True, 'qkv_bias': False}), (1, {'kv_heads': 4}), (5, {'kv_heads': 1})],
    ids=['7', '4-tied', '1-all-heads', '5-one-head'],
)
def test_logits_with_the_cache_are_those_without(prefix, fields):
    model = Decoder(**{**SIZES, **fields})
    tokens = np.random.default_rng(2).integers(0, V, (4, 3, A))  # every beam goes its own way
    found, cache, suffix = _cached(model, prefix, tokens, *_given())
    expected = _uncached(model, prefix, tokens, *_given())
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    heads = model.kv_heads
    chex.assert_shape(jax.tree.leaves(cache.caches), (4, heads, prefix, 4))  # once a row
    chex.assert_shape(jax.tree.leaves(suffix), (4, 3, heads, A + 2, 4))


# ------------------------------------------- the rest


def test_bfloat16_computes_the_same_with_float32_parameters_and_logits():
    half, (embeddings, mask) = Decoder(**SIZES, dtype=jnp.bfloat16), _given()
    assert {x.dtype for x in jax.tree.leaves(_random(half))} == {jnp.dtype('float32')}
    hidden = _encode(half, embeddings, mask)
    assert hidden.dtype == jnp.bfloat16
    tokens = np.random.default_rng(2).integers(0, V, (4, 3, A))
    found, cache, _ = _cached(half, 7, tokens, embeddings, mask)
    assert cache.caches[0][0].dtype == jnp.bfloat16 and found.dtype == jnp.float32
    expected = _uncached(Decoder(**SIZES), 7, tokens, embeddings, mask)
    np.testing.assert_allclose(found, expected, atol=0.05 * np.abs(expected).max())


def test_dropout_acts_in_training_only_and_on_both_halves_of_a_block():
    model, (embeddings, mask) = Decoder(**SIZES, dropout=0.5), _given()
    expected = _encode(Decoder(**SIZES), embeddings, mask)
    np.testing.assert_array_equal(_encode(model, embeddings, mask), expected)

    @jax.jit
    def train(variables, key):
        return model.apply(variables, embeddings, mask, train=True, rngs={'dropout': key})

    for silent in ('out', 'down'):  # what the other half writes is all there is
        variables = jax.tree_util.tree_map_with_path(
            lambda path, x: x * (path[-2].key != silent) if len(path) > 2 else x, _random(model)
        )
        one, two = (train(variables, jax.random.key(seed, impl='rbg')) for seed in (0, 1))
        assert np.abs(one - two).max() > 0.1


def test_blocks_start_with_the_published_deviations():
    model = Decoder(**{**SIZES, 'width': 128, 'depth': 2, 'mlp_width': 256, 'vocabulary': 300})
    init = functools.partial(model.init, train=False)
    key = jax.random.key(0, impl='rbg')  # compiles faster
    params = jax.jit(init)(key, jnp.zeros((1, 2, 128)), jnp.ones((1, 2)))['params']
    assert sorted(params) == ['block_0', 'block_1', 'head', 'norm', 'words']
    for name in ('query', 'key', 'value', 'out', 'gate', 'up', 'down'):
        kernel = params['block_1'][name]['kernel']
        deviation = 0.01 if name in ('out', 'down') else 0.02  # 0.02 / √4
        np.testing.assert_allclose(kernel.std(), deviation, rtol=0.05)
        assert ('bias' in params['block_1'][name]) == (name in ('query', 'key', 'value'))
    for name in ('words', 'head'):
        np.testing.assert_allclose(params[name].std(), 0.02, rtol=0.05)


def test_decoder_refuses_sizes_and_inputs_that_do_not_fit():
    for fields, width, message in (
        ({'heads': 3}, W, 'width 16 is not a multiple of 3 heads'),
        ({'kv_heads': 3}, W, '4 heads are not a multiple of 3 kv_heads'),
        ({'heads': 16}, W, 'head size 1 is odd'),
        ({}, 8, r'embeddings \(1, 2, 8\) and mask \(1, 2\) are not \[batch, length, 16\]'),
    ):
        model = Decoder(**{**SIZES, **fields})
        init = functools.partial(model.init, train=False)
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 2, width)), jnp.ones((1, 2)))
