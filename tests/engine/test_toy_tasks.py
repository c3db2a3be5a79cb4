"""The unchanged engine serves four recipes of very different kinds, and they learn."""

import chex
import jax
import numpy as np
import pytest

from mmjax.engine import build, modes, step
from mmjax.engine import config as config_lib
from mmjax.errors import UserError
from tests.runs import lines, run, toy


def test_pk_batches_with_a_learnable_logit_scale(tmp_path):
    config = toy('PK', 60, sampler={'name': 'pk', 'by': 'identity', 'k': 2})
    config.stage.only.learning_rates = dict(scale=10.0)
    results = run(config, tmp_path)
    losses = [line['loss'] for line in lines(tmp_path)]
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])
    assert results['final']['val']['cosine'] > 0.3


def test_ctc_in_buckets_compiles_one_program_a_bucket(tmp_path, monkeypatch):
    counted = chex.assert_max_traces(step.train_step, n=2 + 1)  # and one for the check at the start
    monkeypatch.setattr(step, 'train_step', counted)
    config = toy('CTC', 80, sampler={'name': 'bucketed', 'by': 'length'})
    results = run(config, tmp_path)
    assert results['final']['val']['ctc'] < 0.5 * lines(tmp_path)[0]['loss']


def test_greedy_generation_counts_up(tmp_path):
    results = run(toy('Generate', 80, optimizer__learning_rate=0.1), tmp_path)
    assert results['final']['val']['exact_match'] == 1.0


@pytest.mark.parametrize('quick', [True, False])
def test_a_quick_compile_lasts_as_long_as_its_run(tmp_path, monkeypatch, quick):
    seen, of_now = [], lambda: jax.config.read('jax_disable_most_optimizations')
    before = of_now()
    monkeypatch.setattr(modes, '_run', lambda *_, **__: seen.append(of_now()) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        config = config_lib.resolve(toy('PK', quick_compile=quick))
        modes.run(config, modes.Command('train', tmp_path))
    assert seen == [quick or before] and of_now() == before


def thaw(**changes):
    config = toy('Thaw', **changes)
    config.stages = ('head', 'all')
    config.stage = dict(head=dict(steps=10, learning_rates=dict(tower=0.0)), all=dict(steps=30))
    return config


def test_a_thaw_keeps_frozen_statistics_and_then_learns(tmp_path):
    config = thaw(checkpoint__every_steps=10, checkpoint__keep=10)
    results = run(config, tmp_path)
    from mmjax.engine.checkpoint import load_weights

    early, stats, _ = load_weights(str(tmp_path / 'checkpoints/10'))
    fresh = build.run(config).init_variables()
    np.testing.assert_array_equal(early['tower']['kernel'], fresh['params']['tower']['kernel'])
    np.testing.assert_array_equal(stats['tower_norm']['mean'], np.zeros(8))
    late, _, _ = load_weights(str(tmp_path / 'checkpoints/40'))
    assert np.abs(late['tower']['kernel'] - early['tower']['kernel']).max() > 1e-3
    assert set(results['stages']) == {'head', 'all'}


def test_stages_that_learn_the_same_share_a_compiled_step(tmp_path, monkeypatch):
    config = thaw()
    config.stage.head.steps = 3
    config.stage.slower = dict(
        steps=3, learning_rates=dict(tower=0.0), optimizer=dict(learning_rate=1e-4)
    )
    config.stages = ('head', 'slower')
    traced, original = [], step.train_step
    monkeypatch.setattr(
        step, 'train_step', lambda *a, **k: traced.append(k['stage']) or original(*a, **k)
    )
    run(config, tmp_path)
    first, *_, last = lines(tmp_path)
    assert [first['stage'], last['stage']] == ['head', 'slower']
    assert len(traced) == 1


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(loss_weights=dict(wrong=1.0)), "names 'wrong'; this task's losses are mse"),
        (dict(stage__only__learning_rates=dict(towr=0.0)), "names group 'towr'"),
        (dict(rules=(('x', 'nothing'),)), 'matches no parameter'),
        (dict(typo=1), 'unknown key typo=1'),
        (dict(best__metric='test/mse'), "best.metric 'test/mse' is not"),
        (dict(sampler={'name': 'pk2'}), 'pk2'),
        (dict(accumulation=3), 'batch_size=8 is not a multiple of accumulation=3'),
        (dict(task='tests.toy_tasks:Nope'), 'names no Task'),
        (dict(task='nope'), "config.task 'nope' is no module"),
    ],
)
def test_a_wrong_config_is_refused_before_the_first_step(changes, message):
    changes = {'loss_weights': dict(mse=1.0), **changes}
    with pytest.raises(UserError, match=message):
        build.check(build.run(toy('Thaw', **changes)))
