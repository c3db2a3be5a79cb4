"""Step directories and their checksums: what is there, what is whole, what a kill cut short.

Orbax notices no flipped bit in array data, so `checksums.json` holds the size and sha256 of every
other file of its step and a sha256 of itself. It is written last: a step without it was cut by a
kill. It lies inside the step, so that moving, copying or deleting the step takes it along. Free of
jax and Orbax.
"""

import concurrent.futures
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from absl import logging
from etils import epath

from mmjax.errors import UserError

CHECKSUMS = 'checksums.json'
META = 'meta.json'
UNFINISHED = f'has no {CHECKSUMS}: its save was cut short'
_CHUNK = 1 << 22  # bytes hashed at a time


def absolute(path: epath.PathLike) -> epath.Path:
    path = epath.Path(path)
    return path if '://' in str(path) else path.expanduser().resolve()


def steps(folder: epath.Path) -> list[int]:
    """Returns the steps in a folder, newest first."""
    if not folder.exists():
        return []
    names = [path.name for path in folder.iterdir()]
    return sorted((int(n) for n in names if re.fullmatch('0|[1-9][0-9]*', n)), reverse=True)


def remove(path: epath.Path) -> None:
    # Without its checksums first: killed half-way, it is cut and not damaged.
    (path / CHECKSUMS).unlink(missing_ok=True)
    path.rmtree()


def _files(directory: epath.Path, under: str = '') -> list[str]:
    names = []
    for path in (directory / under).iterdir():
        name = f'{under}/{path.name}' if under else path.name
        names += _files(directory, name) if path.is_dir() else [name]
    return sorted(names)


def _digest(path: epath.Path) -> dict[str, Any]:
    """Returns {'size': bytes, 'sha256': hex} of a file."""
    sha, size = hashlib.sha256(), 0
    with path.open('rb') as file:
        while block := file.read(_CHUNK):
            sha.update(block)
            size += len(block)
    return {'size': size, 'sha256': sha.hexdigest()}


def _digests(directory: epath.Path, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        return dict(zip(names, pool.map(lambda n: _digest(directory / n), names), strict=True))


def _sign(files: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def write(directory: epath.Path) -> None:
    """Hashes every file of a complete step and writes the checksums in one move."""
    files = _digests(directory, _files(directory))
    temporary = directory / f'{CHECKSUMS}.tmp'
    temporary.write_text(json.dumps({'files': files, 'sha256': _sign(files)}, indent=1))
    temporary.rename(directory / CHECKSUMS)


def _read(data: bytes) -> dict[str, dict[str, Any]] | None:
    """Returns the files' entries, None where a bit of `data` is not what was written."""
    try:
        record = json.loads(data)
        return record['files'] if _sign(record['files']) == record['sha256'] else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def find_fault(directory: epath.Path) -> str | None:
    """Returns what is wrong with a step directory; None if every byte is as it was written."""
    if not (directory / CHECKSUMS).exists():
        return UNFINISHED
    files = _read((directory / CHECKSUMS).read_bytes())
    if files is None:
        return f'{CHECKSUMS} is damaged'
    missing = [name for name in files if not (directory / name).is_file()]
    if missing:
        return f'{missing[0]} is missing'
    try:
        found = _digests(directory, list(files))
    except OSError as error:
        return f'it cannot be read: {error}'
    for name, entry in files.items():
        if found[name]['size'] != entry['size']:
            return f'{name} has {found[name]["size"]} bytes instead of {entry["size"]}'
        if found[name] != entry:
            return f'{name} has sha256 {found[name]["sha256"][:12]}…, not {entry["sha256"][:12]}…'
    return None


def verify(directory: epath.Path) -> None:
    if not directory.exists():
        raise UserError(f'there is no checkpoint {directory}')
    fault = find_fault(directory)
    if fault:
        raise UserError(f'checkpoint {directory} is not good: {fault}')


def walk_back(folder: epath.Path) -> tuple[tuple[int, dict] | None, dict[int, str]]:
    """Returns ((step, meta) of the newest good step or None, {later step: its fault}).

    What it passes over is told of in one warning. A single step that was cut counts as none: the
    run was killed in its first save. No good step for any other reason is a UserError.
    """
    rejected, found = {}, None
    for step in steps(folder):
        fault = find_fault(folder / str(step))
        if fault is None:
            found = step, json.loads((folder / str(step) / 'meta' / META).read_text())
            break
        rejected[step] = fault
    if rejected:
        faults = '; '.join(f'step {step}: {fault}' for step, fault in rejected.items())
        if found is None and list(rejected.values()) != [UNFINISHED]:
            raise UserError(f'no checkpoint in {folder} is good ({faults}); remove it to go on')
        chosen = 'as if there were none' if found is None else f'from step {found[0]}'
        logging.warning('%s: going on %s; passed over %s', folder, chosen, faults)
    return found, rejected
