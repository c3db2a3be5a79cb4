"""Built-in pictures of receipts with true questions and answers: pure functions of numbers.

A picture is a function of (seed, split, index): a table with no to three (or five) receipts and
enough of other things that their number says nothing. Of a receipt are drawn its store (a colour
and a sign: 'Red Star'), two to five goods with prices, the total in dollars, how it was paid, and
a date too small to be asked for. Its values are the number of goods and the total, its layout is
where the sign and the total stand. Store, values and layout together belong to one split: what val
and test show has been in train in every pair of the three, and never together.

Each picture has three questions. One counts; of some pictures another does, in other words, and as
often whatever the count is. The rest ask of a receipt or whether there is one. Words come from a
random stream of their own. What is asked of a receipt names it where there are more: the left one,
the right one.
"""

import dataclasses
import functools
import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from PIL import Image, ImageChops, ImageFilter

from mmjax.data import processes
from mmjax.data.drawing import COLOURS, pick
from mmjax.data.faults import FaultReport
from mmjax.errors import UserError
from mmjax.recipes.receipts import text
from mmjax.recipes.receipts.synthetic import drawing
from mmjax.recipes.receipts.synthetic.drawing import LAYOUTS, PAYMENTS, SIGNS, THINGS, Receipt

SPLITS = {'train': (0, 1, 2, 3), 'val': (4,), 'test': (5,)}  # split → sixths of the combinations
UNITS = 112  # to a side of a picture
_CHUNK = 128  # pictures that a process draws at a time
ITEMS, TOTALS = range(2, 6), range(2, 10)
DETAILS = ('store', 'items', 'total', 'payment')
# Most receipts in a picture → probabilities of 0, 1, … receipts.
COUNTS = {3: (0.28, 0.32, 0.22, 0.18), 5: (0.2, 0.2, 0.15, 0.15, 0.15, 0.15)}
_AGAIN = 0.3  # of the pictures are counted twice: counts must not tell how often they are asked for
_EXIST = 0.75  # of the other pictures with a receipt to be named are asked whether there is one
_APART = 13.0  # units between the left (right) receipt and the next, to be called so


@dataclasses.dataclass(frozen=True)
class Placed:
    """What lies where: a Receipt or the name of a thing; middle in units, angle in degrees."""

    what: Receipt | str
    x: float
    y: float
    angle: float
    zoom: float


def _stream(*key) -> np.random.Generator:
    """A generator that knows its key only, the same on every machine."""
    digest = hashlib.sha256('/'.join(map(str, key)).encode()).digest()
    return np.random.Generator(np.random.Philox(int.from_bytes(digest[:16], 'little')))


def catalogue(sizes: Mapping[str, int], splits: Sequence[str]) -> dict[str, int]:
    """Returns {split: pictures}; raises UserError for a split unknown, without a size or empty."""
    for split in splits:
        if split not in SPLITS:
            raise UserError(f'the built-in receipts have no split {split!r}: {", ".join(SPLITS)}')
        if split not in sizes:
            raise UserError(f'data.built_in.{split} is missing: it is the number of its pictures')
        if sizes[split] < 1:
            raise UserError(f'data.built_in.{split} must be at least 1, got {sizes[split]}')
    return {split: int(sizes[split]) for split in splits}


def combination(what: Receipt) -> int:
    """Returns which sixth of all (store, values, layout) a receipt belongs to, 0 to 5."""
    store = list(COLOURS).index(what.colour) + 5 * SIGNS.index(what.sign)
    return (store + len(what.goods) + what.total + LAYOUTS.index(what.layout)) % 6


