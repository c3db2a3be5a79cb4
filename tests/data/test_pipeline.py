"""Batches by step: the same for any threads, processes and hosts, and nothing left running."""

import contextlib
import glob
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref

import jax
import numpy as np
import pytest

from mmjax.data import pipeline, samplers
from mmjax.data.dataset import Dataset
from mmjax.errors import UserError

SIZE, BATCH, SEED, STAGE = 30, 8, 5, 2


class Awkward(Exception):
    """Does not survive pickling: it cannot be made from its arguments."""

    def __init__(self, one, two):
        super().__init__(f'{one} and {two}')


class Missing(UserError):
    def __init__(self, path, line):
        super().__init__(f'no image {path}, line {line}')


class Rows(Dataset):
    """Rows of several lengths, with noise; some rows may fail or be slow."""

    lengths = (4, 8)

    def __init__(self, size=SIZE, faults=None, seconds=0.0):
        self.split, self.size, self.faults, self.seconds = 'train', size, faults or {}, seconds
        self.index = {'length': np.arange(size) % 8 + 1}

    def __len__(self):
        return self.size

    def example(self, row, rng, train):
        time.sleep(self.seconds)
        if row in self.faults:
            raise self.faults[row][0](*self.faults[row][1:])
        tokens = rng.integers(0, 1000, row % 8 + 1)
        noise = rng.normal(size=(2, 3)).astype(np.float32) if train else np.zeros((2, 3), 'f4')
        return {'tokens': tokens, 'noise': noise + row, 'pid': np.int64(os.getpid())}

    def collate(self, examples, bucket):
        tokens = np.zeros((len(examples), bucket or 8), np.int32)
        for out, example in zip(tokens, examples, strict=True):
            out[: len(example['tokens'])] = example['tokens']
        rest = {key: np.stack([e[key] for e in examples]) for key in ('noise', 'pid')}
        return {'tokens': tokens, **rest}

    def fingerprint(self):
        return {}


def sampler_of(name, size=SIZE, batch=BATCH, **options):
    index = Rows(size).index
    lengths = Rows.lengths
    spec = {'name': name, **options}
    return samplers.make(spec, index, size, batch, seed=SEED, stage=STAGE, lengths=lengths)


BUCKETED = {'name': 'bucketed', 'by': 'length'}


def batches(dataset=None, sampler=None, **options):
    options = {'seed': SEED, 'stage': STAGE, 'train': True, 'threads': 0} | options
    return pipeline.batches(dataset or Rows(), sampler or sampler_of(**BUCKETED), **options)


