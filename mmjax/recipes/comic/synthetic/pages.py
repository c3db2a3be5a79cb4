"""Built-in comic pages: each a pure function of (seed, split, index), told as it is drawn.

What is in the pixels, and so can be learnt:
  - of a page: place, time of day, weather and palette; a cast of two or three characters, each
    of a species, a colour and a hat;
  - of a panel: who acts, one of 11 actions (pose, prop and the marks comics put around it), one of
    12 items (in a round inset) in one of 8 colours, perhaps another of the cast beside. No two
    panels of a page share an action or an item, so any two of its texts differ in at least two
    things that can be seen.
What a text says: always the action and the item, often who, the item's colour, who watches, and
where and when; in speech, narration or sound effects with several words for most things. A
character's name goes with its species.
What is not in the pixels: the words (lettering is scribble), how long the text is (balloons have
their size, shape and number of lines from a stream that never saw the text) and whether it is
spoken, narrated or a sound. A silent panel has no balloon. Panel boxes have a random stream of
their own: layout says nothing of a text. Left and right are in no text, so pictures may be
mirrored. What no text speaks of: where things stand and how large, clutter in the items' colours,
colours of props and marks. No font is used: pixels depend on pillow's polygons alone.
"""

import csv
import functools
import hashlib
import io
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from PIL import Image

from mmjax.data import images, processes
from mmjax.data.drawing import COLOURS, pick
from mmjax.data.faults import FaultReport
from mmjax.recipes.comic.folder import page_record
from mmjax.recipes.comic.synthetic import drawing, figures, words

NARRATIVE = ('narrative', 'story')  # page types that tell something; the others are sifted out

_CHUNK = 32  # pages that a process draws at a time
_PAGE_TYPES = ('narrative',) * 14 + ('story',) * 9 + ('cover', 'credits')

# boxes as rows of panels: (chance, page width, page height, panels a row or None for irregular)
_LAYOUTS = (
    (0.12, 780, 270, (3,)),
    (0.08, 960, 260, (4,)),
    (0.14, 500, 520, (2, 2)),
    (0.18, 480, 680, (2, 2, 2)),
    (0.04, 600, 640, (3, 3, 3)),
    (0.02, 480, 500, (1,)),
    (0.42, 480, 680, None),
)


def _streams(seed: int, split: str, index: int, names: str) -> dict[str, np.random.Generator]:
    """One generator a name, each knowing nothing of the others; the same on every machine."""
    if seed < 0 or index < 0:
        raise ValueError(f'seed and index must not be negative, got {seed} and {index}')
    split_number = int.from_bytes(hashlib.sha256(split.encode()).digest()[:8], 'little')
    children = np.random.SeedSequence([seed, split_number, index]).spawn(len(names.split()))
    return {
        name: np.random.Generator(np.random.Philox(child))
        for name, child in zip(names.split(), children, strict=True)
    }


def _draw_lots(rng: np.random.Generator, options, count: int) -> list:
    """`count` different options in random order."""
    return [options[i] for i in np.argsort(rng.random(len(options)))[:count]]


def layout(rng: np.random.Generator, scale: float) -> tuple[int, int, list[list[int]]]:
    """Draws a page's size and its panel boxes [x, y, w, h] in pixels, in reading order."""
    choice = int(np.searchsorted(np.cumsum([row[0] for row in _LAYOUTS]), rng.random()))
    _, width, height, rows = _LAYOUTS[min(choice, len(_LAYOUTS) - 1)]
    width = round(width * scale * rng.uniform(0.94, 1.06))
    height = round(height * scale * rng.uniform(0.94, 1.06))
    irregular = rows is None
    if irregular:
        rows = [pick(rng, (1, 2, 2, 3)) for _ in range(pick(rng, (2, 3, 3, 4)))]
        rows = rows if sum(rows) <= 9 else [*rows[:-1], 1]
    margin = scale * rng.uniform(6, 16)
    gutter = scale * rng.uniform(4, 12)

    def cut(length: float, parts: int) -> list[tuple[int, int]]:
        """Cuts a side into parts; returns their (start, end)."""
        shares = rng.uniform(0.75, 1.25, parts) if irregular else np.ones(parts)
        inner = length - 2 * margin - gutter * (parts - 1)
        ends = margin + np.cumsum(shares / shares.sum() * inner) + gutter * np.arange(parts)
        starts = ends - shares / shares.sum() * inner
        return [(int(a), int(b)) for a, b in zip(starts.round(), ends.round(), strict=True)]

    boxes = []
    for (top, bottom), count in zip(cut(height, len(rows)), rows, strict=True):
        boxes += [[a, top, b - a, bottom - top] for a, b in cut(width, count)]
    return width, height, boxes


