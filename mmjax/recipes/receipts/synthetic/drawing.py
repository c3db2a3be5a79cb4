"""Draws what lies on the table of a receipts picture: receipts, and much that is none.

Lengths are in units, 112 to a side of the picture. A receipt is tall white paper with the store's
sign, its name, lines of goods and prices, and a row with the total and the kind of payment. Each
of these is on other things too: white leaves have its paper, playing cards its signs, lists its
lines, vouchers its large digits, and phones, notes and cups its colours.
"""

import dataclasses
import functools
import math

import numpy as np
from PIL import Image, ImageDraw

from mmjax.data.drawing import COLOURS, jitter, pick

SIGNS = ('star', 'moon', 'heart', 'box', 'ring', 'hill', 'cross', 'kite')
PAYMENTS = {'cash': (240, 176, 30), 'card': (40, 84, 196), 'phone': (34, 34, 38)}
LAYOUTS = tuple((sign, total) for sign in (-1, 0, 1) for total in (-1, 1))  # left −1, right 1
THINGS = ('leaf', 'list', 'card', 'voucher', 'phone', 'note', 'cup')
GOODS = ('MILK', 'BREAD', 'TEA', 'EGGS', 'SOAP', 'RICE', 'JAM', 'PENS', 'SALT', 'FISH')
_PRINT = (52, 50, 56)
# 3 × 5 bits of each letter, a row an octal digit
_FONT = {
    'A': 0o25755,
    'B': 0o65656,
    'C': 0o34443,
    'D': 0o65556,
    'E': 0o74647,
    'F': 0o74644,
    'G': 0o34553,
    'H': 0o55755,
    'I': 0o72227,
    'J': 0o11152,
    'K': 0o55655,
    'L': 0o44447,
    'M': 0o57755,
    'N': 0o65555,
    'O': 0o25552,
    'P': 0o65644,
    'Q': 0o25563,
    'R': 0o65655,
    'S': 0o34216,
    'T': 0o72222,
    'U': 0o55557,
    'V': 0o55552,
    'W': 0o55775,
    'X': 0o55255,
    'Y': 0o55222,
    'Z': 0o71247,
    '0': 0o75557,
    '1': 0o26227,
    '2': 0o71747,
    '3': 0o71717,
    '4': 0o55711,
    '5': 0o74717,
    '6': 0o74757,
    '7': 0o71111,
    '8': 0o75757,
    '9': 0o75717,
    '.': 0o00002,
    '-': 0o00700,
    ' ': 0o00000,
}


@dataclasses.dataclass(frozen=True)
class Receipt:
    """All that a receipt says; total in dollars, prices in cents, which add up to it."""

    colour: str
    sign: str
    total: int
    payment: str
    goods: tuple[tuple[str, int], ...]
    layout: tuple[int, int]
    date: str

    @property
    def store(self) -> str:
        return f'{self.colour} {self.sign}'.title()


@functools.lru_cache(maxsize=1024)
def lettering(text: str, height: int) -> Image.Image:
    """Prints capitals and digits → mask 'L', `height` pixels high and .8 of it wide a letter."""
    bits = np.array([[_FONT[letter] >> place & 1 for place in range(15)] for letter in text])
    rows = np.pad(bits[:, ::-1].reshape(-1, 5, 3), ((0, 0), (0, 0), (0, 1)))
    mask = Image.fromarray((255 * rows.transpose(1, 0, 2).reshape(5, -1)).astype(np.uint8))
    width = max(round(0.8 * height * len(text)), 1)
    return mask.resize((width, height), Image.Resampling.BOX)


def _polygon(radii, turn=90.0) -> np.ndarray:
    """Corners at those distances from the middle, equal angles apart; complex, y up."""
    angles = turn + np.arange(len(radii)) * 360 / len(radii)
    return np.asarray(radii) * np.exp(1j * np.deg2rad(angles))


