"""C of unknown origin compiles within limits, reads only what it may, and keeps its functions."""

import contextlib
import itertools
import os
import re
import shutil
import subprocess
import time

import pytest

from mmjax.errors import RecordError, UserError
from mmjax.recipes.contrabin.c_projects import build as code_build

if not (shutil.which('gcc') and shutil.which('objdump')):
    pytest.skip('gcc and objdump are needed', allow_module_level=True)


@pytest.fixture(scope='module')
def compiler():
    return code_build.find_compiler('gcc')


@pytest.fixture
def build(tmp_path, compiler):
    """Returns what compiles the text of one file: symbol → listing."""
    root, work = tmp_path / 'root' / 'project', tmp_path / 'work'
    (root / 'sub').mkdir(parents=True)
    work.mkdir()

    def run(text, level='O0', time_limit=20.0, folders=(), flags=()):
        file = root / 'a.c'
        file.write_text(text)
        code_build.check_text(text.encode(), 'a.c')
        folders = tuple(root / folder for folder in folders)
        builder = code_build.Builder(compiler, root, folders, flags, time_limit)
        return builder.functions(file, level, work)

    run.root, run.work = root, work
    return run


def refused(build, text, reason='refused', **options):
    with pytest.raises(RecordError) as caught:
        build(text, **options)
    assert caught.value.reason == reason, caught.value
    return str(caught.value)


@pytest.mark.parametrize('level', code_build.LEVELS)
def test_functions_survive_optimisation_under_their_names(build, level):
    """Static, inlined everywhere, never called, equal to another, with a constant argument."""
    cut = '{ if (a < 3) return b; while (a--) { b *= work(a); b ^= work(b + a);'
    cut += ' b += work(b) * work(a); } return b; }'
    text = f"""
    int work(int); void __attribute__((cold, noreturn)) die(int);
    static int once(int a) {{ return a * 3; }}
    static inline int never(int a) {{ return -a; }}
    static __attribute__((noinline)) int one(int a, int b) {cut}
    static __attribute__((noinline)) int two(int a, int b) {cut}
    static int part(int a, int b) {cut}
    int caller(int a) {{ if (a < 0) die(a); return once(a) + one(a, 5) * two(a, 5); }}
    int third(int a) {{ return part(a, 5) + part(a + 1, 6); }}
    int fourth(int a) {{ return part(a, 5) * part(a + 2, 9); }}"""
    listed = build(text, level)
    callers = {'caller', 'third', 'fourth'}
    assert set(listed) == {'once', 'never', 'one', 'two', 'part'} | callers
    assert 'work' in listed['two'] and 'work' in listed['part']


def test_headers_of_the_project_are_found_and_hide_none_of_the_system(build):
    (build.root / 'include').mkdir()
    (build.root / 'sub' / 'own.h').write_text('#define OWN 7\n')
    (build.root / 'include' / 'string.h').write_text('#error hidden\n')
    text = '#include <string.h>\n#include <own.h>\nint f(char *a) { return strlen(a) + OWN; }'
    assert set(build(text, folders=('include', 'sub'))) == {'f'}
    message = refused(build, text, 'does_not_compile')
    assert message.startswith('a.c:2:10: fatal error: own.h: No such file')


def test_headers_are_found_by_the_name_of_their_folder(tmp_path, compiler):
    root = tmp_path / 'root'
    for place, text in (
        ('one/include/one/own.h', '#define OWN 7\n'),
        ('one/library/a.c', '#include "one/own.h"\nint f(void) { return OWN; }'),
        ('two/b.c', '#include "one/own.h"\nint f(void) { return OWN; }'),
    ):
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        (root / place).write_text(text)
    files, headers, _ = code_build.find_projects(root)
    folders = ('one/include/one', 'one/include', 'one')
    assert set(headers['one']) == {root / folder for folder in folders}
    listed = {}
    for project, (file,) in files.items():
        work = tmp_path / project
        work.mkdir()
        builder = code_build.Builder(compiler, root / project, headers[project])
        with contextlib.suppress(RecordError):
            listed[project] = builder.functions(file, 'O0', work)
    assert set(listed) == {'one'} and '$0x7' in listed['one']['f']


