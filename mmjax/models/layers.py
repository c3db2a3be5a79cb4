"""Layers that several towers share: masked batch norm, attention, the MLP and the pre-LN block."""

import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax.models import packing

kernel_init = nn.initializers.xavier_uniform()


def product(x: jax.Array, kernel: jax.Array, *_, **options) -> jax.Array:
    """Multiplies x […, inputs] by kernel [inputs, features]: […, features].

    As one product of rows: XLA:CPU takes up to three times as long for the gradient of a product
    whose left side has more axes. Further arguments are as `jax.lax.dot_general` has them after
    its dimension numbers; these themselves are not read.
    """
    rows = x.reshape(-1, x.shape[-1])
    found = jax.lax.dot_general(rows, kernel, (((1,), (0,)), ((), ())), **options)
    return found.reshape(*x.shape[:-1], kernel.shape[-1])


class Dense(nn.Dense):
    """Flax's linear layer, computed by `product`."""

    dot_general: Callable[..., jax.Array] = product


class Dropout(nn.Module):
    """Sets values to 0 with chance `rate` and scales the others up (Srivastava et al. 2014).

    As Flax's, but with 16 random bits a value where that takes 32, and so in half the time, which
    wide layers of few rows feel. The chance is the nearest multiple of 2⁻¹⁶, and the scale is that
    of this chance.
    """

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, *, deterministic: bool) -> jax.Array:
        """Maps x […, features] to the same shape and dtype; needs rng 'dropout' where it acts."""
        values = 2**16
        dropped = round(self.rate * values)
        if not 0 <= dropped <= values:
            raise ValueError(f'dropout of {self.rate} is not 0 … 1')
        if deterministic or not dropped:
            return x
        if dropped == values:
            return jnp.zeros_like(x)
        pairs = *x.shape[:-1], -(-x.shape[-1] // 2)
        bits = jax.random.bits(self.make_rng('dropout'), pairs, jnp.uint32)
        bits = jax.lax.bitcast_convert_type(bits, jnp.uint16)
        bits = bits.reshape(*x.shape[:-1], 2 * pairs[-1])
        kept = bits[..., : x.shape[-1]] >= dropped
        return jnp.where(kept, x * (values / (values - dropped)), 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _once(function, x):
    return jax.lax.optimization_barrier(function(jax.lax.optimization_barrier(x)))


def _once_backward(function, x, cotangent):
    return jax.lax.optimization_barrier(jax.vjp(function, x)[1](cotangent))


_once.defvjp(lambda function, x: (_once(function, x), x), _once_backward)


def elementwise(function: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """Returns function(x), of any shape; for activations that cost more than reading x.

    On CPU it is evaluated once forward and once backward: left to itself XLA:CPU fuses it into
    every product and sum beside it, and evaluates it for each.
    """
    return _once(function, x) if jax.default_backend() == 'cpu' else function(x)


def gelu(x: jax.Array, approximate: bool = False) -> jax.Array:
    """GELU (Hendrycks & Gimpel 2016), exact or, as SigLIP has it, by tanh."""
    return elementwise(functools.partial(jax.nn.gelu, approximate=approximate), x)


def normalize_pixels(images: jax.Array, statistics) -> jax.Array:
    """Maps uint8 images […, 3] to float32 (images / 255 − mean) / deviation."""
    if images.dtype != jnp.uint8:
        raise ValueError(f'images are {images.dtype}, not uint8 in 0-255')
    mean, deviation = (jnp.asarray(x, jnp.float32) for x in statistics)
    return (images.astype(jnp.float32) / 255.0 - mean) / deviation


def patches(images: jax.Array, size: int, patch: int) -> jax.Array:
    """Cuts images [batch, size, size, 3] into rows of pixels [batch, (size // patch)², patch²·3].

    A convolution whose stride is its kernel is one product of these rows. Pixels beyond the last
    whole patch are left out, as a convolution without padding does.
    """
    if images.shape[1:] != (size, size, 3):
        raise ValueError(f'images {images.shape} are not [batch, {size}, {size}, 3]')
    grid = size // patch
    if not grid:
        raise ValueError(f'image_size {size} is smaller than patch_size {patch}')
    x = images[:, : grid * patch, : grid * patch]
    x = x.reshape(-1, grid, patch, grid, patch, 3).swapaxes(2, 3)
    return x.reshape(-1, grid * grid, patch * patch * 3)


class MaskedBatchNorm(nn.Module):
    """Batch normalisation whose statistics come from valid rows only (Ioffe & Szegedy 2015).

    y = (x − mean) / √(variance + epsilon) · scale + bias over the last axis. With `train`, mean and
    (biased) variance are those of the valid rows of the batch, and the running ones move by
    1 − momentum towards them; otherwise the running ones are used. A batch without a valid row
    is normalised by the running statistics and leaves them as they are. Statistics are float32;
    under jit over a sharded batch they are those of the global batch.

    Running averages live in the collection `batch_stats` as `mean` and `variance` [features].
    """

    momentum: float = 0.9
    epsilon: float = 1e-5
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None, *, train: bool) -> jax.Array:
        """Normalises x [rows…, features]; `mask` covers any number of x's leading axes."""
        features = x.shape[-1]
        scale = self.param('scale', nn.initializers.ones, (features,))
        bias = self.param('bias', nn.initializers.zeros, (features,))
        running_mean = self.variable('batch_stats', 'mean', jnp.zeros, (features,))
        running_variance = self.variable('batch_stats', 'variance', jnp.ones, (features,))
        mean, variance = running_mean.value, running_variance.value
        x = x.astype(jnp.float32)
        if train:
            mean, batch_variance, count = _moments(x, mask, shift=mean)
            variance = jnp.where(count > 0, batch_variance, variance)
            if not self.is_initializing():
                rate = 1.0 - self.momentum
                running_mean.value += rate * (mean - running_mean.value)
                running_variance.value += rate * (variance - running_variance.value)
        y = (x - mean) * (jax.lax.rsqrt(variance + self.epsilon) * scale) + bias
        return y.astype(self.dtype)


def _moments(x: jax.Array, mask: jax.Array | None, shift: jax.Array):
    """Returns (mean [features], biased variance [features], count []) of the valid rows of x.

    Without a valid row the mean is exactly `shift` and the variance 0.
    """
    axes = tuple(range(x.ndim - 1))
    # Var x = E(x − s)² − (E x − s)² for any s: one pass, and exact to rounding when s is near E x,
    # which E x² − (E x)² is not where the mean is far from 0.
    centred = x - jax.lax.stop_gradient(shift)
    if mask is None:
        count = jnp.float32(math.prod(x.shape[:-1]))
    else:
        if mask.shape != x.shape[: mask.ndim] or mask.ndim >= x.ndim:
            raise ValueError(f'mask {mask.shape} does not cover leading axes of x {x.shape}')
        mask = mask.astype(bool)
        count = mask.sum(dtype=jnp.float32) * math.prod(x.shape[mask.ndim : -1])
        rows = mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))
        centred = jnp.where(rows, centred, 0.0)
    safe = jnp.maximum(count, 1.0)
    offset = centred.sum(axes) / safe
    variance = jnp.maximum(jnp.square(centred).sum(axes) / safe - jnp.square(offset), 0.0)
    return shift + offset, variance, count


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None = None,
    *,
    implementation: str = 'xla',
) -> jax.Array:
    """Scaled dot-product attention with a float32 softmax (Vaswani 2017).

    Args:
      query: [batch, queries, heads, head_size].
      key, value: [batch, keys, heads, head_size].
      mask: bool, broadcastable to [batch, heads, queries, keys], True where a key may be seen. A
        query that may see no key gets the mean of all values: finite, to be ignored.
      implementation: 'xla'; 'cudnn' (GPU flash attention: float16 or bfloat16, head size a multiple
        of 8 up to 128, even lengths under a mask; anything else is an error); 'auto': cudnn
        where these hold, else xla.

    Returns:
      [batch, queries, heads, head_size] in the dtype of `value`.
    """
    if implementation not in ('xla', 'cudnn', 'auto'):
        raise ValueError(f"attention '{implementation}' is not one of xla, cudnn, auto")
    fault = _cudnn_fault(query, key, mask)
    if implementation == 'cudnn' and fault:
        raise ValueError(f"attention 'cudnn' needs {fault}; choose 'xla' or 'auto'")
    if implementation == 'auto':
        implementation = 'xla' if fault else 'cudnn'
    if value.dtype in (jnp.float16, jnp.float32) and jax.default_backend() == 'cpu':
        # XLA:CPU has no product of float16 that sums in float32.
        wide = (x.astype(jnp.float32) for x in (query, key, value))
        return _attend_by_products(*wide, mask).astype(value.dtype)
    return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation=implementation)


