"""Draws the characters and the items of a comic panel with polygons and lines."""

import dataclasses
import math

import numpy as np

from mmjax.data.drawing import CIRCLE, COLOURS, INK, WHITE, Pen, any_colour, jitter

SPECIES = ('cat', 'dog', 'rabbit', 'bear', 'robot', 'duck', 'frog', 'alien')
HATS = ('none', 'top hat', 'crown', 'party hat', 'cap')
ACTIONS = (
    *('run', 'jump', 'sleep', 'sit', 'handstand', 'fly'),
    *('climb', 'hide', 'ride', 'dance', 'cry'),
)
LYING = ('sleep', 'fly')  # actions wider than high
RISING = ('jump', 'climb')  # actions that need room above
ITEMS = (
    *('ball', 'umbrella', 'balloon', 'flower', 'cake', 'book'),
    *('kite', 'fish', 'key', 'gift', 'mug', 'drum'),
)


@dataclasses.dataclass(frozen=True)
class Character:
    """One of a page's cast; looks the same in all its panels."""

    species: str
    colour: str
    hat: str
    hat_colour: str


def _head(pen: Pen, who: Character, at: complex, colour, eyes_shut: bool):
    """A head of radius .25 around `at`: the species is in the ears, the shape and the snout."""
    r, ink_eye = 0.25, 0.035
    match who.species:
        case 'cat':
            for s in (-1, 1):
                ear = (s * 0.25 + 0.02j, s * 0.24 + 0.4j, s * 0.05 + 0.22j)
                pen.fill([at + c for c in ear], colour)
        case 'rabbit':
            for s in (-1, 1):
                pen.disc(at + s * 0.11 + 0.36j, 0.07, 0.24, colour)
        case 'bear':
            for s in (-1, 1):
                pen.disc(at + s * 0.2 + 0.2j, 0.11, colour=colour)
        case 'robot':
            pen.stroke([at + 0.2j, at + 0.42j])
            pen.disc(at + 0.42j, 0.06, colour=COLOURS['red'])
        case 'alien':
            for s in (-1, 1):
                pen.stroke([at + s * 0.1, at + s * 0.22 + 0.4j], INK, 0.04)
                pen.disc(at + s * 0.22 + 0.4j, 0.07, colour=colour)
        case 'frog':
            for s in (-1, 1):
                pen.disc(at + s * 0.15 + 0.22j, 0.12, colour=colour)
                pen.disc(at + s * 0.15 + 0.24j, 0.07)
    if who.species == 'robot':
        pen.fill([at + r * c for c in (-1 - 0.9j, 1 - 0.9j, 1 + 0.9j, -1 + 0.9j)], colour)
    else:
        pen.disc(at, r * (1.1 if who.species == 'frog' else 1), r, colour)
    if who.species == 'dog':
        for s in (-1, 1):
            pen.disc(at + s * 0.26 - 0.02j, 0.08, 0.19, tuple(v * 2 // 3 for v in colour))
    for s in (-1, 1):
        eye = at + s * 0.1 + 0.05j
        if eyes_shut:
            pen.stroke([eye - 0.06, eye - 0.04j, eye + 0.06], INK, 0.03)
        else:
            size = 0.09 if who.species == 'alien' else 0.06
            pen.disc(eye, size, size * 1.2)
            pen.disc(eye + 0.02, ink_eye, colour=INK)
    if who.species == 'duck':
        pen.disc(at - 0.1j, 0.17, 0.07, COLOURS['orange'])
    elif who.species in ('dog', 'bear', 'cat'):
        pen.disc(at - 0.08j, 0.05, 0.035, INK)
    pen.stroke([at - 0.09 - 0.14j, at - 0.17j, at + 0.09 - 0.14j], INK, 0.025)
    top, hat = at + 0.2j, COLOURS[who.hat_colour]
    match who.hat:
        case 'top hat':
            pen.fill([top + c for c in (-0.24, 0.24, 0.24 + 0.05j, -0.24 + 0.05j)], hat)
            z = (-0.14 + 0.05j, 0.14 + 0.05j, 0.14 + 0.3j, -0.14 + 0.3j)
            pen.fill([top + c for c in z], hat)
        case 'crown':
            z = (-0.17, 0.17, 0.2 + 0.2j, 0.09 + 0.1j, 0.22j, -0.09 + 0.1j, -0.2 + 0.2j)
            pen.fill([top + c for c in z], COLOURS['yellow'])
        case 'party hat':
            pen.fill([top - 0.16, top + 0.16, top + 0.36j], hat)
            pen.disc(top + 0.36j, 0.05)
        case 'cap':
            z = (-0.2, 0.38, 0.34 + 0.05j, 0.2 + 0.05j, 0.1 + 0.15j, -0.12 + 0.14j)
            pen.fill([top + c for c in z], hat)


# pose: lift and turn of the whole body, where the hands and the feet are
_POSES = {
    'stand': (0.0, 0.0, (-0.3 + 0.28j, 0.3 + 0.28j), (-0.1, 0.1)),
    'run': (0.06, -0.3, (-0.34 + 0.4j, 0.32 + 0.5j), (-0.36 + 0.1j, 0.32 + 0.02j)),
    'jump': (0.4, 0.0, (-0.36 + 0.8j, 0.36 + 0.8j), (-0.3 + 0.06j, 0.3 + 0.06j)),
    'sleep': (0.28, math.pi / 2, (-0.2 + 0.3j, 0.2 + 0.3j), (-0.08, 0.08)),
    'sit': (0.16, 0.0, (-0.2 + 0.24j, 0.3 + 0.3j), (0.34 + 0.02j, 0.4 + 0.1j)),
    'handstand': (1.2, math.pi, (-0.26 + 1.2j, 0.26 + 1.2j), (-0.26, 0.2 + 0.04j)),
    'fly': (0.62, -1.25, (-0.04 + 0.98j, 0.2 + 1.02j), (-0.1 - 0.1j, 0.08 - 0.1j)),
    'climb': (0.3, 0.0, (-0.22 + 0.82j, 0.22 + 0.62j), (-0.16 + 0.02j, 0.16 + 0.12j)),
    'hide': (0.06, 0.0, (-0.2 + 0.4j, 0.2 + 0.4j), (-0.1, 0.1)),
    'ride': (0.26, 0.0, (0.34 + 0.36j, 0.3 + 0.4j), (-0.04 - 0.1j, 0.14 + 0.02j)),
    'dance': (0.04, 0.22, (-0.34 + 0.2j, 0.36 + 0.78j), (-0.08, 0.4 + 0.2j)),
    'cry': (0.0, 0.0, (-0.2 + 0.62j, 0.2 + 0.62j), (-0.1, 0.1)),
}


def figure(rng, draw, who: Character, action: str, x, y, size, flip):
    """The character in the action's pose with the action's prop, feet at (x, y) pixels."""
    lift, angle, hands, feet = _POSES[action]
    scene = Pen(draw, x, y, size, 0.0, flip)
    pen = Pen(draw, x, y - lift * size, size, angle, flip)
    colour, prop = jitter(rng, COLOURS[who.colour]), jitter(rng, any_colour(rng), 24)
    wood = jitter(rng, any_colour(rng), 24)
    match action:
        case 'run':
            for k in range(3):
                scene.stroke([-0.75 + 0.25j * (k + 1), -0.42 + 0.25j * (k + 1)], INK, 0.035)
                scene.disc(-0.45 - 0.14 * k + 0.05j, 0.1 - 0.02 * k, colour=WHITE)
        case 'jump':
            scene.disc(0.0, 0.32, 0.06, INK, False)
            for s in (-0.2, 0, 0.2):
                scene.stroke([s + 0.1j, s + 0.32j], INK, 0.035)
        case 'sleep':
            pen = Pen(draw, x + (-0.5 if flip else 0.5) * size, y - lift * size, size, angle, flip)
            scene.box(-0.62, 0.02, -0.55, 0.5, wood)
            scene.box(-0.62, 0.06, 0.6, 0.2, wood)
            scene.box(-0.6, 0.18, 0.6, 0.26, prop)
        case 'sit':
            scene.box(-0.28, 0.26, 0.26, 0.34, prop)
            scene.box(-0.34, 0, -0.26, 0.8, prop)
            scene.box(0.16, 0, 0.24, 0.28, prop)
        case 'fly':
            pen.fill([-0.16 + 0.5j, 0.16 + 0.5j, -0.1 - 0.25j, -0.6 - 0.2j], prop)
        case 'climb':
            for s in (-0.24, 0.24):
                scene.stroke([s, s + 1.5j], wood, 0.06)
            for k in range(7):
                rung = (0.12 + 0.2 * k) * 1j
                scene.stroke([-0.24 + rung, 0.24 + rung], wood, 0.05)
        case 'ride':
            for s in (-0.36, 0.36):
                scene.disc(s + 0.2j, 0.21, colour=wood)
                scene.disc(s + 0.2j, 0.05, colour=INK)
            scene.stroke([-0.36 + 0.2j, -0.1 + 0.46j, 0.26 + 0.46j, 0.36 + 0.2j], prop, 0.07)
            scene.stroke([0.26 + 0.46j, 0.22 + 0.64j, 0.36 + 0.64j], prop, 0.06)
        case 'dance':
            for s in (-0.62, 0.55):
                scene.stroke([s + 0.72j, s + 1.0j, s + 0.14 + 0.94j], INK, 0.045)
                scene.disc(s - 0.05 + 0.7j, 0.07, 0.055, INK)
        case 'cry':
            scene.disc(0.02j, 0.5, 0.09, WHITE)
    for foot, s in zip(feet, (-0.07, 0.07), strict=True):
        pen.stroke([s + 0.22j, foot + 0.03j], INK, 0.07)
        pen.disc(foot + 0.03j, 0.08, 0.05, INK)
    pen.disc(0.34j, 0.17, 0.22, colour)
    pen.disc(0.3j, 0.1, 0.13, tuple((v + 255) // 2 for v in colour), False)
    shut = action in ('sleep', 'cry')
    _head(pen, who, 0.72j, colour, shut)
    for hand, s in zip(hands, (-0.14, 0.14), strict=True):
        pen.stroke([s + 0.44j, hand], INK, 0.06)
        pen.disc(hand, 0.06, colour=colour)
    match action:
        case 'sleep':
            z = [0.52 + 0.14j, 0.56 + 0.42j, 0.1 + 0.54j, -0.08 + 0.44j, -0.08 + 0.14j]
            scene.fill(z, prop)
            for k in range(3):
                z = -0.5 + 0.16 * k + (0.72 + 0.16 * k) * 1j
                d = 0.06 + 0.02 * k
                scene.stroke([z + d * 1j, z + d + d * 1j, z, z + d], INK, 0.035)
        case 'hide':
            z = (-0.3, 0.3, 0.42 + 0.26j, 0.32 + 0.52j, -0.32 + 0.52j, -0.42 + 0.26j)
            scene.fill(z, prop)
            for level in (0.12j, 0.4j):
                scene.stroke([level - 0.36, level + 0.36], INK, 0.05)
        case 'cry':
            for s in (-1, 1):
                tears = [s * 0.1 + 0.74j, s * 0.3 + 0.6j, s * 0.42 + 0.3j, s * 0.4 + 0.05j]
                scene.stroke(tears, INK, 0.12)
                scene.stroke(tears, WHITE, 0.07)


def item(rng, draw, kind: str, colour_name: str, x, y, size, flip):
    """The item around (x, y), about `size` pixels high; its kind is in its outline."""
    pen = Pen(draw, x, y, size, rng.uniform(-0.2, 0.2), flip)
    colour = jitter(rng, COLOURS[colour_name], 10)
    dark = tuple(v * 2 // 3 for v in colour)
    pen.disc(0, 0.64, colour=WHITE)  # an inset, so that outlines stand out
    match kind:
        case 'ball':
            pen.disc(0, 0.42, colour=colour)
            pen.stroke([-0.4, -0.15 - 0.12j, 0.15 - 0.12j, 0.4], WHITE, 0.12)
        case 'umbrella':
            pen.stroke([0.3j, -0.42j, 0.12 - 0.5j, 0.2 - 0.38j], INK, 0.06)
            canopy = [c for c in CIRCLE * 0.58 if c.imag > -1e-9]
            pen.fill([*canopy, -0.29 + 0.1j, 0, 0.29 + 0.1j], colour)
        case 'balloon':
            pen.stroke([-0.1j, 0.06 - 0.3j, -0.04 - 0.55j], INK, 0.03)
            pen.disc(0.22j, 0.29, 0.36, colour)
            pen.disc(-0.1 + 0.34j, 0.06, 0.1, WHITE, False)
        case 'flower':
            pen.stroke([0.1j, -0.55j], COLOURS['green'], 0.08)
            pen.disc(0.16 - 0.3j, 0.15, 0.07, COLOURS['green'])
            for petal in CIRCLE[::4]:
                pen.disc(0.18j + 0.23 * petal, 0.17, colour=colour)
            pen.disc(0.18j, 0.12, colour=WHITE)
        case 'cake':
            pen.box(-0.46, -0.4, 0.46, -0.04, colour)
            pen.box(-0.3, -0.04, 0.3, 0.22, colour)
            pen.stroke([-0.46 - 0.1j, -0.23 - 0.2j, -0.1j, 0.23 - 0.2j, 0.46 - 0.1j], WHITE, 0.08)
            for s in (-0.16, 0.16):
                pen.stroke([s + 0.22j, s + 0.44j], WHITE, 0.07)
                pen.disc(s + 0.48j, 0.05, 0.07, COLOURS['orange'], False)
        case 'book':
            for s in (-1, 1):
                pen.fill([-0.3j, s * 0.56 - 0.18j, s * 0.56 + 0.36j, 0.24j], colour)
                z = (0.12 - 0.14j, 0.42 - 0.06j, 0.42 + 0.22j, 0.12 + 0.16j)
                pen.fill([s * c.real + 1j * c.imag for c in z], WHITE)
        case 'kite':
            pen.stroke([-0.3j, 0.14 - 0.4j, -0.1 - 0.5j, 0.1 - 0.62j], INK, 0.04)
            pen.fill([0.56j, 0.36 + 0.14j, -0.34j, -0.36 + 0.14j], colour)
            pen.stroke([0.56j, -0.34j])
            pen.stroke([-0.36 + 0.14j, 0.36 + 0.14j])
        case 'fish':
            pen.fill([0.24, 0.56 + 0.26j, 0.56 - 0.26j], dark)
            pen.disc(-0.08, 0.42, 0.26, colour)
            pen.disc(-0.28 + 0.06j, 0.07)
            pen.disc(-0.29 + 0.06j, 0.03, colour=INK)
        case 'key':
            pen.stroke([0, 0.0, -0.52j], INK, 0.18)
            pen.stroke([0, -0.5j], colour, 0.12)
            for y_tooth in (-0.28j, -0.46j):
                pen.stroke([y_tooth, 0.24 + y_tooth], colour, 0.12)
            pen.disc(0.22j, 0.27, colour=colour)
            pen.disc(0.22j, 0.12)
        case 'gift':
            pen.box(-0.4, -0.42, 0.4, 0.26, colour)
            pen.box(-0.08, -0.42, 0.08, 0.26, WHITE, False)
            pen.box(-0.4, -0.14, 0.4, 0.0, WHITE, False)
            for s in (-1, 1):
                pen.fill([0.26j, s * 0.3 + 0.5j, s * 0.34 + 0.28j], WHITE)
        case 'mug':
            pen.disc(0.34 - 0.06j, 0.22, colour=dark)
            pen.disc(0.34 - 0.06j, 0.11)
            pen.box(-0.36, -0.42, 0.3, 0.26, colour)
            for s in (-0.2, 0.05):
                pen.stroke([s + 0.34j, s + 0.08 + 0.44j, s + 0.56j], WHITE, 0.06)
        case 'drum':
            pen.box(-0.42, -0.34, 0.42, 0.12, colour)
            zigzag = np.linspace(-0.42, 0.42, 7) + 1j * np.resize([0.1, -0.3], 7)
            pen.stroke(zigzag, WHITE, 0.06)
            pen.disc(0.14j, 0.42, 0.13)
            pen.stroke([-0.1 + 0.2j, -0.4 + 0.56j], INK, 0.06)
            pen.stroke([0.1 + 0.2j, 0.4 + 0.56j], INK, 0.06)
