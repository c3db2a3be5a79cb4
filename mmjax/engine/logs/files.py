"""Reads and writes the files of a run: strict JSON, replaced as a whole, and metrics.jsonl.

A number that is not finite is written as the string 'nan', 'inf' or '-inf'.
"""

import contextlib
import json
import math
import os
from collections.abc import Mapping
from typing import Any, NoReturn

from etils import epath


def plain(value: object, name: str = 'value') -> Any:
    """Returns `value` as strict JSON holds it: arrays as lists, 'nan', 'inf', '-inf' as strings.

    Dicts keep their order. Raises TypeError, which starts with `name`, for what JSON cannot hold.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if isinstance(value, Mapping):
        out = {str(key): plain(item, f'{name}.{key}') for key, item in value.items()}
        if len(out) < len(value):
            raise TypeError(f'{name} has two keys that are the same in JSON')
        return out
    if isinstance(value, list | tuple):
        return [plain(item, f'{name}[{i}]') for i, item in enumerate(value)]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, 'tolist') and not isinstance(items := value.tolist(), type(value)):
        return plain(items, name)
    raise TypeError(f'{name} is a {type(value).__name__}, which JSON cannot hold')


def encode(value: object, name: str, indent: int | None = None) -> bytes:
    """Returns `plain(value)` as strict JSON in UTF-8; errors call it `name`."""
    text = json.dumps(plain(value, name), allow_nan=False, ensure_ascii=False, indent=indent)
    return text.encode('utf-8', 'backslashreplace')  # a lone surrogate becomes its JSON escape


def replace(path: epath.PathLike, content: bytes) -> None:
    """Writes a file in one move: readers, and kills, meet the old content or the new, no part."""
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not is_local(path):  # an object store shows only complete objects
        path.write_bytes(content)
        return
    temporary = path.with_name(f'.{path.name}.tmp')
    try:
        with open(temporary, 'wb') as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def write_json(path: epath.PathLike, value: object) -> None:
    """Writes `value` as indented strict JSON, keys in the order given; see `plain`, `replace`."""
    replace(path, encode(value, epath.Path(path).name, indent=1) + b'\n')


def write_results(
    workdir: epath.PathLike,
    *,
    best: Mapping | None,
    final: Mapping[str, Mapping],
    stages: Mapping[str, Mapping],
    skipped: Mapping[str, int],
    weights: str,
) -> dict:
    """Writes results.json and returns its content.

    `best` is {'step', 'metric', 'value'} or None; `weights`, 'best' or 'last', tells which weights
    `final` scores. Raises ValueError if a score is neither a number nor a string.
    """
    sections = {'best': best, 'weights': weights, 'final': final}
    out = plain({**sections, 'stages': stages, 'skipped': skipped}, 'results')
    for evaluator, scores in out['final'].items():
        for metric, value in scores.items():
            if not isinstance(value, int | float | str):
                raise ValueError(
                    f'the score {evaluator}/{metric} is not a number or a string: {value}'
                )
    write_json(epath.Path(workdir) / 'results.json', out)
    return out


def read(path: epath.PathLike) -> tuple[list[dict], int]:
    """Returns the lines of a metrics.jsonl and the number of unreadable ones; ([], 0) if absent."""
    path = epath.Path(path)
    lines = path.read_bytes().split(b'\n') if path.exists() else []
    parsed = [_parse(line) for line in lines if line.strip()]
    good = [line for line in parsed if line is not None]
    return good, len(parsed) - len(good)


def truncate(path: epath.PathLike, step: int, *, keep_evaluations_at_step: bool = True) -> int:
    """Removes the lines of metrics.jsonl after `step`; returns how many it removed.

    It also removes unreadable lines, such as a torn last one. The training line of `step` is
    written before the state is saved, and stays. Evaluation lines of `step` stay too, unless that
    evaluation will run again (keep_evaluations_at_step=False). A last line that lacks only its
    newline is whole, and stays.
    """
    path = epath.Path(path)
    if not path.exists():
        return 0
    content = path.read_bytes()
    lines = [line for line in content.split(b'\n') if line.strip()]
    at_step = lambda record: (
        keep_evaluations_at_step or not any(name.startswith('eval/') for name in record)
    )
    stays = lambda record: record['step'] < step or (record['step'] == step and at_step(record))
    rest = [line for line in lines if (record := _parse(line)) is not None and stays(record)]
    new = b''.join(line + b'\n' for line in rest)
    if new != content:
        replace(path, new)
    return len(lines) - len(rest)


def _parse(line: bytes) -> dict | None:
    """Returns the object of one line; None if it is no strict JSON object with a step."""
    try:
        record = json.loads(line.decode(), parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and type(record.get('step')) is int else None


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f'{constant} is not JSON')


def is_local(path: epath.PathLike) -> bool:
    """Whether `path` lies on a file system, not in an object store (gs://, s3://)."""
    return '://' not in os.fspath(path)
