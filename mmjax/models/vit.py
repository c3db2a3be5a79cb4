"""The SigLIP-shaped vision transformer: patches, learned positions, attention-pooled."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float

from mmjax.models import layers
from mmjax.typing import Array


class AttentionPool(layers.AttentionLayer):
    """Pools tokens by one learned query, then adds an MLP of it (Zhai 2022, "MAP head")."""

    heads: int
    mlp_width: int
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, 'batch length width']) -> Float[jax.Array, 'batch width']:
        """Pools the tokens of each row."""
        width = x.shape[-1]
        probe = self.param('probe', layers.kernel_init, (1, width))
        probe = jnp.broadcast_to(probe.astype(self.dtype), (x.shape[0], 1, width))
        attention = layers.Attention(
            self.heads, dtype=self.dtype, implementation=self.implementation, name='attention'
        )
        pooled = attention(probe, x)[:, 0]
        normed = nn.LayerNorm(self.epsilon, dtype=self.dtype, name='norm')(pooled)
        return pooled + layers.Mlp(self.mlp_width, True, dtype=self.dtype, name='mlp')(normed)


class ViT(layers.AttentionLayer):
    """SigLIP's image tower (Zhai 2023): no class token, pre-LN blocks, attention pooling.

    The defaults are siglip-base-patch16-224: 92,884,224 parameters. Blocks are `block_0`, …
    """

    image_size: int = 224
    patch_size: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_width: int = 3072
    dropout: float = 0.0
    epsilon: float = 1e-6

    @nn.compact
    def __call__(
        self, images: Float[Array, 'batch size size 3'], *, train: bool
    ) -> Float[jax.Array, 'batch {self.width}']:
        """Embeds normalised images of `image_size`."""
        x = layers.patches(images, self.image_size, self.patch_size).astype(self.dtype)
        embed = layers.Dense(
            self.width, dtype=self.dtype, kernel_init=layers.kernel_init, name='patch_embedding'
        )
        positions = self.param(
            'positions', nn.initializers.normal(self.width**-0.5), (x.shape[1], self.width)
        )
        x = embed(x) + positions.astype(self.dtype)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        for index in range(self.depth):
            x = layers.EncoderBlock(
                self.heads,
                self.mlp_width,
                self.dropout,
                self.epsilon,
                approximate=True,
                dtype=self.dtype,
                implementation=self.implementation,
                name=f'block_{index}',
            )(x, train=train)
        x = nn.LayerNorm(self.epsilon, dtype=self.dtype, name='norm')(x)
        return AttentionPool(
            self.heads,
            self.mlp_width,
            self.epsilon,
            dtype=self.dtype,
            implementation=self.implementation,
            name='pool',
        )(x)
