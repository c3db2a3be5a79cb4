"""Prints messages and one progress line, or plain lines where there is no terminal."""

import collections
import contextlib
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, TextIO


class Screen:
    """Prints to `stream` (None: nowhere); switches itself off if the stream fails."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self._live: Any = None  # a rich.live.Live
        self._console: Any = None  # a rich.console.Console
        self._points: collections.deque[tuple[float, int]] = collections.deque(maxlen=64)
        self._started = time.monotonic()
        self._printed = -math.inf
        self._stage = (0, '')
        with self._guard():
            if stream is not None and stream.isatty():
                from rich.console import Console

                console = Console(file=stream)
                self._console = None if console.is_dumb_terminal else console

    def message(self, text: str) -> None:
        with self._guard():
            text = self._encodable(text)
            if self._live:
                self._console.print(text, markup=False, highlight=False, soft_wrap=True)
            elif self._stream is not None:
                print(text, file=self._stream, flush=True)

    def progress(
        self,
        *,
        stage: str,
        index: int,
        stages: int,
        epoch: float,
        step: int,
        steps: int,
        loss: float,
        rate: float,
        examples_per_second: float,
        details: Mapping[str, float] | None = None,
    ) -> None:
        """Shows the position of the run: stage `index` (from 0) of `stages`, `step` of `steps`.

        A terminal shows one live line. Elsewhere plain lines appear, at most one every five
        seconds at first and one a minute in a long run. The time left follows the wall clock of
        the last 64 calls in this stage, with evaluations and checkpoints. A narrow terminal cuts
        the end of the line, so that what matters most stands first.

        Args:
          details: further numbers by name.
        """
        now = time.monotonic()
        entered = (index, stage) != self._stage
        self._stage = (index, stage)
        if entered:
            self._points.clear()
        self._points.append((now, step))  # of this stage
        left = f'{clock(self._seconds_left(steps - step))} left'
        head = f'{stage} {index + 1}/{stages}'
        speed = examples_per_second
        speed_text = f'{speed:,.0f}' if speed >= 100 else f'{speed:.3g}'
        numbers = {'loss': f'{loss:.4g}', 'rate': f'{rate:.3g}'}
        numbers |= {name: f'{value:.3g}' for name, value in (details or {}).items()}
        parts = [f'{name} {value}' for name, value in numbers.items()]
        parts = [f'step {step}/{steps}', left, *parts, f'{speed_text} examples/s']
        tail = '  '.join([*parts, f'epoch {epoch:.2f}'])
        with self._guard():
            if self._console:
                self._show(self._encodable(head), step / max(steps, 1), tail)
            elif self._stream is not None:
                pause = min(max(5.0, (now - self._started) / 100), 60.0)
                if entered or step >= steps or now - self._printed >= pause:
                    self._printed = now
                    print(self._encodable(f'{head}  {tail}'), file=self._stream, flush=True)

    def close(self) -> None:
        with self._guard():
            live, self._live = self._live, None
            if live:
                live.stop()

    def _show(self, head: str, fraction: float, tail: str) -> None:
        from rich.live import Live
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        line = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=1.0, completed=min(fraction, 1.0), width=16)
        cell = lambda text, style='': Text(text, style, no_wrap=True, overflow='ellipsis')
        line.add_row(cell(head, 'bold cyan'), bar, cell(f'{fraction:4.0%}'), cell(tail))
        if self._live is None:
            is_stdout = self._stream is sys.stdout  # then other prints go above the line too
            self._live = Live(
                line,
                console=self._console,
                auto_refresh=False,
                redirect_stdout=is_stdout,
                redirect_stderr=is_stdout and sys.stderr is not None and sys.stderr.isatty(),
            )
            self._live.start()
            self._console.show_cursor(True)  # a killed run must not leave the cursor hidden
        self._live.update(line, refresh=True)

    def _seconds_left(self, steps: int) -> float | None:
        (first, start), (last, end) = self._points[0], self._points[-1]
        return (last - first) / (end - start) * max(steps, 0) if end > start else None

    def _encodable(self, text: str) -> str:
        encoding = getattr(self._stream, 'encoding', None) or 'utf-8'
        return text.encode(encoding, 'replace').decode(encoding)

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        """Keeps errors of the screen inside: a closed pipe or terminal ends only the display."""
        try:
            yield
        except Exception as error:
            broken, live = self._stream, self._live
            self._stream = self._live = self._console = None
            if live:
                with contextlib.suppress(Exception):
                    live.stop()  # gives sys.stdout back
            if broken is sys.stdout and isinstance(error, BrokenPipeError):
                # Python's manual: later prints and the flush at exit then raise nothing.
                with contextlib.suppress(Exception), open(os.devnull, 'wb') as null:
                    os.dup2(null.fileno(), broken.fileno())


def clock(seconds: float | None) -> str:
    """Formats a duration: '42s', '7:05', '3:07:05', '2d 03h'; '?' if unknown."""
    if seconds is None or not math.isfinite(seconds):
        return '?'
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f'{hours // 24}d {hours % 24:02d}h'
    if hours:
        return f'{hours}:{minutes:02d}:{seconds:02d}'
    return f'{minutes}:{seconds:02d}' if minutes else f'{seconds}s'
