"""A pen for built-in images: shapes, named colours, random choices. Free of jax."""

import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from PIL import ImageDraw

T = TypeVar('T')
Colour = tuple[int, int, int]
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
    """Draws shapes given as complex points in their own frame: y up, 1 = the shape's height.

    Args:
      draw: canvas.
      x, y: origin of the frame, in pixels of the canvas.
      size: height of the shape, in pixels.
      angle: rotation against the clock, in radians.
      flip: mirrors left and right.
    """

    def __init__(
        self,
        draw: ImageDraw.ImageDraw,
        x: float,
        y: float,
        size: float,
        angle: float = 0.0,
        flip: bool = False,
    ):
        self.draw = draw
        self.origin = complex(x, y)
        self.flip = flip
        self.turn = size * complex(math.cos(angle), math.sin(angle))
        self.size = size

    def points(self, z: np.ndarray | Sequence[complex]) -> list[float]:
        """Converts local points to pixels; rounded, so that the last bit of a float is lost."""
        z = np.asarray(z, complex) * self.turn
        x = self.origin.real + (-z.real if self.flip else z.real)
        return np.stack([x, self.origin.imag - z.imag], -1).round(1).ravel().tolist()

    def stroke(
        self, z: np.ndarray | Sequence[complex], colour: Colour = INK, width: float = 0.03
    ) -> None:
        """Draws a line through points; `width` is in heights of the shape."""
        self.draw.line(self.points(z), fill=colour, width=max(1, round(width * self.size)))

    def fill(self, z: np.ndarray | Sequence[complex], colour: Colour, outline: bool = True) -> None:
        """Draws a polygon."""
        points = self.points(z)
        self.draw.polygon(points, fill=colour)
        if outline:
            self.draw.line(points + points[:4], fill=INK, width=max(1, round(0.03 * self.size)))

    def disc(
        self,
        centre: complex,
        rx: float,
        ry: float | None = None,
        colour: Colour = WHITE,
        outline: bool = True,
    ) -> None:
        """Draws an ellipse of radii rx and ry, a circle without ry."""
        ry = rx if ry is None else ry
        self.fill(centre + rx * CIRCLE.real + 1j * ry * CIRCLE.imag, colour, outline)

    def box(
        self,
        left: float,
        bottom: float,
        right: float,
        top: float,
        colour: Colour,
        outline: bool = True,
    ) -> None:
        """Draws a rectangle."""
        corners = [left + 1j * bottom, right + 1j * bottom, right + 1j * top, left + 1j * top]
        self.fill(corners, colour, outline)


def pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    """Draws one of a sequence."""
    return options[int(rng.integers(len(options)))]


def any_colour(rng: np.random.Generator) -> Colour:
    """Draws one of the named colours."""
    return pick(rng, list(COLOURS.values()))


def jitter(rng: np.random.Generator, colour: Colour, amount: int = 14) -> Colour:
    """Shifts each channel of a colour by at most `amount` of 255."""
    shifted = np.add(colour, rng.integers(-amount, amount + 1, 3)).clip(0, 255)
    red, green, blue = (int(value) for value in shifted)
    return red, green, blue