def _cast(rng) -> list[figures.Character]:
    """Draws two or three characters of different species and colours."""
    colours = tuple(COLOURS)
    species = _draw_lots(rng, figures.SPECIES, pick(rng, (2, 3)))
    return [
        figures.Character(kind, colour, pick(rng, figures.HATS), pick(rng, colours))
        for kind, colour in zip(species, _draw_lots(rng, colours, len(species)), strict=True)
    ]


def _scene(rng) -> drawing.Scene:
    return drawing.Scene(
        place=pick(rng, drawing.PLACES),
        time=pick(rng, drawing.TIMES),
        weather=pick(rng, drawing.WEATHERS),
        tint=tuple(int(v) for v in rng.integers(-12, 13, 3)),
    )


def _happenings(rng, cast, count: int) -> list[drawing.Happening]:
    """Draws what is seen in each of a page's panels; no action and no item comes twice."""
    actions = _draw_lots(rng, figures.ACTIONS, count)
    items = _draw_lots(rng, figures.ITEMS, count)
    happenings = []
    for action, item in zip(actions, items, strict=True):
        who, other = _draw_lots(rng, cast, 2)
        happenings.append(
            drawing.Happening(
                who=who,
                action=action,
                item=item,
                item_colour=pick(rng, tuple(COLOURS)),
                companion=other if rng.random() < 0.35 else None,
                balloon=bool(rng.random() < 0.9),
            )
        )
    return happenings


def draw_page(seed: int, split: str, index: int, *, scale: float = 1.0):
    """Draws one page.

    Args:
      seed: of the whole set, not negative.
      split: any name; splits have unrelated pages.
      index: of the page in its split, not negative.
      scale: size of the page; 1 is about 480 × 680 pixels.

    Returns:
      (picture, page type, page): an RGB PIL picture; 'narrative', 'story', 'cover' (one panel) or
      'credits' (no panel); and the page as it stands in a JSON file (see `page`).
    """
    if not scale > 0:
        raise ValueError(f'scale must be positive, got {scale}')
    rng = _streams(seed, split, index, 'story boxes words ink')
    page_type = pick(rng['story'], _PAGE_TYPES)
    scene, cast = _scene(rng['story']), _cast(rng['story'])
    names = [words.NAMES[who.species] for who in cast]
    width, height, boxes = layout(rng['boxes'], scale)
    if page_type not in NARRATIVE:
        boxes = [[0, 0, width, height]] if page_type == 'cover' else []
    happenings = _happenings(rng['story'], cast, len(boxes))
    if page_type == 'cover':
        texts = [f'The {pick(rng["words"], words.TITLE_NOUNS)} of {names[0]}']
    else:
        texts = [words.tell(rng['words'], scene, seen) for seen in happenings]
    picture = Image.new('RGB', (width, height), (250, 248, 240))
    panels = []
    for box, seen, text in zip(boxes, happenings, texts, strict=True):
        picture.paste(drawing.panel(rng['ink'], *box[2:], scene, seen), tuple(box[:2]))
        drawing.frame(picture, box, scale)
        confidence = round(0.9 + 0.1 * float(rng['boxes'].random()), 3)
        spoken = text if seen.balloon else ''
        panels.append({'bbox': box, 'text': spoken, 'confidence': confidence})
    full_text = '\n'.join(panel['text'] for panel in panels if panel['text'])
    if page_type == 'credits':
        full_text = f'Written and drawn by {" and ".join(names)}'
        drawing.scribbles(rng['ink'], picture)
    description = {
        'image_width': width,
        'image_height': height,
        'panels': panels,
        'full_page_text': full_text,
    }
    return picture, page_type, description


