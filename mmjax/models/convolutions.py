"""1-D convolutions over frames, in which nothing sees what lies beyond the end of a row.

Padding is symmetric and explicit, so that stride s keeps ⌈length / s⌉ frames of a row whatever the
length it is padded to, and `mask[:, ::s]` is the mask of the result.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax.models.layers import product

_he_init = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')


def clear(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Sets x [batch, time, …] to 0 where `mask`, bool [batch, time], is False."""
    if mask.shape != x.shape[:2]:
        raise ValueError(f'mask {mask.shape} does not fit x {x.shape}')
    return jnp.where(mask.reshape(mask.shape + (1,) * (x.ndim - 2)), x, 0)


def convolve(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    """Convolves x [batch, time, channels] with kernel [taps, channels, features], taps odd.

    Returns [batch, ⌈time / stride⌉, features]. On XLA:CPU the library's convolution is faster
    here than one product over gathered shifts, and as fast as a product where taps = 1.
    """
    padding = _padding(kernel)
    return jax.lax.conv_general_dilated(
        x, kernel, (stride,), [(padding, padding)], dimension_numbers=('NWC', 'WIO', 'NWC')
    )


def depthwise(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    """Convolves each channel of x [batch, time, channels] with its own column of the kernel.

    `kernel`: [taps, channels], taps odd. Returns [batch, ⌈time / stride⌉, channels].

    Shifted copies are multiplied and added: XLA:CPU fuses the sum and its derivatives, where its
    grouped convolution is 10 times slower and more (`benchmarks/sign_layers.py`).
    """
    taps, padding = kernel.shape[0], _padding(kernel)
    last = (x.shape[1] - 1) // stride * stride  # the last place a kernel is centred at
    x = jnp.pad(x, ((0, 0), (padding, padding), (0, 0)))
    return sum(x[:, k : k + last + 1 : stride] * kernel[k] for k in range(taps))


def upsample(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolves transposed, with a stride equal to the kernel: frames do not overlap.

    Maps x [batch, time, channels], kernel [channels, stride, features] to
    [batch, time · stride, features]; a product, as no frame is added to another.
    """
    batch, time, channels = x.shape
    y = product(x, kernel.reshape(channels, -1))
    return y.reshape(batch, time * kernel.shape[1], kernel.shape[2])


def _padding(kernel: jax.Array) -> int:
    if kernel.shape[0] % 2 == 0:
        raise ValueError(f'a kernel of {kernel.shape[0]} taps has no middle; choose an odd number')
    return kernel.shape[0] // 2


class Conv(nn.Module):
    """A masked convolution: `convolve` with an optional bias."""

    features: int
    kernel: int = 1
    stride: int = 1
    use_bias: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Maps x [batch, time, channels], mask [batch, time] to [batch, ⌈time/stride⌉, features].

        Frames of the result beyond the end of a row hold anything finite.
        """
        kernel = self.param('kernel', _he_init, (self.kernel, x.shape[-1], self.features))
        y = convolve(clear(x, mask).astype(self.dtype), kernel.astype(self.dtype), self.stride)
        if self.use_bias:
            bias = self.param('bias', nn.initializers.zeros, (self.features,))
            y = y + bias.astype(self.dtype)
        return y


class DepthwiseConv(nn.Module):
    """A masked convolution of each channel with a kernel of its own, without bias."""

    kernel: int
    stride: int = 1
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Maps x [batch, time, channels], mask [batch, time] to [batch, ⌈time/stride⌉, channels].

        Frames of the result beyond the end of a row hold anything finite.
        """
        init = nn.initializers.normal((2.0 / self.kernel) ** 0.5)  # He: fan-out is the taps
        kernel = self.param('kernel', init, (self.kernel, x.shape[-1]))
        return depthwise(clear(x, mask).astype(self.dtype), kernel.astype(self.dtype), self.stride)


class Upsample(nn.Module):
    """A transposed convolution with bias whose kernel is its stride: time becomes time · stride."""

    features: int
    stride: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Maps x [batch, time, channels], mask [batch, time] to [batch, time·stride, features].

        Frames made of those beyond the end of a row hold the bias.
        """
        init = nn.initializers.variance_scaling(
            2.0, 'fan_in', 'normal', in_axis=0, out_axis=2, batch_axis=1
        )
        kernel = self.param('kernel', init, (x.shape[-1], self.stride, self.features))
        bias = self.param('bias', nn.initializers.zeros, (self.features,))
        y = upsample(clear(x, mask).astype(self.dtype), kernel.astype(self.dtype))
        return y + bias.astype(self.dtype)
