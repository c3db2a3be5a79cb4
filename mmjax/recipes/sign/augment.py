"""Transforms a sequence of landmarks: differences, normalisation, then augmentation.

The order matters: noise of a given strength would drown a feature of small range, and a zero
would not mean "nothing known", if augmentation came before normalisation. Only a stretch of time
depends on what a column was: changes from frame to frame get smaller when a movement gets slower.
"""

import dataclasses
import functools
import itertools
import json
import math
import os
from collections.abc import Iterable, Mapping

import numpy as np

from mmjax.errors import UserError
from mmjax.sections import field

Streams = Mapping[str, tuple[int, int]]  # name → columns [start, end)
FARTHEST = 1e4  # standard deviations from the mean; a value beyond is a fault of its file


def missing(features: np.ndarray, streams: Streams, how: str = 'zero') -> np.ndarray:
    """Marks missing values: bool [T, F].

    Args:
      features: [T, F].
      how: 'zero' marks what is not finite, and a stream in frames where it is all zeros (an
        undetected hand); 'none' only what is not finite.
    """
    absent = ~np.isfinite(features)
    if how == 'zero':
        for start, end in streams.values():
            absent[:, start:end] |= (features[:, start:end] == 0).all(1, keepdims=True)
    return absent


@dataclasses.dataclass(frozen=True)
class Normalization:
    """Scales sequences to mean 0 and std 1 of the training split, missing values to 0.

    The result lies within ±1e4, however far off a value of another split is.

    Args:
      streams: name → columns [start, end) of the input, from left to right; columns in no stream
        are left out.
      width: F of the input.
      mean, std: float64 [F'], F' the columns of `output_streams`.
      how: see `missing`.
      differences: append to each stream its change since the frame before (0 in the first, missing
        if either frame is), so that each is twice as wide. The mean of a change counts as 0 and its
        std is taken about 0, so that no change is 0 and half the change half the number.
      coordinates: stream → numbers per landmark, 0 or left out for none. A stream of several
        landmarks then becomes their mean point and the position of each relative to it: with
        absolute positions alone, the movement of the arm hides the shape of the hand.
    """

    streams: Streams
    width: int
    mean: np.ndarray
    std: np.ndarray
    how: str = 'zero'
    differences: bool = False
    coordinates: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @classmethod
    def measure(
        cls,
        sequences: Iterable[np.ndarray],
        streams: Streams,
        how: str = 'zero',
        differences: bool = False,
        coordinates: Mapping[str, int] | None = None,
    ) -> 'Normalization':
        """Takes the statistics of the training split [T, F] in one pass, in float64.

        Missing values are left out. A feature that is constant or always missing gets std 1. The
        landmarks of a stream in `coordinates` fill it.
        """
        new = functools.partial(
            cls,
            streams=dict(streams),
            how=how,
            differences=differences,
            coordinates=dict(coordinates or {}),
        )
        plain = new(width=0, mean=np.zeros(0), std=np.zeros(0))
        count = mean = squares = width = 0
        for features in sequences:
            width = features.shape[1]
            values, absent = plain.widened(features.astype(float))
            n = (~absent).sum(0)
            sequence_mean = values.sum(0) / np.maximum(n, 1)
            sequence_squares = (np.where(absent, 0, values - sequence_mean) ** 2).sum(0)
            # Chan, Golub and LeVeque (1979): squares about the means of two sets, joined.
            joint = np.maximum(count + n, 1)
            shift = sequence_mean - mean
            squares = squares + sequence_squares + shift**2 * count * n / joint
            mean = mean + shift * n / joint
            count = count + n
        squares = squares / np.maximum(count, 1) + np.where(plain.changes, mean, 0) ** 2
        mean = np.where(plain.changes, 0, mean)
        std = np.sqrt(squares)
        constant = std <= 1e-6 * np.abs(mean)
        return new(width=width, mean=mean, std=np.where(constant, 1.0, std))

    @property
    def output_streams(self) -> dict[str, tuple[int, int]]:
        """The streams of the output, side by side from column 0."""
        times = 2 if self.differences else 1
        widths = [end - start + self._landmark(name) for name, (start, end) in self.streams.items()]
        ends = np.cumsum([0, *(times * width for width in widths)])
        return dict(zip(self.streams, itertools.pairwise(ends.tolist()), strict=True))

    @property
    def changes(self) -> np.ndarray:
        """Marks the columns of the output that are differences: bool [F']."""
        spans = self.output_streams.values()
        changes = np.zeros(max(end for _, end in spans), bool)
        for start, end in spans:
            changes[(start + end) // 2 : end] = self.differences
        return changes

    def _landmark(self, name: str) -> int:
        """Returns how many numbers a landmark has; 0 if the stream holds at most one landmark."""
        start, end = self.streams[name]
        numbers = self.coordinates.get(name, 0)
        return numbers if numbers < end - start else 0

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Maps [T, F] of any float type to float32 [T, F'] within ±1e4.

        Raises:
          UserError: another F than the training split's.
        """
        if features.shape[1] != self.width:
            raise UserError(
                f'features of {features.shape[1]} columns, but training had {self.width}'
            )
        # A value not finite in float32 is missing; one that becomes so here is far off.
        with np.errstate(over='ignore', invalid='ignore'):
            values, absent = self.widened(features.astype(np.float32))
            values -= self.mean.astype(np.float32)
            values /= self.std.astype(np.float32)
        values[absent | np.isnan(values)] = 0
        return np.clip(values, -FARTHEST, FARTHEST, out=values)

    def widened(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the values to be normalised, 0 where missing, and bool, which are: both [T, F'].

        Args:
          features: [T, F] in float32 or float64; the values keep this type.
        """
        absent = missing(features, self.streams, self.how)
        values = np.where(absent, features.dtype.type(0), features)
        parts = []
        for name, (start, end) in self.streams.items():
            part = (values[:, start:end], absent[:, start:end])
            if numbers := self._landmark(name):
                part = _around(*part, numbers)
            parts.append(part)
            if self.differences:
                stream, gone = part
                gone = gone | np.concatenate([gone[:1], gone[:-1]])
                change = np.diff(stream, axis=0, prepend=stream[:1])
                change[gone] = 0
                parts.append((change, gone))
        all_values, all_absent = (
            np.concatenate(columns, 1) for columns in zip(*parts, strict=True)
        )
        return all_values, all_absent

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Returns the arrays of `normalization.npz`; `from_arrays` reverses it."""
        values = dict(vars(self))
        values['deviation'] = values.pop('std')
        for name in ('streams', 'coordinates'):
            values[name] = json.dumps(values[name])
        return {name: np.array(value) for name, value in values.items()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> 'Normalization':
        streams = json.loads(str(arrays['streams']))
        return cls(
            streams={name: (start, end) for name, (start, end) in streams.items()},
            width=arrays['width'].item(),
            mean=arrays['mean'],
            std=arrays['deviation'],
            how=arrays['how'].item(),
            differences=arrays['differences'].item(),
            coordinates=dict(json.loads(str(arrays['coordinates']))),
        )

    def save(self, path: str | os.PathLike) -> None:
        """Writes `normalization.npz`; `load` reads it."""
        np.savez(path, **self.to_arrays())

    @classmethod
    def load(cls, path: str | os.PathLike) -> 'Normalization':
        """Reads what `save` wrote; raises UserError if it cannot."""
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return cls.from_arrays(arrays)
        except Exception as error:  # zipfile and NumPy raise a dozen kinds
            raise UserError(f'{path} is not a readable normalization.npz: {error}') from error


def _around(values, absent, coordinates) -> tuple[np.ndarray, np.ndarray]:
    """Returns the mean landmark, then all less it, and which are missing: [T, coordinates + W]."""
    frames = len(values)
    points = values.reshape(frames, -1, coordinates)
    gone = absent.reshape(points.shape)
    count = (~gone).sum(1)
    centre = np.where(gone, 0, points).sum(1) / np.maximum(count, 1).astype(values.dtype)
    apart = np.where(gone, 0, points - centre[:, None]).reshape(frames, -1)
    return np.concatenate([centre, apart], 1), np.concatenate([count == 0, absent], 1)


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Random changes of normalised sequences; a field at 0, a stretch of 1, changes nothing.

    `gain` and `offset` stand for other bodies and positions of the camera. Differences have no
    offset. One stream always stays.
    """

    stretch: tuple[float, float] = field((0.9, 1.1), 'range of the factor of its length', above=0)
    noise: float = field(0.1, 'std of normal noise, in stds of a feature', least=0)
    gain: float = field(0.0, 'std about 1 of a factor per feature', least=0)
    offset: float = field(0.0, 'std of an offset per feature', least=0)
    stream_dropout: float = field(0.05, 'probability that a stream is zero', least=0, below=1)
    feature_dropout: float = field(0.05, 'probability that a feature is zero', least=0, below=1)
    time_masks: int = field(2, 'spans of frames set to zero, at most', least=0)
    time_mask_share: float = field(
        0.1, 'longest span, as a fraction of the sentence', least=0, below=1
    )

    def check(self, where: str) -> None:
        low, high = self.stretch
        if not low <= 1 <= high:
            raise UserError(f'{where}.stretch={self.stretch} is not (at most 1, at least 1)')

    def __call__(
        self,
        features: np.ndarray,
        streams: Streams,
        needed: int,
        rng: np.random.Generator,
        changes: np.ndarray | None = None,
    ) -> np.ndarray:
        """Returns another sequence, float32 [T', F].

        Args:
          features: float32 [T, F], normalised; not changed in place.
          needed: frames that CTC needs, labels plus repeats. T' is at least this if T is, and at
            most ⌈T · stretch⌉.
          changes: bool [F], columns that hold changes since the frame before, whose mean is 0: a
            slower movement has smaller ones. None: none do.
        """
        features = resampled(features, self.length(len(features), needed, rng), changes)
        frames, width = features.shape
        if self.gain or self.offset:
            gain = 1 + self.gain * rng.standard_normal(width, np.float32)
            offset = self.offset * rng.standard_normal(width, np.float32)
            if changes is not None:
                offset[changes] = 0
            features = features * gain + offset * (features != 0)
        features = features.copy()
        if self.noise:
            features += np.float32(self.noise) * rng.standard_normal(features.shape, np.float32)
        dropped = rng.random(len(streams)) < self.stream_dropout
        spared = rng.integers(len(streams))
        if dropped.all():
            dropped[spared] = False
        for (start, end), gone in zip(streams.values(), dropped, strict=True):
            if gone:
                features[:, start:end] = 0
        features[:, rng.random(width) < self.feature_dropout] = 0
        longest = int(self.time_mask_share * frames)
        for _ in range(rng.integers(self.time_masks + 1)):
            span = int(rng.integers(longest + 1))
            begin = int(rng.integers(frames - span + 1))
            features[begin : begin + span] = 0
        return features

    def length(self, frames: int, needed: int, rng: np.random.Generator) -> int:
        """Draws the frames that a sequence is resampled to."""
        drawn = round(frames * rng.uniform(*self.stretch))
        longest = math.ceil(frames * self.stretch[1] - 1e-6)  # as in the sampler `bucketed`
        return min(max(drawn, min(frames, needed), 1), longest)


def resampled(features: np.ndarray, length: int, changes: np.ndarray | None = None) -> np.ndarray:
    """Interpolates [T, F] linearly in time to `length` frames; the ends stay.

    Columns marked by `changes`, bool [F], are divided by how much longer the sequence has become.
    """
    if length == len(features):
        return features
    position = np.linspace(0, len(features) - 1, length)
    before = np.minimum(position.astype(int), max(len(features) - 2, 0))
    after = np.minimum(before + 1, len(features) - 1)
    fraction = (position - before).astype(np.float32)[:, None]
    result = features[before] * (1 - fraction) + features[after] * fraction
    if changes is not None:
        result[:, changes] *= np.float32((len(features) - 1) / max(length - 1, 1))
    return result
