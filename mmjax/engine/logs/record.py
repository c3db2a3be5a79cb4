"""Writes metrics.jsonl, figures and TensorBoard events during a run, and shows its progress."""

import collections
import contextlib
import io
import math
import os
import re
import struct
import sys
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, TextIO

from etils import epath

from mmjax.engine.logs import files
from mmjax.engine.logs.screen import Screen

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_RESERVED = ('step', 'stage', 'epoch')
_REMOTE_SECONDS = 30.0  # an object store cannot append: the whole log is sent, at most this often


class Logs:
    """Writes the record of one run and shows its progress; does nothing unless `enabled`.

    The screen and TensorBoard never end a run: if one fails it is switched off, with a message
    while there is a screen. A metrics line that cannot be written raises OSError.

    Args:
      workdir: the folder of the run.
      enabled: True on process 0 only.
      tensorboard: whether to write TensorBoard events too.
      stream: where messages and progress go, standard output by default.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        *,
        enabled: bool,
        tensorboard: bool,
        stream: TextIO | None = None,
    ) -> None:
        self._workdir = epath.Path(workdir)
        self._path = self._workdir / 'metrics.jsonl'
        self._enabled = enabled
        self._tensorboard = tensorboard
        self._screen = Screen(stream if stream is not None else sys.stdout) if enabled else None
        self._writer: Any = None  # a tensorboardX.SummaryWriter
        self._remote: bytearray | None = None  # the whole text of a remote metrics.jsonl
        self._sent = -math.inf  # when it was last sent
        self._stage = ''

    def write(self, step: int, stage: str, epoch: float, values: Mapping[str, Any]) -> None:
        """Appends one line to metrics.jsonl; TensorBoard gets numbers as scalars, strings as text.

        Raises ValueError if `values` names step, stage or epoch, or holds something else.
        """
        if not self._enabled:
            return
        if reserved := [name for name in _RESERVED if name in values]:
            raise ValueError(f"'{reserved[0]}' is set by the log itself and cannot be a value")
        line = {'step': int(step), 'stage': stage, 'epoch': float(epoch), **values}
        line = files.plain(line, 'metrics.jsonl')
        if wrong := [name for name in line if not isinstance(line[name], int | float | str)]:
            name = wrong[0]
            raise ValueError(f"the value '{name}' is not a number or a string: {line[name]!r}")
        writer = self._open_tensorboard()  # before the append: it reads the last line of the file
        self._append(files.encode(line, 'metrics.jsonl') + b'\n')
        if writer is None:
            return
        with self._guard_tensorboard():
            texts = {name: value for name, value in values.items() if isinstance(value, str)}
            if stage != self._stage:
                texts['stage'] = self._stage = stage
            for name, value in texts.items():
                writer.add_text(name, value, line['step'])
            numbers = {n: float(v) for n, v in values.items() if not isinstance(v, str)}
            numbers['epoch'] = line['epoch']
            # One event per line: add_scalar queues one per value, which is 30 times slower.
            from tensorboardX.proto.summary_pb2 import Summary

            scalars = [Summary.Value(tag=n, simple_value=v) for n, v in numbers.items()]
            writer.file_writer.add_summary(Summary(value=scalars), line['step'])

    def figures(self, step: int, figures: Mapping[str, 'Figure']) -> None:
        """Saves matplotlib figures as figures/<name>.png, and sends them to TensorBoard.

        The label of a figure (`figure.set_label`) is its caption in the report. A figure that
        cannot be drawn gets a message; the others are saved.
        """
        if not self._enabled:
            return
        uses: collections.Counter[str] = collections.Counter()
        for title, figure in figures.items():
            name = re.sub(r'[^\w.-]+', '_', title)
            uses[name] += 1
            name += f'-{uses[name]}' if uses[name] > 1 else ''
            try:
                buffer = io.BytesIO()
                metadata = {'Description': str(figure.get_label() or ''), 'Step': str(int(step))}
                figure.savefig(buffer, format='png', dpi=120, metadata=metadata)
                content = buffer.getvalue()
                files.replace(self._workdir / 'figures' / f'{name}.png', content)
            except Exception as error:  # a figure must not end a run
                self.message(f"figure '{title}' could not be drawn: {error!r}")
                continue
            if writer := self._open_tensorboard():
                with self._guard_tensorboard():
                    from tensorboardX.proto.summary_pb2 import Summary

                    width, height = struct.unpack('>II', content[16:24])  # of the PNG header
                    image = Summary.Image(
                        width=width, height=height, colorspace=4, encoded_image_string=content
                    )
                    value = Summary.Value(tag=title, image=image)
                    writer.file_writer.add_summary(Summary(value=[value]), int(step))

    def message(self, text: str) -> None:
        """Prints lines of text, above the progress line if there is one."""
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
        details: Mapping[str, float] | None = None,
    ) -> None:
        """Shows the position of the run, see `Screen.progress`."""
        if self._screen:
            self._screen.progress(
                stage=stage,
                index=index,
                stages=stages,
                epoch=epoch,
                step=step,
                steps=steps,
                loss=loss,
                rate=rate,
                examples_per_second=examples_per_second,
                details=details,
            )

    def flush(self) -> None:
        """Sends the rest of a remote metrics.jsonl; call it before a checkpoint is saved."""
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
        if files.is_local(self._path):
            # Opened for every line: `truncate` may have replaced the file since the last one.
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open(self._path, 'ab') as file:
                file.write(line)
            return
        if self._remote is None:
            self._remote = bytearray(self._path.read_bytes() if self._path.exists() else b'')
        self._remote += line
        if time.monotonic() - self._sent > _REMOTE_SECONDS:
            self.flush()

    def _open_tensorboard(self) -> Any:
        """Returns the TensorBoard writer, opened at the first use, or None.

        Events after the last line of metrics.jsonl belong to steps that a kill undid: the first
        event of the new file tells TensorBoard to drop them.
        """
        if not self._tensorboard or self._writer is not None:
            return self._writer
        with self._guard_tensorboard():
            from tensorboardX import SummaryWriter

            folder = self._workdir / 'tensorboard'
            folder.mkdir(parents=True, exist_ok=True)
            earlier = sum('tfevents' in path.name for path in folder.iterdir())
            lines, _ = files.read(self._path)
            # The suffix orders the files and separates those opened within one second.
            self._writer = SummaryWriter(
                os.fspath(folder),
                purge_step=(lines[-1]['step'] + 1 if lines else 0) if earlier else None,
                flush_secs=5,
                filename_suffix=f'.{earlier:04d}',
            )
        return self._writer

    @contextlib.contextmanager
    def _guard_tensorboard(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._writer = None
            self._tensorboard = False
            self.message(f'TensorBoard is off: {error!r}')
