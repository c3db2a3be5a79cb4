"""Opens pictures safely, cuts boxes out of them and varies the cuts. Free of jax."""

import dataclasses
import io
import os
import pathlib
from collections.abc import Callable, Sequence

import numpy as np
from PIL import ExifTags, Image, ImageOps

from mmjax.errors import RecordError, UserError

MAX_PIXELS = 50_000_000
_FORMATS = (
    'JPEG',
    'PNG',
    'WEBP',
    'GIF',
    'BMP',
    'TIFF',
)  # never EPS and the like: they run programs


def inside(root: str | os.PathLike, relative: str) -> pathlib.Path:
    """Returns root/relative; raises UserError where it is absolute or leads out of the root.

    Symbolic links are followed, so that a link out of the root is refused too.
    """
    root = pathlib.Path(root)
    if not relative or '\0' in relative:
        raise UserError(f'{relative!r} is not a path under {root}')
    path = root / relative
    if pathlib.PurePath(relative).is_absolute() or not path.resolve().is_relative_to(
        root.resolve()
    ):
        raise UserError(f'the path {relative!r} leads outside the data root {root}')
    return path


def open_picture(
    source: bytes | str | os.PathLike,
    name: str = '',
    *,
    max_pixels: int = MAX_PIXELS,
    at_least: tuple[int, int] | None = None,
) -> Image.Image:
    """Decodes a whole picture to RGB, turned as its EXIF orientation says.

    Args:
      source: encoded bytes, or the path of a file.
      name: what errors call it; the path by default.
      max_pixels: larger pictures are refused before they are decoded.
      at_least: (width, height) that suffice; a JPEG may then be decoded at 1/2, 1/4 or 1/8.

    Raises:
      RecordError: 'missing_picture', 'picture_too_large' or 'unreadable_picture' (truncated ones
        too), naming the file.
    """
    name = name or ('a picture' if isinstance(source, bytes) else os.fspath(source))
    try:
        with Image.open(
            io.BytesIO(source) if isinstance(source, bytes) else source, formats=_FORMATS
        ) as picture:
            width, height = picture.size
            if width * height > max_pixels:
                raise RecordError(
                    'picture_too_large',
                    f'{name} has {width}×{height} pixels, more than the {max_pixels} allowed',
                )
            if at_least:
                picture.draft('RGB', at_least)
            picture.load()
            return _rgb(ImageOps.exif_transpose(picture))
    except RecordError:
        raise
    except FileNotFoundError as error:
        raise RecordError('missing_picture', f'{name} does not exist') from error
    except Image.DecompressionBombError as error:
        raise RecordError('picture_too_large', f'{name}: {error}') from error
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error…
        why = str(error).removesuffix('.') or type(error).__name__
        raise RecordError('unreadable_picture', f'{name} cannot be read: {why}') from error


def check_picture(
    source: bytes | str | os.PathLike, name: str = '', *, max_pixels: int = MAX_PIXELS
) -> tuple[int, int]:
    """Returns (width, height) of a picture whose every byte decodes; raises as `open_picture`."""
    name = name or ('a picture' if isinstance(source, bytes) else os.fspath(source))
    # JPEGs are decoded at 1/8, which reads the whole stream and skips most of the arithmetic.
    open_picture(source, name, max_pixels=max_pixels, at_least=(1, 1))
    with Image.open(
        io.BytesIO(source) if isinstance(source, bytes) else source, formats=_FORMATS
    ) as picture:
        turned = picture.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
        return picture.size[::-1] if turned else picture.size


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == 'RGB':
        return picture
    if picture.mode.startswith('I;16'):  # 16-bit grey, which `convert` would clip to white
        grey = np.asarray(picture, np.uint16) >> 8
        return Image.fromarray(grey.astype(np.uint8)).convert('RGB')
    if 'A' in picture.getbands() or 'transparency' in picture.info:
        alpha = picture.convert('RGBA')  # what shows through is paper, not black
        return Image.alpha_composite(Image.new('RGBA', alpha.size, 'white'), alpha).convert('RGB')
    return picture.convert('RGB')


def crop_resize(picture: Image.Image, box: Sequence[float], size: int) -> np.ndarray:
    """Cuts `box` = (x0, y0, x1, y1), in fractions of the picture, to uint8 [size, size, 3].

    The sides are scaled independently, with antialiasing. Parts outside the picture are left out.
    """
    width, height = picture.size
    x0, y0, x1, y1 = (float(np.clip(value, 0.0, 1.0)) for value in box)
    x0, y0 = min(x0 * width, width - 1.0), min(y0 * height, height - 1.0)
    x1, y1 = max(x1 * width, x0 + 1.0), max(y1 * height, y0 + 1.0)
    cut = picture.resize(
        (size, size), Image.Resampling.BILINEAR, (x0, y0, x1, y1), reducing_gap=2.0
    )
    return np.asarray(cut)


class Kept:
    """Decoded pictures by row, kept until they fill `limit` bytes; then no more are.

    A small set is so decoded only in the first epoch. Pickled, it is empty.
    """

    def __init__(self, limit: int):
        self._limit, self._bytes = limit, 0
        self._pictures: dict[int, Image.Image] = {}

    def __len__(self) -> int:
        return len(self._pictures)

    def __reduce__(self):
        return Kept, (self._limit,)

    def get(self, row: int, make: Callable[[], Image.Image]) -> Image.Image:
        """Returns the picture of `row`, made by `make` if it is not here."""
        if (picture := self._pictures.get(row)) is None:
            picture = make()
            size = 4 * picture.width * picture.height  # PIL keeps four bytes a pixel
            if self._bytes + size <= self._limit:  # a race of threads costs a picture too many
                self._bytes += size
                self._pictures[row] = picture
        return picture


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """How far the cut of a panel may vary. Nothing is mirrored: that would reverse lettering.

    shift, scale: fractions of the box's sides; brightness: fraction of the full range;
    contrast: relative change around mid-grey. All are drawn uniformly from [-v, v].
    """

    shift: float = 0.04
    scale: float = 0.06
    brightness: float = 0.1
    contrast: float = 0.15

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
