"""Which rows make which batch: plans of whole epochs, the same on every host.

A plan is a pure function of (index, seed, stage, epoch) and the number of steps is the same in
every epoch, so step s of a stage is batch s mod steps_per_epoch of epoch s // steps_per_epoch.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mmjax import sections
from mmjax.data.samplers.bucketed import Bucketed, bucket_lengths, packed_length
from mmjax.data.samplers.neighbours import Neighbours
from mmjax.data.samplers.order import Sequential, Shuffle
from mmjax.data.samplers.pk import PK
from mmjax.data.samplers.plan import Data, Plan, Sampler
from mmjax.data.samplers.stratified import Stratified
from mmjax.errors import UserError

__all__ = ['SAMPLERS', 'Plan', 'Sampler', 'bucket_lengths', 'make', 'packed_length']

# name → (class, dataclass of its options in the config)
SAMPLERS: Mapping[str, tuple[Callable[[Data, Any], Sampler], type[Any]]] = {
    'sequential': (Sequential, Sequential.Options),
    'shuffle': (Shuffle, Shuffle.Options),
    'stratified': (Stratified, Stratified.Options),
    'pk': (PK, PK.Options),
    'neighbours': (Neighbours, Neighbours.Options),
    'bucketed': (Bucketed, Bucketed.Options),
}


def make(
    spec: Mapping[str, object],
    index: Mapping[str, np.ndarray],
    size: int,
    batch_size: int,
    *,
    seed: int,
    stage: int,
    lengths: Sequence[int] = (),
    where: str = 'sampler',
) -> Sampler:
    """Builds the sampler that a config names: {'name': 'shuffle', 'remainder': 'pad'}.

    Args:
      spec: name and options of the sampler.
      index: the dataset's arrays [size], by name.
      size: rows of the split.
      batch_size: rows of a global batch.
      seed, stage: of the run and its stage; every stage has its own orders.
      lengths: bucket lengths that the dataset's `collate` knows.
      where: key of `spec` in the config, for errors.

    Raises:
      UserError: an unknown name or option, a wrong type or value, an array the index lacks, a split
        that gives no batch.
    """
    name = spec.get('name')
    if not isinstance(name, str) or name not in SAMPLERS:
        hint = sections.did_you_mean(name, list(SAMPLERS))
        known = ', '.join(map(repr, SAMPLERS))
        raise UserError(f'{where}.name={name!r} is not one of {known}{hint}')
    build, options = SAMPLERS[name]
    given = {key: value for key, value in spec.items() if key != 'name'}
    parsed = sections.parse(options, given, where)
    if size < 1:
        raise UserError('the split has no rows')
    for key, array in index.items():
        if len(array) != size:
            raise UserError(f"index '{key}' has {len(array)} values for {size} rows")
    data = Data(index, size, batch_size, seed, stage, tuple(lengths), where)
    return build(data, parsed)
