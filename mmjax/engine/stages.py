"""Stages: what learns, from which losses, on which data, for how long; and the plan of a run."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mmjax.engine.config import View, build, hashable
from mmjax.errors import UserError

SCHEDULES = ('constant', 'linear', 'cosine', 'cosine_restarts', 'one_cycle', 'step')


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """The optimizer of a stage; `mmjax.config.default` comments every field."""

    learning_rate: float
    schedule: str = 'cosine'
    span: str = 'stage'
    end: float = 0.0
    warmup_steps: int = 0
    warmup_epochs: float = 0.0
    warmup_fraction: float = 0.0
    warmup_init: float = 0.0
    period_steps: int = 0
    period_epochs: float = 0.0
    period_factor: float = 1.0
    gamma: float = 0.1
    weight_decay: float = 0.0
    clip: float = 1.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8

    def __post_init__(self):
        bounds = dict(
            learning_rate=(0, 1e3),
            weight_decay=(0, 1e3),
            clip=(0, math.inf),
            b1=(0, 0.9999),
            b2=(0, 0.999999),
            eps=(1e-12, 1),
        )
        for name, (least, most) in bounds.items():
            value = getattr(self, name)
            if not isinstance(value, int | float) or not least <= value <= most:
                raise UserError(f'optimizer.{name} is from {least:g} to {most:g}, not {value}')
        if self.schedule not in SCHEDULES:
            known = ', '.join(SCHEDULES)
            raise UserError(f"unknown optimizer.schedule '{self.schedule}'; known: {known}")
        if self.span not in ('stage', 'run'):
            raise UserError(f"optimizer.span is 'stage' or 'run', not '{self.span}'")
        if sum(bool(w) for w in (self.warmup_steps, self.warmup_epochs, self.warmup_fraction)) > 1:
            raise UserError('optimizer: give one of warmup_steps, warmup_epochs, warmup_fraction')
        if self.period_steps and self.period_epochs:
            raise UserError('optimizer: give one of period_steps and period_epochs')
        if self.schedule in ('cosine_restarts', 'step') and not (
            self.period_steps or self.period_epochs
        ):
            raise UserError(f"optimizer.schedule '{self.schedule}' needs a period_steps or _epochs")


@dataclasses.dataclass(frozen=True)
class Ramp:
    """A loss weight that moves from `start` to `end` over the first `fraction` of its stage."""

    start: float
    end: float
    schedule: str = 'linear'  # or 'cosine'
    fraction: float = 1.0

    def __post_init__(self):
        if self.schedule not in ('linear', 'cosine') or not 0 < self.fraction <= 1:
            raise UserError(
                "a loss weight's schedule is 'linear' or 'cosine' and its fraction in (0, 1], "
                f'not {self.schedule!r} and {self.fraction}'
            )

    def __call__(self, step: int, steps: int) -> float:
        x = min(step / max(steps * self.fraction, 1e-9), 1.0)
        if self.schedule == 'cosine':
            x = 0.5 - 0.5 * math.cos(math.pi * x)
        return self.start + (self.end - self.start) * x


@dataclasses.dataclass(frozen=True)
class EarlyStop:
    """Leaves a stage when `metric` has not improved by `min_delta` in `patience` evaluations."""

    metric: str = ''  # '<evaluator>/<metric>'; '' never stops
    mode: str = 'min'
    patience: int = 0
    min_delta: float = 0.0

    def __post_init__(self):
        if self.mode not in ('min', 'max'):
            raise UserError(f"early_stop.mode is 'min' or 'max', not '{self.mode}'")
        if self.metric and self.patience < 1:
            raise UserError('early_stop.patience must be at least 1 when early_stop.metric is set')

    def improved(self, value: float, best: float | None) -> bool:
        """Whether `value` beats `best` by more than min_delta; NaN never does."""
        if math.isnan(value):
            return False
        if best is None:
            return True
        gain = best - value if self.mode == 'min' else value - best
        return gain > self.min_delta


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of a run. Hashable; its position (index, start, steps) takes no part in equality.

    What is traced gets its `program` in its place.
    """

    name: str
    learning_rates: tuple[tuple[str, float], ...]  # group → multiple of the base rate; 0 freezes
    loss_weights: tuple[tuple[str, float | Ramp], ...]
    optimizer: Optimizer
    sampler: tuple[tuple[str, Any], ...]
    options: tuple[tuple[str, Any], ...] = ()
    early_stop: EarlyStop = EarlyStop()
    index: int = dataclasses.field(default=0, compare=False)
    start: int = dataclasses.field(default=0, compare=False)  # planned updates before it
    steps: int = dataclasses.field(default=0, compare=False)
    steps_per_epoch: int = dataclasses.field(default=1, compare=False)
    run_steps: int = dataclasses.field(default=0, compare=False)

    def rate(self, group: str) -> float:
        """Returns the group's multiple of the base rate; a group not named has 1."""
        return dict(self.learning_rates).get(group, 1.0)

    def trains(self, group: str) -> bool:
        return self.rate(group) > 0

    def option(self, name: str, default: Any = None) -> Any:
        return dict(self.options).get(name, default)

    @property
    def program(self) -> 'Stage':
        """What a compiled step depends on: stages whose programs are equal share one.

        It has no name, sampler, position and early stop; rates and weights, which arrive as
        arguments of the step, are 0 or 1.
        """
        spec = self.optimizer
        traced = {name: getattr(spec, name) for name in ('weight_decay', 'clip', 'b1', 'b2', 'eps')}
        frozen = sorted(group for group, _ in self.learning_rates if not self.trains(group))
        return Stage(
            name='',
            learning_rates=tuple((group, 0.0) for group in frozen),
            loss_weights=tuple((name, float(weight != 0)) for name, weight in self.loss_weights),
            optimizer=Optimizer(learning_rate=1.0, **traced),
            sampler=(),
            options=self.options,
        )

    @property
    def losses(self) -> tuple[str, ...]:
        """Names of the terms whose weight is not the constant 0."""
        return tuple(name for name, weight in self.loss_weights if weight != 0)

    def weights(self, step: int) -> dict[str, float]:
        """Returns the weight of every active term at `step` in this stage."""
        return {
            name: weight(step, self.steps) if isinstance(weight, Ramp) else float(weight)
            for name, weight in self.loss_weights
            if weight != 0
        }


