"""Programs that ask for huge pages: once, and only where that is of use."""

import multiprocessing
import os
import pathlib
import subprocess
import sys

import pytest

from mmjax import hugepages


@pytest.fixture
def started(monkeypatch, tmp_path):
    """What would have been started in place of this program; the kernel waits to be asked."""
    calls, setting = [], tmp_path / 'enabled'
    setting.write_text('always [madvise] never\n')
    monkeypatch.setattr(hugepages, 'SETTING', setting)
    monkeypatch.setattr(os, 'execve', lambda *call: calls.append(call))
    monkeypatch.setattr(sys, 'platform', 'linux')
    monkeypatch.setattr(sys, 'orig_argv', ['python', '-X', 'dev', '-m', 'mmjax.main', '--help'])
    monkeypatch.delenv(hugepages.TUNABLES, raising=False)
    return calls


def test_the_same_command_starts_again_and_asks(started):
    hugepages.restart('mmjax.main')
    ((program, arguments, environment),) = started
    assert program == sys.executable and arguments == sys.orig_argv
    assert environment == {**os.environ, 'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=1'}


@pytest.mark.parametrize(
    'text', ['[always] madvise never\n', 'always madvise [never]\n', None], ids=str
)
def test_it_does_not_where_asking_is_of_no_use(started, text):
    hugepages.SETTING.unlink()
    if text:
        hugepages.SETTING.write_text(text)
    hugepages.restart('mmjax.main')
    assert not started


def test_it_does_not_twice_nor_elsewhere(started, monkeypatch):
    monkeypatch.setattr(sys, 'platform', 'darwin')
    hugepages.restart('mmjax.main')
    monkeypatch.setattr(sys, 'platform', 'linux')
    monkeypatch.setenv(hugepages.TUNABLES, 'glibc.malloc.check=1')
    hugepages.restart('mmjax.main')
    assert not started


def test_it_does_not_as_part_of_another_program(started, monkeypatch):
    """A script or a notebook that runs the module, a debugger, a child of a pool."""
    for command in (['python', 'host.py'], ['python', '-m', 'pdb', '-m', 'mmjax.main']):
        monkeypatch.setattr(sys, 'orig_argv', command)
        hugepages.restart('mmjax.main')
    monkeypatch.setattr(sys, 'orig_argv', ['python', '-m', 'mmjax.main'])
    monkeypatch.setattr(multiprocessing, 'parent_process', lambda: object())
    hugepages.restart('mmjax.main')
    assert not started


def test_a_start_that_fails_is_none(started, monkeypatch):
    def fail(*call):
        raise OSError('too long')

    monkeypatch.setattr(os, 'execve', fail)
    hugepages.restart('mmjax.main')
    monkeypatch.setattr(os, 'execve', lambda *call: started.append(call))
    monkeypatch.setattr(sys, 'executable', '')
    hugepages.restart('mmjax.main')
    assert not started


@pytest.mark.skipif(sys.platform != 'linux', reason='asks Linux')
def test_a_script_starts_once_more_with_all_it_was_given(tmp_path):
    (tmp_path / 'enabled').write_text('always [madvise] never')
    script = tmp_path / 'a script.py'
    script.write_text(
        'import os, pathlib, sys\n'
        'from mmjax import hugepages\n'
        f'hugepages.SETTING = pathlib.Path({str(tmp_path / "enabled")!r})\n'
        'print(os.getpid(), flush=True)\n'
        'hugepages.restart(sys.argv[0])\n'
        'print(os.environ[hugepages.TUNABLES], sys.argv[1:], sys.flags.dev_mode)\n'
    )
    environment = {k: v for k, v in os.environ.items() if k != hugepages.TUNABLES}
    done = subprocess.run(
        [sys.executable, '-X', 'dev', str(script), '--a=b c', ''], capture_output=True, text=True,
        env={**environment, 'PYTHONPATH': str(pathlib.Path(__file__).parent.parent)},
    )  # fmt: skip
    first, second, told = done.stdout.splitlines()
    assert first == second and told == f"{hugepages.ASK} ['--a=b c', ''] True", done.stderr
