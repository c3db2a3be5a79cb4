"""The sign-language recipe: runs, scores against oracles, distillation, and every mode."""

import functools
import itertools
import json
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import jiwer
import numpy as np
import optax
import pytest
from etils import epath

from mmjax.engine import build, evaluate, modes, optim, step
from mmjax.engine import config as config_lib
from mmjax.engine.checkpoint import load_weights
from mmjax.engine.task import towers_training
from mmjax.engine.train import weights_from
from mmjax.errors import UserError
from mmjax.models.layers import MaskedBatchNorm
from mmjax.models.mobilenet1d import PUBLISHED
from mmjax.recipes.sign import task as sign
from mmjax.recipes.sign.model import EVALUATION, PARTS, Sign
from mmjax.recipes.sign.scores import SignScores
from tests import runs

SENTENCES = {
    'train': ['A B', 'C', 'B B A', 'D A C', 'A A', 'C D', 'B', 'D B A', 'A C B', 'B A D'],
    'dev': ['A B', 'C NEW', 'D A B'],
    'test': ['B', 'A C D'],
}
FRAMES = {'train': [12, 9, 3, 30, 14, 11, 8, 28, 26, 31], 'dev': [13, 30, 10], 'test': [9, 24]}
LOSSES = ('ctc', 'teacher_ctc', 'distillation', 'smoothing')
INFEASIBLE = {'train': 1, 'dev': 1, 'test': 0}  # 'B B A' needs 4 frames; 'NEW' has no symbol


class Small(nn.Module):
    """In place of the published model, where that is not the point: it compiles in a second."""

    vocabulary: int
    width: int

    def setup(self):
        self.encoder = {'all': nn.Dense(self.width)}
        self.mobilenet = MaskedBatchNorm()
        self.head = nn.Dense(self.vocabulary)

    def __call__(self, features, mask, *, train=EVALUATION, packed_length=None):
        x = jnp.tanh(self.mobilenet(self.encoder['all'](features), mask, train=train['mobilenet']))
        x = jnp.where(mask[..., None], x, 0)
        self.sow('intermediates', 'lstm_inputs', x)
        self.sow('intermediates', 'hidden', x)
        return self.head(x)


@pytest.fixture(scope='module', autouse=True)
def small():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sign, 'Sign', lambda words, _, *, width, **more: Small(words, width))
        yield


def write(root, renamed=lambda word: word, scale=1.0):
    rng = np.random.default_rng(0)
    (root / 'annotations').mkdir(parents=True)
    (root / 'streams.json').write_text('{"hands": [0, 4], "face": [4, 6]}')
    for split, texts in SENTENCES.items():
        (root / 'features' / split).mkdir(parents=True)
        lines = ['id|signer|annotation']
        for row, (text, frames) in enumerate(zip(texts, FRAMES[split], strict=True)):
            lines.append(f'{split}{row}|me|{" ".join(map(renamed, text.split()))}')
            features = scale * rng.normal(3, 2, (frames, 6)).astype(np.float32)
            np.savez(root / f'features/{split}/{split}{row}.npz', features=features)
        (root / f'annotations/{split}.corpus.csv').write_text('\n'.join(lines))
    return root


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp('data') / 'root')


def tiny(words, root, **changes):
    """Returns the smoke config, still smaller; changes as in runs.toy."""
    config = runs.recipe('sign_ctc', f'smoke,{words}')
    for model in (config.model.student, config.model.teacher):
        model.update(stream_width=8, stem=8, width=8, lstm_features=8)
    if 'distill' not in words:
        config.stages = ('train',)
    config.log.tensorboard = False
    config.data.root, config.data.cache = str(root), str(root.parent / 'cache')
    return runs.change(config, **changes)


@pytest.fixture(scope='module')
def trained(tmp_path_factory, folder):
    """Returns (workdir, config, results, what was traced) of a small model's run."""
    workdir = tmp_path_factory.mktemp('run') / 'run'
    config = tiny('', folder, data__buckets=2, data__frame_rate=10.0)
    config.stage.train.steps, config.best.metric, config.optimizer.warmup_epochs = 6, '', 1.0
    traces, read = [], sign.SignTask.log_probs
    counting = lambda function: lambda *a, **k: traces.append('step') or function(*a, **k)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, 'train_step', counting(step.train_step))
        patch.setattr(sign.SignTask, 'log_probs', lambda *a: traces.append('read') or read(*a))
        return workdir, config, runs.run(config, workdir), traces


