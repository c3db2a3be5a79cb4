"""From a config to a run: task, plan, groups, mesh and settings, all built before step 0."""

import dataclasses
import functools
import importlib
import inspect
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from mmjax.data import pipeline, samplers
from mmjax.data.dataset import Dataset
from mmjax.engine import optim, parallel, stages, step
from mmjax.engine.checkpoint import run_of
from mmjax.engine.config import View, thaw
from mmjax.engine.stages import EarlyStop, Stage
from mmjax.engine.task import Evaluator, Task
from mmjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Cadence:
    """When evaluations, checkpoints and log lines happen; in updates."""

    evaluate: int  # 0: at the end of each stage only
    evaluate_epochs: float
    evaluate_at_start: bool
    checkpoint: int
    keep: int
    log: int
    tensorboard: bool

    def evaluates(self, stage: Stage, stage_step: int) -> bool:
        every = self.evaluate or round(self.evaluate_epochs * stage.steps_per_epoch)
        return stage_step == stage.steps or bool(every and stage_step % every == 0)


@dataclasses.dataclass
class Run:
    """Everything a mode needs; holds plain values, never the config."""

    task: Task
    mesh: jax.sharding.Mesh
    settings: step.Settings
    stages: tuple[Stage, ...]
    groups: optim.Groups
    data: Dataset
    evaluators: dict[str, Evaluator]
    batch_size: int
    cadence: Cadence
    best: EarlyStop  # metric and mode of the checkpoint that is kept as best
    not_finite: tuple[str, int]
    init: tuple[tuple[str, ...], tuple[str, ...]]
    loader: dict[str, int]
    fingerprint: dict[str, Any]
    abstract: Any  # variables as jax.ShapeDtypeStruct
    batch: dict[str, np.ndarray]  # zeros in the shape of a batch
    notes: list[str]

    def sampler(self, stage: Stage) -> samplers.Sampler:
        return samplers.make(
            thaw(stage.sampler),
            self.data.index,
            len(self.data),
            self.batch_size,
            seed=self.settings.seed,
            stage=stage.index,
            lengths=self.data.lengths,
        )

    def abstract_state(self, stage: Stage) -> step.State:
        """Returns the state in `stage` as ShapeDtypeStructs with their shardings."""
        make = lambda variables: step.create(variables, stage, self.groups, self.settings)
        shapes = jax.eval_shape(make, self.abstract)
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            shapes,
            parallel.weights(shapes, self.mesh),
        )

    def init_variables(self) -> Any:
        """Makes fresh variables on the mesh, no leaf ever whole where it is sharded."""
        key = jax.random.key(self.settings.seed)
        shardings = parallel.weights(self.abstract, self.mesh)
        # Runs once, but its random numbers are slow to compile: 18 s for a small ResNet on two
        # cores, 4 s without XLA's optimisations.
        options = {'xla_backend_optimization_level': 0} if jax.default_backend() == 'cpu' else None
        make = jax.jit(self.task.init, out_shardings=shardings, compiler_options=options)
        variables = make(key, self.batch)
        loaded = self.task.pretrained(variables)
        if loaded is variables:
            return variables
        return jax.tree.map(
            lambda new, old, s: jax.device_put(np.asarray(new, old.dtype), s),
            loaded,
            self.abstract,
            shardings,
        )


def make_task(config: View, assets=None) -> Task:
    """Imports `mmjax.recipes.<config.task>.task` (or 'package.module:Class'); builds its task."""
    module, _, name = config.task.partition(':')
    try:
        found = importlib.import_module(module if name else f'mmjax.recipes.{module}.task')
    except ModuleNotFoundError as error:
        if error.name and not (module.startswith(error.name) or error.name.startswith('mmjax')):
            raise
        raise UserError(f"config.task '{config.task}' is no module: {error}") from None
    name = name or f'{module}Task'
    names = {key.lower(): key for key in vars(found)}  # contrabin → ContraBinTask
    cls = getattr(found, names.get(name.lower(), name), None)
    if not (inspect.isclass(cls) and issubclass(cls, Task)):
        raise UserError(f"config.task '{config.task}' names no Task")
    return cls(config, assets=assets)


