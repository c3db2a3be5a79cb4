"""The interface between the engine and a recipe: `Task`, `Evaluator` and what they return."""

import abc
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mmjax.data.dataset import Dataset
from mmjax.engine.stages import Stage
from mmjax.losses.term import Term

Batch = Mapping[str, jax.Array]
Variables = Mapping[str, Any]  # {'params': …, 'batch_stats': …}, as Linen has them
# apply(method, dataset, batch_size) yields (outputs, batch) a batch, as NumPy arrays without the
# padding rows, every example once and in order on every host.
Apply = Callable[[str, Dataset, int], Iterator[tuple[Any, dict[str, np.ndarray]]]]


@dataclasses.dataclass
class Scores:
    """What an evaluation found: numbers or short strings by name, and pictures by name."""

    metrics: dict[str, float | str]
    figures: dict[str, Any] = dataclasses.field(default_factory=dict)  # matplotlib Figures


@dataclasses.dataclass(frozen=True)
class Kept:
    """Outputs of parts frozen in a stage, to be computed once: see `Task.keep`."""

    method: str  # of the task, (variables, batch) → {name: array [batch, …]}
    dataset: Dataset  # of the rows to compute
    place: np.ndarray  # int [rows of 'train']: the row of `dataset` that has a row's outputs


def final_weights(loss_weights: Mapping[str, Any]) -> dict[str, float]:
    """Returns the weights that an evaluation sums losses with: of a schedule, where it ends."""
    return {
        name: float(weight['end'] if isinstance(weight, Mapping) else weight)
        for name, weight in loss_weights.items()
    }


def gather(
    apply: Apply, method: str, dataset: Dataset, batch_size: int, keys: Sequence[str] = ()
) -> tuple[Any, dict[str, np.ndarray]]:
    """Applies a method to a whole split; returns (outputs, those keys of its batches), joined.

    For outputs [batch, …] whose other sides are the same in every batch.
    """
    outputs, batches = [], []
    for output, batch in apply(method, dataset, batch_size):
        outputs.append(output)
        batches.append({key: batch[key] for key in keys})
    join = lambda *parts: np.concatenate(parts)
    return jax.tree.map(join, *outputs), jax.tree.map(join, *batches)


class Evaluator(abc.ABC):
    """Scores a model on one split; its key in `Task.evaluators` is the name in the results."""

    @abc.abstractmethod
    def run(self, apply: Apply, *, final: bool) -> Scores:
        """Scores the split; `final` at the end of a run: time for figures, or a better search."""


class Task(abc.ABC):
    """Ties a model, its losses, its data and its scores. Built from the config before step 0.

    A task keeps plain values, never the config itself, so that keys nobody read are known.
    `forward` and `terms` are traced: they must be pure. Rows of a batch are examples; the engine
    adds `row` (int32 [batch], the row in the dataset), `mask` (bool [batch], False on padding)
    and `key` (a PRNG key a row, from the step and the row's place in the global batch).
    """

    @abc.abstractmethod
    def dataset(self, split: str) -> Dataset:
        """Returns the split named in the config ('train' feeds the stages)."""

    @abc.abstractmethod
    def rules(self) -> tuple[tuple[str, str], ...]:
        """Returns the default (group, regex) pairs over parameter paths 'a/b/kernel'."""

    @abc.abstractmethod
    def init(self, key: jax.Array, batch: Batch) -> Variables: ...

    @abc.abstractmethod
    def forward(
        self, variables: Variables, batch: Batch, stage: Stage, *, train: bool, key: jax.Array
    ) -> tuple[Any, Any]:
        """Maps rows to a pytree of small per-row outputs [batch, …] and new batch statistics.

        stage: the `program` of a stage, which has no name: what differs between stages that learn
        the same from the same losses belongs in their options.
        """

    @abc.abstractmethod
    def terms(
        self, variables: Variables, outputs: Any, batch: Batch, stage: Stage
    ) -> dict[str, Term]:
        """Turns the outputs of the whole batch into the losses that `stage` may weigh.

        A float in place of a Term is a diagnostic: logged, never weighed.
        """

    @abc.abstractmethod
    def evaluators(self) -> dict[str, Evaluator]: ...

    def keep(self, stage: Stage) -> Kept | None:
        """Says which outputs of frozen parts the engine computes at the start of `stage`.

        Its batches have them as `kept_<name>`. They must follow from the row and from weights that
        the stage does not train: no dropout, no augmentation. They stay in the memory of every
        host, and from one stage to the next where both keep the same method.
        """
        return None

    def pretrained(self, variables: Variables) -> Variables:
        """Returns the fresh variables with published weights put in, where the config names any."""
        return variables

    def save_assets(self, workdir) -> None:
        """Writes what the model needs beside its weights: a tokenizer, a normalisation."""

    def predict(self, apply: Apply, inputs: str, output) -> str:
        """Answers `--mode=predict --input=…`; returns the text to print.

        A task that answers `--question` takes it as a further argument `question`.
        """
        raise ValueError(f'{type(self).__name__} has no predict mode')

    def embed(self, apply: Apply, output) -> str:
        """Answers `--mode=embed`: writes arrays under `output`; returns the text to print."""
        raise ValueError(f'{type(self).__name__} has no embed mode')

    def prepare(self, output) -> str:
        """Answers `--mode=prepare`, after the data are prepared; may write under `output`."""
        return ''

    def export(self, variables: Variables, output) -> str:
        """Writes the weights in published forms beside ours, for `--mode=export`."""
        return ''
