"""The config of a run: typed sections that every recipe shares, config files, command-line keys.

A config is an `ml_collections.ConfigDict` that a file's `get_config(words)` returns. It is read
once, by `resolve`, into the dataclass that the recipe declares (a subclass of `Config`): types,
ranges, choices and unknown keys are checked there and nowhere else.
"""

import dataclasses
import importlib
import importlib.util
import inspect
import math
import pathlib
import traceback
import typing
from collections.abc import Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any, ClassVar

import ml_collections

from mmjax import sections
from mmjax.errors import UserError
from mmjax.sections import field

SCHEDULES = ('constant', 'linear', 'cosine', 'cosine_restarts')
PRECISIONS = {'no': 'float32', 'fp16': 'float16', 'bf16': 'bfloat16'}  # other names of them
OPTIMIZERS = ('adamw', 'lion', 'sgd', 'adafactor', 'muon')
# Keys that not every optimizer uses, and those that do.
_USED_BY = {
    'b1': ('adamw', 'lion', 'sgd', 'muon'),
    'b2': ('adamw', 'lion', 'muon'),
    'eps': ('adamw', 'muon'),
}


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Devices along each axis of the mesh."""

    data: int = field(-1, 'devices that share the rows alone; -1: all that are left', least=-1)
    fsdp: int = field(1, 'devices that share rows and parameters; -1: all that are left', least=-1)


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """The optimizer; a stage may override any of its keys."""

    name: str = field('adamw', 'the update rule', choices=OPTIMIZERS)
    learning_rate: float = field(1e-3, 'of a group with multiple 1', least=0, most=1e3)
    schedule: str = field('cosine', 'of the learning rate', choices=SCHEDULES)
    span: str = field('stage', 'what the schedule spans', choices=('stage', 'run'))
    end: float = field(0.0, 'multiple of the rate that the schedule ends on', least=0)
    warmup_steps: int = field(0, 'updates of linear warm-up', least=0)
    warmup_epochs: float = field(0.0, 'the same in epochs', least=0)
    warmup_fraction: float = field(0.0, 'the same as a fraction of the span', least=0, most=1)
    warmup_init: float = field(0.0, 'multiple of the rate at the first update', least=0)
    period_steps: int = field(0, 'updates per period of cosine_restarts', least=0)
    period_epochs: float = field(0.0, 'the same in epochs', least=0)
    period_factor: float = field(1.0, 'growth of each period', least=1)
    weight_decay: float = field(
        0.0, 'decoupled; not on biases, norms and scalars', least=0, most=1e3
    )
    clip: float = field(1.0, 'global norm of the trainable gradients; 0 is off', least=0)
    b1: float = field(0.9, 'decay of the first moment; momentum of sgd', least=0, most=0.9999)
    b2: float = field(0.999, 'decay of the second moment', least=0, most=0.999999)
    eps: float = field(1e-8, 'added to the root of the second moment', least=1e-12, most=1)

    def check(self, where: str) -> None:
        if sum(bool(w) for w in (self.warmup_steps, self.warmup_epochs, self.warmup_fraction)) > 1:
            raise UserError(f'{where}: give one of warmup_steps, warmup_epochs, warmup_fraction')
        periods = bool(self.period_steps) + bool(self.period_epochs)
        if periods > 1:
            raise UserError(f'{where}: give one of period_steps and period_epochs')
        if self.schedule == 'cosine_restarts' and not periods:
            raise UserError(f"{where}.schedule '{self.schedule}' needs period_steps or _epochs")
        for key, names in _USED_BY.items():
            value = getattr(self, key)
            default = getattr(Optimizer, key)
            if self.name not in names and value != default:
                raise UserError(
                    f"{where}.{key}={value} has no effect with {where}.name='{self.name}': only "
                    f'{", ".join(names)} use it; set it to {default}'
                )


@dataclasses.dataclass(frozen=True)
class Ramp:
    """A loss weight that moves linearly from `start` to `end` over its stage."""

    start: float = field(help='weight at the first update')
    end: float = field(help='weight at the end of the stage')

    def __call__(self, step: int, steps: int) -> float:
        return self.start + (self.end - self.start) * min(step / max(steps, 1), 1.0)


@dataclasses.dataclass(frozen=True)
class Best:
    """The metric that picks the checkpoint kept as best."""

    metric: str = field('', "'<evaluator>/<metric>'; '' keeps none")
    mode: str = field('min', 'which values are better', choices=('min', 'max'))
    min_delta: float = field(0.0, 'least improvement that counts', least=0)

    def improved(self, value: float, best: float | None) -> bool:
        """Whether `value` beats `best` by more than min_delta; NaN never does."""
        if math.isnan(value):
            return False
        if best is None:
            return True
        gain = best - value if self.mode == 'min' else value - best
        return gain > self.min_delta


@dataclasses.dataclass(frozen=True)
class EarlyStop(Best):
    """Leaves a stage, or ends the run, when `metric` has not improved in some evaluations."""

    metric: str = field('', "'<evaluator>/<metric>'; '' never stops")
    patience: int = field(0, 'evaluations without improvement', least=0)
    scope: str = field(
        'stage', 'what ends; run: patience goes on from stage to stage', choices=('stage', 'run')
    )

    def check(self, where: str) -> None:
        if self.metric and self.patience < 1:
            raise UserError(
                f'{where}.patience={self.patience} must be at least 1 with {where}.metric'
            )


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """When evaluations happen, besides the end of each stage."""

    every_steps: int = field(0, 'updates between two evaluations; 0 is off', least=0)
    every_epochs: float = field(0.0, 'the same in epochs', least=0)
    at_start: bool = field(False, 'evaluate before the first update')

    def check(self, where: str) -> None:
        if self.every_steps and self.every_epochs:
            raise UserError(f'{where}: give one of every_steps and every_epochs')


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """When the state is saved, besides the end of each stage."""

    every_steps: int = field(500, 'updates between two checkpoints', least=1)
    keep: int = field(2, 'newest checkpoints kept', least=1)


@dataclasses.dataclass(frozen=True)
class Log:
    """What is logged, and how often."""

    every_steps: int = field(10, 'updates between two lines of metrics.jsonl', least=1)
    tensorboard: bool = field(True, 'write TensorBoard events too')


@dataclasses.dataclass(frozen=True)
class Init:
    """What --init_from may leave out."""

    allow_fresh: tuple[str, ...] = field((), 'regexes of leaves it may miss')
    allow_unused: tuple[str, ...] = field((), "regexes of leaves it may have beyond the model's")
    assets: bool = field(True, 'take its tokenizer, vocabulary and normalization too')


@dataclasses.dataclass(frozen=True)
class NotFinite:
    """What to do about an update that is not finite; it is never made."""

    policy: str = field('stop', 'stop, or skip at most `budget` updates', choices=('stop', 'skip'))
    budget: int = field(0, 'updates of a run that may be skipped', least=0)


@dataclasses.dataclass(frozen=True)
class Data:
    """Where data come from; a recipe adds its own keys."""

    root: str | None = field(None, 'your folder; None: built-in data')
    cache: str | None = field(None, 'folder of prepared records; None: ~/.cache/mmjax')
    seed: int = field(0, 'of built-in data, splits and tokenizers', least=0)
    max_fault_share: float = field(0.01, 'fraction of the rows that may be faulty', least=0, most=1)
    workers: int = field(0, 'loader processes; 0: threads of this one', least=0)
    threads: int = field(2, 'loader threads', least=0)


@dataclasses.dataclass(frozen=True)
class NoOptions:
    """Options of a stage, for recipes that have none."""


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """An entry of `config.stage`: give one of steps, epochs, examples."""

    steps: int | None = field(None, 'length in updates', least=1)
    epochs: float | None = field(None, 'length in epochs of its sampler', above=0)
    examples: int | None = field(None, 'length in examples', least=1)
    learning_rates: Mapping[str, float] = field(
        {}, 'group → multiple of the rate; 0 freezes; 1 if not named', least=0, most=1e3
    )
    loss_weights: Mapping[str, float | Ramp] = field({}, 'overrides of loss_weights')
    optimizer: Mapping[str, object] = field({}, 'overrides of optimizer')
    sampler: Mapping[str, object] = field({}, 'overrides of sampler')
    early_stop: Mapping[str, object] = field({}, 'overrides of early_stop')
    options: Mapping[str, object] = field({}, 'options of the recipe')


@dataclasses.dataclass(frozen=True)
class Config:
    """The keys that every recipe shares; a recipe's `Config` adds sections of its own."""

    StageOptions: ClassVar[type] = NoOptions  # of `stage.<name>.options`

    task: str = field('', "a folder of mmjax.recipes, or 'package.module:Class'")
    seed: int = field(0, 'of training: weights, order, augmentation, dropout', least=0)
    precision: str = field(
        'float32',
        'of the computation; no, bf16 and fp16 are other names of these',
        choices=('float32', 'bfloat16', 'float16'),
    )
    batch_size: int = field(32, 'examples per update, over all devices and hosts', least=1)
    accumulation: int = field(1, 'micro-batches per update; losses stay exact', least=1)
    quick_compile: bool = field(False, 'optimise compiled programs little, for short runs')
    ema: float = field(0.0, 'decay of averaged weights for evaluation; 0 is off', least=0, below=1)
    rules: tuple[tuple[str, str], ...] = field((), "(group, regex) pairs before the recipe's own")
    loss_weights: Mapping[str, float | Ramp] = field({}, 'term → number or dict(start=, end=)')
    sampler: Mapping[str, object] = field({'name': 'shuffle'}, 'name and options of the sampler')
    needs_init_from: str = field('', 'kind of run that --init_from must name; empty: none')
    stages: tuple[str, ...] = field((), 'names of the stages, in order')
    stage: Mapping[str, StageConfig] = field({}, 'name → what the stage does')
    optimizer: Optimizer = Optimizer()
    mesh: Mesh = Mesh()
    evaluate: Evaluate = Evaluate()
    best: Best = Best()
    early_stop: EarlyStop = EarlyStop()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()
    init: Init = Init()
    not_finite: NotFinite = NotFinite()
    data: Data = Data()


