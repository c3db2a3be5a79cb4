"""Prepared functions: a folder in, rows out; identities, subsets, tokens; C files compiled once."""

import gzip
import json
import pickle
import re
import shutil
import types

import numpy as np
import pytest

from mmjax.data import prepare as builders
from mmjax.data import tokenizers
from mmjax.errors import UserError
from mmjax.recipes.contrabin import data as code
from mmjax.recipes.contrabin import task as contrabin
from mmjax.recipes.contrabin.c_projects import build
from mmjax.recipes.contrabin.c_projects import prepare as code_prepare

LEVELS = ('O0', 'O1', 'O2', 'O3')
LISTING = 'mov eax, {n}\nadd eax, edi\nret'
LENGTHS = {'source': 24, 'comment': 12, 'binary': 16}


def row(n, level='O0', **changes):
    shared = {'path': 'a.c', 'compiler': 'gcc', 'language': 'c', 'label': '', 'name': f'add_{n}'}
    return {
        'source': f'int add_{n}(int x) {{\n    return x + {n};\n}}',
        'comment': f'Adds {n}.',
        'binary': LISTING.format(n=n) + f' ; {level}',
        'metadata': {**shared, 'opt_level': level},
    } | changes


def write(path, rows):
    text = '\n'.join(map(json.dumps, rows)).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == '.gz' else text)


def opened(root, split='train', splits=('train', 'val')):
    return code.CodeFunctions(code.prepare_code(root, root / 'cache', splits=splits), split)


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    """Six functions at four levels; then one in other blanks, one without comment, one labelled."""
    root = tmp_path_factory.mktemp('code')
    rows = [row(n, level) for n in range(6) for level in LEVELS]
    rows.append(row(3, '-O2', source=' '.join(row(3)['source'].split()), comment=' Adds\n 3. '))
    rows.append(row(7, 'O9', comment=' \n'))
    rows.append(row(8, metadata={**row(8)['metadata'], 'label': 'sum'}))
    write(root / 'train.jsonl', rows)
    write(root / 'val.jsonl.gz', [row(20)])
    return root


@pytest.fixture(scope='module')
def functions(root):
    sides = {
        text: tokenizers.train_tokenizer([row(n)[text] for n in range(9)], 400, pieces=pieces)
        for text, pieces in (('source', 'text'), ('comment', 'text'), ('binary', 'words'))
    }
    return opened(root).with_tokens(sides, LENGTHS)


def test_rows_of_a_folder_become_records_and_an_index(functions):
    assert len(functions) == 27 and functions.record(4)['opt_level'] == 'O0'
    assert functions.record(5)['source'] == row(1)['source']  # as it stands in the file
    identity, told, level, label = (
        functions.index[k] for k in ('identity', 'comment_id', 'level', 'label')
    )
    # One function, whatever its level or its blanks, is one identity; so is a comment.
    expected = [n for n in range(6) for _ in LEVELS] + [3, 7, 8]
    for found in (identity, np.where(told == 0, 7, told)):
        np.testing.assert_array_equal(found[:, None] == found, np.equal.outer(expected, expected))
    assert told[25] == 0 and (np.delete(told, 25) != 0).all()
    np.testing.assert_array_equal(level, [0, 1, 2, 3] * 6 + [2, -1, 0])
    assert not label[:26].any() and label[26] != 0


def test_places_say_the_same_as_the_index(functions):
    rng = np.random.default_rng(0)
    examples = [functions.example(r, rng, True) for r in range(len(functions))]
    for key in ('identity', 'comment_id'):
        places, wanted = np.array([e[key] for e in examples]), functions.index[key]
        assert places.dtype == np.int32 and places.max() < len(functions)
        np.testing.assert_array_equal(places[:, None] == places, wanted[:, None] == wanted)


def test_one_each_takes_every_function_once_and_levels_in_turn(functions):
    rows = functions.one_each()
    identity = functions.index['identity']
    assert len(rows) == 8 and set(identity[rows]) == set(identity)
    assert functions.index['level'][rows].tolist() == [0, 1, 2, 3, 0, 1, -1, 0]
    assert (np.diff(rows) > 0).all()