@pytest.mark.parametrize('kind', ['itself', 'macro'])
def test_bombs_end_at_the_time_limit(build, kind):
    text = '#if __INCLUDE_LEVEL__ < 100\n#include __FILE__\n#include __FILE__\n#endif\n'
    if kind == 'macro':
        names = 'abcdefghijklmnopqrstuvwxyzABCDEF'
        text = '#define a 1+1\n'
        text += ''.join(f'#define {y} {x}+{x}\n' for x, y in itertools.pairwise(names))
        text += 'int f(void) { return F; }\n'
    began = time.monotonic()
    message = refused(build, text, 'time_limit', time_limit=0.5)
    assert 'took over 0.5 s' in message and time.monotonic() - began < 5


def test_no_process_outlives_the_time_limit(build, compiler):
    builder = code_build.Builder(compiler, build.root, (), (), 0.3)
    script = 'sleep 77.125 & echo $! > child; wait'
    with pytest.raises(RecordError, match='took over'):
        builder._run(['/bin/sh', '-c', script], build.work, 'a.c')
    child = int((build.work / 'child').read_text())
    deadline = time.monotonic() + 5
    while _alive(child) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not _alive(child)


def _alive(process):
    try:
        with open(f'/proc/{process}/stat') as file:
            return file.read().rpartition(')')[2].split()[0] != 'Z'
    except FileNotFoundError:
        return False


def test_programs_run_within_limits_and_without_the_environment(build, compiler, monkeypatch):
    monkeypatch.setenv('SECRET', 'word')
    builder = code_build.Builder(compiler, build.root)
    script = 'ulimit -t; ulimit -v; ulimit -f; ulimit -c; env; pwd; cat'
    said = builder._run(['/bin/sh', '-c', script], build.work, 'a.c').split('\n')
    assert said[:4] == ['21', str(2 << 20), str(64 << 11), '0']
    names = {line.split('=')[0] for line in said[4:] if '=' in line}
    assert names - {'PWD', '_', 'SHLVL', 'OLDPWD'} == {'PATH', 'LC_ALL', 'TMPDIR'}
    assert str(build.work) in said


def test_a_large_object_is_not_written(build):
    refused(build, 'char huge[1ul << 33] = {1};', 'does_not_compile')
    assert sum(file.stat().st_size for file in build.work.iterdir()) < 65 << 20


@pytest.mark.parametrize(
    'line',
    [
        '__asm__(".incbin \\"/etc/passwd\\"");',
        '__asm__(".inc" "bin \\"/etc/passwd\\"");',
        '__asm__(".string \\"a\\"; .INCLUDE \\"/etc/passwd\\"");',
        '__asm__("/* \\" */ .incbin \\"/etc/passwd\\"");',
        '__asm__(".macro m a\\n.\\\\a\\\\()bin \\"/etc/passwd\\"\\n.endm\\nm inc");',
        '__asm__(".irep x,bin\\n.inc\\\\x \\"/etc/hostname\\"\\n.endr");',
        '__asm__(".irepc x,b\\n.inc\\\\x\\()in \\"/etc/hostname\\"\\n.endr");',
        '__asm__(".rep 1\\n.byte 1\\n.endr");',
        '__asm__(".if 0\\n.endif\\n.byte \\\\x");',
        '__attribute__((section(".x\\n.incbin \\"/etc/hostname\\" #"))) int placed = 3;',
        '#include "/etc/passwd"',
        '#  include </dev/stdin>',
        '#embed "/etc/passwd"',
        '#include "../outside.h"',
        '#define WHERE "../outside.h"\n#include WHERE',
        '#include "link.h"',
    ],
)
def test_what_reads_other_files_is_refused(build, line):
    (build.root.parent / 'outside.h').write_text('int outside;\n')
    (build.root / 'link.h').symlink_to('../outside.h')
    refused(build, f'{line}\nint f(void) {{ return 1; }}\n')


