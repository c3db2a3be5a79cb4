"""The receipts recipe: what its stages move and cost, scores of each split, every mode."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from PIL import Image
from scipy.special import erf

from mmjax.data import pipeline
from mmjax.decode import autoregressive
from mmjax.engine import build, evaluate, modes, optim, parallel, step
from mmjax.engine import config as config_lib
from mmjax.engine.checkpoint import load_weights
from mmjax.engine.task import SplitResults, towers_training
from mmjax.engine.train import weights_from
from mmjax.errors import UserError
from mmjax.recipes.receipts import scores
from tests import runs

PICTURES = {'train': 8, 'val': 3, 'test': 4}
RATES = {
    'heads': dict(vision=0.0, vision_top=0.0, language=0.1),
    'top': dict(vision=0.0, vision_top=0.01, language=0.1),
    'all': dict(vision=0.1, vision_top=0.1, language=0.1),
}


def tiny(cache, **changes):
    """Returns the smoke config, still smaller; changes as in runs.toy."""
    config = runs.recipe('receipts', 'smoke')
    config.data.update(image_size=16, cache=str(cache), vocabulary=300, built_in=PICTURES)
    config.model.vision.update(patch_size=4, width=8, mlp_width=8, stem='patch')
    config.model.cross_attention.heads = 2
    config.optimizer.learning_rate = 0.02
    config.stages = ('heads', 'top')
    for name, rates in RATES.items():
        config.stage[name] = dict(steps=2, learning_rates=rates)
    config.checkpoint.update(every_steps=2, keep=9)
    config.log.tensorboard = False
    return runs.change(config, **changes)


@pytest.fixture(scope='module', autouse=True)
def quick():
    """Runs once a shape: fast code would take longer to make than it saves."""
    jax.config.update('jax_disable_most_optimizations', True)
    yield
    jax.config.update('jax_disable_most_optimizations', False)


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp('cache')


@pytest.fixture(scope='module')
def trained(tmp_path_factory, cache):
    """Returns (workdir, config, results) of a finished run."""
    workdir, config = tmp_path_factory.mktemp('run') / 'run', tiny(cache)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scores, 'EXAMPLES', 1)
        return workdir, config, runs.run(config, workdir)


@pytest.fixture(scope='module')
def model(trained):
    """Returns (built run, predictor) with the best weights."""
    workdir, config, _ = trained
    built = build.run(config, assets=workdir)
    with jax.set_mesh(built.mesh):
        variables, _ = weights_from(built, str(workdir))
        yield built, evaluate.Predictor(built.task, variables, built.mesh)


def weights(tree):
    return {path: np.asarray(leaf) for path, leaf in optim.flatten(tree).items()}


# Stages -------------------------------------------------------------------------------------


def test_each_stage_moves_what_it_names(trained):
    workdir, config, _ = trained
    fresh = build.run(config)
    with jax.set_mesh(fresh.mesh):
        states = [weights(fresh.init_variables()['params'])]
    states += [weights(load_weights(str(workdir / f'checkpoints/{at}'))[0]) for at in (2, 4)]
    for at, top in ((0, False), (1, True)):
        old, new = states[at], states[at + 1]
        moved = {path for path in old if not np.array_equal(old[path], new[path])}
        tower = {path for path in moved if path.startswith('vision/')}
        assert all(path.startswith('vision/block_1/') for path in tower) and bool(tower) == top
        for part in ('language', 'cross_attention', 'classifier', 'projector_up'):
            assert any(path.startswith(part) for path in moved), part
    for line in runs.lines(workdir, 'lr'):
        rates = RATES[line['stage']]
        for name in ('language', 'vision_top'):
            if rates[name]:
                assert line[f'lr/{name}'] == pytest.approx(rates[name] * line['lr/heads'])
            else:
                assert f'lr/{name}' not in line
        assert 'lr/vision' not in line


def program(built, stage):
    call = functools.partial(
        step.train_step,
        task=built.task,
        stage=stage.compile_key,
        groups=built.groups,
        settings=built.settings,
    )
    rates = optim.rates(stage, built.groups.names, 1)
    return jax.jit(call), rates, {name: np.float32(1) for name in stage.losses}


# Rules of the user, groups at rate 0, the part with dropout, outputs that may not depend on it.
FROZEN = {
    'vision': ((), ('vision', 'vision_top'), ('vision',), ('language',)),
    'language': ((), ('language',), ('language',), ('language',)),
    'heads': (
        (),
        ('heads', 'cross_attention'),
        ('cross_attention',),
        ('language', 'classification', 'predicted'),
    ),
    'backbones': (
        (('backbones', '(vision|language)/.*'),),
        ('backbones',),
        ('vision', 'language'),
        ('language',),
    ),
    'counting': (
        (('counting', 'classifier/.*'),),
        ('counting',),
        (),  # the classifier always has dropout
        ('classification', 'predicted'),
    ),
}


def one_stage(cache, rules, frozen, dropout):
    """Returns a built run of one stage, with dropout in some parts only."""
    rates = dict(learning_rates=dict.fromkeys(frozen, 0.0), steps=1)
    config = tiny(cache, rules=rules, stages=('one',))
    config.stage.one = rates
    for part in ('vision', 'language', 'cross_attention'):
        config.model[part].dropout = 0.5 if part in dropout else 0.0
    return build.run(config)


def forward(built, variables, batch, seed):
    """Returns (outputs, batch statistics) of a training step, or of an evaluation."""
    task = built.task
    stage = built.stages[0].compile_key
    if seed is None:
        run = functools.partial(evaluate.forward, task, stage)
        return jax.jit(run)(variables, batch), variables['batch_stats']
    train = towers_training(task.towers, dict(built.groups.items), stage)
    run = functools.partial(task.forward, stage=stage, train=train, key=jax.random.key(seed))
    return jax.jit(run)(variables, batch)


@pytest.mark.parametrize('name', FROZEN)
def test_frozen_parts_run_as_in_evaluation(cache, model, name):
    """Without dropout, and their batch statistics do not move."""
    *changes, outputs = FROZEN[name]
    built = one_stage(cache, *changes)
    variables = model[1].variables
    batch = rows_of(built.task.dataset('val'))
    expected, _ = forward(built, variables, batch, None)
    for seed in (1, 2):
        found, stats = forward(built, variables, batch, seed)
        for output in outputs:
            np.testing.assert_allclose(found[output], expected[output], rtol=1e-5, err_msg=output)
        if 'classification' in outputs:
            jax.tree.map(np.testing.assert_array_equal, stats, variables['batch_stats'])
        else:
            assert np.abs(found['classification'] - expected['classification']).max() > 1e-3


def test_a_tower_of_which_a_part_trains_has_dropout(cache, model):
    built = one_stage(cache, (), ('vision', 'heads', 'cross_attention', 'language'), ('vision',))
    batch = rows_of(built.task.dataset('val'))
    one, two = (forward(built, model[1].variables, batch, seed)[0] for seed in (1, 2))
    assert np.abs(one['language'] - two['language']).max() > 1e-4


def test_smoothing_acts_in_training_only(cache, model):
    """Against (1 − s)·(−log p[label]) + s·mean(−log p), by the probabilities of `classify`."""
    built = build.run(
        tiny(cache, losses__smoothing=0.3, stage__heads__learning_rates=dict(heads=0.0))
    )
    variables = model[1].variables
    batch = rows_of(built.task.dataset('val'))
    losses = -np.log(np.float64(jax.jit(built.task.classify)(variables, batch)))
    plain = losses[np.arange(len(losses)), batch['label']]
    for seed, expected in ((None, plain), (1, 0.7 * plain + 0.3 * losses.mean(1))):
        found, _ = forward(built, variables, batch, seed)
        np.testing.assert_allclose(found['classification'], expected, rtol=1e-4)


def test_a_frozen_tower_costs_no_backward_pass(cache):
    config = tiny(cache, stages=('heads', 'top', 'all'))
    built, flops = build.run(config), []
    for stage in built.stages:
        call, *rest = program(built, stage)
        lowered = call.lower(built.abstract_state(stage), built.batch, *rest)
        flops.append(lowered.cost_analysis()['flops'])
    # Two products a layer come back: of its weights, and of its input.
    block = 2 * 8 * 16 * (4 * 8**2 + 2 * 8 * 8)
    assert flops[1] - flops[0] >= block and flops[2] - flops[1] >= 2 * block


def test_accumulation_changes_no_loss_of_tokens(cache, model):
    """A step of two micro-batches loses what the whole batch does in one forward pass."""
    built = build.run(tiny(cache, accumulation=2, model__cross_attention__dropout=0.0))
    stage, variables = built.stages[0], model[1].variables
    options = dict(seed=0, stage=0, stop=1, train=True, threads=0)
    batch = next(iter(pipeline.batches(built.data, built.sampler(stage), **options)))
    with jax.set_mesh(built.mesh):
        state = step.create(variables, stage, built.groups, built.settings)
        call, *rest = program(built, stage)
        micro = call(state, batch, *rest)[1]
    whole, _ = forward(built, variables, batch, None)
    tokens = batch['answer_mask'].sum()
    assert float(micro['count/language']) == tokens
    for name, part in (('loss/language', 'language'), ('token_accuracy', 'tokens_correct')):
        expected = float(whole[part].sum() / tokens)
        assert float(micro[name]) == pytest.approx(expected, rel=1e-5), name


# Scores -------------------------------------------------------------------------------------


def test_results_hold_every_score_of_each_split(trained):
    _, _, results = trained
    assert set(results['final']) == {'val', 'test'}
    for split, found in results['final'].items():
        names = (
            'accuracy',
            'precision',
            'recall',
            'f1',
            'rouge1',
            'rouge2',
            'rougeL',
            'exact_match',
            *(f'bleu{n}' for n in range(1, 5)),
        )
        assert all(0 <= found[name] <= 1 for name in names)
        assert (found['pictures'], found['questions']) == (PICTURES[split], 3 * PICTURES[split])
        assert found['perplexity'] == pytest.approx(np.exp(found['language']))
        losses = found['classification'] + found['language']
        assert found['final_loss'] == found['loss'] == pytest.approx(losses)
        assert found['decoding'] == 'beam'
    running = [
        line
        for line in map(json.loads, (trained[0] / 'metrics.jsonl').open())
        if 'eval/val/decoding' in line
    ]
    assert running and running[0]['eval/val/decoding'] == 'greedy'
    scored_early = [key for line in running for key in line if key.startswith('eval/test')]
    assert not scored_early


def rows_of(data):
    examples = [data.example(row, None, False) for row in range(len(data))]
    batch = {key: np.stack([one[key] for one in examples]) for key in examples[0]}
    return batch | {'row': np.arange(len(data)), 'mask': np.ones(len(data), bool)}


def results_of(rows, **outputs):
    """Returns the results of a split whose rows come in the order `rows`."""
    return SplitResults(outputs, {'row': rows, 'mask': np.ones(len(rows), bool)}, {'language': 2.0})


@pytest.mark.parametrize('final', [False, True])
def test_scores_are_those_of_a_hand_count(model, monkeypatch, final):
    """Rows come in any order; an image counts once, a question's answer belongs to its row."""
    task = model[0].task
    data = task.dataset('test')
    labels = data.index['label']
    order = np.random.default_rng(0).permutation(len(data))
    answers = [data.record(row)['answer'] for row in range(len(data))]
    texts = [text if row % 3 else 'purple' for row, text in enumerate(answers)]
    classes = np.where(data.index['picture'] == 1, (labels + 1) % 3, labels)
    methods = []

    def predict(method, dataset, batch_size):
        assert dataset is data
        methods.append(method)
        for part in (order[5:], order[:5]):
            other = (part + 6) % 12  # of another image
            if method == 'swaps':
                moved = {'image': 0.5, 'question': 1.0, 'both': 0.2}
                yield (
                    {k: np.full(len(part), v) for k, v in moved.items()} | {'row': other},
                    {'row': part},
                )
                continue
            right = answers if method == 'answer_other_image' else texts
            ids, mask = task.tokenizer.encode([right[row] for row in part], 40)
            found = (ids, mask.sum(1))
            yield (*found, other) if method == 'answer_other_image' else found, {'row': part}

    monkeypatch.setattr(scores.ReceiptScores, '_examples', lambda *_: {})
    results = results_of(order, predicted=classes[order])
    found = task.evaluators()['test'].run(predict, final=final, results=results)
    metrics = found.metrics
    swaps = ['swaps', 'answer_other_image']
    assert methods == (['answer_final', *swaps] if final else ['answer_running'])
    if final:
        assert metrics['swap_cosine_image'] == 0.5 and metrics['swap_cosine_question'] == 1
        assert metrics['modality_verdict'] == 'ignores_question'
        assert metrics['questions_other_image'] == 12
        assert metrics['content_accuracy_other_image'] == 1
    assert metrics['accuracy'] == 0.75 and metrics['exact_match'] == pytest.approx(8 / 12)
    assert metrics['content_accuracy'] == pytest.approx(8 / 12)
    assert metrics['perplexity'] == pytest.approx(np.exp(2.0))
    assert set(found.figures) == ({'confusion'} if final else set())


