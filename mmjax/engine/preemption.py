"""SIGTERM and SIGINT: the first asks the run to save and stop, the second ends it at once."""

import os
import signal
import socket
import threading

import jax

EXIT_CODE = 75  # EX_TEMPFAIL: saved, run the same command again


class Preempted(Exception):
    """Raised where a run stops because a signal asked it to."""


class Preemption:
    """Watches for signals while the run is inside it (`with Preemption() as preemption`).

    Python runs signal handlers only between bytecodes, which a compilation delays by minutes; the
    wake-up descriptor is written by the C handler itself, so a thread sees both signals in time.
    Several hosts agree on the step to stop at through the distributed runtime, which takes
    SIGTERM itself; there SIGINT is passed on as SIGTERM.
    """

    def __init__(self):
        self._asked = threading.Event()
        self._restore = {}

    def __enter__(self):
        if threading.current_thread() is not threading.main_thread():
            return self
        self._read, self._write = socket.socketpair()
        self._write.setblocking(False)
        shared = jax.process_count() > 1
        signals = (signal.SIGINT,) if shared else (signal.SIGINT, signal.SIGTERM)
        for number in signals:
            self._restore[number] = signal.signal(number, lambda *_: None)
        self._wakeup = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(shared,), daemon=True).start()
        return self

    def _watch(self, shared: bool) -> None:
        while number := self._read.recv(1):
            if number[0] not in (signal.SIGINT, signal.SIGTERM):
                continue
            if self._asked.is_set():
                os.write(2, b'\nsecond signal: stopping at once, without saving\n')
                os._exit(128 + number[0])
            self._asked.set()
            if shared and number[0] == signal.SIGINT:
                os.kill(os.getpid(), signal.SIGTERM)

    def __exit__(self, *_):
        if not self._restore:
            return
        for number, handler in self._restore.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        self._write.close()

    def at_step(self, step: int) -> bool:
        """Whether to save and stop after `step`; every host calls it every step, all agree."""
        if jax.process_count() == 1:
            return self._asked.is_set()
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(step)

    def check(self) -> None:
        """Raises Preempted if a signal came; for places that one host may leave by itself."""
        if jax.process_count() == 1 and self._asked.is_set():
            raise Preempted
