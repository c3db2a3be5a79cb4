"""Layers that several towers share: masked batch norm, attention, the MLP and their block."""

import functools
import math
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Shaped

from mmjax import axis, cpu
from mmjax.models import packing
from mmjax.typing import Array, DType

kernel_init = nn.initializers.xavier_uniform()


class Layer(nn.Module, kw_only=True):
    """A module that computes in `dtype`; its parameters are float32."""

    dtype: DType = jnp.float32


class AttentionLayer(Layer, kw_only=True):
    """A module with attention, computed by the `implementation` of `attend`."""

    implementation: str = 'xla'


class Dense(nn.Dense):
    """Flax's linear layer, computed by `cpu.matmul`."""

    dot_general: Callable[..., jax.Array] = cpu.matmul


class Dropout(nn.Module):
    """Sets values to 0 with probability `rate` and scales the others up (Srivastava et al. 2014).

    As Flax's, but with 16 random bits per value (`cpu.random_bits16`). The probability is the
    nearest multiple of 2⁻¹⁶ below 1, and the scale is that of this probability.
    """

    rate: float  # in [0, 1)

    @nn.compact
    def __call__(self, x: Float[Array, '*shape'], *, deterministic: bool) -> Float[Array, '*shape']:
        """Returns x's dtype; needs rng 'dropout' where it acts."""
        if not 0 <= self.rate < 1:
            raise ValueError(f'the dropout rate is {self.rate}, not in [0, 1)')
        values = 2**16
        dropped = min(round(self.rate * values), values - 1)
        if deterministic or not dropped:
            return x
        keep = cpu.random_bits16(self.make_rng('dropout'), x.shape) >= dropped
        return jnp.where(keep, x * (values / (values - dropped)), 0)


def gelu(x: Float[Array, '*shape'], approximate: bool = False) -> Float[jax.Array, '*shape']:
    """Computes GELU (Hendrycks & Gimpel 2016), exactly or, as in SigLIP, by tanh."""
    return cpu.elementwise(functools.partial(jax.nn.gelu, approximate=approximate), x)


def normalize_pixels(
    images: Shaped[Array, '*rows 3'], statistics: tuple[Sequence[float], Sequence[float]]
) -> Float[jax.Array, '*rows 3']:
    """Maps uint8 images to float32 (images / 255 − mean) / std; `statistics` is (mean, std)."""
    if images.dtype != jnp.uint8:
        raise ValueError(f'images are {images.dtype}, not uint8 in 0-255')
    mean, std = (jnp.asarray(x, jnp.float32) for x in statistics)
    return (images.astype(jnp.float32) / 255.0 - mean) / std


def patches(
    images: Float[Array, 'batch height width channels'], size: int, patch: int
) -> Float[Array, 'batch ({size}//{patch})**2 3*{patch}**2']:
    """Cuts images [batch, size, size, 3] into rows of pixels, one per patch.

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


class MaskedBatchNorm(Layer):
    """Batch normalisation whose statistics come from valid rows only (Ioffe & Szegedy 2015).

    y = (x − mean) / √(variance + epsilon) · scale + bias over the last axis. With `train`, mean and
    (biased) variance are those of the valid rows of the batch, and the running ones move by
    1 − momentum towards them; otherwise the running ones are used. A batch without a valid row
    is normalised by the running statistics and leaves them as they are. Statistics are float32;
    under jit over a sharded batch, and under a mapped axis (`mmjax.axis`), they are those of the
    global batch.

    Running averages live in the collection `batch_stats` as `mean` and `variance` [features].
    """

    momentum: float = 0.9
    epsilon: float = 1e-5

    @nn.compact
    def __call__(
        self,
        x: Float[Array, '*rows features'],
        mask: Shaped[Array, '*leading'] | None = None,
        *,
        train: bool,
    ) -> Float[jax.Array, '*rows features']:
        """Normalises x; `mask` covers any number of its leading axes."""
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


def _moments(x: Array, mask: Array | None, shift: Array):
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
    sums = (count, centred.sum(axes), jnp.square(centred).sum(axes))
    if axis.name() is not None:  # under a mapped axis each device has some of the rows
        sums = jax.lax.psum(sums, axis.name())
    count, total, squares = sums
    safe = jnp.maximum(count, 1.0)
    offset = total / safe
    variance = jnp.maximum(squares / safe - jnp.square(offset), 0.0)
    return shift + offset, variance, count


def attend(
    query: Float[Array, 'batch queries heads size'],
    key: Float[Array, 'batch keys kv_heads size'],
    value: Float[Array, 'batch keys kv_heads size'],
    mask: Bool[Array, '#batch #heads #queries keys'] | None = None,
    *,
    implementation: str = 'xla',
) -> Float[jax.Array, 'batch queries heads size']:
    """Computes scaled dot-product attention with a float32 softmax (Vaswani 2017).

    Args:
      query: heads are a multiple of kv_heads (grouped queries).
      key, value: of as many keys.
      mask: True where a key may be attended to. A query without such a key gets the mean of all
        values: finite, to be ignored.
      implementation: 'xla'; 'cudnn' (GPU flash attention: float16 or bfloat16, head size a multiple
        of 8 up to 128, even lengths under a mask; anything else is an error); 'auto': cudnn
        where these hold, else xla.

    Returns:
      The mean values, in the dtype of `value`.

    Raises:
      ValueError: an unknown implementation, or 'cudnn' where it does not work.
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
        return cpu.attend(*wide, mask).astype(value.dtype)
    return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation=implementation)