def _attend_by_products(query, key, value, mask) -> jax.Array:
    """`attend` with heads before rows, in which order XLA:CPU has fast products."""
    groups = query.shape[2] // key.shape[2]
    if groups > 1:
        key, value = (jnp.repeat(x, groups, axis=2) for x in (key, value))
    scores = (query * query.shape[-1] ** -0.5).transpose(0, 2, 1, 3) @ key.transpose(0, 2, 3, 1)
    if mask is not None:
        scores = jnp.where(mask, scores, -0.7 * jnp.finfo(scores.dtype).max)
    return (jax.nn.softmax(scores, -1) @ value.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)


def _cudnn_fault(query: jax.Array, key: jax.Array, mask: jax.Array | None) -> str:
    """Says which condition of cuDNN's fused attention does not hold; '' when all do."""
    if jax.default_backend() != 'gpu':
        return f'a GPU, not {jax.default_backend()}'
    if query.dtype not in (jnp.float16, jnp.bfloat16):
        return f'float16 or bfloat16, not {query.dtype}'
    if query.shape[-1] % 8 or query.shape[-1] > 128:
        return f'a head size that is a multiple of 8 up to 128, not {query.shape[-1]}'
    if mask is not None and (query.shape[1] % 2 or key.shape[1] % 2):
        return f'even lengths under a mask, not {query.shape[1]} and {key.shape[1]}'
    return ''


