"""The plan of a run: lengths, weights, errors that name the key."""

import dataclasses
import math

import pytest

from mmjax.engine import config as config_lib
from mmjax.engine import stages
from mmjax.errors import UserError
from mmjax.sections import field


@dataclasses.dataclass(frozen=True)
class Options:
    kind: str = field('naive', choices=('naive', 'linear'))


@dataclasses.dataclass(frozen=True)
class Config(config_lib.Config):
    StageOptions = Options


def make(**changes):
    config = config_lib.default(Config)
    config.stages = ('a', 'b')
    config.stage = dict(
        a=dict(epochs=2.5, learning_rates=dict(tower=0.0)),
        b=dict(steps=7, loss_weights=dict(x=dict(start=0.0, end=1.0)), options=dict(kind='linear')),
    )
    config.loss_weights = dict(x=1.0, y=0.5)
    for key, value in changes.items():
        config[key] = value
    return config


def planned(config, per_epoch=10, batch_size=4):
    return stages.plan(
        stages.parse(config_lib.resolve(config, Config)), lambda stage: per_epoch, batch_size
    )


def test_lengths_in_epochs_steps_and_examples_follow_one_another():
    config = make()
    config.stages = ('a', 'b', 'c')
    config.stage.c = dict(examples=9)
    a, b, c = planned(config)
    assert [(s.start, s.steps) for s in (a, b, c)] == [(0, 25), (25, 7), (32, 3)]
    assert {s.run_steps for s in (a, b, c)} == {35}


def test_stage_overrides_merge_with_the_shared_defaults():
    a, b = planned(make())
    assert a.weights(0) == {'x': 1.0, 'y': 0.5}
    assert not a.trains('tower') and a.rate('head') == 1.0
    assert b.options.kind == 'linear' and b.trains('tower')


def test_a_ramp_runs_from_start_to_end():
    _, b = planned(make())
    assert b.weights(0)['x'] == 0.0
    assert b.weights(7)['x'] == 1.0
    assert math.isclose(b.weights(3)['x'], 3 / 7)


def test_position_takes_no_part_in_equality_so_an_early_stop_does_not_recompile():
    config = make()
    config.stage.b = dict(steps=9, learning_rates=dict(tower=0.0))
    config.stage.a = dict(steps=3, learning_rates=dict(tower=0.0))
    a, b = planned(config)
    assert a.start != b.start and a.steps != b.steps
    b = dataclasses.replace(b, name='a')
    assert b == a and hash(b) == hash(a)


@pytest.mark.parametrize(
    ('changes', 'same'),
    [
        (dict(learning_rates=dict(tower=0.0, head=0.3)), True),
        (dict(learning_rates=dict(head=0.0)), False),
        (dict(learning_rates=dict(tower=0.1)), False),
        (dict(loss_weights=dict(x=0.2)), True),
        (dict(loss_weights=dict(x=dict(start=0.0, end=1.0))), True),
        (dict(loss_weights=dict(x=0.0)), False),
        (dict(optimizer=dict(learning_rate=1.0, schedule='constant', warmup_steps=2)), True),
        (dict(optimizer=dict(clip=0.0)), False),
        (dict(optimizer=dict(weight_decay=0.5)), False),
        (dict(options=dict(kind='linear')), False),
        (dict(early_stop=dict(metric='val/loss', patience=1)), True),
    ],
)
def test_stages_share_a_compile_key_unless_what_is_traced_differs(changes, same):
    config = make()
    config.stage.a = dict(steps=3, learning_rates=dict(tower=0.0))
    config.stage.b = dict(steps=9, **dict(dict(learning_rates=dict(tower=0.0)), **changes))
    a, b = planned(config)
    assert (a.compile_key == b.compile_key) is same
    assert (hash(a.compile_key) == hash(b.compile_key)) is same


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(stages=()), 'stages is empty'),
        (dict(stages=('a', 'a')), 'twice'),
        (dict(stages=('a', 'nope')), "names 'nope'"),
        (dict(stages=('z',), stage=dict(z=dict())), 'stage.z needs exactly one of'),
        (dict(stages=('z',), stage=dict(z=dict(steps=1, epochs=1))), 'it has steps, epochs'),
        (dict(stages=('z',), stage=dict(z=dict(steps=1, sped=1))), 'unknown key stage.z.sped=1'),
        (
            dict(stages=('z',), stage=dict(z=dict(epochs=-1.0))),
            r'stage.z.epochs=-1.0 is not .* above 0',
        ),
        (
            dict(stages=('z',), stage=dict(z=dict(steps=1, optimizer=dict(learning_rte=1.0)))),
            "did you mean 'learning_rate'",
        ),
        (
            dict(loss_weights=dict(x=float('nan'))),
            'loss_weights.x=nan is not a number or a section',
        ),
        (dict(loss_weights=dict()), 'no loss has a weight'),
        (
            dict(stages=('z',), stage=dict(z=dict(steps=1, learning_rates=dict(t=-1.0)))),
            r'stage.z.learning_rates.t=-1.0 is not .* at least 0',
        ),
        (
            dict(stages=('z',), stage=dict(z=dict(steps=1, optimizer=dict(schedule='cos')))),
            "stage.z.optimizer.schedule='cos' is not one of",
        ),
        (
            dict(stages=('z',), stage=dict(z=dict(steps=1, optimizer=dict(eps=0.0)))),
            'stage.z.optimizer.eps=0.0 is not a number at least 1e-12 and at most 1',
        ),
        (
            dict(stages=('z',), stage=dict(z=dict(steps=1, optimizer=dict(b1=1.0)))),
            'stage.z.optimizer.b1=1.0 is not a number at least 0 and at most 0.9999',
        ),
        (dict(early_stop=dict(metric='val/x', mode='min', patience=0, min_delta=0.0)), 'patience'),
    ],
)
def test_a_wrong_stage_is_an_error_that_names_it(changes, message):
    config = make()
    for key, value in changes.items():
        config[key] = value
    with pytest.raises(UserError, match=message):
        planned(config)


def test_unlisted_stages_are_reported():
    assert stages.unused(config_lib.resolve(make(stages=('a',)), Config)) == ['b']


def test_unknown_words_list_the_known_ones():
    assert config_lib.words('smoke,published', ('smoke', 'published')) == {'smoke', 'published'}
    with pytest.raises(UserError, match="unknown config word 'smok'; known: smoke, published"):
        config_lib.words('smok', ('smoke', 'published'))


def test_a_stage_is_hashable_whatever_options_its_sampler_has():
    options = {'name': 'stratified', 'minimum': 2, 'by': {'n_text': 2, 'n_panels': 2}}
    stage, *_ = planned(make(sampler=options))
    assert stage.sampler == options
    hash(stage)