def story(
    seed: int, split: str, index: int, panels: int
) -> tuple[drawing.Scene, list[drawing.Happening]]:
    """Returns what `draw_page` draws on a narrative page: its scene, and each panel's happening.

    Args:
      seed, split, index: as of `draw_page`.
      panels: of that page.
    """
    rng = _streams(seed, split, index, 'story boxes words ink')['story']
    pick(rng, _PAGE_TYPES)
    scene = _scene(rng)
    return scene, _happenings(rng, _cast(rng), panels)


def page(seed: int, split: str, index: int, *, scale: float = 1.0) -> dict:
    """Returns one page as a record of the on-disk format; arguments as of `draw_page`.

    Returns:
      {'canonical_id': str, 'image': bytes (JPEG), 'page_type': str, 'page': {'image_width',
      'image_height', 'panels': [{'bbox': [x, y, w, h] in pixels, 'text', 'confidence'}],
      'full_page_text'}}.
    """
    picture, page_type, description = draw_page(seed, split, index, scale=scale)
    encoded = io.BytesIO()
    picture.save(encoded, 'JPEG', quality=88)
    return {
        'canonical_id': f'synthetic__{split}__{index:06d}',
        'image': encoded.getvalue(),
        'page_type': page_type,
        'page': description,
    }


def records(
    split: str,
    report: FaultReport,
    *,
    seed: int,
    sizes: Mapping[str, int],
    page_types: Sequence[str],
    max_panels: int,
) -> Iterator[dict]:
    """Yields the pages of a split as records, see `folder.page_record`, with their images."""
    report.rows = sizes[split]
    pages = processes.ordered(
        functools.partial(page, seed, split), range(sizes[split]), chunk=_CHUNK
    )
    for line, drawn in enumerate(pages):
        name, page_type = drawn['canonical_id'], drawn['page_type']
        if page_type not in page_types:
            report.skip(f'page_type:{page_type}')
            continue
        size = images.check_image(drawn['image'], name)
        record, counts = page_record(drawn['page'], name, size, max_panels)
        report.counts.update(counts)
        if record['boxes']:
            record |= {'canonical_id': name, 'image_path': '', 'line': line}
            yield {**record, 'page_type': page_type, 'image': drawn['image']}
        else:
            report.skip('no_panels')


def write_folder(root, splits: dict[str, int], seed: int, *, scale: float = 0.5) -> None:
    """Writes pages as a user's folder: pages.csv, labels.json, json/ and images/.

    Args:
      root: folder to write in; made if it is not there.
      splits: number of pages by split.
      seed: of the set.
      scale: size of the pages.
    """
    root = pathlib.Path(root)
    for folder in ('images', 'json'):
        (root / folder).mkdir(parents=True, exist_ok=True)
    rows, labels = [], {}
    for split, count in splits.items():
        for index in range(count):
            record = page(seed, split, index, scale=scale)
            name = record['canonical_id']
            (root / 'images' / f'{name}.jpg').write_bytes(record['image'])
            (root / 'json' / f'{name}.json').write_text(json.dumps(record['page']))
            rows.append((name, f'images/{name}.jpg', split))
            labels[name] = record['page_type']
    with (root / 'pages.csv').open('w', newline='') as file:
        writer = csv.writer(file)
        writer.writerow(('canonical_id', 'image_path', 'split'))
        writer.writerows(rows)
    (root / 'labels.json').write_text(json.dumps(labels, indent=1))