class Attention(nn.Module):
    """Multi-head attention with its four projections: `query`, `key`, `value`, `out`."""

    heads: int
    dtype: jnp.dtype = jnp.float32
    implementation: str = 'xla'

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        context: jax.Array | None = None,
        mask: jax.Array | None = None,
        places: packing.Places | None = None,
    ) -> jax.Array:
        """Lets x [batch, queries, width] attend to `context` [batch, keys, width], or to itself.

        `mask`: as in `attend`. Returns [batch, queries, width]. With `places` x is packed,
        [room, width], and so is what is returned; it attends to itself then, under `mask`.
        """
        if places is not None and (mask is None or context is not None):
            raise ValueError('packed rows attend to themselves, under the mask of their padding')
        width = x.shape[-1]
        if width % self.heads:
            raise ValueError(f'width {width} is not a multiple of {self.heads} heads')
        context = x if context is None else context
        project = lambda name, y: Dense(
            width, dtype=self.dtype, kernel_init=kernel_init, name=name
        )(y)
        apart = (lambda y: y) if places is None else lambda y: packing.unpack(y, places)
        split = lambda y: apart(y.reshape(*y.shape[:-1], self.heads, width // self.heads))
        attended = attend(
            split(project('query', x)),
            split(project('key', context)),
            split(project('value', context)),
            mask,
            implementation=self.implementation,
        )
        attended = attended if places is None else packing.pack(attended, places)
        return project('out', attended.reshape(*attended.shape[:-2], width))


class Mlp(nn.Module):
    """Two linear layers with a GELU between: `up` to `width` features, `down` to the input's."""

    width: int
    approximate: bool = False  # GELU by tanh, as SigLIP has it
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        up = Dense(self.width, dtype=self.dtype, kernel_init=kernel_init, name='up')
        down = Dense(x.shape[-1], dtype=self.dtype, kernel_init=kernel_init, name='down')
        return down(gelu(up(x), self.approximate))


class EncoderBlock(nn.Module):
    """A pre-LN transformer block: x + attention(LN x), then x + MLP(LN x)."""

    heads: int
    mlp_width: int
    dropout: float = 0.0
    epsilon: float = 1e-6
    approximate: bool = True
    dtype: jnp.dtype = jnp.float32
    implementation: str = 'xla'

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None, *, train: bool) -> jax.Array:
        """Maps x [batch, length, width] to the same shape; `mask` as in `attend`."""
        norm = lambda name: nn.LayerNorm(self.epsilon, dtype=self.dtype, name=name)
        drop = nn.Dropout(self.dropout, deterministic=not train)
        attention = Attention(self.heads, self.dtype, self.implementation, name='attention')
        x = x + drop(attention(norm('norm_1')(x), mask=mask))
        mlp = Mlp(self.mlp_width, self.approximate, self.dtype, name='mlp')
        return x + drop(mlp(norm('norm_2')(x)))