def _weight(value: Any, where: str) -> float | Ramp:
    if isinstance(value, Mapping):
        return build(Ramp, value, where)
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise UserError(f'{where} must be a number or dict(start=, end=), not {value!r}')
    return float(value)


def _length(spec: Mapping, name: str, per_epoch: int, batch_size: int) -> int:
    given = {unit: spec[unit] for unit in ('steps', 'epochs', 'examples') if spec.get(unit)}
    if len(given) != 1:
        raise UserError(
            f'stage.{name} needs exactly one of steps, epochs, examples; it has '
            f'{", ".join(given) or "none"}'
        )
    ((unit, value),) = given.items()
    factor = {'steps': 1.0, 'epochs': per_epoch, 'examples': 1.0 / batch_size}[unit]
    steps = math.ceil(value * factor - 1e-9)
    if steps < 1:
        raise UserError(f'stage.{name}.{unit}={value} is less than one update')
    return steps


_KEYS = ('steps', 'epochs', 'examples', 'learning_rates', 'loss_weights', 'optimizer', 'sampler')
_KEYS += ('options', 'early_stop')


def parse(config: View) -> list[tuple[Stage, dict]]:
    """Reads `config.stages` and `config.stage` to (stage without its length, its dict) pairs."""
    names = tuple(config.stages)
    if not names:
        raise UserError('config.stages is empty: name at least one stage')
    if len(set(names)) != len(names):
        raise UserError(f'config.stages names a stage twice: {names}')
    shared = {key: config[key].to_dict() for key in ('loss_weights', 'optimizer', 'sampler')}
    shared['early_stop'] = config.early_stop.to_dict()
    out = []
    for index, name in enumerate(names):
        if name not in config.stage:
            raise UserError(f"config.stages names '{name}', but config.stage has no such entry")
        spec = config.stage[name].to_dict()
        where = f'stage.{name}'
        for key in spec:
            if key not in _KEYS:
                raise UserError(f"unknown key '{where}.{key}'; known: {', '.join(_KEYS)}")
        merged = {key: {**shared[key], **spec.get(key, {})} for key in shared}
        if 'name' in spec.get('sampler', {}):  # another sampler shares no options with the default
            merged['sampler'] = dict(spec['sampler'])
        weights = merged['loss_weights']
        if not weights:
            raise UserError(f'{where}: no loss has a weight; set config.loss_weights')
        stage = Stage(
            name=name,
            learning_rates=tuple(sorted(spec.get('learning_rates', {}).items())),
            loss_weights=tuple(
                (term, _weight(weights[term], f'{where}.loss_weights.{term}'))
                for term in sorted(weights)
            ),
            optimizer=build(Optimizer, merged['optimizer'], f'{where}.optimizer'),
            sampler=hashable(merged['sampler']),
            options=hashable(spec.get('options', {})),
            early_stop=build(EarlyStop, merged['early_stop'], f'{where}.early_stop'),
            index=index,
        )
        for group, rate in stage.learning_rates:
            if not math.isfinite(rate) or rate < 0:
                raise UserError(f'{where}.learning_rates.{group} must be 0 or more, not {rate}')
        out.append((stage, spec))
    return out


def unused(config: View) -> list[str]:
    """Returns entries of `config.stage` that `config.stages` does not list; they count as read."""
    names = [name for name in config.stage if name not in config.stages]
    config.stage.ignore(*names)
    return names


def plan(
    parsed: Sequence[tuple[Stage, dict]],
    steps_per_epoch: Callable[[Stage], int],
    batch_size: int,
) -> tuple[Stage, ...]:
    """Gives every stage its start and length; lengths in epochs follow the stage's sampler."""
    out, start = [], 0
    for stage, spec in parsed:
        per_epoch = steps_per_epoch(stage)
        steps = _length(spec, stage.name, per_epoch, batch_size)
        out.append(dataclasses.replace(stage, start=start, steps=steps, steps_per_epoch=per_epoch))
        start += steps
    return tuple(dataclasses.replace(stage, run_steps=start) for stage in out)
