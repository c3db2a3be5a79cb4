"""What samplers are: the plan of an epoch, the interface, and what every sampler is given."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from mmjax.errors import UserError

_ORDER = 0x0BDE2  # keeps the stream of a plan apart from those of single examples


@dataclass(frozen=True)
class Plan:
    """The batches of one epoch. Place 0 of a batch is always a real row."""

    rows: np.ndarray  # int64 [steps, batch]; a padding place repeats a row of its batch
    mask: np.ndarray  # bool [steps, batch]; False: padding
    bucket: np.ndarray  # int64 [steps]: length to pad to, 0 where all rows have one shape


class Sampler(Protocol):
    """Makes plans; `report` says once what a run should know: rows dropped, repeated, padded."""

    batch_size: int
    steps_per_epoch: int
    examples_per_epoch: int  # rows shown in an epoch: repeats count, padding does not
    report: Mapping[str, int | float]

    def plan(self, epoch: int) -> Plan: ...


@dataclass(frozen=True)
class Data:
    """What every sampler is given; see `mmjax.data.samplers.make`."""

    index: Mapping[str, np.ndarray]
    size: int
    batch_size: int
    seed: int
    stage: int
    lengths: tuple[int, ...]

    def rng(self, epoch: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, self.stage, epoch, 0, _ORDER])

    def column(self, sampler: str, name: str, kinds: str) -> np.ndarray:
        """Returns index[name] if its NumPy kind is one of `kinds`."""
        if not isinstance(name, str) or name not in self.index:
            known = ', '.join(self.index) or 'none'
            raise UserError(f"sampler '{sampler}' wants the index '{name}'; there are: {known}")
        array = np.asarray(self.index[name])
        if array.ndim != 1 or array.dtype.kind not in kinds:
            found = f'{array.dtype}{list(array.shape)}'
            raise UserError(f"sampler '{sampler}' cannot use the index '{name}', {found}")
        return array

    def full_batches(self, sampler: str, hint: str = '') -> int:
        """Returns how many whole batches the split has; none is an error."""
        if self.size < self.batch_size:
            raise UserError(
                f"batch_size {self.batch_size} is larger than the split's {self.size} rows: "
                f"sampler '{sampler}' has no whole batch{hint}"
            )
        return self.size // self.batch_size
