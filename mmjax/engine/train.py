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
from mmjax.engine.task import Variables, gather
from mmjax.errors import UserError


class NotFinite(UserError):
    """A loss, gradient or batch statistic was not finite, and the config says to stop."""


class StepLimit(Exception):
    """The run has made the updates that --max_steps allows, and is saved."""


@dataclasses.dataclass
class Progress:
    """What the host knows of a run beside its state; saved with every checkpoint."""

    best: dict[str, Any] | None = None  # {step, metric, value} of the best evaluation of the run
    stop_best: float | None = None  # of the early-stopping metric in this stage
    stop_wait: int = 0  # evaluations since it improved
    done: bool = False  # the stage is over, by length or early
    run_done: bool = False  # the run is over, early
    evaluate_due: bool = False  # the evaluation at this step is not done
    skipped: int = 0  # updates that were not finite
    sums: dict[str, list[float]] = dataclasses.field(default_factory=dict)  # of this epoch
    stages: dict = dataclasses.field(default_factory=dict)  # last loss terms of each stage


class Trainer:
    """Trains a `Run` in a workdir; continues what it finds there."""

    def __init__(
        self,
        run: Run,
        workdir: epath.Path,
        log: logs.Logs,
        preemption: Preemption,
        max_steps: int | None = None,
    ):
        self.run = run
        self.workdir = workdir
        self.log = log
        self.preemption = preemption
        self.max_steps = max_steps
        self.checkpoints = Checkpoints(workdir, keep=run.config.checkpoint.keep)
        self.progress = Progress()
        self._is_new = False  # whether there was no checkpoint to continue from
        self._compiled: dict[Stage, Any] = {}
        self._pending: tuple[int, Stage, dict[str, jax.Array], np.ndarray] | None = None
        self._cached: tuple[int, str, dict[str, np.ndarray]] = (-1, '', {})  # stage, method, arrays
        self._reset_clock()

    def _reset_clock(self) -> None:
        self._clock = time.perf_counter()
        self._since = 0

    # Start -----------------------------------------------------------------------------------

    def start(self, init_from: str | None, allow_data_change: bool) -> step.State:
        """Returns the newest good checkpoint's state, or a fresh one."""
        newest = self.checkpoints.newest()
        if newest is None:
            if parallel.is_first():
                logs.truncate(self.workdir / 'metrics.jsonl', -1)
            self.checkpoints.discard_after(-1)
            self._is_new = True
            return self._fresh(init_from)
        number, meta = newest
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
            variables, report = weights_from(self.run, init_from)
            self.log.message(f'weights from {report}')
        else:
            variables = self.run.init_variables()
        stage = self.run.stages[0]
        make = functools.partial(
            step.create, stage=stage, groups=self.run.groups, settings=self.run.settings
        )
        return jax.jit(make, out_shardings=self.run.shardings(stage))(variables)

    # Stages ----------------------------------------------------------------------------------

    def fit(self, state: step.State) -> step.State:
        """Runs what is left of every stage and returns the last state."""
        at = int(state['stage'])
        for stage in self.run.stages[at:]:
            if stage.index > at:
                state = self._enter_stage(state, stage)
            self._announce(state, stage)
            if self._is_new and stage.index == 0 and self.run.config.evaluate.at_start:
                self.progress.evaluate_due = True
            if self.progress.evaluate_due:
                self._evaluate_and_save(state, stage)
            if not self.progress.done:
                if self.max_steps is not None and int(state['step']) >= self.max_steps:
                    raise StepLimit
                state = self._stage(state, stage)
            if self.progress.run_done:
                break
        self.checkpoints.wait()
        return state

    def _enter_stage(self, state: step.State, stage: Stage) -> step.State:
        """Re-splits the state for `stage` and says what thawed, froze and was carried."""
        before = set(state['opt_state'])
        make = functools.partial(
            step.enter_stage, stage=stage, groups=self.run.groups, settings=self.run.settings
        )
        state = jax.jit(make, out_shardings=self.run.shardings(stage))(state)
        after = set(state['opt_state'])
        if stage.early_stop.scope == 'stage':
            self.progress.stop_best = None
            self.progress.stop_wait = 0
        self.progress.done = False
        self.progress.sums = {}
        previous = self.run.stages[stage.index - 1].optimizer.name
        carried = after & before if previous == stage.optimizer.name else set()
        text = lambda names: ', '.join(sorted(names)) or 'nothing'
        self.log.message(
            f'entering stage {stage.name}: thawed {text(after - before)}; '
            f'froze {text(before - after)}; carried the moments of {text(carried)}'
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

    def _step(self, stage: Stage) -> Any:
        key = stage.compile_key
        if key not in self._compiled:
            self._compiled[key] = self.run.compiled_step(stage)
        return self._compiled[key]

    def _stage(self, state: step.State, stage: Stage) -> step.State:
        run = self.run
        first = int(state['stage_step'])
        number = int(state['step'])
        call = self._step(stage)
        try:
            add_cached = self._cache(state, stage)
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
            workers=run.config.data.workers,
            threads=run.config.data.threads,
        )
        self._reset_clock()
        try:
            batches = pipeline.to_device(map(add_cached, host), parallel.rows(run.mesh))
            for at, (batch, rows) in enumerate(batches, start=first):
                rates = optim.rates(stage, run.groups.names, at)
                weights = {n: np.float32(value) for n, value in stage.weights(at).items()}
                state, metrics = call(state, batch, rates, weights)
                self._check_pending()
                number += 1
                done = at + 1
                self._pending = (number, stage, metrics, rows)
                self._since += 1
                last = done == stage.steps
                if number % run.config.log.every_steps == 0 or number == 1 or last:
                    self._log(number, stage, done, metrics, rates, weights)
                if last or done % stage.steps_per_epoch == 0:
                    self._log_epoch(number, stage, done)
                evaluates = run.evaluates(stage, done)
                preempted = self.preemption.at_step(number)
                limited = self.max_steps is not None and number >= self.max_steps
                self.progress.done = last
                self.progress.evaluate_due = evaluates
                due = number % run.config.checkpoint.every_steps == 0
                if due or last or preempted or limited:
                    self._save(state, stage)
                if evaluates and not (preempted or limited):
                    self._evaluate_and_save(state, stage)
                if preempted:
                    raise Preempted
                if limited:
                    raise StepLimit
                if self.progress.done:
                    break
            self._check_pending()
        finally:
            host.close()
        return state

    def _cache(self, state: step.State, stage: Stage) -> Callable[[dict], dict]:
        """Computes what the task caches in `stage`; returns what adds it to a local batch."""
        spec = self.run.cached(stage)
        if spec is None:
            return lambda batch: batch
        last, method, outputs = self._cached
        if method != spec.method or last < stage.index - 1:  # else frozen ever since: the same
            predictor = self._predictor(step.variables(state))
            outputs, _ = gather(predictor, spec.method, spec.dataset, self.run.config.batch_size)
            outputs = {f'cached_{name}': x for name, x in outputs.items()}
            size = sum(x.nbytes for x in outputs.values()) / 2**20
            self.log.message(f'cached {spec.method} of {len(spec.dataset)} rows: {size:.3g} MiB')
        self._cached = (stage.index, spec.method, outputs)
        rows = spec.rows
        take = lambda batch: {name: x[rows[batch['row']]] for name, x in outputs.items()}
        return lambda batch: {**batch, **take(batch)}

    # Points on the way -----------------------------------------------------------------------

    def _check_pending(self) -> None:
        """Reads the metrics of the step before the one in flight; raises NotFinite."""
        if self._pending is None:
            return
        number, stage, metrics, rows = self._pending
        self._pending = None
        if bool(metrics['ok']):
            self._add_to_epoch(jax.device_get(metrics))
            return
        self.progress.skipped += 1
        spec = self.run.config.not_finite
        values = {name: float(value) for name, value in metrics.items()}
        bundle = {'step': number, 'stage': stage.name, 'rows': np.asarray(rows).tolist(), **values}
        path = self.workdir / 'not_finite' / f'{number}-{jax.process_index()}.json'
        path.parent.mkdir(parents=True, exist_ok=True)
        logs.write_json(path, bundle)
        bad = ', '.join(name for name, value in values.items() if not math.isfinite(value))
        text = f'step {number} of stage {stage.name} is not finite ({bad or "the update"}): {path}'
        if spec.policy == 'skip' and self.progress.skipped <= spec.budget:
            self.log.message(f'{text}; skipped, {self.progress.skipped} of {spec.budget}')
            return
        raise NotFinite(text)

    def _add_to_epoch(self, metrics: dict[str, np.ndarray]) -> None:
        """Adds the losses of a step to the sums of its epoch: a term weighs by its count."""
        for name, value in metrics.items():
            if name == 'loss' or name.startswith('loss/'):
                if not math.isfinite(value):  # an overflow of float16, which is no fault
                    continue
                count = float(metrics.get(f'count/{name[5:]}', 1.0))
                sums = self.progress.sums.setdefault(name, [0.0, 0.0])
                sums[0] += float(value) * count
                sums[1] += count

    def _log_epoch(self, number: int, stage: Stage, done: int) -> None:
        """Logs the mean training losses of the epoch that ends here."""
        self._check_pending()
        sums = self.progress.sums
        means = {f'epoch/{name}': total / count for name, (total, count) in sums.items() if count}
        self.log.write(number, stage.name, done / stage.steps_per_epoch, means)
        self.progress.sums = {}

    def _log(
        self,
        number: int,
        stage: Stage,
        done: int,
        metrics: dict[str, jax.Array],
        rates: dict[str, np.float32],
        weights: dict[str, np.float32],
    ) -> None:
        values = {name: float(value) for name, value in metrics.items() if name != 'ok'}
        values |= {f'lr/{name}': float(value) for name, value in rates.items()}
        values |= {f'weight/{name}': float(value) for name, value in weights.items()}
        seconds = max(time.perf_counter() - self._clock, 1e-9)
        values['step_seconds'] = seconds / self._since
        values['examples_per_second'] = self.run.config.batch_size * self._since / seconds
        self._reset_clock()
        self.progress.stages[stage.name] = {
            name: value for name, value in values.items() if name.split('/')[0] == 'loss'
        }
        epoch = done / stage.steps_per_epoch
        self.log.write(number, stage.name, epoch, values)
        details = {'norm': values['grad_norm']}
        cosines = [value for name, value in values.items() if name.endswith('_cosine')]
        if cosines:
            details['cosine'] = cosines[0]
        if self.progress.skipped:
            details['skipped'] = self.progress.skipped
        self.log.progress(
            stage=stage.name,
            stages=len(self.run.stages),
            index=stage.index,
            epoch=epoch,
            step=number,
            steps=number - done + sum(s.steps for s in self.run.stages[stage.index :]),
            loss=values['loss'],
            rate=float(max(rates.values())),
            examples_per_second=values['examples_per_second'],
            details=details,
        )

    def _evaluate(self, state: step.State, stage: Stage) -> None:
        """Scores the weights, keeps the best, and decides whether the stage is over."""
        variables = step.variables(state, averaged=True)
        scores = self.scores(variables, stage, int(state['stage_step']), final=False)
        number = int(state['step'])
        progress = self.progress
        flat = {f'{e}/{m}': v for e, s in scores.items() for m, v in s.metrics.items()}
        epoch = int(state['stage_step']) / stage.steps_per_epoch
        self.log.write(number, stage.name, epoch, {f'eval/{k}': v for k, v in flat.items()})
        self.log.message(f'step {number}: ' + ', '.join(_show(k, v) for k, v in flat.items()))
        best = self.run.config.best
        if best.metric:
            value = _number(flat, best.metric, 'best.metric')
            if best.improved(value, progress.best['value'] if progress.best else None):
                progress.best = {'step': number, 'metric': best.metric, 'value': value}
                self.checkpoints.save_best(number, variables, progress.best)
        if stage.early_stop.metric:
            value = _number(flat, stage.early_stop.metric, 'early_stop.metric')
            if stage.early_stop.improved(value, progress.stop_best):
                progress.stop_best = value
                progress.stop_wait = 0
            else:
                progress.stop_wait += 1
            stops_run = stage.early_stop.scope == 'run'
            exhausted = progress.stop_wait >= stage.early_stop.patience
            if exhausted and (stops_run or not progress.done):
                progress.done = True
                progress.run_done = stops_run
                what = 'the run' if stops_run else f'stage {stage.name}'
                self.log.message(
                    f'{what} stops early: {stage.early_stop.metric} has not improved '
                    f'on {progress.stop_best} in {progress.stop_wait} evaluations'
                )
        self._reset_clock()

    def _evaluate_and_save(self, state: step.State, stage: Stage) -> None:
        """Evaluates; saves again only if it ends the stage or the run early."""
        self._check_pending()
        before = self.progress.done, self.progress.run_done
        try:
            self._evaluate(state, stage)
        except Preempted:
            self._save(state, stage)
            raise
        self.progress.evaluate_due = False
        if (self.progress.done, self.progress.run_done) != before:
            self._save(state, stage)

    def scores(
        self, variables: Variables, stage: Stage, stage_step: int, *, final: bool
    ) -> dict[str, evaluate.Scores]:
        weights = evaluate.LossWeights.of(stage, stage_step, self.run.final_weights)
        predictor = self._predictor(variables)
        return evaluate.run(self.run.evaluators, predictor, self.run.task, weights, final=final)

    def _predictor(self, variables: Variables) -> evaluate.Predictor:
        return evaluate.Predictor(
            self.run.task,
            variables,
            self.run.mesh,
            threads=self.run.config.data.threads,
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
        """Scores the best weights (the last if no metric picks them); writes results.json."""
        variables = step.variables(state, averaged=True)
        which = 'last'
        if self.checkpoints.best_meta():
            variables = self.checkpoints.restore_best(
                parallel.with_shardings(dict(self.run.abstract), self.run.mesh)
            )
            which = 'best'
        elif self.progress.best:
            self.log.message('the best checkpoint is gone: the last weights are scored instead')
        stage = self.run.stages[-1]
        scores = self.scores(variables, stage, stage.steps, final=True)
        number = int(state['step'])
        skipped = dict(self.run.data.skipped)
        if self.progress.skipped:
            skipped['updates not finite'] = self.progress.skipped
        for name, score in scores.items():
            self.log.figures(number, {f'{name}-{k}': v for k, v in score.figures.items()})
        if not parallel.is_first():
            return {}
        return logs.write_results(
            self.workdir,
            best=self.progress.best,
            stages=self.progress.stages,
            skipped=skipped,
            final={name: score.metrics for name, score in scores.items()},
            weights=which,
        )


def weights_from(run: Run, spec: str) -> tuple[Variables, str]:
    """Returns (fresh variables with another run's weights put in, what was loaded); see merge."""
    params, stats, source = load_weights(spec)
    loaded = {'params': params, 'batch_stats': stats} if stats else {'params': params}
    variables, report = merge(
        run.init_variables(),
        loaded,
        allow_fresh=run.config.init.allow_fresh,
        allow_unused=run.config.init.allow_unused,
    )
    return variables, f'{source}: {report}'


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
    max_steps: int | None = None,
) -> dict:
    """Trains `run` in `workdir` from wherever it stands, and returns the results.

    Raises:
      Preempted: a signal asked the run to stop; it is saved.
      StepLimit: the run has made `max_steps` updates; it is saved.
      UserError: a fault of the config, the data or the numbers.
    """
    with jax.set_mesh(run.mesh), Preemption() as preemption:
        trainer = Trainer(run, workdir, log, preemption, max_steps)
        try:
            state = trainer.fit(trainer.start(init_from, allow_data_change))
            return trainer.finish(state)
        finally:
            trainer.checkpoints.close()
