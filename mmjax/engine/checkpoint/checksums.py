"""Checks step directories: which steps exist, which are whole, which a kill interrupted.

Orbax notices no flipped bit in array data, so `checksums.json` holds the size and sha256 of every
other file of its step and a sha256 of itself. It is written last: a step without it is unfinished.
It lies inside the step, so moving, copying or deleting the step takes it along. This module needs
neither jax nor Orbax.
"""

import concurrent.futures
import hashlib
import json
import re
from collections.abc import Mapping, Sequence

from absl import logging
from etils import epath

from mmjax.errors import UserError

CHECKSUMS = 'checksums.json'
META = 'meta.json'
UNFINISHED = f'has no {CHECKSUMS}: its save was cut short'
Digest = dict[str, int | str]  # 'size' in bytes, 'sha256' in hex


def absolute(path: epath.PathLike) -> epath.Path:
    path = epath.Path(path)
    return path if '://' in str(path) else path.expanduser().resolve()


def steps(folder: epath.Path) -> list[int]:
    """Returns the steps in a folder, newest first."""
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    return sorted((int(n) for n in names if re.fullmatch('0|[1-9][0-9]*', n)), reverse=True)


def remove(step: epath.Path) -> None:
    # The checksums go first: a kill half-way leaves an unfinished step, not a damaged one.
    (step / CHECKSUMS).unlink(missing_ok=True)
    step.rmtree()


def _files(step: epath.Path, folder: str = '') -> list[str]:
    names: list[str] = []
    for path in (step / folder).iterdir():
        name = f'{folder}/{path.name}' if folder else path.name
        names += _files(step, name) if path.is_dir() else [name]
    return sorted(names)


def _digest(path: epath.Path) -> Digest:
    with path.open('rb') as file:
        sha256 = hashlib.file_digest(file, 'sha256').hexdigest()
        return {'size': file.tell(), 'sha256': sha256}


def _digests(step: epath.Path, names: Sequence[str]) -> dict[str, Digest]:
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        return dict(zip(names, pool.map(lambda name: _digest(step / name), names), strict=True))


def _sign(files: Mapping[str, Digest]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def write(step: epath.Path) -> None:
    """Hashes every file of a complete step and writes the checksums in one move."""
    files = _digests(step, _files(step))
    temporary = step / f'{CHECKSUMS}.tmp'
    temporary.write_text(json.dumps({'files': files, 'sha256': _sign(files)}, indent=1))
    temporary.rename(step / CHECKSUMS)


def _read(content: bytes) -> dict[str, Digest] | None:
    """Returns the digest of every file; None if a bit of `content` has changed."""
    try:
        record = json.loads(content)
        return record['files'] if _sign(record['files']) == record['sha256'] else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def find_fault(step: epath.Path) -> str | None:
    """Returns what is wrong with a step directory; None if every byte is as written."""
    if not (step / CHECKSUMS).exists():
        return UNFINISHED
    files = _read((step / CHECKSUMS).read_bytes())
    if files is None:
        return f'{CHECKSUMS} is damaged'
    for name in files:
        if not (step / name).is_file():
            return f'{name} is missing'
    try:
        digests = _digests(step, list(files))
    except OSError as error:
        return f'it cannot be read: {error}'
    for name, old in files.items():
        for key in ('size', 'sha256'):
            if (new := digests[name][key]) != old[key]:
                return f'{name} has {key} {str(new)[:12]} instead of {str(old[key])[:12]}'
    return None


def verify(step: epath.Path) -> None:
    if not step.exists():
        raise UserError(f'there is no checkpoint {step}')
    if fault := find_fault(step):
        raise UserError(f'checkpoint {step} is not good: {fault}')


def walk_back(folder: epath.Path) -> tuple[tuple[int, dict] | None, dict[int, str]]:
    """Finds the newest good step; logs one warning that names the later ones it skips.

    Returns:
      ((step, meta), or None if there is none; {skipped step: its fault}).

    Raises:
      UserError: if there are steps and none is good. A single unfinished step is no fault: the
        run was killed in its first save.
    """
    skipped: dict[int, str] = {}
    newest = None
    for step in steps(folder):
        fault = find_fault(folder / str(step))
        if fault is None:
            newest = step, json.loads((folder / str(step) / 'meta' / META).read_text())
            break
        skipped[step] = fault
    if skipped:
        faults = '; '.join(f'step {step}: {fault}' for step, fault in skipped.items())
        if newest is None and list(skipped.values()) != [UNFINISHED]:
            raise UserError(f'no checkpoint in {folder} is good ({faults}); remove it to continue')
        start = f'from step {newest[0]}' if newest else 'without a checkpoint'
        logging.warning('%s: continuing %s; skipped %s', folder, start, faults)
    return newest, skipped
