"""Killed runs of the retrieval and the sign-language recipe end as unbroken ones."""

import random

import pytest
from kills import finish, kill_at_random_moments


@pytest.mark.slow
def test_kill_9_changes_nothing_in_the_retrieval_recipe(tmp_path, monkeypatch):
    """Two stages, PK batches, batch statistics; the cache spares compiling after every kill."""
    monkeypatch.setenv('MMJAX_COMPILATION_CACHE', str(tmp_path / 'compiled'))
    arguments = ('--config=configs/clip_retrieval.py:smoke', f'--config.data.cache={tmp_path}/data')
    finish(tmp_path / 'unbroken', *arguments)
    rng = random.Random(7)
    kills = kill_at_random_moments(tmp_path / 'run', tmp_path / 'unbroken', 3, rng, arguments)
    assert kills > 0


@pytest.mark.slow
def test_kill_9_changes_nothing_in_the_sign_recipe(tmp_path, monkeypatch):
    """Two stages, buckets, random augmentation."""
    monkeypatch.setenv('MMJAX_COMPILATION_CACHE', str(tmp_path / 'compiled'))
    arguments = ('--config=configs/sign_ctc.py:smoke', f'--config.data.cache={tmp_path}/data')
    finish(tmp_path / 'unbroken', *arguments)
    rng = random.Random(11)
    kills = kill_at_random_moments(tmp_path / 'run', tmp_path / 'unbroken', 3, rng, arguments)
    assert kills > 0