def _receipt(rng: np.random.Generator, split: str) -> Receipt:
    count, total = pick(rng, ITEMS), pick(rng, TOTALS)
    cuts = np.sort(rng.choice(np.arange(1, 4 * total), count - 1, replace=False))
    prices = 25 * np.diff(cuts, prepend=0, append=4 * total)
    names = [drawing.GOODS[i] for i in np.argsort(rng.random(len(drawing.GOODS)))[:count]]
    what = Receipt(
        colour=pick(rng, tuple(COLOURS)),
        sign=pick(rng, SIGNS),
        total=total,
        payment=pick(rng, tuple(PAYMENTS)),
        goods=tuple(zip(names, prices.tolist(), strict=True)),
        layout=LAYOUTS[0],
        date=f'{int(rng.integers(1, 29)):02d}-{int(rng.integers(1, 13)):02d}-2026',
    )
    place = (pick(rng, SPLITS[split]) - combination(what)) % 6
    return dataclasses.replace(what, layout=LAYOUTS[place])


def scene(seed: int, split: str, index: int, most: int = 3) -> list[Placed]:
    """Draws what a picture shows, receipts last; two never lie in the same sixth of the table.

    Args:
      seed, split, index: as of `picture`.
      most: receipts in a picture, a key of COUNTS.
    """
    if seed < 0 or index < 0:
        raise ValueError(f'seed and index must not be negative, got {seed} and {index}')
    if split not in SPLITS:
        raise ValueError(f'no split {split!r}: {", ".join(SPLITS)}')
    rng = _stream('scene', seed, split, index)
    count = int(np.searchsorted(np.cumsum(COUNTS[most])[:-1], rng.random(), side='right'))
    # Papers in all do not tell how many of them are receipts.
    others = int(rng.integers(max(0, 2 - count), 7 - count))
    kinds = [pick(rng, THINGS) for _ in range(others)]
    angle, reach = np.deg2rad(rng.uniform(-8, 8)), rng.uniform(0.86, 1.0)
    shift = complex(*rng.uniform(-3, 3, 2))
    placed = []
    for cell, what in zip(
        np.argsort(rng.random(6)).tolist(),
        [*kinds, *(_receipt(rng, split) for _ in range(count))],
        strict=False,
    ):
        middle = complex(37 * (cell % 3 - 1), 54 * (cell // 3 - 0.5))
        middle = middle * reach * np.exp(1j * angle) + shift
        middle += complex(*rng.uniform(-3, 3, 2))
        turn = rng.uniform(-16, 16) if what not in ('cup', 'phone') else rng.uniform(-40, 40)
        placed.append(
            Placed(what, 56 + middle.real, 56 + middle.imag, turn, rng.uniform(0.88, 1.1))
        )
    return placed


def receipts(placed: Sequence[Placed]) -> list[Placed]:
    """Returns the receipts of a scene from left to right."""
    return sorted((p for p in placed if isinstance(p.what, Receipt)), key=lambda p: p.x)


def questions(seed: int, split: str, index: int, most: int = 3) -> list[dict]:
    """Asks three questions of a picture; arguments as of `scene`.

    Returns:
      [{'question', 'answer', 'kind': of TEMPLATES, 'template': from 1}], the first of kind count.
    """
    rng = _stream('words', seed, split, index)
    shown = receipts(scene(seed, split, index, most))
    subjects = []
    if len(shown) == 1:
        subjects = [('the receipt', shown[0].what)]
    elif shown:
        if shown[1].x - shown[0].x > _APART:
            subjects.append(('the left receipt', shown[0].what))
        if shown[-1].x - shown[-2].x > _APART:
            subjects.append(('the right receipt', shown[-1].what))
    again, whether = rng.random() < _AGAIN, rng.random() < _EXIST or not subjects
    kinds = ['count', 'count' if again else 'exist' if whether else 'detail']
    kinds.append('detail' if subjects else 'exist')
    asked, used = [], set()
    details = [DETAILS[i] for i in np.argsort(rng.random(len(DETAILS)))]
    for kind in kinds:
        it, value = '', len(shown) if kind == 'count' else bool(shown)
        if kind == 'detail':
            kind = details.pop()
            it, what = pick(rng, subjects)
            values = (what.store, len(what.goods), what.total, what.payment)
            value = values[DETAILS.index(kind)]
        wording = int(rng.integers(text.WORDINGS))
        while (kind, wording) in used:
            wording = int(rng.integers(text.WORDINGS))
        used.add((kind, wording))
        question, answer = text.pair(kind, wording, it, value)
        number = text.template(kind, wording)
        asked.append({'question': question, 'answer': answer, 'kind': kind, 'template': number})
    return asked


def picture(seed: int, split: str, index: int, *, side: int = 112, most: int = 3) -> bytes:
    """Draws a picture.

    Args:
      seed: of the set.
      split: one of SPLITS.
      index: of the picture, not negative.
      side: width and height in pixels; print can be read from about 300 on.
      most: as of `scene`.

    Returns:
      A JPEG file of `side` × `side` pixels.
    """
    placed = scene(seed, split, index, most)
    rng = _stream('draw', seed, split, index)
    scale = 2 * side / UNITS  # drawn at twice the size, against jagged edges
    canvas = drawing.table(rng, side).resize((2 * side, 2 * side), Image.Resampling.BILINEAR)
    for one in placed:
        if isinstance(one.what, Receipt):
            drawn = drawing.receipt(one.what, rng, scale * one.zoom)
        else:
            drawn = drawing.thing(one.what, rng, scale * one.zoom)
        drawn = drawn.rotate(one.angle, Image.Resampling.BILINEAR, expand=True)
        left = round(one.x * scale - drawn.width / 2)
        top = round(one.y * scale - drawn.height / 2)
        mask = drawn.getchannel('A')
        shade = ImageChops.multiply(mask, Image.new('L', mask.size, 85))
        canvas.paste((0, 0, 0), (left + round(scale), top + round(scale)), shade)
        canvas.paste(drawn.convert('RGB'), (left, top), mask)
    lit = _light(rng, canvas.reduce(2))
    if rng.random() < 0.3:
        lit = lit.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.5) * side / UNITS))
    encoded = io.BytesIO()
    lit.save(encoded, 'JPEG', quality=90)
    return encoded.getvalue()


