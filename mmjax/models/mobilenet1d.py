"""A small MobileNetV3 over frames: inverted residual blocks whose statistics see valid frames."""

import math
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from mmjax.models.convolutions import Conv, DepthwiseConv, clear
from mmjax.models.layers import Dense, Layer, MaskedBatchNorm
from mmjax.typing import Array


class Row(NamedTuple):
    """A row of the table of blocks."""

    expanded: int
    features: int
    kernel: int
    stride: int
    squeeze: bool
    activation: Callable[[jax.Array], jax.Array]


PUBLISHED = (
    Row(16, 16, 3, 1, True, nn.relu),
    Row(72, 24, 3, 2, False, nn.relu),
    Row(88, 24, 3, 1, False, nn.relu),
    Row(96, 40, 5, 1, True, nn.hard_swish),
    Row(240, 40, 5, 1, True, nn.hard_swish),
    Row(120, 48, 5, 1, True, nn.hard_swish),
)


class SqueezeExcitation(Layer):
    """Scales channels by what the mean over a row's valid frames says (Hu 2018, Howard 2019)."""

    hidden: int

    @nn.compact
    def __call__(
        self, x: Float[Array, 'batch time channels'], mask: Bool[Array, 'batch time']
    ) -> Float[jax.Array, 'batch time channels']:
        """Scales x by its own mean over the frames of `mask`."""
        count = jnp.maximum(mask.sum(1, keepdims=True), 1)
        mean = clear(x.astype(jnp.float32), mask).sum(1) / count  # 0 for a row without frames
        scale = nn.relu(Dense(self.hidden, dtype=self.dtype, name='reduce')(mean))
        scale = nn.hard_sigmoid(Dense(x.shape[-1], dtype=self.dtype, name='expand')(scale))
        return x * scale[:, None]


class InvertedResidual(Layer):
    """1×1 to `expanded` (left out where that is the width already), depthwise, 1×1 to `features`.

    The squeeze-excitation, of expanded // 4 hidden units, comes after the depthwise convolution's
    activation; the input is added where the shape stays (Sandler 2018, Howard 2019).
    """

    row: Row

    @nn.compact
    def __call__(
        self,
        x: Float[Array, 'batch time channels'],
        mask: Bool[Array, 'batch time'],
        *,
        train: bool,
    ) -> Float[jax.Array, 'batch frames {self.row.features}']:
        """Returns ⌈time/stride⌉ frames, whose mask is `mask[:, ::stride]`."""
        row = self.row
        after = mask[:, :: row.stride]
        norm = lambda name, y, mask: MaskedBatchNorm(dtype=self.dtype, name=name)(
            y, mask, train=train
        )
        y = x
        if row.expanded != x.shape[-1]:
            y = Conv(row.expanded, dtype=self.dtype, name='expand')(y, mask)
            y = row.activation(norm('expand_norm', y, mask))
        y = DepthwiseConv(row.kernel, row.stride, dtype=self.dtype, name='depthwise')(y, mask)
        y = row.activation(norm('depthwise_norm', y, after))
        if row.squeeze:
            y = SqueezeExcitation(row.expanded // 4, dtype=self.dtype, name='squeeze')(y, after)
        y = Conv(row.features, dtype=self.dtype, name='project')(y, after)
        y = norm('project_norm', y, after)
        return x + y if row.stride == 1 and x.shape == y.shape else y


class MobileNet1d(Layer):
    """A stem (3 taps, stride 2, hard swish), then inverted residual blocks: `block_0`, …"""

    stem: int = 16
    blocks: tuple[Row, ...] = PUBLISHED

    @property
    def stride(self) -> int:
        """How many input frames make one output frame."""
        return 2 * math.prod(row.stride for row in self.blocks)

    @nn.compact
    def __call__(
        self,
        x: Float[Array, 'batch time channels'],
        mask: Bool[Array, 'batch time'],
        *,
        train: bool,
    ) -> Float[jax.Array, 'batch frames features']:
        """Returns ⌈time/stride⌉ frames with mask `mask[:, ::stride]`; others are finite."""
        x = Conv(self.stem, 3, 2, dtype=self.dtype, name='stem')(x, mask)
        mask = mask[:, ::2]
        x = nn.hard_swish(MaskedBatchNorm(dtype=self.dtype, name='stem_norm')(x, mask, train=train))
        for index, row in enumerate(self.blocks):
            x = InvertedResidual(row, dtype=self.dtype, name=f'block_{index}')(x, mask, train=train)
            mask = mask[:, :: row.stride]
        return x
