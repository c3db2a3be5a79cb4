"""The helpers for recipes' tests catch what they promise to catch."""

import jax
import numpy as np
import pytest

from mmjax import testing
from tests import toy_tasks
from tests.runs import toy


def test_the_toy_tasks_pass():
    for name in ('PK', 'CTC', 'Generate', 'Thaw'):
        sampler = {'sampler': {'name': 'bucketed', 'by': 'length'}} if name == 'CTC' else {}
        testing.check_forward(testing.build(toy(name, **sampler)))


def live_dropout(self, variables, batch, stage, *, train, key):
    out, stats = self._apply(variables, batch['x'], key is not None, key)
    return {'loss': np.square(1) * (out - batch['y']) ** 2, 'mask': batch['mask']}, stats


def seen_neighbours(self, variables, batch, stage, *, train, key):
    out, stats = self._apply(variables, batch['x'] - batch['x'].mean(0), False, key)
    return {'loss': (out - batch['y']) ** 2, 'mask': batch['mask']}, stats


def padding_counts(self, variables, outputs, batch, stage):
    return {'mse': toy_tasks.Term(outputs['loss'].sum(), float(len(outputs['loss'])))}


@pytest.mark.parametrize(
    ('method', 'fault'),
    [('forward', live_dropout), ('forward', seen_neighbours), ('terms', padding_counts)],
)
def test_a_fault_is_found(monkeypatch, method, fault):
    built = testing.build(toy('Thaw', model__dropout=0.5))
    monkeypatch.setattr(toy_tasks.Thaw, method, fault)
    with pytest.raises(AssertionError):
        testing.check_forward(built)
    jax.clear_caches()
