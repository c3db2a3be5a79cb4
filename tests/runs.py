"""Small runs for tests: a config of a toy task, a run in this process, a run in another."""

import os
import pathlib
import subprocess
import sys

from mmjax import testing
from mmjax.engine import config as config_lib
from tests import toy_tasks

run = testing.train
lines = testing.metrics
LOSSES = {'PK': 'supcon', 'CTC': 'ctc', 'Generate': 'language', 'Thaw': 'mse'}
ROOT = pathlib.Path(__file__).parent.parent


def toy(task: str, steps: int = 12, /, **changes):
    """Returns the config of a toy task; changes are dotted keys with '__' for the dot."""
    config = config_lib.default(toy_tasks.Config)
    config.task = f'tests.toy_tasks:{task}'
    config.loss_weights = {LOSSES.get(task, 'mse'): 1.0}
    config.batch_size = 8
    config.stages = ('only',)
    config.stage.only = dict(steps=steps)
    config.optimizer.learning_rate = 0.03
    config.optimizer.schedule = 'constant'
    config.log.update(every_steps=1, tensorboard=False)
    config.checkpoint.every_steps = 4
    return change(config, **changes)


def change(config, **changes):
    """Sets dotted keys, with '__' for the dot, in place; returns the config."""
    for key, value in changes.items():
        *parents, leaf = key.split('__')
        where = config
        for parent in parents:
            where = where[parent]
        where[leaf] = value
    return config


def recipe(name: str, words: str):
    """Returns the config `configs/<name>.py:<words>`, unlocked."""
    return config_lib.load(f'{ROOT}/configs/{name}.py:{words}')


def command(*arguments, env=None, timeout=300, **options) -> subprocess.CompletedProcess:
    """Runs `python -m mmjax.main …` in another process, in the repository."""
    return subprocess.run(
        [sys.executable, '-m', 'mmjax.main', *map(str, arguments)],
        cwd=ROOT,
        env=environment(env),
        capture_output=True,
        text=True,
        timeout=timeout,
        **options,
    )


def environment(extra=None) -> dict[str, str]:
    """Returns this process's environment for a run on one CPU device, plus `extra`."""
    out = {key: value for key, value in os.environ.items() if key != 'XLA_FLAGS'}
    return {**out, 'PYTHONPATH': str(ROOT), **(extra or {})}
