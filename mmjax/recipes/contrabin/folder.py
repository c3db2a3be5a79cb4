"""Reads rows of (source, comment, binary), one JSON object a line. Free of jax.

    {"source": str, "binary": str, "comment": str,
     "metadata": {"path", "label", "compiler", "opt_level", "language", "name": all str}}

label: the algorithm, '' if unknown; opt_level: O0, O1, O2 or O3, or '-O2' and so on; comment: may
be ''. Other keys are ignored.
"""

import gzip
import os
import pathlib
import re
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

from mmjax.data.faults import FaultReport
from mmjax.data.tables import parse_json
from mmjax.errors import RecordError, UserError

TEXTS = ('source', 'binary', 'comment')
METADATA = ('path', 'label', 'compiler', 'opt_level', 'language', 'name')
MAX_LINE = 16 << 20  # bytes: a small gzip file can hold a line that fills the memory


def read(path: str | os.PathLike, report: FaultReport) -> Iterator[dict[str, Any]]:
    """Yields {source, binary, comment, path, name, label, opt_level, compiler, language, line}.

    All values are strings but `line`, which counts the file's lines from 1; blank lines are no
    rows. Rows are counted first, into `report.rows`. A row that is no JSON object, lacks a key, has
    one twice, a value that is no text, or an empty source or binary is a fault.

    Args:
      path: a .jsonl file, or compressed by gzip if its name ends in .gz.

    Raises:
      UserError: no file, one that cannot be read or decompressed to its end, a line of more than
        16 MiB, no row, or more faults than the report allows.
    """
    path = pathlib.Path(path).expanduser()
    report.rows = sum(1 for _ in _lines(path))
    if not report.rows:
        raise UserError(f'{path} has no rows')
    for number, line in _lines(path):
        try:
            row = _row(line, path, number)
        except UserError as error:
            report.fault(error, number)
        else:
            yield {**row, 'line': number}


def _lines(path: pathlib.Path) -> Iterator[tuple[int, bytes]]:
    """Yields (number, line) of lines that are not blank."""
    try:
        with gzip.open(path) if path.name.endswith('.gz') else path.open('rb') as file:
            number = 0
            while line := file.readline(MAX_LINE + 1):
                number += 1
                if len(line) > MAX_LINE:
                    raise UserError(f'{path} line {number} is longer than {MAX_LINE >> 20} MiB')
                if line.strip():
                    yield number, line
    except FileNotFoundError as error:
        raise UserError(f'{path} does not exist') from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f'{path} is a truncated or damaged gzip file: {error}') from error
    except OSError as error:
        raise UserError(f'{path} cannot be read: {error}') from error


def _row(line: bytes, path: pathlib.Path, number: int) -> dict[str, str]:
    where = f'{path} line {number}'
    row = parse_json(line, str(path), number)
    texts = _texts(row, TEXTS, where)
    texts |= _texts(row.get('metadata'), METADATA, f'{where}: metadata')
    for key in ('source', 'binary'):
        if not texts[key].strip():
            raise RecordError(f'empty_{key}', f'{where}: the {key} is empty')
    return texts


def _texts(values: Any, keys: Sequence[str], where: str) -> dict[str, str]:
    if not isinstance(values, dict):
        raise RecordError('malformed_row', f'{where}: {values!r:.60} is not an object')
    for key in keys:
        if key not in values:
            raise RecordError('missing_key', f'{where} has no {key!r}')
        if not isinstance(values[key], str):
            raise RecordError('malformed_row', f'{where}: {key!r} is {values[key]!r:.60}, no text')
        if re.search('[\ud800-\udfff]', values[key]):
            raise RecordError('malformed_row', f'{where}: half a surrogate pair stands in {key!r}')
    return {key: values[key] for key in keys}
