"""Stratified sampling: every batch mirrors the split."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mmjax.data.samplers.plan import Data, Plan
from mmjax.errors import UserError
from mmjax.sections import field


class Stratified:
    """Every batch gets its fraction of every stratum, rounded down or up; no row twice an epoch.

    With thresholds, a row is rich if it reaches all of them; rich and other rows are the strata. If
    a batch's fraction is less than `minimum`, every batch has exactly `minimum` rich rows, each is
    repeated ⌊⌋ or ⌈⌉ of batches · minimum / rich times an epoch, and the epoch ends with the other
    rows.
    """

    @dataclass(frozen=True)
    class Options:
        by: str | Mapping[str, float] = field(
            help='index of integers or booleans, each value a stratum; or {index: threshold}'
        )
        minimum: int = field(0, 'rich (or True) rows that every batch has at least', least=0)

    def __init__(self, data: Data, options: Options):
        by = options.by
        minimum = options.minimum
        if isinstance(by, str):
            stratum = data.column('by', by, 'biu')
        elif by:
            reached = [data.column('by', name, 'biuf') >= by[name] for name in by]
            stratum = np.all(reached, axis=0)
        else:
            raise UserError(f'{data.where}.by={{}} names no index')
        if minimum and stratum.dtype != bool:
            raise UserError(
                f'{data.where}.minimum={minimum} needs thresholds or an index of booleans, not '
                f'{data.where}.by={by!r}'
            )
        steps = data.full_batches()
        batch = data.batch_size
        rich = int(np.sum(stratum)) if stratum.dtype == bool else 0
        self._data = data
        self._sizes = np.unique(stratum, return_counts=True)[1]
        self._by_stratum = np.argsort(stratum, kind='stable')
        self._minimum = minimum if minimum > batch * rich // data.size else 0
        self.report = {'strata': len(self._sizes)}
        if minimum:
            self.report |= {'rich_rows': rich}
        if self._minimum:
            if minimum > min(batch, rich):
                raise UserError(
                    f'{data.where}.minimum={minimum} rich rows do not go into a batch of {batch}: '
                    f'the split has {rich} of {data.size}'
                )
            if minimum < batch:
                steps = (data.size - rich) // (batch - minimum)
            dropped = max(0, rich - steps * minimum)
            self.report |= {
                'repeated_rows': max(0, steps * minimum - rich),
                'repeats_of_a_row': -(-steps * minimum // rich),
                'dropped_rows': dropped + data.size - rich - steps * (batch - minimum),
            }
        else:
            self.report |= {'dropped_rows': data.size - steps * batch}
        self.batch_size = batch
        self.steps_per_epoch = steps
        self.examples_per_epoch = steps * batch

    def plan(self, epoch: int) -> Plan:
        rng = self._data.rng(epoch)
        rows = self._with_minimum(rng) if self._minimum else self._in_proportion(rng)
        return Plan.full(rng.permuted(rows, axis=1))

    def _with_minimum(self, rng: np.random.Generator) -> np.ndarray:
        """Returns rows [steps, batch], the rich ones first."""
        steps = self.steps_per_epoch
        others = self.batch_size - self._minimum
        poor, rich = map(rng.permutation, np.split(self._by_stratum, self._sizes[:1]))
        poor = poor[: steps * others].reshape(steps, others)
        return np.concatenate([np.resize(rich, (steps, self._minimum)), poor], axis=1)

    def _in_proportion(self, rng: np.random.Generator) -> np.ndarray:
        """Returns rows [steps, batch] by stratum."""
        stratum, batch = self._strata_of_batches(rng)
        # Each stratum gives its rows in a random order.
        of_sorted = np.repeat(np.arange(len(self._sizes)), self._sizes)
        rows = self._by_stratum[np.lexsort([rng.random(self._data.size), of_sorted])]
        taken = np.bincount(stratum, minlength=len(self._sizes))
        skip = np.cumsum(self._sizes) - self._sizes - (np.cumsum(taken) - taken)
        rows = rows[np.arange(len(stratum)) + np.repeat(skip, taken)]
        return rows[np.argsort(batch, kind='stable')].reshape(self.steps_per_epoch, self.batch_size)

    def _strata_of_batches(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Returns stratum and batch [steps · batch] of every position of the epoch, by stratum.

        Of N rows, n_s are of stratum s, and a batch of B is due B·n_s/N of them. All batches get
        the floor of that. The F = Σ fractions positions left in a batch form one line of steps · F
        positions: stratum s takes m_s of them, m_s = ⌊⌋ or ⌈⌉ of steps · fraction ≤ steps, and
        position i of the line belongs to batch i mod steps, so that no batch gets a second extra
        row of one stratum.
        """
        steps = self.steps_per_epoch
        total = self._data.size
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
