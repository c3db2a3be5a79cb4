"""The training loop: stages one after the other, with logs, evaluations, checkpoints, resume."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath

from mmjax.data import pipeline
from mmjax.engine import evaluate, logs, optim, parallel, step
from mmjax.engine.build import Run
from mmjax.engine.checkpoint import Checkpoints, load_weights, merge
from mmjax.engine.config import differences
from mmjax.engine.preemption import Preempted, Preemption
from mmjax.engine.stages import Stage
from mmjax.engine.task import gather
from mmjax.errors import UserError


class NotFinite(UserError):
    """A loss, gradient, update or statistic was not finite, and the config says to stop."""


@dataclasses.dataclass
class Progress:
    """What the host knows of a run beside its state; saved with every checkpoint."""

    best: dict | None = None  # {step, metric, value} of the best evaluation of the run
    stop_best: float | None = None  # of the early-stopping metric in this stage
    stop_wait: int = 0  # evaluations since it improved
    done: bool = False  # the stage is over, by length or early
    evaluate_due: bool = False  # an evaluation at this step was interrupted
    skipped: int = 0  # updates refused as not finite
    stages: dict = dataclasses.field(default_factory=dict)  # last loss terms of each stage


class Trainer:
    """Trains a `Run` in a workdir; continues what it finds there."""

    def __init__(self, run: Run, workdir: epath.Path, log: logs.Logs, preemption: Preemption):
        self.run, self.workdir, self.log, self.preemption = run, workdir, log, preemption
        self.checkpoints = Checkpoints(workdir, keep=run.cadence.keep)
        self.progress = Progress()
        self._compiled: dict[Stage, Any] = {}
        self._pending: tuple[int, Stage, dict, np.ndarray] | None = None
        self._kept = -1, '', {}  # of frozen parts: last stage that kept, method, outputs
        self._clock, self._since = time.perf_counter(), 0

    # Start -----------------------------------------------------------------------------------

    def start(self, init_from: str | None, allow_data_change: bool) -> step.State:
        """Returns the newest good checkpoint's state, or a fresh one."""
        found = self.checkpoints.newest()
        if found is None:
            if parallel.is_first():
                logs.truncate(self.workdir / 'metrics.jsonl', -1)
            self.checkpoints.discard_after(-1)
            return self._fresh(init_from)
        number, meta = found
        changed = differences(meta['data'], self.run.fingerprint)
        if changed and not allow_data_change:
            what = '; '.join(f'{key} was {old!r}, is {new!r}' for key, old, new in changed)
            raise UserError(
                f'the data changed since step {number}: {what} (--allow_data_change goes on)'
            )
        self.progress = Progress(**meta['progress'])
        stage = self.run.stages[meta['stage']]
        state = self.checkpoints.restore(number, self.run.abstract_state(stage))
        self.checkpoints.discard_after(number)
        if parallel.is_first():
            keep = not self.progress.evaluate_due
            logs.truncate(self.workdir / 'metrics.jsonl', number, keep_evaluations_at_step=keep)
        self.log.message(f'continuing from step {number}, stage {stage.name}')
        return state

    def _fresh(self, init_from: str | None) -> step.State:
        if init_from:
            variables, found = weights_from(self.run, init_from)
            self.log.message(f'weights from {found}')
        else:
            variables = self.run.init_variables()
        stage = self.run.stages[0]
        make = functools.partial(
            step.create, stage=stage, groups=self.run.groups, settings=self.run.settings
        )
        shardings = jax.tree.map(lambda x: x.sharding, self.run.abstract_state(stage))
        return jax.jit(make, out_shardings=shardings)(variables)

    # Stages ----------------------------------------------------------------------------------

    def fit(self, state: step.State) -> step.State:
        """Runs what is left of every stage and returns the last state."""
        at = int(state['stage'])
        for stage in self.run.stages[at:]:
            if stage.index > at:
                state = self._enter(state, stage)
            self._announce(state, stage)
            if stage.index == 0 and not int(state['step']) and self.run.cadence.evaluate_at_start:
                self._evaluate(state, stage)
            if self.progress.evaluate_due:
                state = self._evaluate_and_save(state, stage)
            if not self.progress.done:
                state = self._stage(state, stage)
        self.checkpoints.wait()
        return state

    def _enter(self, state: step.State, stage: Stage) -> step.State:
        """Re-splits the state for `stage` and says what thawed, froze and was carried."""
        before = set(state['moments']['count'])
        make = functools.partial(
            step.enter, stage=stage, groups=self.run.groups, settings=self.run.settings
        )
        shardings = jax.tree.map(lambda x: x.sharding, self.run.abstract_state(stage))
        state = jax.jit(make, out_shardings=shardings)(state)
        after = set(state['moments']['count'])
        self.progress.stop_best, self.progress.stop_wait = None, 0
        self.progress.done = False
        say = lambda names: ', '.join(sorted(names)) or 'nothing'
        self.log.message(
            f'entering stage {stage.name}: thawed {say(after - before)}; '
            f'froze {say(before - after)}; carried the moments of {say(after & before)}'
        )
        return state

    def _announce(self, state: step.State, stage: Stage) -> None:
        weights = ', '.join(f'{k} {v:g}' for k, v in stage.weights(0).items())
        epochs = stage.steps / stage.steps_per_epoch
        self.log.message(
            f'stage {stage.name} ({stage.index + 1} of {len(self.run.stages)}): {stage.steps} '
            f'updates, {epochs:.3g} epochs of {stage.steps_per_epoch}; losses {weights}'
        )
        report = {k: v for k, v in self.run.sampler(stage).report.items() if v}
        if report:
            self.log.message(f'sampler: {", ".join(f"{k} {v:g}" for k, v in report.items())}')
        self.log.message(optim.table(self.run.abstract['params'], self.run.groups, stage))

    def _step(self, stage: Stage):
        if stage.program not in self._compiled:
            shardings = jax.tree.map(lambda x: x.sharding, self.run.abstract_state(stage))
            call = functools.partial(
                step.train_step,
                task=self.run.task,
                stage=stage.program,
                groups=self.run.groups,
                settings=self.run.settings,
            )
            made = jax.jit(call, donate_argnums=0, out_shardings=(shardings, None))
            self._compiled[stage.program] = made
        return self._compiled[stage.program]

    def _stage(self, state: step.State, stage: Stage) -> step.State:
        run, first = self.run, int(state['stage_step'])
        number, call = int(state['step']), self._step(stage)
        try:
            widen = self._keep(state, stage)
        except Preempted:
            self._save(state, stage)
            raise
        host = pipeline.batches(
            run.data,
            run.sampler(stage),
            seed=run.settings.seed,
            stage=stage.index,
            start=first,
            stop=stage.steps,
            train=True,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            **run.loader,
        )
        self._clock, self._since = time.perf_counter(), 0
        try:
            batches = pipeline.to_device(map(widen, host), parallel.rows(run.mesh))
            for at, (batch, rows) in enumerate(batches, start=first):
                rates, weights = optim.rates(stage, run.groups.names, at), stage.weights(at)
                weights = {name: np.float32(value) for name, value in weights.items()}
                state, metrics = call(state, batch, rates, weights)
                self._check_pending()
                number, done = number + 1, at + 1
                self._pending, self._since = (number, stage, metrics, rows), self._since + 1
                last = done == stage.steps
                if number % run.cadence.log == 0 or number == 1 or last:
                    self._log(number, stage, done, metrics, rates, weights)
                evaluates = run.cadence.evaluates(stage, done)
                preempted = self.preemption.at_step(number)
                self.progress.done, self.progress.evaluate_due = last, evaluates
                if evaluates and not preempted:
                    state = self._evaluate_and_save(state, stage, save=last)
                saves = number % run.cadence.checkpoint == 0 or preempted
                if saves and not (evaluates and not preempted and self.progress.done):
                    self._save(state, stage)
                if preempted:
                    raise Preempted
                if self.progress.done:
                    break
            self._check_pending()
        finally:
            host.close()
        return state

    def _keep(self, state: step.State, stage: Stage) -> Callable[[dict], dict]:
        """Computes what the task keeps in `stage`; returns what puts it into a local batch."""
        spec = self.run.task.keep(stage)
        if spec is None:
            return lambda batch: batch
        last, method, outputs = self._kept
        if method != spec.method or last < stage.index - 1:  # else frozen ever since: the same
            apply = self._apply(step.variables(state))
            outputs, _ = gather(apply, spec.method, spec.dataset, self.run.batch_size)
            outputs = {f'kept_{name}': x for name, x in outputs.items()}
            size = sum(x.nbytes for x in outputs.values()) / 2**20
            self.log.message(f'kept {spec.method} of {len(spec.dataset)} rows: {size:.3g} MiB')
        self._kept = stage.index, spec.method, outputs
        mine = lambda at: {name: x[at] for name, x in outputs.items()}
        return lambda batch: {**batch, **mine(spec.place[batch['row']])}

    # Points on the way -----------------------------------------------------------------------

    def _check_pending(self) -> None:
        """Looks at the step before the one in flight; raises NotFinite where it must."""
        if self._pending is None:
            return
        number, stage, metrics, rows = self._pending
        self._pending = None
        if bool(metrics['ok']):
            return
        self.progress.skipped += 1
        policy, budget = self.run.not_finite
        values = {name: float(value) for name, value in metrics.items()}
        bundle = {'step': number, 'stage': stage.name, 'rows': np.asarray(rows).tolist(), **values}
        path = self.workdir / 'not_finite' / f'{number}-{jax.process_index()}.json'
        path.parent.mkdir(parents=True, exist_ok=True)
        logs.write_json(path, bundle)
        bad = ', '.join(name for name, value in values.items() if not math.isfinite(value))
        text = f'step {number} of stage {stage.name} is not finite ({bad or "the update"}): {path}'
        if policy == 'skip' and self.progress.skipped <= budget:
            self.log.message(f'{text}; refused, {self.progress.skipped} of {budget}')
            return
        raise NotFinite(text)

    def _log(self, number, stage, done, metrics, rates, weights) -> None:
        values = {name: float(value) for name, value in metrics.items() if name != 'ok'}
        values |= {f'lr/{name}': float(value) for name, value in rates.items()}
        values |= {f'weight/{name}': float(value) for name, value in weights.items()}
        seconds = max(time.perf_counter() - self._clock, 1e-9)
        values['step_seconds'] = seconds / self._since
        values['examples_per_second'] = self.run.batch_size * self._since / seconds
        self._clock, self._since = time.perf_counter(), 0
        self.progress.stages[stage.name] = {
            name: value for name, value in values.items() if name.split('/')[0] == 'loss'
        }
        epoch = done / stage.steps_per_epoch
        self.log.write(number, stage.name, epoch, values)
        self.log.progress(
            stage=stage.name,
            stages=len(self.run.stages),
            index=stage.index,
            epoch=epoch,
            step=number,
            steps=number - done + sum(s.steps for s in self.run.stages[stage.index :]),
            loss=values['loss'],
            rate=max(rates.values()),
            examples_per_second=values['examples_per_second'],
        )

    def _evaluate(self, state: step.State, stage: Stage) -> None:
        """Scores the weights, keeps the best, and decides whether the stage is over."""
        scores = self.scores(step.variables(state, averaged=True), final=False)
        number, progress = int(state['step']), self.progress
        flat = {f'{e}/{m}': v for e, s in scores.items() for m, v in s.metrics.items()}
        epoch = int(state['stage_step']) / stage.steps_per_epoch
        self.log.write(number, stage.name, epoch, {f'eval/{k}': v for k, v in flat.items()})
        self.log.message(f'step {number}: ' + ', '.join(_show(k, v) for k, v in flat.items()))
        if self.run.best.metric:
            value = _number(flat, self.run.best.metric, 'best.metric')
            if self.run.best.improved(value, progress.best and progress.best['value']):
                progress.best = {'step': number, 'metric': self.run.best.metric, 'value': value}
                weights = step.variables(state, averaged=True)
                self.checkpoints.save_best(number, weights, progress.best)
        if stage.early_stop.metric:
            value = _number(flat, stage.early_stop.metric, 'early_stop.metric')
            if stage.early_stop.improved(value, progress.stop_best):
                progress.stop_best, progress.stop_wait = value, 0
            else:
                progress.stop_wait += 1
            if progress.stop_wait >= stage.early_stop.patience and not progress.done:
                progress.done = True
                self.log.message(
                    f'stage {stage.name} stops early: {stage.early_stop.metric} has not improved '
                    f'on {progress.stop_best} in {progress.stop_wait} evaluations'
                )
        self._clock, self._since = time.perf_counter(), 0

    def _evaluate_and_save(self, state: step.State, stage: Stage, save: bool = True) -> step.State:
        self._check_pending()
        try:
            self._evaluate(state, stage)
        except Preempted:
            self._save(state, stage)
            raise
        self.progress.evaluate_due = False
        if save or self.progress.done:
            self._save(state, stage)
        return state

    def scores(self, variables, *, final: bool) -> dict[str, evaluate.Scores]:
        return evaluate.run(self.run.evaluators, self._apply(variables), final=final)

    def _apply(self, variables) -> evaluate.Apply:
        return evaluate.Apply(
            self.run.task,
            variables,
            self.run.mesh,
            threads=self.run.loader['threads'],
            check=self.preemption.check,
        )

    def _save(self, state: step.State, stage: Stage) -> None:
        self._check_pending()
        meta = {
            'stage': stage.index,
            'data': self.run.fingerprint,
            'progress': dataclasses.asdict(self.progress),
        }
        self.log.flush()
        self.checkpoints.save(int(state['step']), state, meta)

    # End -------------------------------------------------------------------------------------

    def finish(self, state: step.State) -> dict:
        """Scores the best weights (the last where no metric picks them); writes results.json."""
        variables, which = step.variables(state, averaged=True), 'last'
        best = self.checkpoints.best_meta()
        if best:
            variables, which = self.checkpoints.restore_best(run_abstract(self.run)), 'best'
        elif self.progress.best:
            self.log.message('the best checkpoint is gone: the last weights are scored instead')
        scores = self.scores(variables, final=True)
        number = int(state['step'])
        skipped = dict(self.run.data.skipped)
        if self.progress.skipped:
            skipped['updates not finite'] = self.progress.skipped
        for name, score in scores.items():
            self.log.figures(number, {f'{name}-{k}': v for k, v in score.figures.items()})
        return (
            logs.write_results(
                self.workdir,
                best=self.progress.best,
                stages=self.progress.stages,
                skipped=skipped,
                final={name: score.metrics for name, score in scores.items()},
                weights=which,
            )
            if parallel.is_first()
            else {}
        )


