"""CLIP's ResNet: a stem of three convolutions, averages before strides, attention pooling."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from mmjax.models import layers
from mmjax.models.layers import MaskedBatchNorm
from mmjax.models.resnet import Conv
from mmjax.models.statistics import ImageStatistics
from mmjax.typing import Array, DType

CLIP_RANGE = (-1.8, 2.15)  # of pixels, as CLIP normalises them


def _halve(x: jax.Array) -> jax.Array:
    """Averages x [batch, height, width, channels], both even, over squares of 2 by 2."""
    batch, height, width, channels = x.shape
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).mean((2, 4))


class Bottleneck(nn.Module):
    """1×1, 3×3, 1×1 of 4 times the width; `halve` averages instead of striding (Zhang 2019).

    The average lies before the last convolution, and before that of the shortcut.
    """

    width: int
    halve: bool
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, 'batch height width channels'],
        mask: Bool[Array, ' batch'] | None,
        *,
        train: bool,
    ) -> Float[jax.Array, 'batch rows columns {4*self.width}']:
        """Maps x as the three convolutions do; `mask` as in `ModifiedResNet`."""
        conv = lambda features, kernel, name: Conv(features, kernel, dtype=self.dtype, name=name)
        norm = lambda name, y: MaskedBatchNorm(dtype=self.dtype, name=name)(y, mask, train=train)
        y = nn.relu(norm('norm_1', conv(self.width, 1, 'conv_1')(x)))
        y = nn.relu(norm('norm_2', conv(self.width, 3, 'conv_2')(y)))
        y = _halve(y) if self.halve else y
        y = norm('norm_3', conv(4 * self.width, 1, 'conv_3')(y))
        if self.halve or x.shape[-1] != y.shape[-1]:
            x = _halve(x) if self.halve else x
            x = norm('shortcut_norm', conv(y.shape[-1], 1, 'shortcut')(x))
        return nn.relu(x + y)


class AttentionPool(nn.Module):
    """Pools a map by attention whose one query is the map's mean (Radford 2021)."""

    heads: int
    features: int
    dtype: DType = jnp.float32
    implementation: str = 'xla'

    @nn.compact
    def __call__(
        self, x: Float[Array, 'batch height width channels']
    ) -> Float[jax.Array, 'batch {self.features}']:
        """Pools all positions of a map."""
        batch, height, width, channels = x.shape
        if channels % self.heads:
            raise ValueError(f'{channels} channels are not a multiple of {self.heads} heads')
        init = nn.initializers.normal(channels**-0.5)
        positions = self.param('positions', init, (1 + height * width, channels))
        x = x.reshape(batch, height * width, channels)
        x = jnp.concatenate([x.mean(1, keepdims=True), x], 1) + positions.astype(self.dtype)
        dense = lambda name, features: layers.Dense(
            features, dtype=self.dtype, kernel_init=init, name=name
        )
        split = lambda y: y.reshape(*y.shape[:-1], self.heads, channels // self.heads)
        pooled = layers.attend(
            split(dense('query', channels)(x[:, :1])),
            split(dense('key', channels)(x)),
            split(dense('value', channels)(x)),
            implementation=self.implementation,
        )
        return dense('out', self.features)(pooled.reshape(batch, channels))


class StatisticsPool(nn.Module):
    """Projects `ImageStatistics`, for a small net that is trained from scratch."""

    features: int
    bins: int = 8
    share: float = 0.3
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(
        self, images: Float[Array, 'batch size size 3'], maps: list[Float[Array, 'batch _ _ _']]
    ) -> Float[jax.Array, 'batch {self.features}']:
        """Projects the statistics of images and of their maps."""
        x = ImageStatistics(self.bins, self.share, CLIP_RANGE, name='statistics')(images, maps)
        init = nn.initializers.normal(self.features**-0.5)
        return layers.Dense(self.features, dtype=self.dtype, kernel_init=init, name='out')(x)


class ModifiedResNet(nn.Module):
    """CLIP's residual net with masked batch norms (Radford 2021, after He 2018's ResNet-D).

    The defaults are RN50's. A small one: `ModifiedResNet(64, (1, 1, 1, 1), 16, 8, 128)`. The stem
    makes a quarter of the image's side, every stage after the first halves it; stage s puts out
    4 · width · 2^s channels. Blocks are counted through all stages: `block_0`, `block_1`, …
    `pooling`: 'attention' is CLIP's; 'statistics' pools the stem's and every stage's output by
    `StatisticsPool` with `share`, for small nets from scratch.
    """

    image_size: int = 224
    stage_sizes: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    heads: int = 32
    features: int = 1024
    pooling: str = 'attention'
    share: float = 0.3
    dtype: DType = jnp.float32
    implementation: str = 'xla'

    @nn.compact
    def __call__(
        self,
        images: Float[Array, 'batch size size 3'],
        mask: Bool[Array, ' batch'] | None = None,
        *,
        train: bool,
    ) -> Float[jax.Array, 'batch {self.features}']:
        """Embeds normalised images of `image_size`.

        `mask`: False on rows that must stay out of the batch statistics.
        """
        size = self.image_size
        shrink = 4 * 2 ** (len(self.stage_sizes) - 1)
        if images.shape[1:] != (size, size, 3):
            raise ValueError(f'images {images.shape} are not [batch, {size}, {size}, 3]')
        if self.pooling not in ('attention', 'statistics'):
            raise ValueError(f"pooling '{self.pooling}' is not attention or statistics")
        if size % shrink:
            raise ValueError(f'image_size {size} is not a multiple of {shrink}')
        x = images
        stem = ((self.width // 2, 2), (self.width // 2, 1), (self.width, 1))
        for index, (features, stride) in enumerate(stem, start=1):
            x = Conv(features, 3, stride, self.dtype, name=f'stem_{index}')(x)
            norm = MaskedBatchNorm(dtype=self.dtype, name=f'stem_norm_{index}')
            x = nn.relu(norm(x, mask, train=train))
        x = _halve(x)
        maps = [x]
        index = 0
        for stage, blocks in enumerate(self.stage_sizes):
            for first in (position == 0 for position in range(blocks)):
                x = Bottleneck(
                    self.width * 2**stage, first and stage > 0, self.dtype, name=f'block_{index}'
                )(x, mask, train=train)
                index += 1
            maps.append(x)
        if self.pooling == 'statistics':
            pool = StatisticsPool(self.features, share=self.share, dtype=self.dtype, name='pool')
            return pool(images, maps)
        return AttentionPool(
            self.heads, self.features, self.dtype, self.implementation, name='pool'
        )(x)
