"""Reads a folder of receipt pictures with questions: a table and pictures in each split.

    train/metadata.csv   filename,receipt_count,question,answer,qa_pair_idx; a row a question
    train/images/…       the pictures; filename is relative to this folder
    val/…, test/…        likewise

Columns may stand in any order, and others beside them. Faults of the folder's structure raise
UserError at once; faults of a row or a picture raise RecordError, for the ledger to list and count.
"""

import csv
import dataclasses
import functools
import hashlib
import os
import pathlib
import posixpath
from collections.abc import Iterator, Sequence
from typing import Any

from mmjax.data import images
from mmjax.data.faults import Ledger
from mmjax.data.tables import file_stamp
from mmjax.errors import RecordError, UserError

COLUMNS = ('filename', 'receipt_count', 'question', 'answer', 'qa_pair_idx')
SPLITS = ('train', 'val', 'test')
TABLE, PICTURES = 'metadata.csv', 'images'
MOST = 1000  # receipts in a picture; a larger count is a slip of the pen
_STAMPED = 50_000  # pictures whose files enter the digest; of larger tables every n-th


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of metadata.csv; `line` counts from 1, the header; `pair` is its qa_pair_idx."""

    line: int
    filename: str
    count: int
    question: str
    answer: str
    pair: int


@dataclasses.dataclass(frozen=True)
class ReceiptsFolder:
    """A folder whose structure has been checked.

    rows: split → the rows of each picture, pictures as they first come; malformed: split →
    [(line, what is wrong)]; digest: of the tables and of the pictures' sizes and times.
    """

    root: pathlib.Path
    rows: dict[str, list[tuple[Row, ...]]]
    malformed: dict[str, list[tuple[int, str]]]
    digest: str

    def records(self, split: str, ledger: Ledger, max_pixels: int) -> Iterator[dict[str, Any]]:
        """Yields {'question', 'answer', 'count', 'pair', 'line', 'image_path' from the root,
        'picture': its number}, booking what is left out; the rows of a picture are neighbours."""
        ledger.rows = sum(map(len, self.rows[split])) + len(self.malformed[split])
        for line, what in self.malformed[split]:
            ledger.fault(RecordError('malformed_row', f'{split}/{TABLE} line {line} {what}'), line)
            ledger.tick()
        path = lambda rows: f'{split}/{PICTURES}/{rows[0].filename}'
        check = functools.partial(self._check, max_pixels=max_pixels)
        stamp = lambda rows: [path(rows), *file_stamp(self.root / path(rows))]
        looked = ledger.survey(self.rows[split], lambda rows: check(path(rows)), stamp)
        for number, (rows, found) in enumerate(looked):
            for row in rows:
                if isinstance(found, RecordError):
                    ledger.fault(found, row.line)
                else:
                    record = dataclasses.asdict(row) | {'picture': number, 'image_path': path(rows)}
                    yield {key: value for key, value in record.items() if key != 'filename'}
                ledger.tick()

    def _check(self, path: str, max_pixels: int) -> dict[str, Any]:
        try:
            picture = images.inside(self.root, path)
        except RuntimeError as error:  # a link to itself, before Python 3.13
            raise RecordError('unreadable_image', f'{path} cannot be read: {error}') from error
        images.check_image(picture, path, max_pixels=max_pixels)
        return {}


def named_splits(root: str | os.PathLike) -> tuple[str, ...]:
    """Returns the splits that a run opens: train and val, and test where it has a table."""
    has_test = os.path.isfile(pathlib.Path(root).expanduser() / 'test' / TABLE)
    return SPLITS if has_test else SPLITS[:2]


def open_folder(root: str | os.PathLike, splits: Sequence[str]) -> ReceiptsFolder:
    """Checks the structure of a folder without opening a picture.

    Raises:
      UserError: a missing root, table, images folder or column, one that may not be read, a table
        without a usable row, or a path that leads outside the root.
    """
    root = pathlib.Path(root).expanduser()
    try:
        return _opened(root, splits)
    except OSError as error:
        raise UserError(f'{error.filename or root} cannot be read: {error.strerror}') from error


def _opened(root: pathlib.Path, splits: Sequence[str]) -> ReceiptsFolder:
    if not root.is_dir():
        raise UserError(f'the data root {root} is not a folder')
    rows: dict[str, list[tuple[Row, ...]]] = {}
    malformed: dict[str, list[tuple[int, str]]] = {}
    for split in splits:
        if not (root / split / TABLE).is_file():
            known = ', '.join(s for s in SPLITS if (root / s / TABLE).is_file()) or 'none'
            raise UserError(f'{root / split / TABLE} does not exist (splits: {known})')
        if not (root / split / PICTURES).is_dir():
            raise UserError(f'{root / split / PICTURES} is not a folder')
        rows[split], malformed[split] = _grouped(root / split / TABLE)
        if not rows[split]:
            line, what = next(iter(malformed[split]), (1, 'is followed by nothing'))
            raise UserError(f'{root / split / TABLE} line {line} {what}, and no row is well formed')
    return ReceiptsFolder(root, rows, malformed, _digest(root, rows))


def _grouped(table: pathlib.Path) -> tuple[list[tuple[Row, ...]], list[tuple[int, str]]]:
    groups: dict[str, list[Row]] = {}
    malformed = []
    for row in _rows(table):
        if not isinstance(row, Row):
            malformed.append(row)
            continue
        name = row.filename
        if name.startswith(('/', '~')) or '..' in name.split('/') or '\0' in name:
            raise UserError(f'{table} line {row.line}: the path {name!r} leads outside the folder')
        known = groups.setdefault(posixpath.normpath(name), [])
        if known and known[0].count != row.count:
            malformed.append(
                (
                    row.line,
                    f'counts {row.count} receipts in {name}, line {known[0].line} {known[0].count}',
                )
            )
        else:
            known.append(row)
    return [tuple(group) for group in groups.values()], malformed


def _rows(table: pathlib.Path) -> Iterator[Row | tuple[int, str]]:
    """Streams a table: Rows, and (line, what is wrong) for lines that are none."""
    try:
        with table.open(newline='', encoding='utf-8-sig') as file:
            reader = csv.reader(file)
            header = [name.strip() for name in next(reader, [])]
            for column in COLUMNS:
                if header.count(column) != 1:
                    found = 'no' if column not in header else 'more than one'
                    raise UserError(
                        f'{table} has {found} column {column!r} (columns: {", ".join(header)})'
                    )
            places = [header.index(column) for column in COLUMNS]
            for fields in reader:
                if len(fields) == len(header):
                    yield _row(reader.line_num, [fields[place].strip() for place in places])
                elif fields:
                    yield reader.line_num, f'has {len(fields)} fields, the header {len(header)}'
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f'{table} is not a CSV table in UTF-8: {error}') from error


def _row(line: int, values: list[str]) -> Row | tuple[int, str]:
    filename, count, question, answer, pair = values
    if not all(values):
        return line, f'has an empty {COLUMNS[values.index("")]}'
    for column, value in (('receipt_count', count), ('qa_pair_idx', pair)):
        if not (value.isascii() and value.isdigit() and len(value) < 10):
            return line, f'has {value!r:.40} for a {column}, not a whole number from 0'
    if int(count) > MOST:
        return line, f'has a receipt_count of {count}, more than {MOST}'
    return Row(line, filename, int(count), question, answer, int(pair))


def _digest(root: pathlib.Path, rows: dict[str, list[tuple[Row, ...]]]) -> str:
    digest = hashlib.sha256()
    for split in rows:
        with (root / split / TABLE).open('rb') as file:
            digest.update(hashlib.file_digest(file, 'sha256').digest())
    paths = [root / split / PICTURES / group[0].filename for split in rows for group in rows[split]]
    for path in paths[:: -(-len(paths) // _STAMPED)]:
        digest.update(repr(file_stamp(path)).encode())
    return digest.hexdigest()
