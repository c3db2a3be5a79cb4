"""CLIP's ResNet: a stem of three convolutions, averages before strides, attention pooling."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from mmjax.models import layers
from mmjax.models.layers import MaskedBatchNorm
from mmjax.models.resnet import Conv, halve, residual_stages
from mmjax.models.statistics import ImageStatistics
from mmjax.typing import Array

CLIP_RANGE = (-1.8, 2.15)  # of pixels, as CLIP normalises them


class AttentionPool(layers.AttentionLayer):
    """Pools a map by attention whose one query is the map's mean (Radford 2021)."""

    heads: int
    features: int

    @nn.compact
    def __call__(
        self, x: Float[Array, 'batch height width channels']
    ) -> Float[jax.Array, 'batch {self.features}']:
        """Pools all positions of a map."""
        batch, height, width, channels = x.shape
        init = nn.initializers.normal(channels**-0.5)
        positions = self.param('positions', init, (1 + height * width, channels))
        x = x.reshape(batch, height * width, channels)
        x = jnp.concatenate([x.mean(1, keepdims=True), x], 1) + positions.astype(self.dtype)
        dense = lambda name, features: layers.Dense(
            features, dtype=self.dtype, kernel_init=init, name=name
        )
        pooled = layers.attend_heads(
            dense('query', channels)(x[:, :1]),
            dense('key', channels)(x),
            dense('value', channels)(x),
            self.heads,
            implementation=self.implementation,
        )
        return dense('out', self.features)(pooled[:, 0])


class StatisticsPool(layers.Layer):
    """Projects `ImageStatistics`, for a small net that is trained from scratch."""

    features: int
    share: float = 0.3

    @nn.compact
    def __call__(
        self, images: Float[Array, 'batch size size 3'], maps: list[Float[Array, 'batch _ _ _']]
    ) -> Float[jax.Array, 'batch {self.features}']:
        """Projects the statistics of images and of their maps."""
        x = ImageStatistics(share=self.share, limits=CLIP_RANGE, name='statistics')(images, maps)
        init = nn.initializers.normal(self.features**-0.5)
        return layers.Dense(self.features, dtype=self.dtype, kernel_init=init, name='out')(x)


class ModifiedResNet(layers.AttentionLayer):
    """CLIP's residual net with masked batch norms (Radford 2021, after He 2018's ResNet-D).

    The defaults are RN50's. A small one: `ModifiedResNet(64, (1, 1, 1, 1), 16, 8, 128)`. The stem
    makes a quarter of the image's side; stages are those of `resnet.residual_stages`.
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
        if size % shrink:
            raise ValueError(f'image_size {size} is not a multiple of {shrink}')
        if self.pooling not in ('attention', 'statistics'):
            raise ValueError(f"pooling '{self.pooling}' is not 'attention' or 'statistics'")
        x = images
        stem = ((self.width // 2, 2), (self.width // 2, 1), (self.width, 1))
        for index, (features, stride) in enumerate(stem, start=1):
            x = Conv(features, 3, stride, dtype=self.dtype, name=f'stem_{index}')(x)
            norm = MaskedBatchNorm(dtype=self.dtype, name=f'stem_norm_{index}')
            x = nn.relu(norm(x, mask, train=train))
        maps = residual_stages(
            halve(x),
            mask,
            self.stage_sizes,
            self.width,
            train=train,
            average=True,
            dtype=self.dtype,
        )
        if self.pooling == 'statistics':
            pool = StatisticsPool(self.features, share=self.share, dtype=self.dtype, name='pool')
            return pool(images, maps)
        return AttentionPool(
            self.heads,
            self.features,
            dtype=self.dtype,
            implementation=self.implementation,
            name='pool',
        )(maps[-1])