@pytest.fixture(scope='module')
def every_loss(folder):
    """Returns (built, variables, measure) of a fresh teacher and student that learn together."""
    weights = dict.fromkeys(LOSSES, 1.0)
    options = dict(losses__blank_penalty=0.5, losses__distillation_temperature=2.0)
    config = tiny('distill', folder, loss_weights=weights, **options)
    config.stages, config.stage.both = ('both',), dict(steps=1)
    built = build.run(config)

    def measure(variables, batch):
        task, stage = built.task, built.stages[0]
        train = dict.fromkeys(task.towers, True)
        outputs, stats = task.forward(variables, batch, stage, train=train, key=jax.random.key(0))
        return task.terms(variables, outputs, batch, stage), outputs, stats

    # Runs once a shape: fast code would take longer to make than it saves.
    measure = jax.jit(measure, compiler_options={'xla_backend_optimization_level': 0})
    return built, built.init_variables(), measure


def training_logits(built, variables, batch, name):
    """Returns the logits of one model in training, without the task."""
    own = {part: tree[name] for part, tree in variables.items()}
    apply = functools.partial(built.task.models[name].apply, own, train=dict.fromkeys(PARTS, True))
    return apply(batch['features'], batch['frames'], mutable=['batch_stats'])[0]


def batch_of(task, split, rows, bucket=0):
    data = task.dataset(split)
    examples = [data.example(row, np.random.default_rng(row), False) for row in rows]
    return data.collate(examples, bucket) | {'mask': np.ones(len(rows), bool)}


def test_a_run_counts_errors_what_cannot_be_aligned_and_programs(trained):
    workdir, config, results, traces = trained
    assert set(results['final']) == {'dev', 'test'}
    assert results['skipped'] == {'infeasible': INFEASIBLE['train']}
    for split, scores in results['final'].items():
        edits = sum(scores[name] for name in ('substitutions', 'deletions', 'insertions'))
        assert scores['wer'] == pytest.approx(edits / scores['words'])
        assert 0 <= scores['ser'] <= 1 and scores['wer_beam'] >= 0
        assert 0 < scores['ctc_per_label'] < scores['ctc'] == scores['loss']
        assert scores['infeasible'] == INFEASIBLE[split] and scores['temporal_variance'] > 1e-6
    found = map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())
    epoch = [line for line in found if 'loss' in line][:3]
    assert sum(line['infeasible'] for line in epoch) == INFEASIBLE['train']
    assert sum(line['count/ctc'] for line in epoch) == len(SENTENCES['train']) - 1
    assert all(0 < line['loss'] < 100 for line in epoch)
    # Two buckets: a program each, of the step and, at most, of what is drawn.
    assert traces.count('step') == 2 and 1 <= traces.count('read') <= 2
    rates = [line['lr/student'] / config.optimizer.learning_rate for line in epoch]
    assert rates == pytest.approx([0.1, 0.4, 0.7])  # the original promised a warm-up


def test_the_recipes_own_model_has_what_the_task_asks_for(folder, monkeypatch):
    """Traced, not compiled, and without most of its blocks: its own tests see to these."""
    monkeypatch.setattr(sign, 'Sign', functools.partial(Sign, blocks=PUBLISHED[:2]))
    built = build.run(tiny('distill', folder))
    build.check(built)


