"""The pool of small nets: a soft histogram of colours, and statistics of the maps."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.models.modified_resnet import CLIP_RANGE, ModifiedResNet, StatisticsPool
from mmjax.models.resnet import IMAGENET_RANGE, ResNet
from mmjax.models.statistics import colour_histogram


def histogram_oracle(pixels, bins, limits=CLIP_RANGE):
    """Trilinear votes, one pixel after the other."""
    out = np.zeros((bins,) * 3)
    for pixel in np.asarray(pixels, np.float64).reshape(-1, 3):
        low, high = limits
        place = np.clip((pixel - low) / (high - low) * (bins - 1), 0, bins - 1)
        low = np.minimum(np.floor(place).astype(int), bins - 2)
        for corner in itertools.product((0, 1), repeat=3):
            share = np.where(corner, place - low, 1 - (place - low))
            out[tuple(low + corner)] += share.prod()
    return np.sqrt(out.ravel() / out.sum())


@pytest.mark.parametrize('bins', [2, 3, 8])
def test_histogram_is_the_sum_of_trilinear_votes_and_has_length_one(bins):
    pixels = np.random.default_rng(0).uniform(-2.2, 2.6, (2, 4, 5, 3)).astype(np.float32)
    found = jax.jit(colour_histogram, static_argnums=(1, 2))(pixels, bins, CLIP_RANGE)
    chex.assert_shape(found, (2, bins**3))
    expected = np.stack([histogram_oracle(picture, bins) for picture in pixels])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)


def test_histogram_of_one_colour_is_one_bin_and_passes_no_gradient():
    pixels = jnp.full((1, 4, 4, 3), -1.8)
    found = colour_histogram(pixels, 4, CLIP_RANGE)
    assert found[0, 0] == pytest.approx(1, abs=1e-6) and float(found.sum()) == pytest.approx(1)
    gradient = jax.grad(lambda x: colour_histogram(x, 4, CLIP_RANGE).sum())(pixels + 0.3)
    assert not np.asarray(gradient).any()


def test_pool_is_the_projection_of_histogram_and_scaled_statistics():
    rng = np.random.default_rng(1)
    images = rng.uniform(-1, 1, (3, 4, 4, 3)).astype(np.float32)
    maps = [rng.normal(size=(3, 2, 2, 4)).astype(np.float32), rng.normal(size=(3, 1, 1, 6))]
    pool = StatisticsPool(5, share=0.5)
    variables = pool.init(jax.random.key(0), images, maps)
    found = pool.apply(variables, images, maps)
    parts = []
    for x in np.float64(maps[0]), np.float64(maps[1]):
        x = np.concatenate([x.mean((1, 2)), np.sqrt(x.var((1, 2)) + 1e-6)], 1)
        parts.append((x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-6))
    statistics = np.concatenate(parts, 1)
    statistics *= 0.5 / np.sqrt(statistics.shape[1])
    colours = np.stack([histogram_oracle(picture[::2, ::2], 8, CLIP_RANGE) for picture in images])
    out = variables['params']['out']
    expected = np.concatenate([colours, statistics], 1) @ np.float64(out['kernel']) + out['bias']
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_a_net_with_it_learns_in_every_parameter_and_ignores_masked_rows():
    net = ModifiedResNet(16, (1, 1), 4, 2, 8, 'statistics')
    images = np.random.default_rng(2).normal(size=(4, 16, 16, 3)).astype(np.float32)
    mask = np.array([True, True, True, False])
    variables = jax.jit(lambda key: net.init(key, images, mask, train=False))(jax.random.key(0))

    @jax.jit
    def loss(params, images):
        values = {**variables, 'params': params}
        out, _ = net.apply(values, images, mask, train=True, mutable=['batch_stats'])
        return jnp.sum(jnp.sin(out[:3]))

    gradients = jax.grad(loss)(variables['params'], images)
    still = [
        jax.tree_util.keystr(path)
        for path, g in jax.tree_util.tree_leaves_with_path(gradients)
        if not np.asarray(g).any()
    ]
    assert not still
    other = np.concatenate([images[:3], 9 + images[3:]])
    np.testing.assert_allclose(
        loss(variables['params'], other), loss(variables['params'], images), rtol=1e-6
    )


def test_a_resnet_puts_out_the_statistics_of_all_its_maps():
    net = ResNet((1, 1), 4, False, 3, 2, False, statistics=True)
    images = np.random.default_rng(3).normal(size=(2, 12, 12, 3)).astype(np.float32)
    found, variables = net.init_with_output(jax.random.key(0), images, train=False)
    chex.assert_shape(found, (2, 512 + 2 * (4 + 4 + 8)))
    for picture, row in zip(images, np.asarray(found), strict=True):
        expected = histogram_oracle(picture[::2, ::2], 8, IMAGENET_RANGE)
        np.testing.assert_allclose(row[:512], expected, atol=1e-5)
    assert sorted(variables['params']['statistics']) == ['norm_0', 'norm_1', 'norm_2']
    plain = ResNet((1, 1), 4, False, 3, 2, False)
    last = plain.apply(variables, images, train=False)
    norm = lambda x: (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True)
    means = np.asarray(found)[:, -16:-8] * np.sqrt(32)  # of the last map, in a norm with deviations
    assert np.corrcoef(np.ravel(norm(means)), np.ravel(norm(np.asarray(last))))[0, 1] > 0.999
