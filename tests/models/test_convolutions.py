"""1-D convolutions: values and gradients against loops and the library, and the ends of rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.models import convolutions
from mmjax.models.convolutions import Conv, DepthwiseConv, Upsample


def _convolve(x, kernel, stride):
    """A float64 convolution by loops, zeros on both sides; kernel [taps, channels, features]."""
    taps, time = kernel.shape[0], x.shape[1]
    y = np.zeros((x.shape[0], -(-time // stride), kernel.shape[2]))
    for frame in range(y.shape[1]):
        for tap in range(taps):
            source = frame * stride + tap - taps // 2
            if 0 <= source < time:
                y[:, frame] += x[:, source] @ kernel[tap]
    return y


@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize('taps', [1, 3, 5])
def test_convolutions_match_loops_at_any_length(taps, stride):
    rng = np.random.default_rng(0)
    depthwise, convolve = (
        jax.jit(f, static_argnums=2) for f in (convolutions.depthwise, convolutions.convolve)
    )
    for time in (1, 5, 8):
        x = rng.normal(size=(2, time, 4))
        own, full = rng.normal(size=(taps, 4)), rng.normal(size=(taps, 4, 3))
        diagonal = np.stack([np.diag(row) for row in own])
        found = depthwise(jnp.float32(x), jnp.float32(own), stride)
        np.testing.assert_allclose(found, _convolve(x, diagonal, stride), rtol=1e-4, atol=1e-5)
        found = convolve(jnp.float32(x), jnp.float32(full), stride)
        np.testing.assert_allclose(found, _convolve(x, full, stride), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('stride', [1, 2])
def test_depthwise_gradients_are_those_of_the_grouped_convolution(stride):
    x, kernel = (jax.random.normal(jax.random.key(k), s) for k, s in ((0, (3, 9, 4)), (1, (5, 4))))
    weight = jax.random.normal(jax.random.key(2), (3, -(-9 // stride), 4))

    def grouped(x, kernel):
        return jax.lax.conv_general_dilated(
            x,
            kernel[:, None],
            (stride,),
            [(2, 2)],
            dimension_numbers=('NWC', 'WIO', 'NWC'),
            feature_group_count=4,
        )

    loss = lambda f: jax.jit(jax.grad(lambda x, k: jnp.vdot(f(x, k), weight), (0, 1)))
    found = loss(lambda x, k: convolutions.depthwise(x, k, stride))(x, kernel)
    for a, b in zip(found, loss(grouped)(x, kernel), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_upsample_matches_the_transposed_convolution():
    x, kernel = jax.random.normal(jax.random.key(0), (2, 5, 3)), jnp.arange(24.0).reshape(3, 4, 2)
    weight = jax.random.normal(jax.random.key(1), (2, 20, 2))

    def transposed(x, kernel):
        # Taps are reversed, as the transpose of a correlation is a convolution.
        return jax.lax.conv_transpose(
            x,
            kernel.swapaxes(0, 1)[::-1],
            (4,),
            'VALID',
            dimension_numbers=('NWC', 'WIO', 'NWC'),
            transpose_kernel=False,
        )[:, :20]

    expected = np.zeros((2, 20, 2))
    for frame in range(5):
        for tap in range(4):
            expected[:, 4 * frame + tap] = np.asarray(x)[:, frame] @ np.asarray(kernel)[:, tap]
    np.testing.assert_allclose(convolutions.upsample(x, kernel), expected, rtol=1e-4, atol=1e-4)
    loss = lambda f: jax.jit(jax.value_and_grad(lambda x, k: jnp.vdot(f(x, k), weight), (0, 1)))
    found, reference = loss(convolutions.upsample)(x, kernel), loss(transposed)(x, kernel)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(reference), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    'layer',
    [
        Conv(4, 3),
        Conv(4, 3, 2, use_bias=True),
        Conv(4),
        DepthwiseConv(5),
        DepthwiseConv(3, 2),
        Upsample(4, 4),
    ],
    ids=['conv', 'conv-stride', 'pointwise', 'depthwise', 'depthwise-stride', 'upsample'],
)
def test_a_row_does_not_see_beyond_its_end(layer):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 5, 2)).astype(np.float32)
    variables = jax.jit(layer.init)(jax.random.key(0), x, np.ones((1, 5), bool))
    apply = jax.jit(layer.apply)
    for length, padded in ((2, 5), (5, 11)):
        alone = apply(variables, x[:, :length], np.ones((1, length), bool))
        garbage = np.full((1, padded, 2), 1e6, np.float32)
        garbage[:, :length] = x[:, :length]
        found = apply(variables, garbage, np.arange(padded)[None] < length)
        np.testing.assert_allclose(found[:, : alone.shape[1]], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures('unchecked_shapes')
def test_convolutions_refuse_even_kernels_and_masks_that_do_not_fit():
    x, mask, key = np.zeros((2, 5, 3)), np.ones((2, 5), bool), jax.random.key(0)
    with pytest.raises(ValueError, match='4 taps'):
        jax.eval_shape(Conv(3, 4).init, key, x, mask)
    with pytest.raises(ValueError, match='4 taps'):
        jax.eval_shape(DepthwiseConv(4).init, key, x, mask)
    with pytest.raises(ValueError, match='mask'):
        jax.eval_shape(Conv(3, 3).init, key, x, mask[:, :4])