def test_a_subset_is_the_same_rows_under_other_numbers(functions):
    rows = np.array([26, 3, 14])
    part, rng = functions.subset(rows), np.random.default_rng(0)
    again = part.subset(np.array([2, 0]))
    for place, r in enumerate(rows):
        assert part.record(place) == functions.record(r)
        mine, whole = part.example(place, rng, False), functions.example(r, rng, False)
        for key in whole:
            np.testing.assert_array_equal(mine[key], whole[key])
    assert [again.record(i) for i in range(2)] == [functions.record(14), functions.record(26)]
    np.testing.assert_array_equal(again.index['level'], [2, 0])
    prints = [x.fingerprint() for x in (functions, part, again, functions.subset(rows[::-1]))]
    assert len({p['digest'] for p in prints}) == 4 and prints[1]['size'] == 3


def test_a_row_without_comment_has_no_tokens_of_one(functions):
    rng = np.random.default_rng(0)
    bare, other = functions.example(25, rng, False), functions.example(3, rng, False)
    assert not bare['has_comment'] and not bare['comment_mask'].any() and other['has_comment']
    for text, length in LENGTHS.items():
        assert other[text].shape == other[f'{text}_mask'].shape == (length,)


def test_packed_lengths_are_what_batches_of_a_size_need(functions):
    counts = {
        text: [
            functions.example(i, None, False)[f'{text}_mask'].sum() for i in range(len(functions))
        ]
        for text in code.TEXTS
    }
    for rows in (4, 64):
        found = functions.packed_lengths(rows)
        assert set(found) <= set(code.TEXTS) and found
        for text, room in found.items():
            expected = np.mean(counts[text]) + 4 * np.std(counts[text]) / rows**0.5
            assert room == pytest.approx(expected)
    # Fewer rows vary more.
    small, large = functions.packed_lengths(4), functions.packed_lengths(64)
    assert set(small) <= set(large) and all(small[text] >= large[text] for text in small)


def test_texts_that_are_always_empty_have_no_room(tmp_path):
    for split in ('train', 'val'):
        write(tmp_path / f'{split}.jsonl', [row(n, comment='') for n in range(6)])
    split = opened(tmp_path)
    lengths = dict.fromkeys(code.TEXTS, 64)
    tokenizer = tokenizers.train_tokenizer(['int f ( ) { return 1 ; }'] * 9, 300)
    packed = split.with_tokens(dict.fromkeys(code.TEXTS, tokenizer), lengths).packed_lengths(4)
    assert 'comment' not in packed


def test_indentation_takes_no_tokens_and_a_listing_keeps_its_lines(functions):
    assert code.as_read('source', 'int f;\n\t  return  1;\n') == 'int f; return 1;'
    assert code.as_read('binary', 'add\n  ret') == 'add\n  ret'
    rng = np.random.default_rng(0)
    indented, flat = (functions.example(r, rng, False)['source'] for r in (12, 24))
    np.testing.assert_array_equal(indented, flat)


def test_a_token_of_a_listing_never_spans_two_words_of_an_instruction():
    lines = ['push rbp', 'mov rbp, rsp', 'ret']
    tokenizer = tokenizers.train_tokenizer(['\n'.join(lines)] * 9, 600, pieces='words')
    inner = lambda text: (lambda ids, mask: ids[0][mask[0]][1:-1].tolist())(
        *tokenizer.encode([text], 64)
    )
    tokens = inner('\n'.join(lines))
    assert tokens == [token for line in lines for token in inner(line)]
    words = ['push', ' rbp', 'mov', ' rbp', ', rsp', 'ret']  # recur: one token each
    assert [tokenizer.decode([token]) for token in tokens] == words
    assert tokens[1] == tokens[3]  # the register, whatever is done with it
    assert tokenizer.decode(tokens) == ''.join(lines)
    seen = [tokenizer.decode([token]) for token in range(260, tokenizer.size)]
    assert seen and all(any(text in word for word in words) for text in seen)


def test_a_token_of_a_listing_may_be_a_whole_instruction_but_no_more():
    lines = ['push rbp', 'mov rbp, rsp', 'ret']
    tokenizer = tokenizers.train_tokenizer(['\n'.join(lines)] * 9, 600, pieces='lines')
    ids, mask = tokenizer.encode(['\n'.join(lines)], 64)
    assert [tokenizer.decode([token]) for token in ids[0][mask[0]][1:-1]] == lines


def test_registers_of_built_in_listings_are_told_by_name_or_by_kind(tmp_path):
    listings = {}
    for registers in ('keep', 'class'):
        made = code.prepare_code(
            None, tmp_path, synthetic_sizes={'train': 3, 'val': 1, 'test': 1}, registers=registers
        )
        split = code.CodeFunctions(made, 'train')
        listings[registers] = [split.record(row)['binary'] for row in range(len(split))]
    for named, kinds in zip(*listings.values(), strict=True):
        assert re.sub(r'\bq[0-9]+', 'q', named) == kinds != named


