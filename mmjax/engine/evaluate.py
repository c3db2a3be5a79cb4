"""Runs a task's methods over a split: every example once, in order, on any number of hosts."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from mmjax.data import pipeline, samplers
from mmjax.data.dataset import Dataset
from mmjax.engine import parallel
from mmjax.engine.task import Scores


@functools.partial(jax.jit, static_argnums=(0, 1))
def _call(task, method: str, variables, batch):
    return getattr(task, method)(variables, batch)


class Apply:
    """`apply(method, dataset, batch_size)` as `mmjax.engine.task.Apply` describes it.

    The last batch is padded with masked rows, so that a method is compiled once a shape; the
    padding is cut before the caller sees it. `check` runs between batches and may raise.
    `variables` are the weights it applies, for what is no split.
    """

    def __init__(self, task, variables, mesh, *, threads=2, check: Callable = lambda: None):
        self._task, self.variables, self._mesh = task, variables, mesh
        self._threads, self._check = threads, check

    def __call__(
        self, method: str, dataset: Dataset, batch_size: int
    ) -> Iterator[tuple[Any, dict[str, np.ndarray]]]:
        devices = self._mesh.size
        batch_size = -(-min(batch_size, len(dataset)) // devices) * devices
        sampler = samplers.make(
            {'name': 'sequential', 'by': dataset.length_key},
            dataset.index,
            len(dataset),
            batch_size,
            seed=0,
            stage=0,
            lengths=dataset.lengths,
        )
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
        try:
            for batch, _ in pipeline.to_device(host, parallel.rows(self._mesh)):
                self._check()
                outputs = _call(self._task, method, self.variables, batch)
                outputs, batch = parallel.fetch((outputs, dict(batch)))
                real = batch['mask']
                yield jax.tree.map(lambda x: x[real], (outputs, batch))
        finally:
            host.close()


def run(evaluators, apply: Apply, *, final: bool) -> dict[str, Scores]:
    """Runs every evaluator; returns {its name: Scores}. A metric that is NaN stays NaN."""
    return {name: evaluator.run(apply, final=final) for name, evaluator in evaluators.items()}