def test_the_losses_of_a_split_are_means_over_its_questions_and_tokens(cache, model):
    """Here by hand, from outputs that the engine joins from batches of another size."""
    built, predictor = model
    evaluator = built.task.evaluators()['val']
    evaluator.batch_size = 4
    weights = evaluate.LossWeights.of(built.stages[0], 0, built.final_weights)
    results = evaluate.losses(predictor, built.task, evaluator, weights)
    batch = rows_of(evaluator.dataset)
    outputs, _ = forward(built, predictor.variables, batch, None)
    tokens = batch['answer_mask'].sum()
    expected = {
        'classification': outputs['classification'].mean(),
        'language': outputs['language'].sum() / tokens,
        'accuracy': (outputs['predicted'] == batch['label']).mean(),
        'token_accuracy': outputs['tokens_correct'].sum() / tokens,
    }
    expected['loss'] = expected['final_loss'] = expected['classification'] + expected['language']
    assert results.losses == pytest.approx({k: float(x) for k, x in expected.items()}, rel=1e-5)


def test_an_error_in_generation_is_an_error(model):
    """The original's was swallowed, and its BLEU was 0 for ever."""

    def predict(method, dataset, batch_size):
        raise RuntimeError('no answer')

    results = results_of(np.arange(9), predicted=np.zeros(9, int))
    with pytest.raises(RuntimeError, match='no answer'):
        model[0].task.evaluators()['val'].run(predict, final=False, results=results)


