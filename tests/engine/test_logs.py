"""The record of a run: strict JSON, whole files, logs cut back after a kill, failing screens."""

import io
import json
import math
import os
import pathlib
import pty
import shlex
import struct
import subprocess
import sys
import threading

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from matplotlib.figure import Figure
from PIL import Image

from mmjax.engine import logs
from mmjax.engine.logs import files, screen


def strict(text):
    def refuse(constant):
        raise AssertionError(f'{constant} is not JSON')

    return json.loads(text, parse_constant=refuse)


def lines_of(workdir):
    content = (pathlib.Path(workdir) / 'metrics.jsonl').read_text()
    assert content.endswith('\n')
    return [strict(line) for line in content.splitlines()]


def quiet(workdir, *, tensorboard=False, stream=None):
    return logs.Logs(workdir, enabled=True, tensorboard=tensorboard, stream=stream or io.StringIO())


def progress(log, step, steps=10, stage='pages', index=1, loss=1.25):
    log.progress(
        stage=stage,
        index=index,
        stages=3,
        epoch=step / 4,
        step=step,
        steps=steps,
        loss=loss,
        rate=3e-4,
        examples_per_second=96.4,
        details={'norm': 0.51234, 'skipped': 2},
    )


def values_at(step):
    return {'loss': 1.0 / step, 'lr/text': 1e-3}


# metrics.jsonl ---------------------------------------------------------------------------------


def test_lines_are_strict_json_in_order_and_exact(tmp_path):
    log = quiet(tmp_path)
    third = np.float32(1) / 3
    log.write(np.int64(1), 'anchor', 0.5, {'loss': third, 'n': np.int32(7), 'ok': np.bool_(True)})
    odd = {'loss': jnp.float32(math.nan), 'a': np.inf, 'b': -math.inf}
    log.write(2, 'été', jnp.float32(1), {**odd, 'half': jnp.bfloat16(0.5), 'verdict': 'healthy'})
    first, second = lines_of(tmp_path)  # before close: every line is on the disk at once
    assert list(first) == ['step', 'stage', 'epoch', 'loss', 'n', 'ok']
    assert first['step'] == 1 and np.float32(first['loss']) == third and first['n'] == 7
    assert second == {
        'step': 2,
        'stage': 'été',
        'epoch': 1.0,
        'loss': 'nan',
        'a': 'inf',
        'b': '-inf',
        'half': 0.5,
        'verdict': 'healthy',
    }


def test_a_value_that_is_no_scalar_is_refused_by_name(tmp_path):
    log = quiet(tmp_path)
    for values, message in (
        ({'x': [1.0]}, "'x'"),
        ({'x': None}, "'x'"),
        ({'x': np.zeros(2)}, "'x'"),
    ):
        with pytest.raises(ValueError, match=message):
            log.write(1, 'a', 0.0, values)
    for name in ('step', 'stage', 'epoch'):
        with pytest.raises(ValueError, match=f"'{name}' is set by the log itself"):
            log.write(1, 'a', 0.0, {name: 2})
    with pytest.raises(TypeError, match=r'metrics\.jsonl\.x is a object'):
        log.write(1, 'a', 0.0, {'x': object()})
    assert not (tmp_path / 'metrics.jsonl').exists()


def test_other_processes_leave_nothing(tmp_path, capsys):
    log = logs.Logs(tmp_path, enabled=False, tensorboard=True)
    log.write(1, 'a', 0.0, {'loss': 1.0})
    log.figures(1, {'x': Figure()})
    log.message('hello')
    progress(log, 1)
    log.flush()
    log.close()
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out == ''


def test_lines_after_a_truncation_go_to_the_new_file(tmp_path):
    log = quiet(tmp_path)
    for step in (1, 2, 3):
        log.write(step, 'a', 0.0, {'loss': 1.0})
    assert logs.truncate(tmp_path / 'metrics.jsonl', 1) == 2
    log.write(2, 'a', 0.0, {'loss': 5.0})
    assert [(line['step'], line['loss']) for line in lines_of(tmp_path)] == [(1, 1.0), (2, 5.0)]


