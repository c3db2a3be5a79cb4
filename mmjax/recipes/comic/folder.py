"""Reads a folder of comic pages: pages.csv, labels.json, json/<id>.json in both forms, images.

Faults of the folder's structure raise UserError at once; faults of a page are counted and listed
by the FaultReport.
"""

import array
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

from mmjax.data import images, tables
from mmjax.data.faults import FaultReport
from mmjax.data.tables import file_stamp, read_json
from mmjax.errors import RecordError, UserError

COLUMNS = ('canonical_id', 'image_path', 'split')
TABLE = 'pages.csv'
LABELS = 'labels.json'


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of pages.csv; `line` counts from 1, the header."""

    line: int
    canonical_id: str
    image_path: str
    split: str

    def paths(self, root: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
        """Returns the page's JSON and its image."""
        return root / f'json/{self.canonical_id}.json', root / self.image_path


@dataclasses.dataclass(frozen=True)
class ComicFolder:
    """A folder whose structure has been checked.

    rows: split → number of its pages; malformed: (line, problem) of lines that belong to no split;
    digest: of the tables and of the sizes and times of the pages' files.
    """

    root: pathlib.Path
    rows: dict[str, int]
    malformed: tuple[tuple[int, str], ...]
    digest: str

    def records(
        self,
        split: str,
        report: FaultReport,
        page_types: Sequence[str],
        max_panels: int,
        max_pixels: int,
    ) -> Iterator[dict[str, Any]]:
        """Yields the records of a split (see `page_record`); what is left out is reported."""
        report.rows = self.rows[split]
        if split == next(iter(self.rows)):  # malformed lines are reported with the first split
            report.malformed_rows(f'{TABLE} line', self.malformed)
        labels = read_labels(self.root)

        def selected() -> Iterator[Row]:
            for row in _rows(self.root):
                if row.split == split:
                    page_type = labels.get(row.canonical_id, 'missing')
                    if page_type in page_types:
                        yield row
                    else:
                        report.skip(f'page_type:{page_type}')

        check = functools.partial(self._check, max_panels=max_panels, max_pixels=max_pixels)
        for row, page in report.check_each(selected(), check, self._stamp, lambda row: [row.line]):
            report.counts.update(page['counts'])
            if page['record']['boxes']:
                yield {**page['record'], 'page_type': labels[row.canonical_id]}
            else:
                report.skip('no_panels')

    def _stamp(self, row: Row) -> list:
        paths = row.paths(self.root)
        return [row.canonical_id, row.image_path, *map(file_stamp, paths)]

    def _check(self, row: Row, max_panels: int, max_pixels: int) -> dict[str, Any]:
        annotation = f'json/{row.canonical_id}.json'
        page = read_json(images.inside(self.root, annotation), annotation)
        size = tables.check_image(self.root, row.image_path, max_pixels)
        record, counts = page_record(page, annotation, size, max_panels)
        record |= {'canonical_id': row.canonical_id, 'image_path': row.image_path, 'line': row.line}
        return {'record': record, 'counts': counts}


def open_folder(root: str | os.PathLike, splits: Sequence[str]) -> ComicFolder:
    """Checks the structure of a folder without opening a page; streams pages.csv once.

    Raises:
      UserError: a missing root, table, json folder or column, a split without pages, an id that
        stands twice, or a path that leads outside the root.
    """
    root = tables.data_root(root)
    for table in (TABLE, LABELS):
        if not (root / table).is_file():
            raise UserError(f'{root / table} does not exist')
    if not (root / 'json').is_dir():
        raise UserError(f'{root / "json"} is not a folder')
    rows = dict.fromkeys(splits, 0)
    malformed: list[tuple[int, str]] = []
    lines = array.array('q')
    identities = array.array('Q')
    others: set[str] = set()
    for row in _rows(root, malformed):
        if row.split not in rows:
            others.add(row.split)
            continue
        rows[row.split] += 1
        for path in (row.image_path, row.canonical_id):
            tables.check_inside(path, f'{root / TABLE} line {row.line}')
        lines.append(row.line)
        identity = hashlib.blake2b(row.canonical_id.encode(), digest_size=8).digest()
        identities.append(int.from_bytes(identity, 'little'))
    for split, count in rows.items():
        if not count:
            known = ', '.join(sorted({*others, *(s for s, n in rows.items() if n)})) or 'none'
            raise UserError(f'{root / TABLE} has no page of split {split!r} (splits: {known})')
    _check_unique(root, np.asarray(lines), np.asarray(identities))
    pages = (row.paths(root) for row in _rows(root) if row.split in rows)
    both = (root / TABLE, root / LABELS)
    digest = tables.folder_digest(both, pages, sum(rows.values()))
    return ComicFolder(root, rows, tuple(malformed), digest)


