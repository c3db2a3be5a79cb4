"""Killed runs of the receipts and the ContraBin recipe end as unbroken ones."""

import time

import pytest

from tests.kills import digest, finish, start, survives
from tests.runs import lines


@pytest.mark.slow
def test_kill_9_in_the_second_stage_changes_nothing_in_the_receipts_recipe(tmp_path, monkeypatch):
    monkeypatch.setenv('MMJAX_COMPILATION_CACHE', str(tmp_path / 'compiled'))
    monkeypatch.setenv('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')  # compiling is most of its time
    arguments = (
        '--config=configs/receipts.py:smoke',
        f'--config.data.cache={tmp_path}/data',
        '--config.stage.all.steps=60',
    )
    finish(tmp_path / 'unbroken', *arguments)
    workdir, limit = tmp_path / 'run', time.monotonic() + 240
    process, saved = start(workdir, *arguments), 0
    while process.poll() is None and time.monotonic() < limit and saved <= 4:  # steps of the first
        time.sleep(0.02)
        found = (path.name for path in workdir.glob('checkpoints/*'))
        saved = max([0, *(int(name) for name in found if name.isdigit())])
    assert process.poll() is None and 4 < saved < 64
    process.kill()
    process.wait()
    assert {line['stage'] for line in lines(workdir)} == {'top', 'all'}
    finish(workdir, *arguments)
    assert lines(workdir) == lines(tmp_path / 'unbroken')
    assert digest(workdir) == digest(tmp_path / 'unbroken')


@pytest.mark.slow
def test_kill_9_changes_nothing_in_the_contrabin_recipe(tmp_path, monkeypatch):
    """Four stages, of which three keep what the frozen anchor makes, and two interpolations."""
    assert survives('contrabin', 13, tmp_path, monkeypatch) > 0
