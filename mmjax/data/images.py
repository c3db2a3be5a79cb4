"""Opens images safely, crops boxes from them and augments the crops. Free of jax."""

import dataclasses
import io
import os
import pathlib
from collections.abc import Callable, Sequence

import numpy as np
from PIL import ExifTags, Image, ImageOps

from mmjax.errors import RecordError, UserError
from mmjax.sections import field

MAX_PIXELS = 50_000_000
# Never EPS and the like: they run programs.
_FORMATS = ('JPEG', 'PNG', 'WEBP', 'GIF', 'BMP', 'TIFF')


def inside(root: str | os.PathLike, relative: str) -> pathlib.Path:
    """Returns root/relative; raises UserError if it is absolute or leads out of the root.

    Symbolic links are followed, so that a link out of the root is refused too.
    """
    root = pathlib.Path(root)
    if not relative or '\0' in relative:
        raise UserError(f'{relative!r} is not a path under {root}')
    path = root / relative
    absolute = pathlib.PurePath(relative).is_absolute()
    if absolute or not path.resolve().is_relative_to(root.resolve()):
        raise UserError(f'the path {relative!r} leads outside the data root {root}')
    return path


def open_image(
    source: bytes | str | os.PathLike,
    name: str = '',
    *,
    max_pixels: int = MAX_PIXELS,
    at_least: tuple[int, int] | None = None,
) -> Image.Image:
    """Decodes a whole image to RGB, in the orientation of its EXIF tag.

    Args:
      source: encoded bytes, or the path of a file.
      name: its name in errors; the path by default.
      max_pixels: larger images are refused before they are decoded.
      at_least: (width, height) in pixels that suffice; a JPEG may then be decoded at 1/2, 1/4 or
        1/8 of its size.

    Raises:
      RecordError: 'missing_image', 'image_too_large' or 'unreadable_image' (a truncated one too),
        naming the file.
    """
    name = name or ('an image' if isinstance(source, bytes) else os.fspath(source))
    try:
        with _open(source) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise RecordError(
                    'image_too_large',
                    f'{name} has {width}×{height} pixels, more than the {max_pixels} allowed',
                )
            if at_least:
                image.draft('RGB', at_least)
            image.load()
            return _rgb(ImageOps.exif_transpose(image))
    except RecordError:
        raise
    except FileNotFoundError as error:
        raise RecordError('missing_image', f'{name} does not exist') from error
    except Image.DecompressionBombError as error:
        raise RecordError('image_too_large', f'{name}: {error}') from error
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error…
        why = str(error).removesuffix('.') or type(error).__name__
        raise RecordError('unreadable_image', f'{name} cannot be read: {why}') from error


def check_image(
    source: bytes | str | os.PathLike, name: str = '', *, max_pixels: int = MAX_PIXELS
) -> tuple[int, int]:
    """Returns (width, height) of an image of which every byte decodes; raises as `open_image`."""
    # JPEGs are decoded at 1/8, which reads the whole stream and skips most of the arithmetic.
    open_image(source, name, max_pixels=max_pixels, at_least=(1, 1))
    with _open(source) as image:
        transposed = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
        return image.size[::-1] if transposed else image.size


def _open(source: bytes | str | os.PathLike) -> Image.Image:
    return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=_FORMATS)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == 'RGB':
        return image
    if image.mode.startswith('I;16'):  # 16-bit grey, which `convert` would clip to white
        grey = np.asarray(image, np.uint16) >> 8
        return Image.fromarray(grey.astype(np.uint8)).convert('RGB')
    if 'A' in image.getbands() or 'transparency' in image.info:
        alpha = image.convert('RGBA')  # the background is paper, not black
        return Image.alpha_composite(Image.new('RGBA', alpha.size, 'white'), alpha).convert('RGB')
    return image.convert('RGB')


def crop_resize(image: Image.Image, box: Sequence[float], size: int) -> np.ndarray:
    """Crops a box and resizes it to a square.

    Args:
      image: RGB.
      box: (x0, y0, x1, y1) in fractions of the image; parts outside are left out.
      size: side of the result in pixels.

    Returns:
      uint8 [size, size, 3]; width and height are scaled independently, with antialiasing.
    """
    width, height = image.size
    x0, y0, x1, y1 = (float(np.clip(value, 0.0, 1.0)) for value in box)
    x0, y0 = min(x0 * width, width - 1.0), min(y0 * height, height - 1.0)
    x1, y1 = max(x1 * width, x0 + 1.0), max(y1 * height, y0 + 1.0)
    crop = image.resize((size, size), Image.Resampling.BILINEAR, (x0, y0, x1, y1), reducing_gap=2.0)
    return np.asarray(crop)


class ImageCache:
    """Keeps decoded images by row until they fill `limit` bytes; later images are not kept.

    Thus a small data set is decoded once. A pickled cache is empty.
    """

    def __init__(self, limit: int):
        self._limit = limit
        self._bytes = 0
        self._images: dict[int, Image.Image] = {}

    def __len__(self) -> int:
        return len(self._images)

    def __reduce__(self) -> tuple[type['ImageCache'], tuple[int]]:
        return ImageCache, (self._limit,)

    def get(self, row: int, decode: Callable[[], Image.Image]) -> Image.Image:
        """Returns the image of `row`, calling `decode` if it is not in the cache."""
        image = self._images.get(row)
        if image is None:
            image = decode()
            size = 4 * image.width * image.height  # PIL uses four bytes per pixel
            if self._bytes + size <= self._limit:  # a race of threads costs one image too many
                self._bytes += size
                self._images[row] = image
        return image


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """How far the crop of a panel may vary; each value v is drawn uniformly from [-v, v].

    Nothing is mirrored: that would reverse lettering.
    """

    shift: float = field(0.04, "shift of the box, in fractions of the box's sides", least=0, most=1)
    scale: float = field(0.06, "change of the box's sides, as a fraction", least=0, below=1)
    brightness: float = field(0.1, 'in fractions of the full range', least=0, most=1)
    contrast: float = field(0.15, 'relative change around mid-grey', least=0, most=1)

    def box(self, box: Sequence[float], rng: np.random.Generator) -> np.ndarray:
        """Returns the box moved and scaled (each side by itself), kept within [0, 1]."""
        x0, y0, x1, y1 = box
        draw = rng.uniform(-1.0, 1.0, 4)
        centre = np.array([x0 + x1, y0 + y1]) / 2
        sides = np.array([x1 - x0, y1 - y0])
        centre = centre + self.shift * draw[:2] * sides
        half = sides * (1 + self.scale * draw[2:]) / 2
        return np.clip(np.concatenate([centre - half, centre + half]), 0.0, 1.0)

    def tone(self, pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Returns uint8 pixels with brightness and contrast varied."""
        brightness, contrast = rng.uniform(-1.0, 1.0, 2) * (self.brightness, self.contrast)
        table = (np.arange(256) - 127.5) * (1 + contrast) + 127.5 + 255 * brightness
        table = np.clip(np.rint(table), 0, 255).astype(np.uint8)
        return np.frombuffer(pixels.tobytes().translate(table.tobytes()), np.uint8).reshape(
            pixels.shape
        )
