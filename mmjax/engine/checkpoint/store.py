"""Saves and restores one run: asynchronous, checksummed, the last few and the best."""

import json
import threading
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from mmjax.engine.checkpoint import arrays, checksums
from mmjax.engine.checkpoint.arrays import Tree
from mmjax.errors import UserError


class Checkpoints:
    """Saves and restores the states and the best weights of one run.

    Every process calls every method in the same order; process 0 alone hashes, moves and removes.
    Nothing on disk changes before the first save or `discard_after`, so that other programs may
    read the checkpoints of a run that goes on. Use as a context manager, or `close` before the
    interpreter ends: Orbax cannot finish a save while Python shuts down, and the save is lost.
    """

    def __init__(self, directory: epath.PathLike, *, keep: int, asynchronous: bool = True):
        if keep < 1:
            raise ValueError(f'keep must be at least 1, got {keep}')
        self._root = checksums.absolute(directory)
        self._keep = {'checkpoints': keep, 'best': 1}
        self._asynchronous = asynchronous
        self._rejected: dict[str, dict[int, str]] = {'checkpoints': {}, 'best': {}}
        self._swept: set[str] = set()
        self._verified: int | None = None  # the step that `newest` has just read through
        self._checkpointer: ocp.AsyncCheckpointer | None = None
        self._thread: threading.Thread | None = None
        self._error: UserError | None = None

    def __enter__(self):
        return self

    def __exit__(self, *unused):
        self.close()

    # Writing ---------------------------------------------------------------------------------

    def save(self, step: int, state: Tree, meta: Mapping[str, Any]) -> None:
        """Saves `state` (arrays) and `meta` (JSON), replacing what `step` had; returns early.

        The arrays may be donated or deleted once this returns. Blocks while an earlier save is
        still being written, and raises what went wrong with that.
        """
        self._save('checkpoints', step, state, meta)

    def save_best(self, step: int, weights: Tree, meta: Mapping[str, Any]) -> None:
        """As `save`; the earlier best is removed when this one is complete, checksums included.

        `weights` is {'params': …, 'batch_stats': …}, which is what `load_weights` looks for.
        """
        self._save('best', step, weights, meta)

    def wait(self) -> None:
        """Blocks until the save under way is complete; raises what went wrong with it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        try:
            self.wait()
        finally:
            if self._checkpointer is not None:
                self._checkpointer.close()
                self._checkpointer = None

    def discard_after(self, step: int) -> None:
        """Removes best weights of later steps than `step`: the run that restored it redoes them."""
        self.wait()
        folder = self._root / 'best'

        def remove():
            for later in checksums.steps(folder):
                if later > step:
                    checksums.remove(folder / str(later))

        arrays.on_first(remove)

    def _save(self, name: str, step: int, tree: Tree, meta: Mapping[str, Any]) -> None:
        self.wait()
        self._verified = None
        path = self._root / name / str(step)
        leaves = {keys: _checked(keys, leaf) for keys, leaf in arrays.leaves(tree)[0].items()}
        meta = json.loads(json.dumps(meta))  # a copy: the caller's may change under the write
        arrays.on_first(lambda: self._make_room(name, step))
        if self._checkpointer is None:
            self._checkpointer = ocp.AsyncCheckpointer(arrays.handler())
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(arrays.nest(leaves)), meta=ocp.args.JsonSave(meta)
        )
        self._checkpointer.save(path, args=items, force=True)
        self._thread = threading.Thread(target=self._finish, args=(name, path), name='checkpoint')
        self._thread.start()
        if not self._asynchronous:
            self.wait()

    def _make_room(self, name: str, step: int) -> None:
        """Sweeps what killed saves left, puts aside what `newest` rejected, frees the step."""
        folder = self._root / name
        folder.mkdir(parents=True, exist_ok=True)
        if name not in self._swept:
            for path in folder.iterdir():
                if '.orbax-checkpoint-tmp' in path.name:
                    path.rmtree()
            self._swept.add(name)
        for rejected, fault in self._rejected[name].items():
            # One cut save is kept, the last; damaged ones all are, for whoever looks for the cause.
            label = 'unfinished' if fault == checksums.UNFINISHED else rejected
            aside = self._root / 'corrupt' / f'{name}-{label}'
            if aside.exists():
                aside.rmtree()
            aside.parent.mkdir(parents=True, exist_ok=True)
            if (folder / str(rejected)).exists():
                (folder / str(rejected)).rename(aside)
        self._rejected[name] = {}
        if (folder / str(step)).exists():
            checksums.remove(folder / str(step))

    def _finish(self, name: str, path: epath.Path) -> None:
        """Runs in a thread: waits for Orbax, writes the checksums, only then removes old steps."""
        try:
            self._checkpointer.wait_until_finished()
            if jax.process_index() == 0:
                checksums.write(path)
                others = [step for step in checksums.steps(path.parent) if str(step) != path.name]
                for step in others[self._keep[name] - 1 :]:
                    checksums.remove(path.parent / str(step))
        except BaseException as error:
            self._error = UserError(f'{path} could not be saved: {error or type(error).__name__}')
            self._error.__cause__ = error

    # Reading ---------------------------------------------------------------------------------

    def newest(self) -> tuple[int, dict] | None:
        """Returns (step, meta) of the newest checkpoint whose checksums are right, None if none is.

        Later ones that are damaged or cut are told of in one warning and put aside at the next
        save. A single checkpoint that was cut counts as none: the run was killed in its first save.

        Raises:
          UserError: if there are checkpoints, none is good, and a kill does not explain it.
        """
        found = self._newest('checkpoints')
        self._verified = None if found is None else found[0]
        return found

    def best_meta(self) -> dict | None:
        """Returns the meta of the best weights, or None; raises as `newest` does."""
        found = self._newest('best')
        return None if found is None else found[1]

    def restore(self, step: int, template: Tree) -> Tree:
        """Returns the state of `step` in the structure of `template`, verified.

        Args:
          step: of a checkpoint; `newest` finds it.
          template: a pytree of jax.ShapeDtypeStruct (or arrays); a sharding says where a leaf goes,
            without one it goes to the first device. Empty subtrees are the template's affair.

        Raises:
          UserError: if a leaf is missing, is too many, or has another shape or dtype.
        """
        self.wait()
        path = self._root / 'checkpoints' / str(step)
        if step != self._verified:
            arrays.on_first(lambda: checksums.verify(path))
        self._verified = None
        return arrays.restore(path, template)

    def restore_best(self, template: Tree) -> Tree:
        """Returns the best weights; as `restore`. A UserError where there are none."""
        found = self._newest('best')
        if found is None:
            raise UserError(f'{self._root / "best"} holds no weights')
        return arrays.restore(self._root / 'best' / str(found[0]), template)

    def _newest(self, name: str) -> tuple[int, dict] | None:
        self.wait()

        def walk():
            found, self._rejected[name] = checksums.walk_back(self._root / name)
            return found

        found = arrays.on_first(walk)
        return None if found is None else (found[0], found[1])


def _checked(keys: tuple[str, ...], leaf: Any) -> Any:
    name = '/'.join(keys)
    if not isinstance(leaf, jax.Array | np.ndarray):
        raise ValueError(f'{name} is {type(leaf).__name__}; a checkpoint holds arrays')
    if not keys or not leaf.size or jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        raise ValueError(
            f'{name or "a bare array"} cannot be saved: {leaf.dtype}{arrays.shape(leaf)}'
        )
    # The caller may write into its NumPy array while it is being saved; into a jax one never.
    return np.array(leaf) if isinstance(leaf, np.ndarray) else leaf
