"""What the ContraBin config may say: bad values told by key, seeds apart, lengths in epochs."""

import jax
import numpy as np
import pytest

from mmjax.data import tokenizers
from mmjax.engine import build, config, optim
from mmjax.errors import UserError
from mmjax.recipes.contrabin import data as code
from mmjax.recipes.contrabin import splits
from tests.recipes.contrabin.test_modes import tiny, write_functions


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp('cache')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return write_functions(tmp_path_factory.mktemp('rows'))


def opened(cache, **changes):
    return splits.open_splits(config.View(tiny(cache, **changes)))[0]


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(precision='no'), "'no' is not float32, bfloat16 or float16"),
        (dict(stage__linear__options=dict(interpolaton='x')), r'linear\.options\.interpolaton'),
        (dict(stage__linear__options=dict(interpolation='cubic')), "'cubic' is not one of naive"),
        (dict(loss_weights__primary=1.0), "names 'primary'; there are anchor"),
        (dict(evaluate_pool=1), 'evaluate_pool=1 must be a number 2 or more'),
        (dict(data__root='x', data__c_files='y'), 'exclude each other'),
        (dict(model__head='deep'), r"model\.head 'deep' is not one of linear, nonlinear"),
        (dict(model__pooling='last'), r"model\.pooling 'last' is not one of first, mean"),
        (dict(model__features=0), r'model\.features=0 must be a number 2 or more'),
        (dict(model__dropout=1.0), r'model\.dropout=1\.0 must be a number from 0 to'),
        (dict(model__anchor__heads=3), r'model\.anchor\.width=16 cannot be shared by 3 heads'),
        (dict(model__anchor__depth=0), r'model\.anchor\.depth=0 must'),
        (dict(losses__softness=1.5), r'losses\.softness=1\.5 must be a number from 0 to 1'),
        (dict(losses__softness=float('nan')), r'losses\.softness=nan must'),
        (dict(losses__temperature=0.0), r'losses\.temperature=0\.0 must'),
        (dict(losses__chunk='some'), r"losses\.chunk='some' is neither 'auto' nor"),
        (dict(losses__chunk='0'), r"losses\.chunk='0' is neither 'auto' nor"),
        (dict(data__vocabulary=259), r'data\.vocabulary=259 must be a number 260 or more'),
        (dict(data__binary_vocabulary=9), r'data\.binary_vocabulary=9 must'),
        (dict(data__max_source=0), r'data\.max_source=0 must be a number 2 or more'),
        (dict(data__max_binary=1), r'data\.max_binary=1 must'),
        (dict(data__max_fault_share=-0.1), r'data\.max_fault_share=-0\.1 must'),
        (dict(data__compile__workers=0), r'data\.compile\.workers=0 must'),
        (dict(data__compile__time_limit=0.0), r'data\.compile\.time_limit=0\.0 must'),
    ],
)
def test_what_nothing_can_use_is_refused(cache, changes, message):
    with pytest.raises(UserError, match=message) as caught:
        build.run(tiny(cache, **changes))
    assert '\n' not in str(caught.value)


def test_the_no_of_yaml_is_refused_too(cache):
    wrong = tiny(cache).to_dict()
    wrong['precision'] = False
    with pytest.raises(UserError, match="'False' is not float32, bfloat16 or float16"):
        build.run(type(tiny(cache))(wrong))


@pytest.mark.parametrize(('given', 'chunk'), [('auto', 'auto'), ('64', 64)])
def test_a_chunk_of_the_command_line_is_a_number(cache, folder, given, chunk):
    assert build.run(tiny(cache, data__root=folder, losses__chunk=given)).task.chunk == chunk


# Seeds --------------------------------------------------------------------------------------


def test_a_seed_decides_weights_and_order(cache, folder):
    runs = [build.run(tiny(cache, data__root=folder, seed=seed)) for seed in (0, 0, 1)]
    plans = [run.sampler(run.stages[0]).plan(0).rows for run in runs]
    np.testing.assert_array_equal(plans[0], plans[1])
    assert (plans[0] != plans[2]).any()
    with jax.set_mesh(runs[0].mesh):
        heads = [run.init_variables()['params']['source_head']['project'] for run in runs[1:]]
    assert (heads[0]['kernel'] != heads[1]['kernel']).any()


def test_the_seed_of_the_data_alone_decides_what_is_learnt_and_tested(cache, monkeypatch):
    """Otherwise runs of several seeds would not be scored on the same functions."""
    prints = [
        {name: split.fingerprint() for name, split in opened(cache, **seeds).items()}
        for seeds in (dict(), dict(seed=1), dict(data__seed=1))
    ]
    assert prints[0] == prints[1]
    assert all(prints[0][name]['digest'] != prints[2][name]['digest'] for name in code.SPLITS)

    def compiled(folder, cache, *, seed, **options):
        raise UserError(f'split by seed {seed}')

    monkeypatch.setattr(splits, '_compile', compiled)
    with pytest.raises(UserError, match='split by seed 5'):
        opened(cache, seed=1, data__seed=5, data__c_files='x')


def test_tokenizers_read_a_sample_of_all_rows(cache, folder, monkeypatch):
    train = opened(cache, data__root=folder)['train']
    read, make = [], tokenizers.train_tokenizer

    def train_tokenizer(texts, size, **options):
        read.append(list(texts))
        return make(read[-1], size, **options)

    monkeypatch.setattr(tokenizers, 'train_tokenizer', train_tokenizer)
    monkeypatch.setattr(splits, '_READ', 6)
    for seed in (0, 0, 1):
        view = config.View(tiny(cache, data__root=folder, data__seed=seed))
        splits.choose_tokenizers(view, None, train)
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
