"""The comic model: one embedding per panel from its image, its text and its place on the page."""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax.engine.task import tower_output
from mmjax.models.bert import Bert, masked_mean
from mmjax.models.layers import Dense, MaskedBatchNorm, normalize_pixels
from mmjax.models.resnet import ResNet
from mmjax.models.vit import ViT
from mmjax.recipes.comic.config import FUSIONS

TOWERS = (
    'siglip',
    'resnet',
    'bert',
    'vision_head',
    'text_head',
    'composition',
    'fusion',
    'reconstruction',
)
EVALUATION = dict.fromkeys(TOWERS, False)
# Mean and standard deviation of pixels in 0-1, as each backbone was trained with.
SIGLIP_PIXELS = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGENET_PIXELS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Projector(nn.Module):
    """Linear to `hidden`, LayerNorm, GELU, dropout, linear to `features`."""

    hidden: int
    features: int
    dropout: float
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        x = Dense(self.hidden, dtype=self.dtype, name='hidden')(x)
        x = nn.LayerNorm(1e-5, dtype=self.dtype, name='norm')(x)
        x = nn.Dropout(self.dropout, deterministic=not train)(nn.gelu(x, approximate=False))
        return Dense(self.features, dtype=self.dtype, name='out')(x)


class VisionHead(nn.Module):
    """Projects the pooled output of each visual backbone, and fuses two.

    `fusion`: 'attention' weighs them by a softmax of Linear(2D → 2), 'gate' by one of
    Linear(2D → D), GELU, Linear(2); 'concat' projects both together, Linear(2D → D).
    """

    features: int = 512
    siglip_hidden: int = 384
    resnet_hidden: int = 1024
    fusion: str = 'attention'
    dropout: float = 0.1
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, siglip: jax.Array | None, resnet: jax.Array | None, *, train: bool
    ) -> jax.Array:
        """Maps pooled outputs [rows, width], one of which may be None, to [rows, features]."""
        if self.fusion not in FUSIONS:
            raise ValueError(f"fusion '{self.fusion}' is not one of {', '.join(FUSIONS)}")
        views = []
        for name, pooled, hidden in (
            ('siglip_projector', siglip, self.siglip_hidden),
            ('resnet_projector', resnet, self.resnet_hidden),
        ):
            if pooled is not None:
                project = Projector(hidden, self.features, self.dropout, self.dtype, name=name)
                views.append(project(pooled, train=train))
        if len(views) == 1:
            return views[0]
        both = jnp.concatenate(views, -1)  # [rows, 2 features]
        dense = lambda features, name: Dense(features, dtype=self.dtype, name=name)
        if self.fusion == 'concat':
            return dense(self.features, 'concat')(both)
        if self.fusion == 'gate':
            both = nn.gelu(dense(self.features, 'gate_hidden')(both), approximate=False)
        logits = dense(2, self.fusion)(both).astype(jnp.float32)
        weights = jax.nn.softmax(logits).astype(self.dtype)  # [rows, 2]
        return weights[:, :1] * views[0] + weights[:, 1:] * views[1]


class CompositionEncoder(nn.Module):
    """Two times linear, batch norm, ReLU and dropout, then linear to `features`."""

    hidden: int = 256
    features: int = 512
    dropout: float = 0.1
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, *, train: bool) -> jax.Array:
        """Maps x [rows, 7] to [rows, features]; statistics over the rows that `mask` allows."""
        for index in range(2):
            x = Dense(self.hidden, dtype=self.dtype, name=f'hidden_{index}')(x)
            x = MaskedBatchNorm(dtype=self.dtype, name=f'norm_{index}')(x, mask, train=train)
            x = nn.Dropout(self.dropout, deterministic=not train)(nn.relu(x))
        return Dense(self.features, dtype=self.dtype, name='out')(x)


