"""The receipts model: a classification head counts, a decoder that sees the image answers.

The decoder's prefix is the image's tokens, then the question's embeddings plus what cross-attention
to the image adds to them, so that the loss of the answer trains the cross-attention too.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax.engine.task import tower_output
from mmjax.models import layers
from mmjax.models.decoder import Decoder
from mmjax.models.internvit import InternViT, shuffle_pixels

# Mean and standard deviation of pixels in 0-1, as InternViT was trained with.
PIXELS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class CrossAttention(layers.Layer):
    """Attention of question tokens to image tokens."""

    heads: int = 8
    dropout: float = 0.1

    @nn.compact
    def __call__(
        self, question: jax.Array, image: jax.Array, *, train: bool
    ) -> tuple[jax.Array, jax.Array]:
        """Attends from question [batch, q, width] to image [batch, n, width].

        Returns:
          ([batch, q, width], weights float32 [batch, heads, q, n] that sum to 1 over n, without
          dropout).
        """
        width = question.shape[-1]
        norm = lambda name: nn.LayerNorm(dtype=self.dtype, name=name)
        project = lambda name, x: layers.Dense(width, dtype=self.dtype, name=name)(x)
        split = lambda x: x.reshape(*x.shape[:-1], self.heads, width // self.heads)
        image = norm('picture_norm')(image)
        query = split(project('query', norm('question_norm')(question)))
        key = split(project('key', image))
        value = split(project('value', image))
        scores = jnp.einsum('bqhd,bnhd->bhqn', query, key, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores / jnp.sqrt(jnp.float32(query.shape[-1])))
        dropped = nn.Dropout(self.dropout, deterministic=not train)(weights).astype(self.dtype)
        values = jnp.einsum('bhqn,bnhd->bqhd', dropped, value)
        return project('out', values.reshape(question.shape)), weights


class Classifier(layers.Layer):
    """Linear, BatchNorm, GELU, dropout, twice, and a linear layer to the classes."""

    classes: int = 3
    widths: tuple[int, ...] = (512, 256)
    dropouts: tuple[float, ...] = (0.2, 0.1)

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, *, train: bool) -> jax.Array:
        """Maps x [batch, width] to float32 logits [batch, classes]; `mask` [batch], real rows."""
        for index, (width, dropout) in enumerate(zip(self.widths, self.dropouts, strict=True)):
            x = layers.Dense(width, dtype=self.dtype, name=f'linear_{index}')(x)
            x = layers.MaskedBatchNorm(dtype=self.dtype, name=f'norm_{index}')(x, mask, train=train)
            x = nn.Dropout(dropout, deterministic=not train)(layers.gelu(x))
        return layers.Dense(self.classes, name='out')(x.astype(jnp.float32))


class ReceiptsModel(layers.Layer):
    """Vision tower, projector, decoder, cross-attention and classification head.

    Parameters: `vision`, `projector_norm`, `projector_up`, `projector_down`, `language`,
    `cross_attention`, `classifier`. `shuffle` joins shuffle² image tokens to one.
    """

    vision: InternViT
    language: Decoder
    classes: int = 3
    shuffle: int = 2
    cross_heads: int = 8
    cross_dropout: float = 0.1

    def setup(self):
        width = self.language.width
        self.projector_norm = nn.LayerNorm(dtype=self.dtype)
        self.projector_up = layers.Dense(width, dtype=self.dtype)
        self.projector_down = layers.Dense(width, dtype=self.dtype)
        self.cross_attention = CrossAttention(
            self.cross_heads, self.cross_dropout, dtype=self.dtype
        )
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
        image = self.encode(images, train=False)
        prefix, prefix_mask, _ = self.prefix(image, question, question_mask, train=False)
        logits = self.answer(prefix, prefix_mask, answer, answer_mask, train=False)
        return self.classify(image, mask, train=False), logits

    def encode(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Maps uint8 images [batch, size, size, 3] to image tokens [batch, n, width].

        Args:
          train: whether the vision tower trains.
        """
        x = self.vision(layers.normalize_pixels(images, PIXELS), train=train)
        x = shuffle_pixels(tower_output(x, train), self.shuffle)
        return self.projector_down(layers.gelu(self.projector_up(self.projector_norm(x))))

    def classify(self, image: jax.Array, mask: jax.Array | None, *, train: bool) -> jax.Array:
        """Maps image tokens to float32 logits [batch, classes]; `mask` [batch], real rows."""
        return self.classifier(image.mean(1), mask, train=train)

    def prefix(
        self, image: jax.Array, question: jax.Array, question_mask: jax.Array, *, train: bool
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Makes the decoder's prefix.

        Args:
          image: [batch, n, width], of `encode`.
          question: int [batch, q]; question_mask: bool [batch, q].
          train: whether the cross-attention trains.

        Returns:
          embeddings [batch, n + q, width], mask bool [batch, n + q], and the cross-attention's
          weights float32 [batch, heads, q, n].
        """
        words = self.language.embed(question)
        update, weights = self.cross_attention(words, image, train=train)
        embeddings = jnp.concatenate([image.astype(words.dtype), words + update], 1)
        image_mask = jnp.ones(image.shape[:2], bool)
        return embeddings, jnp.concatenate([image_mask, question_mask], 1), weights

    def answer(
        self,
        prefix: jax.Array,
        prefix_mask: jax.Array,
        tokens: jax.Array,
        mask: jax.Array,
        *,
        train: bool,
    ) -> jax.Array:
        """Reads an answer after a prefix: float32 logits [batch, length, vocabulary].

        Those of token i predict token i + 1; `tokens` begin with the token that opens an answer.

        Args:
          prefix, prefix_mask: of `prefix`.
          tokens: int [batch, length]; mask: bool [batch, length].
          train: whether the decoder trains.
        """
        embeddings = jnp.concatenate([prefix, self.language.embed(tokens)], 1)
        hidden = self.language(embeddings, jnp.concatenate([prefix_mask, mask], 1), train=train)
        return self.language.logits(hidden[:, prefix.shape[1] :])

    def prefill(self, prefix: jax.Array, prefix_mask: jax.Array, opening: jax.Array):
        """Fills the cache with prefix and opening token: (logits [batch, vocabulary], cache)."""
        first = self.language.embed(opening)[:, None]
        first_mask = jnp.ones((len(opening), 1), bool)
        hidden, cache = self.language.prefill(
            jnp.concatenate([prefix, first], 1), jnp.concatenate([prefix_mask, first_mask], 1)
        )
        return self.language.logits(hidden), cache

    def step(self, cache, suffix, tokens: jax.Array, index: jax.Array):
        """Adds one token per beam: (logits [batch, beams, vocabulary], suffix)."""
        hidden, suffix = self.language.step(self.language.embed(tokens), cache, suffix, index)
        return self.language.logits(hidden), suffix
