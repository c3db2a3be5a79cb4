"""What the ContraBin config may say: bad values named by key, seeds apart, lengths in epochs."""

import re

import jax
import numpy as np
import pytest

from mmjax.data import tokenizers
from mmjax.engine import build, optim
from mmjax.engine import config as config_lib
from mmjax.errors import UserError
from mmjax.recipes.contrabin import data as code
from mmjax.recipes.contrabin import task as contrabin
from mmjax.recipes.contrabin.c_projects import prepare as c_projects
from tests import runs
from tests.recipes.contrabin.test_modes import tiny, write_functions


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp('cache')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return write_functions(tmp_path_factory.mktemp('rows'))


def opened(cache, **changes):
    return contrabin.open_splits(config_lib.resolve(tiny(cache, **changes)))[0]


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(precision='half'), "precision='half' is not one of 'float32', 'bfloat16', 'float16'"),
        (dict(precision=False), "precision=False is not one of 'float32', 'bfloat16', 'float16'"),
        (dict(batch_size='many'), "batch_size='many' is not an integer at least 1"),
        (dict(evaluate_pool=1), 'evaluate_pool=1 is not an integer at least 2'),
        (dict(data__root='x', data__c_files='y'), 'data.root and data.c_files exclude each other'),
        (dict(data__vocabulary=259), 'data.vocabulary=259 is not an integer at least 260'),
        (dict(data__binary_vocabulary=9), 'data.binary_vocabulary=9 is not an integer at least'),
        (dict(data__max_source=0), 'data.max_source=0 is not an integer at least 2'),
        (dict(data__max_comment=1), 'data.max_comment=1 is not an integer at least 2'),
        (dict(data__max_binary=1), 'data.max_binary=1 is not an integer at least 2'),
        (dict(data__max_fault_share=-0.1), 'data.max_fault_share=-0.1 is not a number at least 0'),
        (dict(data__binary_pieces='line'), "data.binary_pieces='line' is not one of 'lines', 'wor"),
        (dict(data__built_in=dict(train=0)), 'data.built_in.train=0 is not an integer at least 1'),
        (dict(data__compile__workers=0), 'data.compile.workers=0 is not an integer at least 1'),
        (dict(data__compile__time_limit=0.0), 'data.compile.time_limit=0.0 is not a number at'),
        (dict(data__compile__compiler='icc'), "data.compile.compiler='icc' is not one of 'auto'"),
        (dict(data__compile__split_by='line'), "data.compile.split_by='line' is not one of 'proj"),
        (dict(data__compile__registers='none'), "data.compile.registers='none' is not one of 'cl"),
        (dict(data__compile__test=1.0), 'data.compile.test=1.0 is not a number at least 0 and'),
        (dict(data__compile=dict(val=0.5, test=0.5)), 'test=0.5 leave none to train on'),
        (dict(data__compile__flags='-DN'), "data.compile.flags='-DN' is not a tuple of strings"),
        (dict(model__head='deep'), "model.head='deep' is not one of 'linear', 'nonlinear'"),
        (dict(model__pooling='last'), "model.pooling='last' is not one of 'first', 'mean'"),
        (dict(model__features=0), 'model.features=0 is not an integer at least 2'),
        (dict(model__dropout=1.0), 'model.dropout=1.0 is not a number at least 0 and below 1'),
        (dict(model__pack='yes'), "model.pack='yes' is not True or False"),
        (
            dict(model__anchor__heads=3),
            'model.anchor.heads=3 does not divide model.anchor.width=16',
        ),
        (dict(model__binary__depth=0), 'model.binary.depth=0 is not an integer at least 1'),
        (dict(model__binary__widht=8), 'model.binary.widht=8; known keys of model.binary'),
        (
            dict(losses__softness=1.5),
            'losses.softness=1.5 is not a number at least 0 and at most 1',
        ),
        (dict(losses__softness=float('nan')), 'losses.softness=nan is not a number'),
        (dict(losses__temperature=0.0), 'losses.temperature=0.0 is not a number above 0'),
        (dict(losses__chunk='some'), "losses.chunk='some' is not an integer at least 1 or 'auto'"),
        (dict(losses__chunk=0), "losses.chunk=0 is not an integer at least 1 or 'auto'"),
    ],
)
def test_a_wrong_value_is_a_sentence_with_its_key(changes, message):
    with pytest.raises(UserError) as caught:
        config_lib.resolve(tiny('nowhere', **changes))
    assert message in str(caught.value) and '\n' not in str(caught.value)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(interpolaton='linear'), "options.interpolaton='linear'; known keys"),
        (dict(keep_anchor=True), 'options.keep_anchor=True; known keys'),
        (dict(interpolation='cubic'), "interpolation='cubic' is not one of 'naive', 'linear', 'n"),
        (dict(cache_anchor=1), 'options.cache_anchor=1 is not True or False'),
    ],
)
def test_a_wrong_option_of_a_stage_is_a_sentence_with_its_key(cache, folder, options, message):
    with pytest.raises(UserError) as caught:
        build.run(tiny(cache, data__root=folder, stage__linear__options=options))
    assert 'stage.linear.options' in str(caught.value) and message in str(caught.value)
    assert '\n' not in str(caught.value)


