"""The mapped axis that a step runs under, so that layers may reduce over all of its devices.

Under `jax.jit` over a mesh there is none: arrays are global there. Under `jax.pmap` the step binds
the axis, and batch statistics are summed over it.
"""

import contextlib
import contextvars
from collections.abc import Iterator

_NAME: contextvars.ContextVar[str | None] = contextvars.ContextVar('axis', default=None)


def name() -> str | None:
    """Returns the name of the bound axis, or None."""
    return _NAME.get()


@contextlib.contextmanager
def bound(axis: str | None) -> Iterator[None]:
    """Binds the name of the mapped axis while a function is traced."""
    token = _NAME.set(axis)
    try:
        yield
    finally:
        _NAME.reset(token)