def run(config_dict: Mapping, *, assets=None, init_from: str | None = None, data_only=False) -> Run:
    """Builds the run that a config describes, and refuses keys that nobody read.

    Args:
      assets: a workdir whose saved tokenizer and the like are used instead of fresh ones.
      init_from: whose weights the run will take; without `assets`, and unless init.assets is
        False, it uses what is saved there: weights mean nothing to another vocabulary.
      data_only: stop at the task, which has prepared its data: they need not fill a batch, and the
        fields of a plan and a model are empty.
    """
    config = View(config_dict)
    notes = [f'config.stage.{name} is not in config.stages' for name in stages.unused(config)]
    if config.init.assets and init_from and assets is None:
        assets = run_of(init_from)
        notes += [f'tokenizer and the like are those of {assets}'] if assets else []
    parsed = stages.parse(config)
    mesh = parallel.mesh(config.mesh.to_dict())
    settings = step.Settings(config.seed, config.accumulation, config.precision, config.ema)
    if settings.precision not in ('float32', 'bfloat16', 'float16'):
        raise UserError(f"precision '{settings.precision}' is not float32, bfloat16 or float16")
    if not 0 <= settings.ema < 1:
        raise UserError(f'ema={settings.ema} is not in [0, 1)')
    parallel.check_batch(config.batch_size, settings.accumulation, mesh)
    cadence = Cadence(
        config.evaluate.every_steps,
        config.evaluate.every_epochs,
        config.evaluate.at_start,
        config.checkpoint.every_steps,
        config.checkpoint.keep,
        config.log.every_steps,
        config.log.tensorboard,
    )
    for key, value in dataclasses.asdict(cadence).items():
        if value < 0 or (key in ('checkpoint', 'keep', 'log') and value < 1):
            raise UserError(f'the cadence {key}={value} in the config is too small')
    best = EarlyStop(config.best.metric, config.best.mode, patience=1)
    policy = (config.not_finite.policy, config.not_finite.budget)
    if policy[0] not in ('stop', 'skip'):
        raise UserError(f"not_finite.policy is 'stop' or 'skip', not '{policy[0]}'")
    init = (tuple(config.init.allow_fresh), tuple(config.init.allow_unused))
    loader = {'workers': config.data.workers, 'threads': config.data.threads}
    batch_size, rules = config.batch_size, tuple(config.rules)
    config.data.ignore('root', 'cache')
    config.ignore('quick_compile')  # see `modes.run`

    task = make_task(config, assets)
    data, evaluators = task.dataset('train'), task.evaluators()
    rules_default = task.rules()
    unread = config.unread()
    if unread:
        raise UserError(f'nothing reads the config key(s) {", ".join(unread)}')
    fingerprint = {**data.fingerprint(), 'seed': settings.seed, 'batch_size': batch_size}
    make = functools.partial(
        Run,
        task=task,
        mesh=mesh,
        settings=settings,
        data=data,
        evaluators=evaluators,
        batch_size=batch_size,
        cadence=cadence,
        best=best,
        not_finite=policy,
        init=init,
        loader=loader,
        fingerprint=fingerprint,
    )
    if data_only:
        return make(stages=(), groups=optim.Groups(()), abstract={}, batch={}, notes=notes)
    check_metrics(parsed, best, evaluators)

    def sampler(stage):
        return samplers.make(
            thaw(stage.sampler),
            data.index,
            len(data),
            batch_size,
            seed=settings.seed,
            stage=stage.index,
            lengths=data.lengths,
        )

    plan = stages.plan(parsed, lambda stage: sampler(stage).steps_per_epoch, batch_size)
    batch = blank_batch(data, sampler(plan[0]), settings)
    abstract = jax.eval_shape(task.init, jax.random.key(0), batch)
    groups = optim.resolve(
        abstract['params'], abstract.get('batch_stats', {}), rules, rules_default
    )
    optim.check_groups(groups, plan)
    notes += optim.doubts(groups, plan)
    return make(stages=plan, groups=groups, abstract=abstract, batch=batch, notes=notes)


def blank_batch(data: Dataset, sampler: samplers.Sampler, settings) -> dict[str, np.ndarray]:
    """Returns the first batch of a run with zeros in it: shapes and types to build on."""
    first = next(
        iter(
            pipeline.batches(
                data, sampler, seed=settings.seed, stage=0, stop=1, train=True, threads=0
            )
        )
    )
    return {key: np.zeros_like(value) for key, value in first.items()}


def check_metrics(parsed, best: EarlyStop, evaluators: Mapping) -> None:
    """Raises where a metric to watch does not begin with the name of an evaluator."""
    watched = [('best.metric', best.metric)]
    watched += [(f'stage.{s.name}.early_stop.metric', s.early_stop.metric) for s, _ in parsed]
    for key, metric in watched:
        if metric and metric.split('/')[0] not in evaluators:
            known = ', '.join(evaluators) or 'none'
            raise UserError(f"{key} '{metric}' is not '<evaluator>/<metric>'; evaluators: {known}")


def check_terms(run: Run) -> None:
    """Traces every distinct stage's step once without compiling; a wrong loss name ends here."""
    for stage in {stage.program: stage for stage in run.stages}.values():
        state = run.abstract_state(stage)
        weights = {name: np.float32(1) for name in stage.losses}
        rates = optim.rates(stage, run.groups.names, 0)
        try:
            jax.eval_shape(
                lambda s, b, r, w: step.train_step(
                    s,
                    b,
                    r,
                    w,
                    task=run.task,
                    stage=stage.program,
                    groups=run.groups,
                    settings=run.settings,
                ),
                state,
                run.batch,
                rates,
                weights,
            )
        except ValueError as error:
            if 'loss_weights' in str(error):
                raise UserError(f'stage.{stage.name}: {error}') from None
            raise