@pytest.mark.parametrize('spelt', ['.irep x,bin\\n.inc\\\\x', '.include', '.incbin'])
def test_the_assemblers_own_list_of_what_it_read_is_checked(build, monkeypatch, spelt):
    """Whatever a directive is spelt like that no pattern knows."""
    monkeypatch.setattr(code_build, '_READS', re.compile('(?!)'))
    monkeypatch.setattr(code_build, '_TEXT', re.compile('.*'))
    outside = build.root.parent / 'outside.s'
    outside.write_text('.byte 7\n')
    end = '\\n.endr' if 'irep' in spelt else ''
    line = f'__asm__("{spelt} \\"{{}}\\"{end}");\nint f(void) {{{{ return 1; }}}}\n'
    assert 'outside.s, outside' in refused(build, line.format(outside))
    inside = build.root / 'inside.s'
    inside.write_text('.byte 7\n')
    assert 'f' in build(line.format(inside))


@pytest.mark.parametrize('folder', [False, True])
def test_a_precompiled_header_is_never_taken(build, compiler, folder):
    """It would be loaded as it is, and what it was made from need not be the header beside it."""
    (build.root / 'h.h').write_text('#define OWN 7\n')
    (build.work / 'other.h').write_text('#define OWN 999\n')
    if folder:
        (build.root / 'h.h.gch').mkdir()
    made = build.root / 'h.h.gch' / 'any' if folder else build.root / 'h.h.gch'
    command = [compiler.path, *code_build._FLAGS['gcc'], '-std=gnu17', '-O0', '-x', 'c-header']
    subprocess.run([*command, build.work / 'other.h', '-o', made], check=True)
    assert made.stat().st_size > 1000
    assert '$0x7,%eax' in build('#include "h.h"\nint f(void) { return OWN; }')['f']


def test_folders_of_headers_are_ordered_once_a_folder(build, monkeypatch):
    (build.root / 'sub' / 'own.h').write_text('')
    asked, relative = [], os.path.relpath

    def relpath(folder, place):
        asked.append(folder)
        return relative(folder, place)

    monkeypatch.setattr(code_build.os.path, 'relpath', relpath)
    for level in ('O0', 'O2'):
        build('#include <own.h>\nint f(void) { return 1; }', level, folders=('sub',))
    assert sorted(asked) == [build.root, build.root / 'sub']


def test_what_only_looks_so_is_not_refused(build):
    text = '#include "sub/../own.h"\nconst char *text = ".incbin \\"x\\"\\t\\\\x";\n'
    text += '#line 7 "in\\\\c.y"\n__asm__(".byte 1");\n'
    (build.root / 'own.h').write_text('int own;\n')
    assert 'include' in build(text + 'int include(void) { return 1; }')


@pytest.mark.parametrize(
    'flag', ['-fplugin=x.so', '-include/etc/passwd', '@file', '-o/tmp/x', '-Iabsent', '-D1', 'x.c']
)
def test_only_flags_of_the_list_pass(flag):
    with pytest.raises(UserError, match='the compiler flag'):
        code_build.check_flags([flag])


def test_flags_of_the_list_reach_the_compiler(build, tmp_path):
    (tmp_path / 'extra').mkdir()
    (tmp_path / 'extra' / 'extra.h').write_text('#define EXTRA 3\n')
    flags = code_build.check_flags([f'-I{tmp_path}/extra', '-DA=(1 + 2)', '-std=c89'])
    text = '#include "extra.h"\nint f(void) { return A + EXTRA; } // no comment in c89'
    assert 'does_not' not in refused(build, text, 'does_not_compile', flags=flags)
    assert set(build(text.split('//')[0], flags=flags)) == {'f'}


def test_a_compiler_is_known_by_what_each_program_says_of_itself(compiler):
    first = lambda name: subprocess.run(
        [name, '--version'], capture_output=True, text=True, check=True, env={'LC_ALL': 'C'}
    ).stdout.splitlines()[0]
    assert compiler.identity == f'{first(compiler.path)}; {first(shutil.which("objdump"))}'


def test_a_missing_compiler_is_told(monkeypatch):
    monkeypatch.setenv('PATH', '/nowhere')
    with pytest.raises(UserError, match='gcc is not on the PATH'):
        code_build.find_compiler()
