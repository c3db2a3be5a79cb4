"""The comic task: its losses and scores against NumPy, what the config decides, what is frozen."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.engine import build, evaluate, optim, step, train
from mmjax.engine import config as config_lib
from mmjax.errors import UserError
from mmjax.evals import collapse
from mmjax.losses import contrastive
from mmjax.losses.term import Term
from mmjax.recipes.comic import scores as scores_lib
from mmjax.recipes.comic.scores import PageScores, modality_scores, within_and_across
from tests import runs


def tiny(cache, **changes):
    """The smoke config with both visual towers, dropout everywhere, at its smallest."""
    config = runs.recipe('stage3', 'smoke')
    config.data.update(cache=str(cache), built_in=dict(train=12, val=8), image_size=16)
    config.batch_size = 4
    config.model.visual_backbone = 'both'
    config.model.siglip.update(patch_size=8, width=8, depth=1, heads=2, mlp_width=16, dropout=0.4)
    config.model.resnet.update(width=4, stage_sizes=(1,))
    config.model.bert.update(width=8, heads=2, mlp_width=16, dropout=0.4)
    config.model.heads.update(
        features=16,
        siglip_hidden=8,
        resnet_hidden=8,
        composition_hidden=8,
        gate_hidden=8,
        reconstruction_hidden=8,
        dropout=0.4,
    )
    return runs.change(config, **changes)


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp('cache')


@pytest.fixture(scope='module')
def built(cache):
    return build.run(tiny(cache))


@pytest.fixture(scope='module')
def variables(built):
    return built.init_variables()


def batch_of(built, split='train', rows=4):
    data = built.task.dataset(split)
    rng = np.random.default_rng(0)
    examples = [data.example(row, rng, False) for row in range(rows)]
    return {
        **data.collate(examples, 9),
        'row': np.arange(rows, dtype=np.int32),
        'mask': np.ones(rows, bool),
        'key': jax.random.split(jax.random.key(0), rows),
    }


def outputs_of(built, variables, stage, key, batch=None):
    train = step.towers_training(built.task.towers, dict(built.groups.items), stage)
    if key is None:
        train = dict.fromkeys(train, False)
    batch = batch_of(built) if batch is None else batch
    return built.task.forward(variables, batch, stage, train=train, key=key)


def test_losses_are_those_of_numpy(built, variables):
    batch = batch_of(built)
    outputs, _ = outputs_of(built, variables, built.stages[1], None, batch)
    terms = built.task.terms(variables, outputs, batch, built.stages[1])
    x = {name: np.asarray(value, np.float64) for name, value in outputs.items()}
    unit = lambda v: v / np.linalg.norm(v, axis=-1, keepdims=True)
    panels = batch['panels']
    page = np.nonzero(panels)[0]
    fused = unit(x['fused'][panels])
    logits = fused @ fused.T / 0.07
    np.fill_diagonal(logits, -np.inf)
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    positive = (page[:, None] == page) & ~np.eye(len(page), dtype=bool)
    anchors = positive.any(1)
    each = -np.where(positive, log_p, 0).sum(1)[anchors] / positive.sum(1)[anchors]
    np.testing.assert_allclose(terms['contrastive'].mean(), each.mean(), rtol=1e-4)
    assert int(terms['contrastive'].count) == anchors.sum()

    both = panels & batch['modality'][..., 0] & batch['modality'][..., 1]
    logits = unit(x['vision'][both]) @ unit(x['text'][both]).T / 0.07
    log_softmax = lambda z: z - np.log(np.exp(z).sum(1, keepdims=True))
    rows = np.diag(log_softmax(logits)) + np.diag(log_softmax(logits.T))
    np.testing.assert_allclose(terms['alignment'].mean(), -rows.mean() / 2, rtol=1e-4)

    errors = []
    for p in range(len(panels)):
        hidden = int(outputs['hidden'][p]) if panels[p].sum() > 1 else -1
        if hidden >= 0:
            errors.append(np.mean((x['predicted'][p] - x['fused'][p, hidden]) ** 2))
    np.testing.assert_allclose(terms['reconstruction'].mean(), np.mean(errors), rtol=1e-4)
    assert int(terms['reconstruction'].count) == len(errors)


def test_temperature_and_weights_are_those_of_the_config(cache, built, variables):
    hot = build.run(tiny(cache, losses__temperature=0.5))
    batch = batch_of(built)
    stage = built.stages[1]
    outputs, _ = outputs_of(built, variables, stage, None, batch)
    cold = built.task.terms(variables, outputs, batch, stage)
    warm = hot.task.terms(variables, outputs, batch, stage)
    for name in ('contrastive', 'alignment'):
        assert abs(float(cold[name].mean()) - float(warm[name].mean())) > 0.1
    weighed = build.run(
        tiny(cache, loss_weights=dict(contrastive=2.0, reconstruction=0.0, alignment=0.25))
    )
    state = step.create(variables, weighed.stages[1], weighed.groups, weighed.settings)
    _, metrics = run_step(weighed, weighed.stages[1], state, batch)
    terms = {name: float(metrics[f'loss/{name}']) for name in ('contrastive', 'alignment')}
    expected = 2 * terms['contrastive'] + 0.25 * terms['alignment']
    np.testing.assert_allclose(float(metrics['loss']), expected, rtol=1e-5)
    assert weighed.final_weights == {'contrastive': 2.0, 'alignment': 0.25}


def run_step(built, stage, state, batch):
    call = functools.partial(
        step.train_step,
        task=built.task,
        stage=stage.compile_key,
        groups=built.groups,
        settings=built.settings,
    )
    weights = {name: np.float32(value) for name, value in stage.weights(0).items()}
    batch = {name: x for name, x in batch.items() if name != 'key'}
    return jax.jit(call)(state, batch, optim.rates(stage, built.groups.names, 0), weights)


def test_dropout_is_off_in_evaluation(built, variables):
    stage = built.stages[1]
    batch = batch_of(built)
    evaluated = [
        evaluate.forward(
            built.task, stage.compile_key, variables, {k: batch[k] for k in batch if k != 'key'}
        )
        for _ in range(2)
    ]
    jax.tree.map(np.testing.assert_array_equal, *evaluated)
    plain, _ = outputs_of(built, variables, stage, None, batch)
    trained, _ = outputs_of(built, variables, stage, jax.random.key(1), batch)
    for name in ('vision', 'text', 'fused', 'predicted'):
        np.testing.assert_allclose(plain[name], evaluated[0][name], rtol=1e-5, atol=1e-5)
        assert np.abs(plain[name] - trained[name]).max() > 1e-3, name


def test_only_training_leaves_out_panels_beyond_the_packed_capacity(built, variables, monkeypatch):
    monkeypatch.setattr(built.task, 'panels_per_page', (1.0, 0.0))
    batch = batch_of(built)
    count = int(batch['panels'].sum())
    capacity = 8
    assert count > capacity
    left = {}
    for key in (jax.random.key(0), None):
        outputs, _ = outputs_of(built, variables, built.stages[1], key, batch)
        terms = built.task.terms(variables, outputs, batch, built.stages[1])
        left[key is None] = int(terms['panels_left_out'])
        present = np.abs(np.asarray(outputs['fused'])).sum(-1) > 0
        assert present.sum() == count - left[key is None]
    assert left == {False: count - capacity, True: 0}


def test_pages_are_padded_to_their_bucket_and_scored_alike(cache, built, variables):
    """`data.buckets` once changed nothing: every batch had max_panels."""
    wide = build.run(tiny(cache, data__buckets=(16,)))
    losses = []
    for run, width in ((built, 9), (wide, 16)):
        pages = run.evaluators['val']
        with jax.set_mesh(run.mesh):
            predictor = evaluate.Predictor(run.task, variables, run.mesh)
            weights = evaluate.LossWeights.of(run.stages[1], 0, run.final_weights)
            results = evaluate.losses(predictor, run.task, pages, weights)
        assert results.batch['panels'].shape[1] == results.outputs['fused'].shape[1] == width
        losses.append({k: v for k, v in results.losses.items() if 'reconstruction' not in k})
    for name in ('contrastive', 'alignment', 'unimodal', 'contrastive_rows'):
        assert losses[0][name] == pytest.approx(losses[1][name], rel=1e-5), name


def test_texts_that_are_cut_are_counted(cache):
    built = build.run(tiny(cache, data__max_tokens=6))
    batch = batch_of(built)
    batch['mask'][1] = False
    data = built.task.dataset('train')
    lengths = [
        len(data.tokenizer.encode([text], 99)[0][0].nonzero()[0])
        for row in (0, 2, 3)
        for text in data.record(row)['texts']
    ]
    cut = sum(length > 6 for length in lengths)
    outputs, _ = outputs_of(built, built.init_variables(), built.stages[1], None, batch)
    terms = built.task.terms(built.init_variables(), outputs, batch, built.stages[1])
    assert 0 < int(terms['texts_cut']) == cut


FROZEN = [
    ({'vision': 0.0}, (), ('siglip', 'resnet')),
    ({'text': 0.0}, (), ('bert',)),
    ({'heads': 0.0}, (), ('vision_head', 'text_head', 'composition', 'fusion', 'reconstruction')),
    ({'backbones': 0.0}, (('backbones', '(resnet|bert)/.*'),), ('resnet', 'bert')),
]


@pytest.mark.parametrize(('rates', 'rules', 'towers'), FROZEN)
def test_frozen_towers_run_as_in_evaluation(cache, rates, rules, towers):
    """`both` ignored the freeze, and heads at rate 0 kept their dropout."""
    config = tiny(cache, rules=rules, stages=('pages',))
    config.stage.pages = dict(steps=2, learning_rates=rates)
    built = build.run(config)
    stage = built.stages[0]
    variables = built.init_variables()
    training = step.towers_training(built.task.towers, dict(built.groups.items), stage)
    assert {name for name, trains in training.items() if not trains} == set(towers)

    seen = []
    for key in (jax.random.key(1), jax.random.key(2), None):
        _, changed = capture(built, variables, stage, key)
        seen.append(changed)
    for name in towers:
        outputs = [capture[name] for capture in seen]
        np.testing.assert_array_equal(outputs[0], outputs[1], err_msg=name)
        np.testing.assert_allclose(outputs[0], outputs[2], rtol=1e-5, atol=1e-5, err_msg=name)
    state = step.create(variables, stage, built.groups, built.settings)
    after, _ = run_step(built, stage, state, batch_of(built))
    before, after = (optim.flatten(s['batch_stats']) for s in (state, after))
    moved = {path.split('/')[0] for path in before if not np.array_equal(before[path], after[path])}
    assert not moved & set(towers)
    assert moved == {'resnet', 'composition'} - set(towers)


def capture(built, variables, stage, key):
    """Returns (outputs, {tower: its output on a fixed input}) under the stage's train flags."""
    train = step.towers_training(built.task.towers, dict(built.groups.items), stage)
    if key is None:
        train = dict.fromkeys(train, False)
    model = built.task.model
    features = model.features
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.uniform(-1, 1, (6, 16, 16, 3)), jnp.float32)
    hidden = jnp.asarray(rng.normal(size=(6, features)), jnp.float32)
    tokens = jnp.asarray(rng.integers(5, 50, (6, 8)))
    whole = jnp.ones((6, 8), bool)
    rows = jnp.ones(6, bool)
    calls = {
        'siglip': lambda m: m.siglip(images, train=train['siglip']),
        'resnet': lambda m: m.resnet(images, rows, train=train['resnet']),
        'bert': lambda m: m.bert(tokens, whole, train=train['bert']),
        'vision_head': lambda m: m.vision_head(
            m.siglip(images, train=False),
            m.resnet(images, rows, train=False),
            train=train['vision_head'],
        ),
        'text_head': lambda m: m.text_head(m.bert(tokens, whole, train=False).mean(1)),
        'composition': lambda m: m.composition(hidden[:, :7], rows, train=train['composition']),
        'fusion': lambda m: m.fusion((hidden, hidden, hidden), jnp.ones((6, 3), bool))[0],
        'reconstruction': lambda m: m.reconstruct(hidden, train['reconstruction']),
    }
    out = {}
    for name, call in calls.items():
        rngs = None if key is None else {'dropout': key}
        out[name], _ = model.apply(variables, method=call, rngs=rngs, mutable=['batch_stats'])
    return train, out


