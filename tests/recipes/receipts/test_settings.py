"""Settings of the receipts recipe: words of the config, wrong input, published weights."""

import functools
import json
import re

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from mmjax.data import pipeline, tokenizers
from mmjax.engine import build, stages, step
from mmjax.engine import config as config_lib
from mmjax.errors import UserError
from mmjax.pretrained import decoder
from tests import runs
from tests.recipes.receipts.test_folder import Folder
from tests.recipes.receipts.test_task import PICTURES, program, tiny


@pytest.fixture(scope='module', autouse=True)
def quick():
    """Runs once a shape: fast code would take longer to make than it saves."""
    jax.config.update('jax_disable_most_optimizations', True)
    yield
    jax.config.update('jax_disable_most_optimizations', False)


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp('cache')


def small(words, cache):
    """Returns configs/receipts.py:<words> on few and small pictures, its model as it is."""
    config = runs.recipe('receipts', words)
    config.data.update(cache=str(cache), built_in=PICTURES, built_in_side=32)
    return config


# Words --------------------------------------------------------------------------------------


def count(tree):
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))


def test_the_default_is_built_and_traced(cache):
    built = build.run(small('', cache))
    build.check(built)
    assert [stage.name for stage in built.stages] == ['scratch', 'heads', 'top', 'all']
    assert set(built.groups.names) == {
        'vision',
        'vision_top',
        'language',
        'cross_attention',
        'heads',
    }


def test_published_has_its_sizes_and_can_stop_early(cache):
    config = small('published', cache)
    config.optimizer.warmup_steps = 5  # few pictures make 30 updates
    built = build.run(config)
    tower = built.abstract['params']['vision']
    assert count(tower) == 304_012_288 - 2 * 1024
    assert built.task.model.vision.remat and built.task.model.language.remat
    assert [stage.name for stage in built.stages] == ['heads', 'top', 'all']
    assert built.warnings == ['stage.scratch is not in stages']
    evaluations = 0
    for stage in built.stages:
        evaluations += sum(built.evaluates(stage, step) for step in range(1, stage.steps + 1))
        assert (stage.early_stop.metric, stage.early_stop.scope) == ('val/final_loss', 'run')
    assert evaluations == 15 > built.stages[-1].early_stop.patience


def test_the_shared_key_of_early_stop_acts_in_every_stage():
    config = runs.recipe('receipts', 'published')
    config_lib.override(config, [('early_stop.patience', '3')])
    parsed = stages.parse(config_lib.resolve(config))
    assert {stage.early_stop.patience for stage, _ in parsed} == {3}


def test_smoke_wins_over_published(cache):
    config = small('smoke,published', cache)
    smoke = runs.recipe('receipts', 'smoke')
    assert (config.batch_size, config.stages) == (smoke.batch_size, smoke.stages)
    for key in ('image_size', 'buckets'):
        assert config.data[key] == smoke.data[key]
    built = build.run(config)
    assert count(built.abstract['params']) < 200_000
    build.check(built)


# Stages -------------------------------------------------------------------------------------


@pytest.mark.parametrize(('count', 'top'), [(1, (11,)), (2, (10, 11)), (12, range(12))])
def test_the_last_blocks_are_the_last_by_number(cache, count, top):
    """The original thawed the last third of its parameters by name; and 1 is not 10 or 11."""
    config = tiny(cache, model__thaw_blocks=count, model__vision__depth=12)
    config.stages = ('one',)
    config.stage.one = dict(steps=1)
    built = build.run(config)
    groups = {path: group for path, group in built.groups.items if path.startswith('vision/')}
    blocks = {int(path.split('/')[1][6:]) for path in groups if path.startswith('vision/block_')}
    assert blocks == set(range(12))
    for path, group in groups.items():
        part = path.split('/')[1]
        last = part.startswith('block_') and int(part[6:]) in top
        assert group == ('vision_top' if last else 'vision'), path
    others = {group for path, group in built.groups.items if path not in groups}
    assert others == {'language', 'cross_attention', 'heads'}


def test_rows_that_fill_a_batch_train_nothing(cache):
    """What stands in them changes no loss, no statistic and no weight."""
    built = build.run(tiny(cache, data__built_in=PICTURES | {'train': 7}))
    stage = built.stages[1]
    options = dict(seed=0, stage=0, stop=9, train=True, threads=0)
    batches = pipeline.batches(built.data, built.sampler(stage), **options)
    batch = next(batch for batch in batches if not batch['mask'].all())
    real = batch['mask']
    assert 0 < real.sum() < len(real)
    other = {key: np.array(value) for key, value in batch.items()}
    other['images'][~real] = 255 - other['images'][~real]
    other['label'][~real] = (other['label'][~real] + 1) % 3
    for name in ('question', 'answer'):
        other[name][~real] = 7
        other[f'{name}_mask'][~real] = True
    with jax.set_mesh(built.mesh):
        state = step.create(built.init_variables(), stage, built.groups, built.settings)
        call, *rest = program(built, stage)
        found, wanted = (jax.tree.map(np.asarray, call(state, b, *rest)) for b in (other, batch))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), found, wanted)
    assert wanted[1]['count/classification'] == real.sum()
    assert wanted[1]['count/language'] == batch['answer_mask'][real].sum()


