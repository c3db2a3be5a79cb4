"""The retrieval recipe: its losses, frozen towers and scores, and every mode on a tiny run."""

import copy
import dataclasses
import functools
import json
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from PIL import Image
from safetensors.numpy import load_file

from mmjax.data import clip_tokenizer
from mmjax.engine import build, evaluate, modes, step
from mmjax.engine import config as config_lib
from mmjax.engine.task import towers_training
from mmjax.engine.train import weights_from
from mmjax.errors import UserError
from mmjax.losses import contrastive
from tests import runs


def tiny(words='', cache=None, **changes):
    """Returns the smoke config with towers that compile in seconds; changes as in runs.toy."""
    tower = '' if 'rn50' in words else 'vit'
    config = runs.recipe('clip_retrieval', f'smoke,{tower},{words}')
    config.model.vit.update(width=16, depth=1, heads=2, mlp_width=32, patch_size=16)
    config.model.text.update(width=16, heads=2, mlp_width=32)
    config.model.features = 16
    config.log.tensorboard = False
    config.data.cache = str(cache) if cache else None
    return runs.change(config, **changes)


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp('cache')


@pytest.fixture(scope='module')
def trained(tmp_path_factory, cache):
    """Returns (workdir, config, results) of a finished run."""
    workdir = tmp_path_factory.mktemp('run') / 'run'
    config = tiny('v2', cache)
    return workdir, config, runs.run(config, workdir)


@pytest.fixture(scope='module')
def model(trained):
    """Returns (built run, predictor) with the trained weights."""
    workdir, config, _ = trained
    built = build.run(config, assets=workdir)
    with jax.set_mesh(built.mesh):
        variables, _ = weights_from(built, str(workdir))
        yield built, evaluate.Predictor(built.task, variables, built.mesh)


# Losses -------------------------------------------------------------------------------------


def unit(x):
    x = np.float64(x)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def supcon_oracle(z, labels, temperature):
    z = unit(z)
    total, anchors = 0.0, 0
    for i in range(len(z)):
        others = [j for j in range(len(z)) if j != i]
        logits = np.array([z[i] @ z[j] / temperature for j in others])
        log_p = logits - np.log(np.sum(np.exp(logits)))
        own = [p for p, j in zip(log_p, others, strict=True) if labels[j] == labels[i]]
        if own:
            total, anchors = total - np.mean(own), anchors + 1
    return total / anchors


def infonce_oracle(a, b, labels, temperature):
    logits = unit(a) @ unit(b).T / temperature
    same = (labels[:, None] == labels) & ~np.eye(len(labels), dtype=bool)
    logits[same] = -np.inf
    both = [np.log(np.exp(x).sum(1)) - np.diag(x) for x in (logits, logits.T)]
    return np.mean(both)


def terms_of(model, outputs, labels, mask, losses, **options):
    """Returns the terms of the task for given embeddings; `options` of config.losses."""
    built, predictor = model
    task = copy.copy(built.task)
    losses_config = dataclasses.replace(built.config.losses, **options)
    task.config = dataclasses.replace(built.config, losses=losses_config)
    batch = {'identity': jnp.asarray(labels), 'mask': jnp.asarray(mask)}
    params = predictor.variables['params'] | {'logit_bias': jnp.float32(losses_config.bias)}
    stage = types.SimpleNamespace(losses=losses)
    return task.terms({**predictor.variables, 'params': params}, outputs, batch, stage)


LABELS = np.array([3, 3, 8, 8, 8, 1])


def embeddings(seed=0):
    image, text = np.random.default_rng(seed).normal(size=(2, 6, 5)).astype(np.float32)
    return {'image': jnp.asarray(image), 'text': jnp.asarray(text)}