@pytest.mark.parametrize('stop', [False, True])
def test_the_context_of_the_reconstruction_may_be_stopped(cache, stop):
    """The target never gets a gradient; with `stop_context` only the head does."""
    built = build.run(tiny(cache, losses__stop_context=stop))
    variables = built.init_variables()
    stage = built.stages[1]
    batch = batch_of(built)

    def loss(params):
        values = {**variables, 'params': params}
        outputs, _ = outputs_of(built, values, stage, None, batch)
        return built.task.terms(values, outputs, batch, stage)['reconstruction'].mean()

    grads = optim.flatten(jax.grad(loss)(variables['params']))
    reached = {path.split('/')[0] for path, g in grads.items() if np.abs(g).max() > 0}
    assert 'reconstruction' in reached
    assert (reached == {'reconstruction'}) is stop
    if not stop:
        assert 'fusion' in reached


@pytest.mark.parametrize(
    ('key', 'column'),
    [('hidden_tokens', 'text'), ('hidden_texts', 'text'), ('hidden_compositions', 'place')],
)
def test_hidden_parts_are_hidden_in_training_alone(cache, key, column):
    built = build.run(tiny(cache, **{f'data__{key}': 1.0}))
    data = built.task.dataset('train')
    rng = np.random.default_rng(0)
    seen = {train: data.example(0, rng, train) for train in (True, False)}
    slot = {'text': 1, 'place': 2}[column]
    assert seen[False]['modality'][:, slot].any() and not seen[True]['modality'][:, slot].any()
    if column == 'text':
        assert not seen[True]['token_mask'].any() and seen[False]['token_mask'].any()
    else:
        assert not seen[True]['composition'].any() and seen[False]['composition'].any()
    assert seen[True]['modality'][:, 0].any()


