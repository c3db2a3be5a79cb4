"""The config of the sign-language recipe."""

import dataclasses
from collections.abc import Mapping

from mmjax.engine import config
from mmjax.errors import UserError
from mmjax.recipes.sign.augment import Augmentation
from mmjax.sections import field

TEACHER_LOSSES = ('teacher_ctc', 'distillation')  # those that need a teacher


@dataclasses.dataclass(frozen=True)
class BuiltIn:
    """Sentences of the built-in data, used without data.root."""

    train: int = field(3000, 'sentences', least=1)
    dev: int = field(100, 'sentences', least=1)
    test: int = field(200, 'sentences', least=1)
    signers: int = field(64, 'signers of train', least=1)
    held_out_signers: int = field(4, 'signers of dev, and as many others of test', least=1)


@dataclasses.dataclass(frozen=True)
class Data(config.Data):
    """Sentences, and what is made of their landmarks."""

    streams: Mapping[str, tuple[int, int] | tuple[int, int, int]] = field(
        {},
        'name → (start, end) or (start, end, coordinates per landmark); {}: those of streams.json',
        least=0,
    )
    missing: str = field(
        'zero', "'zero': a stream of zeros in a frame is missing", choices=('zero', 'none')
    )
    differences: bool = field(True, "add each feature's change since the frame before")
    around: bool = field(True, 'give landmarks relative to the mean point of their stream')
    buckets: int | tuple[int, ...] = field(
        3, 'lengths that batches are padded to, or how many at most', least=1
    )
    frame_rate: float = field(25.0, 'frames per second, for the times of predict', above=0)
    augmentation: Augmentation = Augmentation(noise=0.03, feature_dropout=0.0, time_masks=0)
    built_in: BuiltIn = BuiltIn()

    def check(self, where: str) -> None:
        if self.buckets == ():
            raise UserError(f'{where}.buckets=() names no length in frames')


@dataclasses.dataclass(frozen=True)
class Network:
    """The sizes of a model."""

    stream_width: int = field(64, 'of an encoded stream', least=1)
    stream_widths: Mapping[str, int] = field(
        {}, 'stream → another width; one of them at least must exist', least=1
    )
    stem: int = field(16, 'channels of the first convolution', least=1)
    width: int = field(128, 'of the inputs of the LSTM', least=1)
    lstm_features: int = field(128, 'per direction', least=1)
    lstm_layers: int = field(1, 'bidirectional layers', least=1)
    dropout: float = field(0.1, 'in training', least=0, below=1)
    cross_attention: bool = field(False, 'let the streams of a frame attend to each other')
    attention_width: int = field(64, 'of its tokens', least=1)
    attention_heads: int = field(4, 'of it', least=1)

    def check(self, where: str) -> None:
        if self.attention_width % self.attention_heads:
            raise UserError(
                f'{where}.attention_heads={self.attention_heads} does not divide '
                f'{where}.attention_width={self.attention_width}'
            )


@dataclasses.dataclass(frozen=True)
class Model:
    """The student and its teacher."""

    student: Network = Network()
    teacher: Network = Network(lstm_layers=2)
    distill: bool = field(False, 'have a teacher')
    pack: bool = field(True, 'on one device: encode real frames only, where a batch fits')


@dataclasses.dataclass(frozen=True)
class Losses:
    """Options of the losses."""

    distillation_temperature: float = field(3.0, 'of both distributions', above=0)
    distillation_blank_weight: float = field(
        1.0, 'weight of frames that the teacher is sure are blank', least=0, most=1
    )
    blank_penalty: float = field(0.0, "subtracted from the blank's logit")


@dataclasses.dataclass(frozen=True)
class Decode:
    """Decoding."""

    beam: int = field(16, 'prefixes that beam search keeps', least=1)
    language_model: float = field(0.0, 'weight of a bigram model of glosses; 0: none', least=0)
    length_bonus: float = field(0.0, 'added to the score per gloss')


@dataclasses.dataclass(frozen=True)
class Config(config.Config):
    """The config of `configs/sign_ctc.py`."""

    task: str = field('sign')
    data: Data = Data()
    model: Model = Model()
    losses: Losses = Losses()
    decode: Decode = Decode()

    def check(self, where: str) -> None:
        stages = {f'stage.{name}.': self.stage[name] for name in self.stages if name in self.stage}
        for key, section in {'': self, **stages}.items():
            for name, weight in section.loss_weights.items():
                if name in TEACHER_LOSSES and weight and not self.model.distill:
                    raise UserError(f'{key}loss_weights.{name}={weight!r} needs model.distill=True')
        for key, stage in stages.items():
            self._check_stretch(f'{key}sampler', stage.sampler)

    def _check_stretch(self, where: str, options: Mapping[str, object]) -> None:
        """Raises where buckets are shorter than what augmentation makes."""
        sampler = options if 'name' in options else {**self.sampler, **options}
        stretch = sampler.get('stretch', 1.0)
        most = self.data.augmentation.stretch[1]
        if (
            sampler.get('name') == 'bucketed'
            and isinstance(stretch, int | float)
            and stretch < most
        ):
            key = where if {'name', 'stretch'} & {*options} else 'sampler'
            raise UserError(
                f'{key}.stretch={stretch} is less than the {most} of data.augmentation.stretch'
            )
