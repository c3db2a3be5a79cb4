"""Batches of neighbours: every identity once an epoch, similar ones in one batch."""

from dataclasses import dataclass

import numpy as np

from mmjax.data.samplers.plan import Data, Plan
from mmjax.errors import UserError
from mmjax.sections import field


class Neighbours:
    """Hard negatives: a batch holds similar identities, and none of them twice.

    Every epoch shows one row of each identity, drawn anew; several rows may be versions of one
    function, say. Identities that share `near` are neighbours. A neighbourhood of more than `k` is
    divided, in every epoch otherwise; smaller ones may lie in two batches. Identities that do not
    fill the last batch are dropped, others every epoch.
    """

    @dataclass(frozen=True)
    class Options:
        by: str = field(help='index that holds the identity')
        near: str = field(help='index that similar identities share: the file of a function')
        k: int = field(help='most identities of one neighbourhood side by side', least=1)

    def __init__(self, data: Data, options: Options):
        identity = data.column('by', options.by, 'biuSU')
        _, first, self._identity = np.unique(identity, return_index=True, return_inverse=True)
        near = data.column('near', options.near, 'biuSU')
        self._near = np.unique(near[first], return_inverse=True)[1]
        self._data = data
        self._k = options.k
        self.batch_size = data.batch_size
        self.steps_per_epoch = len(first) // self.batch_size
        if not self.steps_per_epoch:
            raise UserError(
                f'batch_size={self.batch_size} is larger than the {len(first)} identities that '
                f'{data.where}.by={options.by!r} has in the split'
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
        run = np.cumsum(within % self._k == 0) - 1  # of at most k neighbours
        turn = rng.permutation(run[-1] + 1)[run]
        rows = rows[order[np.argsort(turn, kind='stable')]][: self.examples_per_epoch]
        rows = rng.permuted(rows.reshape(self.steps_per_epoch, self.batch_size), axis=1)
        return Plan.full(rows)
