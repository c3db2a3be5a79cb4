"""Prepared splits: whole or absent, resumable after a kill, and checked when they are opened."""

import json
import pathlib
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent import futures

import numpy as np
import pytest

from mmjax.data import prepare as builders
from mmjax.data import records
from mmjax.data.faults import FaultReport
from mmjax.errors import RecordError, UserError


def numbers(count, *, start=0, size=10):
    """A source of records with a text, a number, a list and a blob."""

    def source(report):
        report.rows = count
        for i in range(start, start + count):
            text = f'é {i}'
            yield {'i': i, 'text': text, 'list': [i, None], 'blob': bytes([i % 256]) * size}

    return source


def prepare(directory, **splits):
    return builders.prepare(
        directory,
        name='numbers',
        splits=splits,
        blobs=('blob',),
        index=lambda record: {'i': np.int32(record['i']), 'odd': record['i'] % 2 == 1},
    )


def everything(folder: pathlib.Path):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob('*'))


@pytest.fixture(scope='module')
def two_splits(tmp_path_factory):
    directory = tmp_path_factory.mktemp('data') / 'numbers-1'
    return prepare(directory, train=numbers(300), val=numbers(5, start=1000))


def test_records_index_and_counts_come_back_as_written(two_splits):
    train, val = two_splits.open('train'), two_splits.open('val')
    assert (len(train), len(val)) == (300, 5)
    for i in (0, 17, 299):
        expected = {'i': i, 'text': f'é {i}', 'list': [i, None], 'blob': bytes([i % 256]) * 10}
        assert train[i] == expected
    assert [record['i'] for record in val] == [1000, 1001, 1002, 1003, 1004]
    with pytest.raises(IndexError):
        train[300]
    index = two_splits.index('train')
    np.testing.assert_array_equal(index['i'], np.arange(300, dtype=np.int32))
    assert index['i'].dtype == np.int32 and index['odd'].dtype == bool
    splits = two_splits.summary['splits']
    assert splits['train']['records'] == 300 and splits['train']['rows'] == 300
    assert splits['train']['digest'] != splits['val']['digest']
    left = everything(two_splits.directory.parent)
    assert all(path.startswith('numbers-1') for path in left), left


def test_the_same_records_give_the_same_digest_and_others_another(tmp_path):
    digests = [
        prepare(tmp_path / name, train=source).summary['splits']['train']['digest']
        for name, source in (('a', numbers(4)), ('b', numbers(4)), ('c', numbers(4, size=11)))
    ]
    assert digests[0] == digests[1] != digests[2]


def test_a_prepared_folder_is_a_tfds_dataset(two_splits):
    import tensorflow_datasets as tfds

    source = tfds.builder_from_directory(two_splits.directory).as_data_source('val')
    assert json.loads(source[2]['json'])['i'] == 1002


def test_prepared_once_the_sources_are_not_read_again(two_splits):
    def untouchable(report):
        raise AssertionError('read again')
        yield

    again = prepare(two_splits.directory, train=untouchable)
    assert len(again.open('val')) == 5


def test_shards_are_bounded_and_read_across(tmp_path, monkeypatch):
    monkeypatch.setattr(records, '_SHARD_BYTES', 2000)
    prepared = prepare(tmp_path / 'd', train=numbers(100))
    shards = list((tmp_path / 'd').glob('*array_record*'))
    assert len(shards) > 2
    assert [record['i'] for record in prepared.open('train')] == list(range(100))


def test_readers_are_picklable_and_agree_over_threads(two_splits):
    train = pickle.loads(pickle.dumps(two_splits.open('train')))
    rows = np.random.default_rng(0).permutation(300).tolist() * 3
    with futures.ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda row: train[row]['i'], rows))
    assert found == rows


def test_small_records_read_fast(two_splits):
    train = two_splits.open('train')
    rows = np.random.default_rng(0).integers(0, 300, 2000)
    train[0]
    start = time.process_time()
    for row in rows:
        train[row]
    assert len(rows) / (time.process_time() - start) > 1000  # 8,000 on an idle core


