"""Maps a function over items in processes, in order: how built-in data are made on all cores."""

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

Item, Result = TypeVar('Item'), TypeVar('Result')
_AHEAD = 4  # chunks of a process that are asked for before they are needed


def follow_parent() -> None:
    """Runs first in a process: it ends with its parent, however that ends."""
    sentinel = multiprocessing.parent_process().sentinel

    def follow():
        multiprocessing.connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=follow, name='mmjax-follow-parent', daemon=True).start()


def cores() -> int:
    """Returns how many cores this process may use."""
    if hasattr(os, 'sched_getaffinity'):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def check_main() -> None:
    """Raises UserError in a process that is only just importing its parent's main module.

    Such a process does what the script does, which is to wait for data that its parent makes.
    """
    if getattr(multiprocessing.current_process(), '_inheriting', False):  # as multiprocessing asks
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
      function: what a process can import, or a partial of such; its results can be pickled.
      items: they may have no end; few are asked for beyond those yielded.
      chunk: items that a process takes at a time, worth half a second of work or so. Where there
        are fewer than two chunks to share, this process does the work.
      workers: processes; None for one a core that this process may use, at most 16.

    Raises:
      UserError: a process died. What `function` raises comes through.
    """
    items, workers = iter(items), min(16, cores()) if workers is None else workers
    first = list(itertools.islice(items, 2 * chunk))
    if workers < 2 or len(first) < 2 * chunk:
        yield from map(function, itertools.chain(first, items))
        return
    pool = futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context('spawn'), initializer=_begin
    )
    items, pending = itertools.chain(first, items), collections.deque()
    try:
        for some in iter(lambda: tuple(itertools.islice(items, chunk)), ()):
            pending.append(pool.submit(_apply, function, some))
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
    # Ctrl-C tells all processes of a terminal; it is the parent who decides. SIGTERM must end them:
    # it is how the pool stops the others once one has died.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    follow_parent()


def _apply(function, items):
    return [function(item) for item in items]