def test_word_error_rates_are_those_of_jiwer(folder, monkeypatch):
    """Of logits that spell what they shall; an unknown word is wrong, whatever is read."""
    built = build.run(tiny('distill', folder))
    task, words = built.task, built.task.vocabulary.words
    hypotheses = [['A', 'A', 'C', 'B', 'D', 'B', 'C'], [], ['D', 'B']]
    spelled = np.full((3, built.data.lengths[-1], len(words)), -9.0, np.float32)
    spelled[..., 0] = 0
    silent = spelled.copy()
    for row, hypothesis in enumerate(hypotheses):
        spelled[row, FRAMES['dev'][row] :, 1] = 9  # beyond the end nothing is read
        for place, word in enumerate(hypothesis):
            spelled[row, 2 * place, words.index(word)] = 9

    def known(name, variables, batch, mutable=()):
        logits = jnp.asarray(spelled if name == 'student' else silent)[batch['row']]
        constant = jnp.where(batch['frames'][..., None], 1.0 + batch['row'][:, None, None], 0.0)
        return (logits, {'intermediates': {'lstm_inputs': [constant]}}) if mutable else logits

    monkeypatch.setattr(task, '_apply', known)
    predictor = evaluate.Predictor(task, {}, built.mesh)
    found = task.evaluators()['dev'].run(predictor, final=False).metrics
    expected = jiwer.process_words(SENTENCES['dev'], [' '.join(read) for read in hypotheses])
    for name in ('wer', 'substitutions', 'deletions', 'insertions'):
        assert found[name] == pytest.approx(getattr(expected, name)), name
    assert found['wer'] > 1 and found['wer_beam'] == pytest.approx(expected.wer)
    # An unknown word is no blank: to read nothing there is an error.
    assert found['deletions'] == 3 and found['ser'] == 1 and found['unknown_words'] == 1
    assert found['ser_beam'] == found['teacher_wer'] == 1
    assert (found['sentences'], found['words']) == (3, 7)
    two = jiwer.process_words(SENTENCES['dev'][:2], [' '.join(read) for read in hypotheses[:2]])
    assert found['wer_of_2'] == pytest.approx(two.wer) != found['wer_of_3']
    assert found['temporal_variance'] < 1e-12  # of equal features: padding takes no part


def test_ctc_is_that_of_each_row_alone_and_equal_models_have_nothing_to_distil(every_loss):
    built, variables, measure = every_loss
    batch = batch_of(built.task, 'train', [0, 2, 3])
    terms, outputs, _ = measure(variables, batch)
    losses, feasible = outputs['ctc']
    assert feasible.tolist() == [True, False, True]
    logits = training_logits(built, variables, batch, 'student')
    total = []
    for row, frames, labels in ((0, 12, [1, 2]), (2, 30, [4, 1, 3])):
        alone = logits[row : row + 1, :frames].at[..., 0].add(-0.5)
        zeros, labels = np.zeros((1, frames)), np.array([labels])
        total.append(float(optax.ctc_loss(alone, zeros, labels, np.zeros(labels.shape))[0]))
        assert float(losses[row]) == pytest.approx(total[-1], rel=1e-5)
    assert terms['ctc_per_label'] == pytest.approx((total[0] / 2 + total[1] / 3) / 2, rel=1e-5)
    assert tuple(terms['ctc']) == pytest.approx((sum(total), 2), rel=1e-5)
    assert terms['infeasible'] == terms['teacher_infeasible'] == 1
    taught = training_logits(built, variables, batch, 'teacher').at[..., 0].add(-0.5)
    alone = optax.ctc_loss(taught[:1, :12], np.zeros((1, 12)), np.array([[1, 2]]), np.zeros((1, 2)))
    assert float(outputs['teacher_ctc'][0][0]) == pytest.approx(float(alone[0]), rel=1e-5)
    assert terms['teacher_ctc'].count == 2 and terms['teacher_ctc'].total != terms['ctc'].total
    equal = {part: dict.fromkeys(tree, tree['student']) for part, tree in variables.items()}
    nothing = abs(measure(equal, batch)[0]['distillation'].total)
    assert nothing < 1e-5 < 1e-3 < terms['distillation'].total


def test_losses_of_frames_are_those_of_their_formulas(every_loss):
    built, variables, measure = every_loss
    batch = batch_of(built.task, 'train', [0, 2, 3])
    terms, _, _ = measure(variables, batch)
    student, teacher = (
        np.asarray(training_logits(built, variables, batch, name), float)[batch['frames']]
        for name in ('student', 'teacher')
    )
    frames = 12 + 3 + 30
    soft = lambda logits: np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    # Frames that the teacher is sure are blank weigh .05; the temperature is 2.
    weights = 1 - 0.95 * soft(teacher)[:, 0]
    assert 0.1 * frames < weights.sum() < 0.99 * frames
    p, q = soft(student / 2), soft(teacher / 2)
    divergence = (weights[:, None] * q * np.log(q / p)).sum()
    assert terms['distillation'].count == pytest.approx(weights.sum(), rel=1e-5)
    assert terms['distillation'].total == pytest.approx(4 * divergence, rel=1e-4)
    p = soft(student)
    uniform = (p * np.log(p * p.shape[1])).sum()
    assert tuple(terms['smoothing']) == pytest.approx((uniform, frames), rel=1e-4)


