"""Killed, preempted, damaged and resumed runs; each ends as the unbroken one."""

import json
import random
import shutil
import signal
import time

import numpy as np
import pytest
from etils import epath

from mmjax.engine import build, logs, train
from mmjax.engine import config as config_lib
from mmjax.engine.checkpoint import Checkpoints
from mmjax.errors import UserError
from tests.kills import digest, finish, kill_at_random_moments, newest, start
from tests.runs import command, lines, run, toy


@pytest.fixture(scope='module')
def unbroken(tmp_path_factory):
    workdir = tmp_path_factory.mktemp('unbroken') / 'run'
    finish(workdir)
    return workdir


@pytest.mark.parametrize('workers', [0, pytest.param(2, marks=pytest.mark.slow)])
def test_kill_9_changes_nothing(tmp_path, unbroken, workers):
    rng = random.Random(workers)
    arguments = [f'--config.data.workers={workers}']
    assert kill_at_random_moments(tmp_path / 'run', unbroken, 3, rng, arguments) > 0


@pytest.mark.slow
@pytest.mark.parametrize('workers', [0, 2])
def test_kill_9_at_twenty_moments(tmp_path, unbroken, workers):
    """Run it alone as `pytest -m slow -k twenty`; each case kills up to 20 times."""
    rng = random.Random(100 + workers)
    arguments = [f'--config.data.workers={workers}']
    assert kill_at_random_moments(tmp_path / 'run', unbroken, 20, rng, arguments) >= 10


def test_a_flipped_bit_in_any_file_is_detected_and_the_run_goes_on(tmp_path, unbroken, caplog):
    """Orbax itself restores flipped array data without a word."""
    rng = random.Random(0)
    files = [
        p
        for p in sorted((unbroken / 'checkpoints' / str(newest(unbroken))).rglob('*'))
        if p.is_file() and p.stat().st_size
    ]
    assert len(files) >= 3

    for at, path in enumerate(files):
        workdir = tmp_path / str(at)
        shutil.copytree(unbroken, workdir)
        (workdir / 'results.json').unlink()
        data = bytearray((workdir / path.relative_to(unbroken)).read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        (workdir / path.relative_to(unbroken)).write_bytes(data)
        if at == 0:  # one through the command line, the others in this process
            errors = finish(workdir)
            assert lines(workdir) == lines(unbroken) and digest(workdir) == digest(unbroken), errors
            continue
        store = Checkpoints(epath.Path(workdir), keep=9)
        caplog.clear()
        step, _ = store.newest()
        store.close()
        assert step < newest(unbroken), path
        assert [r.levelname for r in caplog.records] == ['WARNING'], path


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits_with_75(tmp_path, unbroken, number):
    workdir = tmp_path / 'run'
    process = start(workdir)
    metrics = workdir / 'metrics.jsonl'
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.02)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    assert not (workdir / 'results.json').exists()
    finish(workdir)
    assert lines(workdir) == lines(unbroken) and digest(workdir) == digest(unbroken)


def test_a_finished_run_says_so_and_does_nothing(unbroken):
    before = (unbroken / 'metrics.jsonl').stat().st_mtime_ns
    finish(unbroken)
    assert (unbroken / 'metrics.jsonl').stat().st_mtime_ns == before


def test_another_config_in_a_workdir_is_refused_with_the_keys_named(unbroken):
    process = start(unbroken, '--config.seed=7', '--config.log.every_steps=3')
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and 'seed was 3, is 7' in errors
    assert 'every_steps' not in errors and 'Traceback' not in errors


def test_a_data_change_on_resume_is_refused_field_by_field(tmp_path):
    run(toy('Thaw', 8), tmp_path)
    config = toy('Thaw', 12)
    built = build.run(config)
    built.fingerprint['version'] = '2'
    log = logs.Logs(epath.Path(tmp_path), enabled=False, tensorboard=False)
    with pytest.raises(UserError, match="version was '1', is '2'"):
        train.train(built, epath.Path(tmp_path), log)
    train.train(built, epath.Path(tmp_path), log, allow_data_change=True)


def test_not_finite_stops_with_a_bundle_and_never_touches_the_weights(tmp_path, monkeypatch):
    from tests.toy_tasks import Arrays

    original = Arrays.example

    def poisoned(self, row, rng, train):
        out = original(self, row, rng, train)
        if train and row == 5:
            out['x'] = out['x'] * np.float32('nan')
        return out

    monkeypatch.setattr(Arrays, 'example', poisoned)
    with pytest.raises(train.NotFinite, match='is not finite'):
        run(toy('Thaw', 30), tmp_path / 'stop')
    bundle = json.loads(next((tmp_path / 'stop/not_finite').iterdir()).read_text())
    assert 5 in bundle['rows'] and {'step', 'stage', 'loss/mse', 'grad_norm/head'} <= set(bundle)
    skip = dict(policy='skip', budget=9)
    results = run(toy('Thaw', 30, not_finite=skip), tmp_path / 'skip')
    assert results['skipped']['updates not finite'] >= 2
    assert np.isfinite(results['final']['val']['mse'])
    with pytest.raises(train.NotFinite):
        run(toy('Thaw', 30, not_finite=dict(policy='skip', budget=1)), tmp_path / 'budget')


