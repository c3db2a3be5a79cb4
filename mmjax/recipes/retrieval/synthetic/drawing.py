"""Draws products (mugs, lamps, shoes, …) straight from the front, from their attributes alone."""

import dataclasses
import math

import numpy as np
from PIL import Image, ImageDraw

from mmjax.data import drawing

COLOURS = {**drawing.COLOURS, 'black': (40, 40, 46), 'white': (244, 243, 238)}
PATTERNS = ('plain', 'stripes', 'dots', 'checks', 'diamonds', 'zigzag', 'band', 'two-tone')
# category → the options of its two parts; None is a product without the part
PARTS = {
    'mug': (('round handle', 'square handle', 'pointed handle'), ('saucer', 'lid', None)),
    'bottle': (('screw cap', 'stopper', 'spray nozzle'), ('oval label', 'square label', None)),
    'bag': (('short handle', 'long strap', 'twin handles'), ('flap', 'zip', 'front pocket')),
    'lamp': (('dome shade', 'cone shade', 'drum shade'), ('pole', 'bent arm', 'tripod')),
    'chair': (('round back', 'square back', 'slatted back'), ('four legs', 'wheels', 'rockers')),
    'clock': (('round face', 'square face', 'eight-sided face'), ('bells', 'pendulum', 'feet')),
    'hat': (('wide brim', 'peak', 'rolled edge'), ('pompom', 'feather', 'ribbon')),
    'shoe': (('flat sole', 'high heel', 'thick sole'), ('laces', 'strap', 'zip')),
}
SIDE, _UNIT = 288, 90  # of the canvas and of length 1 on it, in pixels
_AXIS = (np.arange(SIDE, dtype=np.float32) - SIDE / 2) / _UNIT
_DARK, _EDGE = (58, 54, 58), (110, 106, 106)


@dataclasses.dataclass(frozen=True)
class Product:
    """All that makes a product what it is; `stretch` is ln(height/width) beyond its category's.

    `direction` is that of stripes, '' for other patterns. `angle` is the pattern's in degrees, and
    `phase` (0–1) where it starts. `shape` (0–1 each) is what no text speaks of: taper, size of
    parts, roundness.
    """

    category: str
    colour: str
    second: str
    trim: str
    pattern: str
    bold: bool
    direction: str
    parts: tuple[str | None, str | None]
    stretch: float
    shape: tuple[float, float, float]
    phase: float
    angle: float


def _texture(product: Product) -> Image.Image:
    """The body's pattern over the whole canvas: main colour with the second on it."""
    cos, sin = math.cos(math.radians(product.angle)), math.sin(math.radians(product.angle))
    across, down = cos * _AXIS + sin * _AXIS[:, None], cos * _AXIS[:, None] - sin * _AXIS
    start, period = product.phase, 0.46 if product.bold else 0.24
    u, v = (across / period + start) % 1, (down / period + 3 * start) % 1
    patterns = {
        'plain': lambda: np.zeros(u.shape, bool),
        'stripes': lambda: u < 0.45,
        'dots': lambda: (u - 0.5) ** 2 + (v - 0.5) ** 2 < 0.1,
        'checks': lambda: (u < 0.5) ^ (v < 0.5),
        'diamonds': lambda: (u < 0.5) ^ (v < 0.5),
        'zigzag': lambda: (v + 1.2 * np.abs(u - 0.5)) % 1 < 0.45,
        'band': lambda: np.abs(down + 0.2 * start) < (0.22 if product.bold else 0.1),
        'two-tone': lambda: down > 0.3 * (start - 0.5),
    }
    colours = np.array([COLOURS[product.colour], COLOURS[product.second]], np.uint8)
    return Image.fromarray(colours[patterns[product.pattern]().astype(np.uint8)])


def _arc(centre, rx, ry, start=0.0, stop=360.0) -> list[complex]:
    """Points of an ellipse's arc, in degrees against the clock from the right."""
    angle = np.deg2rad(np.linspace(start, stop, 25))
    return list(centre + rx * np.cos(angle) + 1j * ry * np.sin(angle))


def _box(left, bottom, right, top) -> list[complex]:
    return [left + 1j * bottom, right + 1j * bottom, right + 1j * top, left + 1j * top]


