"""Reads the tables of a user's folder, faults named by file and line, and checks their files."""

import collections
import csv
import hashlib
import itertools
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from mmjax.data import images
from mmjax.errors import RecordError, UserError

STAMPED = 50_000  # rows whose files enter a digest; of larger tables every n-th


def data_root(root: str | os.PathLike, name: str = 'the data root') -> pathlib.Path:
    """Returns the user's folder, `~` expanded.

    Args:
      name: what to call it in the error.

    Raises:
      UserError: it is not a folder.
    """
    path = pathlib.Path(root).expanduser()
    if not path.is_dir():
        raise UserError(f'{name} {path} is not a folder')
    return path


def check_inside(path: str, where: str) -> None:
    """Raises UserError, beginning with `where`, for a path that leads outside the data root."""
    if not path or path.startswith(('/', '~')) or '..' in path.split('/') or '\0' in path:
        raise UserError(f'{where}: the path {path!r} leads outside the data root')


def check_image(root: pathlib.Path, path: str, max_pixels: int) -> tuple[int, int]:
    """Returns (width, height) of root/path if every byte of it decodes.

    Raises:
      UserError: the path, links followed, leads outside the root.
      RecordError: as of `images.open_image`.
    """
    try:
        file = images.inside(root, path)
    except RuntimeError as error:  # a link to itself, before Python 3.13
        raise RecordError('unreadable_image', f'{path} cannot be read: {error}') from error
    return images.check_image(file, path, max_pixels=max_pixels)


def csv_rows(
    path: pathlib.Path, columns: Sequence[str], *, optional: Sequence[str] = (), **dialect: Any
) -> Iterator[tuple[int, list[str], str]]:
    """Streams a CSV table; its columns may stand in any order, and others beside them.

    Lines without text are skipped, also before the header.

    Args:
      optional: those of the columns that may be empty.
      dialect: of `csv.reader`, such as its delimiter.

    Yields:
      (line, values, problem): the line counts from 1, the header; the values are those of
      `columns`, stripped; the problem is '' or what is wrong with the row, whose values are then
      not to be used.

    Raises:
      UserError: a column that is missing or stands twice, or no CSV table in UTF-8.
    """
    try:
        with path.open(newline='', encoding='utf-8-sig') as file:
            reader = csv.reader(file, **dialect)
            rows = (fields for fields in reader if any(map(str.strip, fields)))
            header = [name.strip() for name in next(rows, [])]
            for column in columns:
                if header.count(column) != 1:
                    number = 'no' if column not in header else 'more than one'
                    raise UserError(
                        f'{path} has {number} column {column!r} (columns: {", ".join(header)})'
                    )
            positions = [header.index(column) for column in columns]
            for fields in rows:
                values, problem = [], ''
                if len(fields) != len(header):
                    problem = f'has {len(fields)} fields, the header {len(header)}'
                else:
                    values = [fields[position].strip() for position in positions]
                    for column, value in zip(columns, values, strict=True):
                        if not value and column not in optional:
                            problem = problem or f'has an empty {column}'
                yield reader.line_num, values, problem
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f'{path} is not a CSV table in UTF-8: {error}') from error


def read_json(path: pathlib.Path, name: str) -> object:
    """Parses a file as `parse_json` does; raises RecordError if it cannot be read."""
    try:
        return parse_json(path.read_bytes(), name)
    except FileNotFoundError as error:
        raise RecordError('missing_json', f'{name} does not exist') from error
    except OSError as error:
        raise RecordError('malformed_json', f'{name} cannot be read: {error}') from error


def parse_json(data: bytes, name: str, line: int | None = None) -> object:
    """Parses JSON in UTF-8.

    A key that stands twice in one object is an error: JSON would silently keep the last.

    Args:
      name: of the file, for errors.
      line: the line of the file, where `data` is only one line of it.

    Raises:
      RecordError: 'malformed_json', naming file and line.
    """
    where = f'{name} line {line}' if line else name

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        values = dict(pairs)
        if len(values) < len(pairs):
            twice = collections.Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise RecordError('malformed_json', f'{where}: {twice!r} stands twice in one object')
        return values

    try:
        return json.loads(data.decode('utf-8-sig'), object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        message = f'{name} line {line or error.lineno}: {error.msg}'
        raise RecordError('malformed_json', message) from error
    except UnicodeDecodeError as error:
        number = line or error.object[: error.start].count(b'\n') + 1
        raise RecordError('malformed_json', f'{name} line {number}: not UTF-8') from error
    except (ValueError, RecursionError) as error:
        raise RecordError('malformed_json', f'{where} cannot be read: {error}') from error


def file_stamp(path: pathlib.Path) -> list[int]:
    """Returns size and time of change, [0, 0] if there is no file."""
    try:
        stat = path.stat()
    except OSError:
        return [0, 0]
    return [stat.st_size, stat.st_mtime_ns]


def folder_digest(
    tables: Iterable[pathlib.Path], files: Iterable[Sequence[pathlib.Path]], rows: int
) -> str:
    """Digests the content of the tables, and the sizes and times of the files of their rows.

    Args:
      files: the files of each row.
      rows: how many rows there are; of more than `STAMPED` every n-th is stamped.
    """
    digest = hashlib.sha256()
    for table in tables:
        with table.open('rb') as file:
            digest.update(hashlib.file_digest(file, 'sha256').digest())
    every = max(-(-rows // STAMPED), 1)
    for paths in itertools.islice(files, 0, None, every):
        for path in paths:
            digest.update(repr(file_stamp(path)).encode())
    return digest.hexdigest()
