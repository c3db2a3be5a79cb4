"""The config of the ContraBin recipe."""

import dataclasses
from typing import ClassVar, Literal

from mmjax.engine import config
from mmjax.errors import UserError
from mmjax.sections import field

INTERPOLATIONS = ('naive', 'linear', 'nonlinear')


@dataclasses.dataclass(frozen=True)
class Compile:
    """How the C projects of data.c_files are compiled, split and filtered."""

    compiler: str = field('auto', 'auto: clang, else gcc', choices=('auto', 'gcc', 'clang'))
    flags: tuple[str, ...] = field((), 'of the compiler: -D, -I and -std')
    split_by: str = field('project', 'what a split takes as a whole', choices=('project', 'file'))
    val: float = field(0.1, 'fraction of the projects, or files', least=0, below=1)
    test: float = field(0.1, 'fraction of the projects, or files', least=0, below=1)
    min_instructions: int = field(5, 'of a binary; shorter ones are left out', least=0)
    max_instructions: int = field(400, 'of a binary; longer ones are left out', least=1)
    symbols: bool = field(False, 'keep the names of called functions')
    registers: str = field(
        'class',
        'write registers by kind or keep their names; in built-in data too',
        choices=('class', 'keep'),
    )
    time_limit: float = field(20.0, 'seconds for one run of the compiler', least=0.1)
    workers: int = field(2, 'files compiled at a time; changes no row', least=1)

    def check(self, where: str) -> None:
        if self.val + self.test >= 1:
            raise UserError(
                f'{where}.val={self.val:g} and {where}.test={self.test:g} leave none to train on'
            )


@dataclasses.dataclass(frozen=True)
class BuiltIn:
    """Functions of the built-in data, used without data.root and data.c_files."""

    train: int = field(12000, 'functions', least=1)
    val: int = field(256, 'functions', least=1)
    test: int = field(256, 'functions', least=1)


@dataclasses.dataclass(frozen=True)
class Data(config.Data):
    """Functions as source, comment and binary, and how these become tokens."""

    c_files: str | None = field(None, 'folder of C projects, compiled once; instead of root')
    compile: Compile = Compile()
    binary_pieces: str = field(
        'lines', 'what a token of a listing may not span', choices=('lines', 'words')
    )
    max_source: int = field(128, 'tokens of a source', least=2)
    max_comment: int = field(64, 'tokens of a comment', least=2)
    max_binary: int = field(96, 'tokens of a binary', least=2)
    vocabulary: int = field(2048, 'of the tokenizer trained on sources and comments', least=260)
    binary_vocabulary: int = field(2048, 'of the tokenizer trained on listings', least=260)
    built_in: BuiltIn = BuiltIn()

    def check(self, where: str) -> None:
        if self.root and self.c_files:
            raise UserError(f'{where}.root and {where}.c_files exclude each other: give one')


@dataclasses.dataclass(frozen=True)
class Encoder(config.Transformer):
    """A BERT encoder; a folder of published weights replaces all but its dropout."""

    types: int = field(1, 'segment types', least=1)
    dropout: float = field(0.0, 'in training', least=0, below=1)
    position_offset: int = field(0, 'position of the first token', least=0)
    epsilon: float = field(1e-5, 'of layer norms', least=0)


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """Folders with published weights and a tokenizer."""

    anchor: str | None = field(None, 'folder')
    binary: str | None = field(None, 'folder')


@dataclasses.dataclass(frozen=True)
class Model:
    """Two encoders, and a projection head per modality."""

    anchor: Encoder = Encoder(width=128, depth=2, heads=2, mlp_width=256)
    binary: Encoder = Encoder(width=128, depth=2, heads=2, mlp_width=256)
    features: int = field(256, 'of an embedding', least=2)
    head: str = field('linear', 'kind of the projection heads', choices=('linear', 'nonlinear'))
    dropout: float = field(0.1, 'of heads and interpolations, in training', least=0, below=1)
    pooling: str = field('mean', 'first token or mean of all', choices=('first', 'mean'))
    pack: bool = field(True, 'on one device, run the encoders on real tokens only')
    pretrained: Pretrained = Pretrained()


@dataclasses.dataclass(frozen=True)
class Losses:
    """Options of the losses."""

    temperature: float = field(0.07, 'of all losses', above=0)
    softness: float = field(0.1, 'fraction of soft targets; published: 1', least=0, most=1)
    normalize: bool = field(True, 'embeddings have length 1; published: False')
    chunk: int | Literal['auto'] = field('auto', 'rows per tile', least=1)


@dataclasses.dataclass(frozen=True)
class StageOptions:
    """Options of a stage."""

    interpolation: str = field('naive', 'of source and comment', choices=INTERPOLATIONS)
    cache_anchor: bool = field(
        False, 'compute the outputs of a frozen anchor once: 8 bytes × width per function'
    )


@dataclasses.dataclass(frozen=True)
class Config(config.Config):
    """The config of `configs/contrabin.py`."""

    StageOptions: ClassVar[type] = StageOptions

    task: str = field('contrabin')
    evaluate_pool: int = field(256, 'functions that a query is compared with', least=2)
    data: Data = Data()
    model: Model = Model()
    losses: Losses = Losses()