def test_a_loss_that_there_is_not_is_named_before_step_0(cache, folder):
    built = build.run(tiny(cache, data__root=folder, loss_weights__primary=1.0))
    with pytest.raises(
        UserError, match="names 'primary'; this task's losses are anchor, source_bin"
    ):
        build.check(built)


def test_a_dict_over_a_section_merges_with_what_is_declared():
    config = tiny('nowhere')
    config.best = dict(metric='val/final_loss')
    config.model.anchor = dict(width=24, heads=4)
    resolved = config_lib.resolve(config)
    assert (resolved.best.metric, resolved.best.mode) == ('val/final_loss', 'min')
    assert (resolved.model.anchor.width, resolved.model.anchor.epsilon) == (24, 1e-5)


@pytest.mark.parametrize(
    ('key', 'text', 'acting'),
    [
        ('optimizer.schedule', 'linear', ('anchor', 'naive')),
        ('sampler.k', '2', ('near', 'linear', 'nonlinear')),
        ('loss_weights.anchor', '0.5', ('anchor', 'near')),
    ],
)
def test_a_key_that_stages_override_is_refused_with_the_keys_that_act(key, text, acting):
    config = runs.recipe('contrabin', '')
    keys = [f'stage.{name}.{key}' for name in acting]
    with pytest.raises(UserError) as caught:
        config_lib.override(config, [(key, text)])
    assert f'{key} has no effect' in str(caught.value)
    assert str(caught.value).endswith('set ' + ', '.join(f'--config.{k}' for k in keys))
    config = runs.recipe('contrabin', '')
    config_lib.override(config, [(key, text), *((k, text) for k in keys)])
    section, name = key.split('.')
    assert [str(config.stage[stage][section][name]) for stage in acting] == [text] * len(acting)


@pytest.mark.parametrize(('text', 'chunk'), [('auto', 'auto'), ('64', 64)])
def test_a_chunk_of_the_command_line_is_a_number(text, chunk):
    config = tiny('nowhere')
    config_lib.override(config, [('losses.chunk', text)])
    assert config_lib.resolve(config).losses.chunk == chunk


def test_pieces_decide_what_a_token_of_a_listing_spans(cache, folder):
    """'lines' may make an instruction one token, 'words' only a word of one."""
    longest = {}
    for pieces in ('lines', 'words'):
        built = build.run(
            tiny(
                cache,
                data__root=folder,
                data__binary_pieces=pieces,
                data__binary_vocabulary=600,
            )
        )
        tokenizer = built.task.tokenizers['binary']
        record = built.task.splits['train'].record(0)
        ids, mask = tokenizer.encode([record['binary']], 48)
        texts = [tokenizer.decode([int(i)]) for i in ids[0][mask[0]]]
        longest[pieces] = max(len(re.findall(r'\w+', text)) for text in texts)
        source = built.task.tokenizers['source']
        assert source is built.task.tokenizers['comment'] and source is not tokenizer
    assert longest['words'] == 1 < longest['lines']