def attend_heads(
    query: Float[Array, 'batch queries width'],
    key: Float[Array, 'batch keys width'],
    value: Float[Array, 'batch keys width'],
    heads: int,
    mask: Bool[Array, '#batch #heads #queries keys'] | None = None,
    *,
    implementation: str = 'xla',
) -> Float[jax.Array, 'batch queries width']:
    """Computes `attend` with the width cut into heads; ValueError where they do not divide it."""
    width = query.shape[-1]
    if width % heads:
        raise ValueError(f'width {width} is not a multiple of {heads} heads')
    split = lambda x: x.reshape(*x.shape[:-1], heads, width // heads)
    parts = (split(x) for x in (query, key, value))
    return attend(*parts, mask, implementation=implementation).reshape(query.shape)


def _cudnn_fault(query: Array, key: Array, mask: Array | None) -> str:
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


class Attention(AttentionLayer):
    """Multi-head attention with its four projections: `query`, `key`, `value`, `out`."""

    heads: int

    @nn.compact
    def __call__(
        self,
        x: Float[Array, '*rows width'],
        context: Float[Array, 'batch keys width'] | None = None,
        mask: Bool[Array, '#batch #heads #queries keys'] | None = None,
        indices: packing.PackIndices | None = None,
    ) -> Float[jax.Array, '*rows width']:
        """Lets x [batch, queries, width] attend to `context`, or to itself.

        `mask`: as in `attend`. With `indices` x is packed, [packed, width], and so is what is
        returned; it attends to itself then, under `mask`.
        """
        if indices is not None and (mask is None or context is not None):
            raise ValueError('packed rows attend to themselves, under the mask of their padding')
        context = x if context is None else context
        project = lambda name, y: Dense(
            x.shape[-1], dtype=self.dtype, kernel_init=kernel_init, name=name
        )(y)
        parts = [project('query', x), project('key', context), project('value', context)]
        if indices is not None:
            parts = [packing.unpack(part, indices) for part in parts]
        attended = attend_heads(*parts, self.heads, mask, implementation=self.implementation)
        attended = attended if indices is None else packing.pack(attended, indices)
        return project('out', attended)


class Mlp(Layer):
    """Two linear layers with a GELU between: `up` to `width` features, `down` to the input's."""

    width: int
    approximate: bool = False  # GELU by tanh, as in SigLIP

    @nn.compact
    def __call__(self, x: Float[Array, '*rows width']) -> Float[jax.Array, '*rows width']:
        """Computes the MLP of each row."""
        up = Dense(self.width, dtype=self.dtype, kernel_init=kernel_init, name='up')
        down = Dense(x.shape[-1], dtype=self.dtype, kernel_init=kernel_init, name='down')
        return down(gelu(up(x), self.approximate))


class EncoderBlock(AttentionLayer):
    """A transformer block: x + attention(norm x), then x + MLP(norm x).

    Args:
      dropout: of what both halves add.
      approximate: of the MLP, see `Mlp`.
      norm: 'layer' or 'rms'.
      post_norm: as in BERT, norm(x + attention x), then norm(x + MLP x).
      layer_scale: start of a learnt factor per feature of what both halves add (Touvron 2021);
        None: no factor.
    """

    heads: int
    mlp_width: int
    dropout: float = 0.0
    epsilon: float = 1e-6
    approximate: bool = False
    norm: str = 'layer'
    post_norm: bool = False
    layer_scale: float | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, '*rows width'],
        mask: Bool[Array, '#batch #heads #queries keys'] | None = None,
        *,
        train: bool,
        indices: packing.PackIndices | None = None,
    ) -> Float[jax.Array, '*rows width']:
        """Computes the block on x [batch, length, width], or packed [rows, width] with `indices`.

        `mask` is that of `attend`.
        """
        attention = Attention(
            self.heads, dtype=self.dtype, implementation=self.implementation, name='attention'
        )
        mlp = Mlp(self.mlp_width, self.approximate, dtype=self.dtype, name='mlp')
        drop = nn.Dropout(self.dropout, deterministic=not train)
        kind = {'layer': nn.LayerNorm, 'rms': nn.RMSNorm}[self.norm]
        halves = (functools.partial(attention, mask=mask, indices=indices), mlp)
        for number, half in enumerate(halves, start=1):
            norm = kind(epsilon=self.epsilon, dtype=self.dtype, name=f'norm_{number}')
            y = drop(half(x if self.post_norm else norm(x)))
            if self.layer_scale is not None:
                start = nn.initializers.constant(self.layer_scale)
                y = y * self.param(f'scale_{number}', start, x.shape[-1:]).astype(self.dtype)
            x = norm(x + y) if self.post_norm else x + y
        return x
