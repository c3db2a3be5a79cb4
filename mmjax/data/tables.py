"""Reads JSON of a user's folder, faults named by line, and stamps its files. Free of jax."""

import collections
import json
import pathlib
from typing import Any

from mmjax.errors import RecordError


def read_json(path: pathlib.Path, name: str) -> Any:
    """Parses a file; raises RecordError naming it and, where the syntax is wrong, the line.

    A key that stands twice in one object is an error: JSON would silently keep the last.
    """

    def once(pairs):
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = collections.Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise RecordError('malformed_json', f'{name}: {twice!r} stands twice in one object')
        return found

    try:
        return json.loads(path.read_bytes().decode('utf-8-sig'), object_pairs_hook=once)
    except FileNotFoundError as error:
        raise RecordError('missing_json', f'{name} does not exist') from error
    except json.JSONDecodeError as error:
        raise RecordError('malformed_json', f'{name} line {error.lineno}: {error.msg}') from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b'\n') + 1
        raise RecordError('malformed_json', f'{name} line {line}: not UTF-8') from error
    except (OSError, ValueError, RecursionError) as error:
        raise RecordError('malformed_json', f'{name} cannot be read: {error}') from error


def file_stamp(path: pathlib.Path) -> list[int]:
    """Size and time of change, [0, 0] where there is no file."""
    try:
        stat = path.stat()
    except OSError:
        return [0, 0]
    return [stat.st_size, stat.st_mtime_ns]
