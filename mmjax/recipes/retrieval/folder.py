"""Reads a folder of item pictures: image_paths.json, image_splits.json, the pictures.

    image_paths.json   {path: {item_id, split}}
    image_splits.json  {split: [path]}, where there is one: it must not contradict
    images/…           the pictures; paths are relative to the folder, or to its `images`

Faults of the folder's structure raise UserError at once; faults of an entry or a picture raise
RecordError, to be listed and counted. Descriptions and prompts:
`mmjax.recipes.retrieval.prompts`.
"""

import dataclasses
import functools
import hashlib
import os
import pathlib
import posixpath
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from mmjax.data import images
from mmjax.data.faults import Ledger
from mmjax.data.tables import file_stamp, read_json
from mmjax.errors import RecordError, UserError

TABLE, SPLITS = 'image_paths.json', 'image_splits.json'
_STAMPED = 50_000  # pictures whose files enter the digest; of larger tables every n-th


@dataclasses.dataclass(frozen=True)
class Row:
    """One entry of image_paths.json; `line` counts entries from 1."""

    line: int
    path: str  # as the table has it
    item: str


@dataclasses.dataclass(frozen=True)
class RetrievalFolder:
    """A folder whose structure has been checked.

    rows: split → its entries in order; malformed: (line, what is wrong) of entries that belong to
    no split; pictures: where paths begin; digest: of the tables and the pictures' sizes and times.
    """

    root: pathlib.Path
    pictures: pathlib.Path
    rows: dict[str, list[Row]]
    malformed: tuple[tuple[int, str], ...]
    digest: str

    def items(self) -> list[str]:
        """Returns the ids of all items, sorted; an item's place is its identity."""
        return sorted({row.item for rows in self.rows.values() for row in rows})

    def records(self, split: str, ledger: Ledger, max_pixels: int) -> Iterator[dict[str, Any]]:
        """Yields {'item', 'image_path' from the root, 'line'}, booking what is left out."""
        ledger.rows = len(self.rows[split])
        if split == next(iter(self.rows)):  # malformed entries are booked once
            ledger.rows += len(self.malformed)
            for line, what in self.malformed:
                ledger.fault(RecordError('malformed_row', f'{TABLE} entry {line} {what}'), line)
                ledger.tick()
        check = functools.partial(self._check, max_pixels=max_pixels)
        stamp = lambda row: [row.path, row.item, *file_stamp(self.pictures / row.path)]
        for row, found in ledger.survey(self.rows[split], check, stamp):
            if isinstance(found, RecordError):
                ledger.fault(found, row.line)
            else:
                yield found
            ledger.tick()

    def _check(self, row: Row, max_pixels: int) -> dict[str, Any]:
        path = (self.pictures / row.path).relative_to(self.root).as_posix()
        try:
            picture = images.inside(self.root, path)  # of the root: `images` may be a link
        except RuntimeError as error:  # a link to itself, before Python 3.13
            raise RecordError('unreadable_image', f'{path} cannot be read: {error}') from error
        images.check_image(picture, path, max_pixels=max_pixels)
        return {'item': row.item, 'image_path': path, 'line': row.line}


