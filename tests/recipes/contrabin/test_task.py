"""The ContraBin recipe as a run: what each stage moves, logs, saves and costs."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest
from etils import epath

from mmjax.engine import build, evaluate, modes, optim
from mmjax.engine import config as config_lib
from mmjax.engine.checkpoint import load_weights
from mmjax.engine.train import weights_from
from mmjax.errors import UserError
from tests import runs
from tests.recipes.contrabin.test_modes import program, tiny


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp('cache')


@pytest.fixture(scope='module')
def trained(tmp_path_factory, cache):
    """Returns (workdir, config, results) of a finished run."""
    workdir = tmp_path_factory.mktemp('run') / 'run'
    config = tiny(cache, evaluate__every_steps=2)
    config.stage.linear.steps = 6  # of which the last two are not made
    config.stage.linear.early_stop = dict(config.best.to_dict(), patience=1, min_delta=10.0)
    return workdir, config, runs.run(config, workdir)


@pytest.fixture(scope='module')
def model(trained):
    """Returns (built run, predictor) with the best weights."""
    workdir, config, _ = trained
    built = build.run(config, assets=workdir)
    with jax.set_mesh(built.mesh):
        variables, _ = weights_from(built, str(workdir))
        yield built, evaluate.Predictor(built.task, variables, built.mesh)


def train_lines(workdir):
    found = map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())
    return [line for line in found if 'loss' in line]


def test_each_stage_moves_its_groups_and_no_others(trained, model):
    workdir, built = trained[0], model[0]
    with jax.set_mesh(built.mesh):
        weights = [built.init_variables()['params']]
    weights += [load_weights(str(workdir / f'checkpoints/{n}'))[0] for n in (4, 8, 12, 16)]
    weights = [{k: np.asarray(v) for k, v in optim.flatten(tree).items()} for tree in weights]
    moved = [
        {group for path, group in built.groups.items if not np.array_equal(a[path], b[path])}
        for a, b in itertools.pairwise(weights)
    ]
    late = {'encoder', 'heads', 'binary_head'}
    assert moved == [{'anchor', 'heads'}, late, late | {'linear'}, late | {'nonlinear'}]
    for stage, groups in zip(built.stages, moved, strict=True):
        moments = built.abstract_state(stage)['opt_state']
        assert set(moments) == groups
        for group, values in moments.items():
            assert set(built.groups.of(values['mu']).values()) == {group}


def test_a_frozen_anchor_costs_no_backward_pass(model):
    built, _ = model
    naive = built.stages[1]
    kept = tuple(pair for pair in naive.learning_rates if pair[0] != 'anchor')
    thawed = dataclasses.replace(naive, learning_rates=kept)

    def flops(stage):
        call, *rest = program(built, stage)
        compiled = call.lower(built.abstract_state(stage), built.batch, *rest).compile()
        return compiled.cost_analysis()['flops']

    encoder = built.task.model.anchor
    tokens = 16 * (64 + 24)
    layer = 2 * tokens * (4 * encoder.width**2 + 2 * encoder.width * encoder.mlp_width)
    assert flops(thawed) - flops(naive) >= 2 * layer  # backward, attention's own not counted


def test_the_rate_is_zero_after_the_last_update_whatever_the_accumulation(cache, trained, model):
    built, base = model[0], trained[1].optimizer.learning_rate
    micro = build.run(tiny(cache, accumulation=2, stage__linear__steps=6))
    assert [s.steps for s in micro.stages] == [s.steps for s in built.stages] == [4, 4, 6, 4]
    for stage in micro.stages:
        at = lambda n, stage=stage: max(optim.rates(stage, micro.groups.names, n).values())
        ends = base if stage.name in ('anchor', 'naive') else 0  # constant, or a cosine
        assert at(stage.steps) == np.float32(ends) and at(stage.steps - 1) > 0
        assert at(2) == np.float32(base)
    assert micro.stages[-1].name == 'nonlinear'
    for line in train_lines(trained[0]):  # as logged: one line an update
        constant = line['stage'] in ('anchor', 'naive')
        within = (line['step'] - 1) % 4 + 4 * (line['stage'] == 'linear')
        rates = {value for key, value in line.items() if key.startswith('lr/')}
        np.testing.assert_allclose(
            list(rates),
            [base * (0, 0.5, 1, 1 if constant else 0.5, 0, 0.5, 1, 0.5 + 0.25 * 2**0.5)[within]],
            rtol=1e-6,
        )
    with pytest.raises(UserError, match='16'):  # no micro-batch is left over
        build.run(tiny(cache, accumulation=3))


def test_lambda_is_logged_where_an_interpolation_acts(trained):
    found = train_lines(trained[0])
    assert len(found) == 16
    for line in found:
        acts = line['stage'] in ('linear', 'nonlinear')
        assert ('lambda_mean' in line) == ('lambda_spread' in line) == acts
        if acts:
            assert 0 < line['lambda_mean'] < 1 and 0 <= line['lambda_spread'] < 0.5
            names = ('source_binary', 'comment_binary', 'intermediate')
        else:
            names = (
                ('anchor',) if line['stage'] == 'anchor' else ('source_binary', 'comment_binary')
            )
        assert line['loss'] == pytest.approx(sum(line[f'loss/{n}'] for n in names), rel=1e-6)


def test_saves_and_assets_are_where_they_were_asked_for(trained):
    workdir, _, results = trained
    saved = {int(p.name) for p in (workdir / 'checkpoints').iterdir() if p.name.isdigit()}
    assert saved == {5, 10, 15} | {4, 8, 12, 16}  # every_steps=5, and the ends of stages
    assert (workdir / 'tokenizer.json').exists() and (workdir / 'binary/tokenizer.json').exists()
    assert results['best']['metric'] == 'val/source_binary_mrr' and results['weights'] == 'best'


def test_early_stopping_watches_a_score_that_every_stage_has(trained):
    """In linear the first evaluation sets the mark, the second does not beat it by 10."""
    stages = [line['stage'] for line in train_lines(trained[0])]
    assert [stages.count(name) for name in ('anchor', 'naive', 'linear', 'nonlinear')] == [4] * 4


def test_the_config_lies_there_before_the_first_step(trained, tmp_path, monkeypatch):
    def train(built, workdir, log, **_):
        saved = json.loads((workdir / 'config.json').read_text())
        assert saved['config']['losses']['softness'] == 0.1 and len(saved['plan']) == 4
        raise UserError('no step was made')

    monkeypatch.setattr(modes, 'train', train)
    config = trained[1]
    with pytest.raises(UserError, match='no step was made'):
        command = modes.Command('train', epath.Path(tmp_path / 'run'))
        modes.run(config_lib.resolve(config), command)


def test_results_have_the_scores_of_every_stage(trained):
    workdir, _, results = trained
    scores = results['final']['test']
    for pair in ('source_binary', 'comment_binary', 'source_comment'):
        for name in ('r1', 'r5', 'r10', 'mrr'):
            assert 0 <= scores[f'{pair}_{name}'] <= 1
    assert 0 <= scores['binary_o0_o2_map'] <= 1
    assert 0 <= results['final']['val']['probe_accuracy'] <= 1
    found = map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())
    names = [{k for k in line if k.startswith('eval/')} for line in found if 'loss' not in line]
    names = [line for line in names if line]  # of evaluations
    late = {
        f'eval/{split}/lambda_{name}' for split in ('val', 'test') for name in ('mean', 'spread')
    }
    assert len(names) == 8 and all(n - late == names[0] for n in names)
    assert late & names[0] == set() and late <= names[-1]


def test_scores_do_not_depend_on_the_stage(cache, trained, model):
    """The original evaluated as in its naive stage; nothing here asks which stage it is."""
    workdir, _, results = trained
    naive = build.run(tiny(cache, stages=('naive',)), assets=workdir)
    predictor = evaluate.Predictor(naive.task, model[1].variables, naive.mesh)
    weights = evaluate.LossWeights.of(naive.stages[0], 0, naive.final_weights)
    with jax.set_mesh(naive.mesh):
        scores = evaluate.run(naive.evaluators, predictor, naive.task, weights, final=False)
    found = scores['val'].metrics
    last = dict(results['final']['val'])
    # What interpolates is of the stage, and so is the sum with its weights.
    of_the_stage = {'intermediate', 'lambda_mean', 'lambda_spread', 'loss'}
    assert set(last) - set(found) == {'lambda_mean', 'lambda_spread'}
    assert found['intermediate'] == 0 < last['intermediate']
    shared = lambda metrics: {k: v for k, v in metrics.items() if k not in of_the_stage}
    assert found.pop('modality_verdict') == last.pop('modality_verdict')
    assert shared(found) == pytest.approx(shared(last), rel=1e-5)
    assert found['loss'] == pytest.approx(found['final_loss'])
    expected = last['source_binary'] + last['comment_binary']
    assert last['final_loss'] == pytest.approx(expected)
