"""Rows of (source, comment, binary) on disk: what is read, what is a fault, what ends it."""

import gzip
import json
import tracemalloc

import pytest

from mmjax.data.faults import FaultReport
from mmjax.errors import UserError
from mmjax.recipes.contrabin import folder

METADATA = {
    'path': 'p/a.c',
    'label': '',
    'compiler': 'gcc-12',
    'opt_level': 'O2',
    'language': 'c',
    'name': 'f',
}
ROW = {'source': 'int f;', 'binary': 'ret', 'comment': 'Says “é”.', 'metadata': METADATA}


def read(path, share=1.0):
    report = FaultReport('train', path.parent, share)
    return list(folder.read(path, report)), report


def line(**changes):
    metadata = {**METADATA, **changes.pop('metadata', {})}
    return json.dumps({**ROW, 'metadata': metadata, **changes}, ensure_ascii=False)


@pytest.mark.parametrize('name', ['a.jsonl', 'a.jsonl.gz'])
def test_rows_are_read_flat(tmp_path, name):
    text = f'\ufeff{line()}\r\n\n  \n{line(comment="", extra=3, metadata=dict(label="sort"))}'
    content = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith('gz') else content)
    rows, report = read(tmp_path / name)
    first = {key: ROW[key] for key in ('source', 'binary', 'comment')} | METADATA
    assert rows == [{**first, 'line': 1}, {**first, 'comment': '', 'label': 'sort', 'line': 4}]
    assert (report.rows, report.faults) == (2, 0)


@pytest.mark.parametrize(
    ('text', 'reason', 'detail'),
    [
        ('{"source": 1', 'malformed_json', "Expecting ',' delimiter"),
        ('[' * 100_000, 'malformed_json', 'recursion'),
        ('"\xff"', 'malformed_json', 'not UTF-8'),
        ('[1]', 'malformed_row', '[1] is not an object'),
        (line(metadata_=1).replace('"metadata"', '"meta"'), 'malformed_row', 'metadata: None'),
        (line().replace('"binary"', '"bin"'), 'missing_key', "has no 'binary'"),
        (line().replace('"opt_level"', '"o"'), 'missing_key', "metadata has no 'opt_level'"),
        (line(comment=None), 'malformed_row', "'comment' is None, no text"),
        (line(metadata=dict(label=3)), 'malformed_row', "metadata: 'label' is 3, no text"),
        (line(source=' \n'), 'empty_source', 'the source is empty'),
        (line(binary=''), 'empty_binary', 'the binary is empty'),
        (line().replace('ret', '\\ud800'), 'malformed_row', 'surrogate'),
        (line().replace('{"s', '{"binary": "x", "s'), 'malformed_json', "'binary' stands twice"),
    ],
)
def test_a_faulty_row_is_counted_and_listed(tmp_path, text, reason, detail):
    path = tmp_path / 'a.jsonl'
    content = f'{line()}\n{text}\n{line()}'.encode()
    path.write_bytes(content.replace('\xff'.encode(), b'\xff'))
    rows, report = read(path)
    assert [row['line'] for row in rows] == [1, 3]
    assert dict(report.skipped) == {reason: 1}
    (entry,) = map(json.loads, report.listing.read_text().splitlines())
    assert entry['row'] == 2 and detail in entry['detail']
    assert entry['detail'].startswith(f'{path} line 2')


def test_more_than_a_hundredth_of_faults_end_it(tmp_path):
    path = tmp_path / 'a.jsonl'
    lines = [line()] * 200
    lines[3] = lines[50] = 'no'
    path.write_text('\n'.join(lines))
    assert len(read(path, 0.01)[0]) == 198
    lines[60] = 'no'
    path.write_text('\n'.join(lines))
    with pytest.raises(UserError, match=r'3 of the 200 rows of split train are faulty'):
        read(path, 0.01)


@pytest.mark.parametrize('keep', [5, 60, -9, -1])
def test_a_truncated_gzip_is_one_error(tmp_path, keep):
    path = tmp_path / 'a.jsonl.gz'
    path.write_bytes(gzip.compress(line().encode())[:keep])
    with pytest.raises(UserError, match=r'a\.jsonl\.gz is a truncated or damaged gzip file'):
        read(path)


def test_damage_and_other_files_are_told(tmp_path):
    path = tmp_path / 'a.jsonl.gz'
    content = bytearray(gzip.compress(line().encode() * 50))
    content[40] ^= 255
    for damaged in (bytes(content), b'no gzip at all'):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match='damaged gzip file'):
            read(path)
    with pytest.raises(UserError, match='does not exist'):
        read(tmp_path / 'absent.jsonl')
    with pytest.raises(UserError, match='cannot be read'):
        read(tmp_path)
    (tmp_path / 'a.jsonl').write_text('\n \n')
    with pytest.raises(UserError, match='has no rows'):
        read(tmp_path / 'a.jsonl')


def test_a_line_that_would_fill_the_memory_ends_it(tmp_path):
    path = tmp_path / 'a.jsonl.gz'
    with gzip.open(path, 'wb') as file:
        file.write(f'{line()}\n'.encode())
        for _ in range(64):
            file.write(b' ' * (1 << 20))
    tracemalloc.start()
    with pytest.raises(UserError, match='line 2 is longer than 16 MiB'):
        read(path)
    assert tracemalloc.get_traced_memory()[1] < 40 << 20
    tracemalloc.stop()