def test_scores_of_a_split_are_those_of_brute_force():
    rng = np.random.default_rng(3)
    panels = np.arange(5) < rng.integers(2, 6, 7)[:, None]
    has = np.stack([panels, panels & (rng.random(panels.shape) < 0.8), panels], -1)
    draw = lambda: rng.normal(size=(*panels.shape, 6)).astype(np.float32)
    outputs = {'fused': draw() + 2, 'vision': draw(), 'text': draw()}
    scores = within_and_across(outputs, panels, has)
    unit = lambda v: v / np.linalg.norm(v)
    right = []
    for page in range(7):
        texts = [i for i in range(5) if has[page, i, 0] and has[page, i, 1]]
        for i in texts if len(texts) > 1 else ():
            cosines = [
                unit(outputs['vision'][page, i]) @ unit(outputs['text'][page, j]) for j in texts
            ]
            right.append(texts[int(np.argmax(cosines))] == i)
    assert scores['image_to_text_r1'] == pytest.approx(np.mean(right))
    fused = [
        (page, unit(outputs['fused'][page, i])) for page, i in zip(*np.nonzero(panels), strict=True)
    ]
    same, other = [], []
    for a, (p, x) in enumerate(fused):
        for q, y in fused[:a]:
            (same if p == q else other).append(x @ y)
    assert scores['intra_page_cosine'] == pytest.approx(np.mean(same), rel=1e-4)
    assert scores['inter_page_cosine'] == pytest.approx(np.mean(other), rel=1e-4)


