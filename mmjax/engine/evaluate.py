"""Evaluation: a task's methods over a split, the losses of a split, the scores of evaluators."""

import contextlib
import dataclasses
import functools
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.data import pipeline, samplers
from mmjax.data.dataset import Dataset
from mmjax.engine import parallel
from mmjax.engine.stages import Stage, unknown_loss
from mmjax.engine.task import (
    Evaluator,
    Outputs,
    Scores,
    SplitResults,
    Task,
    Variables,
    join_padded,
)
from mmjax.errors import UserError
from mmjax.losses.term import Term


@functools.partial(jax.jit, static_argnums=(0, 1))
def _call(task: Task, method: str, variables: Variables, batch: Mapping) -> Outputs:
    return getattr(task, method)(variables, batch)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _forward(task: Task, stage: Stage, variables: Variables, batch: Mapping) -> Outputs:
    return forward(task, stage, variables, batch)


def forward(task: Task, stage: Stage, variables: Variables, batch: Mapping) -> Outputs:
    """Runs the forward pass of evaluation; what is random for a row follows from its number."""
    key = jax.random.key(0)
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(batch['row'])
    train = dict.fromkeys(task.towers, False)
    outputs, _ = task.forward(variables, {**batch, 'key': keys}, stage, train=train, key=None)
    return outputs


@functools.partial(jax.jit, static_argnums=(0, 1))
def _terms(
    task: Task, stage: Stage, variables: Variables, outputs: Outputs, batch: Mapping
) -> dict[str, Any]:
    return task.terms(variables, outputs, batch, stage)


