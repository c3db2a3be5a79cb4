"""The decoder language model (Llama and Qwen2 shaped), and its step by step form with a cache."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from mmjax.models import layers
from mmjax.typing import Array

_normal = nn.initializers.normal


# Keys and values of each block; of a prefix one per row, of a suffix one per beam.
PrefixCache = tuple[
    Float[Array, 'batch kv_heads prefix size'], Float[Array, 'batch kv_heads prefix size']
]
SuffixCache = tuple[
    Float[Array, 'batch beams kv_heads length size'],
    Float[Array, 'batch beams kv_heads length size'],
]


class Prefix(NamedTuple):
    """The prompt, shared by the beams of a row: a cache per block, and which positions are real."""

    caches: tuple[PrefixCache, ...]
    mask: Bool[Array, 'batch prefix']


def rotary(
    positions: Int[Array, '*rows'], size: int, theta: float
) -> Float[jax.Array, '*rows {size}//2']:
    """Returns the angles position · theta^(−2i / size), float32."""
    frequencies = theta ** (-np.arange(0, size, 2) / size)
    return positions[..., None].astype(jnp.float32) * np.float32(frequencies)


def rotate(
    x: Float[Array, '*rows heads size'], angles: Float[Array, '*rows_or_1 half_size']
) -> Float[jax.Array, '*rows heads size']:
    """Turns x by `angles`, whose rows broadcast against x's (RoPE, Su 2021).

    Coordinate i turns with i + size / 2, as in Llama's published weights, not with i + 1.
    """
    cos, sin = jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, -1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
    return turned.astype(x.dtype)


def attend_step(
    query: Float[Array, 'batch beams heads size'],
    key: Float[Array, 'batch beams kv_heads size'],
    value: Float[Array, 'batch beams kv_heads size'],
    *,
    prefix: PrefixCache,
    mask: Bool[Array, 'batch prefix'],
    suffix: SuffixCache,
    index: int | Int[Array, ''],
) -> tuple[Float[jax.Array, 'batch beams heads size'], SuffixCache]:
    """Attends from the newest token of each beam to the prompt and to what the beam has added.

    Args:
      query, key, value: of the newest token, turned already.
      prefix, mask: the prompt's cache, and which of its positions are real.
      suffix: the beams' cache; the token is written to its position `index`.

    Returns:
      (the mean values, the suffix with the token).
    """
    write = lambda cache, new: jax.lax.dynamic_update_index_in_dim(cache, new, index, 3)
    suffix = write(suffix[0], key), write(suffix[1], value)
    batch, beams, heads, size = query.shape
    kv_heads = key.shape[2]
    grouped = query.reshape(batch, beams, kv_heads, heads // kv_heads, size)
    # The beams are further queries of the shared prefix: one product for all of them.
    dot = lambda equation, *xs: jnp.einsum(equation, *xs, preferred_element_type=jnp.float32)
    to_prefix = dot('bknqh,bnph->bknqp', grouped, prefix[0])
    to_suffix = dot('bknqh,bknsh->bknqs', grouped, suffix[0])
    written = jnp.arange(to_suffix.shape[-1]) <= index
    logits = jnp.concatenate(
        [
            jnp.where(mask[:, None, None, None], to_prefix, -jnp.inf),
            jnp.where(written, to_suffix, -jnp.inf),
        ],
        -1,
    )
    weights = jax.nn.softmax(logits / math.sqrt(size)).astype(value.dtype)
    to_prefix, to_suffix = jnp.split(weights, [to_prefix.shape[-1]], -1)
    attended = dot('bknqp,bnph->bknqh', to_prefix, prefix[1])
    attended += dot('bknqs,bknsh->bknqh', to_suffix, suffix[1])
    return attended.astype(value.dtype).reshape(query.shape), suffix


class DecoderBlock(layers.Layer):
    """x + attention(RMSNorm x), then x + SwiGLU(RMSNorm x) (Touvron 2023), with grouped queries.

    Query head h reads key and value head h // (heads // kv_heads) (Ainslie 2023). Kernels start
    with std 0.02; `out` and `down`, which write into the residual stream, with
    0.02 · (2 · depth)^-½ (Radford 2019).
    """

    heads: int
    kv_heads: int
    mlp_width: int
    depth: int
    qkv_bias: bool
    dropout: float = 0.0
    epsilon: float = 1e-6

    @nn.compact
    def __call__(
        self,
        x: Float[Array, '*rows width'],
        angles: Float[Array, '*rows_or_1 half_size'],
        attend: Callable,
        *,
        train: bool,
    ) -> tuple[Float[jax.Array, '*rows width'], Any]:
        """Computes the block.

        Args:
          angles: as in `rotate`.
          attend: maps (query, key, value), turned already, to (the mean values, a cache).

        Returns:
          (the block, the cache of `attend`).
        """
        width = x.shape[-1]
        size = width // self.heads
        residual = 0.02 / math.sqrt(2 * self.depth)
        norm = lambda name: nn.RMSNorm(self.epsilon, dtype=self.dtype, name=name)
        dense = lambda name, features, bias=False, std=0.02: layers.Dense(
            features, use_bias=bias, dtype=self.dtype, kernel_init=_normal(std), name=name
        )
        drop = nn.Dropout(self.dropout, deterministic=not train, name='drop')
        y = norm('norm_1')(x)
        heads = {'query': self.heads, 'key': self.kv_heads, 'value': self.kv_heads}
        query, key, value = (
            dense(name, count * size, self.qkv_bias)(y).reshape(*y.shape[:-1], count, size)
            for name, count in heads.items()
        )
        attended, cache = attend(rotate(query, angles), rotate(key, angles), value)
        x = x + drop(dense('out', width, std=residual)(attended.reshape(x.shape)))
        y = norm('norm_2')(x)
        y = nn.silu(dense('gate', self.mlp_width)(y)) * dense('up', self.mlp_width)(y)
        return x + drop(dense('down', width, std=residual)(y)), cache


class Decoder(layers.AttentionLayer):
    """A causal transformer over embeddings: RMSNorm, rotary positions, grouped queries, SwiGLU.

    The defaults are the sizes of Qwen2.5-0.5B, with the vocabulary and the separate head of
    InternVL2.5-1B. Blocks are `block_0`, `block_1`, …; `words` [vocabulary, width] is the
    table of embeddings, `head` [width, vocabulary] is absent when `tied`. `remat`: the backward
    pass computes a block's activations again instead of keeping them.
    """

    vocabulary: int = 151674
    width: int = 896
    depth: int = 24
    heads: int = 14
    kv_heads: int = 2
    mlp_width: int = 4864
    theta: float = 1e6
    qkv_bias: bool = True
    tied: bool = False
    dropout: float = 0.0
    epsilon: float = 1e-6
    remat: bool = False

    def setup(self):
        if self.width % self.heads:
            raise ValueError(f'width {self.width} is not a multiple of {self.heads} heads')
        if self.heads % self.kv_heads:
            raise ValueError(f'{self.heads} heads are not a multiple of {self.kv_heads} kv_heads')
        if self.width // self.heads % 2:
            raise ValueError(f'head size {self.width // self.heads} is odd: it cannot be turned')
        self.words = self.param('words', _normal(0.02), (self.vocabulary, self.width))
        if not self.tied:
            self.head = self.param('head', _normal(0.02), (self.width, self.vocabulary))
        for index in range(self.depth):
            block = DecoderBlock(
                self.heads,
                self.kv_heads,
                self.mlp_width,
                self.depth,
                self.qkv_bias,
                self.dropout,
                self.epsilon,
                dtype=self.dtype,
            )
            setattr(self, f'block_{index}', block)
        self.norm = nn.RMSNorm(self.epsilon, dtype=self.dtype)

    def __call__(
        self,
        embeddings: Float[Array, 'batch length width'],
        mask: Shaped[Array, 'batch length'],
        *,
        train: bool,
    ) -> Float[jax.Array, 'batch length width']:
        """Encodes embeddings; each attends to itself and to the real ones before it.

        Args:
          embeddings: of any mix of images and tokens.
          mask: true (or 1) on real ones. Padding may stand anywhere, so that parts padded each on
            its right can be joined: positions count the real ones.
          train: whether dropout acts (rng 'dropout').

        Returns:
          States, normalised for `logits`; finite, without meaning, on padding.
        """
        return self._encode(embeddings, mask, train)[0]

    def embed(self, tokens: Int[Array, '*rows']) -> Float[jax.Array, '*rows {self.width}']:
        """Returns the embeddings of tokens in [0, vocabulary)."""
        # Rows are gathered in float32 and cast after: casting the table would touch all of it.
        return jnp.take(self.words, tokens, axis=0).astype(self.dtype)

    def logits(
        self, hidden: Float[Array, '*rows width']
    ) -> Float[jax.Array, '*rows {self.vocabulary}']:
        """Maps the states that the model returns to float32 logits."""
        head = self.words.T if self.tied else self.head
        hidden, head = hidden.astype(self.dtype), head.astype(self.dtype)
        return jnp.dot(hidden, head, preferred_element_type=jnp.float32)

    def prefill(
        self, embeddings: Float[Array, 'batch length width'], mask: Shaped[Array, 'batch length']
    ) -> tuple[Float[jax.Array, 'batch width'], Prefix]:
        """Encodes the prompt; arguments as `__call__`.

        Returns:
          (the state of each row's last real embedding, whose logits are those of the first token
          to generate; the cache). A row without a real one: finite, to be ignored.
        """
        hidden, caches = self._encode(embeddings, mask, False)
        last = jnp.where(mask.astype(bool), jnp.arange(mask.shape[1]), 0).max(1)
        # Heads before positions: each step then multiplies the cache without a copy.
        caches = jax.tree.map(lambda x: x.swapaxes(1, 2), caches)
        prefix = Prefix(caches, mask.astype(bool))
        return jnp.take_along_axis(hidden, last[:, None, None], 1)[:, 0], prefix

    def suffix(self, batch: int, beams: int, length: int) -> tuple[SuffixCache, ...]:
        """Returns an empty cache per block for `length` tokens per beam; it needs no parameters."""
        shape = (batch, beams, self.kv_heads, length, self.width // self.heads)
        empty = lambda: jnp.zeros(shape, self.dtype)
        return tuple((empty(), empty()) for _ in range(self.depth))

    def step(
        self,
        embeddings: Float[Array, 'batch beams width'],
        prefix: Prefix,
        suffix: tuple[SuffixCache, ...],
        index: int | Int[Array, ''],
    ) -> tuple[Float[jax.Array, 'batch beams width'], tuple[SuffixCache, ...]]:
        """Adds one token to every beam.

        Args:
          embeddings: of the beams' newest tokens.
          prefix: of `prefill`, shared by the beams of a row.
          suffix: of the earlier steps, or an empty one.
          index: how many tokens the suffix holds; below its length.

        Returns:
          (states, normalised for `logits`; the suffix with the token).
        """
        x = embeddings.astype(self.dtype)
        position = prefix.mask.sum(1, dtype=jnp.int32)[:, None] + index  # [batch, 1]
        angles = rotary(position, self.width // self.heads, self.theta)
        caches = []
        for number, (prompt, cache) in enumerate(zip(prefix.caches, suffix, strict=True)):
            attend = functools.partial(
                attend_step, prefix=prompt, mask=prefix.mask, suffix=cache, index=index
            )
            x, cache = getattr(self, f'block_{number}')(x, angles, attend, train=False)
            caches.append(cache)
        return self.norm(x), tuple(caches)

    def _encode(self, embeddings, mask, train):
        if embeddings.shape != (*mask.shape, self.width):
            shapes = f'embeddings {embeddings.shape} and mask {mask.shape}'
            raise ValueError(f'{shapes} are not [batch, length, {self.width}] and [batch, length]')
        mask = mask.astype(bool)
        length = mask.shape[1]
        positions = jnp.maximum(jnp.cumsum(mask, 1) - 1, 0)
        angles = rotary(positions, self.width // self.heads, self.theta)
        causal = jnp.tril(jnp.ones((length, length), bool))
        visible = causal & mask[:, None, None, :]  # [batch, heads, queries, keys]
        x = embeddings.astype(self.dtype)
        caches = []
        attend = lambda query, key, value: (
            layers.attend(query, key, value, visible, implementation=self.implementation),
            (key, value),
        )
        run = lambda block, x: block(x, angles, attend, train=train)
        run = nn.remat(run) if self.remat else run
        for index in range(self.depth):
            x, cache = run(getattr(self, f'block_{index}'), x)
            caches.append(cache)
        return self.norm(x), tuple(caches)
