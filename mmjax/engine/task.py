"""The interface between the engine and a recipe: `Task`, `Evaluator` and what they return."""

import abc
import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Protocol, TypeAlias

import jax
import numpy as np
from etils import epath
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import PyTree

from mmjax.data.dataset import Dataset
from mmjax.engine import config
from mmjax.engine.stages import Stage
from mmjax.errors import UserError
from mmjax.losses.term import Term

Batch = Mapping[str, jax.Array]
Variables = Mapping[str, Any]  # {'params': …, 'batch_stats': …}, in Linen's layout
Outputs: TypeAlias = PyTree  # a pytree of per-row arrays [batch, …]


class Predictor(Protocol):
    """Applies a method of the task to a dataset, with the variables it holds.

    Yields (outputs, batch) per batch, as NumPy arrays without padding rows: every example once
    and in order, on every host.
    """

    variables: Variables

    def __call__(
        self, method: str, dataset: Dataset, batch_size: int
    ) -> Iterator[tuple[Outputs, dict[str, np.ndarray]]]: ...


@dataclasses.dataclass
class Scores:
    """The result of an evaluation: numbers or short strings by name, and figures by name."""

    metrics: dict[str, float | str]
    figures: dict[str, Any] = dataclasses.field(default_factory=dict)  # matplotlib Figures


@dataclasses.dataclass(frozen=True)
class SplitResults:
    """What the engine computed on a split, for an evaluator to score.

    outputs: what `Task.forward` returns for every row, in order, as NumPy arrays [rows, …]; axes
      of other lengths in other batches are padded with zeros.
    batch: the arrays of the batches that `Task.terms` reads, likewise, with 'row' and 'mask'.
    losses: term → mean, with 'loss' and 'final_loss'.
    """

    outputs: Outputs
    batch: Mapping[str, np.ndarray]
    losses: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Cached:
    """Outputs of frozen towers in a stage, computed once: see `Task.cache`."""

    method: str  # of the task, (variables, batch) → {name: array [batch, …]}
    dataset: Dataset  # of the rows to compute
    rows: np.ndarray  # int [rows of 'train']: the row of `dataset` that has a row's outputs


class Evaluator(abc.ABC):
    """Scores a model; its key in `Task.evaluators` is its name in the results.

    dataset: the split whose losses the engine computes beside the scores; None: no losses.
    batch_size: rows per batch.
    methods: names of the task's methods that `run` applies to `dataset`; they are traced before
      the first update, so that a fault in them ends the run there.
    final_only: run at the end of training only.
    """

    dataset: Dataset | None = None
    batch_size: int = 32
    methods: tuple[str, ...] = ()
    final_only: bool = False

    def loss_batches(self) -> Sequence[np.ndarray] | None:
        """Returns the rows of each batch that losses are computed on; None: one batch of all.

        Losses that compare rows depend on the batch.
        """
        return None

    @abc.abstractmethod
    def run(
        self, predict: Predictor, *, final: bool, results: SplitResults | None = None
    ) -> Scores:
        """Scores the split; the losses of `results` are reported by the engine.

        Args:
          predict: applies methods of the task.
          final: whether training is over: time for figures, or a better search.
          results: outputs and losses of `dataset`; None without one.
        """