def test_texts_cut_and_rows_skipped_of_a_split_are_counted(cache, model):
    task = build.run(tiny(cache, data__buckets=(8,))).task
    val = task.dataset('val')
    val.skipped = {'unreadable_image': 2, 'malformed_row': 1}
    found = task.evaluators()['val'].run(
        lambda method, data, size: model[1](method, model[0].task.dataset('val'), size),
        final=False,
        results=results_of(np.arange(9), predicted=np.zeros(9, int)),
    )
    assert found.metrics['rows_skipped'] == 3
    assert found.metrics['texts_cut'] == val.texts_cut > 0
    train = task.dataset('train')
    assert train.skipped == {'train texts_cut, rows kept': train.texts_cut}
    assert model[0].task.dataset('train').skipped == {}


def test_answers_are_decoded_as_configured(cache, model, monkeypatch):
    calls = []

    def generate(*arguments, **options):
        calls.append(options)
        return autoregressive.Generated(jnp.zeros((9, 24), jnp.int32), jnp.zeros(9), None)

    config = tiny(cache, decode__running__method='sample', decode__running__top_k=7)
    task = build.run(config).task
    batch = rows_of(task.dataset('val'))
    monkeypatch.setattr(autoregressive, 'generate', generate)
    for method in (task.answer_running, task.answer_final):
        jax.eval_shape(method, model[1].variables, batch)
    running, final = calls
    assert (running['method'], running['top_k'], running['top_p']) == ('sample', 7, 0.9)
    assert running['temperature'] == 0.7 and running['keys'].shape == (9,)
    assert (final['method'], final['beams'], final['length_penalty']) == ('beam', 4, 1.0)
    for options in calls:
        assert options['max_tokens'] == 24 and options['eos'] == task.opening_id