@dataclasses.dataclass(frozen=True)
class Transformer:
    """The sizes that every transformer has; a recipe adds its own."""

    width: int = field(128, 'of a token', least=1)
    depth: int = field(2, 'blocks', least=1)
    heads: int = field(4, 'of attention', least=1)
    mlp_width: int = field(256, 'hidden width of a block', least=1)

    def check(self, where: str) -> None:
        if self.width % self.heads:
            raise UserError(
                f'{where}.heads={self.heads} does not divide {where}.width={self.width}'
            )


# Config files ---------------------------------------------------------------------------------


def default(cls: type[Config] = Config) -> ml_collections.ConfigDict:
    """Returns the declared defaults of a config class, to be changed by a config file."""
    return ml_collections.ConfigDict(sections.to_dict(cls()), type_safe=False)


def words(argument: str | None, known: Iterable[str]) -> frozenset[str]:
    """Splits the text after the colon of `--config=FILE:a,b`; an unknown word is an error."""
    known = tuple(known)
    given = frozenset(word for word in (argument or '').split(',') if word)
    for word in sorted(given):
        if word not in known:
            raise UserError(f"unknown config word '{word}'; known: {', '.join(known)}")
    return given


def one_of(given: Iterable[str], choices: tuple[str, ...], default: str) -> str:
    """Returns which of `choices` is among the words given; two of them are an error."""
    named = [word for word in choices if word in given]
    if len(named) > 1:
        raise UserError(f"the config words '{named[0]}' and '{named[1]}' exclude each other")
    return named[0] if named else default


