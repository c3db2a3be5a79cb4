"""The BERT encoder, which is RoBERTa's too, in the sizes of MiniLM-L6; masked mean pooling."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float, Int, Shaped

from mmjax.models import layers, packing
from mmjax.typing import Array


class Bert(layers.AttentionLayer):
    """BERT (Devlin 2018) without its pooler: words + positions + types, then post-LN blocks.

    The defaults are MiniLM-L6 (Wang 2020): 22,565,376 parameters. Dropout acts on the embeddings
    and on the output of each half block, not on attention weights. Blocks are `block_0`, …

    RoBERTa (Liu 2019) differs in its sizes and in where positions start: its table of `max_length`
    rows keeps the first `position_offset` (the id of its padding token + 1) from all real tokens.
    """

    vocabulary: int = 30522
    width: int = 384
    depth: int = 6
    heads: int = 12
    mlp_width: int = 1536
    max_length: int = 512
    types: int = 2
    position_offset: int = 0
    dropout: float = 0.1
    epsilon: float = 1e-12

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, 'batch length'],
        mask: Shaped[Array, 'batch length'],
        types: Int[Array, 'batch length'] | None = None,
        *,
        train: bool,
        packed_length: float | None = None,
    ) -> Float[jax.Array, 'batch length {self.width}']:
        """Encodes token ids.

        Args:
          tokens: in [0, vocabulary).
          mask: true (or 1) on real tokens. Positions count from the row's start: padding belongs
            behind the tokens.
          types: segment of each token; None: all 0.
          train: whether dropout acts (rng 'dropout').
          packed_length: mean number of tokens per row of a packed batch. Batches with no more are
            computed without their padding, others as they are; None or 0: all as they are.

        Returns:
          States; finite, without meaning, where the mask is False.
        """
        length = tokens.shape[1]
        offset = self.position_offset
        if length > self.max_length - offset:
            raise ValueError(
                f'{length} tokens do not fit max_length {self.max_length}'
                + (f' with position_offset {offset}' if offset else '')
            )
        # Rows are gathered in float32 and cast after: casting the table would touch all of it.
        embed = lambda count, name: nn.Embed(
            count, self.width, embedding_init=nn.initializers.normal(0.02), name=name
        )
        types = jnp.zeros_like(tokens) if types is None else types
        visible = mask.astype(bool)[:, None, None, :]  # [batch, heads, queries, keys]

        def encode(tokens, types, positions, indices=None):
            x = embed(self.vocabulary, 'words')(tokens) + embed(self.types, 'types')(types)
            x = x + embed(self.max_length, 'positions')(offset + positions)
            x = nn.LayerNorm(self.epsilon, dtype=self.dtype, name='norm')(x)
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
            for index in range(self.depth):
                x = layers.EncoderBlock(
                    self.heads,
                    self.mlp_width,
                    self.dropout,
                    self.epsilon,
                    post_norm=True,
                    dtype=self.dtype,
                    implementation=self.implementation,
                    name=f'block_{index}',
                )(x, visible, train=train, indices=indices)
            return x

        def plain(module, tokens, types):
            return encode(tokens, types, jnp.arange(length))

        def packed(module, tokens, types):
            indices = packing.pack_indices(mask, rows)
            tokens, types = (x.reshape(-1)[indices.order] for x in (tokens, types))
            states = encode(tokens, types, indices.order % length, indices)
            return packing.unpack(states, indices)

        rows = packing.packed_rows(mask, packed_length)
        if rows == mask.size or self.is_initializing():
            return plain(self, tokens, types)
        # Each branch fills the residuals of the other with zeros: the rare one has none.
        fits = mask.astype(bool).sum() <= rows
        return nn.cond(fits, packed, nn.remat(plain), self, tokens, types)


def masked_mean(
    x: Float[Array, 'batch length width'], mask: Shaped[Array, 'batch length']
) -> Float[jax.Array, 'batch width']:
    """Averages x over the tokens that `mask` allows.

    Summed in float32; returns x's dtype, zeros where a row allows no token.
    """
    allowed = mask.astype(bool)
    total = jnp.where(allowed[..., None], x.astype(jnp.float32), 0.0).sum(-2)
    count = jnp.maximum(allowed.sum(-1, keepdims=True, dtype=jnp.float32), 1.0)
    return (total / count).astype(x.dtype)