def weights_from(run: Run, spec: str) -> tuple[Any, str]:
    """Returns (fresh variables with another run's weights put in, what was loaded); see merge."""
    params, stats, source = load_weights(spec)
    loaded = {'params': params, 'batch_stats': stats} if stats else {'params': params}
    fresh, unused = run.init
    variables, report = merge(run.init_variables(), loaded, allow_fresh=fresh, allow_unused=unused)
    return variables, f'{source}: {report}'


def run_abstract(run: Run) -> Any:
    """Returns the variables of a run as ShapeDtypeStructs with their shardings."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        dict(run.abstract),
        parallel.weights(dict(run.abstract), run.mesh),
    )


def _number(flat: dict, metric: str, key: str) -> float:
    if not isinstance(flat.get(metric), int | float | np.number):
        known = ', '.join(k for k, v in flat.items() if not isinstance(v, str))
        raise UserError(f"{key} '{metric}' is no number of the evaluation; there are {known}")
    return float(flat[metric])


def _show(name: str, value: Any) -> str:
    return f'{name} {value}' if isinstance(value, str) else f'{name} {value:.4g}'


def train(
    run: Run,
    workdir: epath.Path,
    log: logs.Logs,
    *,
    init_from: str | None = None,
    allow_data_change: bool = False,
) -> dict:
    """Trains `run` in `workdir` from wherever it stands, and returns the results."""
    with jax.set_mesh(run.mesh), Preemption() as preemption:
        trainer = Trainer(run, workdir, log, preemption)
        try:
            state = trainer.fit(trainer.start(init_from, allow_data_change))
            return trainer.finish(state)
        finally:
            trainer.checkpoints.close()
