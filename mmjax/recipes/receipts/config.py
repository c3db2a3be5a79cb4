"""The config of the receipts recipe."""

import dataclasses

from mmjax.data import images
from mmjax.engine import config
from mmjax.errors import UserError
from mmjax.sections import field


@dataclasses.dataclass(frozen=True)
class BuiltIn:
    """Images of the built-in data, three questions each, used without data.root."""

    train: int = field(6000, 'images', least=1)
    val: int = field(300, 'images', least=1)
    test: int = field(600, 'images', least=1)


@dataclasses.dataclass(frozen=True)
class Data(config.Data):
    """Images, questions and answers, and what is made of them."""

    image_size: int = field(112, 'side of an image, pixels', least=1)
    classes: int = field(3, '0, 1, … receipts; the last class takes all above', least=2)
    buckets: tuple[int, ...] = field(
        (16, 32, 48), 'tokens that a question or an answer may be padded to', least=2
    )
    vocabulary: int = field(512, 'of the tokenizer trained on questions and answers', least=260)
    max_pixels: int = field(50_000_000, 'larger images are faults', least=1)
    augmentation: images.Augmentation = images.Augmentation(contrast=0.1)
    built_in: BuiltIn = BuiltIn()
    built_in_side: int = field(112, 'side of a built-in image, pixels', least=16)
    built_in_max_receipts: int = field(3, 'receipts in a built-in image: 0 to this', choices=(3, 5))


@dataclasses.dataclass(frozen=True)
class Vision(config.Transformer):
    """The vision tower, an InternViT."""

    patch_size: int = field(16, 'pixels', least=1)
    norm: str = field('layer', 'normalization in the blocks', choices=('layer', 'rms'))
    layer_scale: float = field(0.1, 'initial scale of what a block adds', least=0)
    stem: str = field(
        'convolutions', 'how patches become tokens', choices=('patch', 'convolutions')
    )
    dropout: float = field(0.0, 'in training', least=0, below=1)

    def check(self, where: str) -> None:
        super().check(where)
        if self.stem == 'convolutions' and self.patch_size & (self.patch_size - 1):
            raise UserError(
                f'{where}.patch_size={self.patch_size} is no power of 2, which {where}.stem='
                "'convolutions' needs"
            )


@dataclasses.dataclass(frozen=True)
class Language(config.Transformer):
    """The decoder."""

    kv_heads: int = field(2, 'of keys and values', least=1)
    theta: float = field(1e4, 'base of the rotary frequencies', above=0)
    qkv_bias: bool = field(True, 'biases of queries, keys and values')
    tied: bool = field(True, 'use the embeddings as the output layer')
    dropout: float = field(0.0, 'in training', least=0, below=1)
    epsilon: float = field(1e-6, 'of the norms', above=0)

    def check(self, where: str) -> None:
        super().check(where)
        if self.heads % self.kv_heads:
            raise UserError(
                f'{where}.kv_heads={self.kv_heads} does not divide {where}.heads={self.heads}'
            )
        if self.width // self.heads % 2:
            raise UserError(
                f'{where}.heads={self.heads} gives heads of an odd size for '
                f'{where}.width={self.width}; rotary positions need an even one'
            )


@dataclasses.dataclass(frozen=True)
class CrossAttention:
    """Attention of the question's tokens to those of the image."""

    heads: int = field(8, 'of attention', least=1)
    dropout: float = field(0.1, 'of its weights in training', least=0, below=1)


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """Folders with published weights; their sizes replace those of the config."""

    language: str | None = field(None, 'folder of the decoder and its tokenizer')


@dataclasses.dataclass(frozen=True)
class Model:
    """Towers and heads."""

    vision: Vision = Vision(width=128, depth=4, heads=4, mlp_width=256)
    shuffle: int = field(1, 'shuffle² image tokens become one of the decoder', least=1)
    language: Language = Language(width=128, depth=2, heads=4, mlp_width=256)
    cross_attention: CrossAttention = CrossAttention()
    thaw_blocks: int = field(1, 'last blocks of the tower, in the group vision_top', least=1)
    attention: str = field('auto', 'kernel of the towers', choices=('xla', 'cudnn', 'auto'))
    remat: bool = field(False, 'recompute blocks in the backward pass: slower, in less memory')
    pretrained: Pretrained = Pretrained()

    def check(self, where: str) -> None:
        if self.thaw_blocks > self.vision.depth:
            raise UserError(
                f'{where}.thaw_blocks={self.thaw_blocks} is more than '
                f'{where}.vision.depth={self.vision.depth}'
            )
        if not self.pretrained.language:
            self.check_cross_attention(self.language, f'{where}.language')

    def check_cross_attention(self, language: Language, where: str) -> None:
        """Raises where its heads do not divide the width of the decoder described in `where`."""
        heads = self.cross_attention.heads
        if language.width % heads:
            raise UserError(
                f'model.cross_attention.heads={heads} does not divide {where}.width='
                f'{language.width}'
            )


@dataclasses.dataclass(frozen=True)
class Losses:
    """Options of the losses."""

    smoothing: float = field(0.0, 'of the class labels in training', least=0, below=1)


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How answers are generated."""

    method: str = field('greedy', 'of the search', choices=('greedy', 'sample', 'beam'))
    beams: int = field(1, 'of method beam', least=1)
    length_penalty: float = field(1.0, 'of method beam: exponent of the length', least=0)
    temperature: float = field(0.7, 'of method sample', above=0)
    top_k: int = field(50, 'of method sample: tokens to choose from; 0: all', least=0)
    top_p: float = field(0.9, 'of method sample: probability to choose from', above=0, most=1)


@dataclasses.dataclass(frozen=True)
class Decode:
    """Decoding while training and after it."""

    running: Decoding = Decoding()
    final: Decoding = Decoding(method='beam', beams=4)


@dataclasses.dataclass(frozen=True)
class Config(config.Config):
    """The config of `configs/receipts.py`."""

    task: str = field('receipts')
    data: Data = Data()
    model: Model = Model()
    losses: Losses = Losses()
    decode: Decode = Decode()

    def check(self, where: str) -> None:
        model = self.model
        side = model.vision.patch_size * model.shuffle
        if self.data.image_size % side:
            raise UserError(
                f'data.image_size={self.data.image_size} is no multiple of {side}, the product of '
                'model.vision.patch_size and model.shuffle'
            )
        if model.attention == 'cudnn' and self.precision == 'float32':
            raise UserError(
                "model.attention='cudnn' needs precision bfloat16 or float16, not float32"
            )