def read_labels(root: pathlib.Path) -> dict[str, str]:
    """Returns page types by canonical_id; raises UserError where labels.json is not that."""
    labels = read_json(root / LABELS, str(root / LABELS))
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
        order, or the VLM form, panels: [{panel_number, box_2d: [y1, x1, y2, x2] in 0-1000,
        description, text_content: [{text}]}], whose text is the description and the text_content.
      name: of the file, for errors.
      size: (width, height) of the image.
      max_panels: further panels are dropped and counted.

    Returns:
      {'width', 'height' of the image, 'boxes': [[x0, y0, x1, y1] as fractions of the page],
      'texts': [str], 'reading': reading positions from 0 to 1 in the VLM form, else []}
      and counts of boxes clipped, boxes without area and panels dropped.
    """
    panels = page.get('panels') if isinstance(page, dict) else None
    if not isinstance(panels, list) or not all(isinstance(panel, dict) for panel in panels):
        raise RecordError('malformed_json', f'{name} holds no list of panels')
    counts: Counter[str] = Counter()
    vlm = any('box_2d' in panel for panel in panels)
    if vlm:  # a panel without a number keeps its position
        numbers = [panel.get('panel_number', i) for i, panel in enumerate(panels, start=1)]
        if not all(map(_is_number, numbers)):
            raise RecordError('malformed_json', f'{name}: a panel_number is not a number')
        panels = [panels[i] for i in sorted(range(len(panels)), key=numbers.__getitem__)]
    width, height = (page.get(key, real) for key, real in zip(_SIZES, size, strict=True))
    if not (_is_number(width) and _is_number(height) and min(width, height) > 0):
        raise RecordError('malformed_json', f'{name}: {" or ".join(_SIZES)} is not a size')
    boxes = []
    texts = []
    for number, panel in enumerate(panels, start=1):
        where = f'{name}: panel {number}'
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
    """Returns the box as fractions clipped to the page, or None if it has no area there."""
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
        entries = panel.get('text_content') or []
        if not isinstance(entries, list):
            raise RecordError('malformed_json', f'{where}: text_content is not a list')
        parts = [panel.get('description')]
        parts += [entry.get('text') if isinstance(entry, dict) else entry for entry in entries]
    else:
        parts = [panel.get('text')]
    if not all(part is None or isinstance(part, str) for part in parts):
        raise RecordError('malformed_json', f'{where} has a text that is not a string')
    return ' '.join(part.strip() for part in parts if part and part.strip())


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _rows(root: pathlib.Path, malformed: list[tuple[int, str]] | None = None) -> Iterator[Row]:
    """Streams pages.csv; (line, problem) of rows that are none is appended to `malformed`."""
    for line, values, problem in tables.csv_rows(root / TABLE, COLUMNS):
        if not problem:
            yield Row(line, *values)
        elif malformed is not None:
            malformed.append((line, problem))


def _check_unique(root: pathlib.Path, lines: np.ndarray, identities: np.ndarray) -> None:
    order = np.argsort(identities, kind='stable')
    same = np.flatnonzero(identities[order][1:] == identities[order][:-1])
    if len(same):
        first, second = lines[order[same[0]]], lines[order[same[0] + 1]]
        name = next(row.canonical_id for row in _rows(root) if row.line == first)
        raise UserError(
            f'{root / TABLE}: canonical_id {name!r} stands on line {first} and again on {second}'
        )