@pytest.mark.parametrize('cut', ['block', 'blocks', 'inside', 'empty', 'other', 'gone'])
def test_a_cut_shard_is_refused_by_name(tmp_path, cut):
    rng = np.random.default_rng(0)

    def noise(report):
        report.rows = 40
        for i in range(40):
            yield {'i': i, 'blob': rng.bytes(10_000)}

    prepared = prepare(tmp_path / 'd', train=noise)
    (shard,) = (tmp_path / 'd').glob('*train.array_record*')
    data = shard.read_bytes()
    assert len(data) > 4 * 65536
    if cut == 'gone':
        shard.unlink()
    elif cut == 'other':
        prepare(tmp_path / 'e', train=numbers(39))
        shard.write_bytes(next((tmp_path / 'e').glob('*train.array_record*')).read_bytes())
    else:
        blocks = {'block': 65536, 'blocks': 3 * 65536, 'inside': 3 * 65536 + 999, 'empty': 0}
        shard.write_bytes(data[: blocks[cut]])
    found = {'gone': 'is missing', 'other': 'has 39 records where 40'}
    message = found.get(cut, 'has 0 records where 40 were written')
    with pytest.raises(UserError, match=f'{shard.name} {message}.*remove'):
        prepared.open('train')


@pytest.mark.parametrize('blocks', [1, 3])
def test_a_shard_cut_after_it_was_opened_is_refused_too(tmp_path, blocks):
    rng = np.random.default_rng(0)

    def noise(report):
        for i in range(40):
            yield {'i': i, 'blob': rng.bytes(10_000)}

    opened = prepare(tmp_path / 'd', train=noise).open('train')
    (shard,) = (tmp_path / 'd').glob('*train.array_record*')
    shard.write_bytes(shard.read_bytes()[: blocks * 65536])
    with pytest.raises(UserError, match=shard.name):
        opened[39]


def test_an_unknown_split_is_named(two_splits):
    with pytest.raises(UserError, match="'test'"):
        two_splits.open('test')


def faulty(count, bad):
    def source(report):
        report.rows = count
        for i in range(count):
            if i in bad:
                report.fault(RecordError('broken', f'file-{i} is broken'), i)
            elif i % 10 == 9:
                report.skip('other')
            else:
                yield {'i': i, 'blob': b''}

    return source


def test_faults_within_the_share_are_listed_and_counted(tmp_path):
    prepared = prepare(tmp_path / 'd', train=faulty(200, (3, 50)))
    split = prepared.summary['splits']['train']
    assert split['skipped'] == {'broken': 2, 'other': 20} and split['faults'] == 2
    assert len(prepared.open('train')) == 178
    listed = [json.loads(x) for x in (tmp_path / 'd/skipped.jsonl').read_text().splitlines()]
    assert [(entry['row'], entry['reason']) for entry in listed] == [(3, 'broken'), (50, 'broken')]
    assert listed[0]['detail'] == 'file-3 is broken'


def test_faults_above_the_share_end_at_once_and_leave_nothing(tmp_path):
    seen = []

    def source(report):
        for record in faulty(200, (3, 50, 60, 70))(report):
            seen.append(record['i'])
            yield record

    with pytest.raises(UserError, match=r'file-3 .*file-60 .*3 of the 200 rows of split train'):
        prepare(tmp_path / 'deep/er/d', val=numbers(3), train=source)
    assert seen[-1] < 60
    assert everything(tmp_path) == []


def test_a_folder_made_under_a_larger_share_is_refused_under_a_smaller(tmp_path):
    splits = {'train': faulty(200, (3, 50, 60, 70))}
    options = dict(name='numbers', splits=splits, blobs=('blob',))
    builders.prepare(tmp_path / 'd', max_fault_share=0.02, **options)
    before = everything(tmp_path)
    with pytest.raises(UserError, match=r'4 of the 200 rows of split train .* 0\.015: see'):
        builders.prepare(tmp_path / 'd', max_fault_share=0.015, **options)
    assert everything(tmp_path) == before


def test_a_split_without_records_is_an_error(tmp_path):
    def source(report):
        report.rows = 2
        report.skip('page_type:other')
        report.skip('page_type:other')
        yield from ()

    with pytest.raises(UserError, match=r'split val has no usable record among 2 .*other 2'):
        prepare(tmp_path / 'd', val=source)
    assert everything(tmp_path) == []


def test_a_fault_of_any_kind_leaves_nothing(tmp_path):
    def source(report):
        yield {'i': 0, 'blob': b''}
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        prepare(tmp_path / 'd', train=source)
    assert everything(tmp_path) == []


SLOW = textwrap.dedent("""
    import sys, time
    from mmjax.data import prepare as builders

    folder, pause = sys.argv[1], float(sys.argv[2])

    def check(item):
        with open(folder + '/checked', 'a') as file:
            file.write(f'{item}\\n')
        time.sleep(pause)
        return {'i': item, 'text': 'x' * 50}

    def source(report):
        report.rows = 300
        for item, found in report.check_each(
        range(300), check, lambda item: [item], lambda item: [item], workers=2
    ):
            yield {**found, 'blob': b'b'}

    builders.prepare(folder + '/d', name='numbers', splits={'train': source}, blobs=('blob',))
    print('done')
""")


