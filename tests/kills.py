"""Starts runs in another process, kills them, and compares them with an unbroken run."""

import hashlib
import json
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np

from mmjax.engine.checkpoint import load_weights
from tests.runs import ROOT, environment, lines

CONFIG = 'tests/kill_config.py'


def digest(workdir) -> str:
    """Returns the sha256 of the final parameters and statistics."""
    params, stats, _ = load_weights(str(workdir / 'checkpoints' / str(newest(workdir))))
    sha = hashlib.sha256()
    for leaf in jax.tree.leaves((params, stats)):
        sha.update(np.ascontiguousarray(leaf).tobytes())
    return sha.hexdigest()


def newest(workdir) -> int:
    paths = (workdir / 'checkpoints').iterdir()
    return max(int(path.name) for path in paths if path.name.isdigit())


def start(workdir, *arguments):
    configured = any(argument.startswith('--config=') for argument in arguments)
    config = [] if configured else [f'--config={CONFIG}']
    command = [sys.executable, '-m', 'mmjax.main', *config, f'--workdir={workdir}', *arguments]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(workdir, *arguments):
    process = start(workdir, *arguments)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return errors


def kill_at_random_moments(workdir, unbroken, kills, rng, arguments=()):
    """Kills and restarts a run; then everything equals the unbroken one. Returns the kills."""
    done = 0
    while done < kills:
        process = start(workdir, *arguments)
        metrics = workdir / 'metrics.jsonl'
        size = metrics.stat().st_size if metrics.exists() else 0
        limit = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < limit:
            if metrics.exists() and metrics.stat().st_size != size:  # it has begun to train
                break
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.6))
        if process.poll() is not None:
            assert process.returncode == 0, process.stderr.read()
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        done += 1
    finish(workdir, *arguments)
    assert lines(workdir) == lines(unbroken)
    assert digest(workdir) == digest(unbroken)
    actual, expected = (json.loads((w / 'results.json').read_text()) for w in (workdir, unbroken))
    assert actual == expected
    return done


def survives(recipe, seed, tmp_path, monkeypatch):
    """Kills a recipe's run up to three times; a cache saves the compilation after a kill."""
    monkeypatch.setenv('MMJAX_COMPILATION_CACHE', str(tmp_path / 'compiled'))
    arguments = (f'--config=configs/{recipe}.py:smoke', f'--config.data.cache={tmp_path}/data')
    finish(tmp_path / 'unbroken', *arguments)
    rng = random.Random(seed)
    return kill_at_random_moments(tmp_path / 'run', tmp_path / 'unbroken', 3, rng, arguments)
