"""Streams: which columns of a frame are the pose, a hand, a face, and how landmarks fill them."""

import itertools
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from mmjax.data.tables import read_json
from mmjax.errors import UserError


class Columns(NamedTuple):
    """Columns [start, end) of a frame; coordinates: numbers per landmark, 0 for none."""

    start: int
    end: int
    coordinates: int = 0


def read(root: pathlib.Path) -> dict[str, Columns]:
    """Returns the streams of a folder's `streams.json`; raises UserError where it is none."""
    path = root / 'streams.json'
    return check(read_json(path, str(path)), str(path))


def check(content: Any, where: str) -> dict[str, Columns]:
    """Returns streams from left to right.

    Args:
      content: {name: [start, end] or [start, end, coordinates]}.
      where: file or key, for error messages.

    Raises:
      UserError: another content, streams that overlap, landmarks that do not fill their stream.
    """
    if not isinstance(content, Mapping) or not content:
        raise UserError(f'{where} is not an object of streams {{name: [start, end]}}')
    for name, span in content.items():
        listed = isinstance(span, list | tuple) and len(span) in (2, 3)
        numbers = listed and all(type(n) is int and n >= 0 for n in span)
        if not numbers or span[0] >= span[1]:
            raise UserError(
                f'{where}: stream {name!r} is {span!r:.60}, not [start, end] or '
                '[start, end, coordinates]'
            )
        start, end, coordinates = Columns(*span)
        if coordinates and (end - start) % coordinates:
            raise UserError(
                f'{where}: stream {name!r} has {end - start} columns, which landmarks of '
                f'{coordinates} coordinates do not fill'
            )
    streams = dict(sorted(content.items(), key=lambda item: tuple(item[1])))
    for (left, span), (right, next_span) in itertools.pairwise(streams.items()):
        if next_span[0] < span[1]:
            raise UserError(f'{where}: streams {left!r} {span} and {right!r} {next_span} overlap')
    return {name: Columns(*span) for name, span in streams.items()}
