"""Counts what preparation leaves out and why, and remembers checked records across a kill."""

import collections
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
from typing import BinaryIO, TypeAlias, TypeVar

from mmjax.errors import RecordError, UserError

Item = TypeVar('Item')
Outcome: TypeAlias = dict | UserError  # of a check: its result, or the error that it raised
Progress = Callable[[str, int, int], None]  # (split, rows done, rows of the table)
_WINDOW = 64  # records checked ahead of the one being written


class FaultReport:
    """Counts the rows of one split while it is prepared; ends it above a fraction of faults.

    Each row of the table ends as a record, as a fault or skipped.

    skipped: reason → rows left out, faults included.
    counts: name → how often something was repaired (a box clipped, a panel dropped).
    rows: rows of the split's table, the base of the fraction; the source sets it first.
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
        self._max_fault_share = max_fault_share
        self._progress = progress
        self._first_fault = ''
        self._rows_done = 0
        self._last_report = 0.0
        self.listing = folder / f'skipped-{split}.jsonl'
        self.listing.write_text('')

    def skip(self, reason: str) -> None:
        """Counts a row left out by design, such as a page of another type."""
        self.skipped[reason] += 1
        self.advance()

    def fault(self, error: UserError, row: int) -> None:
        """Lists and counts a faulty row under the error's reason.

        Raises:
          UserError: faults are more than the allowed fraction of the rows.
        """
        self.skipped[error.reason] += 1
        self.faults += 1
        entry = {'split': self.split, 'row': row, 'reason': error.reason, 'detail': str(error)}
        with self.listing.open('a') as listing:
            listing.write(json.dumps(entry) + '\n')
        self._first_fault = self._first_fault or f'{error} (row {row})'
        if self.faults > self._max_fault_share * self.rows:
            last = f' … {error} (row {row})' if self.faults > 1 else ''
            raise UserError(
                f'{self._first_fault}{last}: {self.faults} of the {self.rows} rows of split '
                f'{self.split} are faulty, more than the allowed share of '
                f'{self._max_fault_share:g}'
            )
        self.advance()

    def malformed_rows(self, table: str, problems: Iterable[tuple[int, str]]) -> None:
        """Counts rows of a table, (line, problem), as faults and as rows of the split."""
        problems = list(problems)
        self.rows += len(problems)
        for line, problem in problems:
            self.fault(RecordError('malformed_row', f'{table} {line} {problem}'), line)

    def advance(self) -> None:
        """Marks one row as done: updates the progress and the heartbeat for waiting processes."""
        self._rows_done += 1
        now = time.monotonic()
        if now - self._last_report > 0.5 or self._rows_done == self.rows:
            self._last_report = now
            (self._folder / 'heartbeat').touch()
            if self._progress:
                self._progress(self.split, self._rows_done, self.rows)

    def check_each(
        self,
        items: Iterable[Item],
        check: Callable[[Item], dict],
        stamp: Callable[[Item], object],
        rows: Callable[[Item], Sequence[int]],
        workers: int = 0,
    ) -> Iterator[tuple[Item, dict]]:
        """Yields (item, check(item)) in order, checking in threads and remembering the results.

        An item whose check raises UserError is a fault and not yielded. Results are appended to a
        journal beside the future shards. After a kill they are read back as long as `stamp(item)`
        is unchanged, so that no image is opened twice. The first line that is torn or disagrees
        ends the journal.

        Args:
          check: returns JSON values.
          stamp: returns a JSON value, such as sizes and times of the item's files.
          rows: returns the rows of the table that the item stands for.
          workers: threads; 0 for one per core, at most 16.
        """
        for item, outcome in self._outcomes(items, check, stamp, workers):
            if isinstance(outcome, UserError):
                for row in rows(item):
                    self.fault(outcome, row)
            else:
                yield item, outcome

    def _outcomes(
        self,
        items: Iterable[Item],
        check: Callable[[Item], dict],
        stamp: Callable[[Item], object],
        workers: int,
    ) -> Iterator[tuple[Item, Outcome]]:
        path = self._folder / f'journal-{self.split}.jsonl'
        path.touch()
        pending: collections.deque[tuple[Item, object, futures.Future[dict]]] = collections.deque()
        with (
            path.open('r+b') as journal,
            futures.ThreadPoolExecutor(workers or min(16, os.cpu_count() or 1)) as pool,
        ):
            recorded = True
            try:
                for item in items:
                    if recorded:
                        start = journal.tell()
                        entry = _parse_entry(journal.readline())
                        if entry is not None and entry['stamp'] == stamp(item):
                            yield item, _outcome(entry)
                            continue
                        recorded = False
                        journal.seek(start)
                        journal.truncate()
                    pending.append((item, stamp(item), pool.submit(_entry, check, item)))
                    if len(pending) >= _WINDOW:
                        yield _write_next(pending, journal)
                while pending:
                    yield _write_next(pending, journal)
            finally:
                pool.shutdown(cancel_futures=True)


def _write_next(pending: collections.deque, journal: BinaryIO) -> tuple[Item, Outcome]:
    item, stamp, future = pending.popleft()
    entry = {'stamp': stamp, **future.result()}
    journal.write(json.dumps(entry).encode() + b'\n')
    journal.flush()  # to the system, which outlives this process
    return item, _outcome(entry)


def _entry(check: Callable[[Item], dict], item: Item) -> dict:
    try:
        return {'result': check(item)}
    except UserError as error:
        return {'fault': [error.reason, str(error)]}


def _parse_entry(line: bytes) -> dict | None:
    if not line.endswith(b'\n'):
        return None
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    whole = isinstance(entry, dict) and 'stamp' in entry and ('result' in entry or 'fault' in entry)
    return entry if whole else None


def _outcome(entry: dict) -> Outcome:
    return RecordError(*entry['fault']) if 'fault' in entry else entry['result']
