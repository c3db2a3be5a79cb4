"""The config of the retrieval recipe: its words, its versions' rates, and what it refuses."""

import itertools

import numpy as np
import pytest

from mmjax import sections
from mmjax.engine import config as config_lib
from mmjax.engine import optim, stages
from mmjax.errors import UserError
from mmjax.models import clip
from mmjax.recipes.retrieval import model
from mmjax.recipes.retrieval.config import Config
from tests import clip_presets, runs

VERSIONS = ('v1', 'v2', 'v3', 'v4')
WORDS = ('', 'smoke', 'few', 'published', 'vit', 'rn50', 'staged')


def config_of(words='', **changes):
    return runs.change(runs.recipe('clip_retrieval', words), **changes)


def resolved(words=''):
    return config_lib.resolve(config_of(words))


# Words ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(('version', 'word'), list(itertools.product(('', *VERSIONS), WORDS)))
def test_every_version_goes_with_every_word(version, word):
    config = resolved(','.join(filter(None, (version, word))))
    last = {'': 'v4'}.get(version, version)
    assert list(config.loss_weights) == ['infonce' if last == 'v1' else 'supcon']
    assert config.sampler['name'] == ('shuffle' if last == 'v1' else 'pk')
    assert config.data.prompt_policy == ('safe' if last == 'v4' else 'raw')
    assert config.optimizer.schedule == ('cosine' if last == 'v4' else 'constant')
    assert config.stages == (('first', 'tune') if word in ('smoke', 'staged') else ('tune',))
    assert config.model.vision == ('vit' if word in ('smoke', 'vit') else 'rn50')
    # `published` is v4's .05 with the ViT alone; rn50 is the default here.
    temperature = 0.05 if last == 'v4' and word != 'published' else 0.07
    assert config.losses.temperature == (temperature if word in ('few', 'published') else 0.1)
    rate = {'few': 3e-3, 'published': 5e-5}.get(word, 1.5e-3)
    assert config.optimizer.learning_rate == rate
    assert config.early_stop.metric == ('val/final_loss' if word == 'published' else '')
    tune = config.stage['tune']
    assert tune.learning_rates == {'temperature': 0.0}
    assert tune.optimizer == ({'learning_rate': 2 * rate} if last == 'v3' else {})
    epochs = {'few': 12, 'smoke': 1, 'published': dict(v1=10, v2=20, v3=20, v4=50)[last]}
    assert tune.epochs == epochs.get(word, 30)


def test_the_declared_defaults_are_those_of_the_built_in_recipe():
    default = resolved()
    for name in ('data', 'model', 'losses'):
        assert getattr(default, name) == getattr(Config(), name)


@pytest.mark.parametrize('words', ['v1,v2', 'vit,rn50'])
def test_words_that_exclude_each_other(words):
    with pytest.raises(UserError, match='exclude each other'):
        config_of(words)


@pytest.mark.parametrize(
    ('words', 'preset'), [('vit', clip_presets.vit_b_16), ('rn50', clip_presets.rn50)]
)
def test_published_is_openais_model(words, preset):
    ours = model.build(resolved(f'published,{words}'), 49408)
    theirs = clip.build(**preset())
    for tower in ('vision', 'text'):
        pair = getattr(ours, tower), getattr(theirs, tower)
        assert type(pair[0]) is type(pair[1])
        assert model.tower_fields(pair[0]) == model.tower_fields(pair[1])


# Rates ----------------------------------------------------------------------------------------


def rates(words):
    config = resolved(f'smoke,{words}')
    plan = stages.plan(stages.parse(config), lambda stage: 20, 16)
    return [
        [optim.rates(stage, ('vision',), step)['vision'] for step in range(stage.steps)]
        for stage in plan
    ]


def test_v4_warms_up_once_and_decays_once_over_the_run():
    """The original promised a warm-up, and stepped a cosine of epochs with every batch."""
    curve = np.concatenate(rates('v4'))
    top = int(np.argmax(curve))
    assert curve[0] < 0.3 * curve[top] and top == pytest.approx(0.1 * len(curve), abs=1)
    assert (np.diff(curve[: top + 1]) > 0).all() and (np.diff(curve[top:]) < 0).all()
    assert curve[-1] < 0.01 * curve[top]


def test_v1_and_v2_hold_their_rate_and_v3_doubles_it():
    for words in ('v1', 'v2'):
        assert len({float(rate) for stage in rates(words) for rate in stage}) == 1
    first, second = rates('v3')
    assert second[0] == pytest.approx(2 * first[0]) and len(set(second)) == 1


@pytest.mark.parametrize('words', ['v3', 'v3,few', 'v3,published', 'v3,staged', 'v3,smoke'])
def test_the_base_rate_under_v3_is_refused_with_the_key_that_acts(words):
    acting = 'stage.tune.optimizer.learning_rate'
    config = config_of(words)
    with pytest.raises(UserError, match=rf'optimizer\.learning_rate .* set --config\.{acting}$'):
        config_lib.override(config, [('optimizer.learning_rate', '1e-4')])
    config = config_of(words)
    config_lib.override(config, [(acting, '1e-4')])
    stage, _ = stages.parse(config_lib.resolve(config))[-1]
    assert stage.name == 'tune' and stage.optimizer.learning_rate == 1e-4


