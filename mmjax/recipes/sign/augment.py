"""What becomes of a sequence of landmarks: differences, normalisation, then augmentation.

The order matters: noise of a given strength would drown a feature of small range, and a zero
would not mean "nothing known", if augmentation came before normalisation. Only a stretch of time
asks what a column was: changes from frame to frame get smaller where a movement gets slower.
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

Streams = Mapping[str, tuple[int, int]]  # name → columns [start, end)
MISSING = ('zero', 'none')
FARTHEST = 1e4  # deviations from the mean, beyond which a value is a fault of its file


def missing(features: np.ndarray, streams: Streams, how: str = 'zero') -> np.ndarray:
    """Marks values that say nothing: bool [T, F].

    Args:
      features: [T, F].
      how: 'zero' marks what is not finite, and a stream in frames where it is all zeros (an
        undetected hand); 'none' only what is not finite.
    """
    found = ~np.isfinite(features)
    if how == 'zero':
        for start, end in streams.values():
            found[:, start:end] |= (features[:, start:end] == 0).all(1, keepdims=True)
    return found


@dataclasses.dataclass(frozen=True)
class Normalization:
    """Takes sequences to mean 0 and deviation 1 of the training split, missing values to 0.

    What comes out lies within ±1e4, however far off a value of another split is.

    streams: name → columns [start, end) of the sequences as they come, from left to right; what
    is in no stream is left out; width: F of these sequences; mean, deviation: float64 [F'], F'
    the columns of `output_streams`; how: see `missing`; differences: append to each stream its
    change since the frame before (0 in the first, missing where either frame is), so that each
    is twice as wide. Their mean counts as 0 and their deviation is taken about it, so that no
    change is 0 and half the change half the number; coordinates: stream → numbers of a landmark,
    0 or left out for none in particular. With them a stream of several landmarks becomes their
    mean point and each one's place around it: as positions alone, the shape of a hand is lost
    beside the way of the arm.
    """

    streams: Streams
    width: int
    mean: np.ndarray
    deviation: np.ndarray
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

        Missing values are left out. A feature that is constant, or never there, gets deviation 1.
        The landmarks of a stream in `coordinates` fill it.

        Raises:
          UserError: `how` is neither 'zero' nor 'none'.
        """
        if how not in MISSING:
            raise UserError(f"data.missing '{how}' is not one of {', '.join(MISSING)}")
        made = functools.partial(
            cls,
            streams=dict(streams),
            how=how,
            differences=differences,
            coordinates=dict(coordinates or {}),
        )
        plain = made(width=0, mean=np.zeros(0), deviation=np.zeros(0))
        count = mean = squares = width = 0
        for features in sequences:
            width = features.shape[1]
            values, absent = plain.widened(features.astype(float))
            n = (~absent).sum(0)
            own = values.sum(0) / np.maximum(n, 1)
            spread = (np.where(absent, 0, values - own) ** 2).sum(0)
            # Chan, Golub and LeVeque (1979): squares about the means of two sets, joined.
            joint = np.maximum(count + n, 1)
            shift = own - mean
            squares = squares + spread + shift**2 * count * n / joint
            mean = mean + shift * n / joint
            count = count + n
        squares = squares / np.maximum(count, 1) + np.where(plain.changes, mean, 0) ** 2
        mean = np.where(plain.changes, 0, mean)
        deviation = np.sqrt(squares)
        constant = deviation <= 1e-6 * np.abs(mean)
        return made(width=width, mean=mean, deviation=np.where(constant, 1.0, deviation))

    @property
    def output_streams(self) -> dict[str, tuple[int, int]]:
        """The streams of what comes out, side by side from column 0."""
        times = 2 if self.differences else 1
        widths = [end - start + self._landmark(name) for name, (start, end) in self.streams.items()]
        ends = np.cumsum([0, *(times * width for width in widths)])
        return dict(zip(self.streams, itertools.pairwise(ends.tolist()), strict=True))

    @property
    def changes(self) -> np.ndarray:
        """Marks the columns of what comes out that are differences: bool [F']."""
        spans = self.output_streams.values()
        found = np.zeros(max(end for _, end in spans), bool)
        for start, end in spans:
            found[(start + end) // 2 : end] = self.differences
        return found

    def _landmark(self, name: str) -> int:
        """Returns how many numbers a landmark has; 0 where the stream holds none or only one."""
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
        # What is not finite in float32 is missing; what becomes so here is far off.
        with np.errstate(over='ignore', invalid='ignore'):
            values, absent = self.widened(features.astype(np.float32))
            values -= self.mean.astype(np.float32)
            values /= self.deviation.astype(np.float32)
        values[absent | np.isnan(values)] = 0
        return np.clip(values, -FARTHEST, FARTHEST, out=values)

    def widened(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns what is normalised, 0 where missing, and bool, what is missing: both [T, F'].

        Of [T, F] in float32 or float64, whose type the values keep.
        """
        absent = missing(features, self.streams, self.how)
        values = np.where(absent, features.dtype.type(0), features)
        parts, marks = [], []
        for name, (start, end) in self.streams.items():
            own, gone = values[:, start:end], absent[:, start:end]
            if numbers := self._landmark(name):
                own, gone = _around(own, gone, numbers)
            parts.append(own)
            marks.append(gone)
            if self.differences:
                gone = gone | np.concatenate([gone[:1], gone[:-1]])
                change = np.diff(own, axis=0, prepend=own[:1])
                change[gone] = 0
                parts.append(change)
                marks.append(gone)
        return np.concatenate(parts, 1), np.concatenate(marks, 1)

    def save(self, path: str | os.PathLike) -> None:
        """Writes `normalization.npz`; `load` reads it."""
        tables = {name: json.dumps(getattr(self, name)) for name in ('streams', 'coordinates')}
        fields = {name: np.array(value) for name, value in {**vars(self), **tables}.items()}
        np.savez(path, **fields)

    @classmethod
    def load(cls, path: str | os.PathLike) -> 'Normalization':
        """Reads what `save` wrote; raises UserError where it cannot."""
        try:
            with np.load(path, allow_pickle=False) as arrays:
                found = {field.name: arrays[field.name] for field in dataclasses.fields(cls)}
            streams = json.loads(str(found.pop('streams')))
            coordinates = dict(json.loads(str(found.pop('coordinates'))))
            found |= {name: found[name].item() for name in ('width', 'how', 'differences')}
            streams = {name: (a, b) for name, (a, b) in streams.items()}
            return cls(streams=streams, coordinates=coordinates, **found)
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
    """Changes normalised sequences at random; zeros and ones in place of each leave them alone.

    Args:
      stretch: the length is multiplied by a number drawn from this range (a tempo of .9-1.1).
      noise: deviation of normal noise on every value, in units of the features' own deviations.
      gain: deviation about 1 of a factor that is drawn for each feature of a sequence.
      offset: deviation of a number, likewise drawn, that is added to it where it is known; changes
        have none. Both stand for other bodies, and cameras that stand elsewhere.
      stream_dropout: chance of each stream to be zero for the whole sequence; one always stays.
      feature_dropout: chance of each feature to be zero for the whole sequence.
      time_masks: most spans of frames that are zeroed; how many is drawn from 0 up to it.
      time_mask_share: longest span, as a share of the sequence.
    """

    stretch: tuple[float, float] = (0.9, 1.1)
    noise: float = 0.1
    gain: float = 0.0
    offset: float = 0.0
    stream_dropout: float = 0.05
    feature_dropout: float = 0.05
    time_masks: int = 2
    time_mask_share: float = 0.1

    def __post_init__(self):
        if len(self.stretch) != 2 or not 0 < self.stretch[0] <= 1 <= self.stretch[1]:
            raise UserError(f'augmentation.stretch={self.stretch} is not (at most 1, at least 1)')
        for name in ('stream_dropout', 'feature_dropout', 'time_mask_share'):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f'augmentation.{name}={getattr(self, name)} is not in [0, 1)')
        for name in ('noise', 'gain', 'offset', 'time_masks'):
            if getattr(self, name) < 0:
                raise UserError(f'augmentation.{name}={getattr(self, name)} is negative')

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
          features: float32 [T, F], normalised; left as they are.
          needed: frames that CTC needs, labels plus repeats. T' is no less where T is not, and at
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
        if self.noise:
            noise = rng.standard_normal(features.shape, np.float32)
            noise *= np.float32(self.noise)
            features = features + noise
        else:
            features = features.copy()
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
        wanted = round(frames * rng.uniform(*self.stretch))
        longest = math.ceil(frames * self.stretch[1] - 1e-6)  # as the sampler `bucketed` has it
        return min(max(wanted, min(frames, needed), 1), longest)


def resampled(features: np.ndarray, length: int, changes: np.ndarray | None = None) -> np.ndarray:
    """Interpolates [T, F] linearly in time to `length` frames; the ends stay.

    What `changes` marks, bool [F], is divided by how much longer a frame's time has become.
    """
    if length == len(features):
        return features
    at = np.linspace(0, len(features) - 1, length)
    before = np.minimum(at.astype(int), max(len(features) - 2, 0))
    after = np.minimum(before + 1, len(features) - 1)
    share = (at - before).astype(np.float32)[:, None]
    found = features[before] * (1 - share) + features[after] * share
    if changes is not None:
        found[:, changes] *= np.float32((len(features) - 1) / max(length - 1, 1))
    return found
