"""The retrieval recipe: its losses and lines, its versions' rates, and every mode on a tiny run."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from safetensors.numpy import load_file

from mmjax.data import clip_tokenizer
from mmjax.engine import build, evaluate, modes, optim, stages
from mmjax.engine.config import View
from mmjax.engine.train import weights_from
from mmjax.errors import UserError
from mmjax.losses import contrastive
from mmjax.models import clip
from mmjax.recipes.retrieval import task as retrieval
from tests import clip_presets, runs


def tiny(words='', cache=None, **changes):
    """Returns the smoke config with towers that compile in seconds; changes as in runs.toy."""
    config = runs.recipe('clip_retrieval', f'smoke,vit,{words}')
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
    """Returns (built run, apply) with the trained weights."""
    workdir, config, _ = trained
    built = build.run(config, assets=workdir)
    with jax.set_mesh(built.mesh):
        variables, _ = weights_from(built, str(workdir))
        yield built, evaluate.Apply(built.task, variables, built.mesh)


# Losses -------------------------------------------------------------------------------------


def supcon_oracle(z, labels, temperature):
    z = np.asarray(z, np.float64)
    z = z / np.linalg.norm(z, axis=1, keepdims=True)
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
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
    logits = unit(np.float64(a)) @ unit(np.float64(b)).T / temperature
    same = (labels[:, None] == labels) & ~np.eye(len(labels), dtype=bool)
    logits[same] = -np.inf
    both = [np.log(np.exp(x).sum(1)) - np.diag(x) for x in (logits, logits.T)]
    return np.mean(both)


def test_losses_agree_with_loops_and_see_identities(model, trained):
    built, apply = model
    config_temperature = trained[1].losses.temperature
    rng = np.random.default_rng(0)
    image, text = rng.normal(size=(2, 6, 5)).astype(np.float32)
    labels = np.array([3, 3, 8, 8, 8, 1])
    outputs = {'image': jnp.asarray(image), 'text': jnp.asarray(text)}
    mask = jnp.ones(6, bool)
    found = built.task._terms(apply.variables, outputs, labels, mask, ('supcon', 'infonce'))
    temperature = float(found['temperature'])
    assert temperature == pytest.approx(config_temperature, rel=1e-6)
    both = np.concatenate([image, text])
    expected = supcon_oracle(both, np.tile(labels, 2), temperature)
    assert float(found['supcon'].mean()) == pytest.approx(expected, rel=1e-5)
    expected = infonce_oracle(image, text, labels, temperature)
    assert float(found['infonce'].mean()) == pytest.approx(expected, rel=1e-5)
    # All equal: what InfoNCE then is, with the pictures of one item left out of the negatives.
    flat = {name: jnp.ones((6, 5)) for name in outputs}
    equal = built.task._terms(apply.variables, flat, labels, mask, ('supcon', 'infonce'))
    for name in ('supcon', 'infonce'):
        collapse = float(equal[f'{name}_collapse'])
        assert float(equal[name].mean()) == pytest.approx(collapse, rel=1e-5)
    assert float(equal['infonce_collapse']) == pytest.approx(
        np.mean(np.log([5, 5, 4, 4, 4, 6])), rel=1e-6
    )
    assert float(equal['image_text_cosine']) == pytest.approx(1, rel=1e-6)


def test_padding_rows_change_nothing(model):
    built, apply = model
    rng = np.random.default_rng(1)
    image, text = rng.normal(size=(2, 6, 5)).astype(np.float32)
    labels, names = np.array([1, 1, 2, 2, 3, 3]), ('supcon', 'infonce')
    padded = {
        'image': jnp.concatenate([image, jnp.full((2, 5), jnp.nan)]),
        'text': jnp.concatenate([text, jnp.full((2, 5), jnp.inf)]),
    }
    mask = jnp.arange(8) < 6
    less = built.task._terms(
        apply.variables, {'image': image, 'text': text}, labels, jnp.ones(6, bool), names
    )
    more = built.task._terms(apply.variables, padded, np.append(labels, [1, 9]), mask, names)
    for name in names:
        assert float(more[name].mean()) == pytest.approx(float(less[name].mean()), rel=1e-6)
        for line in ('collapse', 'floor'):
            wanted = float(less[f'{name}_{line}'])
            assert float(more[f'{name}_{line}']) == pytest.approx(wanted, rel=1e-6)


def test_the_log_carries_the_loss_its_floor_its_collapse_and_the_cosine(trained):
    workdir, config, _ = trained
    lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    steps = [line for line in lines if 'loss' in line]
    rows, k = 2 * config.batch_size, config.sampler.k  # pictures and texts
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
    assert results['final']['val']['loss'] == results['final']['val']['supcon']


def test_the_validation_loss_knows_identities(model, trained):
    """The original's took every picture for an item of its own."""
    built, apply = model
    parts = list(apply('encode', built.task.dataset('val'), 16))
    image, text = (np.concatenate([out[name] for out, _ in parts]) for name in ('image', 'text'))
    labels = np.concatenate([batch['identity'] for _, batch in parts])
    assert len(set(labels.tolist())) < len(labels)
    temperature = trained[1].losses.temperature
    expected = supcon_oracle(np.concatenate([image, text]), np.tile(labels, 2), temperature)
    found = built.task.evaluators()['val'].run(apply, final=False).metrics
    assert found['loss'] == pytest.approx(expected, rel=1e-5)
    # Each picture asks the others of the split, never itself.
    cosines = np.float64(image) @ np.float64(image).T
    np.fill_diagonal(cosines, -2)
    hits = labels[cosines.argmax(1)] == labels
    assert found['rank1'] == pytest.approx(hits.mean(), abs=1e-9)


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


