"""What goes through Orbax: the handler, and reading a step strictly or in part.

Also the trees in the form that all of it uses: {('a', 'b', 'kernel'): leaf}.
"""

import collections
import json
import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from mmjax.engine.checkpoint import checksums
from mmjax.errors import UserError

Tree = Any  # a pytree of arrays
_SHOWN = 5  # leaves an error names


def _concerns_us(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING or 'orbax' not in record.pathname


# Orbax tells of every save in dozens of INFO lines; its warnings and our own lines pass.
logging.getLogger('absl').addFilter(_concerns_us)


def handler() -> ocp.CompositeCheckpointHandler:
    # zstd shrinks float32 weights by 7 % and makes a save three times as long.
    return ocp.CompositeCheckpointHandler(
        state=ocp.PyTreeCheckpointHandler(use_compression=False),
        meta=ocp.JsonCheckpointHandler(filename=checksums.META),
    )


def on_first(function: Callable[[], Any]) -> Any:
    """Runs `function` on process 0; every process gets its JSON result, or its error."""
    if jax.process_count() == 1:
        return function()
    from jax.experimental import multihost_utils

    answer = b''
    if jax.process_index() == 0:
        try:
            answer = json.dumps({'value': function()}).encode()
        except Exception as error:  # the others must not wait for a process that has left
            answer = json.dumps({'error': str(error) or type(error).__name__}).encode()
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(answer))))
    padded = np.frombuffer(answer.ljust(size), np.uint8)
    answer = json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded))))
    if 'error' in answer:
        raise UserError(answer['error'])
    return answer['value']


def leaves(tree: Tree) -> tuple[dict[tuple[str, ...], Any], Any]:
    """Returns ({path: leaf}, treedef), in the order of the tree; empty subtrees have no leaf."""
    pairs, treedef = jax.tree.flatten_with_path(tree)
    name = lambda key: jax.tree_util.keystr((key,), simple=True)
    return {tuple(map(name, path)): leaf for path, leaf in pairs}, treedef


def nest(flat: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for keys, leaf in flat.items():
        node = tree
        for key in keys[:-1]:
            node = node.setdefault(key, {})
        node[keys[-1]] = leaf
    return tree


def names(paths) -> str:
    names = sorted('/'.join(keys) for keys in paths)
    more = f' and {len(names) - _SHOWN} more' if len(names) > _SHOWN else ''
    return ', '.join(names[:_SHOWN]) + more


def shape(leaf) -> str:
    return f'({", ".join(map(str, leaf.shape))})'


def _saved(reader: ocp.Checkpointer, path: epath.Path) -> dict[tuple[str, ...], Any]:
    return leaves(reader.metadata(path).item_metadata['state'].tree)[0]


def shapes(path: epath.Path) -> dict[tuple[str, ...], Any]:
    """Returns {path: what has the shape and dtype} of the leaves in a step directory."""
    with ocp.Checkpointer(handler()) as reader:
        return _saved(reader, path)


def read(path: epath.Path, wants: Callable[[tuple[str, ...]], bool]) -> dict[tuple[str, ...], Any]:
    """Returns the leaves of a step directory that `wants` picks, as whole NumPy arrays."""
    with ocp.Checkpointer(handler()) as reader:
        wanted = {keys: leaf for keys, leaf in _saved(reader, path).items() if wants(keys)}
        items = ocp.args.PyTreeRestore(
            item=nest({k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in wanted.items()}),
            restore_args=nest({k: ocp.RestoreArgs(restore_type=np.ndarray) for k in wanted}),
            partial_restore=True,
        )
        found = leaves(reader.restore(path, args=ocp.args.Composite(state=items)).state)[0]
    lost = [k for k in wanted if isinstance(found.get(k), jax.ShapeDtypeStruct | None)]
    if lost:
        raise UserError(f'checkpoint {path}: {names(lost)} could not be restored')
    return {keys: np.asarray(found[keys]) for keys in wanted}


def restore(path: epath.Path, template: Tree) -> Tree:
    """Returns a step's state in the structure, shapes, dtypes and shardings of `template`.

    Raises:
      UserError: if a leaf is missing, is too many, or has another shape or dtype; Orbax itself
        casts dtypes silently.
    """
    wanted, treedef = leaves(template)
    with ocp.Checkpointer(handler()) as reader:
        _check_fits(path, _saved(reader, path), wanted)
        how = {}
        for keys, leaf in wanted.items():
            sharding = getattr(leaf, 'sharding', None)
            sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            how[keys] = ocp.ArrayRestoreArgs(
                sharding=sharding, global_shape=leaf.shape, dtype=leaf.dtype
            )
        items = ocp.args.PyTreeRestore(item=nest(wanted), restore_args=nest(how))
        found = leaves(reader.restore(path, args=ocp.args.Composite(state=items)).state)[0]
    for keys, leaf in wanted.items():
        value = found.get(keys)
        if not isinstance(value, jax.Array) or value.dtype != leaf.dtype:
            raise UserError(f'checkpoint {path}: {"/".join(keys)} could not be restored')
    return jax.tree.unflatten(treedef, [found[keys] for keys in wanted])


def _check_fits(path: epath.Path, saved: Mapping, wanted: Mapping) -> None:
    faults = collections.defaultdict(list)
    for keys in wanted.keys() - saved.keys():
        faults['is missing'].append(keys)
    for keys in saved.keys() - wanted.keys():
        faults['is unknown to the run'].append(keys)
    for keys in wanted.keys() & saved.keys():
        want, have = wanted[keys], saved[keys]
        if tuple(have.shape) != tuple(want.shape):
            faults[f'has shape {shape(have)} instead of {shape(want)}'].append(keys)
        elif np.dtype(have.dtype) != np.dtype(want.dtype):
            faults[f'is {np.dtype(have.dtype)} instead of {np.dtype(want.dtype)}'].append(keys)
    if faults:
        text = '; '.join(f'{names(found)} {fault}' for fault, found in faults.items())
        raise UserError(f'checkpoint {path} does not fit: {text}')