def test_blocks_are_rematerialised_where_the_config_says(cache):
    """Two of the tower and one of the decoder; nothing where it does not."""
    for remat, blocks in ((False, 0), (True, 3)):
        built = build.run(tiny(cache, model__remat=remat))
        call, *rest = program(built, built.stages[1])
        state = built.abstract_state(built.stages[1])
        text = str(jax.make_jaxpr(call)(state, built.batch, *rest))
        assert len(re.findall(r'= (?:remat|checkpoint)\w*\[', text)) == blocks


# Published weights --------------------------------------------------------------------------


SIZES = {
    'model_type': 'qwen2',
    'hidden_act': 'silu',
    'vocab_size': 300,
    'hidden_size': 8,
    'num_hidden_layers': 1,
    'num_attention_heads': 2,
    'num_key_value_heads': 1,
    'intermediate_size': 12,
    'rms_norm_eps': 1e-6,
    'rope_theta': 10000.0,
}


@pytest.fixture
def folder(tmp_path):
    """A random decoder, and a tokenizer that opens texts, closes none and names no padding."""
    folder = tmp_path / 'decoder'
    folder.mkdir()
    made = tokenizers.train_tokenizer(['How many receipts?', 'There are two.'] * 3, 290)
    made = made.__getstate__().replace('[PAD]', '<nul>').replace('[SEP]', '</s>')
    made = json.loads(made)
    del made['post_processor']['single'][2]
    (folder / 'tokenizer.json').write_text(json.dumps(made))
    (folder / 'tokenizer_config.json').write_text(json.dumps({'eos_token': {'content': '</s>'}}))
    (folder / 'config.json').write_text(json.dumps(SIZES))
    rng = np.random.default_rng(0)
    tensors = {
        entry.name: rng.normal(0, 0.1, entry.shape).astype('f')
        for entry in decoder.entries(**decoder.fields(folder))
    }
    save_file(tensors, folder / 'model.safetensors')
    return folder


def test_a_published_decoder_brings_weights_tokenizer_and_closing_token(cache, folder, tmp_path):
    config = tiny(cache, model__pretrained__language=str(folder))
    built = build.run(config)
    task = built.task
    assert task.model.language.width == 8 and task.tokenizer.size < 300
    with jax.set_mesh(built.mesh):
        variables = built.init_variables()
    loaded, _ = decoder.load(folder)
    jax.tree.map(np.testing.assert_array_equal, variables['params']['language'], loaded)
    assert task.opening_id == 3  # </s>; padding is the id 0, for want of another
    example = task.dataset('val').example(0, None, False)
    assert example['answer'][example['answer_mask']][-1] == 3
    batch = {key: np.asarray(x)[None] for key, x in example.items()}
    found = jax.jit(task.classify)(variables, batch)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(found))
    task.save_assets(tmp_path)
    again = build.run(config, assets=tmp_path).task
    assert again.opening_id == 3 and again.tokenizer.__getstate__() == task.tokenizer.__getstate__()


@pytest.mark.parametrize(
    ('sizes', 'changes', 'message'),
    [
        ({'vocab_size': 100}, {}, r'decoder has vocabulary 100, its tokenizer \d+'),
        ({'num_attention_heads': 8}, {}, r'decoder\.heads=8 gives heads of an odd size'),
        (
            {},
            dict(model__cross_attention__heads=16),
            r'model\.cross_attention\.heads=16 does not divide .*decoder\.width=8',
        ),
    ],
)
def test_a_published_decoder_that_does_not_fit_is_refused(cache, folder, sizes, changes, message):
    (folder / 'config.json').write_text(json.dumps(SIZES | sizes))
    with pytest.raises(UserError, match=message):
        build.run(tiny(cache, model__pretrained__language=str(folder), **changes))