def find(name: str) -> pathlib.Path:
    """Returns the path of a config, given as a file or as the name of an installed one."""
    if pathlib.Path(name).is_file():
        return pathlib.Path(name)
    package = pathlib.Path(__file__).parent.parent
    known: dict[str, pathlib.Path] = {}
    for folder in (package.parent / 'configs', package / 'configs'):
        known |= {path.stem: path for path in sorted(folder.glob('[a-z]*.py'))}
    if name not in known:
        raise UserError(f"no config file '{name}'; installed configs: {', '.join(known)}")
    return known[name]


def load(spec: str) -> ml_collections.ConfigDict:
    """Returns `get_config(words)` of 'FILE.py:words' or 'name:words', unlocked."""
    name, _, argument = spec.partition(':')
    path = find(name).resolve()
    try:
        config = _module(path).get_config(argument)
    except UserError:
        raise
    except SyntaxError as error:
        raise UserError(f'{error.filename} line {error.lineno}: {error.msg}') from error
    except Exception as error:
        line = traceback.extract_tb(error.__traceback__)[-1]
        for entry in traceback.extract_tb(error.__traceback__):
            if pathlib.Path(entry.filename) == path:
                line = entry
        raise UserError(
            f'{line.filename} line {line.lineno}: {type(error).__name__}: {error}'
        ) from error
    if not isinstance(config, ml_collections.ConfigDict | ml_collections.FrozenConfigDict):
        raise UserError(f'{path}: get_config returns no ml_collections.ConfigDict')
    return ml_collections.ConfigDict(config.to_dict(), type_safe=False)