def test_losses_agree_with_loops_and_see_identities(model):
    outputs = embeddings()
    mask = np.ones(6, bool)
    terms = terms_of(model, outputs, LABELS, mask, ('supcon', 'infonce'))
    temperature = float(terms['temperature'])
    assert temperature == pytest.approx(model[0].config.losses.temperature, rel=1e-6)
    both = np.concatenate([outputs['image'], outputs['text']])
    expected = supcon_oracle(both, np.tile(LABELS, 2), temperature)
    assert float(terms['supcon'].mean()) == pytest.approx(expected, rel=1e-5)
    expected = infonce_oracle(outputs['image'], outputs['text'], LABELS, temperature)
    assert float(terms['infonce'].mean()) == pytest.approx(expected, rel=1e-5)
    # All equal: what InfoNCE then is, with the images of one item left out of the negatives.
    flat = {name: jnp.ones((6, 5)) for name in outputs}
    equal = terms_of(model, flat, LABELS, mask, ('supcon', 'infonce', 'sigmoid'))
    for name in ('supcon', 'infonce', 'sigmoid'):
        collapse = float(equal[f'{name}_collapse'])
        assert float(equal[name].mean()) == pytest.approx(collapse, rel=1e-5)
    assert float(equal['infonce_collapse']) == pytest.approx(
        np.mean(np.log([5, 5, 4, 4, 4, 6])), rel=1e-6
    )
    assert float(equal['image_text_cosine']) == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize('mask_same_item', [True, False])
def test_mask_same_item_decides_which_pairs_are_negatives(model, mask_same_item):
    names = ('infonce', 'sigmoid', 'supcon')
    mask = np.ones(6, bool)
    arguments = embeddings(), LABELS, mask, names
    terms = terms_of(model, *arguments, mask_same_item=mask_same_item, bias=-3.0)
    labels = LABELS if mask_same_item else np.arange(6)
    temperature = float(terms['temperature'])
    pair = [arguments[0][name] for name in ('image', 'text')]
    expected = infonce_oracle(*pair, labels, temperature)
    assert float(terms['infonce'].mean()) == pytest.approx(expected, rel=1e-5)
    logits = unit(pair[0]) @ unit(pair[1]).T / temperature - 3
    kept = ~((labels[:, None] == labels) & ~np.eye(6, dtype=bool))
    losses = np.logaddexp(0, np.where(np.eye(6, dtype=bool), -logits, logits))
    assert float(terms['sigmoid'].mean()) == pytest.approx((losses * kept).sum() / 6, rel=1e-5)
    negatives = kept.sum(1) - 1
    collapse = np.log1p(negatives).sum() / (negatives > 0).sum()
    assert float(terms['infonce_collapse']) == pytest.approx(collapse, rel=1e-6)
    both = np.concatenate(pair)  # SupCon always has the images of an item as positives
    expected = supcon_oracle(both, np.tile(LABELS, 2), temperature)
    assert float(terms['supcon'].mean()) == pytest.approx(expected, rel=1e-5)


def test_the_size_of_tiles_changes_nothing(model):
    names = ('infonce', 'sigmoid', 'supcon')
    whole, tiled = (
        terms_of(model, embeddings(), LABELS, np.ones(6, bool), names, chunk=chunk)
        for chunk in ('auto', 2)
    )
    for name in names:
        assert float(tiled[name].mean()) == pytest.approx(float(whole[name].mean()), rel=1e-5)


def test_padding_rows_change_nothing(model):
    outputs = embeddings(1)
    labels = np.array([1, 1, 2, 2, 3, 3])
    names = ('supcon', 'infonce', 'sigmoid')
    padded = {
        'image': jnp.concatenate([outputs['image'], jnp.full((2, 5), jnp.nan)]),
        'text': jnp.concatenate([outputs['text'], jnp.full((2, 5), jnp.inf)]),
    }
    less = terms_of(model, outputs, labels, np.ones(6, bool), names)
    more = terms_of(model, padded, np.append(labels, [1, 9]), np.arange(8) < 6, names)
    for name in names:
        assert float(more[name].mean()) == pytest.approx(float(less[name].mean()), rel=1e-6)
        for line in ('collapse', 'floor'):
            expected = float(less[f'{name}_{line}'])
            assert float(more[f'{name}_{line}']) == pytest.approx(expected, rel=1e-6)
    cosines = [float(terms['image_text_cosine']) for terms in (less, more)]
    assert cosines[0] == pytest.approx(cosines[1], rel=1e-6)


