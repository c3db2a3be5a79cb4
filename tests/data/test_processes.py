"""Maps in processes: order, how far they read ahead, faults, and that none outlives its parent."""

import contextlib
import functools
import itertools
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from mmjax.data import processes
from mmjax.errors import UserError


def _square(x):
    return x * x, os.getpid()


def _faulty(x):
    if x == 11:
        raise UserError(f'item {x} is no good')
    return x


def _fatal(x):
    if x == 11:
        os.kill(os.getpid(), signal.SIGKILL)
    return bytes(200_000)  # more than a pipe holds: the others are at writing when it dies


def _listed(folder, x):
    (pathlib.Path(folder) / str(x)).touch()
    return x


def test_order_does_not_depend_on_the_number_of_processes():
    for workers in (0, 1, 3):
        results = list(processes.ordered(_square, range(50), chunk=4, workers=workers))
        assert [x for x, _ in results] == [x * x for x in range(50)]
        others = {pid for _, pid in results} - {os.getpid()}
        assert len(others) <= 3 and bool(others) == (workers > 1)


def test_little_work_starts_no_process():
    results = list(processes.ordered(_square, range(7), chunk=4, workers=3))
    assert {pid for _, pid in results} == {os.getpid()}
    assert list(processes.ordered(_square, [], chunk=4, workers=3)) == []


def test_endless_items_are_read_little_ahead(tmp_path):
    listed = functools.partial(_listed, str(tmp_path))
    results = processes.ordered(listed, itertools.count(), chunk=2, workers=2)
    with contextlib.closing(results):
        assert list(itertools.islice(results, 21)) == list(range(21))
    assert len(list(tmp_path.iterdir())) <= 21 + 2 * 2 * 8


def test_a_fault_comes_through_and_a_dead_process_is_a_user_error():
    with pytest.raises(UserError, match='item 11 is no good'):
        list(processes.ordered(_faulty, range(40), chunk=2, workers=2))
    with pytest.raises(UserError, match='a process that makes data died'):
        list(processes.ordered(_fatal, range(200), chunk=2, workers=3))


_PARENT = """
import itertools, os, sys
sys.path.insert(0, {here!r})
from mmjax.data import processes
from tests.data import test_processes

if __name__ == '__main__':
    results = processes.ordered(test_processes._square, itertools.count(), chunk=1, workers=2)
    print(os.getpid(), *{{next(results)[1] for _ in range(400)}}, flush=True)
    for _ in results:
        pass
"""


def test_no_process_outlives_a_killed_parent(tmp_path):
    script = tmp_path / 'parent.py'
    script.write_text(_PARENT.format(here=str(pathlib.Path(__file__).parents[2])))
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    parent_pid, *children = map(int, parent.stdout.readline().split())
    assert parent_pid == parent.pid and children
    parent.kill()
    parent.wait()
    end = time.monotonic() + 20
    while any(map(_alive, children)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(map(_alive, children))


_UNGUARDED = """
import pathlib, sys
from mmjax.data import processes
from mmjax.recipes.contrabin import data as code

processes.cores = lambda: 2
sizes = dict(train=500, val=8, test=8)
code.prepare_code(None, pathlib.Path(sys.argv[1]), synthetic_sizes=sizes)
"""


def test_a_script_without_a_guard_is_a_user_error(tmp_path):
    """Its processes do what it does: they would wait for a lock that it holds, and it for them."""
    script = tmp_path / 'script.py'
    script.write_text(_UNGUARDED)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / 'cache')],
        timeout=60,
        capture_output=True,
        text=True,
        env={**os.environ, 'PYTHONPATH': str(pathlib.Path(__file__).parents[2])},
    )
    assert done.returncode == 1 and "if __name__ == '__main__':" in done.stderr
    assert 'a process that makes data died' in done.stderr.splitlines()[-1]


def _alive(pid):
    try:
        stat = pathlib.Path(f'/proc/{pid}/stat').read_text()
    except OSError:
        return False
    return stat.rpartition(')')[2].split()[0] != 'Z'