def test_a_remote_log_is_sent_whole_and_no_line_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(files, 'is_local', lambda path: False)
    (tmp_path / 'metrics.jsonl').write_text('{"step": 1}\n')
    log = quiet(tmp_path)
    for step in (2, 3, 4):
        log.write(step, 'a', 0.0, {'loss': 1.0})
    assert [line['step'] for line in lines_of(tmp_path)] == [1, 2]  # sent at most every 30 s
    log.flush()
    assert [line['step'] for line in lines_of(tmp_path)] == [1, 2, 3, 4]
    log.write(5, 'a', 0.0, {'loss': 1.0})
    log.close()
    assert [line['step'] for line in lines_of(tmp_path)] == [1, 2, 3, 4, 5]


# truncate --------------------------------------------------------------------------------------

A = b'{"step": 10, "stage": "a", "loss": 1.0}\n'
E = b'{"step": 10, "stage": "a", "eval/val/r1": 0.5}\n'
B = b'{"step": 20, "stage": "a", "loss": 0.5}\n'
TORN = b'{"step": 30, "stage": "a", "lo'


@pytest.mark.parametrize(
    'content, step, kept, dropped',
    [
        (A + E + B, 20, A + E + B, 0),
        (A + E + B, 10, A + E, 1),
        (A + E + B, 15, A + E, 1),
        (A + E + B, 9, b'', 3),
        (A + E + B, -1, b'', 3),
        (A + B + TORN, 20, A + B, 1),
        (A + B + TORN, 99, A + B, 1),
        (TORN, 99, b'', 1),
        (b'', 5, b'', 0),
        (A + B[:-1], 20, A + B, 0),  # whole but for its newline
        (A + TORN + B, 20, A, 1),  # a torn line that a later one was glued to
        (A + b'\0' * 64 + b'\n' + B, 20, A + B, 1),  # what a power cut leaves
        (A + b'[1]\n{"loss": 2}\n{"step": NaN}\n{"step": "7"}\n' + B, 20, A + B, 4),
        (A + b'{"step": 12, "stage": "\xc3', 20, A, 1),  # torn inside a letter
        (A + b'\n\n' + B, 20, A + B, 0),
    ],
)
def test_truncate(tmp_path, content, step, kept, dropped):
    path = tmp_path / 'metrics.jsonl'
    path.write_bytes(content)
    assert logs.truncate(path, step) == dropped
    assert path.read_bytes() == kept
    assert logs.truncate(path, step) == 0 and path.read_bytes() == kept
    assert [p.name for p in tmp_path.iterdir()] == ['metrics.jsonl']