def test_greedy_answers_are_what_the_teacher_forced_model_finds_most_probable(model):
    built, predictor = model
    val = built.task.dataset('val')
    ((tokens, lengths), batch), *rest = predictor('answer_running', val, 16)
    assert not rest and tokens.shape == (9, 24) and lengths.min() >= 1
    mask = np.arange(24) < lengths[:, None]
    batch = {**batch, 'answer': tokens, 'answer_mask': mask}
    found, _ = forward(built, predictor.variables, batch, None)
    assert found['tokens_correct'].tolist() == found['tokens'].tolist() == lengths.tolist()


def test_every_method_of_an_evaluator_is_traced_before_the_first_step(model, monkeypatch):
    built, _ = model
    for name in ('answer_running', 'answer_final', 'attention'):
        with monkeypatch.context() as patch:
            patch.setattr(built.task, name, lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                build.check(built)


# Modes --------------------------------------------------------------------------------------


def call(mode, config, workdir, **options):
    command = modes.Command(mode, epath.Path(workdir), existing=True, **options)
    return modes.run(config_lib.resolve(config), command)


def test_predict_answers_the_question_about_the_picture(trained, tmp_path, capsys):
    workdir, config, _ = trained
    path = tmp_path / 'p.png'
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)).save(path)
    options = dict(input=str(path), output=str(tmp_path / 'out'))
    call('predict', config, workdir, question='Is there a receipt?', **options)
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / 'out/answer.json').read_text())
    assert found['question'] == 'Is there a receipt?' and found['picture'] == str(path)
    assert found['class'] in ('0', '1', '2+') and 1 / 3 <= found['probability'] <= 1
    assert f'{found["class"]} receipt(s), probability {found["probability"]:.3f}' in printed
    assert found['answer'] in printed
    with Image.open(tmp_path / 'out/attention.png') as drawn:
        assert drawn.size[0] > 200
    with pytest.raises(UserError, match='the question is empty'):
        call('predict', config, workdir, question='', **options)


