"""Writes a run's record as it goes: metrics.jsonl, pictures, TensorBoard, the progress line."""

import collections
import contextlib
import io
import math
import os
import re
import sys
import time
from collections.abc import Mapping
from typing import Any

from etils import epath

from mmjax.engine.logs.files import encode, is_local, last_step, plain, replace
from mmjax.engine.logs.screen import Screen

_RESERVED = ('step', 'stage', 'epoch')
_REMOTE_SECONDS = 30.0  # an object store cannot append: the whole log is sent, at most this often


class Logs:
    """Writes what one run leaves, and shows how it goes; silent unless `enabled` (process 0).

    Screen and TensorBoard never end a run: where they fail they are switched off, with a message
    as long as there is a screen. A metrics line that cannot be written raises OSError.
    """

    def __init__(self, workdir, *, enabled: bool, tensorboard: bool, stream=None):
        self._workdir, self._enabled, self._tensorboard = epath.Path(workdir), enabled, tensorboard
        self._path = self._workdir / 'metrics.jsonl'
        self._screen = Screen(stream if stream is not None else sys.stdout) if enabled else None
        self._writer = None
        self._remote, self._sent = None, -math.inf  # text of a remote metrics.jsonl, when sent
        self._stage = None

    def write(self, step: int, stage: str, epoch: float, values: Mapping[str, Any]) -> None:
        """Appends one line to metrics.jsonl; numbers go to TensorBoard as scalars, words as text.

        Raises ValueError where `values` names step, stage or epoch, or holds something else.
        """
        if not self._enabled:
            return
        if clash := [name for name in _RESERVED if name in values]:
            raise ValueError(f"'{clash[0]}' is set by the log itself and cannot be a value")
        line = {'step': int(step), 'stage': stage, 'epoch': float(epoch), **values}
        line = plain(line, 'metrics.jsonl')
        if wrong := [name for name in line if not isinstance(line[name], int | float | str)]:
            raise ValueError(f"the value '{wrong[0]}' is no number or string: {line[wrong[0]]!r}")
        events = self._events()  # before the line: it looks at what the file ends with
        self._append(encode(line, 'metrics.jsonl') + b'\n')
        if events is None:
            return
        with self._guard_tensorboard():
            if stage != self._stage:
                events.add_text('stage', stage, line['step'])
                self._stage = stage
            for name, value in values.items():
                if isinstance(value, str):
                    events.add_text(name, value, line['step'])
            numbers = {n: float(v) for n, v in values.items() if not isinstance(v, str)}
            numbers['epoch'] = line['epoch']
            # One event a line: add_scalar queues one a value, 3.4 ms for 30 values instead of .1.
            from tensorboardX.proto.summary_pb2 import Summary

            scalars = [Summary.Value(tag=n, simple_value=v) for n, v in numbers.items()]
            events.file_writer.add_summary(Summary(value=scalars), line['step'])

    def figures(self, step: int, figures: Mapping[str, Any]) -> None:
        """Saves matplotlib Figures as figures/<name>.png, and sends them to TensorBoard.

        A figure's label (`figure.set_label`) is its caption in the report. A figure that cannot
        be drawn is reported, and the others are saved.
        """
        if not self._enabled:
            return
        taken = collections.Counter()
        for title, figure in figures.items():
            name = re.sub(r'[^\w.-]+', '_', title)
            taken[name] += 1
            name += f'-{taken[name]}' if taken[name] > 1 else ''
            try:
                content = _png(figure, step)
                replace(self._workdir / 'figures' / f'{name}.png', content)
            except Exception as error:  # a picture is not worth a run
                self.message(f"figure '{title}' could not be drawn: {_sentence(error)}")
                continue
            if events := self._events():
                with self._guard_tensorboard():
                    events.add_image(title, _pixels(content), int(step), dataformats='HWC')

    def message(self, text: str) -> None:
        """Prints lines of text; they stand above the progress line."""
        if self._screen:
            self._screen.message(str(text))

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
    ) -> None:
        """Shows where the run is: `index` from 0 of `stages`, `step` of `steps` of the whole run.

        One live line on a terminal; elsewhere plain lines, at most one every five seconds at
        first and one a minute in a long run. The time left follows the wall clock of the last 64
        calls in this stage, evaluations and checkpoints included.
        """
        if self._screen:
            self._screen.progress(
                stage,
                index,
                stages,
                epoch,
                step,
                steps,
                f'loss {loss:.4g}  rate {rate:.3g}  {_count(examples_per_second)} examples/s',
            )

    def flush(self) -> None:
        """Sends what a remote metrics.jsonl lacks; call it before a checkpoint is saved."""
        if self._remote is not None:
            self._path.write_bytes(bytes(self._remote))
            self._sent = time.monotonic()

    def close(self) -> None:
        """Ends the progress line and flushes everything; may be called twice."""
        if self._screen:
            self._screen.close()
        with self._guard_tensorboard():
            if self._writer is not None:
                self._writer.close()
        self._writer = None
        self.flush()

    def _append(self, line: bytes) -> None:
        if not is_local(self._path):
            if self._remote is None:
                self._remote = bytearray(self._path.read_bytes() if self._path.exists() else b'')
            self._remote += line
            if time.monotonic() - self._sent > _REMOTE_SECONDS:
                self.flush()
            return
        # Opened for every line, so that a file replaced by `truncate` is never written behind.
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with open(self._path, 'ab') as file:
            file.write(line)

    def _events(self):
        """Returns the TensorBoard writer, opened at the first use, or None.

        Events past the last line of metrics.jsonl belong to steps that a kill undid: the new
        file's first event tells TensorBoard to drop them.
        """
        if not self._tensorboard or self._writer is not None:
            return self._writer
        with self._guard_tensorboard():
            from tensorboardX import SummaryWriter

            target = self._workdir / 'tensorboard'
            target.mkdir(parents=True, exist_ok=True)
            old = sum('tfevents' in path.name for path in target.iterdir())
            # The suffix orders files and keeps apart those opened within one second.
            self._writer = SummaryWriter(
                os.fspath(target),
                purge_step=last_step(self._path) + 1 if old else None,
                flush_secs=5,
                filename_suffix=f'.{old:04d}',
            )
        return self._writer

    @contextlib.contextmanager
    def _guard_tensorboard(self):
        try:
            yield
        except Exception as error:
            self._writer, self._tensorboard = None, False
            self.message(f'TensorBoard is off: {_sentence(error)}')


def _png(figure, step: int) -> bytes:
    buffer = io.BytesIO()
    words = {'Description': str(figure.get_label() or ''), 'Step': str(int(step))}
    figure.savefig(buffer, format='png', dpi=120, metadata=words)
    return buffer.getvalue()


def _pixels(png: bytes):
    import numpy as np
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(png)).convert('RGB'))


def _sentence(error: Exception) -> str:
    text = ' '.join(str(error).split())
    return f'{type(error).__name__}: {text}' if text else type(error).__name__


def _count(value: float) -> str:
    return f'{value:,.0f}' if value >= 100 else f'{value:.3g}'
