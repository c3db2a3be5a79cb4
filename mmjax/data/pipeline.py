"""Batches of a stage by step: decoded in threads or processes, with the same result.

Batch `step` is a pure function of (dataset, sampler, seed, stage, step), so resuming needs the step
only, and 1, 2 or 4 hosts see the same global batches. Grain reads ahead and runs the processes.
"""

import atexit
import collections
import dataclasses
import functools
import multiprocessing
import signal
import sys
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from multiprocessing import resource_tracker
from typing import TYPE_CHECKING

import grain
import numpy as np
from absl import flags

from mmjax.data.dataset import Dataset
from mmjax.data.processes import follow_parent
from mmjax.data.samplers import Sampler
from mmjax.errors import UserError

if TYPE_CHECKING:
    import jax
    from jax.sharding import Sharding

_ENDLESS = 1 << 40  # steps, if no stop is given
_AHEAD = 4  # batches decoded ahead
_STARTING = threading.Lock()  # one loader at a time starts processes, so that it can list them


class _Closed(Exception):
    """Ends the batch being decoded when its iterator is closed; nobody waits for it."""


class _PicklableError(RuntimeError):
    """A fault of the code, not of the data, with the row it happened at."""


@dataclasses.dataclass(eq=False)
class _Steps:
    """Random access to this host's batches of a stage by step; pickled into loader processes."""

    dataset: Dataset
    sampler: Sampler
    seed: int
    stage: int
    train: bool
    threads: int
    positions: np.ndarray  # of this host's rows in the global batch

    def __post_init__(self) -> None:
        self._stopped = threading.Event()
        self._pool: futures.ThreadPoolExecutor | None = None
        self._plan = functools.lru_cache(2)(self.sampler.plan)

    def __reduce__(self) -> tuple[type['_Steps'], tuple[object, ...]]:
        return _Steps, tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        try:
            return self._batch(int(step))
        except (_Closed, _PicklableError):
            raise
        except UserError as error:
            raise UserError(str(error)) from error  # a subclass may not survive pickling
        except Exception as error:
            raise _picklable(error, f'batch of step {step}') from error

    def _batch(self, step: int) -> dict[str, np.ndarray]:
        epoch, within = divmod(step, self.sampler.steps_per_epoch)
        plan = self._plan(epoch)
        rows = plan.rows[within]
        mask = plan.mask[within]
        # Padding repeats the example at position 0, on every host: the same global batch.
        sources = np.where(mask, np.arange(len(rows)), 0)[self.positions]
        unique, inverse = np.unique(sources, return_inverse=True)
        decode = lambda position: self._example(int(rows[position]), step, int(position))
        decoded = list(self._map(decode, unique))
        examples = [decoded[i] for i in inverse]
        batch = dict(self.dataset.collate(examples, int(plan.bucket[within])))
        _check_batch(batch, len(examples))
        return batch | {
            'row': rows[sources].astype(np.int32),
            'mask': mask[self.positions].copy(),
        }

    def _map(
        self, decode: Callable[[int], dict[str, np.ndarray]], positions: np.ndarray
    ) -> Iterator[dict[str, np.ndarray]]:
        if self.threads < 2:
            return map(decode, positions)
        if self._pool is None:
            self._pool = futures.ThreadPoolExecutor(self.threads, 'mmjax-decode')
        return self._pool.map(decode, positions)

    def _example(self, row: int, step: int, position: int) -> dict[str, np.ndarray]:
        if self._stopped.is_set():
            raise _Closed
        rng = np.random.default_rng([self.seed, self.stage, step, position])
        where = f"row {row} of split '{self.dataset.split}'"
        try:
            return self.dataset.example(row, rng, self.train)
        except UserError as error:
            raise UserError(f'{where}: {error}') from error
        except Exception as error:
            raise _picklable(error, where) from error

    def close(self) -> None:
        self._stopped.set()
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)


def _picklable(error: Exception, where: str) -> _PicklableError:
    """Returns an error that any process can unpickle; Grain waits forever for one that cannot."""
    result = _PicklableError(f'{where}: {type(error).__name__}: {error}')
    if multiprocessing.parent_process() is not None:  # the cause does not cross processes
        result.add_note(''.join(traceback.format_exception(error)))
    return result


def _check_batch(batch: Mapping[str, object], count: int) -> None:
    """Raises UserError unless `collate` returned arrays of `count` rows under free names."""
    for key, value in batch.items():
        if key in ('row', 'mask'):
            raise UserError(f"collate returns '{key}', a name that the engine uses itself")
        if not isinstance(value, np.ndarray) or value.shape[:1] != (count,):
            shape = getattr(value, 'shape', type(value).__name__)
            raise UserError(f"collate returns '{key}' as {shape}, not an array of {count} rows")


def _start_worker(index: int, count: int) -> None:
    """Runs first in a loader process, which ends with its parent and takes no accelerator."""
    if 'jax' in sys.modules:  # Grain imports it; no backend is up yet
        sys.modules['jax'].config.update('jax_platforms', 'cpu')
    follow_parent()


def _close(reference: 'weakref.ref[Batches]') -> None:
    if (batches := reference()) is not None:
        batches.close()