def test_the_log_carries_the_loss_its_floor_its_collapse_and_the_cosine(trained):
    workdir, config, _ = trained
    lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    steps = [line for line in lines if 'loss' in line]
    rows, k = 2 * config.batch_size, config.sampler.k  # images and texts
    temperature = config.losses.temperature
    for line in steps:
        assert line['supcon_floor'] == pytest.approx(math.log(2 * k - 1), rel=1e-6)
        assert line['supcon_collapse'] == pytest.approx(math.log(rows - 1), rel=1e-6)
        assert line['supcon_floor'] < line['loss/supcon'] == pytest.approx(line['loss'])
        assert -1 <= line['image_text_cosine'] <= 1 and line['grad_norm'] > 0
        assert line['count/supcon'] == rows
        groups = [value for key, value in line.items() if key.startswith('grad_norm/')]
        assert len(groups) == 2 and line['grad_norm'] == pytest.approx(np.hypot(*groups), rel=1e-5)
        assert line['temperature'] == pytest.approx(temperature, rel=1e-5)  # frozen
    best = contrastive.supcon_simplex(config.batch_size // k, 2 * k, temperature)
    assert min(line['loss'] for line in steps) >= best - 1e-5


def test_results_have_the_scores(trained):
    _, _, results = trained
    scores = results['final']['query_gallery']
    for name in ('rank1', 'rank5', 'rank10', 'map', 'minp', 'text_to_image_r1'):
        assert 0 <= scores[name] <= 1
    assert scores['rank1'] <= scores['rank5'] <= scores['rank10']
    for losses in (scores, results['final']['val']):
        assert losses['loss'] == losses['final_loss'] == losses['supcon']
        assert losses['supcon_floor'] < losses['supcon']


def test_validation_losses_and_scores_know_identities(model):
    """The original's took every image for an item of its own."""
    built, predictor = model
    parts = list(predictor('encode', built.task.dataset('val'), 16))
    image, text = (np.concatenate([out[name] for out, _ in parts]) for name in ('image', 'text'))
    labels = np.concatenate([batch['identity'] for _, batch in parts])
    assert len(set(labels.tolist())) < len(labels)
    temperature = built.config.losses.temperature
    expected = supcon_oracle(np.concatenate([image, text]), np.tile(labels, 2), temperature)
    stage = built.stages[-1]
    weights = evaluate.LossWeights.of(stage, stage.steps, built.final_weights)
    scores = evaluate.run(built.evaluators, predictor, built.task, weights, final=False)
    assert not scores['query_gallery'].figures
    val = scores['val'].metrics
    assert val['loss'] == pytest.approx(expected, rel=1e-5)
    # Each image queries the others of the split, never itself.
    cosines = np.float64(image) @ np.float64(image).T
    np.fill_diagonal(cosines, -2)
    hits = labels[cosines.argmax(1)] == labels
    assert val['rank1'] == pytest.approx(hits.mean(), abs=1e-9)
    # Each image of `query`, and one prompt per item, queries the whole gallery.
    rows = {}
    for split in ('query', 'gallery'):
        for outputs, batch in predictor('encode', built.task.dataset(split), 16):
            rows[split] = outputs['image'], outputs['text'], batch['identity']
    query, _, items = rows['query']
    gallery, texts, truth = rows['gallery']
    unseen = scores['query_gallery'].metrics
    assert unseen['rank1'] == pytest.approx((truth[(query @ gallery.T).argmax(1)] == items).mean())
    names, first = np.unique(truth, return_index=True)
    hits = truth[(texts[first] @ gallery.T).argmax(1)] == names
    assert unseen['text_to_image_r1'] == pytest.approx(hits.mean())
    assert (unseen['queries'], unseen['gallery']) == (len(query), len(gallery))


@pytest.mark.parametrize(
    'loss', [dict(infonce=1.0), dict(sigmoid=1.0), dict(supcon=0.5, infonce=0.5)]
)
def test_every_loss_trains_the_towers_and_a_thawed_temperature(cache, tmp_path, loss):
    config = tiny('v1', cache, losses__temperature=0.1)
    config.loss_weights = loss
    config.stages = ('tune',)
    config.stage.tune = dict(steps=2, learning_rates=dict(text=0.0))
    config.optimizer.weight_decay = 0.0
    built = build.run(config)
    before = jax.tree.map(np.asarray, built.init_variables()['params'])
    runs.run(config, tmp_path / 'run')
    with jax.set_mesh(built.mesh):
        after, _ = weights_from(built, str(tmp_path / 'run' / 'checkpoints' / '2'))
    moved = jax.tree.map(lambda a, b: bool((a != np.asarray(b)).any()), before, after['params'])
    assert moved['logit_scale'] and jax.tree.all(moved['vision'])
    assert not any(jax.tree.leaves(moved['text']))
    assert moved.get('logit_bias', 'sigmoid' not in loss)


def test_a_sigmoid_that_only_a_stage_names_gets_its_bias(cache):
    config = tiny('v2', cache, losses__bias=-4.0)
    config.stage.tune = dict(steps=2, loss_weights=dict(supcon=0.0, sigmoid=1.0))
    built = build.run(config)
    build.check(built)
    with jax.set_mesh(built.mesh):
        assert float(built.init_variables()['params']['logit_bias']) == -4.0


# Frozen parts -------------------------------------------------------------------------------

OWN_RULES = (('backbones', '(vision|text)/.*'),)


@pytest.mark.parametrize(
    ('words', 'rules', 'group'),
    [
        ('vit', (), 'vision'),
        ('rn50', (), 'vision'),
        ('rn50', (), 'text'),
        ('rn50', (), 'temperature'),
        ('rn50', OWN_RULES, 'backbones'),
    ],
)
def test_frozen_parts_are_the_same_in_training_and_evaluation(cache, words, rules, group):
    config = tiny(f'v2,{words}', cache, rules=rules, stages=('tune',), optimizer__weight_decay=0.0)
    config.stage.tune = dict(steps=2, learning_rates={group: 0.0})
    built = build.run(config)
    stage = built.stages[0].compile_key
    data = built.task.dataset('train')
    rng = np.random.default_rng(0)
    batch = data.collate([data.example(row, rng, True) for row in range(16)], 0)
    batch |= {'row': np.arange(16, dtype=np.int32), 'mask': np.ones(16, bool)}
    train = towers_training(built.task.towers, dict(built.groups.items), stage)
    frozen = {'vision': ('vision',), 'text': ('text',), 'backbones': ('vision', 'text')}
    frozen = frozen.get(group, ())
    assert train == {name: name not in frozen for name in ('vision', 'text')}
    with jax.set_mesh(built.mesh):
        variables = jax.tree.map(np.asarray, built.init_variables())
        call = functools.partial(
            step.train_step,
            task=built.task,
            stage=stage,
            groups=built.groups,
            settings=built.settings,
        )
        state = step.create(variables, stage, built.groups, built.settings)
        rates = {name: np.float32(0.1) for name in built.groups.names if name != group}
        quick = {'xla_backend_optimization_level': 0}
        call = jax.jit(call, compiler_options=quick)
        for _ in range(2):
            state, metrics = call(state, batch, rates, {'supcon': np.float32(1)})
            assert metrics['ok']
        forward = jax.jit(functools.partial(built.task.forward, stage=stage, train=train))
        first, second = (forward(variables, batch, key=jax.random.key(seed))[0] for seed in (0, 1))
        evaluate_forward = functools.partial(evaluate.forward, built.task, stage)
        evaluation = jax.jit(evaluate_forward)(variables, batch)
        embedded = jax.jit(built.task.encode)(variables, batch)
    after = step.variables(state)
    differs = lambda a, b: not np.array_equal(np.asarray(a), np.asarray(b))
    for tower, output in (('vision', 'image'), ('text', 'text')):
        moved = jax.tree.map(differs, variables['params'][tower], dict(after['params'][tower]))
        assert jax.tree.all(moved) if tower not in frozen else not any(jax.tree.leaves(moved))
        np.testing.assert_allclose(first[output], second[output], rtol=1e-6)
        np.testing.assert_allclose(embedded[output], unit(evaluation[output]), atol=1e-5)
        if tower in frozen:
            np.testing.assert_allclose(first[output], evaluation[output], rtol=1e-5, atol=1e-6)
    assert differs(variables['params']['logit_scale'], after['params']['logit_scale']) == (
        group != 'temperature'
    )
    if words == 'rn50':  # whose batch statistics are live where it trains
        stats = jax.tree.map(differs, variables['batch_stats'], dict(after['batch_stats']))
        assert jax.tree.all(stats) if 'vision' not in frozen else not any(jax.tree.leaves(stats))
        live = not np.allclose(first['image'], evaluation['image'], rtol=1e-3)
        assert live == ('vision' not in frozen)


# Prompts ------------------------------------------------------------------------------------


def test_prompts_that_the_tokenizer_cuts_are_counted_and_safe_ones_never_are(cache):
    """58 % of the original's token-safe prompts were longer than the limit, and cut in silence."""
    raw = build.run(tiny('v2', cache, data__max_tokens=24)).task
    count = clip_tokenizer.token_counter(raw.tokenizer)
    longer = sum(count(text) > 24 for text in raw.raw_prompts.values())
    assert longer > 0 and raw.dataset('train').skipped == {'prompts_truncated': longer}
    safe = build.run(tiny('v4', cache, data__max_tokens=24)).task
    assert max(map(count, safe.prompts.values())) <= 24
    assert sum(safe.dataset('train').skipped.values()) == longer
    example = safe.dataset('train').example(0, np.random.default_rng(0), True)
    text = safe.prompts[safe.dataset('train').record(0)['item']]
    ids = safe.tokenizer.encode([text], 24)[0][0]
    np.testing.assert_array_equal(example['tokens'], ids[: len(example['tokens'])])


def test_prompts_are_written_from_descriptions_by_the_templates(cache):
    config = tiny('v2', cache, data__noun='thing', data__template='{color}|{noun}|{description}')
    task = build.run(config, data_only=True).task
    described = task.dataset('train').prepared.descriptions
    assert all(entry['color'] for entry in described)
    for entry in described:
        text = ' '.join(entry['description'])
        assert task.raw_prompts[entry['item']] == f'{entry["color"]}|thing|{text}'


def test_an_empty_file_of_prompts_is_one_sentence(cache, tmp_path):
    (tmp_path / 'p.json').write_text('{}')
    with pytest.raises(UserError, match='items of split train have no prompt'):
        build.run(tiny('v2', cache, data__prompts=str(tmp_path / 'p.json')))


# Splits -------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Returns a user's folder: three items in train, one of them with a single image."""
    table = {}
    for index, item in enumerate('aabbc'):
        path = f'images/{item}{index}.png'
        (tmp_path / 'root/images').mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (40, 40), (40 * index, 90, 90)).save(tmp_path / 'root' / path)
        table[path] = {'item_id': item, 'split': 'train'}
    (tmp_path / 'root/image_paths.json').write_text(json.dumps(table))
    return tmp_path / 'root'