def slow(folder, pause):
    command = [sys.executable, '-c', SLOW, str(folder), str(pause)]
    repository = pathlib.Path(builders.__file__).parents[2]
    return subprocess.Popen(command, cwd=repository, stdout=subprocess.PIPE, text=True)


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, 'waited in vain'
        time.sleep(0.02)


def test_killed_it_continues_where_its_journal_ends(tmp_path):
    (tmp_path / 'whole').mkdir()
    whole = slow(tmp_path / 'whole', 0.0)
    (tmp_path / 'cut').mkdir()
    process = slow(tmp_path / 'cut', 0.01)
    journal = tmp_path / 'cut/.d.partial/journal-train.jsonl'
    wait_for(lambda: journal.exists() and journal.read_bytes().count(b'\n') >= 60)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / 'cut/d').exists()
    kept = journal.read_bytes()[:-5]  # a torn last line
    journal.write_bytes(kept)
    checked = tmp_path / 'cut/checked'
    checked.unlink()
    assert slow(tmp_path / 'cut', 0.0).communicate()[0] == 'done\n'
    again = sorted(map(int, checked.read_text().split()))
    assert again == list(range(kept.count(b'\n'), 300))
    assert whole.communicate()[0] == 'done\n'
    first, second = (builders.Prepared(tmp_path / name / 'd') for name in ('whole', 'cut'))
    assert first.summary == second.summary
    assert list(second.open('train')) == list(first.open('train'))
    assert everything(tmp_path / 'cut')[0] == 'checked'
    assert not [path for path in everything(tmp_path / 'cut') if path.startswith('.')]


def lines(item):
    return [item]


def test_a_journal_that_disagrees_is_not_believed(tmp_path):
    def check_with(stamps):
        checked = []
        report = FaultReport('train', tmp_path)
        check = lambda i: checked.append(i) or {'i': i}
        results = report.check_each(range(5), check, stamps.__getitem__, lines)
        assert [(item, result['i']) for item, result in results] == [(i, i) for i in range(5)]
        return sorted(checked)

    assert check_with([0, 1, 2, 3, 4]) == [0, 1, 2, 3, 4]
    assert check_with([0, 1, 2, 3, 4]) == []
    assert check_with([0, 1, 9, 3, 4]) == [2, 3, 4]
    assert check_with([0, 1, 9, 3, 4]) == []


@pytest.mark.parametrize('recorded', [False, True])
def test_an_error_without_a_reason_is_a_fault_like_any_other(tmp_path, recorded):
    """Helpers that know nothing of records raise a plain UserError; the row is counted too."""

    def check(i):
        if i == 2:
            raise UserError('page-2 leads outside')
        if i == 4:
            raise RecordError('broken', 'page-4 is broken')
        return {'i': i}

    def run():
        report = FaultReport('train', tmp_path, max_fault_share=0.7)
        report.rows = 6
        results = report.check_each(range(6), check, lines, lambda item: [item, 10 + item])
        return report, [item for item, _ in results]

    report, items = run()
    if recorded:  # read back from the journal, as after a kill
        check = None
        report, items = run()
    assert items == [0, 1, 3, 5] and report.faults == 4
    assert report.skipped == {'invalid_record': 2, 'broken': 2}
    listed = [json.loads(line) for line in report.listing.read_text().splitlines()]
    assert [entry['row'] for entry in listed] == [2, 12, 4, 14]
    assert listed[0]['reason'] == 'invalid_record' and listed[0]['detail'] == 'page-2 leads outside'


def test_plain_errors_end_the_preparation_above_the_fraction_too(tmp_path):
    def source(report):
        report.rows = 2
        yield {'i': 0, 'blob': b''}
        report.fault(UserError('page-1 has no text'), 1)

    with pytest.raises(UserError, match=r'page-1 has no text \(row 1\): 1 of the 2 rows'):
        prepare(tmp_path / 'd', train=source)
    assert everything(tmp_path) == []


def test_every_row_moves_the_progress_whatever_becomes_of_it(tmp_path):
    seen = []
    options = dict(name='numbers', blobs=('blob',), max_fault_share=0.5)
    builders.prepare(
        tmp_path / 'd',
        splits={'train': faulty(20, (3, 5))},
        progress=lambda *position: seen.append(position),
        **options,
    )
    assert seen[0] == ('train', 1, 20) and seen[-1] == ('train', 20, 20)