@pytest.mark.parametrize(
    ('named', 'numbers', 'closing'),
    [
        ({'eos_token': '</s>'}, {'eos_token_id': 2}, 3),
        ({'eos_token': None}, {'eos_token_id': [3, 2]}, 3),
        (None, {'eos_token_id': 2}, 2),
        ({'pad_token': '</s>'}, {}, 3),
        (None, {'pad_token_id': 3}, 3),
        (None, {}, None),
        ({'eos_token': '<end>'}, {}, "eos_token '<end>' is none of tokenizer.json"),
        (None, {'eos_token_id': 300}, r'config\.json: eos_token_id 300 is not in 0 … 299'),
    ],
)
def test_what_closes_texts_is_read_from_the_folder(folder, named, numbers, closing):
    (folder / 'tokenizer_config.json').write_text(json.dumps(named or {}))
    if named is None:
        (folder / 'tokenizer_config.json').unlink()
    (folder / 'config.json').write_text(json.dumps(SIZES | numbers))
    if isinstance(closing, str):
        with pytest.raises(UserError, match=closing):
            decoder.closing(folder)
    else:
        assert decoder.closing(folder) == closing


# Faults -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(model__thaw_blocks=3), r'thaw_blocks=3 is more than model\.vision\.depth=2'),
        (dict(model__thaw_blocks=0), r'model\.thaw_blocks=0 is not an integer at least 1'),
        (
            dict(data__image_size=36, model__shuffle=2),
            r'data\.image_size=36 is no multiple of 16, the product of model\.vision\.patch_size',
        ),
        (dict(data__image_size=0), r'data\.image_size=0 .*at least 1'),
        (dict(data__image_size='32'), r"data\.image_size='32' .*an integer"),
        (dict(data__buckets=(1, 8)), r'data\.buckets=\(1, 8\) .*at least 2'),
        (dict(data__classes=1), r'data\.classes=1 .*at least 2'),
        (dict(data__vocabulary=200), r'data\.vocabulary=200 .*at least 260'),
        (dict(data__augmentation=dict(shift=-0.1)), r'augmentation\.shift=-0\.1 .*at least 0'),
        (dict(data__built_in=dict(dev=3)), r'unknown key data\.built_in\.dev=3'),
        (dict(data__max_fault_share=2.0), r'data\.max_fault_share=2\.0 .*at most 1'),
        (dict(data__max_pixels=0), r'data\.max_pixels=0 .*at least 1'),
        (dict(data__built_in_side=4), r'data\.built_in_side=4 .*at least 16'),
        (dict(model__shuffle=0), r'model\.shuffle=0 .*at least 1'),
        (dict(model__towers=1), r'unknown key model\.towers=1'),
        (
            dict(model__vision__heads=3),
            r'model\.vision\.heads=3 does not divide model\.vision\.width=16',
        ),
        (dict(model__vision__norm='batch'), r"model\.vision\.norm='batch' .*'layer'"),
        (dict(model__vision__stem='none'), r"model\.vision\.stem='none' .*'patch'"),
        (
            dict(model__vision__patch_size=6, data__image_size=36),
            r'model\.vision\.patch_size=6 is no power of 2',
        ),
        (dict(model__vision__dropout=1.0), r'model\.vision\.dropout=1\.0 .*below 1'),
        (dict(model__vision__layer_scale=-1.0), r'model\.vision\.layer_scale=-1\.0 .*at least 0'),
        (
            dict(model__language__heads=3),
            r'model\.language\.heads=3 does not divide model\.language\.width=16',
        ),
        (
            dict(model__language__heads=4, model__language__kv_heads=3),
            r'model\.language\.kv_heads=3 does not divide model\.language\.heads=4',
        ),
        (dict(model__language__heads=16), 'heads=16 gives heads of an odd size'),
        (dict(model__language__depth=0), r'model\.language\.depth=0 .*at least 1'),
        (dict(model__language__theta=0.0), r'model\.language\.theta=0\.0 .*above 0'),
        (dict(model__language__epsilon=0.0), r'model\.language\.epsilon=0\.0 .*above 0'),
        (dict(model__language__tied=1), r'model\.language\.tied=1 .*True or False'),
        (
            dict(model__cross_attention__heads=3),
            r'model\.cross_attention\.heads=3 does not divide model\.language\.width=16',
        ),
        (dict(model__cross_attention=4), r'model\.cross_attention=4'),
        (dict(model__attention='flash'), r"model\.attention='flash' .*'xla'.*'cudnn'.*'auto'"),
        (dict(model__attention='cudnn'), r"model\.attention='cudnn' needs precision bfloat16"),
        (dict(losses__smoothing=1.5), r'losses\.smoothing=1\.5 .*below 1'),
        (dict(decode__final__method='best'), r"decode\.final\.method='best' .*'greedy'"),
        (dict(decode__final__beams=0), r'decode\.final\.beams=0 .*at least 1'),
        (dict(decode__final__length_penalty=-1.0), r'length_penalty=-1\.0 .*at least 0'),
        (dict(decode__running__top_p=0.0), r'decode\.running\.top_p=0\.0 .*above 0'),
        (dict(decode__running__top_k=-1), r'decode\.running\.top_k=-1 .*at least 0'),
        (dict(decode__running__temperature=0.0), r'temperature=0\.0 .*above 0'),
        (dict(decode__running__max_tokens=0), r'unknown key decode\.running\.max_tokens=0'),
    ],
)
def test_wrong_input_is_refused_in_one_sentence(changes, message):
    config = runs.change(runs.recipe('receipts', 'smoke'), **changes)
    with pytest.raises(UserError, match=message) as error:
        config_lib.resolve(config)
    assert '\n' not in str(error.value)


