"""What the tests of a recipe need: data in memory, a run in this process, checks every task passes.

from mmjax import testing

def test_my_recipe(tmp_path):
    built = testing.build(config)
    testing.check_forward(built)
    results = testing.train(config, tmp_path / 'run')
"""

import os
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath

from mmjax.data.dataset import Dataset
from mmjax.engine import build as build_lib
from mmjax.engine import logs, modes
from mmjax.engine import train as train_lib
from mmjax.engine.build import Run
from mmjax.losses.term import Term


class Arrays(Dataset):
    """A dataset of arrays in memory.

    Args:
      split: its name.
      index: arrays [rows] that samplers read.
      noisy: names of arrays that get seeded Gaussian noise of std .05 in training.
      lengths: bucket lengths; the index then needs 'length'.
      arrays: name → [rows, …].
    """

    def __init__(
        self,
        split: str,
        index: Mapping[str, np.ndarray] | None = None,
        noisy: Sequence[str] = (),
        lengths: Sequence[int] = (),
        **arrays: np.ndarray,
    ):
        self.split = split
        self.arrays = arrays
        self.noisy = noisy
        self.index = index or {}
        self.lengths = lengths
        self.length_key = 'length' if lengths else None

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def example(self, row: int, rng: np.random.Generator, train: bool) -> dict[str, np.ndarray]:
        out = {name: np.asarray(array[row]) for name, array in self.arrays.items()}
        for name in self.noisy if train else ():
            out[name] = out[name] + rng.normal(0, 0.05, out[name].shape).astype(np.float32)
        return out

    def fingerprint(self) -> dict[str, str | int]:
        return {'name': 'arrays', 'version': '1', 'split': self.split, 'size': len(self)}


def build(config: ml_collections.ConfigDict) -> Run:
    """Builds a run and traces its steps and evaluations, as every mode does before step 0."""
    run = build_lib.run(config)
    build_lib.check(run)
    return run


def train(
    config: ml_collections.ConfigDict, workdir: str | os.PathLike[str], **options: object
) -> dict:
    """Trains in this process, without the checks of the command line; returns results.json."""
    folder = epath.Path(workdir)
    run = build_lib.run(config)
    modes.claim_workdir(folder, run, ['main'], anew=False)
    log = logs.Logs(folder, enabled=True, tensorboard=False)
    try:
        return train_lib.train(run, folder, log, **options)  # type: ignore[arg-type]  # passed on
    finally:
        log.close()
        jax.clear_caches()


def metrics(workdir: str | os.PathLike[str], prefix: str = 'loss') -> list[dict]:
    """Returns the lines of metrics.jsonl that have `prefix`: step, stage and what begins so."""
    lines, _ = logs.read(epath.Path(workdir) / 'metrics.jsonl')
    keep = lambda key: key in ('step', 'stage') or key.split('/')[0] == prefix
    return [{k: v for k, v in line.items() if keep(k)} for line in lines if prefix in line]


def first_batch(
    run: Run, rows: int = 4, *, train: bool = False
) -> dict[str, np.ndarray | jax.Array]:
    """Returns the first rows of the training split as a batch of the engine, with keys."""
    data = run.data
    rows = min(rows, len(data))
    rngs = (np.random.default_rng(row) for row in range(rows))
    examples = [data.example(row, rng, train) for row, rng in enumerate(rngs)]
    return {
        **data.collate(examples, max(data.lengths, default=0)),
        'row': np.arange(rows, dtype=np.int32),
        'mask': np.ones(rows, bool),
        'key': jax.random.split(jax.random.key(0), rows),
    }


def check_forward(run: Run, rows: int = 4) -> None:
    """Checks what every task owes the engine, on fresh weights and the first rows.

    * Outputs have a row per row of the batch.
    * With every tower frozen, two training steps and evaluation give the same outputs, and batch
      statistics stay: no dropout, no noise.
    * A row's outputs in evaluation do not depend on the other rows.
    * Terms are finite, and padding rows change none of them.
    """
    task = run.task
    stage = run.stages[-1].compile_key
    variables = run.init_variables()
    batch = first_batch(run, rows)
    count = len(batch['row'])
    frozen = dict.fromkeys(task.towers, False)

    @jax.jit
    def forward(batch: Mapping, key: jax.Array | None) -> tuple:
        return task.forward(variables, batch, stage, train=frozen, key=key)

    outputs, _ = forward(batch, None)
    for x in jax.tree.leaves(outputs):
        assert x.shape[:1] == (count,), f'an output of shape {x.shape} for {count} rows'
    before = variables.get('batch_stats', {})
    for seed in range(2):
        trained, stats = forward(batch, jax.random.key(seed))
        jax.tree.map(_assert_close, trained, outputs)
        jax.tree.map(np.testing.assert_array_equal, stats or {}, before if stats else {})

    alone, _ = forward({name: x[:1] for name, x in batch.items()}, None)
    jax.tree.map(lambda a, b: _assert_close(a, b[:1]), alone, outputs)

    terms = task.terms(variables, outputs, batch, stage)
    for name, term in terms.items():
        if isinstance(term, Term):
            assert np.isfinite(term.total) and np.isfinite(term.count), name
    if count > 1:
        padded = {**batch, 'mask': np.arange(count) < count - 1}
        short = {name: x[:-1] for name, x in batch.items()}
        with_padding = task.terms(variables, forward(padded, None)[0], padded, stage)
        without = task.terms(variables, forward(short, None)[0], short, stage)
        for name, term in without.items():
            if isinstance(term, Term):
                np.testing.assert_allclose(
                    with_padding[name].mean(), term.mean(), rtol=1e-4, atol=1e-6, err_msg=name
                )


def _assert_close(x: jax.Array, y: jax.Array) -> None:
    if jnp.issubdtype(x.dtype, jnp.floating):
        np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-5)
    else:
        np.testing.assert_array_equal(x, y)
