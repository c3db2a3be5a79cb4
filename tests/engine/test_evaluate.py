"""Evaluation: losses of a split, which weights sum them, when evaluators run, what is traced."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from mmjax import testing
from mmjax.engine import build, evaluate, train
from mmjax.engine.task import Evaluator, Scores, join_padded
from mmjax.errors import UserError
from mmjax.losses.term import Term
from tests import toy_tasks
from tests.runs import lines, run, toy

METHOD = 'error'


class Two(toy_tasks.Thaw):
    """Two losses of one output, and three evaluators."""

    def terms(self, variables, outputs, batch, stage):
        mask = batch['mask']
        total = jnp.sum(outputs['loss'] * mask)
        return {
            'mse': Term(total, mask.sum()),
            'twice': Term(2 * total, mask.sum()),
            'row_mean': batch.get('row').mean(),
        }

    def evaluators(self):
        return {'val': Rows(self), 'test': Last(self)}

    def broken(self, variables, batch):
        return batch['x'] @ jnp.ones((1000, 2))


class Rows(Evaluator):
    batch_size = 7
    fails = False

    def __init__(self, task):
        self.dataset = task.dataset('val')
        self.methods = (METHOD,)

    def run(self, predict, *, final, results):
        if Rows.fails:
            raise RuntimeError('the evaluation fails')
        np.testing.assert_array_equal(results.batch['row'], np.arange(96))
        return Scores(
            {'rows': len(results.outputs['loss']), 'mean': results.outputs['loss'].mean()}
        )


class Last(Rows):
    final_only = True


def config(**changes):
    out = toy('Thaw', 4)
    out.task = 'tests.engine.test_evaluate:Two'
    out.loss_weights = dict(mse=1.0, twice=dict(start=1.0, end=0.5))
    out.stages = ('first', 'second')
    out.stage.first = dict(steps=12, loss_weights=dict(twice=0.0))
    out.stage.second = dict(steps=6)
    for key, value in changes.items():
        out[key] = value
    return out


def test_losses_of_a_split_have_the_weights_of_the_stage_and_the_final_ones(tmp_path):
    results = run(config(), tmp_path)
    read = map(json.loads, (tmp_path / 'metrics.jsonl').read_text().splitlines())
    found = {line['stage']: line for line in read if 'eval/val/mse' in line}
    assert set(found) == {'first', 'second'}
    for stage, weight in (('first', 0.0), ('second', 0.5)):
        mse = found[stage]['eval/val/mse']
        assert found[stage]['eval/val/mean'] == pytest.approx(mse, rel=1e-5)
        assert found[stage]['eval/val/twice'] == pytest.approx(2 * mse, rel=1e-5)
        assert found[stage]['eval/val/loss'] == pytest.approx((1 + 2 * weight) * mse, rel=1e-5)
        assert found[stage]['eval/val/final_loss'] == pytest.approx(2 * mse, rel=1e-5)
        assert found[stage]['eval/val/row_mean'] == 47.5  # the whole split is one batch
        assert 'eval/test/mse' not in found[stage]
    assert results['final']['test']['rows'] == 96  # at the end only


def test_the_best_metric_may_not_be_of_an_evaluator_that_runs_at_the_end():
    spec = dict(metric='test/mse', mode='min')
    with pytest.raises(UserError, match=r"best.metric 'test/mse' is not .* while training: val"):
        build.run(config(best=spec))


def test_losses_on_batches_of_rows_are_sums_over_sums(monkeypatch):
    batches = [np.arange(10), np.arange(10, 96)]
    monkeypatch.setattr(Rows, 'loss_batches', lambda self: batches)
    built = build.run(config())
    variables = built.init_variables()
    predictor = evaluate.Predictor(built.task, variables, built.mesh)
    weights = evaluate.LossWeights.of(built.stages[0], 0, built.final_weights)
    results = evaluate.losses(predictor, built.task, built.evaluators['val'], weights)
    assert results.losses['mse'] == pytest.approx(results.outputs['loss'].mean(), rel=1e-5)
    assert results.losses['row_mean'] == pytest.approx((4.5 + 52.5) / 2)


def test_a_fault_in_a_method_of_an_evaluator_ends_the_run_before_the_first_step(monkeypatch):
    testing.build(config())
    monkeypatch.setattr('tests.engine.test_evaluate.METHOD', 'broken')
    with pytest.raises(TypeError):
        testing.build(config())


def test_every_array_that_the_terms_touch_counts_as_read():
    batch = dict.fromkeys('abcd', jnp.zeros(3))
    touched = {
        'in': (lambda reads: 'a' in reads and 'z' not in reads, {'a'}),
        'get': (lambda reads: reads.get('b') is batch['b'], {'b'}),
        'or': (lambda reads: (reads | {'e': 1})['c'] is batch['c'], {*batch}),
        'items': (lambda reads: dict(reads.items()) == batch, {*batch}),
    }
    for touch, names in touched.values():
        reads = evaluate._Reads(batch)
        assert touch(reads) and reads.names == names


@pytest.mark.parametrize(
    ('stage', 'weight', 'where'),
    [
        (None, 0.0, 'loss_weights'),
        ('first', 0.0, 'stage.first.loss_weights'),
        ('unused', 1.0, 'stage.unused.loss_weights'),
        ('first', 1.0, 'stage.first: loss_weights'),
    ],
)
def test_a_misspelt_loss_is_refused_whatever_its_weight(stage, weight, where):
    spec = config()
    spec.stage.unused = dict(steps=1, loss_weights={})
    section = spec.stage[stage].loss_weights if stage else spec.loss_weights
    section.twise = weight
    message = f"^{where} names 'twise'; this task's losses are mse, twice; did you mean 'twice'"
    with pytest.raises(UserError, match=message):
        build.check(build.run(spec))


def test_a_loss_of_weight_0_that_this_model_cannot_compute_is_known(monkeypatch):
    terms = Two.terms

    def with_teacher(self, variables, outputs, batch, stage):
        more = {'distillation': outputs['teacher']} if 'distillation' in stage.losses else {}
        return terms(self, variables, outputs, batch, stage) | more

    monkeypatch.setattr(Two, 'terms', with_teacher)
    build.check(build.run(config(loss_weights=dict(mse=1.0, distillation=0.0))))


def test_the_state_is_saved_before_the_evaluation_at_the_end_of_a_stage(tmp_path, monkeypatch):
    monkeypatch.setattr(Rows, 'fails', True)
    with pytest.raises(RuntimeError, match='the evaluation fails'):
        run(config(checkpoint=dict(every_steps=1000)), tmp_path)
    assert (tmp_path / 'checkpoints/12').is_dir()
    monkeypatch.setattr(Rows, 'fails', False)
    run(config(checkpoint=dict(every_steps=1000)), tmp_path)
    read = map(json.loads, (tmp_path / 'metrics.jsonl').read_text().splitlines())
    assert [line['step'] for line in read if 'eval/val/mse' in line] == [12, 18]


def test_mean_training_losses_of_each_epoch_are_logged_also_after_a_stop(tmp_path):
    spec = config(stages=('first',))
    spec.stage.first = dict(steps=30)
    run(spec, tmp_path / 'whole')
    with pytest.raises(train.StepLimit):
        run(spec, tmp_path / 'stopped', max_steps=17)
    run(spec, tmp_path / 'stopped')
    read = {
        name: [json.loads(l) for l in (tmp_path / name / 'metrics.jsonl').read_text().splitlines()]
        for name in ('whole', 'stopped')
    }
    epochs = {name: [l for l in found if 'epoch/loss' in l] for name, found in read.items()}
    assert [line['step'] for line in epochs['whole']] == [12, 24, 30]
    assert epochs['whole'] == epochs['stopped']
    losses = {line['step']: line['loss'] for line in lines(tmp_path / 'whole')}
    for line, steps in zip(
        epochs['whole'], (range(1, 13), range(13, 25), range(25, 31)), strict=True
    ):
        assert line['epoch/loss'] == pytest.approx(np.mean([losses[s] for s in steps]), rel=1e-6)


def test_arrays_of_other_lengths_are_padded_with_zeros():
    joined = join_padded(np.ones((2, 3, 1)), np.ones((1, 5, 1)))
    assert joined.shape == (3, 5, 1) and joined.sum() == 11
    np.testing.assert_array_equal(join_padded(np.arange(3), np.arange(2)), [0, 1, 2, 0, 1])
