"""Devices and hosts: starting processes, the mesh, and where batches and parameters live."""

import math
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mmjax.errors import UserError

AXES = ('data', 'fsdp')
MIN_SHARDED = 2**14  # elements; smaller leaves are cheaper whole than gathered


def start(coordinator: str | None = None, processes: int | None = None, index: int | None = None):
    """Joins the other processes of the run where flags or Slurm say that there are any.

    With none, a plain process is left alone (`jax.distributed.initialize` would raise there).
    Must run before anything touches a device.
    """
    given = [value is not None for value in (coordinator, processes, index)]
    if any(given):
        if not all(given):
            raise UserError('give --coordinator, --processes and --process together, or none')
        if not 0 <= index < processes:
            raise UserError(f'--process={index} is not below --processes={processes}')
        jax.distributed.initialize(coordinator, processes, index)
        return
    tasks = int(os.environ.get('SLURM_NTASKS', '1'))
    if tasks > 1 and 'SLURM_PROCID' in os.environ and 'SLURM_STEP_NODELIST' in os.environ:
        # Slurm's default is one device a process: with one task a node, take all of its devices.
        local = int(os.environ.get('SLURM_STEP_TASKS_PER_NODE', '1').split('(')[0].split(',')[0])
        visible = os.environ.get('CUDA_VISIBLE_DEVICES')
        ids = list(range(len(visible.split(',')))) if local == 1 and visible else None
        jax.distributed.initialize(local_device_ids=ids)


def mesh(axes: Mapping[str, int]) -> Mesh:
    """Makes the ('data', 'fsdp') mesh over all devices of all hosts; one -1 takes what is left.

    The axes are Auto: with Explicit ones, the default of `jax.make_mesh`, a contrastive
    `z @ z.T` of a sharded batch is an error.
    """
    if set(axes) != set(AXES):
        raise UserError(f'config.mesh needs the keys data and fsdp, not {", ".join(axes)}')
    shape, devices = [axes[name] for name in AXES], jax.device_count()
    known = math.prod(size for size in shape if size != -1)
    if shape.count(-1) == 1 and known > 0 and devices % known == 0:
        shape[shape.index(-1)] = devices // known
    if math.prod(shape) != devices or min(shape) < 1:
        raise UserError(
            f'config.mesh data={axes["data"]} × fsdp={axes["fsdp"]} does not make the '
            f'{devices} devices there are'
        )
    return jax.make_mesh(tuple(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def rows(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: rows over all devices, in the order of the mesh."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def weights(tree: Any, mesh: Mesh) -> Any:
    """Returns a sharding a leaf: the longest axis that `fsdp` divides, small leaves whole."""
    size = mesh.shape['fsdp']

    def one(leaf):
        shape = leaf.shape
        fits = [axis for axis in range(len(shape)) if shape[axis] % size == 0]
        if size == 1 or math.prod(shape) < MIN_SHARDED or not fits:
            return replicated(mesh)
        longest = max(fits, key=lambda axis: shape[axis])
        return NamedSharding(mesh, PartitionSpec(*(None,) * longest, 'fsdp'))

    return jax.tree.map(one, tree)


def with_shardings(tree: Any, mesh: Mesh) -> Any:
    """Returns a tree of ShapeDtypeStructs with the sharding of each leaf."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, weights(tree, mesh)
    )


def check_batch(batch_size: int, accumulation: int, mesh: Mesh) -> None:
    """Raises where the rows of a micro-batch do not divide over the devices."""
    if accumulation < 1 or batch_size % accumulation:
        raise UserError(f'batch_size={batch_size} is not a multiple of accumulation={accumulation}')
    if (batch_size // accumulation) % mesh.size:
        raise UserError(
            f'batch_size={batch_size} in {accumulation} micro-batches does not divide over '
            f'{mesh.size} devices'
        )


def fetch(tree: Any) -> Any:
    """Returns global arrays as NumPy on every host."""
    if jax.process_count() == 1:
        return jax.tree.map(np.asarray, tree)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(tree, tiled=True)


def barrier(name: str) -> None:
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def is_first() -> bool:
    """Whether this process writes what a run leaves."""
    return jax.process_index() == 0