_ROUND = _polygon(np.ones(24))
_CRESCENT = np.concatenate([_ROUND[1:12], (0.3 * _ROUND.real + 1j * _ROUND.imag)[11:0:-1]])
_SHAPES = {
    'star': _polygon([1.1, 0.45] * 5),
    'moon': 1.1 * (_CRESCENT + 0.6),
    'heart': 0.95
    * np.array(
        [
            -1.05j,
            -1 + 0.05j,
            -1 + 0.55j,
            -0.75 + 0.9j,
            -0.4 + 0.95j,
            0.5j,
            0.4 + 0.95j,
            0.75 + 0.9j,
            1 + 0.55j,
            1 + 0.05j,
        ]
    ),
    'box': _polygon([1.2] * 4, 45),
    'ring': _ROUND,
    'hill': np.array([-1.1 - 0.85j, 1.0j, 1.1 - 0.85j]),
    'cross': np.array(
        [c * t for t in (1, 1j, -1, -1j) for c in (1 - 0.36j, 1 + 0.36j, 0.36 + 0.36j)]
    ),
    'kite': np.array([1.15j, -0.75, -1.15j, 0.75]),
}


class Sheet:
    """A piece of paper (or card, or glass) to be written on; lengths and places in units."""

    def __init__(self, width: float, height: float, scale: float, colour):
        self.size, self.scale, self.colour = (width, height), scale, colour
        sides = (max(round(width * scale), 2), max(round(height * scale), 2))
        self.picture = Image.new('RGBA', sides, (*colour, 255))
        self.draw = ImageDraw.Draw(self.picture)

    def polygon(self, points, x, y, size, colour):
        z = (x + size * points.real) * self.scale, (y - size * points.imag) * self.scale
        self.draw.polygon(np.stack(z, -1).round(1).ravel().tolist(), fill=colour)

    def box(self, left, top, right, bottom, colour):
        corners = (round(v * self.scale) for v in (left, top, right, bottom))
        self.draw.rectangle(tuple(corners), fill=colour)

    def line(self, points, width, colour):
        pixels = [(x * self.scale, y * self.scale) for x, y in points]
        self.draw.line(pixels, fill=colour, width=max(round(width * self.scale), 1))

    def sign(self, name, x, y, size, colour):
        self.polygon(_SHAPES[name], x, y, size, colour)
        if name == 'ring':
            self.polygon(_ROUND, x, y, 0.5 * size, self.colour)

    def text(self, text, x, y, height, colour=_PRINT, align=-1):
        """Prints with (x, y) the upper left corner, for align 1 the right one, for 0 the middle."""
        mask = lettering(text, max(round(height * self.scale), 1))
        left = round(x * self.scale - mask.width * (align + 1) / 2)
        self.picture.paste(colour, (left, round(y * self.scale)), mask)


def receipt(what: Receipt, rng: np.random.Generator, scale: float) -> Image.Image:
    """Draws a receipt, `scale` pixels a unit → RGBA."""
    pitch, wide = 3.5, 26.0
    paper = jitter(rng, (243, 242, 238), 10)
    sheet = Sheet(wide, 29.5 + pitch * len(what.goods), scale, paper)
    sign, total = what.layout
    sheet.sign(what.sign, wide / 2 + sign * 5.5, 8, 6.2, jitter(rng, COLOURS[what.colour], 12))
    sheet.text(what.store.upper(), wide / 2, 15.2, 2, align=0)
    y = 19.0
    for name, cents in what.goods:
        sheet.text(name, 2, y, 2.3)
        sheet.text(f'{cents / 100:.2f}', wide - 2, y, 2.3, align=1)
        y += pitch
    y += 0.6
    colour = jitter(rng, PAYMENTS[what.payment], 12)
    x = wide / 2 - total * 6
    if what.payment == 'cash':
        sheet.polygon(_ROUND, x, y + 3.5, 3.4, colour)
    elif what.payment == 'card':
        sheet.box(x - 4.2, y + 0.9, x + 4.2, y + 6.1, colour)
    else:
        sheet.box(x - 2, y, x + 2, y + 7, colour)
    sheet.text(str(what.total), wide / 2 + total * 6, y, 7.4, align=0)
    sheet.text(what.date, wide / 2, y + 7.8, 1.2, (120, 118, 124), align=0)
    return sheet.picture


def _tall(rng) -> tuple[float, float]:
    """Draws sides such as receipts have."""
    return 26.0, 29.5 + 3.5 * int(rng.integers(2, 6))