def test_the_seed_of_the_data_draws_items_and_val_items(folder, cache, tmp_path):
    """`seed` trains, `data.seed` draws."""
    sizes = dict(train_items=6, val_items=1, test_items=1, shots=2, query_shots=1, gallery_shots=1)

    def items(split, **changes):
        task = build.run(tiny('v2', cache, **changes), data_only=True).task
        data = task.dataset(split)
        return sorted({data.record(row)['item'] for row in range(len(data))})

    drawn = items('train', data__built_in=sizes)
    assert len(drawn) == 6 and drawn == items('train', data__built_in=sizes, seed=1)
    assert drawn != items('train', data__built_in=sizes, data__seed=1)
    (folder / 'prompts.json').write_text(json.dumps({item: f'thing {item}' for item in 'abc'}))
    given = dict(data__root=str(folder), data__val_items=0.3)
    assert {tuple(items('val', **given, data__seed=seed)) for seed in range(6)} == {('a',), ('b',)}
    assert len({tuple(items('val', **given, seed=seed)) for seed in range(6)}) == 1


def test_a_folder_needs_prompts_and_images_to_validate_on(folder, cache):
    config = tiny('v2', cache, data__root=str(folder))
    with pytest.raises(UserError, match=r'holds neither prompts\.json nor descriptions\.json'):
        build.run(config, data_only=True)
    (folder / 'prompts.json').write_text(json.dumps({item: f'thing {item}' for item in 'abc'}))
    with pytest.raises(UserError, match=r"no images of split 'val': data\.val_items=\.1 takes"):
        build.run(config, data_only=True)
    task = build.run(runs.change(config, data__val_items=0.3), data_only=True).task
    assert (len(task.dataset('train')), len(task.dataset('val'))) == (3, 2)
    assert list(task.evaluators()) == ['val']