class AdaptiveFusion(nn.Module):
    """Weighs the modalities that a panel has: Σ g·x + ρ · mean of the present x.

    x are the layer-normed modalities, 0 where absent; g = softmax of a gate that sees them all
    and the mask, absent ones at −1e4; ρ is learnt and starts at 0.1. A row that has no modality
    gives zeros.

    With `projection`, its width, each modality goes through a linear layer before its norm. The
    alignment loss makes a panel's image and text equal, so that what only one of them tells has
    no place in their common space; the layers lead out of it.

    `floor` is the fraction of the weight that the present modalities share evenly. Without it the
    gate may shut a modality that learns slowly, which then gets no gradient and stays shut.
    """

    hidden: int = 512
    projection: int | None = None
    floor: float = 0.0
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        norm = lambda: nn.LayerNorm(1e-5, dtype=self.dtype)
        self.vision_norm = norm()
        self.text_norm = norm()
        self.composition_norm = norm()
        if self.projection:
            projection = lambda: Dense(self.projection, dtype=self.dtype)
            self.vision_projection = projection()
            self.text_projection = projection()
            self.composition_projection = projection()
        self.gate_hidden = Dense(self.hidden, dtype=self.dtype)
        # From zeros all modalities weigh the same at first: a random gate soon shuts all but the
        # one that learns fastest, and those it shuts get no gradient.
        self.gate = Dense(3, dtype=self.dtype, kernel_init=nn.initializers.zeros)
        self.residual = self.param('residual', nn.initializers.constant(0.1), ())

    def __call__(
        self, modalities: tuple[jax.Array, ...], present: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Fuses three arrays [rows, D] under `present` bool [rows, 3]; returns as `weigh`."""
        return self.weigh(self.normalize(modalities, present), present)

    def normalize(self, modalities: tuple[jax.Array, ...], present: jax.Array) -> jax.Array:
        """Returns the layer-normed modalities [rows, 3, D], 0 where absent.

        Each has the direction of the fused embedding of a panel with this modality alone.
        """
        if self.projection:
            layers = (self.vision_projection, self.text_projection, self.composition_projection)
            modalities = tuple(layer(x) for layer, x in zip(layers, modalities, strict=True))
        norms = (self.vision_norm, self.text_norm, self.composition_norm)
        normed = [norm(x) for norm, x in zip(norms, modalities, strict=True)]
        return jnp.where(present[..., None], jnp.stack(normed, -2), 0)

    def weigh(self, x: jax.Array, present: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Fuses layer-normed modalities [rows, 3, D].

        Returns:
          (fused float32 [rows, D], gates float32 [rows, 3], 0 on absent modalities).
        """
        x = jnp.where(present[..., None], x, 0)
        seen = jnp.concatenate([x.reshape(x.shape[0], -1), present.astype(x.dtype)], -1)
        gate = self.gate(nn.gelu(self.gate_hidden(seen), approximate=False))
        gates = jax.nn.softmax(jnp.where(present, gate.astype(jnp.float32), -1e4))
        count = jnp.maximum(present.sum(-1, keepdims=True, dtype=jnp.float32), 1.0)
        gates = jnp.where(present, self.floor / count + (1 - self.floor) * gates, 0.0)
        weights = gates + self.residual / count  # [rows, 3]; x is 0 where absent
        return jnp.einsum('rm,rmd->rd', weights, x.astype(jnp.float32)), gates


class ReconstructionHead(nn.Module):
    """Linear to `hidden`, GELU, dropout, linear back: predicts a hidden panel's embedding."""

    hidden: int = 1024
    dropout: float = 0.1
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps x [rows, D] to float32 [rows, D]."""
        y = Dense(self.hidden, dtype=self.dtype, name='hidden')(x)
        y = nn.Dropout(self.dropout, deterministic=not train)(nn.gelu(y, approximate=False))
        return Dense(x.shape[-1], dtype=self.dtype, name='out')(y).astype(jnp.float32)


class ComicModel(nn.Module):
    """Towers, fusion and reconstruction head of the comic recipe.

    The backbones are given as modules and own the subtrees `siglip`, `resnet` and `bert`; leave
    out `siglip` or `resnet` for a single visual backbone. The rest: `vision_head`, `text_head`,
    `composition`, `fusion`, `reconstruction`. The default widths are the published ones.
    """

    siglip: ViT | None
    resnet: ResNet | None
    bert: Bert
    features: int = 512
    siglip_hidden: int = 384
    resnet_hidden: int = 1024
    composition_hidden: int = 256
    gate_hidden: int = 512
    fusion_projection: bool = False
    gate_floor: float = 0.0
    reconstruction_hidden: int = 1024
    visual_fusion: str = 'attention'
    dropout: float = 0.1
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        if self.siglip is None and self.resnet is None:
            raise ValueError('ComicModel needs a visual backbone: siglip, resnet or both')
        self.vision_head = VisionHead(
            self.features,
            self.siglip_hidden,
            self.resnet_hidden,
            self.visual_fusion,
            self.dropout,
            self.dtype,
        )
        self.text_head = Dense(self.features, dtype=self.dtype)
        self.composition = CompositionEncoder(
            self.composition_hidden, self.features, self.dropout, self.dtype
        )
        self.fusion = AdaptiveFusion(
            self.gate_hidden,
            self.features if self.fusion_projection else None,
            self.gate_floor,
            self.dtype,
        )
        self.reconstruction = ReconstructionHead(
            self.reconstruction_hidden, self.dropout, self.dtype
        )

    def __call__(self, *inputs: jax.Array) -> dict[str, jax.Array]:
        """Runs every part once, for initialisation; inputs as in `encode`."""
        outputs = self.encode(*inputs, train=EVALUATION)
        return {**outputs, 'predicted': self.reconstruct(outputs['fused'][:, 0], train=False)}

    def encode(
        self,
        images: jax.Array,
        tokens: jax.Array,
        token_mask: jax.Array,
        composition: jax.Array,
        modality: jax.Array,
        panels: jax.Array,
        train: Mapping[str, bool],
    ) -> dict[str, jax.Array]:
        """Embeds the panels of a batch of pages.

        What a padded panel or an absent modality holds has no influence on other panels, nor on
        the fused embedding of its own.

        Args:
          images: uint8 [batch, panels, size, size, 3]; each backbone normalises its own way.
          tokens: int [batch, panels, length].
          token_mask: bool [batch, panels, length].
          composition: float [batch, panels, 7].
          modality: bool [batch, panels, 3], which of vision, text, composition a panel has.
          panels: bool [batch, panels], False on padding.
          train: tower → whether it trains, of `TOWERS`; others run as in evaluation.

        Returns:
          'fused', 'vision', 'text': float32 [batch, panels, features]; 'alone': float32 [batch,
          panels, 3, features], the embedding of each modality alone up to its length; 'gates':
          float32 [batch, panels, 3]. 'fused', 'alone' and 'gates' are 0 on padding; 'vision' and
          'text' are finite everywhere and mean something where the panel has that modality.
        """
        shape = panels.shape  # [batch, panels]
        rows = lambda x: x.reshape(-1, *x.shape[2:])
        present = rows(modality.astype(bool) & panels.astype(bool)[..., None])
        pooled = self._pooled(rows(images), present[:, 0], train)
        vision = self.vision_head(*pooled, train=train['vision_head'])
        allowed = rows(token_mask.astype(bool)) & present[:, 1:2]
        hidden = masked_mean(self.bert(rows(tokens), allowed, train=train['bert']), allowed)
        text = self.text_head(tower_output(hidden, train['bert']))
        place = self.composition(rows(composition), present[:, 2], train=train['composition'])
        alone = self.fusion.normalize((vision, text, place), present)
        fused, gates = self.fusion.weigh(alone, present)
        outputs = {'fused': fused, 'vision': vision, 'text': text, 'gates': gates, 'alone': alone}
        per_panel = lambda x: x.astype(jnp.float32).reshape(*shape, *x.shape[1:])
        return {name: per_panel(x) for name, x in outputs.items()}

    def fuse(self, alone: jax.Array, present: jax.Array) -> jax.Array:
        """Fuses 'alone' of `encode` [rows, 3, features] under `present` bool [rows, 3]."""
        return self.fusion.weigh(alone, present)[0]

    def reconstruct(self, context: jax.Array, train: bool) -> jax.Array:
        """Predicts hidden panels from the mean of the others: [batch, features] to the same."""
        return self.reconstruction(context, train=train)

    def _pooled(
        self, images: jax.Array, mask: jax.Array, train: Mapping[str, bool]
    ) -> tuple[jax.Array | None, jax.Array | None]:
        """Returns the pooled outputs of (siglip, resnet) [rows, width], None for an absent one."""
        siglip = resnet = None
        if self.siglip is not None:
            pixels = normalize_pixels(images, SIGLIP_PIXELS)
            siglip = tower_output(self.siglip(pixels, train=train['siglip']), train['siglip'])
        if self.resnet is not None:
            pixels = normalize_pixels(images, IMAGENET_PIXELS)
            pooled = self.resnet(pixels, mask, train=train['resnet'])
            resnet = tower_output(pooled, train['resnet'])
        return siglip, resnet