def test_tabs_part_the_words_of_an_instruction_too():
    listing = '\tpushq\t%rbp\n\tmovq\t%rsp,\t%rbp\n'
    tokenizer = tokenizers.train_tokenizer([listing] * 9, 600, pieces='words')
    ids, mask = tokenizer.encode([listing], 64)
    words = [tokenizer.decode([token]) for token in ids[0][mask[0]][1:-1]]
    assert words == ['\tpushq', '\t%rbp', '\tmovq', '\t%rsp', ',\t%rbp']
    ids, mask = tokenizer.encode(['pushq\t\t%rbp'], 64)  # what parts them more widely is apart
    assert tokenizer.decode(ids[0][mask[0]]) == 'pushq\t\t%rbp'


def test_tokens_travel_to_other_processes(functions):
    rng = np.random.default_rng(0)
    other = pickle.loads(pickle.dumps(functions))
    np.testing.assert_array_equal(
        other.example(9, rng, True)['binary'], functions.example(9, rng, True)['binary']
    )


def test_a_split_needs_one_file(tmp_path):
    write(tmp_path / 'train.jsonl', [row(0)])
    with pytest.raises(UserError, match=r'has no val\.jsonl and no val\.jsonl\.gz'):
        opened(tmp_path)
    write(tmp_path / 'train.jsonl.gz', [row(0)])
    with pytest.raises(UserError, match=r'both train\.jsonl and train\.jsonl\.gz: remove one'):
        code.split_files(tmp_path)
    with pytest.raises(UserError, match='is not a folder'):
        code.split_files(tmp_path / 'none')


def test_changed_rows_are_prepared_anew(tmp_path):
    for split in ('train', 'val'):
        write(tmp_path / f'{split}.jsonl', [row(0)])
    before = opened(tmp_path).fingerprint()
    assert opened(tmp_path).fingerprint() == before
    write(tmp_path / 'train.jsonl', [row(0), row(1)])
    assert opened(tmp_path).fingerprint()['size'] == 2


# C files ------------------------------------------------------------------------------------


@pytest.fixture
def prepared(monkeypatch):
    """Stands in for the compiler; returns the calls it got."""
    calls = []

    def prepare(root, output, *, progress, **options):
        calls.append(options)
        output.mkdir(parents=True)
        for done in (1, 2):
            progress('train', done, 2)
        (output / 'report.json').write_text('{"rows": {"train": 4}}')

    monkeypatch.setattr(code_prepare, 'prepare', prepare)
    found = types.SimpleNamespace(identity='gcc (Debian 12) 12.2.0')
    monkeypatch.setattr(build, 'find_compiler', lambda choice: found)
    return calls


def test_c_files_are_compiled_once_for_their_content_and_options(tmp_path, prepared):
    folder, cache = tmp_path / 'c', tmp_path / 'cache'
    (folder / 'lib').mkdir(parents=True)
    (folder / 'lib/a.c').write_text('int f;')
    (folder / 'lib/a.h').write_text('')
    (folder / 'notes.txt').write_text('')
    make = lambda **options: code_prepare.compile_once(str(folder), cache, wait=False, **options)
    first, report = make(seed=1)
    assert report == {'rows': {'train': 4}}
    assert prepared == [{'seed': 1, 'workers': 2, 'compiler': 'auto'}]
    (folder / 'notes.txt').write_text('more')
    assert make(seed=1)[0] == first and len(prepared) == 1
    assert code_prepare.compile_once(str(folder), cache, wait=True, seed=1)[0] == first
    assert make(seed=2)[0] != first and len(prepared) == 2
    (folder / 'lib/a.h').write_text('#define N 3')
    assert make(seed=1)[0] != first and len(prepared) == 3
    (folder / 'lib/a.h').rename(folder / 'a.h')
    make(seed=1)
    assert len(prepared) == 4 and not list(cache.glob('.*'))