def trained_scores(cache, workdir, steps, learning_rate, **changes):
    """Trains a small model on 24 pages; returns the scores on these pages."""
    config = tiny(cache, **changes)
    config.data.update(built_in=dict(train=24, val=8), image_size=24)
    config.model.visual_backbone = 'resnet'
    config.model.resnet.update(width=8, stage_sizes=(1,))
    config.model.bert.update(width=16, mlp_width=16, dropout=0.0)
    config.model.heads.update(features=16, resnet_hidden=16, dropout=0.0)
    config.batch_size = 8
    config.stages = ('pages',)
    config.stage.pages = dict(steps=steps)
    config.optimizer.update(learning_rate=learning_rate, warmup_steps=10)
    config.best.metric = ''
    config.log.every_steps = steps
    runs.run(config, workdir)
    built = build.run(config)
    with jax.set_mesh(built.mesh):
        weights, _ = train.weights_from(built, str(workdir))
        predictor = evaluate.Predictor(built.task, weights, built.mesh)
        weighing = evaluate.LossWeights.of(built.stages[-1], 0, built.final_weights)
        pages = {'train': PageScores(built.task.dataset('train'), 8, built.task.fuse)}
        scores = evaluate.run(pages, predictor, built.task, weighing, final=False)
    return scores['train'].metrics


