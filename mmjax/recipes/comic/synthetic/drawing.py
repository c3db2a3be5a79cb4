"""Draws one comic panel with pillow: a scene, a figure doing something, an item, a balloon."""

import dataclasses

import numpy as np
from PIL import Image, ImageDraw

from mmjax.data.drawing import COLOURS, INK, WHITE, Pen, jitter, pick
from mmjax.recipes.comic.synthetic.figures import LYING, RISING, Character, figure, item

PLACES = ('beach', 'forest', 'city', 'room', 'desert', 'mountains', 'moon', 'farm')
TIMES = ('day', 'dusk', 'night')
WEATHERS = ('clear', 'rain', 'snow')

_SKY = {'day': (168, 214, 244), 'dusk': (250, 178, 132), 'night': (44, 50, 98)}
_SHADE = {'day': 1.0, 'dusk': 0.85, 'night': 0.6}
_GROUND = {
    'beach': (240, 220, 160),
    'forest': (112, 170, 92),
    'city': (158, 158, 166),
    'room': (196, 150, 110),
    'desert': (232, 188, 120),
    'mountains': (150, 186, 130),
    'moon': (190, 190, 198),
    'farm': (150, 200, 90),
}


@dataclasses.dataclass(frozen=True)
class Scene:
    """Where and when a page plays; `tint` shifts its palette (RGB, -12..12)."""

    place: str
    time: str
    weather: str
    tint: tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Happening:
    """What is to be seen in one panel."""

    who: Character
    action: str
    item: str
    item_colour: str
    companion: Character | None
    balloon: bool