def thing(kind: str, rng: np.random.Generator, scale: float) -> Image.Image:
    """Draws one of THINGS, `scale` pixels a unit → RGBA."""
    white, bright = jitter(rng, (243, 242, 238), 10), jitter(rng, pick(rng, list(COLOURS.values())))
    ink = pick(rng, ((40, 60, 140), (60, 56, 60), (150, 50, 50)))
    match kind:
        case 'leaf':
            sheet = Sheet(*_tall(rng), scale, white)
            fold = sheet.size[1] * rng.uniform(0.3, 0.7)
            sheet.line([(0, fold), (26, fold)], 0.6, tuple(v - 16 for v in white))
        case 'list':
            sheet = Sheet(*_tall(rng), scale, white)
            for y in np.arange(4, sheet.size[1] - 3, rng.uniform(3.4, 5)):
                x = np.linspace(3, rng.uniform(12, 23), 8)
                sheet.line(list(zip(x, y + rng.uniform(-0.7, 0.7, 8), strict=True)), 0.8, ink)
        case 'card':
            sheet = Sheet(24, 34, scale, white)
            name, count = pick(rng, SIGNS), int(rng.integers(1, 4))
            for place in range(count):
                y = 17 + (place - (count - 1) / 2) * 10.5
                sheet.sign(name, 12, y, 7 - 1.1 * count, bright)
        case 'voucher':
            sheet = Sheet(26, rng.uniform(28, 42), scale, white)
            sheet.box(0, 0, 26, rng.uniform(6, 12), bright)
            number = str(int(rng.integers(10, 100)))
            sheet.text(number, 13, sheet.size[1] / 2 - 2, 10, bright, align=0)
        case 'phone':
            sheet = Sheet(20, 38, scale, jitter(rng, (40, 40, 44), 12))
            sheet.box(1.5, 3, 18.5, 35, jitter(rng, (200, 210, 224), 40))
            icons, rows = rng.integers(len(COLOURS), size=(3, 5)).tolist(), rng.integers(1, 6, 3)
            for column, count in enumerate(rows.tolist()):
                x = 4 + 4.5 * column
                for row, icon in enumerate(icons[column][:count]):
                    y = 6 + 6 * row
                    sheet.box(x, y, x + 3, y + 3, list(COLOURS.values())[icon])
        case 'note':
            side = rng.uniform(20, 28)
            sheet = Sheet(side, side, scale, tuple((v + 255) // 2 for v in bright))
            for y in np.arange(5, side - 3, rng.uniform(4, 6)):
                x = np.linspace(3, side * rng.uniform(0.5, 0.9), 7)
                sheet.line(list(zip(x, y + rng.uniform(-1, 1, 7), strict=True)), 1, ink)
        case 'cup':
            sheet = Sheet(30, 30, scale, white)
            sheet.picture.putalpha(0)
            sheet.polygon(_ROUND, 15, 15, 14.5, (*white, 255))
            sheet.polygon(_ROUND, 15, 15, 9, (*bright, 255))
            sheet.polygon(_ROUND, 15, 15, 7.2, (88, 56, 38, 255))
    return sheet.picture


def table(rng: np.random.Generator, side: int) -> Image.Image:
    """Draws what things lie on, RGB: a plain, boarded, tiled or blotched surface."""
    palette = [*COLOURS.values(), (120, 116, 112), (160, 128, 92), (70, 74, 84)]
    near = 0.75 * np.array(jitter(rng, pick(rng, palette), 24))
    far = near + rng.uniform(-36, 36, 3)
    pattern = int(rng.integers(4))
    axis = np.arange(side, dtype=np.float32) / side
    if pattern == 0:
        share = np.broadcast_to(axis[:, None], (side, side))
    elif pattern in (1, 2):
        angle, count = rng.uniform(0, math.pi), rng.uniform(3, 12)
        cos, sin = np.float32(count * math.cos(angle)), np.float32(count * math.sin(angle))
        share = np.floor(axis * cos + axis[:, None] * sin).astype(np.int32)
        if pattern == 2:
            share += np.floor(axis[:, None] * cos - axis * sin).astype(np.int32)
        share = share & 1
    else:
        grain = int(rng.integers(3, 20))
        share = rng.random((grain, grain))
    mask = Image.fromarray((255 * share).astype(np.uint8))
    mask = mask.resize((side, side), Image.Resampling.BICUBIC)
    colours = (tuple(int(v) for v in colour.clip(0, 255)) for colour in (far, near))
    return Image.composite(*(Image.new('RGB', (side, side), c) for c in colours), mask)