def test_a_tiny_training_is_healthy(cache, tmp_path):
    """The regression check that the review of stage 3 asked for."""
    scores = trained_scores(cache, tmp_path / 'run', 140, 5e-3)
    assert scores['collapse_verdict'] == 'healthy', scores
    assert scores['image_to_text_r1'] > scores['image_to_text_chance'] + 0.3
    assert scores['contrastive'] < scores['contrastive_collapse'] - 1


def test_a_pull_without_negatives_collapses_and_the_verdict_says_so(cache, tmp_path, monkeypatch):
    """The first loss of the original pulled the panels of a page together, and pushed nothing."""

    def pull(x, labels, mask, *, temperature, chunk):
        unit = x / jnp.linalg.norm(x + 1e-9, axis=-1, keepdims=True)
        same = (labels[:, None] == labels) & mask[:, None] & mask
        distance = jnp.where(same, 1 - unit @ unit.T, 0)
        return Term(distance.sum(), same.sum().astype(jnp.float32)), {}

    monkeypatch.setattr(contrastive, 'supcon', pull)
    weights = dict(contrastive=1.0, reconstruction=0.0, alignment=0.0)
    scores = trained_scores(cache, tmp_path / 'run', 60, 1e-2, loss_weights=weights)
    assert scores['collapse_verdict'] == 'collapsed', scores
    assert scores['intra_page_cosine'] > 0.99 and scores['inter_page_cosine'] > 0.98


def test_the_verdict_names_each_case():
    assert collapse.verdict(0.99, 0.95, 0.9, 0.2, 0.01) == 'collapsed'
    assert collapse.verdict(0.99, 0.5, 0.9, 0.2, 0.01) == 'page_collapsed'
    assert collapse.verdict(0.8, 0.5, 0.21, 0.2, 0.01) == 'weak_alignment'
    assert collapse.verdict(0.8, 0.5, 0.9, 0.2, 0.01) == 'healthy'


WRONG = [
    ('batch_size', 2.5, 'batch_size=2.5 is not an integer'),
    ('data.image_size', 'large', "data.image_size='large' is not an integer"),
    ('data.image_size', 100, 'data.image_size=100 is no multiple of model.siglip.patch_size=8'),
    ('data.max_tokens', 0, 'data.max_tokens=0 is not an integer at least 2'),
    ('data.max_tokens', 500, 'data.max_tokens=500 is more than model.bert.max_length=128'),
    ('data.vocabulary', 10, 'data.vocabulary=10 is not an integer at least 300'),
    ('data.hidden_texts', 1.5, 'data.hidden_texts=1.5 is not a number at least 0 and at most 1'),
    ('data.augmentation.shift', -0.1, 'data.augmentation.shift=-0.1 is not a number at least 0'),
    ('data.max_fault_share', 2.0, 'data.max_fault_share=2.0 is not a number at least 0'),
    ('data.buckets', 'nine', "data.buckets='nine' is not a tuple of integers"),
    ('data.built_in', dict(train=0), 'data.built_in.train=0 is not an integer at least 1'),
    (
        'model.visual_backbone',
        'vit',
        "model.visual_backbone='vit' is not one of 'siglip', 'resnet'",
    ),
    ('model.visual_fusion', 'gated', "model.visual_fusion='gated' is not .* did you mean 'gate'?"),
    ('model.bert.heads', 5, 'model.bert.heads=5 does not divide model.bert.width=32'),
    ('model.heads.dropout', 1.0, 'model.heads.dropout=1.0 is not a number at least 0 and below 1'),
    ('model.heads.featurs', 8, "unknown key model.heads.featurs=8.*did you mean 'features'"),
    ('model.pretrained.bert', 3, 'model.pretrained.bert=3 is not a string or None'),
    ('losses.temperature', 0.0, 'losses.temperature=0.0 is not a number above 0'),
    ('losses.chunk', 'big', "losses.chunk='big' is not an integer at least 1 or 'auto'"),
    ('losses.stop_context', 'yes', "losses.stop_context='yes' is not True or False"),
    ('precision', 'float8', "precision='float8' is not one of 'float32', 'bfloat16', 'float16'"),
]