def _backdrop(rng, draw, width, height, scene) -> float:
    """Paints sky, ground and the place's furniture at random spots; returns the ground line."""
    shade = _SHADE[scene.time]

    def tone(colour, amount=8):
        return jitter(rng, np.add(np.multiply(colour, shade), scene.tint), amount)

    sky = (66, 58, 104) if scene.place == 'moon' else _SKY[scene.time]
    sky = (226, 206, 176) if scene.place == 'room' else sky
    horizon = height * rng.uniform(0.58, 0.74)
    draw.rectangle((0, 0, width, height), fill=jitter(rng, np.add(sky, scene.tint), 8))
    spots = rng.random(6) * width
    sizes = rng.uniform(0.7, 1.3, 6) * height
    for i, (x, size) in enumerate(zip(spots, sizes, strict=True)):
        pen = Pen(draw, x, horizon, size)
        match scene.place:
            case 'beach' if i == 0:
                sea = (0, horizon - 0.16 * height, width, height)
                draw.rectangle(sea, fill=tone((70, 150, 200)))
            case 'forest':
                pen.box(-0.03, 0, 0.03, 0.2, tone((110, 76, 48)))
                pen.disc(0.36j, 0.13, 0.2, tone((50, 120, 60)))
            case 'city':
                pen.box(-0.13, 0, 0.13, 0.3 + 0.05 * i, tone((128, 118, 134), 20))
                for k in range(3):
                    sill, light = 0.07 + 0.09 * k, tone((250, 230, 150))
                    pen.box(-0.07, sill, 0.07, sill + 0.04, light, False)
            case 'room' if i < 3:
                draw.line((x, 0, x, horizon), fill=tone((206, 180, 150)), width=max(2, width // 30))
                if i == 2:
                    pen.box(-0.12, 0.25, 0.12, 0.5, _SKY[scene.time])
                    pen.stroke([0.25j, 0.5j])
            case 'desert' if i < 3:
                pen.box(-0.03, 0, 0.03, 0.3, tone((70, 140, 80)))
                pen.stroke([0.15j, 0.1 + 0.15j, 0.1 + 0.25j], tone((70, 140, 80)), 0.05)
            case 'mountains' if i < 4:
                pen.fill([-0.4, 0.45j, 0.4], tone((120, 124, 150), 14))
                pen.fill([-0.1 + 0.34j, 0.45j, 0.1 + 0.34j], WHITE)
            case 'moon':
                for _ in range(3):
                    star = complex(rng.uniform(-0.4, 0.4), rng.uniform(0, 0.9))
                    pen.disc(star, 0.008, colour=WHITE, outline=False)
            case 'farm' if i < 4:
                pen.disc(0, 0.4, 0.14, tone((120, 176, 80), 16))
            case _:
                pass
    draw.rectangle((0, horizon, width, height), fill=tone(_GROUND[scene.place]))
    draw.line((0, horizon, width, horizon), fill=INK, width=1)
    clutter = [*COLOURS.values(), WHITE, INK]
    # Clutter that no text speaks of, in the colours that texts do speak of.
    for _ in range(rng.integers(4, 13)):
        x, y = rng.random() * width, rng.uniform(0.05, 0.98) * height
        pen = Pen(draw, x, y, 0.26 * height * rng.uniform(0.3, 1.0))
        colour = jitter(rng, pick(rng, clutter))
        if y > horizon:
            pen.disc(0, 0.45, 0.2, colour)
        else:
            pen.stroke([-0.3 + 0.15j, 0, 0.3 + 0.15j], colour, 0.2)
    return horizon


def _emanata(rng, draw, width, height, action: str):
    """Scatters the marks by which comics show an action (lines of speed, notes, drops, …)."""
    size = rng.uniform(0.17, 0.23) * min(height, 1.4 * width)
    colour = jitter(rng, pick(rng, (*COLOURS.values(), WHITE, INK)))
    rows, columns = 3, max(2, round(width / height * 3))
    for row in range(rows):
        for column in range(columns):
            if rng.random() < 0.2:
                continue
            x = (column + rng.uniform(0.15, 0.85)) * width / columns
            y = (row + rng.uniform(0.3, 0.9)) * height / rows
            pen = Pen(draw, x, y, size)
            match action:
                case 'run':
                    for k in (0, 0.3, 0.6):
                        pen.stroke([-0.8 + k * 1j, 0.8 + k * 1j], colour, 0.13)
                case 'jump':
                    for k in (-0.3, 0, 0.3):
                        pen.stroke([k - 0.4j, k + 1j], colour, 0.13)
                case 'fly':
                    for k in (-0.3, 0, 0.3):
                        pen.stroke([k - 0.5 - 0.3j, k + 0.5 + 0.7j], colour, 0.13)
                case 'sleep':
                    pen.stroke([-0.35 + 0.7j, 0.35 + 0.7j, -0.35, 0.35], colour, 0.18)
                case 'sit':
                    for k in (-0.4, 0, 0.4):
                        pen.disc(k, 0.14, colour=colour, outline=False)
                case 'handstand':
                    pen.disc(0.3j, 0.42, colour=colour, outline=False)
                    pen.disc(0.3j, 0.2, colour=INK, outline=False)
                case 'climb':
                    for k in (0, 0.35):
                        pen.stroke([-0.4 + k * 1j, (0.35 + k) * 1j, 0.4 + k * 1j], colour, 0.16)
                case 'hide':
                    pen.stroke([0.35j, 0.95j], colour, 0.24)
                    pen.disc(0.05j, 0.14, colour=colour, outline=False)
                case 'ride':
                    wave = np.linspace(-0.8, 0.8, 13)
                    pen.stroke(wave + 0.2j * np.sin(wave * 8) + 0.3j, colour, 0.16)
                case 'dance':
                    pen.stroke([0.2 + 0.1j, 0.2 + 0.9j, 0.5 + 0.7j], colour, 0.14)
                    pen.disc(0.04 + 0.1j, 0.2, 0.15, colour, False)
                case 'cry':
                    pen.fill([0.8j, 0.24 + 0.2j, 0.14, -0.14, -0.24 + 0.2j], colour, False)


def _balloon(rng, draw, width, height, left: bool):
    """A balloon, box or burst full of scribbles; it is not told what is said in it."""
    half_width = width * rng.uniform(0.17, 0.25)
    half_height = height * rng.uniform(0.075, 0.11)
    margin = 0.03 * width
    x = margin + half_width if left else width - margin - half_width
    y = 0.03 * height + half_height
    pen = Pen(draw, x, y, 1.0)
    circle, shape = np.exp(2j * np.pi * np.arange(28) / 28), rng.integers(4)
    if shape == 0:
        outline = circle.real.clip(-0.75, 0.75) / 0.75 + 1j * circle.imag.clip(-0.7, 0.7) / 0.7
    elif shape == 1:
        outline = circle * (1 + 0.2 * (np.arange(28) % 2))
    else:
        outline = circle
    if shape:
        tail = np.array([-0.2 - 0.8j, (0.5 if left else -0.5) - 1.5j, 0.15 - 0.8j])
        pen.fill(half_width * tail.real + 1j * half_height * tail.imag, WHITE)
    body = half_width * outline.real + 1j * half_height * outline.imag
    pen.fill(body, WHITE, False)
    draw.line(pen.points([*body, body[0]]), fill=INK, width=max(1, round(height / 150)))
    for row in np.linspace(-0.5, 0.5, rng.integers(2, 4)):
        steps = np.linspace(-0.72, 0.72, 18) * (1 - 0.3 * abs(row))
        scribble = steps * half_width + 1j * half_height * (row + rng.uniform(-0.14, 0.14, 18))
        draw.line(pen.points(scribble), fill=INK, width=1)


def panel(rng: np.random.Generator, width: int, height: int, scene: Scene, seen: Happening):
    """Draws a panel of `width` × `height` pixels → RGB picture.

    Place, size, facing and camera are drawn from `rng` and are in no text, so a panel may be
    mirrored without making its text untrue.
    """
    picture = Image.new('RGB', (width, height))
    draw = ImageDraw.Draw(picture)
    horizon = _backdrop(rng, draw, width, height, scene)
    _emanata(rng, draw, width, height, seen.action)
    left = bool(rng.integers(2))  # the figure's side; balloon and item take the other
    across = (lambda t: t * width) if left else (lambda t: (1 - t) * width)
    if seen.balloon:
        _balloon(rng, draw, width, height, not left)
    ground = rng.uniform(0.84, 0.97) * height
    if seen.companion is not None:
        size = min(0.36 * height, 0.4 * width) * rng.uniform(0.85, 1.1)
        at = across(rng.uniform(0.5, 0.62))
        y = horizon + 0.3 * (ground - horizon)
        figure(rng, draw, seen.companion, 'stand', at, y, size, bool(rng.integers(2)))
    size = min(0.6 * height, 0.64 * width) * rng.uniform(0.85, 1.12)
    at = across(rng.uniform(0.28, 0.44))
    if seen.action in LYING:
        size, at = min(size, 0.56 * width), across(rng.uniform(0.38, 0.44))
    elif seen.action in RISING:
        size = min(size, 0.5 * height)
    figure(rng, draw, seen.who, seen.action, at, ground, size, bool(rng.integers(2)))
    size = min(0.4 * height, 0.44 * width) * rng.uniform(0.85, 1.12)
    at, y = across(rng.uniform(0.7, 0.82)), height * rng.uniform(0.46, 0.8)
    item(rng, draw, seen.item, seen.item_colour, at, y, size, bool(rng.integers(2)))
    if scene.weather != 'clear' and scene.place not in ('room', 'moon'):
        for x, y in rng.random((26, 2)) * (width, height):
            if scene.weather == 'rain':
                drop = (x, y, x - 0.02 * height, y + 0.07 * height)
                draw.line(drop, fill=(210, 226, 246), width=1)
            else:
                r = 0.008 * height + 1
                draw.ellipse((x - r, y - r, x + r, y + r), fill=WHITE)
    return picture


def frame(picture: Image.Image, box: tuple[int, int, int, int], scale: float):
    """Draws a panel's border inside its box [x, y, w, h]."""
    x, y, w, h = box
    draw = ImageDraw.Draw(picture)
    draw.rectangle((x, y, x + w - 1, y + h - 1), outline=INK, width=max(1, round(2 * scale)))


def scribbles(rng: np.random.Generator, picture: Image.Image):
    """Fills a page with lines of scribble, as on a page of credits."""
    width, height = picture.size
    draw = ImageDraw.Draw(picture)
    for y in np.linspace(0.15, 0.85, 12) * height:
        pen = Pen(draw, 0.5 * width, y, 1.0)
        steps = np.linspace(-0.5, 0.5, 40) * width * rng.uniform(0.3, 0.8)
        line = steps + 1j * height * rng.uniform(-0.012, 0.012, 40)
        draw.line(pen.points(line), fill=INK, width=2)