def test_the_base_rate_of_other_versions_can_be_set():
    config = config_of('v2')
    config_lib.override(config, [('optimizer.learning_rate', '1e-4')])
    stage, _ = stages.parse(config_lib.resolve(config))[0]
    assert stage.optimizer.learning_rate == 1e-4


# Wrong input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('words', 'key', 'value', 'message'),
    [
        ('', 'data__image_size', '64', r"^data\.image_size='64' is not an integer at least 8$"),
        (
            '',
            'data__image_size',
            60,
            r'^data\.image_size=60 must be a multiple of 32, with .*\(1, 1',
        ),
        ('vit', 'data__image_size', 60, r'^data\.image_size=60 .*of 8, .*vit\.patch_size=8$'),
        ('', 'data__max_tokens', 0, r'^data\.max_tokens=0 is not an integer at least 2$'),
        ('', 'data__vocabulary', 513, r'^data\.vocabulary=513 is not an integer at least 514$'),
        ('', 'data__val_items', 1.0, r'^data\.val_items=1\.0 .* at least 0 and below 1$'),
        ('', 'data__prompt_policy', 'save', r"^data\.prompt_policy='save' .*did you mean 'safe'"),
        ('', 'data__prompts', 3, r'^data\.prompts=3 is not a string or None$'),
        ('', 'data__seed', -1, r'^data\.seed=-1 is not an integer at least 0$'),
        ('', 'data__roots', '/x', r"^unknown key data\.roots='/x'; .*did you mean 'root'"),
        ('', 'data__augmentation__brightness', -0.1, r'^data\.augmentation\.brightness=-0\.1 .*at'),
        (
            '',
            'data__augmentation__min_area',
            0,
            r'^data\.augmentation\.min_area=0\.0 .*at least 0\.01',
        ),
        ('', 'data__augmentation__hue', 0.6, r'^data\.augmentation\.hue=0\.6 .*at most 0\.5$'),
        ('', 'data__augmentation__blur', 0.1, r'^unknown key data\.augmentation\.blur=0\.1; known'),
        ('', 'data__built_in__shots', 0, r'^data\.built_in\.shots=0 is not an integer at least 1$'),
        ('', 'model__vision', 'resnet', r"^model\.vision='resnet' is not one of 'vit', 'rn50'"),
        ('', 'model__text__heads', 5, r'^model\.text\.heads=5 .* divide model\.text\.width=96$'),
        (
            '',
            'model__vit__heads',
            3,
            r'^model\.vit\.heads=3 does not divide model\.vit\.width=128$',
        ),
        ('published', 'model__rn50__heads', 30, r'^model\.rn50\.heads=30 does not divide the 2048'),
        ('', 'model__rn50__pooling', 'mean', r"^model\.rn50\.pooling='mean' is not one of 'att"),
        (
            '',
            'model__rn50__stage_sizes',
            (1, 0),
            r'^model\.rn50\.stage_sizes=\(1, 0\) is not a tup',
        ),
        ('', 'model__rn50__stage_sizes', (), r'^model\.rn50\.stage_sizes=\(\) names no stage$'),
        ('', 'model__features', True, r'^model\.features=True is not an integer at least 2$'),
        ('', 'losses__temperature', -0.1, r'^losses\.temperature=-0\.1 .*at least 0$'),
        (
            '',
            'losses__chunk',
            'all',
            r"^losses\.chunk='all' is not an integer at least 1 or 'auto'",
        ),
        (
            '',
            'losses__mask_same_item',
            'yes',
            r"^losses\.mask_same_item='yes' is not True or False",
        ),
        ('', 'loss_weights__suppcon', 1.0, r"^unknown key loss_weights\.suppcon=1\.0; .*'supcon'"),
        (
            '',
            'stage__tune__loss_weights',
            dict(clip=1.0),
            r'^unknown key stage\.tune\.loss_weights\.',
        ),
        ('', 'stages', ('tune', 'more'), r"^stages names 'more', but stage\.more does not exist$"),
    ],
)
def test_wrong_input_is_one_sentence(words, key, value, message):
    with pytest.raises(UserError, match=message) as error:
        config_lib.resolve(config_of(words, **{key: value}))
    assert '\n' not in str(error.value)


def test_sizes_that_published_weights_replace_are_not_checked_against_the_image():
    config = config_lib.resolve(config_of('', model__pretrained='folder', data__image_size=60))
    assert config.data.image_size == 60


def test_a_dict_assigned_over_a_section_is_merged():
    config = config_of('v2')
    config.best = dict(metric='val/final_loss')
    config.data.augmentation = dict(mirror=0.0)
    config.losses = dict(temperature=0.2)
    merged = config_lib.resolve(config)
    assert (merged.best.metric, merged.best.mode) == ('val/final_loss', 'min')
    assert sections.to_dict(merged.data.augmentation) == {
        **sections.to_dict(Config().data.augmentation),
        'mirror': 0.0,
    }
    assert (merged.losses.temperature, merged.losses.mask_same_item) == (0.2, True)
