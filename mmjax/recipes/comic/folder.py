"""Reads a folder of comic pages: pages.csv, labels.json, json/<id>.json in both forms, pictures.

Faults of the folder's structure raise UserError at once; faults of a page raise RecordError, for
the ledger to list and count.
"""

import array
import csv
import dataclasses
import functools
import hashlib
import math
import os
import pathlib
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mmjax.data import images
from mmjax.data.faults import Ledger
from mmjax.data.tables import file_stamp, read_json
from mmjax.errors import RecordError, UserError

COLUMNS = ('canonical_id', 'image_path', 'split')
TABLE, LABELS = 'pages.csv', 'labels.json'
_STAMPED = 50_000  # pages whose files enter the digest; of larger tables every n-th


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of pages.csv; `line` counts from 1, the header."""

    line: int
    canonical_id: str
    image_path: str
    split: str


@dataclasses.dataclass(frozen=True)
class ComicFolder:
    """A folder whose structure has been checked.

    rows: split → lines of pages.csv; malformed: (line, what is wrong) of lines that belong to no
    split; digest: of the tables and of the sizes and times of the pages' files.
    """

    root: pathlib.Path
    rows: dict[str, int]
    malformed: tuple[tuple[int, str], ...]
    digest: str

    def pages(
        self,
        split: str,
        ledger: Ledger,
        page_types: Sequence[str],
        max_panels: int,
        max_pixels: int,
    ) -> Iterator[dict[str, Any]]:
        """Yields the records of a split (see `page_record`), booking what is left out."""
        ledger.rows = self.rows[split]
        if split == next(iter(self.rows)):  # malformed lines are booked once, with the first split
            ledger.rows += len(self.malformed)
            for line, what in self.malformed:
                ledger.fault(RecordError('malformed_row', f'{TABLE} line {line} {what}'), line)
                ledger.tick()
        labels = read_labels(self.root)

        def wanted() -> Iterator[Row]:
            for row in _rows(self.root):
                if isinstance(row, Row) and row.split == split:
                    page_type = labels.get(row.canonical_id, 'missing')
                    if page_type in page_types:
                        yield row
                    else:
                        ledger.skip(f'page_type:{page_type}')
                        ledger.tick()

        check = functools.partial(self._check, max_panels=max_panels, max_pixels=max_pixels)
        for row, found in ledger.survey(wanted(), check, self._stamp):
            if isinstance(found, RecordError):
                ledger.fault(found, row.line)
            else:
                ledger.counts.update(found['counts'])
                if found['record']['boxes']:
                    yield {**found['record'], 'page_type': labels[row.canonical_id]}
                else:
                    ledger.skip('no_panels')
            ledger.tick()

    def _files(self, row: Row) -> tuple[str, str]:
        return f'json/{row.canonical_id}.json', row.image_path

    def _stamp(self, row: Row) -> list:
        return [
            row.canonical_id,
            row.image_path,
            *map(file_stamp, (self.root / f for f in self._files(row))),
        ]

    def _check(self, row: Row, max_panels: int, max_pixels: int) -> dict[str, Any]:
        annotation, image_path = self._files(row)
        picture = images.inside(self.root, image_path)
        page = read_json(images.inside(self.root, annotation), annotation)
        size = images.check_image(picture, image_path, max_pixels=max_pixels)
        record, counts = page_record(page, annotation, size, max_panels)
        record |= {'canonical_id': row.canonical_id, 'image_path': image_path, 'line': row.line}
        return {'record': record, 'counts': counts}


def open_folder(root: str | os.PathLike, splits: Sequence[str]) -> ComicFolder:
    """Checks the structure of a folder without opening a page; streams pages.csv once.

    Raises:
      UserError: a missing root, table, json folder or column, a split without pages, an id that
        stands twice, or a path that leads outside the root.
    """
    root = pathlib.Path(root).expanduser()
    if not root.is_dir():
        raise UserError(f'the data root {root} is not a folder')
    for table in (TABLE, LABELS):
        if not (root / table).is_file():
            raise UserError(f'{root / table} does not exist')
    if not (root / 'json').is_dir():
        raise UserError(f'{root / "json"} is not a folder')
    rows = dict.fromkeys(splits, 0)
    malformed, lines, identities = [], array.array('q'), array.array('Q')
    others: Counter[str] = Counter()
    for row in _rows(root):
        if not isinstance(row, Row):
            malformed.append(row)
            continue
        if row.split not in rows:
            others[row.split] += 1
            continue
        rows[row.split] += 1
        for path in (row.image_path, row.canonical_id):
            if path.startswith(('/', '~')) or '..' in path.split('/') or '\0' in path:
                raise UserError(
                    f'{root / TABLE} line {row.line}: the path {path!r} leads outside the data root'
                )
        lines.append(row.line)
        identity = hashlib.blake2b(row.canonical_id.encode(), digest_size=8).digest()
        identities.append(int.from_bytes(identity, 'little'))
    for split, count in rows.items():
        if not count:
            known = ', '.join(sorted({*others, *(s for s, n in rows.items() if n)})) or 'none'
            raise UserError(f'{root / TABLE} has no page of split {split!r} (splits: {known})')
    _refuse_twins(root, np.asarray(lines), np.asarray(identities))
    return ComicFolder(root, rows, tuple(malformed), _digest(root, rows, sum(rows.values())))


def read_labels(root: pathlib.Path) -> dict[str, str]:
    """Returns page types by canonical_id; raises UserError where labels.json is not that."""
    try:
        labels = read_json(root / LABELS, str(root / LABELS))
    except RecordError as error:
        raise UserError(str(error)) from error
    if not isinstance(labels, dict):
        raise UserError(f'{root / LABELS} is not an object of page types by canonical_id')
    for key, value in labels.items():
        if not isinstance(value, str):
            raise UserError(f'{root / LABELS}: the page type of {key!r} is not a string')
        labels[key] = sys.intern(value)
    return labels


def page_record(
    page: Any, name: str, size: tuple[int, int], max_panels: int
) -> tuple[dict[str, Any], dict[str, int]]:
    """Turns a page's JSON, of either form, into a record of its panels.

    Args:
      page: {image_width, image_height, panels: [{bbox: [x, y, w, h] in pixels, text}]} in reading
        order, or panels: [{panel_number, box_2d: [y1, x1, y2, x2] in 0-1000, description,
        text_content: [{text}]}]; there the text is the description and what is said.
      name: of the file, for errors.
      size: (width, height) of the picture itself.
      max_panels: further panels are dropped and counted.

    Returns:
      {'width', 'height' of the picture, 'boxes': [[x0, y0, x1, y1] as fractions of the page],
      'texts': [str], 'reading': reading positions from 0 to 1, or [] where the form has none}
      and counts of boxes clipped, boxes without area and panels dropped.
    """
    panels = page.get('panels') if isinstance(page, dict) else None
    if not isinstance(panels, list) or not all(isinstance(panel, dict) for panel in panels):
        raise RecordError('malformed_json', f'{name} holds no list of panels')
    counts: Counter[str] = Counter()
    vlm = any('box_2d' in panel for panel in panels)
    if vlm:  # a panel without a number keeps its place
        places = [panel.get('panel_number', place + 1) for place, panel in enumerate(panels)]
        if not all(_is_number(place) for place in places):
            raise RecordError('malformed_json', f'{name}: a panel_number is not a number')
        panels = [panels[i] for i in sorted(range(len(panels)), key=places.__getitem__)]
    width, height = (page.get(key, real) for key, real in zip(_SIZES, size, strict=True))
    if not (_is_number(width) and _is_number(height) and min(width, height) > 0):
        raise RecordError('malformed_json', f'{name}: {" or ".join(_SIZES)} is not a size')
    boxes, texts = [], []
    for place, panel in enumerate(panels):
        where = f'{name}: panel {place + 1}'
        box, clipped = _box(panel, where, vlm, width, height)
        text = _text(panel, where, vlm)
        if box is None:
            counts['boxes_empty'] += 1
            continue
        counts['boxes_clipped'] += clipped
        boxes.append(box)
        texts.append(text)
    if len(boxes) > max_panels:
        counts['panels_over_limit'] += len(boxes) - max_panels
    reading = [round(i / max(len(boxes) - 1, 1), 6) for i in range(len(boxes))] if vlm else []
    record = {
        'width': size[0],
        'height': size[1],
        'boxes': boxes[:max_panels],
        'texts': texts[:max_panels],
        'reading': reading[:max_panels],
    }
    return record, {key: count for key, count in counts.items() if count}


_SIZES = ('image_width', 'image_height')


def _box(panel, where, vlm, width, height) -> tuple[list[float] | None, bool]:
    """Returns the box as fractions clipped to the page, None where nothing is left of it."""
    key = 'box_2d' if vlm else 'bbox'
    values = panel.get(key)
    if not isinstance(values, list) or len(values) != 4 or not all(map(_is_number, values)):
        raise RecordError('malformed_json', f'{where} has no {key} of four numbers')
    if vlm:
        y0, x0, y1, x1 = (value / 1000 for value in values)
    else:
        x, y, w, h = values
        x0, y0, x1, y1 = x / width, y / height, (x + w) / width, (y + h) / height
    inside = [min(max(value, 0.0), 1.0) for value in (x0, y0, x1, y1)]
    if inside[2] - inside[0] < 1e-3 or inside[3] - inside[1] < 1e-3:
        return None, False
    clipped = any(abs(a - b) > 1e-6 for a, b in zip(inside, (x0, y0, x1, y1), strict=True))
    return [round(value, 6) for value in inside], clipped


def _text(panel, where, vlm) -> str:
    if vlm:
        said = panel.get('text_content') or []
        if not isinstance(said, list):
            raise RecordError('malformed_json', f'{where}: text_content is not a list')
        parts = [panel.get('description')]
        parts += [entry.get('text') if isinstance(entry, dict) else entry for entry in said]
    else:
        parts = [panel.get('text')]
    if not all(part is None or isinstance(part, str) for part in parts):
        raise RecordError('malformed_json', f'{where} has a text that is not a string')
    return ' '.join(part.strip() for part in parts if part and part.strip())


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _rows(root: pathlib.Path) -> Iterator[Row | tuple[int, str]]:
    """Streams pages.csv: Rows, and (line, what is wrong) for lines that are none."""
    path = root / TABLE
    try:
        with path.open(newline='', encoding='utf-8-sig') as file:
            reader = csv.reader(file)
            header = [name.strip() for name in next(reader, [])]
            for column in COLUMNS:
                if column not in header:
                    raise UserError(
                        f'{path} has no column {column!r} (columns: {", ".join(header)})'
                    )
            places = [header.index(column) for column in COLUMNS]
            for fields in reader:
                if len(fields) == len(header):
                    values = [fields[place].strip() for place in places]
                    if all(values):
                        yield Row(reader.line_num, *values)
                    else:
                        empty = COLUMNS[values.index('')]
                        yield reader.line_num, f'has an empty {empty}'
                elif fields:
                    yield reader.line_num, f'has {len(fields)} fields, the header {len(header)}'
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f'{path} is not a CSV table in UTF-8: {error}') from error


def _refuse_twins(root: pathlib.Path, lines: np.ndarray, identities: np.ndarray) -> None:
    order = np.argsort(identities, kind='stable')
    same = np.flatnonzero(identities[order][1:] == identities[order][:-1])
    if len(same):
        first, second = lines[order[same[0]]], lines[order[same[0] + 1]]
        name = next(r.canonical_id for r in _rows(root) if isinstance(r, Row) and r.line == first)
        raise UserError(
            f'{root / TABLE}: canonical_id {name!r} stands on line {first} and again on {second}'
        )


def _digest(root: pathlib.Path, splits: dict[str, int], count: int) -> str:
    digest = hashlib.sha256()
    for table in (TABLE, LABELS):
        with (root / table).open('rb') as file:
            digest.update(hashlib.file_digest(file, 'sha256').digest())
    every, place = -(-count // _STAMPED), 0
    for row in _rows(root):
        if isinstance(row, Row) and row.split in splits:
            if place % every == 0:
                for path in (f'json/{row.canonical_id}.json', row.image_path):
                    digest.update(repr(file_stamp(root / path)).encode())
            place += 1
    return digest.hexdigest()
