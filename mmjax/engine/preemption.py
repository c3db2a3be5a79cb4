"""Handles SIGTERM and SIGINT: the first saves and stops the run, the second ends it at once."""

import os
import signal
import socket
import threading
from typing import Any, Self

import jax

EXIT_CODE = 75  # EX_TEMPFAIL: saved, the same command continues


class Preempted(Exception):
    """Raised when a run stops because of a signal."""


class Preemption:
    """Watches for signals while the run is inside it (`with Preemption() as preemption`).

    Python runs signal handlers only between bytecodes, which a compilation delays by minutes. The
    C handler writes to the wake-up descriptor at once, so a thread sees both signals in time.
    Several hosts agree on the step to stop at through the distributed runtime, which handles
    SIGTERM itself; there SIGINT is passed on as SIGTERM.
    """

    def __init__(self) -> None:
        self._requested = threading.Event()
        self._previous: dict[int, Any] = {}  # signal → its handler before

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            return self
        self._read, self._write = socket.socketpair()
        self._write.setblocking(False)
        distributed = jax.process_count() > 1
        for number in (signal.SIGINT,) if distributed else (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, lambda *_: None)
        self._wakeup = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(distributed,), daemon=True).start()
        return self

    def _watch(self, distributed: bool) -> None:
        while number := self._read.recv(1):
            if number[0] not in (signal.SIGINT, signal.SIGTERM):
                continue
            if self._requested.is_set():
                os.write(2, b'\nsecond signal: stopping at once, without saving\n')
                os._exit(128 + number[0])
            self._requested.set()
            if distributed and number[0] == signal.SIGINT:
                os.kill(os.getpid(), signal.SIGTERM)

    def __exit__(self, *_: object) -> None:
        if not self._previous:
            return
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        self._write.close()

    def at_step(self, step: int) -> bool:
        """Whether to save and stop after `step`; called on every host at every step, all agree."""
        if jax.process_count() == 1:
            return self._requested.is_set()
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(step)

    def check(self) -> None:
        """Raises Preempted after a signal, in code that does not need the other hosts."""
        if jax.process_count() == 1 and self._requested.is_set():
            raise Preempted
