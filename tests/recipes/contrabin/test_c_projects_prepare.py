"""From a folder of C to rows: splits, twins, and every reason counted."""

import json
import os
import shutil

import pytest

from mmjax.data.faults import FaultReport
from mmjax.errors import RecordError, UserError
from mmjax.recipes.contrabin import folder as code_jsonl
from mmjax.recipes.contrabin.c_projects import build
from mmjax.recipes.contrabin.c_projects import prepare as code_prepare

pytest.importorskip('tree_sitter_c')
if not (shutil.which('gcc') and shutil.which('objdump')):
    pytest.skip('gcc and objdump are needed', allow_module_level=True)

LOOP = """
/* {comment} */
{kind}int {name}(int n, const int *values) {{
  int total = {start};
  for (int i = 0; i < n; i++) total += values[i] * {start};
  return total;
}}
"""


def loop(name, start, comment='Weighs and sums the values.', kind=''):
    return LOOP.format(name=name, start=start, comment=comment, kind=kind)


@pytest.fixture(scope='module')
def compiler():
    return build.find_compiler('gcc')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Five projects of one file, twins across them, and one file a fault."""
    root = tmp_path_factory.mktemp('code') / 'root'
    for number, project in enumerate(('alpha', 'beta', 'gamma', 'delta', 'epsilon')):
        (root / project).mkdir(parents=True)
        text = loop(f'own_{project}', number + 3) + loop('common', 2).replace('int i', 'int  i')
        (root / project / 'main.c').write_text(text.replace('common', f'common_{project}'))
    faulty = root / 'alpha'
    (faulty / 'broken.c').write_text('#include "config.h"\n' + loop('lost', 9))
    parts = [
        '#define GOES +\n/* Has a hole in it. */\nint hole(int a, int b) { return a GOES b; }',
        loop('bare', 10, 'Licensed to all of you.'),
        loop('brief', 11, 'Sums.'),
        loop('fold_it', 15, '{{{ fold_it(int) fold_it() again'),
        f'#ifdef ABSENT\n{loop("gone", 12)}\n#endif',
        '/* Returns the first value. */\nint tiny(int *a) { return *a; }',
        '/* Takes many steps. */\nint giant(int *a) {' + '*a ^= *a * 3;' * 200 + 'return 1; }',
        *(loop(f'again_{i}', 20 + i, 'Part of the module.') for i in range(3)),
        f'#ifdef ABSENT\n{loop("either", 13)}\n#else\n{loop("either", 14)}\n#endif',
    ]
    (faulty / 'many.c').write_text('\n'.join(parts))
    (faulty / 'latin.c').write_bytes(loop('latin', 30).encode() + b'/* caf\xe9 */\n')
    (faulty / 'empty.c').write_text('int none;\n')
    (faulty / 'large.c').write_text('/' + '*' * 2_000_000 + '/')
    (faulty / 'inside.c').symlink_to('empty.c')
    (faulty / 'passwd.c').symlink_to('/etc/passwd')
    (faulty / 'loop').symlink_to('..')
    os.mkfifo(faulty / 'pipe.c')
    return root


def prepare(root, output, **options):
    settings = dict(compiler='gcc', levels=('O0', 'O2'), min_instructions=8, val=0.2, test=0.2)
    return code_prepare.prepare(root, output, **{**settings, **options})


def rows(output, split):
    report = FaultReport(split, output)
    return list(code_jsonl.read(output / f'{split}.jsonl.gz', report))


@pytest.fixture(scope='module')
def made(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp('made') / 'out'
    ticks = []
    report = prepare(folder, output, progress=lambda *tick: ticks.append(tick))
    return output, report, ticks


def test_every_reason_is_counted(made):
    output, report, _ = made
    assert report == json.loads((output / 'report.json').read_text())
    assert report['files'] == {
        'link': 3,
        'no_file': 1,
        'too_large': 1,
        'found': 9,
        'compiled': 7,
        'nothing_to_compile': 1,
        'does_not_compile': 1,
        'not_utf8': 1,
    }
    functions = dict(report['functions'])
    assert functions == {
        'found': 24,
        'commented': 15,
        'kept': 7,
        'equal_source': 4,
        'no_binary': 3,
        'file_does_not_compile': 1,
        'no_comment': 1,
        'comment_too_short': 2,
        'comment_repeated': 3,
        'defined_twice': 2,
        'parse_error': 1,
    }
    assert report['binaries'] == {'not_in_object': 2, 'too_short': 2, 'too_long': 2}
    (example,) = report['examples']['does_not_compile']
    assert example.startswith('alpha/broken.c:1:10: fatal error: config.h: No such file')
    assert sum(report['rows'].values()) == 2 * functions['kept']


def test_rows_are_what_the_format_says(made, compiler):
    output, report, _ = made
    found = [row for split in ('train', 'val', 'test') for row in rows(output, split)]
    own = [row for row in found if row['name'] == 'own_beta']
    assert [row['opt_level'] for row in own] == ['O0', 'O2']
    for row in own:
        assert row['source'] == loop('own_beta', 4).split('*/')[1].strip()
        assert row['comment'] == 'Weighs and sums the values.'
        assert (row['path'], row['label'], row['language']) == ('beta/main.c', '', 'c')
        assert row['compiler'] == compiler.name == report['settings']['compiler']
        assert 'own_beta' not in row['binary'] and row['binary'].endswith('ret')
    assert own[0]['binary'] != own[1]['binary']


def test_projects_stay_whole_and_twins_are_kept_once(made):
    output, report, _ = made
    by_split = {split: rows(output, split) for split in ('train', 'val', 'test')}
    projects = {s: {row['path'].split('/')[0] for row in found} for s, found in by_split.items()}
    assert [len(projects[split]) for split in ('test', 'val', 'train')] == [1, 1, 3]
    assert len(set.union(*projects.values())) == 5
    twins = [(s, row) for s, found in by_split.items() for row in found if 'common' in row['name']]
    assert [s for s, _ in twins] == ['test', 'test']  # at two levels
    assert {s: len(found) for s, found in by_split.items()} == report['rows']


def test_progress_counts_files(made):
    _, _, ticks = made
    last = {split: (done, whole) for split, done, whole in ticks}
    assert list(last) == ['test', 'val', 'train']
    assert all(done == whole for done, whole in last.values())
    assert sum(whole for _, whole in last.values()) == 9


def test_table_names_counts_and_examples(made):
    text = code_prepare.table(made[1])
    assert 'files     ' in text and 'does not compile 1' in text
    assert 'does not compile, for one: alpha/broken.c:1:10: fatal error' in text


def test_the_same_bytes_whatever_the_workers(made, folder, tmp_path):
    prepare(folder, tmp_path / 'out', workers=3)
    for name in ('train', 'val', 'test'):
        name += '.jsonl.gz'
        assert (tmp_path / 'out' / name).read_bytes() == (made[0] / name).read_bytes()


def test_two_projects_are_split_by_file(tmp_path):
    for number in range(4):
        file = tmp_path / 'root' / f'p{number % 2}' / f'{number}.c'
        file.parent.mkdir(parents=True, exist_ok=True)
        # The same code under two texts: equal binaries of different sources are kept.
        file.write_text(loop(f'f{number}', 3) if number else loop('f', 3, kind='signed '))
    report = prepare(tmp_path / 'root', tmp_path / 'out', levels=['O2'])
    assert report['settings']['split_by'] == 'file'
    assert report['note'] == 'split by file: 2 projects make no three splits'
    assert set(report['rows']) <= {'train', 'val', 'test'} and sum(report['rows'].values()) == 2
    assert report['functions']['equal_source'] == 2


@pytest.mark.parametrize(('late', 'left'), [('O2', ['O0', 'O1']), ('O0', [])])
def test_a_level_that_takes_too_long_costs_no_level_before_it(tmp_path, monkeypatch, late, left):
    (tmp_path / 'root').mkdir()
    (tmp_path / 'root' / 'a.c').write_text(loop('f', 3) + loop('g', 4))
    (tmp_path / 'root' / 'b.c').write_text(loop('h', 5))
    compiled = build.Builder.functions

    def functions(self, file, level, folder):
        if file.name == 'a.c' and level == late:
            raise RecordError('time_limit', 'a.c: gcc took over 20 s')
        return compiled(self, file, level, folder)

    monkeypatch.setattr(build.Builder, 'functions', functions)
    options = dict(levels=('O0', 'O1', 'O2', 'O3'), val=0.0, test=0.0)
    report = prepare(tmp_path / 'root', tmp_path / 'out', **options)
    found = [(row['name'], row['opt_level']) for row in rows(tmp_path / 'out', 'train')]
    assert [level for name, level in found if name == 'f'] == left
    assert len(found) == 4 + 2 * len(left)
    if left:
        assert report['binaries']['time_limit'] == 4 and report['files']['compiled'] == 2
        assert report['examples']['time_limit'] == ['a.c: gcc took over 20 s, at O2']
    else:
        assert report['files']['time_limit'] == 1 and report['functions']['file_time_limit'] == 2


def test_splits_follow_from_seed_and_name(tmp_path):
    files = {f'p{n}': [tmp_path / f'p{n}' / 'a.c'] for n in range(40)}
    assign = lambda files, seed, **shares: {
        project: split
        for split, part in code_prepare._assign(
            files, tmp_path, 'project', **{'val': 0.1, 'test': 0.2, **shares}, seed=seed
        ).items()
        for project, _ in part
    }
    first = assign(files, 0)
    assert sorted(first.values()) == ['test'] * 8 + ['train'] * 28 + ['val'] * 4
    assert first == assign(dict(reversed(files.items())), 0) != assign(files, 1)
    few = {name: files[name] for name in ('p0', 'p1', 'p2')}
    assert sorted(assign(few, 5).values()) == ['test', 'train', 'val']
    assert sorted(assign(few, 5, val=0.05, test=0.9).values()) == ['test', 'train', 'val']
    assert set(assign(few, 5, val=0, test=0).values()) == {'train'}


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(flags=('-fplugin=x',)), "flag '-fplugin=x'"),
        (dict(max_instructions=9), 'no function under .* makes a row'),
    ],
)
def test_faults_leave_nothing_behind(tmp_path, options, message):
    (tmp_path / 'root' / 'p').mkdir(parents=True)
    (tmp_path / 'root' / 'p' / 'a.c').write_text(loop('f', 3))
    with pytest.raises(UserError, match=message):
        prepare(tmp_path / 'root', tmp_path / 'out', **options)
    assert [path.name for path in tmp_path.iterdir()] == ['root']


def test_rows_of_another_process_stay(folder, tmp_path):
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'report.json').write_text('{}')
    prepare(folder / 'beta', tmp_path / 'out', min_instructions=2)
    assert [path.name for path in tmp_path.iterdir()] == ['out']
    assert (tmp_path / 'out' / 'report.json').read_text() == '{}'


def test_binaries_that_an_earlier_split_has_are_counted(tmp_path):
    """Each row of a later split counts; twins within a split do not."""
    for number, project in enumerate(('alpha', 'beta', 'gamma')):
        (tmp_path / 'root' / project).mkdir(parents=True)
        types = ('int', 'signed', 'signed int')
        text = f'/* Adds the given number. */\n{types[number]} add(int a) {{ return a + 3; }}\n'
        text += loop(f'own_{project}', number + 5)
        (tmp_path / 'root' / project / 'main.c').write_text(text)
    options = dict(levels=('O0', 'O1'), min_instructions=1)
    report = prepare(tmp_path / 'root', tmp_path / 'out', **options)
    assert report['rows'] == {'test': 4, 'val': 4, 'train': 4}
    assert report['binaries'] == {'equal_in_another_split': 4}
    assert 'equal in another split 4' in code_prepare.table(report)
    (tmp_path / 'all').mkdir()
    for path in (tmp_path / 'root').glob('*/main.c'):
        path.rename(tmp_path / 'all' / f'{path.parent.name}.c')
    report = prepare(tmp_path / 'all', tmp_path / 'one', **options, val=0, test=0)
    assert report['rows'] == {'train': 12} and report['binaries'] == {}


def test_what_a_killed_process_left_is_replaced(tmp_path):
    (tmp_path / 'root').mkdir()
    (tmp_path / 'root' / 'a.c').write_text(loop('f', 3))
    partial = tmp_path / f'.out.{os.getpid()}.partial'
    for left in (partial, tmp_path / 'out'):
        left.mkdir()
    (partial / 'train.jsonl.gz').write_text('torn')
    prepare(tmp_path / 'root', tmp_path / 'out')
    assert {path.name for path in tmp_path.iterdir()} == {'root', 'out'}
    assert len(rows(tmp_path / 'out', 'train')) == 2


def test_an_output_that_cannot_be_written_to_is_one_sentence(tmp_path):
    (tmp_path / 'root').mkdir()
    (tmp_path / 'root' / 'a.c').write_text(loop('f', 3))
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match=r'file/out cannot be written to: .*Not a directory'):
        prepare(tmp_path / 'root', tmp_path / 'file' / 'out')
    options = dict(wait=False, compiler='gcc')
    with pytest.raises(UserError, match=r'file/code-c-\w+ cannot be written to'):
        code_prepare.compile_once(str(tmp_path / 'root'), tmp_path / 'file', **options)
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'notes.txt').write_text('mine')
    with pytest.raises(UserError, match=r'out cannot be written to: .*not empty'):
        prepare(tmp_path / 'root', tmp_path / 'out')
    assert [path.name for path in (tmp_path / 'out').iterdir()] == ['notes.txt']


def test_a_root_without_code_is_told(tmp_path):
    with pytest.raises(UserError, match='is not a folder'):
        prepare(tmp_path / 'absent', tmp_path / 'out')
    with pytest.raises(UserError, match=r'holds no C file'):
        prepare(tmp_path, tmp_path / 'out')


@pytest.mark.skipif(not shutil.which('clang'), reason='clang')
def test_clang_gives_llvm_ir(tmp_path):
    (tmp_path / 'root' / 'p').mkdir(parents=True)
    (tmp_path / 'root' / 'p' / 'a.c').write_text(loop('f', 3))
    report = prepare(tmp_path / 'root', tmp_path / 'out', compiler='auto')
    assert report['settings']['compiler'].startswith('clang-')
    assert rows(tmp_path / 'out', 'train')[0]['binary'].startswith('define i32 @self(i32 %v0')
