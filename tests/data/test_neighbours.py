"""The sampler of hard negatives: who stands with whom, who never does, and what an epoch shows."""

import collections

import numpy as np
import pytest

from mmjax.data import samplers
from mmjax.errors import UserError

# 30 functions in files of 1 to 9, each function in 1 to 4 versions, rows in no order.
SIZES = (9, 8, 5, 4, 2, 1, 1)
RNG = np.random.default_rng(3)
PLACE = np.repeat(np.arange(len(SIZES)), SIZES)
VERSIONS = RNG.integers(1, 5, len(PLACE))
IDENTITY = RNG.permutation(np.repeat(np.arange(len(PLACE)), VERSIONS))
NEAR = PLACE[IDENTITY] * 7 - 3


def make(batch_size=8, k=4, seed=0):
    spec = {'name': 'neighbours', 'by': 'identity', 'near': 'path', 'k': k}
    index = {'identity': IDENTITY * 11, 'path': NEAR}
    return samplers.make(spec, index, len(IDENTITY), batch_size, seed=seed, stage=0)


def test_an_epoch_shows_one_row_of_every_identity_but_for_the_last_batch():
    sampler, dropped, versions = make(), collections.Counter(), collections.defaultdict(set)
    assert (sampler.steps_per_epoch, sampler.examples_per_epoch) == (3, 24)
    assert sampler.report == {'identities': 30, 'neighbourhoods': 7, 'dropped_identities': 6}
    for epoch in range(200):
        plan = sampler.plan(epoch)
        assert plan.rows.shape == plan.mask.shape == (3, 8) and plan.mask.all()
        identities = IDENTITY[plan.rows.ravel()]
        assert len(set(identities)) == 24
        dropped.update(set(range(30)) - set(identities))
        for row in plan.rows.ravel():
            versions[IDENTITY[row]].add(row)
    assert set(dropped) == set(range(30))  # 200 · 6 / 30 = 40 times each, if all alike
    assert 15 < min(dropped.values()) <= max(dropped.values()) < 80
    assert {i: len(rows) for i, rows in versions.items()} == dict(enumerate(VERSIONS))


def test_neighbours_stand_together_and_change_their_company():
    sampler, cut, pairs = make(batch_size=10, k=4), 0, collections.Counter()
    for epoch in range(300):
        for batch in sampler.plan(epoch).rows:
            cut += 0 < np.sum(NEAR[batch] == 3 * 7 - 3) < 4  # of the four of neighbourhood 3
            pairs.update((a, b) for a in IDENTITY[batch] for b in IDENTITY[batch] if a < b)
    # One stretch of 30 starts anywhere: a batch's end cuts it in 2 · 3 of them, each into two.
    assert 0 < cut < 300 * 2 * 6 / 30 * 1.5
    inside = [pairs[a, b] for a in range(30) for b in range(a + 1, 30) if PLACE[a] == PLACE[b]]
    across = [pairs[a, b] for a in range(30) for b in range(a + 1, 30) if PLACE[a] != PLACE[b]]
    assert min(across) > 0  # any two can meet
    assert np.mean(inside) > 1.7 * np.mean(across)
    chance = 300 * 9 / 29  # of two meeting in batches of ten at random
    assert np.mean(across) < chance < np.mean(inside)


def test_stretches_have_at_most_k():
    """With k=1 nothing stands together: files meet as identities at random would."""
    sampler, inside = make(batch_size=10, k=1), 0
    for epoch in range(400):
        for batch in sampler.plan(epoch).rows:
            counts = collections.Counter(NEAR[batch])
            inside += sum(n * (n - 1) / 2 for n in counts.values())
    same = sum(n * (n - 1) / 2 for n in SIZES)
    assert inside / 400 == pytest.approx(same * 9 / 29, rel=0.05)


def test_plans_follow_from_seed_and_epoch():
    one, same, other = make(), make(), make(seed=1)
    np.testing.assert_array_equal(one.plan(5).rows, same.plan(5).rows)
    assert not np.array_equal(one.plan(5).rows, one.plan(6).rows)
    assert not np.array_equal(one.plan(5).rows, other.plan(5).rows)


def test_what_cannot_be_is_an_error():
    with pytest.raises(UserError, match=r'^sampler\.k=0 is not an integer at least 1'):
        make(k=0)
    with pytest.raises(UserError, match='batch_size=31 is larger than the 30 identities'):
        make(batch_size=31)
