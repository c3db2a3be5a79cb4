"""Large arrays in large pages of memory, where Linux gives them to programs that ask."""

import os
import pathlib
import sys

SETTING = pathlib.Path('/sys/kernel/mm/transparent_hugepage/enabled')
TUNABLES, ASK = 'GLIBC_TUNABLES', 'glibc.malloc.hugetlb=1'


def restart() -> None:
    """Starts the program anew, as the same process, so that it asks for huge pages; once.

    XLA:CPU takes its memory from the C library anew in every step, and the kernel clears it page by
    page: with pages of 4 KiB that is several percent of a step (`benchmarks/sign_layers.py`). The C
    library asks for large ones if its environment says so when a program starts, which nobody
    thinks of. Returns where that is so already, where GLIBC_TUNABLES says anything, and where the
    kernel does not wait to be asked.
    """
    try:
        waits = sys.platform == 'linux' and '[madvise]' in SETTING.read_text()
    except OSError:
        waits = False
    if waits and TUNABLES not in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os.execve(sys.executable, sys.orig_argv, {**os.environ, TUNABLES: ASK})
