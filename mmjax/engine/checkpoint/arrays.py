"""Reads the arrays of one step directory through Orbax, strictly or in part.

Trees are handled in flat form: {('a', 'b', 'kernel'): leaf}.
"""

import collections
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax.traverse_util import unflatten_dict
from jaxtyping import PyTree

from mmjax.engine.checkpoint import checksums
from mmjax.errors import UserError

Path = tuple[str, ...]
T = TypeVar('T')
_MAX_NAMES = 5  # leaves that an error message lists


# Orbax logs dozens of INFO lines per save; its warnings and our own lines pass.
logging.getLogger('absl').addFilter(
    lambda record: record.levelno >= logging.WARNING or 'orbax' not in record.pathname
)


def handler() -> ocp.CompositeCheckpointHandler:
    """Returns the Orbax handler of a step: the arrays as `state`, the JSON as `meta`."""
    # zstd shrinks float32 weights by 7 % and makes a save three times as long.
    return ocp.CompositeCheckpointHandler(
        state=ocp.PyTreeCheckpointHandler(use_compression=False),
        meta=ocp.JsonCheckpointHandler(filename=checksums.META),
    )


def on_first(function: Callable[[], T]) -> T:
    """Calls `function` on process 0; returns its JSON result, or raises its error, on all."""
    if jax.process_count() == 1:
        return function()
    from jax.experimental import multihost_utils

    message = b''
    if jax.process_index() == 0:
        try:
            message = json.dumps({'value': function()}).encode()
        except Exception as error:  # the others must not wait for a process that has left
            message = json.dumps({'error': str(error) or type(error).__name__}).encode()
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(message))))
    padded = np.frombuffer(message.ljust(size), np.uint8)
    answer = json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded))))
    if 'error' in answer:
        raise UserError(answer['error'])
    return answer['value']


def flatten(tree: PyTree) -> tuple[dict[Path, PyTree], jax.tree_util.PyTreeDef]:
    """Returns ({path: leaf}, treedef), in the order of the tree; empty subtrees have no leaf."""
    pairs, treedef = jax.tree.flatten_with_path(tree)
    name = lambda key: jax.tree_util.keystr((key,), simple=True)
    return {tuple(map(name, path)): leaf for path, leaf in pairs}, treedef


def join_paths(paths: Iterable[Path]) -> str:
    """Formats paths for a message: the first few, and how many more there are."""
    names = sorted('/'.join(path) for path in paths)
    more = f' and {len(names) - _MAX_NAMES} more' if len(names) > _MAX_NAMES else ''
    return ', '.join(names[:_MAX_NAMES]) + more


def specs(step: epath.Path) -> dict[Path, jax.ShapeDtypeStruct]:
    """Returns {path: shape and dtype} of the leaves in a step directory."""
    with ocp.Checkpointer(handler()) as checkpointer:
        tree = checkpointer.metadata(step).item_metadata['state'].tree
    return {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in flatten(tree)[0].items()}


def read(step: epath.Path, leaves: Mapping[Path, jax.ShapeDtypeStruct]) -> dict[Path, np.ndarray]:
    """Returns those `leaves` of a step directory as whole NumPy arrays."""
    arguments = {path: ocp.RestoreArgs(restore_type=np.ndarray) for path in leaves}
    restored = _restore(step, leaves, arguments, partial=True)
    return {path: np.asarray(restored[path]) for path in leaves}


def restore(step: epath.Path, template: PyTree) -> PyTree:
    """Returns a step's state in the structure, shapes, dtypes and shardings of `template`.

    Raises:
      UserError: if a leaf is missing or unknown, or has another shape or dtype; Orbax itself
        casts dtypes silently.
    """
    expected, treedef = flatten(template)
    _check_fit(step, specs(step), expected)
    on_one_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    arguments = {
        path: ocp.ArrayRestoreArgs(
            sharding=getattr(leaf, 'sharding', None) or on_one_device,
            global_shape=leaf.shape,
            dtype=leaf.dtype,
        )
        for path, leaf in expected.items()
    }
    restored = _restore(step, expected, arguments, partial=False)
    return jax.tree.unflatten(treedef, [restored[path] for path in expected])


def _restore(
    step: epath.Path,
    template: Mapping[Path, jax.ShapeDtypeStruct],
    arguments: Mapping[Path, ocp.RestoreArgs],
    *,
    partial: bool,
) -> dict[Path, jax.Array | np.ndarray]:
    request = ocp.args.PyTreeRestore(
        item=unflatten_dict(template),
        restore_args=unflatten_dict(arguments),
        partial_restore=partial,
    )
    with ocp.Checkpointer(handler()) as checkpointer:
        restored = checkpointer.restore(step, args=ocp.args.Composite(state=request))
    leaves = flatten(restored.state)[0]
    for path, spec in template.items():
        leaf = leaves.get(path)
        if not isinstance(leaf, jax.Array | np.ndarray) or leaf.dtype != spec.dtype:
            raise UserError(f'checkpoint {step}: {"/".join(path)} could not be restored')
    return leaves


def _check_fit(
    step: epath.Path,
    saved: Mapping[Path, jax.ShapeDtypeStruct],
    expected: Mapping[Path, jax.ShapeDtypeStruct],
) -> None:
    faults: dict[str, list[Path]] = collections.defaultdict(list)
    faults['is missing'] = list(expected.keys() - saved.keys())
    faults['is unknown to the run'] = list(saved.keys() - expected.keys())
    for path in expected.keys() & saved.keys():
        old, new = saved[path], expected[path]
        if old.shape != tuple(new.shape):
            faults[f'has shape {old.shape} instead of {tuple(new.shape)}'].append(path)
        elif old.dtype != new.dtype:
            faults[f'is {old.dtype} instead of {new.dtype}'].append(path)
    texts = [f'{join_paths(paths)} {fault}' for fault, paths in faults.items() if paths]
    if texts:
        raise UserError(f'checkpoint {step} does not fit: {"; ".join(texts)}')
