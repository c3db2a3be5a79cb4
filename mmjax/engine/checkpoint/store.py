"""Saves and restores the last few states and the best weights of one run."""

import concurrent.futures
import json
from collections.abc import Mapping
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax.traverse_util import unflatten_dict
from jaxtyping import PyTree

from mmjax.engine.checkpoint import arrays, checksums
from mmjax.errors import UserError


class Checkpoints:
    """Saves and restores the states and the best weights of one run.

    Every process calls every method in the same order; only process 0 hashes, moves and removes
    files. Nothing on disk changes before the first save or `discard_after`, so other programs may
    read the checkpoints of a running run. Use it as a context manager, or call `close` before the
    interpreter ends: Orbax cannot finish a save while Python shuts down, and the save is lost.
    """

    def __init__(self, workdir: epath.PathLike, *, keep: int) -> None:
        self._workdir = checksums.absolute(workdir)
        self._keep = {'checkpoints': keep, 'best': 1}
        self._skipped: dict[str, dict[int, str]] = {'checkpoints': {}, 'best': {}}
        self._verified: int | None = None  # the step that `newest` has just verified
        self._checkpointer: ocp.AsyncCheckpointer | None = None
        self._pool = concurrent.futures.ThreadPoolExecutor(1, 'checkpoint')
        self._pending: concurrent.futures.Future | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Writing ---------------------------------------------------------------------------------

    def save(self, step: int, state: PyTree, meta: Mapping[str, object]) -> None:
        """Saves `state` (arrays) and `meta` (JSON), replaces an earlier `step`; returns early.

        The arrays may be donated or deleted once this returns. Blocks while an earlier save is
        still being written, and raises its error.
        """
        self._save('checkpoints', step, state, meta)

    def save_best(self, step: int, weights: PyTree, meta: Mapping[str, object]) -> None:
        """Like `save`; the earlier best is removed once this one is complete with its checksums.

        `weights` is {'params': …, 'batch_stats': …}, which is what `load_weights` looks for.
        """
        self._save('best', step, weights, meta)

    def wait(self) -> None:
        """Blocks until the current save is complete; raises its error, once."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        try:
            self.wait()
        finally:
            self._pool.shutdown()
            if self._checkpointer is not None:
                self._checkpointer.close()

    def discard_after(self, step: int) -> None:
        """Removes best weights of later steps: the run that restored `step` computes them again."""
        self.wait()
        folder = self._workdir / 'best'

        def remove() -> None:
            for later in checksums.steps(folder):
                if later > step:
                    checksums.remove(folder / str(later))

        arrays.on_first(remove)

    def _save(self, name: str, step: int, tree: PyTree, meta: Mapping[str, object]) -> None:
        self.wait()
        self._verified = None
        path = self._workdir / name / str(step)
        leaves = {key: _checked(key, leaf) for key, leaf in arrays.flatten(tree)[0].items()}
        meta = json.loads(json.dumps(meta))  # a copy: the caller may change it during the write
        arrays.on_first(lambda: self._prepare(name, step))
        if self._checkpointer is None:
            self._checkpointer = ocp.AsyncCheckpointer(arrays.handler())
        state = ocp.args.PyTreeSave(unflatten_dict(leaves))
        items = ocp.args.Composite(state=state, meta=ocp.args.JsonSave(meta))
        self._checkpointer.save(path, args=items, force=True)
        self._pending = self._pool.submit(self._finish, name, path, self._checkpointer)

    def _prepare(self, name: str, step: int) -> None:
        """Removes what killed saves left, moves skipped steps to corrupt/, removes `step`."""
        folder = self._workdir / name
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            if '.orbax-checkpoint-tmp' in path.name:
                path.rmtree()
        for skipped, fault in self._skipped[name].items():
            # Only the last unfinished step is kept; all damaged ones are, to look for the cause.
            label = 'unfinished' if fault == checksums.UNFINISHED else skipped
            target = self._workdir / 'corrupt' / f'{name}-{label}'
            if target.exists():
                target.rmtree()
            target.parent.mkdir(parents=True, exist_ok=True)
            if (folder / str(skipped)).exists():
                (folder / str(skipped)).rename(target)
        self._skipped[name] = {}
        if (folder / str(step)).exists():
            checksums.remove(folder / str(step))

    def _finish(self, name: str, path: epath.Path, checkpointer: ocp.AsyncCheckpointer) -> None:
        """Waits for Orbax, writes the checksums and only then removes old steps; in a thread."""
        try:
            checkpointer.wait_until_finished()
            if jax.process_index() == 0:
                checksums.write(path)
                others = [step for step in checksums.steps(path.parent) if str(step) != path.name]
                for step in others[self._keep[name] - 1 :]:
                    checksums.remove(path.parent / str(step))
        except BaseException as error:
            reason = str(error) or type(error).__name__
            raise UserError(f'{path} could not be saved: {reason}') from error

    # Reading ---------------------------------------------------------------------------------

    def newest(self) -> tuple[int, dict] | None:
        """Returns (step, meta) of the newest good checkpoint; None if there is none.

        One warning names later ones that are damaged or unfinished; the next save moves them to
        corrupt/. A single unfinished checkpoint counts as none: its run was killed in the first
        save.

        Raises:
          UserError: if there are checkpoints, none is good, and a kill does not explain it.
        """
        newest = self._newest('checkpoints')
        self._verified = newest[0] if newest else None
        return newest

    def best_meta(self) -> dict | None:
        """Returns the meta of the best weights, or None; raises like `newest`."""
        newest = self._newest('best')
        return newest[1] if newest else None

    def restore(self, step: int, template: PyTree) -> PyTree:
        """Returns the verified state of `step` in the structure of `template`.

        Args:
          step: of a checkpoint; see `newest`.
          template: a pytree of jax.ShapeDtypeStruct or arrays. A leaf without a sharding goes to
            the first device. Empty subtrees are not compared.

        Raises:
          UserError: if a leaf is missing or unknown, or has another shape or dtype.
        """
        self.wait()
        path = self._workdir / 'checkpoints' / str(step)
        if step != self._verified:
            arrays.on_first(lambda: checksums.verify(path))
        self._verified = None
        return arrays.restore(path, template)

    def restore_best(self, template: PyTree) -> PyTree:
        """Returns the best weights, like `restore`. Raises UserError if there are none."""
        newest = self._newest('best')
        if newest is None:
            raise UserError(f'{self._workdir / "best"} holds no weights')
        return arrays.restore(self._workdir / 'best' / str(newest[0]), template)

    def _newest(self, name: str) -> tuple[int, dict] | None:
        self.wait()

        def walk() -> tuple[int, dict] | None:
            newest, self._skipped[name] = checksums.walk_back(self._workdir / name)
            return newest

        newest = arrays.on_first(walk)
        return (newest[0], newest[1]) if newest else None  # JSON turns tuples into lists


def _checked(path: tuple[str, ...], leaf: object) -> jax.Array | np.ndarray:
    name = '/'.join(path) or 'a bare array'
    if not isinstance(leaf, jax.Array | np.ndarray):
        raise ValueError(f'{name} is {type(leaf).__name__}; a checkpoint holds arrays')
    if not path or not leaf.size or jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        raise ValueError(f'{name} cannot be saved: {leaf.dtype}{leaf.shape}')
    # The caller may write into its NumPy array during the save; a jax array never changes.
    return np.array(leaf) if isinstance(leaf, np.ndarray) else leaf
