"""Reads a folder of receipt images with questions: a table and images in each split.

    train/metadata.csv   filename,receipt_count,question,answer,qa_pair_idx; a row per question
    train/images/…       the images; filename is relative to this folder
    val/…, test/…        likewise

Columns may stand in any order, and others beside them. Faults of the folder's structure raise
UserError at once; faults of a row or an image are counted and listed by the FaultReport.
"""

import dataclasses
import os
import pathlib
import posixpath
from collections.abc import Iterator, Sequence
from typing import Any

from mmjax.data import tables
from mmjax.data.faults import FaultReport
from mmjax.data.tables import file_stamp
from mmjax.errors import UserError

COLUMNS = ('filename', 'receipt_count', 'question', 'answer', 'qa_pair_idx')
SPLITS = ('train', 'val', 'test')
TABLE = 'metadata.csv'
IMAGES = 'images'
MOST = 1000  # receipts in an image; a larger count is taken for a typing error


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

    rows: split → the rows of each image, images in order of their first row; malformed: split →
    [(line, problem)]; digest: of the tables and of the images' sizes and times.
    """

    root: pathlib.Path
    rows: dict[str, list[tuple[Row, ...]]]
    malformed: dict[str, list[tuple[int, str]]]
    digest: str

    def records(self, split: str, report: FaultReport, max_pixels: int) -> Iterator[dict[str, Any]]:
        """Yields {'question', 'answer', 'count', 'pair', 'line', 'image_path' from the root,
        'picture': its number}; what is left out is reported. The rows of an image are neighbours.
        """
        groups = self.rows[split]
        report.rows = sum(map(len, groups))
        report.malformed_rows(f'{split}/{TABLE} line', self.malformed[split])
        path = lambda entry: f'{split}/{IMAGES}/{entry[1][0].filename}'
        check = lambda entry: {'size': tables.check_image(self.root, path(entry), max_pixels)}
        stamp = lambda entry: [path(entry), *file_stamp(self.root / path(entry))]
        lines = lambda entry: [row.line for row in entry[1]]
        for entry, _ in report.check_each(enumerate(groups), check, stamp, lines):
            number, group = entry
            for row in group:
                record = dataclasses.asdict(row) | {'picture': number, 'image_path': path(entry)}
                yield {key: value for key, value in record.items() if key != 'filename'}


def named_splits(root: str | os.PathLike) -> tuple[str, ...]:
    """Returns the splits that a run opens: train, val, and test if it has a table."""
    has_test = os.path.isfile(pathlib.Path(root).expanduser() / 'test' / TABLE)
    return SPLITS if has_test else SPLITS[:2]


def open_folder(root: str | os.PathLike, splits: Sequence[str]) -> ReceiptsFolder:
    """Checks the structure of a folder without opening an image.

    Raises:
      UserError: a missing root, table, images folder or column, one that may not be read, a table
        without a usable row, or a path that leads outside the root.
    """
    root = tables.data_root(root)
    try:
        return _opened(root, splits)
    except OSError as error:
        raise UserError(f'{error.filename or root} cannot be read: {error.strerror}') from error


def _opened(root: pathlib.Path, splits: Sequence[str]) -> ReceiptsFolder:
    rows: dict[str, list[tuple[Row, ...]]] = {}
    malformed: dict[str, list[tuple[int, str]]] = {}
    for split in splits:
        table = root / split / TABLE
        if not table.is_file():
            known = ', '.join(s for s in SPLITS if (root / s / TABLE).is_file()) or 'none'
            raise UserError(f'{table} does not exist (splits: {known})')
        if not (root / split / IMAGES).is_dir():
            raise UserError(f'{root / split / IMAGES} is not a folder')
        rows[split], malformed[split] = _read_table(table)
        if not rows[split]:
            line, problem = next(iter(malformed[split]), (1, 'is followed by nothing'))
            raise UserError(f'{table} line {line} {problem}, and no row is well formed')
    files = [(root / s / IMAGES / group[0].filename,) for s in rows for group in rows[s]]
    digest = tables.folder_digest([root / split / TABLE for split in rows], files, len(files))
    return ReceiptsFolder(root, rows, malformed, digest)


def _read_table(
    table: pathlib.Path,
) -> tuple[list[tuple[Row, ...]], list[tuple[int, str]]]:
    """Returns the rows of each image, and (line, problem) of rows that are none."""
    groups: dict[str, list[Row]] = {}
    malformed: list[tuple[int, str]] = []
    for line, values, problem in tables.csv_rows(table, COLUMNS):
        problem = problem or _problem(values)
        if problem:
            malformed.append((line, problem))
            continue
        name, count, question, answer, pair = values
        tables.check_inside(name, f'{table} line {line}')
        row = Row(line, name, int(count), question, answer, int(pair))
        group = groups.setdefault(posixpath.normpath(name), [])
        if group and group[0].count != row.count:
            first = group[0]
            problem = f'counts {row.count} receipts in {name}, line {first.line} {first.count}'
            malformed.append((line, problem))
        else:
            group.append(row)
    return [tuple(group) for group in groups.values()], malformed


def _problem(values: list[str]) -> str:
    """Returns what is wrong with the numbers of a row, '' if nothing."""
    _, count, _, _, pair = values
    for column, value in (('receipt_count', count), ('qa_pair_idx', pair)):
        if not (value.isascii() and value.isdigit() and len(value) < 10):
            return f'has {value!r:.40} for a {column}, not a whole number from 0'
    return f'has a receipt_count of {count}, more than {MOST}' if int(count) > MOST else ''