def test_a_folder_has_the_splits_that_it_names(folder, cache):
    (folder / 'prompts.json').write_text(json.dumps({item: f'thing {item}' for item in 'abc'}))
    table = json.loads((folder / 'image_paths.json').read_text())
    for index, split in enumerate(('val', 'val', 'query', 'gallery')):
        path = f'images/{split}{index}.png'
        Image.new('RGB', (40, 40), (90, 40 * index, 9)).save(folder / path)
        table[path] = {'item_id': 'a', 'split': split}
    (folder / 'image_paths.json').write_text(json.dumps(table))
    task = build.run(tiny('v2', cache, data__root=str(folder)), data_only=True).task
    sizes = {split: len(task.dataset(split)) for split in ('train', 'val', 'query', 'gallery')}
    assert sizes == {'train': 5, 'val': 2, 'query': 1, 'gallery': 1}
    assert set(task.evaluators()) == {'val', 'query_gallery'}


def test_prepare_reports_on_the_users_folder(folder, cache, tmp_path):
    described = [{'item': item, 'color': '', 'description': ['One.', 'Two.']} for item in 'abd']
    (folder / 'descriptions.json').write_text(json.dumps([*described, described[0]]))
    config = tiny('v2', cache, data__root=str(folder), data__val_items=0.3)
    with pytest.raises(UserError, match="the item 'a' is blank or stands twice"):
        build.run(config, data_only=True)
    described.append({'item': 'c', 'description': 'Three.'})
    (folder / 'descriptions.json').write_text(json.dumps(described))
    config.data.template_plain = '{noun}: {description}'
    task = build.run(config, data_only=True).task
    assert task.raw_prompts == {
        **dict.fromkeys('abd', 'product: One. Two.'),
        'c': 'product: Three.',
    }
    text = task.prepare(epath.Path(tmp_path / 'out'))
    report = json.loads((tmp_path / 'out/consistency.json').read_text())
    assert report['no_images'] == ['d'] and report['few_images'] == ['c'] and 'no images' in text
    clean = json.loads((tmp_path / 'out/image_paths_clean.json').read_text())
    assert {entry['item_id'] for entry in clean.values()} == {'a', 'b'}


