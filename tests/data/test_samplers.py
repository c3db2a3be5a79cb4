"""Plans of epochs, checked by counting over random configurations."""

import collections
import itertools
import math
import pickle
import re
import time

import numpy as np
import pytest

from mmjax.data import samplers
from mmjax.errors import UserError

CASES = range(30)


def make(spec, index, size, batch_size, seed=3, stage=1, lengths=()):
    return samplers.make(spec, index, size, batch_size, seed=seed, stage=stage, lengths=lengths)


def check_form(sampler, size, batch_size, epochs=(0, 1, 5)):
    """What holds for every sampler; returns the plans."""
    plans = [sampler.plan(epoch) for epoch in epochs]
    for plan in plans:
        assert plan.rows.shape == plan.mask.shape == (sampler.steps_per_epoch, batch_size)
        assert plan.bucket.shape == (sampler.steps_per_epoch,)
        assert plan.rows.dtype == plan.bucket.dtype == np.int64 and plan.mask.dtype == bool
        assert plan.rows.min() >= 0 and plan.rows.max() < size
        assert plan.mask[:, 0].all() and plan.mask.sum() == sampler.examples_per_epoch
        first = np.broadcast_to(plan.rows[:, :1], plan.rows.shape)
        np.testing.assert_array_equal(plan.rows[~plan.mask], first[~plan.mask])
    again = pickle.loads(pickle.dumps(sampler)).plan(epochs[-1])
    np.testing.assert_array_equal(again.rows, plans[-1].rows)
    np.testing.assert_array_equal(again.mask, plans[-1].mask)
    np.testing.assert_array_equal(again.bucket, plans[-1].bucket)
    assert sampler.batch_size == batch_size
    return plans


@pytest.mark.parametrize('case', CASES)
def test_sequential_shows_every_row_once_in_order(case):
    rng = np.random.default_rng(case)
    size, batch = int(rng.integers(1, 60)), int(rng.integers(1, 20))
    for plan in check_form(make({'name': 'sequential'}, {}, size, batch), size, batch):
        np.testing.assert_array_equal(plan.rows[plan.mask], np.arange(size))
        assert not plan.bucket.any()


@pytest.mark.parametrize('case', CASES)
def test_sequential_takes_the_smallest_bucket_that_fits_the_batch(case):
    rng = np.random.default_rng(case)
    size, batch = int(rng.integers(1, 60)), int(rng.integers(1, 20))
    length = rng.integers(1, 33, size)
    spec = {'name': 'sequential', 'by': 'n'}
    sampler = make(spec, {'n': length}, size, batch, lengths=(32, 4, 16))
    for plan in check_form(sampler, size, batch):
        np.testing.assert_array_equal(plan.rows[plan.mask], np.arange(size))
        for rows, bucket in zip(plan.rows, plan.bucket, strict=True):
            assert bucket == min(n for n in (4, 16, 32) if n >= length[rows].max())


@pytest.mark.parametrize('case', CASES)
def test_shuffle_shows_every_row_at_most_once(case):
    rng = np.random.default_rng(case)
    batch = int(rng.integers(1, 20))
    size = batch + int(rng.integers(0, 60))
    drop = make({'name': 'shuffle'}, {}, size, batch)
    for plan in check_form(drop, size, batch):
        assert plan.mask.all()
        assert len(set(plan.rows.ravel())) == plan.rows.size == size - size % batch
    assert drop.report['dropped_rows'] == size % batch
    size = int(rng.integers(1, 60))
    pad = make({'name': 'shuffle', 'remainder': 'pad'}, {}, size, batch)
    for plan in check_form(pad, size, batch):
        np.testing.assert_array_equal(np.sort(plan.rows[plan.mask]), np.arange(size))
    assert pad.report['padding_rows'] == -size % batch


def test_orders_differ_between_epochs_stages_and_seeds():
    index = {'identity': np.repeat(np.arange(20), 5), 'length': np.arange(100) % 7 + 1}
    for spec in (
        {'name': 'shuffle'},
        {'name': 'stratified', 'by': 'length'},
        {'name': 'stratified', 'by': {'length': 7}, 'minimum': 4},
        {'name': 'pk', 'by': 'identity', 'k': 2},
        {'name': 'bucketed', 'by': 'length'},
    ):
        plan = lambda epoch=0, **kw: make(spec, index, 100, 10, lengths=(4, 8), **kw).plan(epoch)
        orders = [plan(), plan(1), plan(2), plan(stage=0), plan(seed=4)]
        assert len({order.rows.tobytes() for order in orders}) == 5, spec
        assert plan().rows.tobytes() == plan().rows.tobytes()


