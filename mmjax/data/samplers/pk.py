"""PK sampling: k rows each of P identities in a batch, and every row once an epoch."""

from dataclasses import dataclass

import numpy as np

from mmjax.data.samplers.plan import Data, Plan
from mmjax.errors import UserError
from mmjax.sections import field


class PK:
    """P = batch_size / k identities × k rows (Hermans et al., arXiv:1703.07737).

    Identities with fewer than k rows are left out and counted. With k = 1, no two rows of an
    identity are in one batch.

    An identity's rows are cut into groups of k, the last filled with rows of the same identity. The
    epoch has ⌈groups / P⌉ batches; an identity is in a batch at most once, unless it has more
    groups than there are batches (counted as crowded identities). What the last batch lacks,
    fewer than P groups, are repeats of groups from identities that it does not have; if too
    many identities are in every batch for that, several batches lack groups.
    """

    @dataclass(frozen=True)
    class Options:
        by: str = field(help='index that holds the identity')
        k: int = field(help='rows of an identity in a batch; divides batch_size', least=1)

    def __init__(self, data: Data, options: Options):
        k = options.k
        if data.batch_size % k:
            raise UserError(f'{data.where}.k={k} does not divide batch_size={data.batch_size}')
        identity = np.unique(data.column('by', options.by, 'biuSU'), return_inverse=True)[1]
        count = np.bincount(identity)
        large = count >= k
        self._data = data
        self._k = k
        self._p = data.batch_size // k
        self.batch_size = data.batch_size
        if large.sum() < self._p:
            raise UserError(
                f'{data.where}.k={k} and batch_size={data.batch_size} need {self._p} identities '
                f'of at least {k} rows, but only '
                f'{large.sum()} of {len(count)} identities have so many'
            )
        rows = np.flatnonzero(large[identity])
        rows = rows[np.argsort(identity[rows], kind='stable')]
        self._rows = rows  # by identity
        self._identity = (np.cumsum(large) - 1)[identity[rows]]
        self._count = count[large]
        self._groups = -(-self._count // k)
        groups = int(self._groups.sum())
        steps = -(-groups // self._p)
        self.steps_per_epoch = steps
        self.examples_per_epoch = steps * self.batch_size
        # Rounds (batches to choose from, groups that get one): the line of all groups goes round
        # the batches, in the last rounds without the last batch. An identity that is in every
        # batch needs rounds that have them all.
        lack = steps * self._p - groups
        if self._groups[self._groups >= steps].sum() <= steps * (self._p - lack):
            self._rounds = [(steps, steps)] * (self._p - lack) + [(steps - 1, steps - 1)] * lack
        else:
            self._rounds = [(steps, steps)] * (groups // steps) + [(steps, groups % steps)]
        self.report = {
            'identities': len(self._count),
            'identities_left_out': int((~large).sum()),
            'rows_left_out': data.size - len(rows),
            'crowded_identities': int((self._groups > steps).sum()),
            'repeated_rows': self.examples_per_epoch - len(rows),
        }

    def plan(self, epoch: int) -> Plan:
        rng = self._data.rng(epoch)
        steps = self.steps_per_epoch
        groups = self._cut(rng)  # [groups, k], by identity
        first = np.cumsum(self._groups) - self._groups  # of an identity's groups
        order = rng.permutation(len(self._count))
        order = order[np.argsort(self._groups[order] < steps, kind='stable')]  # in all: first
        sizes = self._groups[order]
        line = np.repeat(order, sizes)  # [groups], the identity of each
        group = np.arange(len(line)) + np.repeat(first[order] - np.cumsum(sizes) + sizes, sizes)
        batch = self._batches_of(line, rng)
        # Repeats for what batches lack, of identities that they do not have.
        lacks = self._p - np.bincount(batch, minlength=steps)
        for step in np.flatnonzero(lacks):
            absent = np.setdiff1d(np.arange(len(self._count)), line[batch == step])
            repeated = rng.choice(absent, lacks[step], replace=False)
            group = np.append(group, first[repeated] + rng.integers(self._groups[repeated]))
            batch = np.append(batch, np.full(len(repeated), step))
            line = np.append(line, repeated)
        by_batch = np.lexsort([rng.random(len(batch)), batch])
        return Plan.full(groups[group[by_batch]].reshape(steps, self.batch_size))

    def _cut(self, rng: np.random.Generator) -> np.ndarray:
        """Returns the rows of every group [groups, k], shuffled within identities."""
        rows = self._rows[np.lexsort([rng.random(len(self._rows)), self._identity])]
        start = np.cumsum(self._count) - self._count
        owner = np.repeat(np.arange(len(self._count)), self._groups)
        first = np.cumsum(self._groups) - self._groups
        within = (np.arange(len(owner)) - first[owner])[:, None] * self._k + np.arange(self._k)
        # The last group goes on with the first rows: distinct, as there are at least k.
        return rows[start[owner][:, None] + within % self._count[owner][:, None]]

    def _batches_of(self, line: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Returns the batch [groups] of every group of the line, [groups] identities.

        A round gives each batch at most one group, in an order of its own, so that identities which
        meet in one batch do not meet in the next. Only an identity in two rounds connects them: its
        later groups go to batches that it is not in yet.
        """
        batch = np.empty(len(line), np.int64)
        start = 0
        previous = 0  # start of the round before
        for choices, width in self._rounds:
            order = rng.permutation(choices)
            size = 0
            if 0 < start < len(line) and line[start] == line[start - 1]:
                size = self._groups[line[start]]
            if 0 < size <= self.steps_per_epoch:
                taken = batch[previous:start][line[previous:start] == line[start]]
                free = np.ones(self.steps_per_epoch, bool)
                free[taken] = False
                head = np.flatnonzero(free[order])[: size - len(taken)]
                order = np.concatenate([order[head], np.delete(order, head)])
            batch[start : start + width] = order[:width]
            previous = start
            start += width
        return batch