def test_a_dict_assigned_over_a_section_merges():
    config = runs.recipe('receipts', 'smoke')
    config.best = dict(metric='val/accuracy')
    config.model = dict(thaw_blocks=2)
    config.decode = dict(final=dict(beams=2))
    resolved = config_lib.resolve(config)
    assert resolved.best.mode == 'min' and resolved.best.metric == 'val/accuracy'
    assert resolved.model.thaw_blocks == 2 and resolved.model.vision.depth == 4
    assert (resolved.decode.final.method, resolved.decode.final.beams) == ('beam', 2)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (
            dict(model__attention='cudnn', precision='bfloat16'),
            "model.attention='cudnn' needs a GPU, not cpu",
        ),
        (dict(loss_weights=dict(answers=1.0)), "names 'answers'; .* classification, language"),
        (dict(best__metric='test/accuracy'), "best.metric 'test/accuracy' .*: val$"),
        (dict(data__root='no/such/folder'), 'no/such/folder'),
    ],
)
def test_what_fits_no_machine_loss_or_data_ends_before_the_first_step(cache, changes, message):
    with pytest.raises(UserError, match=message):
        build.check(build.run(tiny(cache, **changes)))


def test_sizes_and_options_reach_the_model(cache):
    changes = {
        'vision': dict(layer_scale=0.5, norm='rms', dropout=0.2, mlp_width=24),
        'language': dict(
            theta=50.0, qkv_bias=False, tied=False, epsilon=1e-3, dropout=0.3, mlp_width=20
        ),
    }
    config = tiny(cache, data__classes=2, model__attention='xla', model__shuffle=2)
    for part, values in changes.items():
        config.model[part].update(values)
    built = build.run(config)
    model = built.task.model
    for part, values in changes.items():
        module = getattr(model, part)
        assert {name: getattr(module, name) for name in values} == values
        assert module.implementation == 'xla'
    params = built.abstract['params']
    assert params['classifier']['out']['kernel'].shape == (256, 2)
    assert params['projector_up']['kernel'].shape == (4 * 8, 16)
    assert set(built.data.index['label']) == {0, 1}


def test_the_seed_of_the_data_draws_them_and_the_other_does_not(cache):
    first, other, trained = (
        build.run(tiny(cache, **changes)).fingerprint['digest']
        for changes in ({}, dict(data__seed=1), dict(seed=1))
    )
    assert first == trained != other


def test_images_larger_than_max_pixels_are_faults(cache, tmp_path):
    root = Folder(tmp_path / 'root', {'train': 5, 'val': 2}).root
    with pytest.raises(UserError, match=r'more than the 9 allowed .* the allowed share of 0\.01'):
        build.run(tiny(cache, data__root=str(root), data__max_pixels=9))


@pytest.mark.parametrize('gone', ['train', 'val', 'train val'])
def test_a_folder_without_a_table_is_told_which(cache, tmp_path, gone):
    root = Folder(tmp_path / 'root', {'train': 5, 'val': 2, 'test': 2}).root
    for split in gone.split():
        (root / split / 'metadata.csv').unlink()
    message = rf'root/{gone.split()[0]}/metadata\.csv does not exist \(splits: .*test\)'
    with pytest.raises(UserError, match=message):
        build.run(tiny(cache, data__root=str(root)))


@pytest.mark.slow
def test_a_missing_column_is_one_sentence_and_exit_code_1(tmp_path):
    folder = Folder(tmp_path / 'root', {'train': 5, 'val': 2})
    folder.header = tuple(name.replace('answer', 'reply') for name in folder.header)
    folder.write()
    done = runs.command(
        '--config=configs/receipts.py:smoke',
        f'--workdir={tmp_path}/run',
        f'--config.data.root={folder.root}',
    )
    assert done.returncode == 1 and 'Traceback' not in done.stderr
    told = [line for line in done.stderr.splitlines() if line.startswith('mmjax: ')]
    assert len(told) == 1 and "train/metadata.csv has no column 'answer' (columns:" in told[0]
