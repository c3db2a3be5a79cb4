"""Samplers without structure: all rows in order, or in a new random order every epoch."""

from dataclasses import dataclass

import numpy as np

from mmjax.data.samplers.plan import Data, Plan, pad
from mmjax.sections import field


class Sequential:
    """Every row once and in order; the last batch is padded. For evaluation.

    With `by`, a batch gets the smallest bucket that fits its rows; a longer row is an error of
    `collate`.
    """

    @dataclass(frozen=True)
    class Options:
        by: str | None = field(None, 'index that holds the length; None: all rows have one shape')

    def __init__(self, data: Data, options: Options):
        rows, mask = pad(np.arange(data.size), data.batch_size)
        self.batch_size = data.batch_size
        self.examples_per_epoch = data.size
        self.steps_per_epoch = len(rows)
        self.report = {'padding_rows': int((~mask).sum())}
        bucket = np.zeros(len(rows), np.int64)
        if options.by is not None:
            lengths = data.bucket_lengths(options.by)
            longest = data.column('by', options.by, 'iu')[rows].max(1)
            bucket = lengths[np.minimum(np.searchsorted(lengths, longest), len(lengths) - 1)]
        self._plan = Plan(rows, mask, bucket.astype(np.int64))

    def plan(self, epoch: int) -> Plan:
        return self._plan


class Shuffle:
    """A new permutation every epoch."""

    @dataclass(frozen=True)
    class Options:
        remainder: str = field(
            'drop',
            'rows that do not fill the last batch: left out, others every epoch, or padded',
            choices=('drop', 'pad'),
        )

    def __init__(self, data: Data, options: Options):
        self._data = data
        self.batch_size = data.batch_size
        if options.remainder == 'pad':
            self.steps_per_epoch = -(-data.size // data.batch_size)
            self.examples_per_epoch = data.size
            self.report = {'padding_rows': self.steps_per_epoch * data.batch_size - data.size}
        else:
            self.steps_per_epoch = data.full_batches(f"; {data.where}.remainder='pad' makes one")
            self.examples_per_epoch = self.steps_per_epoch * data.batch_size
            self.report = {'dropped_rows': data.size - self.examples_per_epoch}

    def plan(self, epoch: int) -> Plan:
        rows = self._data.rng(epoch).permutation(self._data.size)
        rows, mask = pad(rows[: self.examples_per_epoch], self.batch_size)
        return Plan(rows, mask, np.zeros(len(rows), np.int64))
