"""InternViT's image tower: pre-norm blocks with layer scale, and the tokens it hands a decoder."""

import flax.linen as nn
import jax
from jaxtyping import Float

from mmjax.models import layers
from mmjax.typing import Array


class InternViT(layers.AttentionLayer):
    """Patches, learned positions, blocks `block_0`, `block_1`, … (Chen 2024, InternVL).

    The defaults are InternViT-300M-448px. Its class token takes no part in what a decoder sees and
    is left out. `stem` 'convolutions' halves the image by 3×3 convolutions instead, down to the
    grid of patches, which small towers learn from scratch far sooner (Xiao 2021, Early
    Convolutions Help Transformers See Better); `patch_size` is then a power of 2. `remat`: the
    backward pass computes a block's activations again instead of keeping them.
    """

    image_size: int = 448
    patch_size: int = 14
    width: int = 1024
    depth: int = 24
    heads: int = 16
    mlp_width: int = 4096
    norm: str = 'layer'
    layer_scale: float = 0.1
    stem: str = 'patch'
    dropout: float = 0.0
    remat: bool = False

    @nn.compact
    def __call__(
        self, images: Float[Array, 'batch size size 3'], *, train: bool
    ) -> Float[jax.Array, 'batch tokens {self.width}']:
        """Maps normalised images to one token per cell of the grid of patches, row by row."""
        if self.stem not in ('patch', 'convolutions'):
            raise ValueError(f"stem '{self.stem}' is not 'patch' or 'convolutions'")
        if self.stem == 'patch':
            x = layers.patches(images, self.image_size, self.patch_size).astype(self.dtype)
            embed = layers.Dense(
                self.width, dtype=self.dtype, kernel_init=layers.kernel_init, name='patch_embedding'
            )
            x = embed(x)
        else:
            x = self._convolve(images)
        start = nn.initializers.normal(0.02)
        positions = self.param('positions', start, (x.shape[1], self.width))
        x = nn.Dropout(self.dropout, deterministic=not train)(x + positions.astype(self.dtype))
        run = lambda block, x: block(x, train=train)
        run = nn.remat(run) if self.remat else run
        for index in range(self.depth):
            block = layers.EncoderBlock(
                self.heads,
                self.mlp_width,
                self.dropout,
                norm=self.norm,
                layer_scale=self.layer_scale,
                dtype=self.dtype,
                implementation=self.implementation,
                name=f'block_{index}',
            )
            x = run(block, x)
        return x

    def _convolve(self, images: Array) -> jax.Array:
        halvings = self.patch_size.bit_length() - 1
        x = images.astype(self.dtype)
        for index in range(halvings):
            features = max(self.width >> (halvings - 1 - index), 16)
            x = nn.Conv(
                features, (3, 3), 2, ((1, 1), (1, 1)), dtype=self.dtype, name=f'stem_{index}'
            )(x)
            x = nn.gelu(nn.LayerNorm(dtype=self.dtype, name=f'stem_norm_{index}')(x))
        x = layers.Dense(self.width, dtype=self.dtype, name='patch_embedding')(x)
        return x.reshape(len(x), -1, self.width)


def shuffle_pixels(
    tokens: Float[Array, 'batch tokens width'], factor: int
) -> Float[Array, 'batch tokens//{factor}**2 width*{factor}**2']:
    """Joins factor × factor neighbours of a square grid.

    Raises:
      ValueError: the tokens are no square grid, or its side is not a multiple of `factor`.
    """
    batch, count, width = tokens.shape
    grid = round(count**0.5)
    if grid * grid != count or grid % factor:
        raise ValueError(f'{count} tokens are no square grid whose side {factor} divides')
    x = tokens.reshape(batch, grid // factor, factor, grid // factor, factor, width)
    return x.swapaxes(2, 3).reshape(batch, (grid // factor) ** 2, factor * factor * width)
