"""The receipts model: counts by a classification head, answers by a decoder that sees the picture.

The decoder's prefix is the picture's tokens, then the question's embeddings plus what they find in
the picture by cross-attention, so that the loss of the answer trains the cross-attention too.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mmjax.models import layers
from mmjax.models.decoder import Decoder
from mmjax.models.internvit import InternViT, shuffle_pixels

# Mean and deviation of pixels in 0-1, as InternViT was trained with.
PIXELS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class CrossAttention(nn.Module):
    """Question tokens attend to picture tokens; returns what they find and where they looked."""

    heads: int = 8
    dropout: float = 0.1
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, question: jax.Array, picture: jax.Array, *, train: bool
    ) -> tuple[jax.Array, jax.Array]:
        """Maps question [batch, q, width] and picture [batch, n, width] to what was found.

        Returns:
          ([batch, q, width], weights float32 [batch, heads, q, n] that sum to 1 over n, without
          dropout).
        """
        width = question.shape[-1]
        if width % self.heads:
            raise ValueError(f'width {width} is not a multiple of {self.heads} heads')
        norm = lambda name: nn.LayerNorm(dtype=self.dtype, name=name)
        project = lambda name, x: layers.Dense(width, dtype=self.dtype, name=name)(x)
        split = lambda x: x.reshape(*x.shape[:-1], self.heads, width // self.heads)
        seen = norm('picture_norm')(picture)
        query = split(project('query', norm('question_norm')(question)))
        key, value = split(project('key', seen)), split(project('value', seen))
        scores = jnp.einsum('bqhd,bnhd->bhqn', query, key, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores / jnp.sqrt(jnp.float32(query.shape[-1])))
        dropped = nn.Dropout(self.dropout, deterministic=not train)(weights).astype(self.dtype)
        found = jnp.einsum('bhqn,bnhd->bqhd', dropped, value)
        return project('out', found.reshape(question.shape)), weights


class Classifier(nn.Module):
    """Linear, BatchNorm, GELU, dropout, twice, and a linear layer to the classes."""

    classes: int = 3
    widths: tuple[int, ...] = (512, 256)
    dropouts: tuple[float, ...] = (0.2, 0.1)
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, *, train: bool) -> jax.Array:
        """Maps x [batch, width] to float32 logits [batch, classes]; `mask` [batch], real rows."""
        for index, (width, dropout) in enumerate(zip(self.widths, self.dropouts, strict=True)):
            x = layers.Dense(width, dtype=self.dtype, name=f'linear_{index}')(x)
            x = layers.MaskedBatchNorm(dtype=self.dtype, name=f'norm_{index}')(x, mask, train=train)
            x = nn.Dropout(dropout, deterministic=not train)(nn.gelu(x))
        return layers.Dense(self.classes, name='out')(x.astype(jnp.float32))


class Receipts(nn.Module):
    """Vision tower, projector, decoder, cross-attention and classification head.

    Parameters: `vision`, `projector_norm`, `projector_up`, `projector_down`, `language`,
    `cross_attention`, `classifier`. `shuffle` joins shuffle² picture tokens to one.
    """

    vision: InternViT
    language: Decoder
    classes: int = 3
    shuffle: int = 2
    cross_heads: int = 8
    cross_dropout: float = 0.1
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        width = self.language.width
        self.projector_norm = nn.LayerNorm(dtype=self.dtype)
        self.projector_up = layers.Dense(width, dtype=self.dtype)
        self.projector_down = layers.Dense(width, dtype=self.dtype)
        self.cross_attention = CrossAttention(self.cross_heads, self.cross_dropout, self.dtype)
        self.classifier = Classifier(self.classes, dtype=self.dtype)

    def __call__(
        self,
        images: jax.Array,
        mask: jax.Array,
        question: jax.Array,
        question_mask: jax.Array,
        answer: jax.Array,
        answer_mask: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """Runs every part once, for initialisation: (class logits, answer logits)."""
        picture = self.see(images, train=False)
        asked = self.ask(picture, question, question_mask, train=False)[:2]
        hidden = self.answer(*asked, answer, answer_mask, train=False)
        return self.classify(picture, mask, train=False), self.language.logits(hidden)

    def see(self, images: jax.Array, *, train: bool, frozen: bool = False) -> jax.Array:
        """Maps uint8 images [batch, size, size, 3] to picture tokens [batch, n, width].

        `frozen`: the tower's output is kept, not computed again, where rows are rematerialised.
        """
        x = self.vision(layers.normalize_pixels(images, PIXELS), train=train)
        if frozen:
            x = checkpoint_name(x, 'frozen')
        x = shuffle_pixels(x, self.shuffle)
        return self.projector_down(nn.gelu(self.projector_up(self.projector_norm(x))))

    def classify(self, picture: jax.Array, mask: jax.Array | None, *, train: bool) -> jax.Array:
        """Maps picture tokens to float32 logits [batch, classes]; `mask` [batch], real rows."""
        return self.classifier(picture.mean(1), mask, train=train)

    def ask(
        self, picture: jax.Array, question: jax.Array, question_mask: jax.Array, *, train: bool
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Makes the decoder's prefix.

        Args:
          picture: [batch, n, width], of `see`.
          question: int [batch, q]; question_mask: bool [batch, q].

        Returns:
          embeddings [batch, n + q, width], mask bool [batch, n + q], and the cross-attention's
          weights float32 [batch, heads, q, n].
        """
        words = self.language.embed(question)
        found, weights = self.cross_attention(words, picture, train=train)
        embeddings = jnp.concatenate([picture.astype(words.dtype), words + found], 1)
        seen = jnp.ones(picture.shape[:2], bool)
        return embeddings, jnp.concatenate([seen, question_mask], 1), weights

    def answer(
        self,
        prefix: jax.Array,
        prefix_mask: jax.Array,
        tokens: jax.Array,
        mask: jax.Array,
        *,
        train: bool,
    ) -> jax.Array:
        """Reads an answer after a prefix: hidden states [batch, length, width] of its tokens.

        Those of token i are what token i + 1 is predicted from; `tokens` begin with the token that
        opens an answer.
        """
        embeddings = jnp.concatenate([prefix, self.language.embed(tokens)], 1)
        hidden = self.language(embeddings, jnp.concatenate([prefix_mask, mask], 1), train=train)
        return hidden[:, prefix.shape[1] :]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Maps hidden states [..., width] to float32 logits [..., vocabulary]."""
        return self.language.logits(hidden)

    def begin(self, prefix: jax.Array, prefix_mask: jax.Array, opening: jax.Array):
        """Fills the cache with prefix and opening token: (logits [batch, vocabulary], cache)."""
        first = self.language.embed(opening)[:, None]
        seen = jnp.ones((len(opening), 1), bool)
        hidden, cache = self.language.prefill(
            jnp.concatenate([prefix, first], 1), jnp.concatenate([prefix_mask, seen], 1)
        )
        return self.language.logits(hidden), cache

    def suffix(self, batch: int, beams: int, length: int):
        """Returns an empty cache for generation, as `Decoder.suffix`."""
        return self.language.suffix(batch, beams, length)

    def step(self, cache, suffix, tokens: jax.Array, index: jax.Array):
        """Adds one token a beam: (logits [batch, beams, vocabulary], suffix)."""
        hidden, suffix = self.language.step(self.language.embed(tokens), cache, suffix, index)
        return self.language.logits(hidden), suffix
