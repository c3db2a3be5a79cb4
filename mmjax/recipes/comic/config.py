"""The config of the comic recipe."""

import dataclasses
from typing import Literal

from mmjax.data import images
from mmjax.engine import config
from mmjax.errors import UserError
from mmjax.sections import field

BACKBONES = {'siglip': ('siglip',), 'resnet': ('resnet',), 'both': ('siglip', 'resnet')}
FUSIONS = ('attention', 'gate', 'concat')


@dataclasses.dataclass(frozen=True)
class BuiltIn:
    """Pages of the built-in data, used without data.root."""

    train: int = field(1536, 'pages', least=1)
    val: int = field(128, 'pages', least=1)


@dataclasses.dataclass(frozen=True)
class Data(config.Data):
    """Pages, and what is made of their panels."""

    image_size: int = field(128, 'side of a panel, pixels', least=8)
    max_panels: int = field(16, 'panels per page; later ones are cut and counted', least=2)
    buckets: tuple[int, ...] = field((9, 16), 'panels that a page may be padded to', least=1)
    max_tokens: int = field(32, 'tokens of a text', least=2)
    vocabulary: int = field(2048, 'of the tokenizer trained on the texts', least=300)
    hidden_tokens: float = field(0.0, 'fraction of tokens hidden in training', least=0, most=1)
    hidden_texts: float = field(0.0, 'fraction of texts hidden in training', least=0, most=1)
    hidden_compositions: float = field(
        0.0, 'fraction of compositions hidden in training', least=0, most=1
    )
    use_composition: bool = field(True, 'give the model the place of a panel')
    max_pixels: int = field(50_000_000, 'larger images are faults', least=1)
    augmentation: images.Augmentation = images.Augmentation()
    built_in: BuiltIn = BuiltIn()


@dataclasses.dataclass(frozen=True)
class SigLIP(config.Transformer):
    """The vision transformer."""

    patch_size: int = field(8, 'pixels', least=1)
    dropout: float = field(0.0, 'in training', least=0, below=1)


@dataclasses.dataclass(frozen=True)
class ResNet:
    """The convolutional network."""

    stage_sizes: tuple[int, ...] = field((1, 1, 1), 'blocks of each stage', least=1)
    width: int = field(32, 'channels of the first stage', least=1)
    bottleneck: bool = field(False, 'blocks of three convolutions')
    stem_kernel: int = field(11, 'side of the first convolution', least=1)
    stem_stride: int = field(8, 'of the first convolution', least=1)
    stem_pool: bool = field(False, 'max pooling after it')
    statistics: bool = field(False, 'pool statistics of all maps and colours too')


@dataclasses.dataclass(frozen=True)
class Bert(config.Transformer):
    """The text encoder."""

    max_length: int = field(128, 'tokens', least=2)
    dropout: float = field(0.1, 'in training', least=0, below=1)


@dataclasses.dataclass(frozen=True)
class Heads:
    """Projections, fusion and reconstruction."""

    features: int = field(512, 'of an embedding', least=2)
    siglip_hidden: int = field(384, 'width', least=1)
    resnet_hidden: int = field(512, 'width', least=1)
    composition_hidden: int = field(256, 'width', least=1)
    gate_hidden: int = field(512, 'width', least=1)
    gate_floor: float = field(
        0.3, 'fraction of the weight that modalities share evenly', least=0, most=1
    )
    fusion_projection: bool = field(True, 'a linear layer per modality before it is fused')
    reconstruction_hidden: int = field(1024, 'width', least=1)
    dropout: float = field(0.1, 'in training', least=0, below=1)


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """Folders with published weights; their sizes replace those of the config."""

    siglip: str | None = field(None, 'folder')
    resnet: str | None = field(None, 'folder')
    bert: str | None = field(None, 'folder')


@dataclasses.dataclass(frozen=True)
class Model:
    """Towers and heads."""

    visual_backbone: str = field('resnet', 'which tower sees', choices=tuple(BACKBONES))
    visual_fusion: str = field('attention', 'of both towers', choices=FUSIONS)
    pack: bool = field(True, 'run the towers on real panels only')
    siglip: SigLIP = SigLIP(width=128, depth=4, heads=4, mlp_width=512)
    resnet: ResNet = ResNet()
    bert: Bert = Bert(width=96, depth=1, heads=3, mlp_width=192)
    heads: Heads = Heads()
    pretrained: Pretrained = Pretrained()


@dataclasses.dataclass(frozen=True)
class Losses:
    """Options of the losses."""

    temperature: float = field(0.07, 'of contrastive and alignment', above=0)
    chunk: int | Literal['auto'] = field('auto', 'rows per tile of contrastive losses', least=1)
    stop_context: bool = field(False, 'no gradient of the reconstruction into its context')


@dataclasses.dataclass(frozen=True)
class Config(config.Config):
    """The config of `configs/stage3.py`."""

    task: str = field('comic')
    data: Data = Data()
    model: Model = Model()
    losses: Losses = Losses()

    def check(self, where: str) -> None:
        size = self.model.siglip.patch_size
        if 'siglip' in BACKBONES[self.model.visual_backbone] and self.data.image_size % size:
            raise UserError(
                f'data.image_size={self.data.image_size} is no multiple of '
                f'model.siglip.patch_size={size}'
            )
        if max(self.data.buckets, default=0) > self.data.max_panels:
            raise UserError(
                f'data.buckets={self.data.buckets} exceeds data.max_panels={self.data.max_panels}'
            )
        if self.data.max_tokens > self.model.bert.max_length and not self.model.pretrained.bert:
            raise UserError(
                f'data.max_tokens={self.data.max_tokens} is more than '
                f'model.bert.max_length={self.model.bert.max_length}'
            )