class Predictor:
    """The `Predictor` of evaluators, over the devices of a mesh.

    The last batch is padded with masked rows, so that a method is compiled once per shape; the
    padding is cut before the caller sees it. `check` runs between batches and may raise.
    """

    def __init__(
        self,
        task: Task,
        variables: Variables,
        mesh: jax.sharding.Mesh,
        *,
        threads: int = 2,
        check: Callable[[], None] = lambda: None,
    ):
        self.variables = variables
        self._task = task
        self._mesh = mesh
        self._threads = threads
        self._check = check

    def __call__(
        self, method: str, dataset: Dataset, batch_size: int
    ) -> Iterator[tuple[Outputs, dict[str, np.ndarray]]]:
        return self._map(functools.partial(_call, self._task, method), dataset, batch_size)

    def forward(
        self, stage: Stage, dataset: Dataset, batch_size: int
    ) -> Iterator[tuple[Outputs, dict[str, np.ndarray]]]:
        """Applies the task's forward pass in the same way."""
        return self._map(functools.partial(_forward, self._task, stage), dataset, batch_size)

    def _map(
        self, call: Callable, dataset: Dataset, batch_size: int
    ) -> Iterator[tuple[Outputs, dict[str, np.ndarray]]]:
        devices = self._mesh.size
        batch_size = -(-min(batch_size, len(dataset)) // devices) * devices
        sampler = _sequential(dataset, batch_size)
        host = pipeline.batches(
            dataset,
            sampler,
            seed=0,
            stage=0,
            stop=sampler.steps_per_epoch,
            train=False,
            threads=self._threads,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        with contextlib.closing(host):
            for batch, _ in pipeline.to_device(host, parallel.rows(self._mesh)):
                self._check()
                outputs = call(self.variables, batch)
                outputs, batch = parallel.fetch((outputs, dict(batch)))
                real = batch['mask']
                yield jax.tree.map(lambda x: x[real], (outputs, batch))


@dataclasses.dataclass(frozen=True)
class LossWeights:
    """The loss weights that an evaluation sums with."""

    stage: Stage  # compile key of the stage whose options and losses are evaluated
    current: Mapping[str, float]  # weights of the stage at its current step
    final: Mapping[str, float]  # weights of the run after every ramp

    @staticmethod
    def of(stage: Stage, stage_step: int, final: Mapping[str, float]) -> 'LossWeights':
        current = stage.weights(stage_step)
        names = tuple((name, 1.0) for name in sorted({*current, *final}))
        return LossWeights(
            dataclasses.replace(stage.compile_key, loss_weights=names), current, final
        )


_Names = tuple[set[str], set[str]]
# task → compile key of a stage → names, see `arrays_read`; a task that is gone leaves nothing.
_NAMES: weakref.WeakKeyDictionary[Task, dict[Stage, _Names]] = weakref.WeakKeyDictionary()


class _Reads(Mapping):
    """A batch that records which of its arrays are read, by `in` too."""

    def __init__(self, batch: Mapping[str, jax.Array]):
        self.names: set[str] = set()
        self._batch = batch

    def __getitem__(self, name: str) -> jax.Array:
        value = self._batch[name]
        self.names.add(name)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._batch)

    def __len__(self) -> int:
        return len(self._batch)

    def __or__(self, other: Mapping) -> dict:
        return {**self, **other}


def arrays_read(
    task: Task, stage: Stage, variables: Variables, batch: Mapping
) -> tuple[set[str], set[str]]:
    """Returns the names of the arrays that `task.terms` reads and of its terms, by tracing once."""
    known = _NAMES.setdefault(task, {})
    if stage in known:
        return known[stage]
    read: set[str] = set()
    terms: set[str] = set()

    def trace(variables: Variables, batch: Mapping) -> None:
        outputs = forward(task, stage, variables, batch)
        reads = _Reads(batch)
        terms.update(task.terms(variables, outputs, reads, stage))
        read.update(reads.names)

    jax.eval_shape(trace, variables, dict(batch))
    known[stage] = read, terms
    return read, terms


def losses(
    predictor: Predictor, task: Task, evaluator: Evaluator, weights: LossWeights
) -> SplitResults:
    """Computes the losses of an evaluator's split by the task's own forward and terms.

    Beside each term's mean, 'loss' sums them with the stage's weights and 'final_loss' with the
    final ones of the run, which compares across stages.
    """
    assert evaluator.dataset is not None
    parts = []
    batches = []
    names: set[str] = set()
    for outputs, batch in predictor.forward(weights.stage, evaluator.dataset, evaluator.batch_size):
        if not names:
            read, _ = arrays_read(task, weights.stage, predictor.variables, batch)
            names = read | {'row', 'mask'}
        parts.append(outputs)
        batches.append({name: batch[name] for name in sorted(names)})
    outputs = jax.tree.map(join_padded, *parts)
    batch = jax.tree.map(join_padded, *batches)
    del parts, batches
    chosen_rows = evaluator.loss_batches()
    everything = outputs, batch
    totals: dict[str, list[float]] = {}
    for chosen in [slice(None)] if chosen_rows is None else chosen_rows:
        part = jax.tree.map(lambda x: jnp.asarray(x[chosen]), everything)
        for name, term in _terms(task, weights.stage, predictor.variables, *part).items():
            pair = (term.total, term.count) if isinstance(term, Term) else (term, 1.0)
            sums = totals.setdefault(name, [0.0, 0.0])
            sums[0] += float(pair[0])
            sums[1] += float(pair[1])
    means = {name: total / count if count else 0.0 for name, (total, count) in totals.items()}
    for name, by in (('loss', weights.current), ('final_loss', weights.final)):
        means[name] = sum(weight * means[term] for term, weight in by.items())
    return SplitResults(outputs, batch, means)


def run(
    evaluators: Mapping[str, Evaluator],
    predictor: Predictor,
    task: Task,
    weights: LossWeights,
    *,
    final: bool,
) -> dict[str, Scores]:
    """Runs every evaluator; returns {its name: Scores}. A metric that is NaN stays NaN."""
    out = {}
    for name, evaluator in evaluators.items():
        if evaluator.final_only and not final:
            continue
        if evaluator.dataset is None:
            out[name] = evaluator.run(predictor, final=final)
            continue
        results = losses(predictor, task, evaluator, weights)
        scores = evaluator.run(predictor, final=final, results=results)
        out[name] = Scores({**results.losses, **scores.metrics}, scores.figures)
    return out


def check(
    evaluators: Mapping[str, Evaluator], task: Task, weights: LossWeights, variables: Variables
) -> None:
    """Traces the losses and methods of every evaluator, without computing."""
    for evaluator in evaluators.values():
        if evaluator.dataset is None:
            continue
        batch = blank_batch(evaluator.dataset, min(evaluator.batch_size, len(evaluator.dataset)))
        _, terms = arrays_read(task, weights.stage, variables, batch)
        for name in sorted({*weights.current, *weights.final} - terms):
            raise UserError(unknown_loss('loss_weights', name, sorted(terms)))
        for method in evaluator.methods:
            jax.eval_shape(functools.partial(getattr(task, method)), variables, batch)


def blank_batch(dataset: Dataset, batch_size: int) -> dict[str, np.ndarray]:
    """Returns an evaluation batch with zeros in it: shapes and types to trace with."""
    sampler = _sequential(dataset, batch_size)
    batches = pipeline.batches(dataset, sampler, seed=0, stage=0, stop=1, train=False, threads=0)
    first = next(iter(batches))
    return {key: np.zeros_like(value) for key, value in first.items()}


def _sequential(dataset: Dataset, batch_size: int) -> samplers.Sampler:
    return samplers.make(
        {'name': 'sequential', 'by': dataset.length_key},
        dataset.index,
        len(dataset),
        batch_size,
        seed=0,
        stage=0,
        lengths=dataset.lengths,
    )
