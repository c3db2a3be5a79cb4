"""1-D convolutions over frames, in which nothing sees what lies beyond the end of a row.

Padding is symmetric and explicit, so that stride s keeps ⌈length / s⌉ frames of a row whatever the
length it is padded to, and `mask[:, ::s]` is the mask of the result.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Shaped

from mmjax import cpu
from mmjax.models.layers import Layer
from mmjax.typing import Array

_he_init = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')


def clear(
    x: Shaped[Array, 'batch time *features'], mask: Bool[Array, 'batch time']
) -> Shaped[jax.Array, 'batch time *features']:
    """Sets x to 0 where `mask` is False."""
    if mask.shape != x.shape[:2]:
        raise ValueError(f'mask {mask.shape} does not fit x {x.shape}')
    return jnp.where(mask.reshape(mask.shape + (1,) * (x.ndim - 2)), x, 0)


def convolve(
    x: Float[Array, 'batch time channels'],
    kernel: Float[Array, 'taps channels features'],
    stride: int = 1,
) -> Float[jax.Array, 'batch frames features']:
    """Convolves x with a kernel of an odd number of taps.

    Returns ⌈time / stride⌉ frames. On XLA:CPU the library's convolution is faster
    here than one product over gathered shifts, and as fast as a product where taps = 1.
    """
    padding = _padding(kernel)
    return jax.lax.conv_general_dilated(
        x, kernel, (stride,), [(padding, padding)], dimension_numbers=('NWC', 'WIO', 'NWC')
    )


def depthwise(
    x: Float[Array, 'batch time channels'],
    kernel: Float[Array, 'taps channels'],
    stride: int = 1,
) -> Float[jax.Array, 'batch frames channels']:
    """Convolves each channel of x with its own column of a kernel of an odd number of taps.

    Returns ⌈time / stride⌉ frames.
    """
    _padding(kernel)
    return cpu.depthwise(x, kernel, stride)


def upsample(
    x: Float[Array, 'batch time channels'], kernel: Float[Array, 'channels stride features']
) -> Float[jax.Array, 'batch time*stride features']:
    """Convolves transposed, with a stride equal to the kernel: frames do not overlap.

    A product, as no frame is added to another.
    """
    batch, time, channels = x.shape
    y = cpu.matmul(x, kernel.reshape(channels, -1))
    return y.reshape(batch, time * kernel.shape[1], kernel.shape[2])


def _padding(kernel: Array) -> int:
    if kernel.shape[0] % 2 == 0:
        raise ValueError(f'a kernel of {kernel.shape[0]} taps has no middle; choose an odd number')
    return kernel.shape[0] // 2


class Conv(Layer):
    """A masked convolution: `convolve` with an optional bias."""

    features: int
    kernel: int = 1
    stride: int = 1
    use_bias: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, 'batch time channels'], mask: Bool[Array, 'batch time']
    ) -> Float[jax.Array, 'batch frames {self.features}']:
        """Returns ⌈time/stride⌉ frames; those beyond the end of a row hold anything finite."""
        kernel = self.param('kernel', _he_init, (self.kernel, x.shape[-1], self.features))
        y = convolve(clear(x, mask).astype(self.dtype), kernel.astype(self.dtype), self.stride)
        if self.use_bias:
            bias = self.param('bias', nn.initializers.zeros, (self.features,))
            y = y + bias.astype(self.dtype)
        return y


class DepthwiseConv(Layer):
    """A masked convolution of each channel with its own kernel, without bias."""

    kernel: int
    stride: int = 1

    @nn.compact
    def __call__(
        self, x: Float[Array, 'batch time channels'], mask: Bool[Array, 'batch time']
    ) -> Float[jax.Array, 'batch frames channels']:
        """Returns ⌈time/stride⌉ frames; those beyond the end of a row hold anything finite."""
        init = nn.initializers.normal((2.0 / self.kernel) ** 0.5)  # He: fan-out is the taps
        kernel = self.param('kernel', init, (self.kernel, x.shape[-1]))
        return depthwise(clear(x, mask).astype(self.dtype), kernel.astype(self.dtype), self.stride)


class Upsample(Layer):
    """A transposed convolution with bias whose kernel is its stride: time becomes time · stride."""

    features: int
    stride: int

    @nn.compact
    def __call__(
        self, x: Float[Array, 'batch time channels'], mask: Bool[Array, 'batch time']
    ) -> Float[jax.Array, 'batch {self.stride}*time {self.features}']:
        """Upsamples the valid frames; those made of frames beyond a row's end hold the bias."""
        init = nn.initializers.variance_scaling(
            2.0, 'fan_in', 'normal', in_axis=0, out_axis=2, batch_axis=1
        )
        kernel = self.param('kernel', init, (x.shape[-1], self.stride, self.features))
        bias = self.param('bias', nn.initializers.zeros, (self.features,))
        y = upsample(clear(x, mask).astype(self.dtype), kernel.astype(self.dtype))
        return y + bias.astype(self.dtype)
