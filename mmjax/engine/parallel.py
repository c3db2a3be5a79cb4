"""Starts the processes of a run, makes the mesh, and places batches and parameters on it."""

import math
import os

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from mmjax.errors import UserError

AXES = ('data', 'fsdp')
MIN_SHARDED = 2**14  # elements; smaller leaves are not worth a gather


def start(
    coordinator: str | None = None, processes: int | None = None, index: int | None = None
) -> None:
    """Joins the other processes of the run, if the flags or Slurm name any.

    Leaves a single process alone (`jax.distributed.initialize` would raise there). Call it before
    anything uses a device.
    """
    if coordinator is not None and processes is not None and index is not None:
        if not 0 <= index < processes:
            raise UserError(f'--process={index} is not below --processes={processes}')
        jax.distributed.initialize(coordinator, processes, index)
        return
    if not all(value is None for value in (coordinator, processes, index)):
        raise UserError('give --coordinator, --processes and --process together, or none')
    tasks = int(os.environ.get('SLURM_NTASKS', '1'))
    if tasks > 1 and 'SLURM_PROCID' in os.environ and 'SLURM_STEP_NODELIST' in os.environ:
        # JAX takes one device per Slurm task; a task alone on its node takes all devices there.
        per_node = int(os.environ.get('SLURM_STEP_TASKS_PER_NODE', '1').split('(')[0].split(',')[0])
        visible = os.environ.get('CUDA_VISIBLE_DEVICES')
        ids = list(range(len(visible.split(',')))) if per_node == 1 and visible else None
        jax.distributed.initialize(local_device_ids=ids)


def mesh(data: int, fsdp: int) -> Mesh:
    """Makes the ('data', 'fsdp') mesh over all devices of all hosts; one size may be -1: the rest.

    The axes are Auto. With Explicit axes, the default of `jax.make_mesh`, a contrastive `z @ z.T`
    of a sharded batch is an error.
    """
    shape = [data, fsdp]
    devices = jax.device_count()
    known = math.prod(size for size in shape if size != -1)
    if shape.count(-1) == 1 and known > 0 and devices % known == 0:
        shape[shape.index(-1)] = devices // known
    if math.prod(shape) != devices or min(shape) < 1:
        raise UserError(
            f'config.mesh data={data} × fsdp={fsdp} does not make the {devices} devices of this run'
        )
    return jax.make_mesh(tuple(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def rows(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: rows over all devices, in the order of the mesh."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def weights(tree: PyTree, mesh: Mesh) -> PyTree:
    """Returns the sharding of every leaf: along its longest axis that `fsdp` divides.

    Leaves below `MIN_SHARDED` elements, and those without such an axis, are whole on every device.
    """
    size = mesh.shape['fsdp']

    def sharding(leaf: jax.Array | jax.ShapeDtypeStruct) -> NamedSharding:
        shape = leaf.shape
        fits = [axis for axis in range(len(shape)) if shape[axis] % size == 0]
        if size == 1 or math.prod(shape) < MIN_SHARDED or not fits:
            return NamedSharding(mesh, PartitionSpec())
        longest = max(fits, key=lambda axis: shape[axis])
        return NamedSharding(mesh, PartitionSpec(*(None,) * longest, 'fsdp'))

    return jax.tree.map(sharding, tree)


def with_shardings(tree: PyTree, mesh: Mesh) -> PyTree:
    """Returns a tree of ShapeDtypeStructs with the sharding of each leaf."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, weights(tree, mesh)
    )


def check_batch(batch_size: int, accumulation: int, mesh: Mesh) -> None:
    """Raises UserError if the rows of a micro-batch do not divide over the devices."""
    if accumulation < 1 or batch_size % accumulation:
        raise UserError(f'batch_size={batch_size} is not a multiple of accumulation={accumulation}')
    if (batch_size // accumulation) % mesh.size:
        raise UserError(
            f'batch_size={batch_size} in {accumulation} micro-batches does not divide over '
            f'{mesh.size} devices'
        )


def fetch(tree: PyTree) -> PyTree:
    """Returns global arrays as NumPy on every host."""
    if jax.process_count() == 1:
        return jax.tree.map(np.asarray, tree)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(tree, tiled=True)


def barrier(name: str) -> None:
    """Waits until every process has called it with this name."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def is_first() -> bool:
    """Whether this process writes the files of the run."""
    return jax.process_index() == 0