class Batches:
    """Iterates over local batches; `close()` ends its threads and processes.

    A fault ends the iteration: UserError for data (naming the row), RuntimeError for code.
    """

    def __init__(self, steps: _Steps, start: int, stop: int, workers: int, ahead: int):
        self._steps = steps
        self._workers = workers
        self._children: list[multiprocessing.process.BaseProcess] = []
        self._started = False
        self._closed = False
        self._at_exit = functools.partial(_close, weakref.ref(self))
        if workers:
            if not flags.FLAGS.is_parsed():  # Grain reads flags itself
                flags.FLAGS.mark_as_parsed()
            # A worker decodes with its own threads, and only its queue reads ahead, so that
            # closing waits for one batch at most.
            read = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        else:
            read = grain.ReadOptions(num_threads=min(ahead, 1), prefetch_buffer_size=ahead)
        source = grain.MapDataset.source(steps)[start:stop].to_iter_dataset(read)
        if workers:
            each = max(1, -(-ahead // workers))
            options = grain.MultiprocessingOptions(workers, per_worker_buffer_size=each)
            source = source.mp_prefetch(options, worker_init_fn=_start_worker)
        self._iterator = iter(source)

    def __iter__(self) -> 'Batches':
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if self._closed:
            raise StopIteration
        try:
            batch = next(self._iterator) if self._started or not self._workers else self._first()
        except (StopIteration, UserError, RuntimeError) as error:
            self.close()
            if isinstance(error, _PicklableError) or 'terminated unexpectedly' not in str(error):
                raise
            raise UserError(
                f'a loader process died ({error}): exit code -9 may be a lack of memory, -7 of '
                'space in /dev/shm; set data.workers=0 or fewer'
            ) from error
        if self._workers:  # copied out of shared memory, so that it can be freed
            batch = {key: np.array(value) for key, value in batch.items()}
        return batch

    def _first(self) -> dict[str, np.ndarray]:
        """Starts the processes and returns the first batch.

        A process is born with SIGINT and SIGTERM blocked, as its thread has them: Ctrl-C and batch
        schedulers send those to all processes of a run, and only the parent acts on them.
        """

        def start() -> dict[str, np.ndarray]:
            resource_tracker.ensure_running()  # starting it later would unblock them
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
            return next(self._iterator)

        self._started = True
        atexit.register(self._at_exit)  # before multiprocessing's own, which ends the queues
        with _STARTING, futures.ThreadPoolExecutor(1, 'mmjax-start') as pool:
            before = set(multiprocessing.active_children())
            first = pool.submit(start)
            done = False
            while not done and len(self._children) < self._workers:
                done = first.done()
                self._children = list(set(multiprocessing.active_children()) - before)
                futures.wait([first], timeout=0.01)
            return first.result()

    def close(self) -> None:
        """Ends threads and processes: at once, or after the batch that a process decodes."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self._at_exit)
        self._steps.close()
        self._iterator.close()
        self._iterator = None
        for child in self._children:  # Grain forgets those it has not read from
            if child.is_alive():
                child.kill()
            child.join()

    def __del__(self) -> None:
        if hasattr(self, '_iterator') and not sys.is_finalizing():
            self.close()


def batches(
    dataset: Dataset,
    sampler: Sampler,
    *,
    seed: int,
    stage: int,
    start: int = 0,
    stop: int = _ENDLESS,
    train: bool,
    workers: int = 0,
    threads: int = 2,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches:
    """Iterates over this process's rows of the global batches start … stop−1 of a stage.

    Args:
      dataset: what to decode; it is pickled when `workers` > 0.
      sampler: its plan says which rows make which batch; the epoch is step // steps_per_epoch.
      seed, stage: with the step and the row's position in the global batch, the seed of all that
        is random for one example.
      start, stop: steps in the stage; without `stop` the iterator does not end.
      train: passed to `Dataset.example`.
      workers: loader processes; 0 decodes in this one.
      threads: decoding threads, in each loader process if any; 0 decodes in the calling thread,
        when it asks for a batch.
      process_index, process_count: this host's rows are the process_index-th of process_count
        equal parts of the global batch, in order.

    Returns:
      An iterator of {key: array [local batch, …]}: what `collate` made, `row` int32 (in the
      dataset) and `mask` bool (False on padding, which repeats the batch's first example).

    Raises:
      ValueError: a batch that does not divide among the processes.
      UserError: a fault of the data, while iterating, with the row.
    """
    if sampler.batch_size % process_count:
        raise ValueError(
            f'a batch of {sampler.batch_size} does not divide among {process_count} processes'
        )
    count = sampler.batch_size // process_count
    steps = _Steps(
        dataset,
        sampler,
        seed=seed,
        stage=stage,
        train=train,
        threads=threads,
        positions=np.arange(process_index * count, (process_index + 1) * count),
    )
    return Batches(steps, start, stop, min(workers, stop - start), _AHEAD if threads else 0)


def to_device(
    iterator: Iterator[Mapping[str, np.ndarray]],
    sharding: 'Sharding | Callable[[str, np.ndarray], Sharding]',
    depth: int = 2,
) -> 'Iterator[tuple[dict[str, jax.Array], np.ndarray]]':
    """Yields (batch of global jax.Arrays, this host's rows int32), `depth` batches ahead.

    Args:
      iterator: of local batches, as `batches` makes them.
      sharding: one Sharding for all keys, or a callable (key, array) → Sharding.
      depth: batches on devices at a time, the one in use included.

    An error of the iterator is raised after the batches before it.
    """
    import jax

    if depth < 1:
        raise ValueError(f'depth={depth} is not positive')

    def put(key: str, value: np.ndarray) -> jax.Array:
        target = sharding(key, value) if callable(sharding) else sharding
        return jax.make_array_from_process_local_data(target, value)

    ready: collections.deque[tuple[dict[str, jax.Array], np.ndarray]] = collections.deque()
    fault: Exception | None = None
    while True:
        while fault is None and len(ready) < depth:
            try:
                batch = next(iterator)
            except Exception as error:  # StopIteration among them
                fault = error
            else:
                ready.append(({key: put(key, x) for key, x in batch.items()}, batch['row']))
        if ready:
            yield ready.popleft()
        elif fault is None or isinstance(fault, StopIteration):
            return
        else:
            raise fault
