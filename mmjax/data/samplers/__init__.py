"""Which rows make which batch: plans of whole epochs, the same on every host.

A plan is a pure function of (index, seed, stage, epoch) and the number of steps is the same in
every epoch, so step s of a stage is batch s mod steps_per_epoch of epoch s // steps_per_epoch.
"""

import inspect
from collections.abc import Mapping, Sequence

import numpy as np

from mmjax.data.samplers.neighbours import Neighbours
from mmjax.data.samplers.pk import PK
from mmjax.data.samplers.plan import Data, Plan, Sampler
from mmjax.errors import UserError


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
      UserError: unknown name or option, an array the index lacks, a split that gives no batch.
    """
    options = dict(spec)
    name = options.pop('name', None)
    if name not in SAMPLERS:
        raise UserError(f"no sampler '{name}'; there are {', '.join(SAMPLERS)}")
    signature = inspect.signature(SAMPLERS[name].__init__).parameters.values()
    known = [p for p in signature if p.kind is p.KEYWORD_ONLY]
    for key in options:
        if key not in [p.name for p in known]:
            takes = ', '.join(p.name for p in known) or 'none'
            raise UserError(f"sampler '{name}' has no option '{key}'; its options: {takes}")
    missing = [p.name for p in known if p.default is p.empty and p.name not in options]
    if missing:
        raise UserError(f"sampler '{name}' needs the option '{missing[0]}'")
    if size < 1:
        raise UserError('the split has no rows')
    if batch_size < 1:
        raise UserError(f'batch_size={batch_size} is not positive')
    if seed < 0:
        raise UserError(f'seed={seed} is negative')
    for key, array in index.items():
        if len(array) != size:
            raise UserError(f"index '{key}' has {len(array)} values for {size} rows")
    data = Data(index, size, batch_size, seed, stage, tuple(lengths))
    return SAMPLERS[name](data, **options)


def bucket_lengths(lengths: np.ndarray, count: int, unit: int = 8) -> tuple[int, ...]:
    """Chooses the lengths that batches are padded to, so that rows are padded least in all.

    Args:
      lengths: [rows], above 0.
      count: at most so many are chosen.
      unit: each is a multiple of it.

    Returns:
      Lengths in rising order, the last at least the longest row.
    """
    edges, rows = np.unique(np.ceil(lengths / unit).astype(int), return_counts=True)
    upto = np.cumsum(rows)
    # costs[j]: padded length of the rows up to edge j, where a bucket ends at j.
    costs, ends = edges * upto, []
    between = np.where(
        np.tri(len(edges), dtype=bool), np.inf, edges * (upto - upto[:, None])
    )  # [i, j]: of the rows after edge i up to j
    for _ in range(min(count, len(edges)) - 1):
        options = np.concatenate([costs[None], costs[:, None] + between])  # or one bucket less
        ends.append(options.argmin(0) - 1)
        costs = options.min(0)
    chosen = [len(edges) - 1]
    for before in reversed(ends):
        if before[chosen[-1]] >= 0:
            chosen.append(before[chosen[-1]])
    return tuple(int(edges[place]) * unit for place in reversed(chosen))


def room(mean: float, variance: float, rows: int, length: int, errors: float = 4.0) -> float | None:
    """Returns the tokens or frames a row that nearly all batches need, where padding is left out.

    Some standard errors above the mean; None where that is nothing, or nine tenths of the length
    and more, so that leaving out the padding gains little.

    Args:
      mean, variance: of what is real of a row.
      rows: of a batch.
      length: that rows are padded to.
      errors: how many; a batch in 30,000 needs more than 4, a batch in 44 more than 2.
    """
    found = float(mean + errors * np.sqrt(variance / rows))
    return found if 0 < found < 0.9 * length else None


def _padded(rows: np.ndarray, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Cuts rows [n] into batches, the last filled with masked repeats of its first row."""
    steps = -(-len(rows) // batch_size)
    places = np.arange(steps * batch_size)
    mask = places < len(rows)
    first = places - places % batch_size
    rows = rows[np.where(mask, places, first)]
    return rows.reshape(steps, batch_size), mask.reshape(steps, batch_size)


class Sequential:
    """Every row once and in order; the last batch is padded. For evaluation.

    by: the index that holds the length; a batch then gets the smallest bucket that fits its rows
      (a longer row is an error of `collate`). None: one shape.
    """

    def __init__(self, data: Data, *, by: str | None = None):
        self.batch_size, self.examples_per_epoch = data.batch_size, data.size
        rows, mask = _padded(np.arange(data.size), data.batch_size)
        self.steps_per_epoch = len(rows)
        self.report = {'padding_rows': int((~mask).sum())}
        bucket = np.zeros(len(rows), np.int64)
        if by is not None:
            if not data.lengths:
                raise UserError("sampler 'sequential': the dataset has no bucket lengths")
            lengths = np.unique(data.lengths)
            longest = data.column('sequential', by, 'iu')[rows].max(1)
            bucket = lengths[np.minimum(np.searchsorted(lengths, longest), len(lengths) - 1)]
        self._plan = Plan(rows, mask, bucket.astype(np.int64))

    def plan(self, epoch: int) -> Plan:
        return self._plan


class Shuffle:
    """A fresh permutation an epoch.

    remainder: 'drop' leaves out what does not fill a batch, other rows every epoch; 'pad' shows
    every row and masks the rest of the last batch.
    """

    def __init__(self, data: Data, *, remainder: str = 'drop'):
        if remainder not in ('drop', 'pad'):
            raise UserError(f"sampler 'shuffle': remainder='{remainder}' is not 'drop' or 'pad'")
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
                raise UserError("sampler 'stratified': by={} names no index")
            columns = {k: data.column('stratified', k, 'biuf') for k in by}
            stratum = np.all([columns[k] >= by[k] for k in by], axis=0)
        else:
            stratum = data.column('stratified', by, 'biu')
        if minimum and stratum.dtype != bool:
            raise UserError(
                f"sampler 'stratified': minimum needs booleans or thresholds, not by='{by}'"
            )
        self._data, self.batch_size, batch = data, data.batch_size, data.batch_size
        steps = data.full_batches('stratified')
        self._sizes = np.unique(stratum, return_counts=True)[1]
        self._by_stratum = np.argsort(stratum, kind='stable')
        rich = int(np.sum(stratum)) if stratum.dtype == bool else 0
        self.report = {'strata': len(self._sizes)}
        self._minimum = minimum if minimum > batch * rich // data.size else 0
        if minimum:
            self.report |= {'rich_rows': rich}
        if self._minimum:
            if not 0 < minimum <= min(batch, rich):
                raise UserError(
                    f"sampler 'stratified': minimum={minimum} rich rows in a batch of {batch}, "
                    f'but the split has {rich} of {data.size}'
                )
            if minimum < batch:
                steps = (data.size - rich) // (batch - minimum)
            self.report |= {
                'repeated_rows': max(0, steps * minimum - rich),
                'repeats_of_a_row': -(-steps * minimum // rich),
                'dropped_rows': max(0, rich - steps * minimum)
                + (data.size - rich - steps * (batch - minimum)),
            }
        else:
            self.report |= {'dropped_rows': data.size - steps * batch}
        self.steps_per_epoch, self.examples_per_epoch = steps, steps * batch

    def plan(self, epoch: int) -> Plan:
        rng, steps = self._data.rng(epoch), self.steps_per_epoch
        if self._minimum:
            poor, rich = map(rng.permutation, np.split(self._by_stratum, self._sizes[:1]))
            others = self.batch_size - self._minimum
            rows = [
                np.resize(rich, (steps, self._minimum)),
                poor[: steps * others].reshape(steps, others),
            ]
            rows = np.concatenate(rows, axis=1)
        else:
            stratum, batch = self._shares(rng)
            # Places ordered by stratum take the rows of the stratum in a random order.
            of_sorted = np.repeat(np.arange(len(self._sizes)), self._sizes)
            rows = self._by_stratum[np.lexsort([rng.random(self._data.size), of_sorted])]
            taken = np.bincount(stratum, minlength=len(self._sizes))
            skip = np.cumsum(self._sizes) - self._sizes - (np.cumsum(taken) - taken)
            rows = rows[np.arange(len(stratum)) + np.repeat(skip, taken)]
            rows = rows[np.argsort(batch, kind='stable')].reshape(steps, self.batch_size)
        rows = rng.permuted(rows, axis=1)
        return Plan(rows, np.ones(rows.shape, bool), np.zeros(steps, np.int64))

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


class Bucketed:
    """Batches of one bucket each, so that few shapes are compiled; the last of each is padded.

    by: the index that holds the length.
    stretch: the longest that augmentation makes of length n is ⌈n · stretch⌉; a row goes to the
      smallest bucket that fits it.
    too_long: 'error' names a row that fits no bucket; 'drop' leaves such rows out and counts them.
    """

    def __init__(self, data: Data, *, by: str, stretch: float = 1.0, too_long: str = 'error'):
        if too_long not in ('error', 'drop'):
            raise UserError(f"sampler 'bucketed': too_long='{too_long}' is not 'error' or 'drop'")
        if not stretch >= 1:
            raise UserError(f"sampler 'bucketed': stretch={stretch} is less than 1")
        if not data.lengths:
            raise UserError("sampler 'bucketed': the dataset has no bucket lengths")
        lengths = np.unique(data.lengths)
        length = data.column('bucketed', by, 'iu')
        longest = np.ceil(length * stretch - 1e-6).astype(np.int64)  # 50 · 1.1 is 55
        bucket = np.searchsorted(lengths, longest)
        beyond = np.flatnonzero(bucket == len(lengths))
        if len(beyond) and too_long == 'error':
            row = beyond[0]
            raise UserError(
                f"sampler 'bucketed': row {row} has {by}={length[row]} and may need "
                f'{longest[row]}, more than the largest bucket {lengths[-1]} ({len(beyond)} such '
                "rows; too_long='drop' leaves them out)"
            )
        if len(beyond) == data.size:
            raise UserError(f"sampler 'bucketed': every row is longer than {lengths[-1]}")
        self._data, self.batch_size = data, data.batch_size
        found = [(int(n), np.flatnonzero(bucket == i)) for i, n in enumerate(lengths)]
        self._members = [(n, rows) for n, rows in found if len(rows)]
        batches = [-(-len(rows) // self.batch_size) for _, rows in self._members]
        self.steps_per_epoch = sum(batches)
        self.examples_per_epoch = data.size - len(beyond)
        self.report = {
            'padding_rows': self.steps_per_epoch * self.batch_size - self.examples_per_epoch,
            'dropped_rows': len(beyond),
        } | {f'batches_of_{n}': b for (n, _), b in zip(self._members, batches, strict=True)}

    def plan(self, epoch: int) -> Plan:
        rng = self._data.rng(epoch)
        parts = [_padded(rng.permutation(rows), self.batch_size) for _, rows in self._members]
        bucket = np.repeat([n for n, _ in self._members], [len(rows) for rows, _ in parts])
        order = rng.permutation(self.steps_per_epoch)
        rows, mask = (np.concatenate(part)[order] for part in zip(*parts, strict=True))
        return Plan(rows, mask, bucket[order].astype(np.int64))


SAMPLERS = {
    'sequential': Sequential,
    'shuffle': Shuffle,
    'stratified': Stratified,
    'pk': PK,
    'neighbours': Neighbours,
    'bucketed': Bucketed,
}