def expected(sampler, step, train=True):
    """The global batch of a step, computed from the documentation alone."""
    plan = sampler.plan(step // sampler.steps_per_epoch)
    within = step % sampler.steps_per_epoch
    rows, mask, bucket = plan.rows[within], plan.mask[within], int(plan.bucket[within])
    out = {'tokens': np.zeros((len(rows), bucket or 8), np.int32), 'row': rows.astype(np.int32)}
    out |= {'mask': mask, 'noise': np.zeros((len(rows), 2, 3), np.float32)}
    for position, row in enumerate(rows):
        rng = np.random.default_rng([SEED, STAGE, step, position if mask[position] else 0])
        tokens = rng.integers(0, 1000, row % 8 + 1)
        out['tokens'][position, : len(tokens)] = tokens
        noise = rng.normal(size=(2, 3)).astype(np.float32) if train else np.float32(0)
        out['noise'][position] = noise + row
    return out


def check_equal(batch, target):
    assert set(batch) - {'pid'} == set(target)
    for key, value in target.items():
        assert type(batch[key]) is np.ndarray and batch[key].dtype == value.dtype, key
        np.testing.assert_array_equal(batch[key], value, err_msg=key)


def check_gone(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    assert condition()


def decoding_threads():
    return [t for t in threading.enumerate() if t.name.startswith(('mmjax-', 'grain-prefetch'))]


@pytest.mark.parametrize('train', [True, False])
@pytest.mark.parametrize('threads', [0, 1, 2, 5])
def test_batches_are_the_plan_decoded(threads, train):
    sampler = sampler_of(**BUCKETED)
    stop = 2 * sampler.steps_per_epoch + 1
    loader = batches(sampler=sampler, threads=threads, train=train, stop=stop)
    with contextlib.closing(loader):
        loaded = list(loader)
    assert len(loaded) == stop
    for step, batch in enumerate(loaded):
        check_equal(batch, expected(sampler, step, train))
    assert any(not batch['mask'].all() for batch in loaded)


@pytest.mark.parametrize('name', ['sequential', 'bucketed'])
@pytest.mark.parametrize('hosts', [2, 4, 8])
def test_hosts_see_the_same_global_batches(hosts, name):
    sampler = sampler_of(name, **({'by': 'length'} if name == 'bucketed' else {}))
    stop = sampler.steps_per_epoch + 2
    parts = [
        list(batches(sampler=sampler, stop=stop, process_index=p, process_count=hosts))
        for p in range(hosts)
    ]
    for step, part in enumerate(zip(*parts, strict=True)):
        whole = {key: np.concatenate([p[key] for p in part]) for key in part[0]}
        check_equal(whole, expected(sampler, step))


def test_a_batch_that_does_not_divide_among_the_hosts_is_refused():
    with pytest.raises(ValueError, match=f'a batch of {BATCH} does not divide among 3 processes'):
        batches(sampler=sampler_of('shuffle'), process_count=3)


def test_starting_at_a_step_is_skipping_to_it():
    sampler = sampler_of(**BUCKETED)
    all_of_them = list(batches(sampler=sampler, stop=12))
    for start in (1, sampler.steps_per_epoch, 11, 12):
        loaded = list(batches(sampler=sampler, start=start, stop=12, threads=2))
        assert len(loaded) == 12 - start
        for batch, target in zip(loaded, all_of_them[start:], strict=True):
            check_equal(batch, {k: v for k, v in target.items() if k != 'pid'})


def test_without_a_stop_it_goes_on():
    sampler = sampler_of('shuffle')
    with contextlib.closing(batches(sampler=sampler, start=10**9, threads=1)) as loader:
        check_equal(next(loader), expected(sampler, 10**9))
        check_equal(next(loader), expected(sampler, 10**9 + 1))


def test_padding_is_decoded_once():
    calls = []

    class Counted(Rows):
        def example(self, row, rng, train):
            calls.append(row)
            return super().example(row, rng, train)

    sampler = sampler_of('sequential', size=9)
    list(batches(Counted(9), sampler, start=1, stop=2))
    assert calls == [8]
    calls.clear()  # the second host has padding only, and repeats the first one's position 0
    (batch,) = batches(Counted(9), sampler, start=1, stop=2, process_index=1, process_count=2)
    assert calls == [8] and not batch['mask'].any() and (batch['row'] == 8).all()


def test_an_epoch_is_planned_once_and_forgotten():
    plans = []

    class Planned:
        batch_size, steps_per_epoch = BATCH, 2

        def plan(self, epoch):
            rows = np.arange(2 * BATCH).reshape(2, BATCH)
            plans.append((epoch, weakref.ref(rows)))
            return samplers.Plan(rows, rows >= 0, np.zeros(2, np.int64))

    with contextlib.closing(batches(sampler=Planned(), stop=12)) as loader:
        list(loader)
    assert [epoch for epoch, _ in plans] == list(range(6))
    assert sum(rows() is not None for _, rows in plans) <= 2


@pytest.fixture(scope='module')
def with_workers():
    """The first batches of two worker counts, the processes meanwhile, and seconds to close."""
    sampler, out = sampler_of(**BUCKETED), {}
    for workers, threads in ((1, 2), (2, 0)):
        loader = batches(sampler=sampler, workers=workers, threads=threads)
        loaded = [next(loader)]
        children = multiprocessing.active_children()
        for child in children:  # as Ctrl-C and schedulers do to all processes of a run
            os.kill(child.pid, signal.SIGINT)
            os.kill(child.pid, signal.SIGTERM)
        loaded += [next(loader) for _ in range(8)]
        start = time.monotonic()
        loader.close()
        out[workers] = (loaded, children, time.monotonic() - start)
    return sampler, out


@pytest.mark.parametrize('workers', [1, 2])
def test_processes_make_the_same_batches(with_workers, workers):
    sampler, out = with_workers
    loaded, children, _ = out[workers]
    assert len(loaded) == 9
    for step, batch in enumerate(loaded):
        check_equal(batch, expected(sampler, step))
    pids = {int(pid) for batch in loaded for pid in batch['pid']}
    assert pids == {child.pid for child in children} and len(pids) == workers


def test_closing_ends_the_processes(with_workers):
    for _, children, seconds in with_workers[1].values():
        assert seconds < 4
        for child in children:
            assert not pathlib.Path(f'/proc/{child.pid}').exists()  # not even a zombie


@pytest.mark.parametrize('threads', [0, 1, 3])
@pytest.mark.parametrize(
    'fault, kind, message',
    [
        ((UserError, 'cut short'), UserError, "row 13 of split 'train': cut short"),
        ((Missing, 'a', 3), UserError, "row 13 of split 'train': no image a, line 3"),
        ((Awkward, 1, 2), RuntimeError, "row 13 of split 'train': Awkward: 1 and 2"),
        ((StopIteration,), RuntimeError, "row 13 of split 'train': StopIteration: "),
    ],
)
def test_a_fault_names_its_row_and_comes_after_the_batches_before_it(threads, fault, kind, message):
    loader = batches(Rows(faults={13: fault}), sampler_of('sequential'), threads=threads, stop=4)
    assert next(loader)['row'][0] == 0
    with pytest.raises(kind) as error:
        next(loader)
    assert str(error.value) == message
    assert list(loader) == []  # closed
    check_gone(lambda: not decoding_threads())


@pytest.mark.parametrize(
    'fault, kind, message',
    [
        ((Missing, 'a', 3), UserError, "row 13 of split 'train': no image a, line 3"),
        pytest.param(
            (Awkward, 1, 2),
            RuntimeError,
            "row 13 of split 'train': Awkward: 1 and 2",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_fault_in_a_process_names_its_row(fault, kind, message):
    rows = Rows(faults={13: fault})
    loader = batches(rows, sampler_of('sequential'), workers=1, stop=4)
    assert next(loader)['row'][0] == 0
    with pytest.raises(kind) as error:
        next(loader)
    assert str(error.value) == message
    if kind is RuntimeError:
        assert 'raise self.faults' in '\n'.join(error.value.__notes__)
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_a_process_that_dies_is_a_user_error_and_the_others_end():
    loader = batches(workers=2)
    next(loader)
    one, other = multiprocessing.active_children()
    one.kill()
    with pytest.raises(UserError, match=r'a loader process died.*data\.workers'):
        for _ in range(50):
            next(loader)
    assert not other.is_alive()


@pytest.mark.parametrize('threads', [1, 3])
def test_closing_ends_the_threads(threads):
    loader = batches(Rows(seconds=0.1), threads=threads)
    next(loader)
    assert decoding_threads()
    start = time.monotonic()
    loader.close()
    loader.close()
    assert time.monotonic() - start < 0.2
    check_gone(lambda: not decoding_threads(), 0.3)  # one example, not the batches ahead
    assert list(loader) == []


def test_dropping_the_iterator_ends_the_threads():
    next(iter(batches(threads=2)))
    check_gone(lambda: not decoding_threads())


def test_closing_before_the_first_batch_starts_nothing():
    loader = batches(workers=2)
    loader.close()
    assert not multiprocessing.active_children() and list(loader) == []


KILLED = """
    import multiprocessing, os, sys
    sys.path[:0] = [{root!r}]
    if __name__ == '__main__':
        from tests.data import test_pipeline
        loader = test_pipeline.batches(test_pipeline.Rows(seconds=0.01), workers=2)
        next(loader)
        print(*[c.pid for c in multiprocessing.active_children()], flush=True)
        {then}
"""


ENDS = {'os.kill(os.getpid(), 9)': -9, 'os._exit(3)': 3, 'pass': 0, '1 / 0': 1}
MARKED = [pytest.param(end, marks=[pytest.mark.slow] * (ENDS[end] != -9)) for end in ENDS]


@pytest.mark.parametrize('then', MARKED)
def test_processes_do_not_outlive_the_run(tmp_path, root, then):
    script = tmp_path / 'run.py'
    text = textwrap.dedent(KILLED).format(root=str(root), then=then)
    script.write_text(text)
    before = set(glob.glob('/dev/shm/*'))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert done.returncode == ENDS[then], done.stderr
    if not then.startswith('os.'):  # nobody closed it, but no other error is printed
        assert done.stderr.count('Error') == done.stderr.count('ZeroDivisionError')
        assert 'leaked' not in done.stderr
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2
    check_gone(lambda: not any(pathlib.Path(f'/proc/{pid}').exists() for pid in pids))
    left = set(glob.glob('/dev/shm/*')) - before  # of others too, who use theirs up
    check_gone(lambda: not left & set(glob.glob('/dev/shm/*')))


@pytest.mark.parametrize(
    'batch, message',
    [
        ({'row': np.zeros(8)}, "'row', a name that the engine"),
        ({'mask': np.zeros(8)}, "'mask', a name that the engine"),
        ({'x': np.zeros((7, 8))}, r"'x' as \(7, 8\), not an array of 8 rows"),
        ({'x': [1] * 8}, "'x' as list, not an array of 8 rows"),
    ],
)
def test_a_wrong_collate_is_a_user_error(batch, message):
    class Wrong(Rows):
        def collate(self, examples, bucket):
            return batch

    with pytest.raises(UserError, match=message):
        next(batches(Wrong()))


def test_to_device_keeps_order_and_puts_each_key_on_its_sharding():
    sampler = sampler_of('shuffle')
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    keys = set()

    def sharding(key, value):
        keys.add(key)
        assert value.shape[0] == BATCH
        return one

    loaded = list(pipeline.to_device(batches(sampler=sampler, stop=5, threads=2), sharding))
    assert keys == {'tokens', 'noise', 'pid', 'row', 'mask'} and len(loaded) == 5
    for step, (batch, rows) in enumerate(loaded):
        target = expected(sampler, step)
        assert isinstance(rows, np.ndarray)
        np.testing.assert_array_equal(rows, target['row'])
        for key, value in target.items():
            assert batch[key].sharding == one
            np.testing.assert_array_equal(batch[key], value)
    again = list(pipeline.to_device(batches(sampler=sampler, stop=5), one, depth=1))
    np.testing.assert_array_equal(again[4][0]['noise'], loaded[4][0]['noise'])
    with pytest.raises(ValueError, match='depth=0 is not positive'):
        next(pipeline.to_device(batches(sampler=sampler, stop=5), one, depth=0))


def test_to_device_is_ahead_by_its_depth_and_faults_come_after_the_batches_before_them():
    made = []

    def source():
        for step in range(4):
            made.append(step)
            yield {'row': np.full(2, step, np.int32)}
        raise UserError('row 9 is broken')

    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    loader = pipeline.to_device(source(), one, depth=3)
    assert not made
    assert next(loader)[1][0] == 0 and made == [0, 1, 2]
    assert [next(loader)[1][0] for _ in range(3)] == [1, 2, 3]
    with pytest.raises(UserError, match='row 9 is broken'):
        next(loader)