# Modes --------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def exported(model, tmp_path_factory):
    """Returns the folder of the trained model in published form, at temperature .02."""
    built, predictor = model
    folder = tmp_path_factory.mktemp('export')
    params = predictor.variables['params'] | {'logit_scale': jnp.log(jnp.float32(50))}
    variables = {**predictor.variables, 'params': params}
    modes.export(built.task, variables, epath.Path(folder), built.config)
    return folder / 'clip'


def test_predict_finds_a_gallery_image_itself_first(model, tmp_path):
    built, predictor = model
    gallery = built.task.dataset('gallery')
    gallery.image(3).save(tmp_path / 'query.png')
    text = built.task.predict(predictor, str(tmp_path / 'query.png'), tmp_path / 'out')
    nearest = json.loads((tmp_path / 'out/nearest.json').read_text())['nearest']
    assert nearest[0]['path'] == gallery.record(3)['image_path'] and nearest[0]['cosine'] > 0.999
    assert nearest[0]['path'] in text and (tmp_path / 'out/nearest.png').stat().st_size > 1000


def test_predict_takes_a_text_or_names_the_missing_file(model, tmp_path):
    built, predictor = model
    text = built.task.predict(predictor, 'a red mug', tmp_path / 'out')
    assert len(text.splitlines()) == 2 + len(built.task.dataset('gallery'))
    text = built.task.predict(predictor, 'a red mug ' * 60, tmp_path / 'long')
    assert len(text.splitlines()) == 2 + len(built.task.dataset('gallery'))
    with pytest.raises(UserError, match=r'no/such\.jpg does not exist'):
        built.task.predict(predictor, 'no/such.jpg', tmp_path / 'out')


