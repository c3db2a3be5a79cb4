"""The config of the retrieval recipe."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Literal

from mmjax.data import augment
from mmjax.engine import config
from mmjax.errors import UserError
from mmjax.sections import did_you_mean, field

LOSSES = ('infonce', 'supcon', 'sigmoid')


@dataclasses.dataclass(frozen=True)
class BuiltIn:
    """Items of the built-in data, used without data.root."""

    train_items: int = field(480, 'items', least=1)
    val_items: int = field(40, 'items', least=1)
    test_items: int = field(60, 'items of query and gallery', least=1)
    shots: int = field(8, 'images per item of train and val', least=1)
    query_shots: int = field(2, 'query images per item', least=1)
    gallery_shots: int = field(4, 'gallery images per item', least=1)


@dataclasses.dataclass(frozen=True)
class Data(config.Data):
    """Images of items, and the prompt of each item."""

    image_size: int = field(64, 'side of an image, pixels', least=8)
    max_pixels: int = field(50_000_000, 'larger images are faults', least=1)
    max_tokens: int = field(77, 'tokens of a prompt', least=2)
    vocabulary: int = field(1500, 'of the tokenizer trained on the prompts', least=514)
    tokenizer: str | None = field(None, "folder with CLIP's; None: the weights', or train one")
    prompts: str | None = field(None, 'JSON of prompts or descriptions; None: of the root')
    noun: str = field('product', 'what an item is called in its prompt')
    template: str = field('A {noun} in {color}. {description}', 'prompt from a description')
    template_plain: str = field('A {noun}. {description}', 'the same, for an item without color')
    prompt_policy: str = field(
        'safe', 'safe: shorten prompts to max_tokens, by sentences', choices=('raw', 'safe')
    )
    val_items: float = field(
        0.0, "fraction of train's items held out as val; 0: a split val", least=0, below=1
    )
    augmentation: augment.Augmentation = augment.Augmentation(
        min_area=0.8, ratio=1.1, brightness=0.25, contrast=0.15, saturation=0.15, tint=0.1
    )
    built_in: BuiltIn = BuiltIn()


@dataclasses.dataclass(frozen=True)
class Vit(config.Transformer):
    """The vision transformer."""

    patch_size: int = field(8, 'pixels', least=1)


@dataclasses.dataclass(frozen=True)
class Rn50:
    """CLIP's residual network."""

    stage_sizes: tuple[int, ...] = field((1, 1, 1, 1), 'blocks of each stage', least=1)
    width: int = field(16, 'channels of the stem', least=2)
    heads: int = field(8, 'of attention pooling', least=1)
    pooling: str = field(
        'statistics', "CLIP's attention, or statistics", choices=('attention', 'statistics')
    )
    share: float = field(1.0, 'statistics: their length beside the colours of length 1', least=0)

    def check(self, where: str) -> None:
        if not self.stage_sizes:
            raise UserError(f'{where}.stage_sizes=() names no stage')
        channels = 2 * self.width * 2 ** len(self.stage_sizes)
        if self.pooling == 'attention' and channels % self.heads:
            raise UserError(
                f'{where}.heads={self.heads} does not divide the {channels} channels of the last '
                f'stage ({where}.width={self.width})'
            )


@dataclasses.dataclass(frozen=True)
class Model:
    """Both towers; `pretrained` replaces their sizes."""

    vision: str = field('rn50', 'the image tower', choices=('vit', 'rn50'))
    features: int = field(128, 'of an embedding', least=2)
    vit: Vit = Vit(width=128, depth=4, heads=4, mlp_width=512)
    rn50: Rn50 = Rn50()
    text: config.Transformer = config.Transformer(width=96, depth=1, heads=3, mlp_width=384)
    pretrained: str | None = field(
        None, "folder with CLIP's weights as Hugging Face, open_clip or OpenAI write them"
    )


@dataclasses.dataclass(frozen=True)
class Losses:
    """Options of the losses."""

    temperature: float = field(0.1, 'at the start; 0 keeps the published one', least=0)
    chunk: int | Literal['auto'] = field('auto', 'rows per tile', least=1)
    mask_same_item: bool = field(True, 'images of one item are no negatives of each other')
    bias: float = field(-10.0, 'of the sigmoid loss, at the start')


@dataclasses.dataclass(frozen=True)
class Config(config.Config):
    """The config of `configs/clip_retrieval.py`."""

    task: str = field('retrieval')
    data: Data = Data()
    model: Model = Model()
    losses: Losses = Losses()

    def check(self, where: str) -> None:
        for section, weights in self.all_loss_weights():
            for name, weight in weights.items():
                if name not in LOSSES:
                    raise UserError(
                        f'unknown key {section}.{name}={weight!r}; known keys of {section}: '
                        f'{", ".join(LOSSES)}{did_you_mean(name, LOSSES)}'
                    )
        spec = self.model
        if spec.vision == 'vit':
            why = f'model.vit.patch_size={spec.vit.patch_size}'
            cell = spec.vit.patch_size
        else:
            why = f'model.rn50.stage_sizes={spec.rn50.stage_sizes}'
            cell = 2 * 2 ** len(spec.rn50.stage_sizes)
        if self.data.image_size % cell and not spec.pretrained:
            raise UserError(
                f'data.image_size={self.data.image_size} must be a multiple of {cell}, with {why}'
            )

    def all_loss_weights(self) -> Iterator[tuple[str, Mapping[str, object]]]:
        """Yields (key, {loss: weight}) of the run and of each stage."""
        yield 'loss_weights', self.loss_weights
        for name, stage in self.stage.items():
            yield f'stage.{name}.loss_weights', stage.loss_weights