def _both(half) -> list[complex]:
    return [*half, *(-complex(z).conjugate() for z in reversed(half))]


class _Pen:
    """Draws on a picture of a product's colours, and on another of where it is.

    Points are complex (y up), in halves of the body's width and height; radii and widths are in
    units. Rounded, so that the last bit of a float decides nothing. Parts have the trim's colour.
    """

    def __init__(self, product: Product, ratio: float):
        self.half_width = 0.6 / math.sqrt(ratio * math.exp(product.stretch))
        self.half_height = 0.36 / self.half_width
        self.trim = COLOURS[product.trim]
        self.texture = _texture(product)
        self.colours = Image.new('RGB', (SIDE, SIDE), COLOURS[product.colour])
        self.alpha = Image.new('L', (SIDE, SIDE), 0)
        self.pens = ImageDraw.Draw(self.colours), ImageDraw.Draw(self.alpha)

    def _pixels(self, z) -> list[float]:
        z = np.asarray(z, complex) * _UNIT
        x, y = SIDE / 2 + self.half_width * z.real, SIDE / 2 - self.half_height * z.imag
        return np.stack([x, y], -1).round(1).ravel().tolist()

    def body(self, z):
        """Fills a shape with the pattern."""
        points, mask = self._pixels(z), Image.new('L', (SIDE, SIDE), 0)
        ImageDraw.Draw(mask).polygon(points, fill=255)
        self.colours.paste(self.texture, (0, 0), mask)
        self.pens[1].polygon(points, fill=255)
        self.pens[0].line(points + points[:4], fill=_EDGE, width=3)

    def part(self, z, colour=None):
        points, colour = self._pixels(z), colour or self.trim
        self.pens[0].polygon(points, fill=colour)
        self.pens[1].polygon(points, fill=255)
        self.pens[0].line(points + points[:4], fill=tuple(v * 5 // 9 for v in colour), width=2)

    def disc(self, centre, radius, colour=None):
        self.part(_arc(centre, radius / self.half_width, radius / self.half_height), colour)

    def line(self, z, width, colour=None):
        points, pixels = self._pixels(z), max(1, round(width * _UNIT))
        self.pens[0].line(points, fill=colour or self.trim, width=pixels, joint='curve')
        self.pens[1].line(points, fill=255, width=pixels, joint='curve')


def _mug(pen, handle, base, a, b, c):
    handles = {
        'round handle': _arc(0.9, 0.5 + 0.4 * b, 0.62, -95, 95),
        'square handle': [0.5j, 1.5 + 0.4 * b + 0.5j, 1.5 + 0.4 * b - 0.5j, -0.5j],
        'pointed handle': [0.65j, 1.5 + 0.4 * b + 0.2j, -0.55j],
    }
    pen.line(handles[handle], 0.09 + 0.06 * c)
    if base == 'saucer':
        pen.part(_arc(-1j, 1.6, 0.22))
    pen.body([-1 + 1j, *_arc(-1j, 1 - 0.4 * a, 0.12, 180, 360), 1 + 1j])
    pen.part(_arc(1j, 1, 0.14), _DARK)
    if base == 'lid':
        pen.part(_arc(0.95j, 1.08, 0.32, 0, 180))
        pen.disc(1.36j, 0.09)


def _bottle(pen, cap, label, a, b, c):
    neck, shoulder = 0.25 + 0.25 * b, 0.1 + 0.45 * a
    match cap:
        case 'screw cap':
            pen.part(_box(-neck - 0.15, 0.97, neck + 0.15, 1.25))
        case 'stopper':
            pen.disc(1.2j, 0.15)
        case 'spray nozzle':
            pen.line([1j, 1.2j], 0.1)
            pen.part(_box(-neck - 0.6, 1.15, neck + 0.1, 1.34))
    slope = [1 + 1j * (shoulder - 0.06), neck + 0.2 * c + 0.5j * (1 + shoulder)]
    pen.body(_both([0.9 - 1j, 1 - 0.92j, *slope, neck + 0.85j, neck + 1j]))
    middle = 0.5 * shoulder - 0.6
    if label == 'oval label':
        pen.part(_arc(1j * middle, 0.75, 0.3))
    elif label == 'square label':
        pen.part(_box(-0.8, middle - 0.24, 0.8, middle + 0.24))


def _bag(pen, handle, front, a, b, c):
    top, corner, low = 0.65 + 0.35 * a, 0.15 + 0.25 * c, 0.25 - 0.4 * b
    handles = {
        'short handle': _arc(1j, 0.38 * top, 0.4 + 0.2 * b, 0, 180),
        'long strap': _arc(0.9j, 0.95 * top, 1.0 + 0.2 * b, 0, 180),
        'twin handles': [z + s * top for s in (0.5, -0.5) for z in _arc(0.9j, 0.3, 0.6, 0, 180)],
    }
    pen.line(handles[handle], 0.07 + 0.05 * c)
    pen.body(_both([*_arc((1 - corner) + 1j * (corner - 1), corner, corner, 270, 360), top + 1j]))
    match front:
        case 'flap':
            pen.part(_both([*_arc(0.5j, 0.5 + 0.5 * top, 0.5 - low, 270, 360), top + 1j]))
            pen.disc(1j * low + 0.2j, 0.07, (226, 196, 110))
        case 'zip':
            pen.line([-0.85 * top + 0.6j, 0.6 * top + 0.6j, 0.6 * top + 0.2j], 0.09)
        case 'front pocket':
            pen.part(_box(-0.65, -0.8, 0.65, low))


def _lamp(pen, shade, stand, a, b, c):
    foot, bend, narrow = -1.95j, -0.8 - 0.4 * b, 0.15 + 0.45 * a
    stands = {
        'pole': [0, foot],
        'bent arm': [0, bend - 1j, bend - 1.3j, foot],
        'tripod': [foot + bend, 0, foot, 0, foot - bend],
    }
    pen.line(stands[stand], 0.07 + 0.05 * c)
    if stand != 'tripod':
        pen.part(_arc(foot, 0.4 + 0.3 * b, 0.14))
    shades = {
        'dome shade': _arc(-0.5j, 1, 1 + 0.3 * a, 0, 180),
        'cone shade': _both([1.1 - 0.5j, narrow + 0.7j]),
        'drum shade': _both([1 - 0.5j, 0.9 + 0.5j + 0.15j * a]),
    }
    pen.body(shades[shade])


def _chair(pen, back, legs, a, b, c):
    seat, floor = -0.2 - 0.3 * b, -1.4
    column, wheels, legs_at = 1j * (floor + 0.3), (-0.8, 0, 0.8), (-0.8, -0.5, 0.5, 0.8)
    bases = {
        'four legs': [[x + 1j * seat, (1.1 + 0.3 * a) * x + 1j * floor] for x in legs_at],
        'wheels': [[1j * seat, column], *([column, x + 1j * floor] for x in wheels)],
        'rockers': [[-0.7, -0.7 - 1.25j], [0.7, 0.7 - 1.25j], _arc(-0.7j, 1.5, 0.7, 205, 335)],
    }
    for z in bases[legs]:
        pen.line(z, 0.1)
    for x in wheels if legs == 'wheels' else ():
        pen.disc(x + 1j * floor, 0.1, _DARK)
    slats = [_box(x, seat, x + 0.32, 1.2) for x in (-0.91, -0.16, 0.59)]
    backs = {
        'round back': [_arc(0.3j, 0.95, 1, -45, 225)],
        'square back': [_both([0.75 + 1j * seat, 0.9 + 1.2j])],
        'slatted back': [*slats, _box(-0.95, 0.9, 0.95, 1.25)],
    }
    for z in backs[back]:
        pen.body(z)
    pen.body(_both([1.15 + 1j * (seat - 0.25 - 0.2 * c), 1 + 1j * (seat + 0.1)]))


def _clock(pen, face, extra, a, b, c):
    reach = 0.25 * b
    for s in (-1, 1):
        if extra == 'bells':
            pen.disc(s * 0.65 + 0.95j, 0.2 + 0.3 * reach)
        elif extra == 'feet':
            pen.line([s * 0.4 - 0.5j, s * (0.8 + reach) - 1.35j], 0.15)
    if extra == 'pendulum':
        pen.line([0, -1.5j - 1j * reach], 0.07)
        pen.disc(-1.55j - 1j * reach, 0.17)
    outlines = {
        'round face': _arc(0, 1.05, 1.05),
        'square face': _box(-0.95, -0.95, 0.95, 0.95),
        'eight-sided face': 1.1 * np.exp(1j * np.deg2rad(np.arange(22.5, 360, 45))),
    }
    inner = 0.5 + 0.2 * a
    pen.body(outlines[face])
    pen.part(inner * np.array(outlines[face]))
    hands = [inner * (-0.45 + 0.3j), 0, inner * (0.35 + 0.7j)]
    pen.line(hands, 0.05 + 0.03 * c, _DARK if sum(pen.trim) > 330 else (240, 240, 236))


def _hat(pen, edge, top, a, b, c):
    low, crown, dent = -0.6j, 0.45 + 0.5 * a, 0.1 + 0.4 * c
    if top == 'pompom':
        pen.disc(0.85j + 1j * dent, 0.15 + 0.1 * b)
    elif top == 'feather':
        pen.part(_arc(0.9 + 0.8j, 0.16 + 0.1 * b, 0.95))
    if edge == 'wide brim':
        pen.part(_arc(low, 1.6 + 0.2 * b, 0.3))
    elif edge == 'peak':
        pen.part([0.5 - 0.2j, 1.9 - 0.65j, 1.85 - 0.85j, 0.3 - 0.7j])
    pen.body(_both([*_arc(low, 1, 0.15, 270, 360), *_arc(0.75j, crown, dent, 0, 90)]))
    if edge == 'rolled edge':
        pen.part(_box(-1.1, -0.8, 1.1, -0.45))
    if top == 'ribbon':
        pen.part(_both([1 - 0.35j, 0.96 - 0.35j + 1j * (0.25 + 0.1 * b)]))


def _shoe(pen, sole, fastener, a, b, c):
    toe, top, opening = 0.3 + 0.3 * c, 0.2 + a, -0.45 + 0.35 * b
    back = -1 - 1j + 0.5j * (sole == 'high heel')
    mouth, instep = opening + 1j * top, opening + 0.25 + 1j * (toe - 0.7)
    soles = {
        'high heel': [back, back + 0.4, back + 0.3 - 0.75j, back + 0.12 - 0.75j],
        'flat sole': _box(-1, -1.15, 1.05, -0.98),
        'thick sole': _box(-1.05, -1.5, 1.1, -0.98),
    }
    pen.part(soles[sole])
    pen.line([back + 0.3, 0.3 - 1j, 1 - 1j], 0.08)
    pen.body([back, -0.97 + 1j * top, mouth, instep, *_arc(0.6 - 1j, 0.4, toe, 90, 0)])
    eyes = [(1 - k) * mouth + k * (instep + 0.1) for k in (0.1, 0.5, 0.9)]
    fasteners = {
        'laces': [at + z for at in eyes for z in (-0.32 - 0.22j, 0.08 + 0.08j)],
        'strap': [back + 0.45j, -0.5 + 1j * (toe - 0.95), opening + 0.2 + 1j * (toe - 0.85)],
        'zip': [mouth - 0.3, opening - 0.3 - 0.75j],
    }
    pen.line(fasteners[fastener], 0.08)


# category → its shape, and the usual height/width of its body
_SHAPES = {
    'mug': (_mug, 1.15),
    'bottle': (_bottle, 1.9),
    'bag': (_bag, 0.85),
    'lamp': (_lamp, 0.8),
    'chair': (_chair, 1.1),
    'clock': (_clock, 1.0),
    'hat': (_hat, 0.95),
    'shoe': (_shoe, 0.65),
}


def draw(product: Product) -> Image.Image:
    """Draws a product on nothing → RGBA picture of `SIDE` × `SIDE` pixels."""
    shape, ratio = _SHAPES[product.category]
    pen = _Pen(product, ratio)
    shape(pen, *product.parts, *product.shape)
    # Rounder than flat: the right of things is darker than the left.
    shade = 0.66 + 0.39 * np.cos(0.9 * _AXIS + 0.35)
    lit = (np.asarray(pen.colours) * shade[:, None]).clip(0, 255).astype(np.uint8)
    return Image.fromarray(np.dstack([lit, pen.alpha]))
