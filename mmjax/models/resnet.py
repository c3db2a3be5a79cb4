"""ResNets in torchvision's layout (v1.5): ResNet-50, and small nets to train from scratch."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from mmjax import cpu
from mmjax.models.layers import Layer, MaskedBatchNorm
from mmjax.models.statistics import ImageStatistics
from mmjax.typing import Array

IMAGENET_RANGE = (-2.12, 2.64)  # of normalised pixels
_he_init = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')


class Conv(Layer):
    """A square convolution without bias, padded by kernel // 2 on both sides as PyTorch does."""

    features: int
    kernel: int
    stride: int = 1

    @nn.compact
    def __call__(
        self, x: Float[Array, 'batch height width channels']
    ) -> Float[jax.Array, 'batch rows columns {self.features}']:
        """Returns ⌈height/stride⌉ rows and ⌈width/stride⌉ columns."""
        shape = (self.kernel, self.kernel, x.shape[-1], self.features)
        kernel = self.param('kernel', _he_init, shape).astype(self.dtype)
        x = x.astype(self.dtype)
        if self.kernel == 1:
            return cpu.conv1x1(x, kernel[0, 0], self.stride)
        padding = [(self.kernel // 2, self.kernel // 2)] * 2
        return jax.lax.conv_general_dilated(
            x, kernel, (self.stride,) * 2, padding, dimension_numbers=('NHWC', 'HWIO', 'NHWC')
        )


def halve(x: Float[Array, 'batch height width channels']) -> jax.Array:
    """Averages x, of even height and width, over squares of 2 by 2."""
    batch, height, width, channels = x.shape
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).mean((2, 4))


class Block(Layer):
    """A residual block: 3×3, 3×3 (basic) or 1×1, 3×3, 1×1 of 4 times the width (bottleneck).

    The stride is in the first 3×3 (in a bottleneck: v1.5). With `average` a block of stride 2
    averages before its last convolution and before that of the shortcut, and none of its
    convolutions strides (ResNet-D, He 2018).
    """

    width: int
    stride: int
    bottleneck: bool = True
    average: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, 'batch height width channels'],
        mask: Bool[Array, ' batch'] | None,
        *,
        train: bool,
    ) -> Float[jax.Array, 'batch rows columns features']:
        """Maps x as the two or three convolutions do; `mask` as in `ResNet`."""
        shrink = halve if self.average and self.stride > 1 else lambda x: x
        stride = 1 if self.average else self.stride
        if self.bottleneck:
            plan = ((self.width, 1, 1), (self.width, 3, stride), (4 * self.width, 1, 1))
        else:
            plan = ((self.width, 3, stride), (self.width, 3, 1))
        y = x
        for index, (features, kernel, step) in enumerate(plan, start=1):
            last = index == len(plan)
            y = shrink(y) if last else y
            y = Conv(features, kernel, step, dtype=self.dtype, name=f'conv_{index}')(y)
            y = MaskedBatchNorm(dtype=self.dtype, name=f'norm_{index}')(y, mask, train=train)
            y = y if last else nn.relu(y)
        if self.stride > 1 or x.shape[-1] != y.shape[-1]:
            x = Conv(y.shape[-1], 1, stride, dtype=self.dtype, name='shortcut')(shrink(x))
            x = MaskedBatchNorm(dtype=self.dtype, name='shortcut_norm')(x, mask, train=train)
        return nn.relu(x + y)


def residual_stages(
    x: Float[Array, 'batch height width channels'],
    mask: Bool[Array, ' batch'] | None,
    stage_sizes: tuple[int, ...],
    width: int,
    *,
    train: bool,
    **options: Any,
) -> list[Float[jax.Array, 'batch _ _ _']]:
    """Runs the blocks of all stages, counted through: `block_0`, `block_1`, …

    Stage s has width · 2^s channels (4 times that out of a bottleneck) and halves the image from
    s = 1 on.

    Args:
      options: of every `Block`.

    Returns:
      x and what each stage puts out.
    """
    maps = [x]
    index = 0
    for stage, blocks in enumerate(stage_sizes):
        for position in range(blocks):
            stride = 2 if stage and not position else 1
            block = Block(width * 2**stage, stride, **options, name=f'block_{index}')
            x = block(x, mask, train=train)
            index += 1
        maps.append(x)
    return maps


class ResNet(Layer):
    """A residual net (He 2015) with masked batch norms, pooled by the mean over space.

    The defaults are ResNet-50 v1.5, 23,508,032 parameters. A small one: `ResNet((1, 1, 1, 1), 16,
    bottleneck=False, stem_kernel=3, stem_pool=False)`. Stages are those of
    `residual_stages`. With `statistics`, `ImageStatistics` of the stem's and all
    stages' maps come out in place of the last map's mean, for small nets from scratch.
    """

    stage_sizes: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    bottleneck: bool = True
    stem_kernel: int = 7
    stem_stride: int = 2
    stem_pool: bool = True
    statistics: bool = False

    @nn.compact
    def __call__(
        self,
        images: Float[Array, 'batch height width 3'],
        mask: Bool[Array, ' batch'] | None = None,
        *,
        train: bool,
    ) -> Float[jax.Array, 'batch features']:
        """Pools the maps of normalised images.

        `mask`: False on rows that must stay out of the batch statistics.
        """
        stem = (self.width, self.stem_kernel, self.stem_stride)
        x = Conv(*stem, dtype=self.dtype, name='stem')(images)
        x = nn.relu(MaskedBatchNorm(dtype=self.dtype, name='stem_norm')(x, mask, train=train))
        if self.stem_pool:
            x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        maps = residual_stages(
            x,
            mask,
            self.stage_sizes,
            self.width,
            train=train,
            bottleneck=self.bottleneck,
            dtype=self.dtype,
        )
        if self.statistics:
            pool = ImageStatistics(limits=IMAGENET_RANGE, name='statistics')
            return pool(images, maps).astype(self.dtype)
        return maps[-1].astype(jnp.float32).mean((1, 2)).astype(self.dtype)