@pytest.mark.parametrize('first', [True, False])
def test_one_host_writes_what_all_compute(trained, tmp_path, monkeypatch, capsys, first):
    workdir, config, _ = trained
    monkeypatch.setattr(parallel, 'is_first', lambda: first)
    call('embed', config, workdir, output=str(tmp_path / 'out'))
    assert (tmp_path / 'out/embeddings.npy').exists() is first
    assert bool(capsys.readouterr().out) is first


def test_predict_names_a_missing_image(model, tmp_path):
    with pytest.raises(UserError, match=r'gone\.png does not exist'):
        model[0].task.predict(model[1], str(tmp_path / 'gone.png'), tmp_path / 'out')
    (tmp_path / 'no.png').write_text('no picture')
    with pytest.raises(UserError, match=r'no\.png'):
        model[0].task.predict(model[1], str(tmp_path / 'no.png'), tmp_path / 'out')


def test_a_task_that_answers_none_refuses_a_question(tmp_path, monkeypatch):
    monkeypatch.setattr(modes, 'weights_from', lambda *_: ({}, 0))
    with pytest.raises(UserError, match='PK takes no --question'):
        call('predict', runs.toy('PK'), tmp_path, input='x', question='What is it?')


def test_embed_writes_the_mean_image_token_of_every_row(model, tmp_path):
    built, predictor = model
    assert '45 rows' in built.task.embed(predictor, tmp_path)
    found = np.load(tmp_path / 'embeddings.npy')
    index = [json.loads(line) for line in (tmp_path / 'index.jsonl').read_text().splitlines()]
    assert found.shape == (45, 16) and [entry['row'] for entry in index] == list(range(45))
    for split, pictures in PICTURES.items():
        assert sum(entry['split'] == split for entry in index) == 3 * pictures
    val = built.task.dataset('val')
    encode = functools.partial(built.task.model.apply, train=False, method='encode')
    images = jax.jit(encode)(predictor.variables, rows_of(val)['images']).mean(1)
    for row in range(9):
        entry = next(
            e
            for e in index
            if e['split'] == 'val'
            and e['path'] == val.record(row)['image_path']
            and e['question'] == val.record(row)['question']
        )
        np.testing.assert_allclose(found[entry['row']], images[row], atol=1e-5)