def cached(cache, settings, version='1.0.0', splits=('train',), **options):
    return builders.prepare_cached(
        cache,
        'numbers_folder',
        settings,
        version=version,
        splits={split: numbers(10) for split in splits},
        blobs=('blob',),
        index=lambda record: {'i': np.int32(record['i'])},
        **options,
    )


def test_the_folder_of_the_cache_is_named_by_what_decides_the_content(tmp_path):
    first = cached(tmp_path, ['folder', 3])
    assert first.directory.parent == tmp_path
    assert first.directory.name.startswith('numbers-folder-')
    assert cached(tmp_path, ['folder', 3], max_fault_share=0.5) == first
    others = [
        cached(tmp_path, ['folder', 4]),
        cached(tmp_path, ['folder', 3], version='1.0.1'),
        cached(tmp_path, ['folder', 3], splits=('train', 'val')),
    ]
    assert len({prepared.directory for prepared in (first, *others)}) == 4


def test_arrays_beside_the_records_are_made_once(tmp_path):
    prepared = cached(tmp_path, [])
    made = []

    def make():
        made.append(1)
        return {'mean': np.arange(3.0)}

    for settings in (['zero'], ['zero'], ['none']):
        arrays = prepared.cached_arrays('statistics', settings, make)
        np.testing.assert_array_equal(arrays['mean'], np.arange(3.0))
    assert len(made) == 2
    assert len(list(prepared.directory.glob('statistics-*.npz'))) == 2
    assert not list(prepared.directory.glob('.*'))


class Numbers(builders.PreparedDataset):
    def example(self, row, rng, train):
        return {'i': np.int32(self.record(row)['i'])}


def test_a_prepared_dataset_reads_its_split_and_parts_of_it(tmp_path):
    prepared = cached(tmp_path, [])
    data = pickle.loads(pickle.dumps(Numbers(prepared, 'train')))
    rng = np.random.default_rng(0)
    assert [int(data.example(row, rng, False)['i']) for row in range(len(data))] == [*range(10)]
    assert data.fingerprint() == {
        'name': 'numbers_folder',
        'version': '1.0.0',
        'split': 'train',
        'size': 10,
        'digest': prepared.summary['splits']['train']['digest'],
    }
    some = data.subset(np.array([7, 3, 5])).subset(np.array([2, 0]), 'val')
    assert [some.record(row)['i'] for row in range(len(some))] == [5, 7]
    assert some.index['i'].tolist() == [5, 7] and some.split == 'val' and data.split == 'train'
    assert some.fingerprint()['digest'] != data.fingerprint()['digest']
    some.skipped['cut'] = 1
    assert data.skipped == {}
    one = data.with_record({'i': 99}, {'i': np.int32(99)})
    assert len(one) == 1 and one.record(0) == {'i': 99} and one.index['i'].tolist() == [99]
    with pytest.raises(UserError, match="holds no split 'test'"):
        Numbers(prepared, 'test')


def test_two_processes_take_turns(tmp_path):
    runs = [slow(tmp_path, 0.001) for _ in range(2)]
    assert [run.communicate()[0] for run in runs] == ['done\n', 'done\n']
    checked = list(map(int, (tmp_path / 'checked').read_text().split()))
    assert sorted(checked) == list(range(300))
    assert not [path for path in everything(tmp_path) if path.startswith('.')]


def test_waiting_ends_when_the_other_is_done(tmp_path):
    go = threading.Event()

    def source(report):
        go.wait(10)
        yield from numbers(3)(report)

    with futures.ThreadPoolExecutor(1) as pool:
        other = pool.submit(prepare, tmp_path / 'd', train=source)
        waiting = pool_wait(tmp_path / 'd')
        go.set()
        assert len(other.result().open('train')) == 3
        assert len(waiting.result(10).open('train')) == 3


def pool_wait(directory):
    future: futures.Future = futures.Future()

    def wait():
        try:
            future.set_result(
                builders.prepare(directory, name='numbers', splits={}, wait=True, timeout=10)
            )
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=wait, daemon=True).start()
    return future


def test_waiting_gives_up_without_a_sign_of_life(tmp_path):
    with pytest.raises(UserError, match='gave no sign of life'):
        builders.prepare(tmp_path / 'd', name='numbers', splits={}, wait=True, timeout=0.3)


def test_arrays_pack_without_pickle():
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.testing.assert_array_equal(records.unpack(records.pack(array)), array)
    with pytest.raises(ValueError, match='allow_pickle'):
        records.pack(np.array([{}]))
