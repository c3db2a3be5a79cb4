"""What every sampler gets and makes: the rows of a split, and the plan of an epoch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from mmjax.errors import UserError
from mmjax.sections import did_you_mean

_ORDER = 0x0BDE2  # keeps the random stream of a plan apart from those of single examples


@dataclass(frozen=True)
class Plan:
    """The batches of one epoch. Position 0 of a batch is never padding."""

    rows: np.ndarray  # int64 [steps, batch]; padding repeats a row of its batch
    mask: np.ndarray  # bool [steps, batch]; False: padding
    bucket: np.ndarray  # int64 [steps]: length to pad to, 0 if all rows have one shape

    @classmethod
    def full(cls, rows: np.ndarray) -> 'Plan':
        """Makes the plan of rows [steps, batch] without padding and buckets."""
        return cls(rows, np.ones(rows.shape, bool), np.zeros(len(rows), np.int64))


class Sampler(Protocol):
    """Makes plans; `report` counts what a run logs once: rows dropped, repeated, padded."""

    batch_size: int
    steps_per_epoch: int
    examples_per_epoch: int  # rows of an epoch: repeats count, padding does not

    @property
    def report(self) -> Mapping[str, int | float]: ...

    def plan(self, epoch: int) -> Plan: ...


@dataclass(frozen=True)
class Data:
    """What every sampler gets; see `mmjax.data.samplers.make`."""

    index: Mapping[str, np.ndarray]
    size: int
    batch_size: int
    seed: int
    stage: int
    lengths: tuple[int, ...]
    where: str  # the config key of the sampler, for errors

    def rng(self, epoch: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, self.stage, epoch, 0, _ORDER])

    def column(self, option: str, name: str, kinds: str) -> np.ndarray:
        """Returns index[name], which `option` names, if its NumPy kind is one of `kinds`."""
        key = f'{self.where}.{option}={name!r}'
        if name not in self.index:
            known = ', '.join(self.index) or 'none'
            hint = did_you_mean(name, list(self.index))
            raise UserError(f'{key} is not an index of the dataset; there are: {known}{hint}')
        array = np.asarray(self.index[name])
        if array.ndim != 1 or array.dtype.kind not in kinds:
            raise UserError(f'{key} cannot be used: that index is {array.dtype}{[*array.shape]}')
        return array

    def bucket_lengths(self, by: str) -> np.ndarray:
        """Returns the dataset's bucket lengths in rising order; none is an error."""
        if not self.lengths:
            raise UserError(f'{self.where}.by={by!r}: the dataset has no bucket lengths')
        return np.unique(self.lengths)

    def full_batches(self, hint: str = '') -> int:
        """Returns how many whole batches the split has; none is an error."""
        if self.size < self.batch_size:
            raise UserError(
                f'batch_size={self.batch_size} is larger than the split, which has {self.size} '
                f'rows{hint}'
            )
        return self.size // self.batch_size


def pad(rows: np.ndarray, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Cuts rows [n] into batches, the last filled with masked repeats of its first row.

    Returns:
      rows int64 [steps, batch] and mask bool [steps, batch], False on padding.
    """
    steps = -(-len(rows) // batch_size)
    positions = np.arange(steps * batch_size)
    mask = positions < len(rows)
    first = positions - positions % batch_size
    rows = rows[np.where(mask, positions, first)]
    return rows.reshape(steps, batch_size), mask.reshape(steps, batch_size)
