"""Fits photographs to a square and augments them for training. Free of jax."""

import dataclasses
import math

import numpy as np
from PIL import Image

from mmjax.data.images import crop_resize
from mmjax.sections import field

_GREY = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601


def centre_crop(image: Image.Image, size: int) -> np.ndarray:
    """Crops the largest centred square, as CLIP does, to uint8 [size, size, 3]."""
    width, height = image.size
    side = min(width, height)
    x = side / width / 2
    y = side / height / 2
    return crop_resize(image, (0.5 - x, 0.5 - y, 0.5 + x, 0.5 + y), size)


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """How far a photograph may vary in training."""

    min_area: float = field(
        0.5,
        "least area of the crop, as a fraction of the largest square's; 1 is the centre crop",
        least=0.01,
        most=1,
    )
    ratio: float = field(1.2, 'largest ratio of the sides of the crop', least=1, most=10)
    mirror: float = field(0.5, 'probability of a mirrored image', least=0, most=1)
    rotation: float = field(0.0, 'largest angle, in degrees', least=0, most=180)
    brightness: float = field(0.2, 'v: the factor is in [1 - v, 1 + v]', least=0, most=1)
    contrast: float = field(0.2, 'v: the factor is in [1 - v, 1 + v]', least=0, most=1)
    saturation: float = field(0.2, 'v: the factor is in [1 - v, 1 + v]', least=0, most=1)
    hue: float = field(0.0, 'largest shift, as a fraction of the colour circle', least=0, most=0.5)
    tint: float = field(0.0, 'v: a factor in [1 - v, 1 + v] per channel', least=0, most=1)
    grey: float = field(0.0, 'probability of an image without colour', least=0, most=1)
    erase: float = field(
        0.0, 'probability that a tenth to a third of the crop becomes noise', least=0, most=1
    )

    def __call__(self, image: Image.Image, size: int, rng: np.random.Generator) -> np.ndarray:
        """Returns an augmented crop, uint8 [size, size, 3]; a pure function of (image, rng)."""
        crop = self._crop(image, size, rng)
        if rng.random() < self.mirror:
            crop = crop[:, ::-1]
        crop = self._colours(crop, rng)
        if rng.random() < self.erase:
            area = rng.uniform(0.1, 0.33)
            ratio = math.exp(rng.uniform(-0.7, 0.7))
            h = min(size, round(size * math.sqrt(area * ratio)))
            w = min(size, round(size * math.sqrt(area / ratio)))
            y = rng.integers(size - h + 1)
            x = rng.integers(size - w + 1)
            crop[y : y + h, x : x + w] = rng.integers(0, 256, (h, w, 3), dtype=np.uint8)
        return crop

    def _crop(self, image: Image.Image, size: int, rng: np.random.Generator) -> np.ndarray:
        area = rng.uniform(self.min_area, 1.0)
        ratio = math.exp(rng.uniform(-1, 1) * math.log(self.ratio))
        position = rng.random(2)
        angle = rng.uniform(-self.rotation, self.rotation)
        if self.min_area == 1:
            crop = centre_crop(image, size)
        else:
            width, height = image.size
            side = math.sqrt(area * min(image.size) ** 2)
            w = min(side * math.sqrt(ratio) / width, 1.0)
            h = min(side / math.sqrt(ratio) / height, 1.0)
            x, y = position * (1 - np.array([w, h]))
            crop = crop_resize(image, (x, y, x + w, y + h), size)
        if not self.rotation:
            return crop
        # Rotated about the centre of the crop; the corners are filled with its edge pixels.
        pad = math.ceil(size * 0.21)
        wide = Image.fromarray(np.pad(crop, ((pad, pad), (pad, pad), (0, 0)), mode='edge'))
        rotated = np.asarray(wide.rotate(angle, Image.Resampling.BILINEAR))
        return rotated[pad : pad + size, pad : pad + size]

    def _colours(self, crop: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Changes brightness, tint, contrast, saturation and hue of uint8 [size, size, 3]."""
        # Always eight draws, whatever is off.
        draw = rng.uniform(-1, 1, 4) * (self.brightness, self.contrast, self.saturation, self.hue)
        tint = 1 + self.tint * rng.uniform(-1, 1, 3)
        grey = rng.random() < self.grey
        pixels = crop.astype(np.float32) * ((1 + draw[0]) * tint).astype(np.float32)
        middle = float((pixels @ _GREY).mean())
        pixels = middle + (pixels - middle) * np.float32(1 + draw[1])
        level = (pixels @ _GREY)[..., None]
        pixels = level + (pixels - level) * np.float32(0 if grey else 1 + draw[2])
        if self.hue and not grey:
            pixels = pixels @ _rotation(2 * math.pi * draw[3])
        return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


def _rotation(angle: float) -> np.ndarray:
    """Returns the matrix [3, 3] that rotates colours [r, g, b] about grey (Rodrigues)."""
    cos = math.cos(angle)
    sin = math.sin(angle) / math.sqrt(3)
    third = (1 - cos) / 3
    a = cos + third
    b = third - sin
    c = third + sin
    return np.array([[a, c, b], [b, a, c], [c, b, a]], np.float32)