def test_a_sigmoid_that_only_a_stage_names_is_refused(cache):
    config = tiny('v2', cache)
    config.stage.tune = dict(steps=2, loss_weights=dict(sigmoid=1.0))
    with pytest.raises(UserError, match=r"stage\.tune: .*names 'sigmoid'"):
        build.check_terms(build.run(config))


# Versions -----------------------------------------------------------------------------------


def rates(words):
    plan = stages.plan(stages.parse(View(tiny(words))), lambda stage: 20, 16)
    return [
        [optim.rates(stage, ('vision',), step)['vision'] for step in range(stage.steps)]
        for stage in plan
    ]


def test_v4_warms_up_once_and_decays_once_over_the_run():
    """The original promised a warm-up, and stepped a cosine of epochs with every batch."""
    found = np.concatenate(rates('v4'))
    top = int(np.argmax(found))
    assert found[0] < 0.3 * found[top] and top == pytest.approx(0.1 * len(found), abs=1)
    assert (np.diff(found[: top + 1]) > 0).all() and (np.diff(found[top:]) < 0).all()
    assert found[-1] < 0.01 * found[top]


def test_v1_and_v2_hold_their_rate_and_v3_doubles_it():
    for words in ('v1', 'v2'):
        assert len({float(rate) for stage in rates(words) for rate in stage}) == 1
    first, second = rates('v3')
    assert second[0] == pytest.approx(2 * first[0]) and len(set(second)) == 1


def test_versions_differ_as_published():
    chosen = {words: tiny(words) for words in ('v1', 'v2', 'v3', 'v4', '')}
    losses = {words: list(config.loss_weights) for words, config in chosen.items()}
    assert losses == {key: ['infonce' if key == 'v1' else 'supcon'] for key in chosen}
    assert [c.sampler.name for c in chosen.values()] == ['shuffle', *['pk'] * 4]
    published = [tiny(f'published,{words}') for words in chosen]
    assert [c.losses.temperature for c in published] == [0.07, 0.07, 0.07, 0.05, 0.05]
    assert [c.optimizer.learning_rate for c in published] == [5e-5] * 5
    policies = [c.data.prompt_policy for c in chosen.values()]
    assert policies == ['raw', 'raw', 'raw', 'safe', 'safe']


@pytest.mark.parametrize(
    ('words', 'preset'), [('vit', clip_presets.vit_b_16), ('rn50', clip_presets.rn50)]
)
def test_published_is_openais_model(words, preset):
    config = View(runs.recipe('clip_retrieval', f'published,{words}'))
    found, _ = retrieval._model(config, 49408, 77)
    wanted = clip.build(**preset())
    for tower in ('vision', 'text'):
        mine, theirs = getattr(found, tower), getattr(wanted, tower)
        assert type(mine) is type(theirs)
        assert retrieval._fields(mine) == retrieval._fields(theirs)


