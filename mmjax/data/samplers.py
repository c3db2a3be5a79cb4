"""Which rows make which batch: plans of whole epochs, the same on every host.

A plan is a pure function of (index, seed, stage, epoch) and the number of steps is the same in
every epoch, so step s of a stage is batch s mod steps_per_epoch of epoch s // steps_per_epoch.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from mmjax.data.dataset import DataError

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


def make(
    spec: Mapping,
    index: Mapping[str, np.ndarray],
    size: int,
    batch_size: int,
    *,
    seed: int,
    stage: int,
    lengths: Sequence[int] = (),
) -> Sampler:
    """Builds the sampler that a config names: {'name': 'shuffle', 'remainder': 'pad'}.

    Args:
      spec: name and options of the sampler; see the classes of this module.
      index: the dataset's arrays [size], by name.
      size: rows of the split.
      batch_size: rows of a global batch.
      seed, stage: of the run and its stage; every stage has its own orders.
      lengths: bucket lengths that the dataset's `collate` knows.

    Raises:
      DataError: unknown name or option, an array the index lacks, a split that gives no batch.
    """
    options = dict(spec)
    name = options.pop('name', None)
    if name not in SAMPLERS:
        raise DataError(f"no sampler '{name}'; there are {', '.join(SAMPLERS)}")
    signature = inspect.signature(SAMPLERS[name].__init__).parameters.values()
    known = [p for p in signature if p.kind is p.KEYWORD_ONLY]
    for key in options:
        if key not in [p.name for p in known]:
            takes = ', '.join(p.name for p in known) or 'none'
            raise DataError(f"sampler '{name}' has no option '{key}'; its options: {takes}")
    missing = [p.name for p in known if p.default is p.empty and p.name not in options]
    if missing:
        raise DataError(f"sampler '{name}' needs the option '{missing[0]}'")
    if size < 1:
        raise DataError('the split has no rows')
    if batch_size < 1:
        raise DataError(f'batch_size={batch_size} is not positive')
    if seed < 0:
        raise DataError(f'seed={seed} is negative')
    for key, array in index.items():
        if len(array) != size:
            raise DataError(f"index '{key}' has {len(array)} values for {size} rows")
    data = Data(index, size, batch_size, seed, stage, tuple(lengths))
    return SAMPLERS[name](data, **options)


@dataclass(frozen=True)
class Data:
    """What every sampler is given; see `make`."""

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
            raise DataError(f"sampler '{sampler}' wants the index '{name}'; there are: {known}")
        array = np.asarray(self.index[name])
        if array.ndim != 1 or array.dtype.kind not in kinds:
            found = f'{array.dtype}{list(array.shape)}'
            raise DataError(f"sampler '{sampler}' cannot use the index '{name}', {found}")
        return array

    def full_batches(self, sampler: str, hint: str = '') -> int:
        """Returns how many whole batches the split has; none is an error."""
        if self.size < self.batch_size:
            raise DataError(
                f"batch_size {self.batch_size} is larger than the split's {self.size} rows: "
                f"sampler '{sampler}' has no whole batch{hint}"
            )
        return self.size // self.batch_size


def _padded(rows: np.ndarray, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Cuts rows [n] into batches, the last filled with masked repeats of its first row."""
    steps = -(-len(rows) // batch_size)
    places = np.arange(steps * batch_size)
    mask = places < len(rows)
    first = places - places % batch_size
    rows = rows[np.where(mask, places, first)]
    return rows.reshape(steps, batch_size), mask.reshape(steps, batch_size)


class Sequential:
    """Every row once and in order; the last batch is padded. For evaluation."""

    def __init__(self, data: Data):
        self.batch_size, self.examples_per_epoch = data.batch_size, data.size
        rows, mask = _padded(np.arange(data.size), data.batch_size)
        self.steps_per_epoch = len(rows)
        self.report = {'padding_rows': int((~mask).sum())}
        self._plan = Plan(rows, mask, np.zeros(len(rows), np.int64))

    def plan(self, epoch: int) -> Plan:
        return self._plan


class Shuffle:
    """A fresh permutation an epoch.

    remainder: 'drop' leaves out what does not fill a batch, other rows every epoch; 'pad' shows
    every row and masks the rest of the last batch.
    """

    def __init__(self, data: Data, *, remainder: str = 'drop'):
        if remainder not in ('drop', 'pad'):
            raise DataError(f"sampler 'shuffle': remainder='{remainder}' is not 'drop' or 'pad'")
        self._data, self._pad, self.batch_size = data, remainder == 'pad', data.batch_size
        if self._pad:
            self.steps_per_epoch = -(-data.size // data.batch_size)
            self.examples_per_epoch = data.size
            padding = self.steps_per_epoch * data.batch_size - data.size
            self.report = {'padding_rows': padding}
        else:
            self.steps_per_epoch = data.full_batches('shuffle', "; remainder='pad' makes one")
            self.examples_per_epoch = self.steps_per_epoch * data.batch_size
            self.report = {'dropped_rows': data.size - self.examples_per_epoch}

    def plan(self, epoch: int) -> Plan:
        rows = self._data.rng(epoch).permutation(self._data.size)
        rows = rows if self._pad else rows[: self.examples_per_epoch]
        rows, mask = _padded(rows, self.batch_size)
        return Plan(rows, mask, np.zeros(len(rows), np.int64))


class Stratified:
    """Every batch gets its share of every stratum, rounded down or up; no row twice an epoch.

    by: an index of integers or booleans, each value a stratum; or {index: threshold}: a row is
      rich when all of them reach their thresholds, and rich and poor are the two strata.
    minimum: rich (or True) rows that every batch has at least. If the share is less, every batch
      has exactly so many, each rich row is shown ⌊⌋ or ⌈⌉ of batches · minimum / rich times an
      epoch, and the epoch is as long as the other rows last.
    """

    def __init__(self, data: Data, *, by: str | Mapping[str, float], minimum: int = 0):
        if isinstance(by, Mapping):
            if not by:
                raise DataError("sampler 'stratified': by={} names no index")
            columns = {k: data.column('stratified', k, 'biuf') for k in by}
            stratum = np.all([columns[k] >= by[k] for k in by], axis=0)
        else:
            stratum = data.column('stratified', by, 'biu')
        if minimum and stratum.dtype != bool:
            raise DataError(f"sampler 'stratified': minimum needs booleans or thresholds, not '{by}'")
        self._data, self.batch_size, batch = data, data.batch_size, data.batch_size
        steps = data.full_batches('stratified')
        self._sizes = np.unique(stratum, return_counts=True)[1]
        self._by_stratum = np.argsort(stratum, kind='stable')
        self._bounds = np.concatenate([[0], np.cumsum(self._sizes)])
        rich = int(np.sum(stratum)) if stratum.dtype == bool else 0
        self.report = {'strata': len(self._sizes)}
        self._minimum = minimum if minimum > batch * rich // data.size else 0
        if minimum:
            self.report |= {'rich_rows': rich}
        if self._minimum:
            if not 0 < minimum <= min(batch, rich):
                raise DataError(
                    f"sampler 'stratified': minimum={minimum} rich rows in a batch of {batch}, "
                    f'but the split has {rich} of {data.size}'
                )
            if minimum < batch:
                steps = max(steps, (data.size - rich) // (batch - minimum))
            self.report |= {
                'repeated_rows': max(0, steps * minimum - rich),
                'repeats_of_a_row': -(-steps * minimum // rich),
                'dropped_rows': max(0, rich - steps * minimum)
                + max(0, data.size - rich - steps * (batch - minimum)),
            }
        else:
            self.report |= {'dropped_rows': data.size - steps * batch}
        self.steps_per_epoch, self.examples_per_epoch = steps, steps * batch

    def plan(self, epoch: int) -> Plan:
        rng, steps = self._data.rng(epoch), self.steps_per_epoch
        strata = np.split(self._by_stratum, self._bounds[1:-1])
        if self._minimum:
            strata = [rng.permutation(rows) for rows in strata]
            poor, rich = strata if len(strata) == 2 else (strata[0][:0], strata[0])
            rows = np.concatenate(
                [
                    np.resize(rich, (steps, self._minimum)),
                    poor[: steps * (self.batch_size - self._minimum)].reshape(steps, -1),
                ],
                axis=1,
            )
        else:
            stratum, batch = self._shares(rng)
            # Pairs (stratum, batch) ordered by stratum meet the rows in a random order within it.
            rank = np.lexsort([rng.random(self._data.size), self._stratum_of_sorted()])
            start = np.repeat(self._bounds[:-1], np.bincount(stratum, minlength=len(strata)))
            first = np.searchsorted(stratum, stratum)
            picked = self._by_stratum[rank[start + np.arange(len(stratum)) - first]]
            rows = picked[np.argsort(batch, kind='stable')].reshape(steps, self.batch_size)
        rows = rng.permuted(rows, axis=1)
        return Plan(rows, np.ones(rows.shape, bool), np.zeros(steps, np.int64))

    def _stratum_of_sorted(self) -> np.ndarray:
        return np.repeat(np.arange(len(self._sizes)), self._sizes)

    def _shares(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Returns stratum and batch of every place of the epoch, ordered by stratum.

        With N rows a batch of B owes stratum s the share B·n_s/N. All batches get its floor. The
        F = Σ fractions places left in a batch go round: stratum s takes m_s of the steps·F
        places of a line, m_s = ⌊⌋ or ⌈⌉ of steps · fraction ≤ steps, and place i of the line
        belongs to batch i mod steps, so none gets a second extra of one stratum.
        """
        steps, total = self.steps_per_epoch, self._data.size
        floor, fraction = np.divmod(self.batch_size * self._sizes, total)
        line = np.concatenate([[0], np.cumsum(steps * fraction)])
        extras = np.diff((line + rng.integers(total)) // total)
        order = rng.permutation(len(self._sizes))
        extra_stratum = np.repeat(order, extras[order])
        extra_batch = rng.permutation(steps)[np.arange(len(extra_stratum)) % steps]
        stratum = np.concatenate([np.repeat(np.arange(len(floor)), floor * steps), extra_stratum])
        batch = np.concatenate([np.tile(np.arange(steps), int(floor.sum())), extra_batch])
        by_stratum = np.argsort(stratum, kind='stable')
        return stratum[by_stratum], batch[by_stratum]


class PK:
    """P = batch_size / k identities × k pictures; an epoch shows every picture of each of them.

    by: the index that holds the identity.
    k: pictures of an identity in a batch. Identities with fewer are left out and counted.

    An identity's pictures are cut into groups of k, the last filled with its own pictures. The
    epoch has ⌈groups / P⌉ batches; an identity is in a batch at most once, unless it has more
    groups than there are batches (counted as crowded identities). What the last batch lacks,
    fewer than P groups, are repeats of groups from identities that it does not have; where too
    many identities are in every batch for that, the lack is spread over several batches.
    """

    def __init__(self, data: Data, *, by: str, k: int):
        if k < 2 or data.batch_size % k:
            raise DataError(
                f"sampler 'pk': batch_size {data.batch_size} is not identities × k={k} pictures"
                if k > 1
                else f"sampler 'pk': k={k} is not at least 2"
            )
        identity = np.unique(data.column('pk', by, 'biuSU'), return_inverse=True)[1]
        count = np.bincount(identity)
        self._data, self._k, self._p, self.batch_size = data, k, data.batch_size // k, data.batch_size
        kept = count >= k
        if kept.sum() < self._p:
            raise DataError(
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
        self._lack = steps * self._p - groups
        # Batches of a group's turn on the line of all groups: rounds over all batches, the last
        # ones without the last batch. Identities in every batch need rounds that are whole.
        whole = self._p - self._lack
        if self._groups[self._groups >= steps].sum() <= steps * whole:
            self._rounds = [steps] * whole + [steps - 1] * self._lack
        else:
            self._rounds = [steps] * (groups // steps) + [groups % steps] * (groups % steps > 0)
        self.report = {
            'identities': len(self._count),
            'identities_left_out': int((~kept).sum()),
            'rows_left_out': data.size - len(rows),
            'crowded_identities': int((self._groups > steps).sum()),
            'repeated_rows': self.examples_per_epoch - len(rows),
        }

    def plan(self, epoch: int) -> Plan:
        rng, steps, k = self._data.rng(epoch), self.steps_per_epoch, self._k
        groups = self._cut(rng)  # [groups, k], by identity
        first = np.cumsum(self._groups) - self._groups  # of an identity's groups
        order = rng.permutation(len(self._count))
        order = order[np.argsort(self._groups[order] < steps, kind='stable')]  # everywhere: first
        turns = np.repeat(order, self._groups[order])  # identity of each place of the line
        start = np.cumsum(self._groups[order]) - self._groups[order]
        group = np.repeat(first[order] - start, self._groups[order]) + np.arange(len(turns))
        batch = self._go_round(rng, turns)
        group, batch = self._fill(rng, group, batch, turns, first)
        by_batch = np.lexsort([rng.random(len(batch)), batch])
        rows = groups[group[by_batch]].reshape(steps, self.batch_size)
        return Plan(rows, np.ones(rows.shape, bool), np.zeros(steps, np.int64))

    def _cut(self, rng: np.random.Generator) -> np.ndarray:
        """Returns the rows of every group [groups, k], shuffled within identities."""
        rows = self._rows[np.lexsort([rng.random(len(self._rows)), self._identity])]
        start = np.cumsum(self._count) - self._count
        owner = np.repeat(np.arange(len(self._count)), self._groups)
        number = np.arange(len(owner)) - np.repeat(
            np.cumsum(self._groups) - self._groups, self._groups
        )
        within = (number * self._k)[:, None] + np.arange(self._k)
        # The last group goes on with the first pictures: distinct, as there are at least k.
        return rows[start[owner][:, None] + within % self._count[owner][:, None]]

    def _go_round(self, rng: np.random.Generator, turns: np.ndarray) -> np.ndarray:
        """Returns the batch of every place of the line.

        Each round meets every batch once, in an order of its own, so that neighbours of one
        round are not neighbours of the next. Only the identity whose groups straddle two rounds
        ties them: the rest of it goes to batches that it is not in yet.
        """
        batches, done = [], 0
        for wide in self._rounds[:-1] + [self._rounds[-1]]:
            here = rng.permutation(self.steps_per_epoch if self._rounds[0] == wide else wide)
            here = here[: len(turns) - done]
            if batches and turns[done] == turns[done - 1]:
                size = self._groups[turns[done]]
                tail = batches[-1][turns[done - len(batches[-1]) : done] == turns[done]]
                free = ~np.isin(here, tail)
                head = size - len(tail)
                if 0 < head <= free.sum():
                    chosen = np.flatnonzero(free)[:head]
                    here = np.concatenate([here[chosen], np.delete(here, chosen)])
            batches.append(here)
            done += len(here)
        return np.concatenate(batches)
