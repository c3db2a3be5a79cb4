"""Programs that ask for huge pages: once, and only where that is of use."""

import os
import sys

import pytest
from runs import command

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
    hugepages.restart()
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
    hugepages.restart()
    assert not started


def test_it_does_not_twice_nor_elsewhere(started, monkeypatch):
    monkeypatch.setattr(sys, 'platform', 'darwin')
    hugepages.restart()
    monkeypatch.setattr(sys, 'platform', 'linux')
    monkeypatch.setenv(hugepages.TUNABLES, 'glibc.malloc.check=1')
    hugepages.restart()
    assert not started


def test_a_command_runs_the_same_either_way():
    for environment in ({}, {hugepages.TUNABLES: ''}):
        done = command('--help', env=environment)
        assert done.returncode == 0 and '--workdir' in done.stdout, done.stderr