@pytest.mark.parametrize(('key', 'value', 'message'), WRONG)
def test_a_wrong_value_is_one_sentence(key, value, message):
    config = runs.recipe('stage3', 'smoke')
    if 'image_size' in key and value == 100:
        config.model.visual_backbone = 'both'
    *parents, leaf = key.split('.')
    where = config
    for parent in parents:
        where = where[parent]
    where[leaf] = value
    with pytest.raises(UserError, match=message) as error:
        config_lib.resolve(config)
    assert '\n' not in str(error.value)


def test_a_dict_assigned_over_a_section_merges_with_its_defaults():
    config = runs.recipe('stage3', 'smoke')
    config.best = dict(metric='val/loss')
    config.model.heads = dict(features=8)
    resolved = config_lib.resolve(config)
    assert resolved.best.metric == 'val/loss' and resolved.best.mode == 'min'
    assert resolved.model.heads.features == 8 and resolved.model.heads.dropout == 0.1


def brute_force(alone, has, fuse):
    """The modality scores of `modality_scores`, one panel at a time, in float64."""
    cosine = lambda a, b: a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    credit = lambda gain: 0.5 if abs(gain) <= 0.02 else float(gain > 0)
    places = [tuple(p) for p in np.argwhere(has.all(-1))]
    page = np.array([p for p, _ in places])
    one = lambda x, *which: fuse(x[None], np.isin(np.arange(3), which)[None])[0]
    full = [one(alone[place], 0, 1, 2) for place in places]
    far = max(np.bincount(page).max(), len(places) // 2)
    out = {'swap': [], 'text': [], 'by_page': [], 'hits': [], 'text_only': []}
    for i, place in enumerate(places):
        swapped = alone[place].copy()
        swapped[1] = alone[places[(i + far) % len(places)]][1]
        twin = one(swapped, 0, 1, 2)
        text = alone[place][1]
        out['swap'].append(cosine(full[i], twin))
        out['text'].append(credit(cosine(text, full[i]) - cosine(text, twin)))
        mates = [
            full[j] / np.linalg.norm(full[j]) for j in np.flatnonzero(page == page[i]) if j != i
        ]
        if mates:
            out['by_page'].append(credit(cosine(sum(mates), full[i]) - cosine(sum(mates), twin)))
            for name, rows in (('hits', full), ('text_only', [alone[p][1] for p in places])):
                others = [j for j in range(len(places)) if j != i]
                best = max(others, key=lambda j: cosine(rows[i], rows[j]))
                out[name].append(page[best] == page[i])
    return {name: np.mean(values) for name, values in out.items()}


def test_modality_scores_are_those_of_brute_force():
    rng = np.random.default_rng(1)
    has = np.ones((9, 4, 3), bool)
    has[np.arange(4) >= rng.integers(2, 5, 9)[:, None]] = False
    has[2, 1, 1] = False  # a silent panel
    shared = rng.normal(size=(9, 1, 3, 8))
    alone = (shared + rng.normal(size=(9, 4, 3, 8))) * has[..., None]
    weights = np.array([0.5, 0.3, 0.2])
    fuse = lambda x, present: np.einsum('rmd,rm->rd', x, present * weights)
    scores = modality_scores(fuse, alone, has)
    expected = brute_force(alone, has, fuse)
    assert scores['swap_cosine_text'] == pytest.approx(expected['swap'])
    assert scores['twin_text'] == pytest.approx(expected['text'])
    assert scores['twin_text_by_page'] == pytest.approx(expected['by_page'])
    assert scores['page_r1_complete'] == pytest.approx(expected['hits'])
    assert scores['page_r1_only_text'] == pytest.approx(expected['text_only'])
    assert scores['modality_verdict'] == 'balanced'
    deaf = lambda x, present: np.einsum('rmd,rm->rd', x, present * [0.5, 1e-3, 0.2])
    scores = modality_scores(deaf, alone, has)
    assert scores['modality_verdict'] == 'ignores_text'
    assert scores['swap_cosine_text'] > 0.99 > scores['swap_cosine_vision']
    # At such a weight the sign of a difference of cosines would still tell the twins apart.
    assert scores['twin_text'] == 0.5 and scores['twin_vision'] > 0.9
    has[..., 2] = False  # pages without places are scored by the two other modalities
    scores = modality_scores(fuse, alone * has[..., None], has)
    assert 'twin_composition' not in scores and 'page_map_without_text' not in scores
    few = np.repeat(has[..., :1], 3, -1)
    few[..., 1] = False
    few[0, 0, 1] = True  # one text in all the split: the others are scored without it
    scores = modality_scores(fuse, alone, few)
    assert 'twin_text' not in scores and 'twin_vision' in scores
    assert scores['complete_panels'] == has.any(-1).sum()
    empty = modality_scores(fuse, alone, np.zeros_like(has))
    assert empty == {'complete_panels': 0, 'modality_verdict': 'unknown'}


def test_silent_panels_take_part_in_page_retrieval():
    """`page_map` is of all panels, each by what it has; the complete ones are scored apart."""
    rng = np.random.default_rng(4)
    has = np.ones((6, 4, 3), bool)
    has[::2, 1, 1] = False
    alone = (rng.normal(size=(6, 1, 3, 8)) + rng.normal(size=(6, 4, 3, 8))) * has[..., None]
    fuse = lambda x, present: np.einsum('rmd,rm->rd', x, present * 1.0)
    scores = modality_scores(fuse, alone, has)
    x = fuse(alone.reshape(-1, 3, 8), has.reshape(-1, 3))
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, -2)
    page = np.repeat(np.arange(6), 4)
    expected = np.mean(page[cosines.argmax(1)] == page)
    assert scores['page_r1'] == pytest.approx(expected)
    assert scores['complete_panels'] == 21


