"""Batches of neighbours: every identity once an epoch, those alike beside each other."""

import numpy as np

from mmjax.data.samplers.plan import Data, Plan
from mmjax.errors import UserError


class Neighbours:
    """Hard negatives: a batch holds identities that are alike, and none of them twice.

    by: the index that holds the identity (of a function, say, of which several rows are versions);
      an epoch shows one row of each, drawn anew.
    near: the index of what makes identities alike: the file that a function stands in.
    k: most identities of one neighbourhood that stand together; where it has more, they are
      divided, otherwise in every epoch. Neighbourhoods may be smaller, and straddle two batches.

    What does not fill the last batch is dropped, other identities every epoch.
    """

    def __init__(self, data: Data, *, by: str, near: str, k: int):
        if k < 1:
            raise UserError(f"sampler 'neighbours': k={k} is less than 1")
        self._data, self._k, self.batch_size = data, k, data.batch_size
        identity = data.column('neighbours', by, 'biuSU')
        _, first, self._identity = np.unique(identity, return_index=True, return_inverse=True)
        place = data.column('neighbours', near, 'biuSU')
        self._near = np.unique(place[first], return_inverse=True)[1]
        self.steps_per_epoch = len(first) // self.batch_size
        if not self.steps_per_epoch:
            raise UserError(
                f"sampler 'neighbours': batch_size {self.batch_size} is larger than the "
                f'{len(first)} identities of the split'
            )
        self.examples_per_epoch = self.steps_per_epoch * self.batch_size
        self.report = {
            'identities': len(first),
            'neighbourhoods': int(self._near.max()) + 1,
            'dropped_identities': len(first) - self.examples_per_epoch,
        }

    def plan(self, epoch: int) -> Plan:
        rng = self._data.rng(epoch)
        order = np.lexsort([rng.random(self._data.size), self._identity])
        starts = np.flatnonzero(np.diff(self._identity[order], prepend=-1))
        rows = order[starts]  # one of every identity
        order = np.lexsort([rng.random(len(rows)), self._near])
        count = np.bincount(self._near)
        within = np.arange(len(rows)) - np.repeat(np.cumsum(count) - count, count)
        stretch = np.cumsum(within % self._k == 0) - 1
        turn = rng.permutation(stretch[-1] + 1)[stretch]
        rows = rows[order[np.argsort(turn, kind='stable')]][: self.examples_per_epoch]
        rows = rng.permuted(rows.reshape(self.steps_per_epoch, self.batch_size), axis=1)
        return Plan(rows, np.ones(rows.shape, bool), np.zeros(len(rows), np.int64))