def _module(path: pathlib.Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f'mmjax_config_{path.stem}', path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def config_class(task: str) -> type[Config]:
    """Returns the config class of a task; for the installed recipes without importing JAX."""
    module, _, name = task.partition(':')
    if not name:
        return import_task_module(f'mmjax.recipes.{module}.config', task).Config
    cls = getattr(import_task_module(module, task), name, None)
    if not inspect.isclass(cls) or not hasattr(cls, 'Config'):
        raise UserError(f"config.task '{task}' names no Task")
    return cls.Config


def import_task_module(module: str, task: str) -> ModuleType:
    """Imports the module that `config.task` names; one that does not exist is a UserError."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and not module.startswith(error.name):
            raise
        raise UserError(f"config.task '{task}' is no module: {error}") from None


def resolve(config: Mapping, cls: type[Config] | None = None) -> Config:
    """Checks a config as a whole and returns it as the typed config of its recipe."""
    if cls is None:
        cls = config_class(str(config.get('task') or ''))
    precision = config.get('precision')
    if isinstance(precision, str):
        config = {**config, 'precision': PRECISIONS.get(precision, precision)}
    resolved = sections.parse(cls, config)
    if not resolved.stages:
        raise UserError('stages is empty: name at least one stage')
    if len(set(resolved.stages)) != len(resolved.stages):
        raise UserError(f'stages names a stage twice: {", ".join(resolved.stages)}')
    for name in resolved.stages:
        if name not in resolved.stage:
            raise UserError(f"stages names '{name}', but stage.{name} does not exist")
    return resolved


# Command line ---------------------------------------------------------------------------------

_PARTIAL = {'optimizer': Optimizer, 'early_stop': EarlyStop}  # of a stage, overrides of a section
_LENGTHS = ('steps', 'epochs', 'examples')


def override(config: ml_collections.ConfigDict, changes: Sequence[tuple[str, str]]) -> None:
    """Sets keys of a config to values given as text; the command line wins or says why not.

    Args:
      config: changed in place.
      changes: (dotted key, text) pairs of `--config.key=text`.

    Raises:
      UserError: an unknown key, text that is no value of the key's type, or a key that a stage
        overrides, so that it would have no effect there.
    """
    cls = config_class(str(config.get('task') or ''))
    values = {key: sections.coerce(_annotation(cls, key), text, key) for key, text in changes}
    given = {leaf for key, value in values.items() for leaf in _leaves(key, value)}
    for key, value in values.items():
        *parents, leaf = key.split('.')
        where = config
        for parent in parents:
            if not isinstance(where.get(parent), ml_collections.ConfigDict):
                where[parent] = ml_collections.ConfigDict(type_safe=False)
            where = where[parent]
        if len(parents) == 2 and parents[0] == 'stage' and leaf in _LENGTHS:
            for unit in _LENGTHS:
                if unit in where and f'stage.{parents[1]}.{unit}' not in given:
                    where[unit] = None
        if parents[-1:] == ['sampler'] and leaf == 'name' and where.get('name') != value:
            for option in set(where) - {'name'}:  # another sampler has other options
                if f'{".".join(parents)}.{option}' not in given:
                    del where[option]
        replaces = leaf == 'sampler' and isinstance(value, Mapping) and 'name' in value
        section = isinstance(where.get(leaf), ml_collections.ConfigDict)
        if section and isinstance(value, Mapping) and not replaces:
            where[leaf].update(value)
        else:
            where[leaf] = value
    for key in sorted(given):
        _check_shadowed(config, key, given)


def _leaves(key: str, value: object) -> list[str]:
    if isinstance(value, Mapping):
        return [leaf for name, one in value.items() for leaf in _leaves(f'{key}.{name}', one)]
    return [key]


def _check_shadowed(config: ml_collections.ConfigDict, key: str, given: set[str]) -> None:
    """Raises where a stage has its own value for a shared key set on the command line."""
    section, _, rest = key.partition('.')
    if section not in ('optimizer', 'sampler', 'early_stop', 'loss_weights') or not rest:
        return
    acting = []
    for name in config.stages:
        own = config.stage.get(name, {}).get(section) or {}
        replaced = section == 'sampler' and 'name' in own and rest != 'name'
        stage_key = f'stage.{name}.{key}'
        if (rest.split('.')[0] in own or replaced) and stage_key not in given:
            acting.append(f'--config.{stage_key}')
    if acting:
        raise UserError(
            f'{key} has no effect in stages with a value of their own: set {", ".join(acting)}'
        )


def _annotation(cls: type[Config], key: str) -> object:
    """Returns the declared type of a dotted key."""
    annotation: Any = cls
    parts = key.split('.')
    for depth, part in enumerate(parts):
        where = '.'.join(parts[:depth])
        full = f'{where}.{part}' if where else part
        if not part:
            raise UserError(f"'{key}' is not a key of the config")
        of_stage = {**_PARTIAL, 'options': cls.StageOptions} if depth == 2 else {}
        section = sections.section_of(annotation)
        if parts[0] == 'stage' and part in of_stage:
            annotation = of_stage[part]
        elif section:
            hints = typing.get_type_hints(section)
            known = [f.name for f in dataclasses.fields(section)]
            if part not in known:
                hint = sections.did_you_mean(part, known) or f'; known: {", ".join(known)}'
                raise UserError(f"the config has no key '{full}'{hint}")
            annotation = hints[part]
        elif typing.get_origin(annotation) is Mapping:
            annotation = typing.get_args(annotation)[1]
        elif annotation is not object:
            raise UserError(f"the config has no key '{key}': {where} has no keys")
    return annotation


def help_text(cls: type[Config]) -> str:
    """Returns a line per key: name, type, default, meaning."""
    rows = sections.describe(cls) + sections.describe(StageConfig, 'stage.NAME')
    rows += sections.describe(cls.StageOptions, 'stage.NAME.options')
    return '\n'.join(
        f'  --config.{key}={default}\n      {meaning} ({text})'
        for key, text, default, meaning in rows
    )


# Values ---------------------------------------------------------------------------------------


def with_defaults(values: Mapping, defaults: Mapping) -> dict:
    """Returns nested `values` with the keys of `defaults` that they lack, in sections they have."""
    out = {**defaults, **values}
    for name, value in values.items():
        if isinstance(value, Mapping) and isinstance(defaults.get(name), Mapping):
            out[name] = with_defaults(value, defaults[name])
    return out


def differences(old: Mapping, new: Mapping, path: str = '') -> list[tuple[str, object, object]]:
    """Returns (key, old value, new value) of every leaf that two nested dicts do not share."""
    out = []
    for name in sorted({*old, *new}):
        key = f'{path}.{name}' if path else name
        a, b = old.get(name), new.get(name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            out += differences(a, b, key)
        elif a != b:
            out.append((key, a, b))
    return out