def open_folder(root: str | os.PathLike, splits: Sequence[str]) -> RetrievalFolder:
    """Checks the structure of a folder without opening a picture.

    Raises:
      UserError: a missing root or table, a table that is not an object, a split without pictures,
        a path that leads outside the root, a picture that stands twice, or an image_splits.json
        that contradicts.
    """
    root = pathlib.Path(root).expanduser()
    if not root.is_dir():
        raise UserError(f'the data root {root} is not a folder')
    rows: dict[str, list[Row]] = {split: [] for split in splits}
    malformed, others, where = [], set(), {}
    for line, (path, entry) in enumerate(read_table(root).items(), start=1):
        if path.startswith(('/', '~')) or '..' in path.split('/') or '\0' in path or not path:
            raise UserError(f'{root / TABLE}: the path {path!r} leads outside the data root')
        what = _wrong(path, entry)
        if what:
            malformed.append((line, what))
            continue
        name = posixpath.normpath(path)
        if name in where:
            raise UserError(f'{root / TABLE}: entry {line} ({path!r}) names {name} a second time')
        where[name] = entry['split']
        if entry['split'] in rows:
            rows[entry['split']].append(Row(line, path, entry['item_id']))
        else:
            others.add(entry['split'])
    if not where and malformed:
        line, what = malformed[0]
        raise UserError(f'{root / TABLE}: entry {line} {what}, and no entry is well formed')
    for split, found in rows.items():
        if not found:
            known = ', '.join(sorted({*others, *(s for s, r in rows.items() if r)})) or 'none'
            raise UserError(f'{root / TABLE} has no picture of split {split!r} (splits: {known})')
    _compare(root, where)
    base = _base(root, where)
    return RetrievalFolder(root, base, rows, tuple(malformed), _digest(root, base, rows))


def named_splits(root: str | os.PathLike) -> set[str]:
    """Returns the splits that the table names, well formed entry or not."""
    table = read_table(pathlib.Path(root).expanduser())
    found = (entry.get('split') for entry in table.values() if isinstance(entry, dict))
    return {split for split in found if isinstance(split, str)}


def read_table(root: pathlib.Path) -> dict[str, Any]:
    """Returns image_paths.json; raises UserError where it is missing or not an object."""
    return _object(root / TABLE)


def _object(path: pathlib.Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f'{path} does not exist')
    try:
        content = read_json(path, str(path))
    except RecordError as error:
        raise UserError(str(error)) from error
    if not isinstance(content, dict):
        raise UserError(f'{path} is not an object, but a {type(content).__name__}')
    return content


def _wrong(path: str, entry: Any) -> str:
    """Says what is wrong with an entry; '' if nothing is."""
    if re.search('[\ud800-\udfff]', path):
        return f'({path!r}) has half a surrogate pair in its path'
    if not isinstance(entry, dict):
        return f'({path!r}) is not an object'
    for key in ('item_id', 'split'):
        if key not in entry:
            return f'({path!r}) has no {key}'
        if not isinstance(entry[key], str) or not entry[key]:
            return f'({path!r}): {key} is {entry[key]!r:.60}, not a name'
    return ''


def _compare(root: pathlib.Path, where: dict[str, str]) -> None:
    if not (root / SPLITS).is_file():
        return
    for split, paths in _object(root / SPLITS).items():
        if not isinstance(paths, list):
            raise UserError(f'{root / SPLITS}: split {split!r} is not a list of paths')
        for path in paths:
            if not isinstance(path, str):
                raise UserError(f'{root / SPLITS}: split {split!r} holds {path!r:.60}, not a path')
            known = where.get(posixpath.normpath(path), split)
            if known != split:
                raise UserError(
                    f'{root / SPLITS} puts {path} into {split!r}, {TABLE} into {known!r}'
                )


def _base(root: pathlib.Path, paths: Iterable[str]) -> pathlib.Path:
    """Returns where paths begin: the root or its `images`, wherever the first that exists lies."""
    for path in paths:
        for base in (root, root / 'images'):
            if os.path.isfile(base / path):  # unlike pathlib's, never raises
                return base
    return root


def _digest(root: pathlib.Path, base: pathlib.Path, rows: dict[str, list[Row]]) -> str:
    digest = hashlib.sha256(base.relative_to(root).as_posix().encode())
    with (root / TABLE).open('rb') as file:
        digest.update(hashlib.file_digest(file, 'sha256').digest())
    paths = [row.path for split in rows.values() for row in split]
    for path in paths[:: -(-len(paths) // _STAMPED)]:
        digest.update(repr(file_stamp(base / path)).encode())
    return digest.hexdigest()
