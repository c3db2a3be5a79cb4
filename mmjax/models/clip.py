"""CLIP: an image tower and a text tower that meet in one space, and their learned temperature."""

import functools
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, Shaped, UInt8

from mmjax.models import layers
from mmjax.models.layers import normalize_pixels, patches
from mmjax.models.modified_resnet import ModifiedResNet
from mmjax.typing import Array, DType

# Mean and standard deviation of pixels in 0-1 that CLIP was trained with.
CLIP_PIXELS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))

_normal = nn.initializers.normal
# PyTorch's default for a convolution, which CLIP leaves its patches with.
_patch_init = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')


def quick_gelu(x: Float[Array, '*shape']) -> Float[jax.Array, '*shape']:
    """Computes x · σ(1.702 x), the approximation of GELU in OpenAI's weights."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS = {'quick_gelu': quick_gelu, 'gelu': layers.gelu}


class ClipBlock(layers.AttentionLayer):
    """A pre-LN transformer block: x + attention(LN x), then x + MLP(LN x).

    Initialised as CLIP's text tower is (Radford 2021): standard deviations width^-½ for queries,
    keys and values, (2 · width)^-½ for `up`, and width^-½ · (2 · depth)^-½ for `out` and `down`,
    which write into the residual stream, so that its size at the top does not grow with `depth`.
    """

    heads: int
    mlp_width: int
    depth: int
    activation: str = 'quick_gelu'
    epsilon: float = 1e-5

    @nn.compact
    def __call__(
        self,
        x: Float[Array, 'batch length width'],
        mask: Bool[Array, '#batch #heads #queries keys'] | None = None,
    ) -> Float[jax.Array, 'batch length width']:
        """Computes the block; `mask` as in `layers.attend`."""
        width = x.shape[-1]
        inward = width**-0.5
        residual = (width * 2 * self.depth) ** -0.5
        norm = lambda name: nn.LayerNorm(self.epsilon, dtype=self.dtype, name=name)
        dense = lambda name, features, std: layers.Dense(
            features, dtype=self.dtype, kernel_init=_normal(std), name=name
        )
        y = norm('norm_1')(x)
        parts = [dense(name, width, inward)(y) for name in ('query', 'key', 'value')]
        y = layers.attend_heads(*parts, self.heads, mask, implementation=self.implementation)
        x = x + dense('out', width, residual)(y)
        y = dense('up', self.mlp_width, (2 * width) ** -0.5)(norm('norm_2')(x))
        return x + dense('down', width, residual)(ACTIVATIONS[self.activation](y))


class ClipVision(layers.AttentionLayer):
    """CLIP's vision transformer: a class token, a LayerNorm before the blocks, a projection.

    The defaults are the sizes of ViT-B/32. Blocks are `block_0`, `block_1`, …
    """

    image_size: int = 224
    patch_size: int = 32
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_width: int = 3072
    features: int = 512
    activation: str = 'quick_gelu'
    epsilon: float = 1e-5

    @nn.compact
    def __call__(
        self,
        images: Float[Array, 'batch size size 3'],
        mask: Bool[Array, ' batch'] | None = None,
        *,
        train: bool,
    ) -> Float[jax.Array, 'batch {self.features}']:
        """Embeds normalised images of `image_size`.

        `mask` and `train` change nothing: they are there so that both towers are called alike.
        """
        x = patches(images, self.image_size, self.patch_size).astype(self.dtype)
        x = layers.Dense(
            self.width,
            use_bias=False,
            dtype=self.dtype,
            kernel_init=_patch_init,
            name='patch_embedding',
        )(x)
        init = _normal(self.width**-0.5)
        token = self.param('class_token', init, (self.width,)).astype(self.dtype)
        positions = self.param('positions', init, (1 + x.shape[1], self.width))
        x = jnp.concatenate([jnp.broadcast_to(token, (len(x), 1, self.width)), x], 1)
        x = x + positions.astype(self.dtype)
        x = nn.LayerNorm(self.epsilon, dtype=self.dtype, name='norm_pre')(x)
        for index in range(self.depth):
            x = ClipBlock(
                self.heads,
                self.mlp_width,
                self.depth,
                self.activation,
                self.epsilon,
                dtype=self.dtype,
                implementation=self.implementation,
                name=f'block_{index}',
            )(x)
        x = nn.LayerNorm(self.epsilon, dtype=self.dtype, name='norm')(x[:, 0])
        return _project(x, self.features, self.dtype)


class ClipText(layers.AttentionLayer):
    """CLIP's text tower: a causal transformer, read where the text ends.

    The defaults are the sizes of ViT-B/32. Blocks are `block_0`, `block_1`, …
    """

    vocabulary: int = 49408
    max_length: int = 77
    width: int = 512
    depth: int = 12
    heads: int = 8
    mlp_width: int = 2048
    features: int = 512
    activation: str = 'quick_gelu'
    epsilon: float = 1e-5

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, 'batch length'],
        token_mask: Shaped[Array, 'batch length'],
        *,
        train: bool,
    ) -> Float[jax.Array, 'batch {self.features}']:
        """Embeds texts.

        The state read is that at the last True of `token_mask`. A text padded on the right ends
        in its end-of-text token, so this is the first of these in the row, the one CLIP reads,
        whether the padding repeats it or is 0. No position sees what comes after it, so padding
        has no influence. A text without tokens is read at position 0: finite, to be ignored.

        Args:
          tokens: in [0, vocabulary), length ≤ max_length.
          token_mask: true (or 1) on real tokens, the end-of-text token included.
          train: changes nothing; both towers are called alike.
        """
        length = tokens.shape[1]
        if length > self.max_length:
            raise ValueError(f'{length} tokens do not fit max_length {self.max_length}')
        # Rows are gathered in float32 and cast after: casting the table would touch all of it.
        words = nn.Embed(self.vocabulary, self.width, embedding_init=_normal(0.02), name='words')
        positions = self.param('positions', _normal(0.01), (self.max_length, self.width))
        x = (words(tokens) + positions[:length]).astype(self.dtype)
        causal = jnp.tril(jnp.ones((length, length), bool))[None, None]  # [batch, heads, q, keys]
        for index in range(self.depth):
            x = ClipBlock(
                self.heads,
                self.mlp_width,
                self.depth,
                self.activation,
                self.epsilon,
                dtype=self.dtype,
                implementation=self.implementation,
                name=f'block_{index}',
            )(x, causal)
        last = jnp.where(token_mask.astype(bool), jnp.arange(length), 0).max(1)
        x = jnp.take_along_axis(x, last[:, None, None], 1)[:, 0]
        x = nn.LayerNorm(self.epsilon, dtype=self.dtype, name='norm')(x)
        return _project(x, self.features, self.dtype)


def _project(x: Array, features: int, dtype: DType) -> jax.Array:
    init = _normal(x.shape[-1] ** -0.5)
    return layers.Dense(features, use_bias=False, dtype=dtype, kernel_init=init, name='projection')(
        x
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _at_most(x: jax.Array, limit: float) -> jax.Array:
    return jnp.minimum(x, limit)


_at_most.defvjp(
    lambda x, limit: (jnp.minimum(x, limit), x),
    lambda limit, x, gradient: (jnp.where((x >= limit) & (gradient < 0), 0.0, gradient),),
)


class Clip(nn.Module):
    """An image tower, a text tower, and `logit_scale`, the log of the inverse temperature.

    Embeddings come as the towers project them; the losses bring them to unit length.
    """

    vision: ClipVision | ModifiedResNet
    text: ClipText
    temperature: float = 0.07  # at the start
    max_scale: float = 100.0

    def setup(self):
        start = nn.initializers.constant(-math.log(self.temperature))
        self.logit_scale = self.param('logit_scale', start, ())

    def __call__(
        self,
        images: UInt8[Array, 'batch size size 3'],
        tokens: Int[Array, 'batch length'],
        token_mask: Shaped[Array, 'batch length'],
        train: bool = False,
    ) -> tuple[
        Float[jax.Array, 'batch features'], Float[jax.Array, 'batch features'], Float[jax.Array, '']
    ]:
        """Returns (image embeddings, text embeddings, scale); the way to initialise."""
        image = self.encode_image(images, None, train)
        return image, self.encode_text(tokens, token_mask, train), self.scale()

    def encode_image(
        self,
        images: UInt8[Array, 'batch size size 3'],
        mask: Bool[Array, ' batch'] | None,
        train: bool,
    ) -> Float[jax.Array, 'batch features']:
        """Embeds images.

        Args:
          images: of the tower's size.
          mask: False on rows that must stay out of batch statistics; None: all count.
          train: whether batch statistics are live; False for a frozen tower.

        Returns:
          float32 [batch, features], not normalised.
        """
        pixels = normalize_pixels(images, CLIP_PIXELS)
        return self.vision(pixels, mask, train=train).astype(jnp.float32)

    def encode_text(
        self,
        tokens: Int[Array, 'batch length'],
        token_mask: Shaped[Array, 'batch length'],
        train: bool,
    ) -> Float[jax.Array, 'batch features']:
        """Embeds texts as `ClipText`; returns float32, not normalised."""
        return self.text(tokens, token_mask, train=train).astype(jnp.float32)

    def scale(self) -> Float[jax.Array, '']:
        """Returns min(exp(logit_scale), max_scale), float32, what multiplies cosines.

        At or above max_scale only a gradient that lowers the scale passes: published weights lie
        there, and would never leave it under the gradient of a plain minimum.
        """
        return _at_most(jnp.exp(self.logit_scale), self.max_scale)


def build(
    vision: Mapping[str, Any],
    text: Mapping[str, Any],
    *,
    temperature: float = 0.07,
    max_scale: float = 100.0,
    dtype: DType = jnp.float32,
    implementation: str = 'xla',
) -> Clip:
    """Returns a Clip of its towers' fields, such as `pretrained.clip.fields` reads.

    `vision` with `stage_sizes` makes a ModifiedResNet, without it a ClipVision.
    """
    tower = ModifiedResNet if 'stage_sizes' in vision else ClipVision
    shared = {'dtype': dtype, 'implementation': implementation}
    return Clip(tower(**vision, **shared), ClipText(**text, **shared), temperature, max_scale)
