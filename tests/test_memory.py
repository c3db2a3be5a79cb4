"""Freed memory that is kept: no new pages where large buffers come and go, in threads too."""

import os
import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys, threading
import numpy as np
from mmjax import memory

print(memory.keep() if sys.argv[1] == 'keep' else None)

def work():
    for _ in range(3):
        np.ones(1 << 23)  # 64 MiB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        np.ones(1 << 23)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

thread = threading.Thread(target=work)
thread.start()
thread.join()
"""


def run(how: str, **environment) -> tuple[str, int]:
    clean = {name: x for name, x in os.environ.items() if not name.startswith('MALLOC_')}
    clean.pop('GLIBC_TUNABLES', None)
    done = subprocess.run(
        [sys.executable, '-c', SCRIPT, how], capture_output=True, text=True, check=True,
        env=clean | environment,
    )  # fmt: skip
    kept, faults = done.stdout.split()
    return kept, int(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='glibc')
def test_buffers_of_a_thread_are_no_new_pages_each_time():
    pages = 5 * (64 << 20) // os.sysconf('SC_PAGE_SIZE')
    kept, faults = run('keep')
    assert kept == 'True' and faults < pages / 20
    assert run('leave')[1] > 2 * faults + 100


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='glibc')
def test_what_the_user_set_stays():
    assert run('keep', MALLOC_ARENA_MAX='4')[0] == 'False'