def test_chunks_change_nothing():
    rng = np.random.default_rng(5)
    alone = rng.normal(size=(7, 3, 4))
    present = rng.random((7, 3)) < 0.7
    fuse = lambda x, present: (x * present[..., None]).sum(1)
    found = scores_lib._in_chunks(fuse, alone, present, rows=3)
    np.testing.assert_array_equal(found, fuse(alone, present))


def test_pages_are_spread_evenly_up_to_a_limit():
    sizes = np.full(100, 5)
    assert scores_lib._spread(sizes, 10**6).tolist() == list(range(100))
    rows = scores_lib._spread(sizes, 50)
    assert len(rows) == 10 and rows[0] == 0 and rows[-1] == 99


def test_the_unimodal_loss_is_that_of_numpy(built, variables):
    batch = batch_of(built)
    batch['modality'][0, 0] = True, False, False  # its fused embedding is the image's alone
    outputs, _ = outputs_of(built, variables, built.stages[1], None, batch)
    terms = built.task.terms(variables, outputs, batch, built.stages[1])
    x = {name: np.asarray(value, np.float64) for name, value in outputs.items()}
    unit = lambda v: v / np.linalg.norm(v, axis=-1, keepdims=True)
    log_softmax = lambda z: z - np.log(np.exp(z).sum(1, keepdims=True))
    present = batch['modality'] & batch['panels'][..., None]
    present &= present.sum(-1, keepdims=True) > 1
    losses = []
    for index in range(3):
        rows = present[..., index]
        logits = unit(x['alone'][rows][:, index]) @ unit(x['fused'][rows]).T / 0.07
        losses += [*(-np.diag(log_softmax(logits)) - np.diag(log_softmax(logits.T))) / 2]
    np.testing.assert_allclose(terms['unimodal'].mean(), np.mean(losses), rtol=1e-4)
    assert int(terms['unimodal'].count) == len(losses)
    rows = present.all(-1)
    alone = jnp.asarray(outputs['alone'])[rows]
    fused = built.task.fuse(variables, alone, jnp.ones(alone.shape[:2], bool))
    np.testing.assert_allclose(fused, outputs['fused'][rows], rtol=1e-5, atol=1e-5)
    text_alone = jnp.asarray([[False, True, False]]).repeat(len(alone), 0)
    text = built.task.fuse(variables, alone, text_alone)
    np.testing.assert_allclose(unit(np.asarray(text)), unit(np.asarray(alone[:, 1])), atol=1e-5)