def test_what_is_decoded_has_the_blank_penalty(every_loss):
    built, variables, _ = every_loss
    batch = batch_of(built.task, 'train', [0, 3])
    for name in ('student', 'teacher'):
        own = {part: tree[name] for part, tree in variables.items()}
        model = built.task.models[name]
        logits = np.array(model.apply(own, batch['features'], batch['frames']), float)
        logits[..., 0] -= 0.5
        expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        log_probs = built.task.log_probs(variables, batch, name)
        np.testing.assert_allclose(log_probs, expected, rtol=1e-4, atol=1e-5)


def test_rows_that_fill_a_batch_and_longer_buckets_change_nothing(every_loss):
    """Neither losses nor batch statistics."""
    built, variables, measure = every_loss
    found = []
    for rows, bucket in (([0, 2, 3], 0), ([0, 2, 3, 0, 0, 2], 0), ([0, 2, 3], 50)):
        batch = batch_of(built.task, 'train', rows, bucket) | {'mask': np.arange(len(rows)) < 3}
        found.append(measure(variables, batch)[::2])
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)
    jax.tree.map(close, *found[:2])
    jax.tree.map(close, *found[1:])


def test_each_stage_moves_its_own_model_only(folder, tmp_path):
    config = tiny('distill', folder, checkpoint__keep=9, optimizer__learning_rate=0.05)
    config.stage.teacher.steps = config.stage.student.steps = config.checkpoint.every_steps = 4
    results = runs.run(config, tmp_path)
    fresh = jax.tree.map(np.asarray, build.run(config).init_variables())
    states = [(fresh['params'], fresh['batch_stats'])]
    states += [load_weights(str(tmp_path / f'checkpoints/{at}'))[:2] for at in (4, 8)]
    for at, moves, stays in ((0, 'teacher', 'student'), (1, 'student', 'teacher')):
        for old, new in zip(states[at], states[at + 1], strict=True):
            jax.tree.map(np.testing.assert_array_equal, new[stays], old[stays])
            moved = jax.tree.map(lambda a, b: bool((a != b).any()), new[moves], old[moves])
            assert jax.tree.all(moved), moves
    assert set(results['stages']['teacher']) == {'loss', 'loss/teacher_ctc'}
    assert set(results['stages']['student']) == {'loss', 'loss/ctc', 'loss/distillation'}
    dev = results['final']['dev']
    assert dev['loss'] == pytest.approx(0.3 * dev['ctc'] + 0.7 * dev['distillation'])
    assert dev['teacher_wer'] >= 0


def test_a_trained_student_becomes_the_teacher(trained, folder):
    config = tiny('distill', folder)
    spec = f'{trained[0]}/checkpoints/6:student→teacher'
    with pytest.raises(UserError, match=r'params/student/.* would stay fresh'):
        weights_from(build.run(config), spec)
    config.init.allow_fresh = ('(params|batch_stats)/student/.*',)
    found, _ = weights_from(build.run(config), spec)
    fresh = build.run(config).init_variables()
    for part, saved in zip(('params', 'batch_stats'), load_weights(spec), strict=False):
        jax.tree.map(np.testing.assert_array_equal, found[part]['teacher'], saved['teacher'])
        jax.tree.map(np.testing.assert_array_equal, found[part]['student'], fresh[part]['student'])


def call(mode, config, workdir, **options):
    command = modes.Command(mode, epath.Path(workdir), existing=True, **options)
    assert modes.run(config_lib.resolve(config), command) == 0


def test_what_is_read_of_a_file_has_times_in_seconds(trained, folder, capsys, tmp_path):
    workdir, config, _, _ = trained
    path = folder / 'features/test/test1.npz'
    call('predict', config, workdir, input=str(path), output=str(tmp_path))
    told, found = capsys.readouterr().out, json.loads((tmp_path / 'glosses.json').read_text())
    assert f'beam search: {" ".join(found["beam"])}' in told
    task = build.run(config, assets=workdir).task
    variables = dict(zip(('params', 'batch_stats'), load_weights(str(workdir)), strict=False))
    scores, words = task.log_probs(variables, batch_of(task, 'test', [1])), task.vocabulary.words
    best = np.asarray(scores)[0, : FRAMES['test'][1]].argmax(1)
    edges = [0, *(np.flatnonzero(np.diff(best)) + 1).tolist(), len(best)]
    spans = [(a, b) for a, b in itertools.pairwise(edges) if best[a]]
    expected = [{'gloss': words[best[a]], 'start': a / 10, 'end': b / 10} for a, b in spans]
    assert len(expected) > 1 and found['glosses'] == expected
    assert told.startswith('{start:7.2f} s – {end:6.2f} s  {gloss}\n'.format(**expected[0]))