def test_another_compiler_or_code_compiles_anew_and_workers_do_not(tmp_path, prepared, monkeypatch):
    (tmp_path / 'c').mkdir()
    make = lambda **options: code_prepare.compile_once(
        str(tmp_path / 'c'), tmp_path / 'cache', wait=False, **options
    )[0]
    made = [make(workers=3)]
    assert prepared[-1]['workers'] == 3 and make(workers=1) == made[0] and len(prepared) == 1
    newer = types.SimpleNamespace(identity='gcc (Debian 13) 12.2.0')
    monkeypatch.setattr(build, 'find_compiler', lambda choice: newer)
    made.append(make())
    asked = []
    monkeypatch.setattr(builders, 'source_digest', lambda *names: asked.extend(names) or 'other')
    made.append(make())
    assert len(set(made)) == 3 == len(prepared)
    assert asked == ['recipes/contrabin/c_projects/*.py']


def test_a_digest_of_sources_is_that_of_their_text(monkeypatch, tmp_path):
    (tmp_path / 'code_a.py').write_text('1')
    monkeypatch.setattr(builders, '__file__', str(tmp_path / 'data/prepare.py'))
    before = builders.source_digest('code_*.py')
    assert builders.source_digest('code_*.py') == before
    (tmp_path / 'code_a.py').write_text('2')
    assert builders.source_digest('code_*.py') != before


def test_progress_is_told_now_and_then(tmp_path, prepared, monkeypatch, capsys):
    def make():
        progress = contrabin.progress_lines('compiling', 'files')
        code_prepare.compile_once(str(tmp_path), tmp_path / 'cache', wait=False, progress=progress)

    make()
    assert capsys.readouterr().err == ''  # it was done within seconds
    shutil.rmtree(tmp_path / 'cache')
    monkeypatch.setattr(contrabin, 'PROGRESS_SECONDS', 0.0)
    make()
    lines = [f'compiling train: {done} of 2 files' for done in (1, 2)]
    assert capsys.readouterr().err.splitlines() == lines


def test_compiled_rows_are_given_out_with_their_report(tmp_path):
    (tmp_path / 'made').mkdir()
    for name in ('train.jsonl.gz', 'report.json'):
        (tmp_path / 'made' / name).write_text(name)
    task = types.SimpleNamespace(compiled=(tmp_path / 'made', 'a table'))
    told = contrabin.ContraBinTask.prepare(task, tmp_path / 'out')
    assert told.startswith('a table') and str(tmp_path / 'out') in told
    written = {path.name: path.read_text() for path in (tmp_path / 'out').iterdir()}
    assert written == {name: name for name in ('train.jsonl.gz', 'report.json')}


class Bucket(dict):
    """A folder that only epath reaches: name → bytes."""

    def mkdir(self, parents, exist_ok):
        assert parents and exist_ok

    def __truediv__(self, name):
        return types.SimpleNamespace(write_bytes=lambda data: self.update({name: data}))


def test_compiled_rows_are_given_out_to_a_folder_that_is_not_local(tmp_path):
    (tmp_path / 'report.json').write_text('{}')
    output = Bucket()
    task = types.SimpleNamespace(compiled=(tmp_path, 'a table'))
    contrabin.ContraBinTask.prepare(task, output)
    assert output == {'report.json': b'{}'}


def test_who_waits_for_the_compiler_gives_up_in_one_sentence(tmp_path, prepared):
    wait = dict(wait=True, timeout=0.3)
    with pytest.raises(UserError, match=r'gave no sign of life for 0\.3 s'):
        code_prepare.compile_once(str(tmp_path), tmp_path / 'cache', **wait)
    with pytest.raises(UserError, match=r'data\.c_files .*none is not a folder'):
        code_prepare.compile_once(str(tmp_path / 'none'), tmp_path / 'cache', **wait)
    assert not prepared


@pytest.mark.skipif(
    not (shutil.which('gcc') and shutil.which('objdump')), reason='gcc and objdump are needed'
)
def test_the_options_are_those_of_the_compiler(tmp_path):
    pytest.importorskip('tree_sitter_c')
    (tmp_path / 'a.c').write_text('/* Scales the number given. */\nint f(int n) { return n * 9; }')
    found, report = code_prepare.compile_once(
        str(tmp_path),
        tmp_path / 'cache',
        wait=False,
        seed=0,
        compiler='gcc',
        split_by='file',
        val=0.0,
        test=0.0,
        min_instructions=2,
        max_instructions=99,
        symbols=False,
        registers='keep',
        flags=('-DN=3',),
        time_limit=9.0,
    )
    assert report['rows'] == {'train': 4} and report['settings']['flags'] == ['-DN=3']
    assert code.split_files(found)['train'].stat().st_size > 100