def test_shuffle_is_uniform():
    sampler = make({'name': 'shuffle'}, {}, 6, 2)
    counts = np.zeros((6, 6))
    for epoch in range(3000):
        counts[np.arange(6), sampler.plan(epoch).rows.ravel()] += 1
    assert np.abs(counts / 3000 - 1 / 6).max() < 5 * math.sqrt(5 / 36 / 3000)


@pytest.mark.parametrize('case', CASES)
def test_every_batch_has_its_fraction_of_every_stratum(case):
    rng = np.random.default_rng(case)
    batch = int(rng.integers(1, 24))
    size = batch + int(rng.integers(0, 150))
    strata = rng.choice(int(rng.integers(1, 12)), size, p=None) ** 2
    columns = {'kind': strata, 'flag': strata > 4, 'n': rng.integers(0, 5, size)}
    for by, stratum in (
        ('kind', strata),
        ('flag', strata > 4),
        ({'n': 2, 'kind': 1}, (columns['n'] >= 2) & (strata >= 1)),
    ):
        sampler = make({'name': 'stratified', 'by': by}, columns, size, batch)
        assert sampler.steps_per_epoch == size // batch
        for plan in check_form(sampler, size, batch):
            assert plan.mask.all() and len(set(plan.rows.ravel())) == plan.rows.size
            for value in set(stratum.tolist()):
                counts = (stratum[plan.rows] == value).sum(axis=1)
                due = batch * int((stratum == value).sum())
                assert counts.min() >= due // size, (by, value)
                assert counts.max() <= -(-due // size), (by, value)


def test_stratified_leaves_out_other_rows_every_epoch():
    kind = np.repeat([0, 1, 2], [50, 30, 3])
    sampler = make({'name': 'stratified', 'by': 'kind'}, {'kind': kind}, 83, 10)
    times_seen = np.bincount(np.concatenate([sampler.plan(e).rows.ravel() for e in range(400)]))
    assert np.abs(times_seen / 400 - 80 / 83).max() < 0.06


@pytest.mark.parametrize('case', CASES)
def test_stratified_minimum_repeats_rich_rows_evenly(case):
    rng = np.random.default_rng(case)
    batch = int(rng.integers(2, 20))
    size = 2 * batch + int(rng.integers(0, 150))
    rich = np.zeros(size, bool)
    rich[rng.permutation(size)[: int(rng.integers(1, size))]] = True
    minimum = int(rng.integers(1, min(batch, rich.sum()) + 1))
    spec = {'name': 'stratified', 'by': 'rich', 'minimum': minimum}
    sampler = make(spec, {'rich': rich}, size, batch)
    due = batch * int(rich.sum()) / size
    for plan in check_form(sampler, size, batch):
        counts = rich[plan.rows].sum(axis=1)
        assert counts.min() >= minimum
        assert all(len(set(rows)) == batch for rows in plan.rows.tolist())
        times_seen = np.bincount(plan.rows.ravel(), minlength=size)
        assert times_seen[~rich].max(initial=0) <= 1
        if math.floor(due) >= minimum:
            assert times_seen.max() == 1 and sampler.steps_per_epoch == size // batch
        else:
            assert (counts == minimum).all()
            assert times_seen[rich].max() - times_seen[rich].min() <= 1
            assert times_seen[rich].max() == sampler.report['repeats_of_a_row']
            assert plan.rows.size - len(set(plan.rows.ravel())) == sampler.report['repeated_rows']
            assert (times_seen == 0).sum() == sampler.report['dropped_rows']
            if minimum < batch:
                assert (times_seen[~rich] == 0).sum() < batch - minimum


def identities(rng, count, most):
    sizes = rng.integers(1, most + 1, count)
    identity = rng.permutation(np.repeat(rng.permutation(10 * count)[:count], sizes))
    return identity


@pytest.mark.parametrize('case', range(120))
def test_pk_covers_every_row_with_each_identity_at_most_once_a_batch(case):
    rng = np.random.default_rng(case)
    k, p = int(rng.integers(1, 5)), int(rng.integers(1, 9))
    # A few identities that are in (nearly) every batch come with every third case.
    most = [4 * k, 12 * k, 3][case % 3]
    identity = identities(rng, int(rng.integers(p, 4 * p + 2)), most)
    count = collections.Counter(identity.tolist())
    large = {name: n for name, n in count.items() if n >= k}
    spec = {'name': 'pk', 'by': 'id', 'k': k}
    if len(large) < p:
        with pytest.raises(UserError, match=f'only {len(large)} of {len(count)} identities'):
            make(spec, {'id': identity}, len(identity), p * k)
        return
    sampler = make(spec, {'id': identity}, len(identity), p * k)
    groups = {name: -(-n // k) for name, n in large.items()}
    steps = -(-sum(groups.values()) // p)
    assert sampler.steps_per_epoch == steps
    assert sampler.report['identities'] == len(large)
    assert sampler.report['identities_left_out'] == len(count) - len(large)
    assert sampler.report['rows_left_out'] == sum(n for n in count.values() if n < k)
    assert sampler.report['crowded_identities'] == sum(g > steps for g in groups.values())
    lack = steps * p - sum(groups.values())
    assert 0 <= lack < p
    everywhere = sum(g for g in groups.values() if g >= steps)
    for plan in check_form(sampler, len(identity), p * k):
        assert set(plan.rows.ravel()) == {r for r, i in enumerate(identity) if i in large}
        times_seen = collections.Counter()
        for at, batch in enumerate(plan.rows.reshape(steps, p, k).tolist()):
            assert all(len(set(group)) == k for group in batch)
            names = [{int(identity[row]) for row in group} for group in batch]
            assert all(len(name) == 1 for name in names)
            times = collections.Counter(name.pop() for name in names)
            assert all(n == 1 or groups[name] > steps for name, n in times.items())
            times_seen.update(times)
            if at < steps - 1 and everywhere <= steps * (p - lack):
                before = set(plan.rows[:at].ravel()) if at else set()
                own = lambda g: identity[g[0]]
                assert all(set(g) - before or count[own(g)] % k for g in batch)
        extra = {name: times_seen[name] - groups[name] for name in large}
        assert set(extra.values()) <= {0, 1} or any(g > steps for g in groups.values())
        assert sum(extra.values()) == lack and min(extra.values()) >= 0
        repeats = np.bincount(plan.rows.ravel(), minlength=len(identity))
        assert plan.rows.size - len(set(plan.rows.ravel())) == sampler.report['repeated_rows']
        assert repeats.max() <= 3


def test_pk_repeats_stand_in_the_last_batch():
    identity = np.repeat(np.arange(9), 4)  # 18 groups of 2 in batches of 4: 2 are lacking
    sampler = make({'name': 'pk', 'by': 'id', 'k': 2}, {'id': identity}, 36, 8)
    for epoch in range(20):
        rows = sampler.plan(epoch).rows
        assert len(rows) == 5
        assert len(set(rows[:4].ravel())) == 32  # no repeat before the last batch
        assert len(set(rows[4]) - set(rows[:4].ravel())) == 4


def test_pk_partners_change_from_batch_to_batch():
    identity = np.repeat(np.arange(40), 20)
    sampler = make({'name': 'pk', 'by': 'id', 'k': 2}, {'id': identity}, 800, 16)
    met = collections.Counter()
    for batch in sampler.plan(0).rows:
        names = sorted(set(identity[batch]))
        met.update((a, b) for i, a in enumerate(names) for b in names[i + 1 :])
    # 1400 meetings of 780 pairs: without a fresh order a round, most are between few pairs.
    assert len(met) > 500 and max(met.values()) <= 8


def test_pk_rows_meet_others_of_their_identity_every_epoch():
    sampler = make({'name': 'pk', 'by': 'id', 'k': 2}, {'id': np.repeat(np.arange(4), 10)}, 40, 8)
    pairs = [{tuple(sorted(p)) for p in sampler.plan(e).rows.reshape(-1, 2)} for e in range(30)]
    assert len(set.union(*pairs)) > 0.9 * 4 * 45


def test_bucketed_knows_that_fifty_stretched_by_a_tenth_is_fifty_five():
    spec = {'name': 'bucketed', 'by': 'n', 'stretch': 1.1}
    assert 50 * 1.1 > 55
    assert make(spec, {'n': np.array([50])}, 1, 1, lengths=(55, 90)).plan(0).bucket == [55]
    assert make(spec, {'n': np.array([51])}, 1, 1, lengths=(55, 90)).plan(0).bucket == [90]


@pytest.mark.parametrize('case', CASES)
def test_bucketed_batches_have_one_bucket_that_fits_tightly(case):
    rng = np.random.default_rng(case)
    size, batch = int(rng.integers(1, 80)), int(rng.integers(1, 16))
    lengths = sorted({int(n) for n in rng.integers(1, 40, 4)})
    stretch = float(rng.choice([1.0, 1.1, 1.25, 2.0]))
    length = rng.integers(1, 30, size)
    longest = [-(-int(n) * round(stretch * 100) // 100) for n in length]
    beyond = [r for r, n in enumerate(longest) if n > lengths[-1]]
    spec = {'name': 'bucketed', 'by': 'length', 'stretch': stretch}
    index = {'length': length}
    if beyond:
        with pytest.raises(UserError, match=rf'row {beyond[0]} has length={length[beyond[0]]} '):
            make(spec, index, size, batch, lengths=lengths)
        if len(beyond) == size:
            return
        spec['too_long'] = 'drop'
    sampler = make(spec, index, size, batch, lengths=lengths)
    assert sampler.report['dropped_rows'] == len(beyond)
    buckets = [min(m for m in lengths if m >= n) for n in longest if n <= lengths[-1]]
    steps = sum(-(-n // batch) for n in collections.Counter(buckets).values())
    assert sampler.steps_per_epoch == steps
    for plan in check_form(sampler, size, batch):
        assert sorted([*plan.rows[plan.mask], *beyond]) == list(range(size))
        for rows, mask, bucket in zip(plan.rows, plan.mask, plan.bucket, strict=True):
            assert bucket in lengths
            for row in rows[mask]:
                assert min(m for m in lengths if m >= longest[row]) == bucket
        assert (~plan.mask).sum() == sampler.report['padding_rows']


@pytest.mark.parametrize(
    'spec, message',
    [
        (
            {'name': 'pkk'},
            "sampler.name='pkk' is not one of 'sequential', 'shuffle', 'stratified', 'pk', "
            "'neighbours', 'bucketed'; did you mean 'pk'?",
        ),
        ({'name': ['pk']}, "sampler.name=['pk'] is not one of "),
        ({}, 'sampler.name=None is not one of '),
        (
            {'name': 'shuffle', 'remain': 1},
            "unknown key sampler.remain=1; known keys of sampler: remainder; did you mean 'remaind",
        ),
        (
            {'name': 'sequential', 'k': 1},
            'unknown key sampler.k=1; known keys of sampler: by',
        ),
        ({'name': 'sequential', 'by': 3}, 'sampler.by=3 is not a string or None'),
        ({'name': 'sequential', 'by': 'x'}, "sampler.by='x' is not an index of the dataset"),
        (
            {'name': 'shuffle', 'remainder': 'x'},
            "sampler.remainder='x' is not one of 'drop', 'pad'",
        ),
        ({'name': 'shuffle', 'remainder': None}, 'sampler.remainder=None is not one of '),
        ({'name': 'pk', 'by': 'a'}, 'sampler.k is missing: it needs an integer at least 1 (rows'),
        ({'name': 'pk', 'by': 'a', 'k': 0}, 'sampler.k=0 is not an integer at least 1'),
        ({'name': 'pk', 'by': 'a', 'k': '2'}, "sampler.k='2' is not an integer at least 1"),
        ({'name': 'pk', 'by': 'a', 'k': 2.0}, 'sampler.k=2.0 is not an integer at least 1'),
        ({'name': 'pk', 'by': 'a', 'k': 3}, 'sampler.k=3 does not divide batch_size=4'),
        (
            {'name': 'pk', 'by': 'a', 'k': 2},
            'sampler.k=2 and batch_size=4 need 2 identities of at least 2 rows, but only 0 of 10 ',
        ),
        (
            {'name': 'pk', 'by': 'x', 'k': 2},
            "sampler.by='x' is not an index of the dataset; there are: a, f",
        ),
        (
            {'name': 'pk', 'by': 'f', 'k': 2},
            "sampler.by='f' cannot be used: that index is float64[10]",
        ),
        ({'name': 'pk', 'by': ['a'], 'k': 2}, "sampler.by=['a'] is not a string"),
        ({'name': 'neighbours', 'by': 'a', 'near': 'a', 'k': 0}, 'sampler.k=0 is not an integer'),
        ({'name': 'neighbours', 'by': 'a', 'k': 1}, 'sampler.near is missing: it needs a string'),
        ({'name': 'stratified', 'by': {}}, 'sampler.by={} names no index'),
        ({'name': 'stratified', 'by': {'b': 2}}, "sampler.by='b' is not an index of the dataset"),
        ({'name': 'stratified', 'by': {'a': 'x'}}, "sampler.by.a='x' is not a number"),
        (
            {'name': 'stratified', 'by': 3},
            'sampler.by=3 is not a string or a mapping from names to',
        ),
        (
            {'name': 'stratified', 'by': 'a', 'minimum': 1},
            'sampler.minimum=1 needs thresholds or an index of booleans, not sampler.by=',
        ),
        (
            {'name': 'stratified', 'by': 'a', 'minimum': -1},
            'sampler.minimum=-1 is not an integer at least 0',
        ),
        (
            {'name': 'stratified', 'by': {'a': 9}, 'minimum': 2},
            'sampler.minimum=2 rich rows do not go into a batch of 4: the split has 1 of 10',
        ),
        (
            {'name': 'stratified', 'by': {'a': 0}, 'minimum': 5},
            'sampler.minimum=5 rich rows do not go into a batch of 4',
        ),
        (
            {'name': 'bucketed', 'by': 'a', 'stretch': 0.9},
            'sampler.stretch=0.9 is not a number at least 1',
        ),
        ({'name': 'bucketed', 'by': 'a', 'stretch': 'x'}, "sampler.stretch='x' is not a number"),
        (
            {'name': 'bucketed', 'by': 'a', 'too_long': 'cut'},
            "sampler.too_long='cut' is not one of 'error', 'drop'",
        ),
        (
            {'name': 'bucketed', 'by': 'a'},
            'row 9 has a=9 and may need 9, more than the largest bucket 8 (1 such rows; '
            "sampler.too_long='drop' leaves them out)",
        ),
    ],
)
def test_faults_of_a_config_are_one_sentence(spec, message):
    index = {'a': np.arange(10), 'f': np.zeros(10)}
    with pytest.raises(UserError, match='^' + re.escape(message)):
        make(spec, index, 10, 4, lengths=(8,))


def test_faults_of_the_data_are_one_sentence():
    with pytest.raises(UserError, match='no rows'):
        make({'name': 'sequential'}, {}, 0, 4)
    with pytest.raises(
        UserError, match=r"batch_size=4 is larger .* 3 rows; sampler\.remainder='pad'"
    ):
        make({'name': 'shuffle'}, {}, 3, 4)
    with pytest.raises(UserError, match="index 'a' has 2 values for 3 rows"):
        make({'name': 'sequential'}, {'a': np.zeros(2)}, 3, 4)
    with pytest.raises(UserError, match='has no bucket lengths'):
        make({'name': 'bucketed', 'by': 'a'}, {'a': np.ones(4, int)}, 4, 2)
    with pytest.raises(UserError, match='has no bucket lengths'):
        make({'name': 'sequential', 'by': 'a'}, {'a': np.ones(4, int)}, 4, 2)


@pytest.mark.slow
def test_a_million_rows_are_planned_within_seconds():
    rng = np.random.default_rng(0)
    size = 1_000_000
    index = {'n': rng.integers(1, 17, size), 'id': rng.integers(0, 100_000, size)}
    for spec in (
        {'name': 'shuffle'},
        {'name': 'stratified', 'by': {'n': 2}},
        {'name': 'stratified', 'by': {'n': 16}, 'minimum': 16},
        {'name': 'pk', 'by': 'id', 'k': 2},
        {'name': 'bucketed', 'by': 'n'},
    ):
        sampler = make(spec, index, size, 64, lengths=(4, 8, 16))
        start = time.process_time()
        sampler.plan(0)
        assert time.process_time() - start < 3, spec


@pytest.mark.parametrize('count', [1, 2, 3, 4, 9])
def test_bucket_lengths_pad_least(count):
    """Against every choice there is."""
    rng = np.random.default_rng(count)
    for _ in range(10):
        lengths = rng.geometric(0.05, 40)
        padded = lambda ends, lengths=lengths: np.array(ends)[np.searchsorted(ends, lengths)].sum()
        counts = samplers.bucket_lengths(lengths, count)
        edges = sorted({-(-int(length) // 8) * 8 for length in lengths})
        assert len(counts) == min(count, len(edges)) and counts[-1] == edges[-1]
        assert not any(length % 8 for length in counts)
        choices = itertools.combinations(edges[:-1], len(counts) - 1)
        assert padded(counts) == min(padded((*choice, edges[-1])) for choice in choices)
