"""Large arrays in large pages of memory, where Linux gives them to programs that ask."""

import multiprocessing
import os
import pathlib
import sys

SETTING = pathlib.Path('/sys/kernel/mm/transparent_hugepage/enabled')
TUNABLES, ASK = 'GLIBC_TUNABLES', 'glibc.malloc.hugetlb=1'


def restart(program: str) -> None:
    """Starts the program anew, as the same process, so that it asks for huge pages; once.

    XLA:CPU takes its memory from the C library anew in every step, and the kernel clears it page by
    page: with pages of 4 KiB that is several percent of a step (`benchmarks/sign_layers.py --step`,
    with `GLIBC_TUNABLES=` before it for a comparison). The C library asks for large ones if its
    environment says so when a program starts.

    Returns where GLIBC_TUNABLES is set, even to nothing, where the kernel does not wait to be
    asked, and where this process is not `program` alone but, say, a notebook that runs it.

    Args:
      program: the module after -m, or the script, that Python was started with.
    """
    try:
        waits = sys.platform == 'linux' and '[madvise]' in SETTING.read_text()
    except OSError:
        waits = False
    if not waits or TUNABLES in os.environ or not sys.executable or not _is(program):
        return
    try:
        os.execve(sys.executable, sys.orig_argv, {**os.environ, TUNABLES: ASK})
    except OSError:  # it works without, too
        return


def _is(program):
    if multiprocessing.parent_process() or program not in sys.orig_argv:
        return False
    at = sys.orig_argv.index(program)
    module = at and sys.orig_argv[at - 1] == '-m' and '-m' not in sys.orig_argv[: at - 1]
    return bool(module or sys.argv[0] == program)