def test_the_heads_have_the_exact_gelu(model):
    """The tanh form of it, Flax's default, differs from the published one by up to 4e-4."""
    task, predictor = model[0].task, model[1]
    x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 16)), jnp.float32)
    params = predictor.variables['params']['classifier']
    stats = predictor.variables['batch_stats']['classifier']
    found = task.model.apply(predictor.variables, x[:, None], None, train=False, method='classify')
    y = np.asarray(x, np.float64)
    for index in range(2):
        linear, norm, mean = (
            params[f'linear_{index}'],
            params[f'norm_{index}'],
            stats[f'norm_{index}'],
        )
        y = y @ linear['kernel'] + linear['bias']
        y = (y - mean['mean']) / np.sqrt(np.asarray(mean['variance']) + 1e-5)
        y = y * norm['scale'] + norm['bias']
        y = y * (1 + erf(y / np.sqrt(2))) / 2
    y = y @ params['out']['kernel'] + params['out']['bias']
    np.testing.assert_allclose(found, y, rtol=1e-5, atol=1e-5)


def test_swaps_compare_with_another_row_of_the_batch(model):
    built, predictor = model
    task = built.task
    batch = rows_of(task.dataset('val'))
    batch['mask'] = np.arange(len(batch['mask'])) < len(batch['mask']) - 1
    real = int(batch['mask'].sum())
    other = (np.arange(real) + real // 2) % real
    found = jax.jit(task.swaps)(predictor.variables, batch)
    np.testing.assert_array_equal(found['row'][:real], batch['row'][other])

    def probabilities(**changes):
        """Of the answer's tokens, by the loss of each token put in its place."""
        inputs = {**batch, **changes}
        apply = functools.partial(task.model.apply, predictor.variables)
        image = apply(inputs['images'], train=False, method='encode')
        question = inputs['question'], inputs['question_mask']
        prefix, mask, _ = apply(image, *question, train=False, method='prefix')
        opened = np.pad(batch['answer'], ((0, 0), (1, 0)), constant_values=task.opening_id)[:, :-1]
        shifted = np.pad(batch['answer_mask'], ((0, 0), (1, 0)), constant_values=True)[:, :-1]
        logits = apply(prefix, mask, opened, shifted, train=False, method='answer')
        return np.asarray(jax.nn.softmax(logits), np.float64)

    at = np.concatenate([other, np.arange(real, len(batch['mask']))])
    images = {'images': batch['images'][at]}
    questions = {name: batch[name][at] for name in ('question', 'question_mask')}
    before = probabilities()
    for name, changes in (
        ('image', images),
        ('question', questions),
        ('both', images | questions),
    ):
        cosines = np.sqrt(before * probabilities(**changes)).sum(-1)
        expected = np.mean(cosines, axis=1, where=batch['answer_mask'])
        np.testing.assert_allclose(found[name][:real], expected[:real], rtol=1e-5)
    tokens, lengths, rows = jax.jit(task.answer_other_image)(predictor.variables, batch)
    moved = jax.jit(task.answer_final)(predictor.variables, {**batch, **images})
    np.testing.assert_array_equal(rows[:real], batch['row'][other])
    np.testing.assert_array_equal(lengths[:real], moved[1][:real])
    np.testing.assert_array_equal(tokens[:real], moved[0][:real])


def test_the_final_scores_tell_what_the_answers_ignore(trained):
    *_, results = trained
    final = results['final']['test']
    assert 0 <= final['swap_cosine_image'] <= 1 and 0 <= final['swap_cosine_question'] <= 1
    assert 0 <= final['content_accuracy_other_image'] <= 1
    assert final['modality_verdict']
