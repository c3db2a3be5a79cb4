"""Books what preparation leaves out and why, and remembers checked records across a kill."""

import collections
import itertools
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from typing import Any

from mmjax.errors import RecordError, UserError

Progress = Callable[[str, int, int], None]  # (split, rows done, rows of the table)
_WINDOW = 64  # records checked ahead of the one being written


class Ledger:
    """Counts of one split while it is prepared; ends the preparation above a share of faults.

    skipped: reason → records left out, faults and others alike.
    counts: name → how often something was mended (a box clipped, a panel dropped).
    rows: rows of the split's table, the base of the share; the source sets it first.
    """

    def __init__(
        self,
        split: str,
        folder: pathlib.Path,
        max_fault_share: float = 0.01,
        progress: Progress | None = None,
    ):
        self.split = split
        self.rows = 0
        self.faults = 0
        self.skipped: collections.Counter[str] = collections.Counter()
        self.counts: collections.Counter[str] = collections.Counter()
        self._folder = folder
        self._share = max_fault_share
        self._progress = progress
        self._first = ''
        self._done = 0
        self._beat = 0.0
        self.listing = folder / f'skipped-{split}.jsonl'
        self.listing.write_text('')

    def skip(self, reason: str) -> None:
        """Counts a record left out by design, such as a page of another type."""
        self.skipped[reason] += 1

    def fault(self, error: RecordError, row: int) -> None:
        """Lists and counts a faulty record; raises UserError once faults pass the share."""
        self.skipped[error.reason] += 1
        self.faults += 1
        entry = {'split': self.split, 'row': row, 'reason': error.reason, 'detail': str(error)}
        with self.listing.open('a') as listing:
            listing.write(json.dumps(entry) + '\n')
        self._first = self._first or f'{error} (row {row})'
        if self.faults > self._share * self.rows:
            last = f' … {error} (row {row})' if self.faults > 1 else ''
            raise UserError(
                f'{self._first}{last}: {self.faults} of the {self.rows} rows of split {self.split} '
                f'are faulty, more than the allowed share of {self._share:g}'
            )

    def tick(self) -> None:
        """Marks one row as done: moves the progress and tells waiting processes of life."""
        self._done += 1
        now = time.monotonic()
        if now - self._beat > 0.5 or self._done == self.rows:
            self._beat = now
            (self._folder / 'heartbeat').touch()
            if self._progress:
                self._progress(self.split, self._done, self.rows)

    def survey(
        self,
        items: Iterable[Any],
        check: Callable[[Any], dict],
        stamp: Callable[[Any], Any],
        workers: int = 0,
    ) -> Iterator[tuple[Any, dict | RecordError]]:
        """Yields (item, check(item)) in order, checking in threads and remembering the results.

        A RecordError that `check` raises is yielded in place of its result. Results are appended
        to a journal beside the shards to be; after a kill they are read back, as long as
        `stamp(item)` (JSON, such as sizes and times of the files) is what it was, so that no
        picture is opened twice. The first line that is torn or disagrees ends the journal.
        """
        path = self._folder / f'journal-{self.split}.jsonl'
        path.touch()
        items = iter(items)
        left = []  # the item at which the journal ends
        with path.open('r+b') as journal:
            for item in items:
                start = journal.tell()
                entry = _entry(journal.readline())
                if entry is None or entry['stamp'] != stamp(item):
                    journal.seek(start)
                    journal.truncate()
                    left = [item]
                    break
                yield item, _result(entry)
            pending: collections.deque = collections.deque()
            with futures.ThreadPoolExecutor(workers or min(16, os.cpu_count() or 1)) as pool:
                try:
                    for item in itertools.chain(left, items):
                        pending.append((item, stamp(item), pool.submit(_checked, check, item)))
                        if len(pending) >= _WINDOW:
                            yield _settle(pending.popleft(), journal)
                    while pending:
                        yield _settle(pending.popleft(), journal)
                finally:
                    pool.shutdown(cancel_futures=True)


def _settle(waiting: tuple, journal) -> tuple[Any, dict | RecordError]:
    item, stamped, future = waiting
    entry = {'stamp': stamped, **future.result()}
    journal.write(json.dumps(entry).encode() + b'\n')
    journal.flush()  # to the system, which outlives this process
    return item, _result(entry)


def _checked(check: Callable[[Any], dict], item: Any) -> dict:
    try:
        return {'result': check(item)}
    except RecordError as error:
        return {'fault': [error.reason, str(error)]}


def _entry(line: bytes) -> dict | None:
    if not line.endswith(b'\n'):
        return None
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    whole = isinstance(entry, dict) and 'stamp' in entry and ('result' in entry or 'fault' in entry)
    return entry if whole else None


def _result(entry: dict) -> dict | RecordError:
    return RecordError(*entry['fault']) if 'fault' in entry else entry['result']
