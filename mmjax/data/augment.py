"""Fits photographs to a square and varies them for training. Free of jax."""

import dataclasses
import math

import numpy as np
from PIL import Image

from mmjax.data.images import crop_resize
from mmjax.errors import UserError

_GREY = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601


def centre_square(picture: Image.Image, size: int) -> np.ndarray:
    """Cuts the largest square of the middle, as CLIP does, to uint8 [size, size, 3]."""
    width, height = picture.size
    side = min(width, height)
    x, y = side / width / 2, side / height / 2
    return crop_resize(picture, (0.5 - x, 0.5 - y, 0.5 + x, 0.5 + y), size)


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """How far a photograph may vary in training.

    min_area: least area of the cut, as a share of the largest square's, 1 for the centre square;
    ratio: the cut is up to so much wider or higher than square; mirror, grey, erase: probabilities
    (of a mirrored picture, of one without colour, of a rectangle of noise over a tenth to a third
    of it); rotation: degrees either way; brightness, contrast, saturation: factors in
    [1 − v, 1 + v]; hue: shares of the colour circle either way, up to .5; tint: factors a channel,
    as of a lamp. Raises UserError for a value out of its range.
    """

    min_area: float = 0.5
    ratio: float = 1.2
    mirror: float = 0.5
    rotation: float = 0.0
    brightness: float = 0.2
    contrast: float = 0.2
    saturation: float = 0.2
    hue: float = 0.0
    tint: float = 0.0
    grey: float = 0.0
    erase: float = 0.0

    def __post_init__(self):
        limits = {'min_area': (0.01, 1.0), 'ratio': (1.0, 10.0)}
        limits |= {'rotation': (0.0, 180.0), 'hue': (0.0, 0.5)}
        for name, value in vars(self).items():
            low, high = limits.get(name, (0.0, 1.0))
            if not low <= value <= high:
                raise UserError(f'data.augmentation.{name} is {value}, not in [{low:g}, {high:g}]')

    def __call__(self, picture: Image.Image, size: int, rng: np.random.Generator) -> np.ndarray:
        """Returns a varied cut, uint8 [size, size, 3]; a pure function of (picture, rng)."""
        cut = self._cut(picture, size, rng)
        if rng.random() < self.mirror:
            cut = cut[:, ::-1]
        cut = self._colours(cut, rng)
        if rng.random() < self.erase:
            area, ratio = rng.uniform(0.1, 0.33), math.exp(rng.uniform(-0.7, 0.7))
            h = min(size, round(size * math.sqrt(area * ratio)))
            w = min(size, round(size * math.sqrt(area / ratio)))
            y, x = rng.integers(size - h + 1), rng.integers(size - w + 1)
            cut[y : y + h, x : x + w] = rng.integers(0, 256, (h, w, 3), dtype=np.uint8)
        return cut

    def _cut(self, picture: Image.Image, size: int, rng: np.random.Generator) -> np.ndarray:
        area = rng.uniform(self.min_area, 1.0)
        ratio = math.exp(rng.uniform(-1, 1) * math.log(self.ratio))
        place, angle = rng.random(2), rng.uniform(-self.rotation, self.rotation)
        if self.min_area == 1:
            cut = centre_square(picture, size)
        else:
            width, height = picture.size
            side = math.sqrt(area * min(picture.size) ** 2)
            w = min(side * math.sqrt(ratio) / width, 1.0)
            h = min(side / math.sqrt(ratio) / height, 1.0)
            x, y = place * (1 - np.array([w, h]))
            cut = crop_resize(picture, (x, y, x + w, y + h), size)
        if not self.rotation:
            return cut
        # Turned about the middle of the cut; what comes in from outside is the rim, continued.
        pad = math.ceil(size * 0.21)
        wide = Image.fromarray(np.pad(cut, ((pad, pad), (pad, pad), (0, 0)), mode='edge'))
        turned = np.asarray(wide.rotate(angle, Image.Resampling.BILINEAR))
        return turned[pad : pad + size, pad : pad + size]

    def _colours(self, cut: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Brightness, tint, contrast, saturation, hue in this order; always eight draws."""
        draw = rng.uniform(-1, 1, 4) * (self.brightness, self.contrast, self.saturation, self.hue)
        tint, grey = 1 + self.tint * rng.uniform(-1, 1, 3), rng.random() < self.grey
        pixels = cut.astype(np.float32) * ((1 + draw[0]) * tint).astype(np.float32)
        middle = float((pixels @ _GREY).mean())
        pixels = middle + (pixels - middle) * np.float32(1 + draw[1])
        level = (pixels @ _GREY)[..., None]
        pixels = level + (pixels - level) * np.float32(0 if grey else 1 + draw[2])
        if self.hue and not grey:
            pixels = pixels @ _rotation(2 * math.pi * draw[3])
        return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


def _rotation(angle: float) -> np.ndarray:
    """Turns colours [r, g, b] about the grey axis, which stays where it is (Rodrigues)."""
    cos, sin = math.cos(angle), math.sin(angle) / math.sqrt(3)
    third = (1 - cos) / 3
    a, b, c = cos + third, third - sin, third + sin
    return np.array([[a, c, b], [b, a, c], [c, b, a]], np.float32)
