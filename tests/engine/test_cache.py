"""What frozen parts put out is computed once, and no loss can tell."""

import collections
import dataclasses
import shutil

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.engine import build, evaluate
from mmjax.engine.preemption import Preempted
from mmjax.engine.task import Cached
from tests import runs
from tests.toy_tasks import Arrays, Config, Options, Thaw

ROWS, REPEATS = 20, 4  # different rows of 'train', and how often it has each


@dataclasses.dataclass(frozen=True)
class CachesConfig(Config):
    StageOptions = Options


class Caches(Thaw):
    """A head on a tower; stages with the option `cache` that freeze it cache its outputs."""

    Config = CachesConfig

    def dataset(self, split):
        rng = np.random.default_rng([2, split == 'val'])
        x = rng.normal(size=(ROWS, 6)).astype(np.float32)
        y = (np.sin(2 * x[:, 0]) + x[:, 1] * x[:, 2]).astype(np.float32)
        times = REPEATS if split == 'train' else 1
        return Arrays(split, x=np.tile(x, (times, 1)), y=np.tile(y, times))

    def tower(self, variables, batch):
        params = {'params': variables['params']['tower']}
        return {'tower': nn.relu(nn.Dense(self.width, parent=None).apply(params, batch['x']))}

    def cache(self, stage, train):
        if train['tower'] or not stage.options.cache:
            return None
        train = self.dataset('train')
        few = Arrays('train', **{name: x[:ROWS] for name, x in train.arrays.items()})
        return Cached('tower', few, np.arange(len(train)) % ROWS)

    def forward(self, variables, batch, stage, *, train, key):
        hidden = batch.get('cached_tower')
        if stage.options.poisoned and train['head']:
            assert hidden is not None
        if hidden is None:
            hidden = self.tower(variables, batch)['tower']
        head = {'params': variables['params']['head']}
        out = nn.Dense(1, parent=None).apply(head, hidden)[..., 0]
        rows = {'loss': jnp.square(out - batch['y']), 'mask': batch['mask']}
        return rows, variables['batch_stats']


def config(cache, **changes):
    """Four stages: the tower learns in the third, so that what was kept before is out of date."""
    out = runs.toy('Thaw', 6)
    out.task = 'tests.engine.test_cache:Caches'
    out.stages = ('first', 'second', 'thawed', 'last')
    out.sampler = dict(name='shuffle', remainder='pad')
    for name in out.stages:
        rates = {} if name == 'thawed' else {'tower': 0.0}
        out.stage[name] = dict(steps=6, learning_rates=rates, options=dict(cache=cache))
    return runs.change(out, **changes)


@pytest.fixture(scope='module')
def cached(tmp_path_factory):
    """Returns (workdir, training lines, how often a run that keeps the tower applied what)."""
    workdir, calls = tmp_path_factory.mktemp('run') / 'run', collections.Counter()
    whole = evaluate.Predictor.__call__

    def counted(self, method, dataset, batch_size):
        calls[method, len(dataset)] += 1
        return whole(self, method, dataset, batch_size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate.Predictor, '__call__', counted)
        runs.run(config(cache=True), workdir)
    return workdir, runs.lines(workdir), calls


def test_losses_are_those_of_a_run_that_keeps_nothing(cached, tmp_path):
    runs.run(config(cache=False), tmp_path / 'run')
    plain = runs.lines(tmp_path / 'run')
    assert len(plain) == len(cached[1]) == 24
    for one, other in zip(cached[1], plain, strict=True):
        assert one == {
            key: value if isinstance(value, str) else pytest.approx(value, rel=1e-5)
            for key, value in other.items()
        }


def test_rows_are_computed_once_while_nothing_thaws(cached):
    """Once for the first two stages, and again after the third."""
    assert cached[2]['tower', ROWS] == 2


def test_steps_are_given_what_was_kept(tmp_path):
    options = {f'stage__{name}__options': dict(cache=True, poisoned=True) for name in ('first',)}
    runs.run(config(cache=True, stages=('first',), **options), tmp_path / 'run')
    options['stage__first__options'] = dict(cache=False, poisoned=True)
    with pytest.raises(AssertionError):
        runs.run(config(cache=False, stages=('first',), **options), tmp_path / 'other')


def test_a_run_that_goes_on_keeps_the_same(cached, tmp_path):
    """Stopped within the second stage: what was kept is gone, and computed again."""
    workdir, lines, _ = cached
    shutil.copytree(workdir, tmp_path / 'run')
    for folder in (tmp_path / 'run' / 'checkpoints').iterdir():
        if folder.name.isdigit() and int(folder.name) > 8:
            shutil.rmtree(folder)
    runs.run(config(cache=True), tmp_path / 'run')
    assert runs.lines(tmp_path / 'run') == lines


def test_a_signal_while_rows_are_computed_saves_where_the_run_stands(tmp_path, monkeypatch):
    def stopped(self, method, dataset, batch_size):
        raise Preempted
        yield

    with monkeypatch.context() as patch:
        patch.setattr(evaluate.Predictor, '__call__', stopped)
        with pytest.raises(Preempted):
            runs.run(config(cache=True), tmp_path / 'run')
    assert (tmp_path / 'run' / 'checkpoints' / '0').is_dir()
    runs.run(config(cache=True), tmp_path / 'run')
    assert len(runs.lines(tmp_path / 'run')) == 24


def test_the_log_tells_at_a_switch_what_thaws_and_which_rates_hold(tmp_path, capfd):
    changes = {'stage__thawed__learning_rates': {'tower': 0.5, 'head': 0.1}}
    runs.run(config(cache=False, **changes), tmp_path / 'run')
    told = capfd.readouterr().out
    at = told.index('entering stage thawed: thawed tower; froze nothing; carried the moments of')
    switch = told[at : told.index('entering stage last')]
    assert switch.startswith(
        'entering stage thawed: thawed tower; froze nothing; carried the moments of head\n'
    )
    rates = {line.split()[0]: line.split()[-1] for line in switch.splitlines() if '/' in line}
    assert rates['tower/kernel'] == '0.015' and rates['head/kernel'] == '0.003'
    assert 'entering stage last: thawed nothing; froze tower; carried the moments of head' in told


def test_a_tower_of_which_the_users_rules_train_a_part_is_not_cached():
    """Its group is frozen, and its bias is in another one."""
    for rules, is_cached in (((), True), ((('biases', 'tower/bias'),), False)):
        built = build.run(config(cache=True, rules=rules))
        assert (built.cached(built.stages[0]) is not None) is is_cached
