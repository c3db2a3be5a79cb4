"""Stages: what learns, from which losses, on which data, for how long; and the plan of a run."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

from mmjax import sections
from mmjax.engine.config import (
    Config,
    EarlyStop,
    NoOptions,
    Optimizer,
    Ramp,
    StageConfig,
)
from mmjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of a run. Hashable; its sampler and position (index, start, steps) take no part in
    equality.

    What is traced gets its `compile_key` in its place.
    """

    name: str
    learning_rates: tuple[tuple[str, float], ...]  # group → multiple of the base rate; 0 freezes
    loss_weights: tuple[tuple[str, float | Ramp], ...]
    optimizer: Optimizer
    options: object = NoOptions()  # of the recipe: an instance of its `StageOptions`
    early_stop: EarlyStop = dataclasses.field(default_factory=EarlyStop)
    sampler: Mapping[str, object] = dataclasses.field(default_factory=dict, compare=False)
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

    @property
    def compile_key(self) -> 'Stage':
        """What a compiled step depends on: stages whose keys are equal share one.

        It has no name, sampler, position and early stop; rates and weights, which arrive as
        arguments of the step, are 0 or 1.
        """
        spec = self.optimizer
        names = ('name', 'weight_decay', 'clip', 'b1', 'b2', 'eps')
        traced = {name: getattr(spec, name) for name in names}
        frozen = sorted(group for group, _ in self.learning_rates if not self.trains(group))
        return Stage(
            name='',
            learning_rates=tuple((group, 0.0) for group in frozen),
            loss_weights=tuple((name, float(weight != 0)) for name, weight in self.loss_weights),
            optimizer=Optimizer(learning_rate=1.0, **traced),
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


def final_weights(config: Config) -> dict[str, float]:
    """Returns the weights of the run's losses after every ramp, without those that are 0.

    They are those of `loss_weights`; without any, those of the last stage.
    """
    given = config.loss_weights or config.stage[config.stages[-1]].loss_weights
    ends = {name: w.end if isinstance(w, Ramp) else w for name, w in given.items()}
    return {name: weight for name, weight in ends.items() if weight}


def unknown_loss(where: str, name: str, known: Sequence[str]) -> str:
    """Says that `name`, in the section `where` of the config, is none of the `known` losses."""
    hint = sections.did_you_mean(name, known)
    return f"{where} names '{name}'; this task's losses are {', '.join(known)}{hint}"


def parse(config: Config) -> list[tuple[Stage, StageConfig]]:
    """Returns (stage without its length, its entry in the config) in the order of the run."""
    return [
        (_stage(config, name, index), config.stage[name])
        for index, name in enumerate(config.stages)
    ]


def _stage(config: Config, name: str, index: int) -> Stage:
    spec = config.stage[name]
    where = f'stage.{name}'
    sampler = {**config.sampler, **spec.sampler}
    if 'name' in spec.sampler:  # another sampler shares no options with the default
        sampler = dict(spec.sampler)
    weights = {**config.loss_weights, **spec.loss_weights}
    if not weights:
        raise UserError(f'{where}: no loss has a weight; set loss_weights')
    return Stage(
        name=name,
        learning_rates=tuple(sorted(spec.learning_rates.items())),
        loss_weights=tuple((term, weights[term]) for term in sorted(weights)),
        optimizer=sections.parse(Optimizer, spec.optimizer, f'{where}.optimizer', config.optimizer),
        sampler=sampler,
        options=sections.parse(config.StageOptions, spec.options, f'{where}.options'),
        early_stop=sections.parse(
            EarlyStop, spec.early_stop, f'{where}.early_stop', config.early_stop
        ),
        index=index,
    )


def unused(config: Config) -> list[str]:
    """Returns the entries of `config.stage` that `config.stages` does not list."""
    return [name for name in config.stage if name not in config.stages]


def _length(spec: StageConfig, name: str, per_epoch: int, batch_size: int) -> int:
    factors = {'steps': 1.0, 'epochs': per_epoch, 'examples': 1.0 / batch_size}
    given = {unit: getattr(spec, unit) for unit in factors if getattr(spec, unit) is not None}
    if len(given) != 1:
        raise UserError(
            f'stage.{name} needs exactly one of steps, epochs, examples; it has '
            f'{", ".join(given) or "none"}'
        )
    ((unit, value),) = given.items()
    return max(math.ceil(value * factors[unit] - 1e-9), 1)


def plan(
    parsed: Sequence[tuple[Stage, StageConfig]],
    steps_per_epoch: Callable[[Stage], int],
    batch_size: int,
) -> tuple[Stage, ...]:
    """Gives every stage its start and length; lengths in epochs follow the stage's sampler."""
    out = []
    start = 0
    for stage, spec in parsed:
        per_epoch = steps_per_epoch(stage)
        steps = _length(spec, stage.name, per_epoch, batch_size)
        out.append(dataclasses.replace(stage, start=start, steps=steps, steps_per_epoch=per_epoch))
        start += steps
    return tuple(dataclasses.replace(stage, run_steps=start) for stage in out)