def test_embed_writes_every_image_once(model, tmp_path):
    built, predictor = model
    built.task.embed(predictor, tmp_path)
    embeddings, texts = np.load(tmp_path / 'embeddings.npy'), np.load(tmp_path / 'texts.npy')
    index = [json.loads(line) for line in (tmp_path / 'index.jsonl').read_text().splitlines()]
    assert [entry['row'] for entry in index] == list(range(len(embeddings)))
    sizes = {
        split: len(built.task.dataset(split)) for split in ('train', 'val', 'query', 'gallery')
    }
    assert {s: sum(e['split'] == s for e in index) for s in sizes} == sizes
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-5)
    items = [json.loads(line) for line in (tmp_path / 'texts.jsonl').read_text().splitlines()]
    assert len(texts) == len(items) == len({entry['item_id'] for entry in index})


def test_prepare_writes_safe_prompts_and_reports(cache, tmp_path):
    config = config_lib.resolve(tiny('v2', cache, data__max_tokens=24))
    command = modes.Command(
        mode='prepare', workdir=epath.Path(tmp_path / 'run'), output=str(tmp_path / 'out')
    )
    code = modes.run(config, command)
    assert code == 0
    safe = json.loads((tmp_path / 'out/prompts.json').read_text())
    raw = json.loads((tmp_path / 'out/prompts_raw.json').read_text())
    assert safe.keys() == raw.keys() and safe != raw
    assert json.loads((tmp_path / 'out/prompts_report.json').read_text())['limit'] == 24


@pytest.mark.parametrize(('temperature', 'scale'), [(0.0, 50.0), (0.2, 5.0)])
def test_an_exported_model_loads_as_pretrained_weights(model, exported, cache, temperature, scale):
    """Temperature 0 keeps the published one."""
    assert 'visual_projection.weight' in load_file(exported / 'model.safetensors')
    config = tiny('v2', cache, model__pretrained=str(exported), losses__temperature=temperature)
    config.model.text.width = 64  # of no account: sizes are those of the weights
    other = build.run(config)
    with jax.set_mesh(other.mesh):
        loaded = dict(other.init_variables()['params'])
    assert math.exp(loaded.pop('logit_scale')) == pytest.approx(scale, rel=1e-5)
    equal = lambda a, b: np.array_equal(np.asarray(a), np.asarray(b))
    held = {name: model[1].variables['params'][name] for name in ('vision', 'text')}
    assert jax.tree.all(jax.tree.map(equal, loaded, held))


def test_without_weights_the_tokenizer_of_a_folder_can_be_used(model, exported, cache):
    config = tiny('v2', cache, data__tokenizer=str(exported), data__vocabulary=600)
    task = build.run(config, data_only=True).task
    assert task.tokenizer.size == model[0].task.tokenizer.size > 600
    trained = build.run(tiny('v2', cache, data__vocabulary=600), data_only=True).task
    assert trained.tokenizer.size == 600


def test_a_text_tower_too_small_for_the_tokenizer_is_refused(exported, cache):
    """Ids past its table would silently become its last one."""
    config = tiny('v2', cache, model__pretrained=str(exported), data__max_tokens=78)
    with pytest.raises(UserError, match=r'max_length 77, .* need 78'):
        build.run(config)


def test_prompts_that_are_not_utf_8_are_one_sentence(cache, tmp_path):
    (tmp_path / 'p.json').write_bytes(b'{"a": "\xff"}')
    with pytest.raises(UserError, match=r'p\.json line 1: not UTF-8'):
        build.run(tiny('v2', cache, data__prompts=str(tmp_path / 'p.json')))


# Faults -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('entry', 'message'),
    [
        ({'item_id': 'a'}, 'has no split'),
        ({'item_id': 3, 'split': 'train'}, 'item_id is 3, not a name'),
    ],
)
def test_a_malformed_table_ends_with_one_sentence(tmp_path, entry, message):
    (tmp_path / 'image_paths.json').write_text(json.dumps({'images/a.jpg': entry}))
    (tmp_path / 'prompts.json').write_text('{"a": "a product"}')
    done = runs.command(
        '--config=configs/clip_retrieval.py:smoke',
        f'--config.data.root={tmp_path}',
        f'--workdir={tmp_path}/run',
        f'--config.data.cache={tmp_path}/cache',
    )
    assert done.returncode == 1 and 'Traceback' not in done.stderr
    assert message in done.stderr and 'image_paths.json' in done.stderr
    assert not (tmp_path / 'run').exists() and not (tmp_path / 'cache').exists()