@pytest.mark.parametrize('words', ['v1,v2', 'vit,rn50'])
def test_words_that_exclude_each_other(words):
    with pytest.raises(UserError, match='exclude each other'):
        tiny(words)


# Prompts ------------------------------------------------------------------------------------


def test_prompts_that_the_tokenizer_cuts_are_counted_and_safe_ones_never_are(cache):
    """58 % of the original's token-safe prompts were longer than the limit, and cut in silence."""
    raw = build.run(tiny('v2', cache, data__max_tokens=24)).task
    count = clip_tokenizer.token_counter(raw.tokenizer)
    longer = sum(count(text) > 24 for text in raw.prompts.raw.values())
    assert longer > 0 and raw.dataset('train').skipped == {'prompts_truncated': longer}
    safe = build.run(tiny('v4', cache, data__max_tokens=24)).task
    assert max(map(count, safe.prompts.final.values())) <= 24
    assert sum(safe.dataset('train').skipped.values()) == longer
    example = safe.dataset('train').example(0, np.random.default_rng(0), True)
    text = safe.prompts.final[safe.dataset('train').record(0)['item']]
    ids = safe.tokenizer.encode([text], 24)[0][0]
    np.testing.assert_array_equal(example['tokens'], ids[: len(example['tokens'])])


# Modes --------------------------------------------------------------------------------------


def test_predict_finds_a_gallery_picture_itself_first(model, tmp_path):
    built, apply = model
    gallery = built.task.dataset('gallery')
    gallery.image(3).save(tmp_path / 'asked.png')
    told = built.task.predict(apply, str(tmp_path / 'asked.png'), tmp_path / 'out')
    found = json.loads((tmp_path / 'out/nearest.json').read_text())['nearest']
    assert found[0]['path'] == gallery.record(3)['image_path'] and found[0]['cosine'] > 0.999
    assert found[0]['path'] in told and (tmp_path / 'out/nearest.png').stat().st_size > 1000


def test_predict_takes_a_text_or_names_the_missing_file(model, tmp_path):
    built, apply = model
    told = built.task.predict(apply, 'a red mug', tmp_path / 'out')
    assert len(told.splitlines()) == 2 + len(built.task.dataset('gallery'))
    with pytest.raises(UserError, match=r'no/such\.jpg does not exist'):
        built.task.predict(apply, 'no/such.jpg', tmp_path / 'out')


def test_embed_writes_every_picture_once(model, tmp_path):
    built, apply = model
    built.task.embed(apply, tmp_path)
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
    config = tiny('v2', cache, data__max_tokens=24)
    arguments = dict(
        argv=['main'],
        existing=False,
        overwrite=False,
        input=None,
        question=None,
        init_from=None,
        allow_data_change=False,
        processes=(None,) * 3,
    )
    code = modes.run(
        'prepare',
        config,
        config.to_dict(),
        epath.Path(tmp_path / 'run'),
        output=str(tmp_path / 'out'),
        **arguments,
    )
    assert code == 0
    safe = json.loads((tmp_path / 'out/prompts.json').read_text())
    raw = json.loads((tmp_path / 'out/prompts_raw.json').read_text())
    assert safe.keys() == raw.keys() and safe != raw
    assert json.loads((tmp_path / 'out/prompts_report.json').read_text())['limit'] == 24


def test_an_exported_model_loads_as_pretrained_weights(model, trained, cache, tmp_path):
    built, apply = model
    modes.export(built.task, apply.variables, epath.Path(tmp_path), {})
    assert 'visual_projection.weight' in load_file(tmp_path / 'clip/model.safetensors')
    config = tiny('v2', cache, model__pretrained=str(tmp_path / 'clip'))
    other = build.run(config)
    with jax.set_mesh(other.mesh):
        variables = other.init_variables()
    chex_equal = jax.tree.map(
        lambda a, b: np.array_equal(np.asarray(a), np.asarray(b)),
        dict(variables['params']),
        dict(apply.variables['params']),
    )
    assert jax.tree.all(chex_equal)


def test_a_text_tower_too_small_for_the_tokenizer_is_refused(model, cache, tmp_path):
    """Ids past its table would silently become its last one."""
    built, apply = model
    modes.export(built.task, apply.variables, epath.Path(tmp_path), {})
    config = tiny('v2', cache, model__pretrained=str(tmp_path / 'clip'), data__max_tokens=78)
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