def test_a_run_is_evaluated_and_embedded_as_it_was_left(trained, capsys, tmp_path):
    workdir, config, results, _ = trained
    call('evaluate', config, workdir)
    found = json.loads(capsys.readouterr().out)
    assert found['test']['ctc'] == pytest.approx(results['final']['test']['ctc'], rel=1e-5)
    call('embed', config, workdir, output=str(tmp_path))
    rows = [json.loads(line) for line in (tmp_path / 'index.jsonl').read_text().splitlines()]
    wanted = [f'{split}{row}' for split, texts in SENTENCES.items() for row in range(len(texts))]
    assert [row['id'] for row in rows] == wanted
    embeddings = np.load(tmp_path / 'embeddings.npy')
    assert embeddings.shape == (len(rows), 8)
    task = build.run(config, assets=workdir).task
    own = {
        part: tree['student']
        for part, tree in zip(('params', 'batch_stats'), load_weights(str(workdir)), strict=False)
    }
    batch = batch_of(task, 'test', [1])
    _, changed = task.models['student'].apply(
        own, batch['features'], batch['frames'], mutable=['intermediates']
    )
    (hidden,) = changed['intermediates']['hidden']
    mean = np.asarray(hidden)[0, : FRAMES['test'][1]].mean(0)
    np.testing.assert_allclose(embeddings[-1], mean, rtol=1e-4, atol=1e-5)


def test_a_run_keeps_its_words_and_its_scale_beside_other_data(trained, tmp_path):
    workdir, config, _, _ = trained
    other = write(tmp_path / 'other', lambda word: {'A': 'Z'}.get(word, word), scale=7.0)
    config = tiny('', other, decode__language_model=0.5)
    own, fresh = build.run(config, assets=workdir).task, build.run(config).task
    assert own.vocabulary.words == ('<blank>', 'A', 'B', 'C', 'D') != fresh.vocabulary.words
    with np.load(workdir / 'normalization.npz') as saved:
        np.testing.assert_array_equal(own.normalization.mean, saved['mean'])
    assert np.abs(fresh.normalization.mean[0] / own.normalization.mean[0]) > 5
    assert own.dataset('dev').example(0, None, False)['labels'].tolist() == [-1, 2]
    assert own.dataset('dev').counts['unknown_words'] == 3 and own.beam_options[
        'language_model'
    ].shape == (5, 5)


def test_what_cannot_be_read_is_named(folder, tmp_path):
    np.savez(tmp_path / 'other.npz', landmarks=np.ones((9, 6)))
    np.savez(tmp_path / 'less.npz', features=np.ones((9, 5)))
    task = build.run(tiny('', folder)).task
    for name, message in (
        ('gone', r'gone\.npz does not exist'),
        ('other', r"other\.npz cannot be read: it has no 'features', but \['landmarks'\]"),
        ('less', r'less\.npz: features are float64 \(9, 5\), not .* \[frames, 6\]'),
    ):
        with pytest.raises(UserError, match=message):
            task.predict(None, str(tmp_path / f'{name}.npz'), tmp_path / 'out')


def test_frames_are_packed_in_training_only_and_unless_switched_off(folder, monkeypatch):
    for pack in (True, False):
        built = build.run(tiny('', folder, model__pack=pack, batch_size=8, accumulation=2))
        task, stage = built.task, built.stages[0]
        calls = []
        monkeypatch.setattr(task, '_apply', lambda *a, **options: calls.append(options) or 1 / 0)
        variables = {'params': {}, 'batch_stats': {}}
        for key in (jax.random.key(0), None):
            train = dict.fromkeys(task.towers, key is not None)
            with pytest.raises(ZeroDivisionError):
                task.forward(variables, built.batch, stage, train=train, key=key)
        (length,) = built.data.lengths
        expected = built.data.packed_lengths(4)[length]  # of the rows of a micro-batch
        assert [call['packed_length'] for call in calls] == [expected if pack else None, None]


BACKBONES = '(student|teacher)/(encoder|mobilenet).*'