def test_truncate_drops_an_evaluation_that_will_be_redone(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    early = E.replace(b'10', b'5')
    path.write_bytes(early + A + E + B)
    assert logs.truncate(path, 10, keep_evaluations_at_step=False) == 2
    assert path.read_bytes() == early + A


def test_truncate_without_a_file(tmp_path):
    assert logs.truncate(tmp_path / 'metrics.jsonl', 3) == 0
    assert list(tmp_path.iterdir()) == []


def test_truncate_leaves_a_good_file_alone(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    path.write_bytes(A + B)
    before = path.stat()
    logs.truncate(epath.Path(path), 20)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.parametrize('cut', range(0, len(B), 5))
def test_a_kill_anywhere_in_a_line_costs_that_line_only(tmp_path, cut):
    path = tmp_path / 'metrics.jsonl'
    path.write_bytes(A + B[:cut])
    good, bad = logs.read(path)
    assert [line['step'] for line in good] == [10] and bad == bool(cut)
    logs.truncate(path, 20)
    assert path.read_bytes() == A


# Whole files -----------------------------------------------------------------------------------


def test_write_json_is_strict_ordered_and_readable(tmp_path):
    value = {
        'z': 1,
        'a': (np.float32(0.5), math.nan, -np.inf),
        'none': None,
        'array': np.arange(3),
        'jax': jnp.ones((1, 2)),
        'page': '漫画',
        'bad': '\udcff',
        3: True,
        'path': pathlib.PurePosixPath('a/b'),
    }
    path = tmp_path / 'new' / 'x.json'
    logs.write_json(path, value)
    actual = strict(path.read_text())
    assert list(actual) == ['z', 'a', 'none', 'array', 'jax', 'page', 'bad', '3', 'path']
    assert actual['path'] == 'a/b'
    assert actual['a'] == [0.5, 'nan', '-inf'] and actual['array'] == [0, 1, 2]
    assert actual['jax'] == [[1.0, 1.0]]
    assert actual['bad'] == '\udcff' and '漫画' in path.read_text()


@pytest.mark.parametrize(
    'value, where',
    [
        ({'a': [1, {2}]}, r'x\.json\.a\[1\] is a set'),
        ({'a': 1j}, r'x\.json\.a is a complex'),
        ({'a': {1: 'x', '1': 'y'}}, r'x\.json\.a has two keys that are the same in JSON'),
    ],
)
def test_what_json_cannot_hold_is_named_and_changes_nothing(tmp_path, value, where):
    path = tmp_path / 'x.json'
    path.write_text('old')
    with pytest.raises(TypeError, match=where):
        logs.write_json(path, value)
    assert path.read_text() == 'old' and len(list(tmp_path.iterdir())) == 1


def test_a_failed_replacement_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / 'x.json'
    logs.write_json(path, {'a': 1})

    def full(descriptor):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(OSError, match='No space left'):
        logs.write_json(path, {'a': 2})
    assert strict(path.read_text()) == {'a': 1} and len(list(tmp_path.iterdir())) == 1


def test_readers_meet_whole_files_only(tmp_path):
    path, stop = tmp_path / 'x.json', threading.Event()
    big = [{'n': n, 'text': 'x' * 200_000} for n in range(2)]
    logs.write_json(path, big[0])

    def rewrite():
        n = 0
        while not stop.is_set():
            n += 1
            logs.write_json(path, big[n % 2])

    writer = threading.Thread(target=rewrite)
    writer.start()
    try:
        seen = [strict(path.read_text()) for _ in range(150)]
    finally:
        stop.set()
        writer.join()
    assert all(value in big for value in seen)


def test_results(tmp_path):
    actual = logs.write_results(
        tmp_path,
        best=None,
        final={'val': {'r1': np.float32(0.5), 'x': math.nan, 'v': 'healthy'}},
        stages={'b': {'loss': 2.0}, 'a': {'loss': 1.0}},
        skipped={'no text': np.int64(3)},
        weights='last',
    )
    assert actual == strict((tmp_path / 'results.json').read_text())
    assert list(actual) == ['best', 'weights', 'final', 'stages', 'skipped']
    assert list(actual['stages']) == ['b', 'a'] and actual['final']['val']['x'] == 'nan'
    with pytest.raises(ValueError, match='val/r1 is not a number'):
        logs.write_results(
            tmp_path, best=None, final={'val': {'r1': [1]}}, stages={}, skipped={}, weights='last'
        )
    assert actual == strict((tmp_path / 'results.json').read_text())


# TensorBoard and figures -----------------------------------------------------------------------


def events(workdir):
    """Reads the scalars and images that TensorBoard would show: purged ones left out."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    visible = []
    for path in sorted((pathlib.Path(workdir) / 'tensorboard').iterdir()):
        content, at = path.read_bytes(), 0
        while at < len(content):
            (size,) = struct.unpack_from('<Q', content, at)
            event = Event.FromString(content[at + 12 : at + 12 + size])
            at += 16 + size
            if event.session_log.status == SessionLog.START:
                visible = [item for item in visible if item[0] < event.step]
            for value in event.summary.value:
                kind = value.WhichOneof('value')
                visible.append((event.step, value.tag, getattr(value, kind)))
    return visible


def test_tensorboard_shows_every_scalar_once_across_a_kill(tmp_path):
    log = quiet(tmp_path, tensorboard=True)
    for step in range(1, 7):
        log.write(step, 'a', step / 2, values_at(step))
    log.close()
    logs.truncate(tmp_path / 'metrics.jsonl', 4)
    log = quiet(tmp_path, tensorboard=True)  # within the same second: it must not overwrite
    for step in range(5, 9):
        log.write(step, 'b', step / 2, {**values_at(step), 'verdict': 'healthy', 'bad': math.nan})
    log.close()
    visible = events(tmp_path)
    for tag in ('loss', 'lr/text', 'epoch'):
        assert [step for step, name, _ in visible if name == tag] == list(range(1, 9))
    actual = {step: value for step, tag, value in visible if tag == 'loss'}
    np.testing.assert_allclose([actual[s] for s in range(1, 9)], 1 / np.arange(1, 9), rtol=1e-6)
    assert [step for step, tag, _ in visible if tag.startswith('stage')] == [1, 5]
    assert [step for step, tag, _ in visible if tag == 'bad'] == [5, 6, 7, 8]


def test_tensorboard_drops_everything_when_nothing_was_saved(tmp_path):
    for _ in range(2):
        logs.truncate(tmp_path / 'metrics.jsonl', -1)
        log = quiet(tmp_path, tensorboard=True)
        log.write(1, 'a', 0.0, values_at(1))
        log.close()
    assert [step for step, tag, _ in events(tmp_path) if tag == 'loss'] == [1]


def test_a_tensorboard_that_fails_is_said_once_and_training_goes_on(tmp_path):
    (tmp_path / 'tensorboard').write_text('a file is in the way')
    stream = io.StringIO()
    log = quiet(tmp_path, tensorboard=True, stream=stream)
    for step in (1, 2):
        log.write(step, 'a', 0.0, values_at(step))
    log.close()
    assert len(lines_of(tmp_path)) == 2
    assert stream.getvalue().count('TensorBoard is off: FileExistsError') == 1


def test_figures_are_saved_whole_with_caption_and_step(tmp_path):
    good, same, bad = Figure(figsize=(2, 1)), Figure(figsize=(1, 1)), Figure()
    good.set_label('what the model sees: 漫画')
    good.subplots().plot([1, 2])
    bad.savefig = None
    stream = io.StringIO()
    log = quiet(tmp_path, tensorboard=True, stream=stream)
    log.figures(7, {'val/pages': good, 'bad': bad, 'val pages': same})
    log.close()
    assert sorted(p.name for p in (tmp_path / 'figures').iterdir()) == [
        'val_pages-2.png',
        'val_pages.png',
    ]
    image = Image.open(tmp_path / 'figures' / 'val_pages.png')
    assert image.size == (240, 120)
    assert image.info['Description'] == 'what the model sees: 漫画' and image.info['Step'] == '7'
    assert "figure 'bad' could not be drawn" in stream.getvalue()
    (image,) = [value for step, tag, value in events(tmp_path) if tag == 'val/pages']
    assert Image.open(io.BytesIO(image.encoded_image_string)).size == (240, 120)


# Screen ----------------------------------------------------------------------------------------


def test_without_a_terminal_lines_are_plain_and_rare(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(screen.time, 'monotonic', lambda: now[0])
    stream = io.StringIO()
    log = quiet(tmp_path, stream=stream)
    for step in range(1, 101):
        progress(log, step, steps=100, stage='pages' if step > 50 else 'anchor', index=step > 50)
        now[0] += 1.0
    log.message('[bold]not markup[/bold]')
    out = stream.getvalue()
    assert '\x1b' not in out and '\r' not in out and '[bold]not markup[/bold]' in out
    visible = [int(line.split('step ')[1].split('/')[0]) for line in out.splitlines()[:-1]]
    assert visible == [*range(1, 51, 5), *range(51, 101, 5), 100]
    line = out.splitlines()[1]
    for words in (
        'anchor 1/3',
        'epoch 1.50',
        'step 6/100',
        'loss 1.25',
        'rate 0.0003',
        'norm 0.512  skipped 2',
        '96.4 examples/s',
        '1:34 left',
    ):
        assert words in line, line
    # A narrow terminal cuts the end: the time left stands before the numbers.
    assert line.index('left') < line.index('loss') < line.index('examples/s')


def test_plain_lines_get_rarer_in_a_long_run(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(screen.time, 'monotonic', lambda: now[0])
    stream = io.StringIO()
    log = quiet(tmp_path, stream=stream)
    for step in range(1, 100_000):
        progress(log, step, steps=10**9)
        now[0] += 1.0
    assert 1000 < len(stream.getvalue().splitlines()) < 2200


def test_time_left_follows_recent_steps_of_the_stage(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(screen.time, 'monotonic', lambda: now[0])
    seen = screen.Screen(None)
    for step in range(1, 301):
        late = step > 200
        seen.progress(
            stage='b' if late else 'a',
            index=int(late),
            stages=2,
            epoch=0.0,
            step=step,
            steps=1000,
            loss=1.0,
            rate=1e-3,
            examples_per_second=10.0,
        )
        if step in (1, 201):  # the first call of a stage cannot know
            assert seen._seconds_left(1) is None
        now[0] += 1.0 if step < 200 else 3.0
    assert seen._seconds_left(700) == pytest.approx(2100)


def test_on_a_terminal_messages_stand_above_one_live_line(tmp_path):
    parent, child = pty.openpty()
    with open(child, 'w', encoding='utf-8') as terminal:
        log = quiet(tmp_path, stream=terminal)
        progress(log, 1)
        log.message('stage [bold]pages[/bold] [2 of 3]: 10 updates')
        progress(log, 10)
        log.close()
        terminal.flush()
        out = os.read(parent, 65536).decode()
    os.close(parent)
    assert (
        'stage [bold]pages[/bold] [2 of 3]: 10 updates' in out
        and '100%' in out
        and 'pages 2/3' in out
    )
    assert out.rfind('\x1b[?25l') < out.rfind('\x1b[?25h')  # the cursor is visible again
    assert out.count('\x1b[2K') >= 2  # the line was redrawn in place


def test_sys_stdout_is_given_back(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setenv('TERM', 'xterm')
    monkeypatch.setattr(sys, 'stdout', terminal)
    log = logs.Logs(tmp_path, enabled=True, tensorboard=False)
    progress(log, 1)
    assert sys.stdout is not terminal
    print('a print of somebody else')
    log.close()
    log.close()
    assert sys.stdout is terminal and 'a print of somebody else' in terminal.getvalue()


class Broken(io.StringIO):
    """A stream that fails after `good` writes, as a closed pipe or terminal does."""

    def __init__(self, good, error, tty):
        super().__init__()
        self.good, self.error, self.tty = good, error, tty

    def write(self, text):
        self.good -= 1
        if self.good < 0:
            raise self.error
        return super().write(text)

    def isatty(self):
        return self.tty


@pytest.mark.parametrize('tty', [False, True])
@pytest.mark.parametrize('good', [0, 1, 2, 5])
@pytest.mark.parametrize('error', [BrokenPipeError(), ValueError('I/O on closed file'), OSError(5)])
def test_a_failing_screen_never_ends_the_run(tmp_path, monkeypatch, tty, good, error):
    monkeypatch.setenv('TERM', 'xterm')
    stream = Broken(good, error, tty)
    monkeypatch.setattr(sys, 'stdout', stream)
    log = logs.Logs(tmp_path, enabled=True, tensorboard=False)
    for step in range(1, 11):
        log.message('hello')
        progress(log, step)
        log.write(step, 'a', 0.0, {'loss': 1.0})
    log.close()
    assert sys.stdout is stream and len(lines_of(tmp_path)) == 10


def test_a_narrow_encoding_shows_question_marks(tmp_path):
    raw = io.BytesIO()
    log = quiet(tmp_path, stream=io.TextIOWrapper(raw, encoding='ascii'))
    log.message('漫画 × 2')
    progress(log, 1, stage='été')
    assert raw.getvalue().startswith(b'?? ? 2\n?t? 2/3')


@pytest.mark.parametrize('redirect', ['| head -n 1', '>&-'])
def test_a_closed_standard_output_does_not_end_a_process(tmp_path, root, redirect):
    code = (
        'import sys; from mmjax.engine import logs\n'
        f'log = logs.Logs({str(tmp_path)!r}, enabled=True, tensorboard=False)\n'
        'for step in range(1, 3000):\n'
        '    log.message("x" * 100)\n'
        'log.write(step, "a", 0.0, {"loss": 1.0}); log.close()\n'
        'print("results" * 20000); sys.stdout and sys.stdout.flush()\n'
    )
    command = f'{sys.executable} -c {shlex.quote(code)} {redirect}; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(['bash', '-c', command], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == '', done.stderr
    assert len(lines_of(tmp_path)) == 1


@pytest.mark.parametrize(
    'seconds, words',
    [
        (None, '?'),
        (math.inf, '?'),
        (0.4, '0s'),
        (59.6, '1:00'),
        (425, '7:05'),
        (11225, '3:07:05'),
        (48 * 3600, '2d 00h'),
        (300_000, '3d 11h'),
    ],
)
def test_durations(seconds, words):
    assert screen.clock(seconds) == words


def test_importing_logs_brings_no_jax(root):
    code = 'import sys; from mmjax.engine import logs, report; assert "jax" not in sys.modules'
    subprocess.run([sys.executable, '-c', code], check=True, cwd=root)