# Seeds --------------------------------------------------------------------------------------


def test_a_seed_decides_weights_and_order(cache, folder):
    built = [build.run(tiny(cache, data__root=folder, seed=seed)) for seed in (0, 0, 1)]
    plans = [run.sampler(run.stages[0]).plan(0).rows for run in built]
    np.testing.assert_array_equal(plans[0], plans[1])
    assert (plans[0] != plans[2]).any()
    with jax.set_mesh(built[0].mesh):
        heads = [run.init_variables()['params']['source_head']['project'] for run in built[1:]]
    assert (heads[0]['kernel'] != heads[1]['kernel']).any()


def test_the_seed_of_the_data_alone_decides_what_is_learnt_and_tested(cache, monkeypatch):
    """Otherwise runs of several seeds would not be scored on the same functions."""
    prints = [
        {name: split.fingerprint() for name, split in opened(cache, **seeds).items()}
        for seeds in (dict(), dict(seed=1), dict(data__seed=1))
    ]
    assert prints[0] == prints[1]
    assert all(prints[0][name]['digest'] != prints[2][name]['digest'] for name in code.SPLITS)

    def compile_once(folder, cache, *, seed, **options):
        raise UserError(f'split by seed {seed}')

    monkeypatch.setattr(c_projects, 'compile_once', compile_once)
    with pytest.raises(UserError, match='split by seed 5'):
        opened(cache, seed=1, data__seed=5, data__c_files='x')


def test_tokenizers_read_a_sample_of_all_rows(cache, folder, monkeypatch):
    train = opened(cache, data__root=folder)['train']
    read, make = [], tokenizers.train_tokenizer

    def train_tokenizer(texts, size, **options):
        read.append(list(texts))
        return make(read[-1], size, **options)

    monkeypatch.setattr(tokenizers, 'train_tokenizer', train_tokenizer)
    monkeypatch.setattr(contrabin, 'TOKENIZER_ROWS', 6)
    for seed in (0, 0, 1):
        config = config_lib.resolve(tiny(cache, data__root=folder, data__seed=seed))
        contrabin.choose_tokenizers(config, None, train)
    texts, listings = read[:2]
    assert read[2:4] == read[:2] and read[4] != texts and read[5] != listings
    each = train.one_each()
    place = {code.as_read('source', train.record(row)['source']): at for at, row in enumerate(each)}
    drawn = [place[text] for text in texts[::2]]
    assert len(set(drawn)) == 6 and max(drawn) > 8  # functions, of all there are
    rows = [train.record(row)['binary'] for row in range(80)]
    drawn = [rows.index(listing) for listing in listings]
    assert len(set(drawn)) == 6 and max(drawn) > 20
    assert sorted(code.sample(5, 9, 3)) == list(range(5))


# Lengths ------------------------------------------------------------------------------------


@pytest.mark.parametrize('accumulation', [1, 2, 4])
def test_epochs_are_as_many_updates_whatever_the_accumulation(cache, folder, accumulation):
    """80 rows of 20 functions in batches of 16 are 5 updates an epoch, and 1 where neighbours
    stand together; the rate ends at zero with the last of them where it is not constant."""
    changed = tiny(cache, data__root=folder, accumulation=accumulation)
    epochs = {'anchor': 1.0, 'naive': 2.5, 'linear': 2.5, 'nonlinear': 5.0}
    for name, length in epochs.items():
        del changed.stage[name].steps
        changed.stage[name].epochs = length
    run = build.run(changed)
    assert [stage.steps for stage in run.stages] == [5, 13, 3, 5]
    assert [stage.start for stage in run.stages] == [0, 5, 18, 21]
    for stage in run.stages:
        at = lambda n, stage=stage: max(optim.rates(stage, run.groups.names, n).values())
        constant = stage.name in ('anchor', 'naive')
        assert at(stage.steps - 1) > 0 and at(stage.steps) == constant * at(stage.steps - 1)
    assert run.stages[-1].name == 'nonlinear'
