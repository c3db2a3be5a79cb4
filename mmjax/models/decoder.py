"""The decoder language model (Llama and Qwen2 shaped), and its step by step form with a cache."""

import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmjax.models import layers

_normal = nn.initializers.normal


class Prefix(NamedTuple):
    """Keys and values of the given part, kept once a row however many beams continue it."""

    keys: tuple[jax.Array, ...]  # a block: [batch, kv_heads, prefix, head_size]
    values: tuple[jax.Array, ...]
    mask: jax.Array  # bool [batch, prefix]


class Suffix(NamedTuple):
    """Keys and values of what each beam has added; every leaf leads with [batch, beams]."""

    keys: tuple[jax.Array, ...]  # a block: [batch, beams, kv_heads, length, head_size]
    values: tuple[jax.Array, ...]


def rotary(positions: jax.Array, size: int, theta: float) -> jax.Array:
    """Returns the angles position · theta^(−2i / size), float32 [*positions, size // 2]."""
    frequencies = theta ** (-np.arange(0, size, 2) / size)
    return positions[..., None].astype(jnp.float32) * np.float32(frequencies)


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Turns x [..., heads, size] by `angles` [..., size // 2] (RoPE, Su 2021).

    Coordinate i turns with i + size / 2, as Llama's published weights want it, not with i + 1.
    """
    cos, sin = jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, -1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
    return turned.astype(x.dtype)


class DecoderBlock(nn.Module):
    """x + attention(RMSNorm x), then x + SwiGLU(RMSNorm x) (Touvron 2023), with grouped queries.

    Query head h reads key and value head h // (heads // kv_heads) (Ainslie 2023). Kernels start
    with deviation 0.02; `out` and `down`, which write into the residual stream, with
    0.02 · (2 · depth)^-½ (Radford 2019).
    """

    width: int
    heads: int
    kv_heads: int
    mlp_width: int
    depth: int
    qkv_bias: bool
    dropout: float = 0.0
    epsilon: float = 1e-6
    dtype: jnp.dtype = jnp.float32
    implementation: str = 'xla'

    def setup(self):
        dense = lambda features, bias=False, deviation=0.02: layers.Dense(
            features, use_bias=bias, dtype=self.dtype, kernel_init=_normal(deviation)
        )
        size, residual = self.width // self.heads, 0.02 / math.sqrt(2 * self.depth)
        self.norm_1 = nn.RMSNorm(self.epsilon, dtype=self.dtype)
        self.query = dense(self.heads * size, self.qkv_bias)
        self.key = dense(self.kv_heads * size, self.qkv_bias)
        self.value = dense(self.kv_heads * size, self.qkv_bias)
        self.out = dense(self.width, deviation=residual)
        self.norm_2 = nn.RMSNorm(self.epsilon, dtype=self.dtype)
        self.gate, self.up = dense(self.mlp_width), dense(self.mlp_width)
        self.down = dense(self.width, deviation=residual)
        self.drop = nn.Dropout(self.dropout)

    def __call__(
        self, x: jax.Array, angles: jax.Array, mask: jax.Array, *, train: bool
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Maps x [batch, length, width] to (the same shape, its keys, its values).

        `angles` [batch, length, head_size // 2]; `mask` as in `layers.attend`. Keys and values are
        [batch, length, kv_heads, head_size], the keys turned already.
        """
        query, key, value = self._project(x, angles)
        attended = layers.attend(query, key, value, mask, implementation=self.implementation)
        return self._finish(x, attended, train), key, value

    def step(
        self,
        x: jax.Array,
        angles: jax.Array,
        prefix: tuple[jax.Array, jax.Array, jax.Array],
        suffix: tuple[jax.Array, jax.Array],
        index: jax.Array,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """Adds one token a beam: x [batch, beams, width], at place `index` of the suffix.

        `prefix` is (keys, values, mask) and `suffix` (keys, values) of this block, shaped as in
        Prefix and Suffix. Returns (x, suffix).
        """
        query, key, value = self._project(x, angles)
        write = lambda cache, new: jax.lax.dynamic_update_index_in_dim(cache, new, index, 3)
        suffix = write(suffix[0], key), write(suffix[1], value)
        batch, beams, heads, size = query.shape
        query = query.reshape(batch, beams, self.kv_heads, heads // self.kv_heads, size)
        # The beams are further queries of the shared prefix: one product for all of them.
        dot = lambda equation, *xs: jnp.einsum(equation, *xs, preferred_element_type=jnp.float32)
        given = dot('bknqh,bnph->bknqp', query, prefix[0])
        added = dot('bknqh,bknsh->bknqs', query, suffix[0])
        seen = jnp.arange(added.shape[-1]) <= index
        logits = jnp.concatenate(
            [
                jnp.where(prefix[2][:, None, None, None], given, -jnp.inf),
                jnp.where(seen, added, -jnp.inf),
            ],
            -1,
        )
        weights = jax.nn.softmax(logits / math.sqrt(size)).astype(value.dtype)
        given, added = jnp.split(weights, [given.shape[-1]], -1)
        attended = dot('bknqp,bnph->bknqh', given, prefix[1])
        attended += dot('bknqs,bknsh->bknqh', added, suffix[1])
        return self._finish(x, attended.astype(value.dtype), False), suffix

    def _project(self, x: jax.Array, angles: jax.Array):
        y = self.norm_1(x)
        split = lambda y: y.reshape(*y.shape[:-1], -1, self.width // self.heads)
        query, key, value = (split(part(y)) for part in (self.query, self.key, self.value))
        return rotate(query, angles), rotate(key, angles), value

    def _finish(self, x: jax.Array, attended: jax.Array, train: bool) -> jax.Array:
        drop = lambda y: self.drop(y, deterministic=not train)
        x = x + drop(self.out(attended.reshape(x.shape)))
        y = self.norm_2(x)
        return x + drop(self.down(nn.silu(self.gate(y)) * self.up(y)))


class Decoder(nn.Module):
    """A causal transformer over embeddings: RMSNorm, rotary positions, grouped queries, SwiGLU.

    The defaults are the sizes of Qwen2.5-0.5B, with the vocabulary and the head of its own that
    InternVL2.5-1B gave it. Blocks are `block_0`, `block_1`, …; `words` [vocabulary, width] is the
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
    dtype: jnp.dtype = jnp.float32
    implementation: str = 'xla'

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
                self.width,
                self.heads,
                self.kv_heads,
                self.mlp_width,
                self.depth,
                self.qkv_bias,
                self.dropout,
                self.epsilon,
                self.dtype,
                self.implementation,
            )
            setattr(self, f'block_{index}', block)
        self.norm = nn.RMSNorm(self.epsilon, dtype=self.dtype)

    def __call__(self, embeddings: jax.Array, mask: jax.Array, *, train: bool) -> jax.Array:
        """Encodes embeddings; each sees itself and the real ones before it.

        Args:
          embeddings: [batch, length, width], of any mix of pictures and tokens.
          mask: [batch, length], true (or 1) on real ones. Padding may stand anywhere, so that
            parts padded each on its right can be joined: positions count the real ones.
          train: whether dropout acts (rng 'dropout').

        Returns:
          [batch, length, width], normalised for `logits`; finite, without meaning, on padding.
        """
        return self._encode(embeddings, mask, train)[0]

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Returns embeddings [..., width] of int tokens [...] in [0, vocabulary)."""
        # Rows are gathered in float32 and cast after: casting the table would touch all of it.
        return jnp.take(self.words, tokens, axis=0).astype(self.dtype)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Maps what the model returns, [..., width], to float32 logits [..., vocabulary]."""
        head = self.words.T if self.tied else self.head
        hidden, head = hidden.astype(self.dtype), head.astype(self.dtype)
        return jnp.dot(hidden, head, preferred_element_type=jnp.float32)

    def prefill(self, embeddings: jax.Array, mask: jax.Array) -> tuple[jax.Array, Prefix]:
        """Encodes what is given before generation; arguments as `__call__`.

        Returns:
          (the state of each row's last real embedding [batch, width], whose logits are those of
          the first token to generate; the cache). A row without a real one: finite, to be ignored.
        """
        hidden, keys, values = self._encode(embeddings, mask, False)
        last = jnp.where(mask.astype(bool), jnp.arange(mask.shape[1]), 0).max(1)
        # Heads before places: each step then multiplies the cache as it lies, without a copy.
        lay = lambda caches: tuple(x.swapaxes(1, 2) for x in caches)
        prefix = Prefix(lay(keys), lay(values), mask.astype(bool))
        return jnp.take_along_axis(hidden, last[:, None, None], 1)[:, 0], prefix

    def suffix(self, batch: int, beams: int, length: int) -> Suffix:
        """Returns an empty cache for `length` tokens a beam; it needs no parameters."""
        shape = (batch, beams, self.kv_heads, length, self.width // self.heads)
        empty = lambda: tuple(jnp.zeros(shape, self.dtype) for _ in range(self.depth))
        return Suffix(empty(), empty())

    def step(
        self, embeddings: jax.Array, prefix: Prefix, suffix: Suffix, index: jax.Array
    ) -> tuple[jax.Array, Suffix]:
        """Adds one token to every beam.

        Args:
          embeddings: [batch, beams, width], of the beams' newest tokens.
          prefix: of `prefill`, shared by the beams of a row.
          suffix: of the earlier steps, or an empty one.
          index: int [], how many tokens the suffix holds; below its length.

        Returns:
          (states [batch, beams, width], normalised for `logits`; the suffix with the token).
        """
        x = embeddings.astype(self.dtype)
        position = prefix.mask.sum(1, dtype=jnp.int32)[:, None] + index  # [batch, 1]
        angles = rotary(position, self.width // self.heads, self.theta)
        caches = []
        for number in range(self.depth):
            given = prefix.keys[number], prefix.values[number], prefix.mask
            added = suffix.keys[number], suffix.values[number]
            x, added = getattr(self, f'block_{number}').step(x, angles, given, added, index)
            caches.append(added)
        return self.norm(x), Suffix(*(tuple(part) for part in zip(*caches, strict=True)))

    def _encode(self, embeddings: jax.Array, mask: jax.Array, train: bool):
        if embeddings.shape != (*mask.shape, self.width):
            found = f'embeddings {embeddings.shape} and mask {mask.shape}'
            raise ValueError(f'{found} are not [batch, length, {self.width}] and [batch, length]')
        mask, length = mask.astype(bool), mask.shape[1]
        positions = jnp.maximum(jnp.cumsum(mask, 1) - 1, 0)
        angles = rotary(positions, self.width // self.heads, self.theta)
        causal = jnp.tril(jnp.ones((length, length), bool))
        seen = causal & mask[:, None, None, :]  # [batch, heads, queries, keys]
        x, keys, values = embeddings.astype(self.dtype), [], []
        run = lambda block, x: block(x, angles, seen, train=train)
        run = nn.remat(run) if self.remat else run
        for index in range(self.depth):
            x, key, value = run(getattr(self, f'block_{index}'), x)
            keys.append(key)
            values.append(value)
        return self.norm(x), keys, values


def qwen2_5_half_billion(**fields) -> Decoder:
    """Returns Qwen2.5-0.5B, as its family published it: tied, 494,032,768 parameters."""
    return Decoder(**{'vocabulary': 151936, 'tied': True, **fields})
