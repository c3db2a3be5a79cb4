"""The BERT encoder, which is RoBERTa's too, in the sizes of MiniLM-L6; masked mean pooling."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax.models import layers, packing


class BertBlock(nn.Module):
    """A post-LN transformer block: LN(x + attention x), then LN(x + MLP x)."""

    heads: int
    mlp_width: int
    dropout: float = 0.0
    epsilon: float = 1e-12
    dtype: jnp.dtype = jnp.float32
    implementation: str = 'xla'

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array | None,
        *,
        train: bool,
        places: packing.Places | None = None,
    ) -> jax.Array:
        """Maps x [batch, length, width], or packed [room, width] with `places`, to the same shape.

        `mask` is that of `layers.attend`.
        """
        norm = lambda name: nn.LayerNorm(self.epsilon, dtype=self.dtype, name=name)
        drop = nn.Dropout(self.dropout, deterministic=not train)
        attention = layers.Attention(self.heads, self.dtype, self.implementation, name='attention')
        x = norm('norm_1')(x + drop(attention(x, mask=mask, places=places)))
        mlp = layers.Mlp(self.mlp_width, dtype=self.dtype, name='mlp')
        return norm('norm_2')(x + drop(mlp(x)))


class Bert(nn.Module):
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
    dtype: jnp.dtype = jnp.float32
    implementation: str = 'xla'

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        mask: jax.Array,
        types: jax.Array | None = None,
        *,
        train: bool,
        room: float | None = None,
    ) -> jax.Array:
        """Encodes token ids.

        Args:
          tokens: int [batch, length], in [0, vocabulary).
          mask: [batch, length], true (or 1) on real tokens. Positions count from the row's start:
            padding belongs behind the tokens.
          types: int [batch, length], segment of each token; None: all 0.
          train: whether dropout acts (rng 'dropout').
          room: tokens a row, on average over a batch, that the blocks have room for. Batches that
            need no more are computed without their padding, others as they are; None or 0 for all.

        Returns:
          [batch, length, width]; finite, without meaning, where the mask is False.
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
        seen = mask.astype(bool)[:, None, None, :]  # [batch, heads, queries, keys]

        def encode(tokens, types, place, places=None):
            x = embed(self.vocabulary, 'words')(tokens) + embed(self.types, 'types')(types)
            x = x + embed(self.max_length, 'positions')(offset + place)
            x = nn.LayerNorm(self.epsilon, dtype=self.dtype, name='norm')(x)
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
            for index in range(self.depth):
                x = BertBlock(
                    self.heads,
                    self.mlp_width,
                    self.dropout,
                    self.epsilon,
                    self.dtype,
                    self.implementation,
                    name=f'block_{index}',
                )(x, seen, train=train, places=places)
            return x

        def plain(module, tokens, types):
            return encode(tokens, types, jnp.arange(length))

        def packed(module, tokens, types):
            places = packing.places(mask, rows)
            tokens, types = (x.reshape(-1)[places.order] for x in (tokens, types))
            return packing.unpack(encode(tokens, types, places.order % length, places), places)

        rows = packing.rows_for(mask, room)
        if rows == mask.size or self.is_initializing():
            return plain(self, tokens, types)
        # What a branch keeps for its gradient, the other fills with zeros: the rare one keeps none.
        fits, rare = mask.astype(bool).sum() <= rows, nn.remat(plain)
        return nn.cond(fits, packed, rare, self, tokens, types)


def masked_mean(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Averages x [batch, length, width] over the tokens that `mask` [batch, length] allows.

    Summed in float32; returns [batch, width] in x's dtype, zeros where a row allows no token.
    """
    allowed = mask.astype(bool)
    total = jnp.where(allowed[..., None], x.astype(jnp.float32), 0.0).sum(-2)
    count = jnp.maximum(allowed.sum(-1, keepdims=True, dtype=jnp.float32), 1.0)
    return (total / count).astype(x.dtype)