def test_early_stopping_moves_on_to_the_next_stage_and_keeps_the_best(tmp_path):
    stop = dict(metric='val/mse', mode='min', patience=2, min_delta=10.0)
    config = toy('Thaw', evaluate__every_steps=2, early_stop=stop)
    config.best.metric = 'val/mse'
    config.stages = ('head', 'all')
    config.stage = dict(head=dict(steps=20), all=dict(steps=20))
    results = run(config, tmp_path)
    steps = {
        stage: [l['step'] for l in lines(tmp_path) if l['stage'] == stage]
        for stage in ('head', 'all')
    }
    # The first evaluation sets the mark, two more do not beat it by 10: 6 updates a stage.
    assert steps['head'] == list(range(1, 7)) and steps['all'] == list(range(7, 13))
    assert results['best']['metric'] == 'val/mse' and results['weights'] == 'best'
    assert results['final']['val']['mse'] == pytest.approx(results['best']['value'], rel=1e-5)


def test_early_stopping_may_end_the_run(tmp_path):
    """Patience goes on from stage to stage; a run that is over stays over."""
    stop = dict(metric='val/mse', mode='min', patience=3, min_delta=10.0, scope='run')
    config = toy('Thaw', evaluate__every_steps=2, early_stop=stop)
    config.stages = ('head', 'all', 'more')
    config.stage = dict(head=dict(steps=4), all=dict(steps=20), more=dict(steps=4))
    results = run(config, tmp_path)
    # Evaluations at 2 and 4, then at 6 and 8: three after the first do not beat it.
    assert [(l['step'], l['stage']) for l in lines(tmp_path)][-1] == (8, 'all')
    assert list(results['stages']) == ['head', 'all']
    before = len(lines(tmp_path))
    again = run(config, tmp_path)
    assert again['final'] == results['final'] and len(lines(tmp_path)) == before


def test_patience_that_ends_with_a_stage_ends_the_run_too(tmp_path):
    """At a stage's last update the stage is over anyway, which once hid that the run is."""
    stop = dict(metric='val/mse', mode='min', patience=2, min_delta=10.0, scope='run')
    config = toy('Thaw', evaluate__every_steps=2, early_stop=stop)
    config.stages = ('head', 'all')
    config.stage = dict(head=dict(steps=6), all=dict(steps=6))
    run(config, tmp_path)
    assert [(l['step'], l['stage']) for l in lines(tmp_path)][-1] == (6, 'head')
    run(config, tmp_path)
    assert [(l['step'], l['stage']) for l in lines(tmp_path)][-1] == (6, 'head')


def test_a_config_that_continues_a_run_needs_one(tmp_path):
    result = command('--config=clip_retrieval:v3', f'--workdir={tmp_path / "run"}')
    assert result.returncode == 1
    assert 'this config continues another run: give --init_from=RUN_OF_V2' in result.stderr
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
    ('name', 'meaning'),
    [('no', 'float32'), ('fp16', 'float16'), ('bf16', 'bfloat16'), ('bfloat16', 'bfloat16')],
)
def test_precision_has_the_names_of_the_originals(name, meaning):
    config = toy('Thaw')
    config_lib.override(config, [('precision', name)])
    assert config_lib.resolve(config).precision == meaning


def test_init_from_takes_weights_and_starts_anew(tmp_path):
    run(toy('Thaw', 12), tmp_path / 'a')
    run(toy('Thaw', 4), tmp_path / 'b', init_from=str(tmp_path / 'a'))
    assert lines(tmp_path / 'b')[0]['step'] == 1
    assert lines(tmp_path / 'b')[0]['loss'] < 0.9 * lines(tmp_path / 'a')[0]['loss']


def test_averaged_weights_are_what_evaluation_sees(tmp_path):
    plain = run(toy('Thaw', 12), tmp_path / 'a')['final']['val']['mse']
    average = run(toy('Thaw', 12, ema=0.95), tmp_path / 'b')['final']['val']['mse']
    assert [l['loss'] for l in lines(tmp_path / 'a')] == [l['loss'] for l in lines(tmp_path / 'b')]
    assert plain != average