@pytest.mark.parametrize(
    ('rules', 'group', 'frozen'),
    [
        ((), 'student', 'student/'),
        ((), 'teacher', 'teacher/'),
        ((('backbones', BACKBONES),), 'backbones', BACKBONES),
    ],
    ids=['student', 'teacher', 'own rules'],
)
def test_frozen_parts_run_as_in_evaluation(folder, monkeypatch, rules, group, frozen):
    """The same outputs in two steps with other keys and in evaluation; statistics stay."""
    config = tiny('distill', folder, rules=rules, model__pack=False)
    config.loss_weights = dict.fromkeys(LOSSES, 1.0)
    config.stages = ('both',)
    config.stage.both = dict(steps=1, learning_rates={group: 0.0})
    config.model.student.dropout = config.model.teacher.dropout = 0.5
    config.model.teacher.lstm_layers = 1
    monkeypatch.setattr(sign, 'Sign', functools.partial(Sign, blocks=PUBLISHED[:1]))
    built = build.run(config)
    task, stage = built.task, built.stages[0].compile_key
    train = towers_training(task.towers, dict(built.groups.items), stage)
    batch = batch_of(task, 'train', [0, 2, 3, 4])
    models = []
    apply = task._apply

    def named(name, *arguments, **options):
        models.append(name)
        return apply(name, *arguments, **options)

    monkeypatch.setattr(task, '_apply', named)

    def run(variables, key):
        """Returns {model/module: output} and the new batch statistics."""
        outputs = {}

        def record(call, arguments, options, context):
            out = call(*arguments, **options)
            if len(context.module.path) == 1 and context.method_name == '__call__':
                outputs[f'{models[-1]}/{context.module.name}'] = out
            return out

        parts = dict.fromkeys(train, False) if key is None else train
        with nn.intercept_methods(record):
            _, stats = task.forward(variables, batch, stage, train=parts, key=key)
        return outputs, optim.flatten(stats)

    run = jax.jit(run, compiler_options={'xla_backend_optimization_level': 0})
    variables = built.init_variables()
    one, two = (run(variables, jax.random.key(seed)) for seed in (1, 2))
    evaluation, before = run(variables, None)
    assert len(evaluation) > 10 and any(re.match(frozen, name) for name in evaluation)
    for name, x in evaluation.items():
        if re.match(frozen, name):
            np.testing.assert_array_equal(one[0][name], two[0][name], err_msg=name)
            np.testing.assert_allclose(one[0][name], x, rtol=1e-5, atol=1e-6, err_msg=name)
        elif name.endswith('/head'):  # dropout is live
            assert np.abs(one[0][name] - two[0][name]).max() > 1e-4, name
    # Micro-batches store the logits of a frozen model, and do not recompute them.
    forward = functools.partial(task.forward, batch=batch, stage=stage, train=train)
    traced = jax.make_jaxpr(lambda variables, key: forward(variables, key=key)[0])
    named_frozen = 'name=frozen' in str(traced(variables, jax.random.key(0)))
    assert named_frozen == (group != 'backbones')
    for name, x in before.items():
        same = np.array_equal(one[1][name], x)
        assert same == bool(re.match(frozen, name)), name


@pytest.mark.slow
def test_ten_sentences_are_learnt_by_heart(tmp_path, monkeypatch):
    monkeypatch.setattr(sign, 'Sign', Sign)
    config = runs.recipe('sign_ctc', '')
    config.data.built_in.update(train=10, dev=1, test=1, signers=2, held_out_signers=1)
    config.data.update(cache=str(tmp_path / 'cache'), buckets=1)
    off = dict(noise=0.0, stream_dropout=0.0, feature_dropout=0.0, time_masks=0, stretch=(1.0, 1.0))
    config.data.augmentation.update(off)
    config.model.student.update(dropout=0.0, stream_width=32, width=64, lstm_features=64)
    config.batch_size, config.stage.train.epochs, config.optimizer.warmup_epochs = 10, 200.0, 10.0
    config.sampler.stretch = 1.0
    config.evaluate.every_epochs, config.best.metric = 0.0, ''
    runs.run(config, tmp_path / 'run')
    built = build.run(config)
    params, stats, _ = load_weights(str(tmp_path / 'run'))
    variables = {'params': params, 'batch_stats': stats}
    predictor = evaluate.Predictor(built.task, variables, built.mesh)
    assert SignScores(built.data, 10).run(predictor, final=False).metrics['wer'] == 0
