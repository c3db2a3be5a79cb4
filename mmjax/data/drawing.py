"""A pen for built-in pictures: shapes, named colours, random choices. Free of jax."""

import math

import numpy as np

INK = (24, 22, 30)
WHITE = (255, 255, 255)
COLOURS = {
    'red': (214, 48, 49),
    'orange': (243, 145, 32),
    'yellow': (250, 216, 60),
    'green': (60, 168, 78),
    'blue': (52, 104, 214),
    'purple': (142, 68, 190),
    'pink': (246, 140, 182),
    'brown': (141, 94, 56),
}
CIRCLE = np.exp(2j * np.pi * np.arange(20) / 20)


class Pen:
    """Draws shapes given as complex points (y up, 1 = the thing's height) in their own frame."""

    def __init__(self, draw, x, y, size, angle=0.0, flip=False):
        self.draw, self.origin, self.flip = draw, complex(x, y), flip
        self.turn, self.size = size * complex(math.cos(angle), math.sin(angle)), size

    def points(self, z) -> list[float]:
        """Local points → pixels; rounded, so that the last bit of a float decides nothing."""
        z = np.asarray(z, complex) * self.turn
        x = self.origin.real + (-z.real if self.flip else z.real)
        return np.stack([x, self.origin.imag - z.imag], -1).round(1).ravel().tolist()

    def stroke(self, z, colour=INK, width=0.03):
        self.draw.line(self.points(z), fill=colour, width=max(1, round(width * self.size)))

    def fill(self, z, colour, outline=True):
        points = self.points(z)
        self.draw.polygon(points, fill=colour)
        if outline:
            self.draw.line(points + points[:4], fill=INK, width=max(1, round(0.03 * self.size)))

    def disc(self, centre, rx, ry=None, colour=WHITE, outline=True):
        ry = rx if ry is None else ry
        self.fill(centre + rx * CIRCLE.real + 1j * ry * CIRCLE.imag, colour, outline)

    def box(self, left, bottom, right, top, colour, outline=True):
        corners = [left + 1j * bottom, right + 1j * bottom, right + 1j * top, left + 1j * top]
        self.fill(corners, colour, outline)


def pick(rng: np.random.Generator, options):
    """Draws one of a sequence."""
    return options[int(rng.integers(len(options)))]


def any_colour(rng: np.random.Generator) -> tuple[int, int, int]:
    """Draws one of the named colours."""
    return pick(rng, list(COLOURS.values()))


def jitter(rng, colour, amount=14) -> tuple[int, int, int]:
    """Shifts each channel of a colour by at most `amount` of 255."""
    shifted = np.add(colour, rng.integers(-amount, amount + 1, 3))
    return tuple(int(v) for v in shifted.clip(0, 255))
