"""The best checkpoint is the best: its step, value and weights, and what the results score."""

import json
import pathlib

import numpy as np
import pytest

from mmjax.engine.checkpoint import load_weights
from mmjax.engine.task import Scores
from tests import runs
from tests.toy_tasks import Mean, Thaw

EVERY = 3  # steps between evaluations
# The value of each evaluation: it improves, gets worse, improves; then worse values and a tie.
CURVES = {
    'min': [3.0, 2.5, 2.75, 1.0, 1.5, 1.0, 9.0, 4.0],
    'max': [0.25, 0.5, 0.375, 0.75, 0.625, 0.75, 0.0, 0.5],
}
BEST = 3  # index of the best value; the tie after it must not replace it


class Scripted(Mean):
    """Scores 'mse' by the weights, and 'scripted' by a list: one value per evaluation."""

    def __init__(self, task):
        super().__init__(task, 'error', 'mse')
        self.values = iter(CURVES[task.mode])

    def run(self, predict, *, final, results=None):
        scores = super().run(predict, final=final)
        if not final:
            scores.metrics['scripted'] = next(self.values)
        return Scores(scores.metrics)


class ScriptedThaw(Thaw):
    """The two-layer toy task; `config.best.mode` picks the curve of its scripted metric."""

    def __init__(self, config, assets=None):
        super().__init__(config, assets)
        self.mode = config.best.mode

    def evaluators(self):
        return {'val': Scripted(self)}


def evaluations(workdir):
    lines = (pathlib.Path(workdir) / 'metrics.jsonl').read_text().splitlines()
    records = map(json.loads, lines)
    return [record for record in records if 'eval/val/mse' in record]


def steps_in(folder):
    return [path.name for path in folder.iterdir()]


@pytest.mark.parametrize('mode', ['min', 'max'])
def test_the_best_checkpoint_is_the_evaluation_with_the_best_logged_value(tmp_path, mode):
    count = len(CURVES[mode])
    config = runs.toy('Thaw', EVERY * count, evaluate__every_steps=EVERY)
    config.task = 'tests.engine.test_best:ScriptedThaw'
    config.best.update(metric='val/scripted', mode=mode)
    config.checkpoint.update(every_steps=EVERY, keep=count)
    results = runs.run(config, tmp_path)

    logged = evaluations(tmp_path)
    values = [line['eval/val/scripted'] for line in logged]
    assert values == CURVES[mode]
    index = int((np.argmin if mode == 'min' else np.argmax)(values))
    step = logged[index]['step']
    assert index == BEST and step == EVERY * (BEST + 1)

    expected = {'step': step, 'metric': 'val/scripted', 'value': values[index]}
    assert results['best'] == expected and results['weights'] == 'best'
    assert json.loads((tmp_path / 'results.json').read_text())['best'] == expected
    assert steps_in(tmp_path / 'best') == [str(step)]
    meta = tmp_path / 'best' / str(step) / 'meta' / 'meta.json'
    assert json.loads(meta.read_text()) == expected

    # The periodic checkpoints are written whatever the metric says: they are the oracle.
    periodic = {
        line['step']: load_weights(f'{tmp_path}/checkpoints/{line["step"]}')[:2] for line in logged
    }
    assert same(load_weights(str(tmp_path))[:2], periodic[step])
    assert [other for other in periodic if same(periodic[other], periodic[step])] == [step]

    # The final score is that of the best weights, which no other evaluation has.
    mse = [line['eval/val/mse'] for line in logged]
    assert results['final']['val']['mse'] == pytest.approx(mse[index], rel=1e-5)
    others = mse[:index] + mse[index + 1 :]
    assert all(other != pytest.approx(mse[index], rel=1e-3) for other in others)


@pytest.mark.parametrize('mode', ['min', 'max'])
def test_a_metric_of_the_weights_that_gets_worse_keeps_its_best(tmp_path, mode):
    """A learning rate that is too large: the error falls, then rises again."""
    config = runs.toy('Thaw', 40, evaluate__every_steps=4)
    config.optimizer.learning_rate = 0.3
    config.best.update(metric='val/mse', mode=mode)
    results = runs.run(config, tmp_path)
    logged = evaluations(tmp_path)
    mse = [line['eval/val/mse'] for line in logged]
    index = int((np.argmin if mode == 'min' else np.argmax)(mse))
    assert index < len(mse) - 1 and len(set(mse)) == len(mse)
    assert results['best'] == {
        'step': logged[index]['step'],
        'metric': 'val/mse',
        'value': mse[index],
    }
    assert results['final']['val']['mse'] == pytest.approx(mse[index], rel=1e-5)


def same(one, other):
    one, other = (flat(weights) for weights in (one, other))
    assert one.keys() == other.keys()
    return all(np.array_equal(one[name], other[name]) for name in one)


def flat(tree, prefix=''):
    if not isinstance(tree, dict | tuple):
        return {prefix: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {k: v for name, x in items for k, v in flat(x, f'{prefix}/{name}').items()}
