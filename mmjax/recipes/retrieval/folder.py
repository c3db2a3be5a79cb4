"""Reads a folder of item images: image_paths.json, image_splits.json, the images.

    image_paths.json   {path: {item_id, split}}
    image_splits.json  {split: [path]}; optional: it must not contradict
    images/…           the images; paths are relative to the folder, or to its `images`

Faults of the folder's structure raise UserError at once; faults of an entry or an image are
counted and listed by the FaultReport. Descriptions and prompts:
`mmjax.recipes.retrieval.prompts`.
"""

import dataclasses
import functools
import os
import pathlib
import posixpath
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from mmjax.data import tables
from mmjax.data.faults import FaultReport
from mmjax.data.tables import file_stamp, read_json
from mmjax.errors import UserError

TABLE = 'image_paths.json'
SPLITS = 'image_splits.json'


@dataclasses.dataclass(frozen=True)
class Row:
    """One entry of image_paths.json; `line` counts entries from 1."""

    line: int
    path: str  # as in the table
    item: str


@dataclasses.dataclass(frozen=True)
class RetrievalFolder:
    """A folder whose structure has been checked.

    rows: split → its entries in order; malformed: (line, problem) of entries that belong to no
    split; base: the folder that paths are relative to; digest: of the table and the images' sizes
    and times.
    """

    root: pathlib.Path
    base: pathlib.Path
    rows: dict[str, list[Row]]
    malformed: tuple[tuple[int, str], ...]
    digest: str

    def items(self) -> list[str]:
        """Returns the ids of all items, sorted; an item's position is its identity."""
        return sorted({row.item for rows in self.rows.values() for row in rows})

    def records(self, split: str, report: FaultReport, max_pixels: int) -> Iterator[dict[str, Any]]:
        """Yields {'item', 'image_path' from the root, 'line'}; what is left out is reported."""
        report.rows = len(self.rows[split])
        if split == next(iter(self.rows)):  # malformed entries are reported with the first split
            report.malformed_rows(f'{TABLE} entry', self.malformed)
        check = functools.partial(self._check, max_pixels=max_pixels)
        stamp = lambda row: [row.path, row.item, *file_stamp(self.base / row.path)]
        lines = lambda row: [row.line]
        for _, record in report.check_each(self.rows[split], check, stamp, lines):
            yield record

    def _check(self, row: Row, max_pixels: int) -> dict[str, Any]:
        path = (self.base / row.path).relative_to(self.root).as_posix()
        tables.check_image(self.root, path, max_pixels)  # of the root: `images` may be a link
        return {'item': row.item, 'image_path': path, 'line': row.line}


def open_folder(root: str | os.PathLike, splits: Sequence[str]) -> RetrievalFolder:
    """Checks the structure of a folder without opening an image.

    Raises:
      UserError: a missing root or table, a table that is not an object, a split without images,
        a path that leads outside the root, an image that stands twice, or an image_splits.json
        that contradicts.
    """
    root = tables.data_root(root)
    rows: dict[str, list[Row]] = {split: [] for split in splits}
    malformed = []
    others = set()
    split_of: dict[str, str] = {}
    for line, (path, entry) in enumerate(read_table(root).items(), start=1):
        tables.check_inside(path, f'{root / TABLE}')
        problem = _problem(path, entry)
        if problem:
            malformed.append((line, problem))
            continue
        name = posixpath.normpath(path)
        if name in split_of:
            raise UserError(f'{root / TABLE}: entry {line} ({path!r}) names {name} a second time')
        split_of[name] = entry['split']
        if entry['split'] in rows:
            rows[entry['split']].append(Row(line, path, entry['item_id']))
        else:
            others.add(entry['split'])
    if not split_of and malformed:
        line, problem = malformed[0]
        raise UserError(f'{root / TABLE}: entry {line} {problem}, and no entry is well formed')
    for split, entries in rows.items():
        if not entries:
            known = ', '.join(sorted({*others, *(s for s, r in rows.items() if r)})) or 'none'
            raise UserError(f'{root / TABLE} has no image of split {split!r} (splits: {known})')
    _compare(root, split_of)
    base = _base(root, split_of)
    files = [(base / row.path,) for split in rows.values() for row in split]
    digest = tables.folder_digest([root / TABLE], files, len(files))
    digest = f'{base.relative_to(root).as_posix()} {digest}'
    return RetrievalFolder(root, base, rows, tuple(malformed), digest)


def named_splits(root: str | os.PathLike) -> set[str]:
    """Returns the splits that the table names, well formed entry or not."""
    table = read_table(pathlib.Path(root).expanduser())
    splits = (entry.get('split') for entry in table.values() if isinstance(entry, dict))
    return {split for split in splits if isinstance(split, str)}


def read_table(root: pathlib.Path) -> dict[str, Any]:
    """Returns image_paths.json; raises UserError where it is missing or not an object."""
    return _object(root / TABLE)


def _object(path: pathlib.Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f'{path} does not exist')
    content = read_json(path, str(path))
    if not isinstance(content, dict):
        raise UserError(f'{path} is not an object, but a {type(content).__name__}')
    return content


def _problem(path: str, entry: Any) -> str:
    """Returns what is wrong with an entry, '' if nothing."""
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


def _compare(root: pathlib.Path, split_of: dict[str, str]) -> None:
    if not (root / SPLITS).is_file():
        return
    for split, paths in _object(root / SPLITS).items():
        if not isinstance(paths, list):
            raise UserError(f'{root / SPLITS}: split {split!r} is not a list of paths')
        for path in paths:
            if not isinstance(path, str):
                raise UserError(f'{root / SPLITS}: split {split!r} holds {path!r:.60}, not a path')
            known = split_of.get(posixpath.normpath(path), split)
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
