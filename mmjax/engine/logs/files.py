"""Files of a run: strict JSON that is replaced as a whole, and a log of lines that can be cut back.

A number that is not finite is written as the string 'nan', 'inf' or '-inf'.
"""

import contextlib
import json
import math
import os
from collections.abc import Mapping
from typing import Any

from etils import epath


def plain(value: Any, where: str = 'value') -> Any:
    """Returns `value` as strict JSON holds it: arrays as lists, 'nan', 'inf', '-inf' as strings.

    Dicts keep their order. Raises TypeError, naming the place, for what JSON cannot hold.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if isinstance(value, Mapping):
        out = {str(key): plain(item, f'{where}.{key}') for key, item in value.items()}
        if len(out) < len(value):
            raise TypeError(f'{where} has two keys that read the same in JSON')
        return out
    if isinstance(value, list | tuple):
        return [plain(item, f'{where}[{i}]') for i, item in enumerate(value)]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, 'tolist') and not isinstance(found := value.tolist(), type(value)):
        return plain(found, where)
    raise TypeError(f'{where} is a {type(value).__name__}, which JSON cannot hold')


def encode(value: Any, where: str, indent: int | None = None) -> bytes:
    """Returns `plain(value)` as strict JSON in UTF-8; `where` names it in errors."""
    text = json.dumps(plain(value, where), allow_nan=False, ensure_ascii=False, indent=indent)
    return text.encode('utf-8', 'backslashreplace')  # a lone surrogate becomes its JSON escape


def replace(path, content: bytes) -> None:
    """Writes a file so that a reader, or a kill, meets the old content or the new, never a part."""
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not is_local(path):  # object stores show an object when it is complete
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


def write_json(path, value: Any) -> None:
    """Writes `value` as indented strict JSON, keys in the order given; see `plain`, `replace`."""
    replace(path, encode(value, epath.Path(path).name, indent=1) + b'\n')


def write_results(
    workdir,
    *,
    best: Mapping | None,
    final: Mapping[str, Mapping],
    stages: Mapping[str, Mapping],
    skipped: Mapping[str, int],
    weights: str,
) -> dict:
    """Writes results.json and returns its content.

    `best` is {'step', 'metric', 'value'} or None; `weights` says whose scores `final` holds,
    'best' or 'last'. Raises ValueError where a score is neither a number nor a string.
    """
    if weights not in ('best', 'last'):
        raise ValueError(f"weights is 'best' or 'last', not {weights!r}")
    out = {'best': best, 'weights': weights, 'final': final, 'stages': stages, 'skipped': skipped}
    out = plain(out, 'results')
    for evaluator, scores in out['final'].items():
        for metric, value in scores.items():
            if not isinstance(value, int | float | str):
                raise ValueError(f'the score {evaluator}/{metric} is no number or string: {value}')
    write_json(epath.Path(workdir) / 'results.json', out)
    return out


def read(path) -> tuple[list[dict], int]:
    """Returns the lines of a metrics.jsonl and the number of unreadable ones; ([], 0) if absent."""
    path = epath.Path(path)
    lines = path.read_bytes().split(b'\n') if path.exists() else []
    found = [_parse(line) for line in lines if line.strip()]
    good = [line for line in found if line is not None]
    return good, len(found) - len(good)


def truncate(path, step: int, *, keep_evaluations_at_step: bool = True) -> int:
    """Cuts metrics.jsonl back to what a state saved at `step` has seen; returns lines dropped.

    Dropped are lines past `step`, a torn last line and any other unreadable one. The train line
    of `step` is written before the state is saved and stays. Evaluation lines of `step` stay too,
    unless that evaluation will be redone (pass keep_evaluations_at_step=False). A last line that
    lacks only its newline is whole, and is kept.
    """
    path = epath.Path(path)
    if not path.exists():
        return 0
    content = path.read_bytes()
    lines = [line for line in content.split(b'\n') if line.strip()]
    kept = []
    for line in lines:
        found = _parse(line)
        if found is None or found['step'] > step:
            continue
        evaluation = any(name.startswith('eval/') for name in found)
        if evaluation and found['step'] == step and not keep_evaluations_at_step:
            continue
        kept.append(line)
    new = b''.join(line + b'\n' for line in kept)
    if new != content:
        replace(path, new)
    return len(lines) - len(kept)


def _parse(line: bytes) -> dict | None:
    """Returns the object of one line, or None where it is no strict JSON object with a step."""
    try:
        found = json.loads(line.decode(), parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    known = isinstance(found, dict) and type(found.get('step')) is int
    return found if known else None


def _refuse(constant: str):
    raise ValueError(f'{constant} is not JSON')


def last_step(path) -> int:
    """Returns the step of the last readable line of a metrics.jsonl; -1 if there is none."""
    path = epath.Path(path)
    lines = path.read_bytes().split(b'\n') if path.exists() else []
    return next((found['step'] for line in reversed(lines) if (found := _parse(line))), -1)


def is_local(path) -> bool:
    """Whether `path` lies on a file system, not in an object store (gs://, s3://)."""
    return '://' not in os.fspath(path)
