"""Maps a function over items in processes, in order: makes built-in data on all cores."""

import collections
import itertools
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from typing import TypeVar

from mmjax.errors import UserError

Item = TypeVar('Item')
Result = TypeVar('Result')
_AHEAD = 4  # chunks per process that are submitted ahead


def follow_parent() -> None:
    """Makes this process end with its parent, however that ends."""
    parent = multiprocessing.parent_process()
    assert parent is not None, 'only a process that multiprocessing started has a parent'

    def follow() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, name='mmjax-follow-parent', daemon=True).start()


def cores() -> int:
    """Returns how many cores this process may use."""
    if hasattr(os, 'sched_getaffinity'):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def check_main() -> None:
    """Raises UserError in a process that is still importing its parent's main module.

    Such a process runs the script again, and would wait for data that its parent makes.
    """
    if getattr(
        multiprocessing.current_process(), '_inheriting', False
    ):  # the test of multiprocessing
        raise UserError(
            "a script that prepares data needs its calls under `if __name__ == '__main__':`: the "
            'processes that make data import it'
        )


def ordered(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    chunk: int,
    workers: int | None = None,
) -> Iterator[Result]:
    """Yields function(item) for every item, in order, whatever the number of processes.

    Args:
      function: what a process can import, or a partial of it; its results can be pickled.
      items: possibly endless; few are read beyond those yielded.
      chunk: items that a process takes at a time, about half a second of work. Fewer than two
        chunks are computed in this process.
      workers: number of processes; None for one per core that this process may use, at most 16.

    Raises:
      UserError: a process died. Errors of `function` are raised as they are.
    """
    remaining = iter(items)
    if workers is None:
        workers = min(16, cores())
    first = list(itertools.islice(remaining, 2 * chunk))
    remaining = itertools.chain(first, remaining)
    if workers < 2 or len(first) < 2 * chunk:
        yield from map(function, remaining)
        return
    pool = futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context('spawn'), initializer=_begin
    )
    pending: collections.deque[futures.Future[list[Result]]] = collections.deque()
    try:
        for group in iter(lambda: tuple(itertools.islice(remaining, chunk)), ()):
            pending.append(pool.submit(_apply, function, group))
            if len(pending) >= _AHEAD * workers:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    except futures.process.BrokenProcessPool as error:
        raise UserError(
            f'a process that makes data died ({error}): is memory short, or did it print why?'
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _begin() -> None:
    # Ctrl-C reaches all processes of a terminal, but only the parent acts on it. SIGTERM must end
    # them: the pool sends it to the others when one has died.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    follow_parent()


def _apply(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    return [function(item) for item in items]