class Task(abc.ABC):
    """Ties a model, its losses, its data and its scores. Built from the config before step 0.

    `forward` and `terms` are traced: they must be pure. Rows of a batch are examples; the engine
    adds `row` (int32 [batch], the row in the dataset), `mask` (bool [batch], False on padding)
    and `key` (a PRNG key per row, from the step and the row's place in the global batch).

    Config: the recipe's config class; the constructor gets an instance.
    verdicts: word among the scores → ('good', 'warn' or 'bad'; a sentence on it), for the report.
    """

    Config: ClassVar[type[config.Config]] = config.Config
    verdicts: ClassVar[Mapping[str, tuple[str, str]]] = {}

    def __init__(self, config: config.Config, assets: epath.Path | None = None):
        """Opens the data and builds the model; `assets`: a folder with saved assets, if any."""

    @property
    @abc.abstractmethod
    def towers(self) -> Mapping[str, str]:
        """Returns {tower: regex of its parameter paths 'a/b/kernel'}.

        A tower trains in a stage if the stage trains any parameter that its regex fully matches,
        whatever groups the config's rules make.
        """

    @abc.abstractmethod
    def dataset(self, split: str) -> Dataset:
        """Returns a split; 'train' feeds the stages."""

    @abc.abstractmethod
    def rules(self) -> tuple[tuple[str, str], ...]:
        """Returns the default (group, regex) pairs over parameter paths 'a/b/kernel'."""

    @abc.abstractmethod
    def init(self, key: jax.Array, batch: Batch) -> Variables:
        """Returns fresh variables."""

    @abc.abstractmethod
    def forward(
        self,
        variables: Variables,
        batch: Batch,
        stage: Stage,
        *,
        train: Mapping[str, bool],
        key: jax.Array | None,
    ) -> tuple[Outputs, PyTree]:
        """Maps rows to a pytree of small per-row outputs [batch, …] and new batch statistics.

        Args:
          stage: the `compile_key` of a stage: its options and losses, but no name.
          train: tower → whether it trains; one that does not runs as in evaluation. Outputs of
            frozen towers that are costly go through `tower_output`.
          key: for dropout; None in evaluation, where `train` is False for all towers.
        """

    @abc.abstractmethod
    def terms(
        self, variables: Variables, outputs: Outputs, batch: Batch, stage: Stage
    ) -> dict[str, Term | jax.Array | float]:
        """Turns the outputs of the whole batch into the losses that `stage` may weigh.

        A number in place of a Term is a diagnostic: logged, never weighed. In evaluation the
        batch is a whole split: read small arrays of it only.
        """

    @abc.abstractmethod
    def evaluators(self) -> dict[str, Evaluator]:
        """Returns the evaluators by name."""

    def cache(self, stage: Stage, train: Mapping[str, bool]) -> Cached | None:
        """Says which outputs of frozen towers the engine computes at the start of `stage`.

        Its batches have them as `cached_<name>`. They must follow from the row and from weights
        that the stage does not train: no dropout, no augmentation. They stay in the memory of
        every host, and from one stage to the next where both cache the same method.

        Args:
          train: tower → whether the stage trains it.
        """
        return None

    def pretrained(self, variables: Variables) -> Variables:
        """Returns fresh variables with the published weights that the config names put in.

        Where it names none, `variables` itself is returned, unchanged.
        """
        return variables

    def save_assets(self, workdir: epath.Path) -> None:
        """Writes what the model needs beside its weights: a tokenizer, a normalization."""

    takes_question: ClassVar[bool] = False  # whether `predict` answers a question about its input

    def predict(
        self, predict: Predictor, inputs: str, output: epath.Path, question: str | None = None
    ) -> str:
        """Answers `--mode=predict --input=…`; returns the text to print."""
        raise UserError(f'{type(self).__name__} has no predict mode')

    def embed(self, predict: Predictor, output: epath.Path) -> str:
        """Answers `--mode=embed`: writes arrays under `output`; returns the text to print."""
        raise UserError(f'{type(self).__name__} has no embed mode')

    def prepare(self, output: epath.Path) -> str:
        """Answers `--mode=prepare`, after the data are prepared; may write under `output`."""
        return ''

    def export(self, variables: Variables, output: epath.Path) -> str:
        """Writes the weights in published forms beside ours, for `--mode=export`."""
        return ''


def towers_training(
    towers: Mapping[str, str], groups: Mapping[str, str], stage: Stage
) -> dict[str, bool]:
    """Returns {tower: whether `stage` trains any of its parameters}.

    Args:
      towers: tower → regex, see `Task.towers`.
      groups: parameter path → group.
    """
    out = {}
    for name, regex in towers.items():
        own = {group for path, group in groups.items() if re.fullmatch(regex, path)}
        if not own:
            raise ValueError(f"tower '{name}': no parameter matches '{regex}'")
        out[name] = any(stage.trains(group) for group in own)
    return out


def tower_output(x: jax.Array, trains: bool) -> jax.Array:
    """Names the output of a frozen tower, so that micro-batches store it and do not recompute."""
    return x if trains else checkpoint_name(x, 'frozen')


def gather(
    predict: Predictor, method: str, dataset: Dataset, batch_size: int, keys: Sequence[str] = ()
) -> tuple[Outputs, dict[str, np.ndarray]]:
    """Applies a method to a whole split; returns (outputs, those keys of its batches), joined.

    Axes that differ between batches (buckets) are padded with zeros.
    """
    outputs = []
    batches = []
    for output, batch in predict(method, dataset, batch_size):
        outputs.append(output)
        batches.append({key: batch[key] for key in keys})
    return jax.tree.map(join_padded, *outputs), jax.tree.map(join_padded, *batches)


def join_padded(*parts: np.ndarray) -> np.ndarray:
    """Concatenates arrays [rows, …] along the rows; shorter other axes are padded with zeros."""
    shape = np.max([part.shape[1:] for part in parts], axis=0, initial=0)
    pad = lambda x: np.pad(
        x, [(0, 0)] + [(0, int(n) - m) for n, m in zip(shape, x.shape[1:], strict=True)]
    )
    return np.concatenate([x if tuple(shape) == x.shape[1:] else pad(x) for x in parts])