def records(
    split: str, report: FaultReport, *, seed: int, sizes: Mapping[str, int], side: int, most: int
) -> Iterator[dict]:
    """Yields the records of a split, a row per question; the first of an image holds it."""
    size = sizes[split]
    report.rows = 3 * size
    draw = functools.partial(picture, seed, split, side=side, most=most)
    for number, image in enumerate(processes.ordered(draw, range(size), chunk=_CHUNK)):
        count = len(receipts(scene(seed, split, number, most)))
        for pair, entry in enumerate(questions(seed, split, number, most)):
            record = {'question': entry['question'], 'answer': entry['answer']}
            record |= {'count': count, 'pair': pair, 'line': number, 'picture': number}
            record['image_path'] = f'{split}_{number:05d}.jpg'
            yield record | {'image': b'' if pair else image}


def _light(rng: np.random.Generator, shown: Image.Image) -> Image.Image:
    """Lights a picture: brightness, colour, a slope and grain."""
    side = shown.width
    warmth, angle = rng.uniform(-0.08, 0.08), rng.uniform(0, 2 * np.pi)
    gain = np.float32(np.exp(rng.uniform(-0.35, 0.05)) * np.array([1 + warmth, 1, 1 - warmth]))
    axis = np.linspace(-1, 1, side, dtype=np.float32)
    steep = rng.uniform(0, 0.2) * np.array([np.cos(angle), np.sin(angle)], np.float32)
    slope = 1 + np.float32(steep[0]) * axis + np.float32(steep[1]) * axis[:, None]
    grain = rng.standard_normal((side, side, 1), np.float32)
    pixels = np.asarray(shown) * (slope[..., None] * gain)
    pixels += np.float32(rng.uniform(0, 4)) * grain
    return Image.fromarray(np.clip(pixels, 0, 255, out=pixels).astype(np.uint8))
