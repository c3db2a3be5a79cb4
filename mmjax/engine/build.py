"""From a config to a run: task, plan, groups, mesh and settings, all built before step 0."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from mmjax.data import pipeline, samplers
from mmjax.data.dataset import Dataset
from mmjax.engine import config as config_lib
from mmjax.engine import evaluate, optim, parallel, stages, step
from mmjax.engine.checkpoint import run_of
from mmjax.engine.config import Config
from mmjax.engine.stages import Stage
from mmjax.engine.task import Cached, Evaluator, Task, Variables, towers_training
from mmjax.errors import UserError
from mmjax.losses.term import Term


@dataclasses.dataclass
class Run:
    """Everything a mode needs."""

    config: Config
    task: Task
    mesh: jax.sharding.Mesh
    settings: step.Settings
    stages: tuple[Stage, ...]
    groups: optim.Groups
    data: Dataset
    evaluators: dict[str, Evaluator]
    final_weights: dict[str, float]  # term → weight at the end of the run
    fingerprint: dict[str, Any]
    abstract: Variables  # variables as jax.ShapeDtypeStruct
    batch: dict[str, np.ndarray]  # zeros in the shape of a batch
    warnings: list[str]

    def evaluates(self, stage: Stage, stage_step: int) -> bool:
        """Whether an evaluation is due after `stage_step` updates of a stage."""
        spec = self.config.evaluate
        every = spec.every_steps
        if spec.every_epochs:
            every = max(round(spec.every_epochs * stage.steps_per_epoch), 1)
        return stage_step == stage.steps or bool(every and stage_step % every == 0)

    def sampler(self, stage: Stage) -> samplers.Sampler:
        return _sampler(stage, self.data, self.config)

    def abstract_state(self, stage: Stage) -> step.State:
        """Returns the state in `stage` as ShapeDtypeStructs with their shardings."""
        make = lambda variables: step.create(variables, stage, self.groups, self.settings)
        shapes = jax.eval_shape(make, self.abstract)
        return parallel.with_shardings(shapes, self.mesh)

    def shardings(self, stage: Stage) -> step.State:
        """Returns the shardings of the state in `stage`."""
        return jax.tree.map(lambda x: x.sharding, self.abstract_state(stage))

    def train_step(self, stage: Stage) -> Callable[..., tuple[step.State, dict[str, jax.Array]]]:
        """Returns `step.train_step` as a function of state, batch, rates and weights."""
        return functools.partial(
            step.train_step,
            task=self.task,
            stage=stage.compile_key,
            groups=self.groups,
            settings=self.settings,
        )

    def compiled_step(self, stage: Stage) -> jax.stages.Wrapped:
        """Returns the jitted `train_step`, which donates the state."""
        shardings = self.shardings(stage)
        return jax.jit(self.train_step(stage), donate_argnums=0, out_shardings=(shardings, None))

    def cached(self, stage: Stage) -> Cached | None:
        """Returns what the task caches in `stage`."""
        groups = self.groups.of(self.abstract['params'])
        return self.task.cache(stage, towers_training(self.task.towers, groups, stage))

    def abstract_batch(self, stage: Stage) -> dict[str, Any]:
        """Returns a batch of `stage` as ShapeDtypeStructs, cached outputs included."""
        rows = parallel.rows(self.mesh)
        struct = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=rows)
        batch = {name: struct(x.shape, x.dtype) for name, x in self.batch.items()}
        cached = self.cached(stage)
        if cached is not None:
            one = evaluate.blank_batch(cached.dataset, 1)
            outputs = jax.eval_shape(getattr(self.task, cached.method), self.abstract, one)
            for name, x in outputs.items():
                batch[f'cached_{name}'] = struct((len(self.batch['row']), *x.shape[1:]), x.dtype)
        return batch

    def init_variables(self) -> Variables:
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
        put = lambda new, old, s: jax.device_put(np.asarray(new, old.dtype), s)
        return jax.tree.map(put, loaded, self.abstract, shardings)


def task_class(name: str) -> type[Task]:
    """Returns the class that `config.task` names: 'comic' or 'package.module:Class'."""
    module, _, cls = name.partition(':')
    path = module if cls else f'mmjax.recipes.{module}.task'
    members = vars(config_lib.import_task_module(path, name))
    if cls:
        candidates = [members.get(cls)]
    else:
        candidates = [x for x in members.values() if getattr(x, '__module__', '') == path]
    tasks = [x for x in candidates if inspect.isclass(x) and issubclass(x, Task)]
    if len(tasks) != 1:
        raise UserError(f"config.task '{name}' names no Task")
    return tasks[0]


def run(
    config: Mapping | Config,
    *,
    assets: epath.PathLike | None = None,
    init_from: str | None = None,
    data_only: bool = False,
) -> Run:
    """Builds the run that a config describes.

    Args:
      config: of ml_collections or already resolved.
      assets: a workdir whose saved tokenizer and the like are used instead of fresh ones.
      init_from: whose weights the run will take; without `assets`, and unless init.assets is
        False, it uses what is saved there: weights mean nothing to another vocabulary.
      data_only: stop at the task, which has prepared its data: they need not fill a batch, and the
        fields of a plan and a model are empty.

    Raises:
      UserError: a fault of the config or the data.
    """
    config = config if isinstance(config, Config) else config_lib.resolve(config)
    cls = task_class(config.task)
    warnings = [f'stage.{name} is not in stages' for name in stages.unused(config)]
    if config.init.assets and init_from and assets is None:
        assets = run_of(init_from)
        warnings += [f'tokenizer and the like are those of {assets}'] if assets else []
    parsed = stages.parse(config)
    mesh = parallel.mesh(config.mesh.data, config.mesh.fsdp)
    settings = step.Settings(config.seed, config.accumulation, config.precision, config.ema)
    parallel.check_batch(config.batch_size, settings.accumulation, mesh)

    task = cls(config, assets=None if assets is None else epath.Path(assets))
    data = task.dataset('train')
    evaluators = task.evaluators()
    make = functools.partial(
        Run,
        config=config,
        task=task,
        mesh=mesh,
        settings=settings,
        data=data,
        evaluators=evaluators,
        final_weights=stages.final_weights(config),
        fingerprint={
            **data.fingerprint(),
            'seed': settings.seed,
            'batch_size': config.batch_size,
        },
        warnings=warnings,
    )
    if data_only:
        return make(stages=(), groups=optim.Groups(()), abstract={}, batch={})
    _check_metrics(config, parsed, evaluators)
    plan = stages.plan(
        parsed, lambda stage: _sampler(stage, data, config).steps_per_epoch, config.batch_size
    )
    batch = _blank_batch(data, _sampler(plan[0], data, config), config.seed)
    abstract = jax.eval_shape(task.init, jax.random.key(0), batch)
    groups = optim.resolve(
        abstract['params'], abstract.get('batch_stats', {}), config.rules, task.rules()
    )
    optim.check_groups(groups, plan)
    towers_training(task.towers, groups.of(abstract['params']), plan[0])
    warnings += optim.warnings(groups, plan)
    return make(stages=plan, groups=groups, abstract=abstract, batch=batch)


def _sampler(stage: Stage, data: Dataset, config: Config) -> samplers.Sampler:
    return samplers.make(
        stage.sampler,
        data.index,
        len(data),
        config.batch_size,
        seed=config.seed,
        stage=stage.index,
        lengths=data.lengths,
        where=f'stage.{stage.name}.sampler',
    )


def _blank_batch(data: Dataset, sampler: samplers.Sampler, seed: int) -> dict[str, np.ndarray]:
    """Returns the first batch of a run with zeros in it: shapes and types to build on."""
    batches = pipeline.batches(data, sampler, seed=seed, stage=0, stop=1, train=True, threads=0)
    return {key: np.zeros_like(value) for key, value in next(iter(batches)).items()}


def _check_metrics(config: Config, parsed: list, evaluators: Mapping[str, Evaluator]) -> None:
    """Raises where a metric to watch does not begin with the name of a running evaluator."""
    known = [name for name, evaluator in evaluators.items() if not evaluator.final_only]
    watched = [('best.metric', config.best.metric)]
    watched += [(f'stage.{s.name}.early_stop.metric', s.early_stop.metric) for s, _ in parsed]
    for key, metric in watched:
        if metric and metric.split('/')[0] not in known:
            raise UserError(
                f"{key} '{metric}' is not '<evaluator>/<metric>'; evaluators while training: "
                f'{", ".join(known) or "none"}'
            )


def check(run: Run) -> None:
    """Traces every distinct stage's step and evaluation once, without compiling.

    A wrong loss name, of weight 0 too, and a fault in a method of an evaluator end the run here.
    """
    for stage in {stage.compile_key: stage for stage in run.stages}.values():
        state = run.abstract_state(stage)
        weights = {name: np.float32(1) for name in stage.losses}
        rates = optim.rates(stage, run.groups.names, 0)
        try:
            jax.eval_shape(run.train_step(stage), state, run.abstract_batch(stage), rates, weights)
        except ValueError as error:
            if 'loss_weights' in str(error):
                raise UserError(f'stage.{stage.name}: {error}') from None
            raise
        weighing = evaluate.LossWeights.of(stage, 0, run.final_weights)
        evaluate.check(run.evaluators, run.task, weighing, run.abstract)
    _check_unused_losses(run)


def _check_unused_losses(run: Run) -> None:
    """Raises for a name of loss_weights that no stage weighs and that is none of the losses."""
    weights = {'loss_weights': run.config.loss_weights}
    for name, section in run.config.stage.items():
        weights[f'stage.{name}.loss_weights'] = section.loss_weights
    known = {name for stage in run.stages for name in stage.losses}
    unknown = []
    for where, name in ((where, name) for where, names in weights.items() for name in names):
        if name not in known:
            terms = _terms(run, name)
            known |= terms
            unknown += [] if name in terms else [(where, name)]
    for where, name in unknown:
        raise UserError(stages.unknown_loss(where, name, sorted(known)))


def _terms(run: Run, name: str) -> set[str]:
    """Returns the losses that the last stage computes if it weighs `name` too."""
    stage = run.stages[-1].compile_key
    stage = dataclasses.replace(stage, loss_weights=(*stage.loss_weights, (name, 1.0)))

    def trace(variables: Variables, batch: Mapping) -> dict[str, Any]:
        outputs = evaluate.forward(run.task, stage, variables, batch)
        return run.task.terms(variables, outputs, batch, stage)

    try:
        terms = jax.eval_shape(trace, run.abstract, run.batch)
    except Exception:  # a loss of the task, as the name makes a difference, but not of this model
        return {name}
    return {name for name, term in terms.items() if isinstance(term, Term)}
