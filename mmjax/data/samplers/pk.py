"""PK sampling: a few rows each of a few identities, and every row once an epoch."""

import numpy as np

from mmjax.data.samplers.plan import Data, Plan
from mmjax.errors import UserError


class PK:
    """P = batch_size / k identities × k rows; an epoch shows every row of each of them.

    by: the index that holds the identity.
    k: rows (pictures of a product, say) of an identity in a batch; 1 keeps the rows of a batch
      apart. Identities with fewer are left out and counted.

    An identity's rows are cut into groups of k, the last filled with its own rows. The
    epoch has ⌈groups / P⌉ batches; an identity is in a batch at most once, unless it has more
    groups than there are batches (counted as crowded identities). What the last batch lacks,
    fewer than P groups, are repeats of groups from identities that it does not have; where too
    many identities are in every batch for that, the lack is spread over several batches.
    """

    def __init__(self, data: Data, *, by: str, k: int):
        if k < 1 or data.batch_size % k:
            raise UserError(
                f"sampler 'pk': batch_size {data.batch_size} is not identities × k={k} pictures, "
                'with k at least 1'
            )
        identity = np.unique(data.column('pk', by, 'biuSU'), return_inverse=True)[1]
        count = np.bincount(identity)
        self._data, self._k, self.batch_size = data, k, data.batch_size
        self._p = data.batch_size // k
        kept = count >= k
        if kept.sum() < self._p:
            raise UserError(
                f"sampler 'pk': batches of {self._p} identities × {k} pictures, but only "
                f'{kept.sum()} of {len(count)} identities have {k} pictures'
            )
        rows = np.flatnonzero(kept[identity])
        self._identity = (np.cumsum(kept) - 1)[identity[rows]]
        order = np.argsort(self._identity, kind='stable')
        self._rows, self._identity, self._count = rows[order], self._identity[order], count[kept]
        self._groups = -(-self._count // k)
        groups = int(self._groups.sum())
        self.steps_per_epoch = steps = -(-groups // self._p)
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
            'identities_left_out': int((~kept).sum()),
            'rows_left_out': data.size - len(rows),
            'crowded_identities': int((self._groups > steps).sum()),
            'repeated_rows': self.examples_per_epoch - len(rows),
        }

    def plan(self, epoch: int) -> Plan:
        rng, steps = self._data.rng(epoch), self.steps_per_epoch
        groups = self._cut(rng)  # [groups, k], by identity
        first = np.cumsum(self._groups) - self._groups  # of an identity's groups
        order = rng.permutation(len(self._count))
        order = order[np.argsort(self._groups[order] < steps, kind='stable')]  # everywhere: first
        sizes = self._groups[order]
        line = np.repeat(order, sizes)  # identity of each place of the line
        group = np.arange(len(line)) + np.repeat(first[order] - np.cumsum(sizes) + sizes, sizes)
        batch = self._go_round(rng, line)
        # Repeats for what batches lack, of identities that they do not have.
        lacks = self._p - np.bincount(batch, minlength=steps)
        for at in np.flatnonzero(lacks):
            absent = np.setdiff1d(np.arange(len(self._count)), line[batch == at])
            found = rng.choice(absent, lacks[at], replace=False)
            group = np.append(group, first[found] + rng.integers(self._groups[found]))
            batch, line = np.append(batch, np.full(len(found), at)), np.append(line, found)
        by_batch = np.lexsort([rng.random(len(batch)), batch])
        rows = groups[group[by_batch]].reshape(steps, self.batch_size)
        return Plan(rows, np.ones(rows.shape, bool), np.zeros(steps, np.int64))

    def _cut(self, rng: np.random.Generator) -> np.ndarray:
        """Returns the rows of every group [groups, k], shuffled within identities."""
        rows = self._rows[np.lexsort([rng.random(len(self._rows)), self._identity])]
        start = np.cumsum(self._count) - self._count
        owner = np.repeat(np.arange(len(self._count)), self._groups)
        first = np.cumsum(self._groups) - self._groups
        within = (np.arange(len(owner)) - first[owner])[:, None] * self._k + np.arange(self._k)
        # The last group goes on with the first pictures: distinct, as there are at least k.
        return rows[start[owner][:, None] + within % self._count[owner][:, None]]

    def _go_round(self, rng: np.random.Generator, line: np.ndarray) -> np.ndarray:
        """Returns the batch of every place of the line [groups].

        A round meets a batch at most once, in an order of its own, so that identities which meet
        in one batch do not meet in the next. Only an identity that straddles two rounds ties
        them: its rest goes to batches that it is not in yet.
        """
        batch, done = np.empty(len(line), np.int64), 0
        before = 0  # where the last round began
        for choices, width in self._rounds:
            here, size = rng.permutation(choices), 0
            if 0 < done < len(line) and line[done] == line[done - 1]:
                size = self._groups[line[done]]
            if 0 < size <= self.steps_per_epoch:
                taken = batch[before:done][line[before:done] == line[done]]
                free = np.ones(self.steps_per_epoch, bool)
                free[taken] = False
                head = np.flatnonzero(free[here])[: size - len(taken)]
                here = np.concatenate([here[head], np.delete(here, head)])
            batch[done : done + width] = here[:width]
            before, done = done, done + width
        return batch
