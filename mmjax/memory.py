"""How the C library of this process treats freed memory. Light: imported before anything else."""

import ctypes
import os

_ARENA_MAX, _MMAP_MAX, _TOP_PAD, _TRIM_THRESHOLD = -8, -4, -2, -1  # of <malloc.h>


def keep() -> bool:
    """Lets glibc keep memory that was freed, for what is allocated next; returns whether it does.

    XLA:CPU allocates its temporary buffers anew in every step. Left to itself glibc maps large ones
    and unmaps them after, so that the system clears all their pages in every step: a tenth of the
    processor time of a step of configs/sign_ctc.py:published (`benchmarks/sign_layers.py --step`).
    The process stays as large as it once was. To be called before threads begin, whose arenas stay.
    Another C library, or settings of the user's own in the environment, are left alone.
    """
    if any(name.startswith('MALLOC_') or name == 'GLIBC_TUNABLES' for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    # One arena: those of threads cannot hold what is large, and map it whatever MMAP_MAX says.
    settings = ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TOP_PAD, 64 << 20), (_TRIM_THRESHOLD, -1))
    return all(mallopt(name, value) == 1 for name, value in settings)
