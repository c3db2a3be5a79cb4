"""The sign-language config: every combination of its words builds, and wrong settings are named."""

import functools
import itertools

import jax
import pytest

from mmjax.engine import build, evaluate, stages
from mmjax.engine import config as config_lib
from mmjax.errors import UserError
from mmjax.models.mobilenet1d import PUBLISHED
from mmjax.recipes.sign import task as sign
from mmjax.recipes.sign.model import Sign
from tests import runs
from tests.recipes.sign.test_task import Small, tiny, write

FEW = dict(train=6, dev=2, test=2, signers=2, held_out_signers=1)
WORDS = ['', 'published', 'smoke,published', 'distill,published', 'smoke,distill,published']


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp('data') / 'root')


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(sign, 'Sign', lambda words, _, *, width, **more: Small(words, width))


@pytest.mark.parametrize('words', WORDS)
def test_all_words_build_on_the_built_in_data(tmp_path_factory, words, monkeypatch):
    """With few of the model's blocks, of which none has a size that the config chooses."""
    monkeypatch.setattr(sign, 'Sign', functools.partial(Sign, blocks=PUBLISHED[:1]))
    config = runs.recipe('sign_ctc', words)
    config.data.update(cache=str(tmp_path_factory.getbasetemp() / 'built-in'), built_in=FEW)
    built = build.run(config)
    build.check(built)
    student = built.task.models['student']
    widths = {stream.name: stream.width for stream in student.streams}
    smoke, published = 'smoke' in words, 'published' in words
    hand = 16 if smoke else 128 if published else 64
    other = 16 if smoke else 64
    assert widths == dict(pose=other, left=hand, right=hand, face=other)
    assert built.config.batch_size == (4 if published or smoke else 16)
    steps = [stage.steps for stage in built.stages]
    assert steps == [6, 6 if 'distill' in words else 4] if smoke else min(steps) > 9
    # All but the published form has four mean points and the change of every number.
    assert student.streams[-1].end == (92 if published else 2 * (92 + 4 * 2))
    if words not in ('published', 'distill,published'):
        return
    for stage in built.stages:
        spec, stop = stage.optimizer, stage.early_stop
        assert (spec.learning_rate, spec.weight_decay, spec.clip) == (3e-4, 1e-4, 1.0)
        assert (spec.warmup_epochs, spec.warmup_init, spec.schedule) == (5, 0.1, 'cosine_restarts')
        metric = 'dev/teacher_wer' if stage.name == 'teacher' else 'dev/wer'
        assert (stop.metric, stop.mode) == (metric, 'min')
        assert stop.patience == 15
    assert student.dropout == 0.3
    assert built.config.losses.distillation_blank_weight == 1
    augmentation = built.data.augmentation
    assert (augmentation.time_masks, augmentation.feature_dropout) == (2, 0.05)


def test_smoothing_is_a_weight_of_the_command_line_and_costs_nothing_at_0(folder, small):
    for words, weight in itertools.product(('', 'distill'), (0.0, 0.1)):
        built = build.run(tiny(words, folder, loss_weights__smoothing=weight))
        build.check(built)
        for stage in built.stages:
            trained = stage.name != 'teacher'
            assert ('smoothing' in stage.losses) == (bool(weight) and trained)
        weights = evaluate.LossWeights.of(built.stages[-1], 0, built.final_weights)
        outputs = jax.eval_shape(
            lambda *arrays: evaluate.forward(built.task, weights.stage, *arrays),
            built.abstract,
            built.batch,
        )
        measured = {'ctc', *(('teacher_ctc', 'distillation') if words else ())}
        assert set(outputs) == measured | ({'smoothing'} if weight else set())


WRONG = [
    (dict(decode__beam=0), 'decode.beam=0 is not an integer at least 1'),
    (dict(decode__beam='many'), "decode.beam='many' is not an integer at least 1"),
    (dict(decode__bean=4), "unknown key decode.bean=4; .*did you mean 'beam'"),
    (dict(losses__distillation_temperature=0.0), 'distillation_temperature=0.0 .* above 0'),
    (dict(losses__distillation_blank_weight=1.5), 'blank_weight=1.5 .* at least 0 and at most 1'),
    (dict(data__frame_rate=-25.0), 'data.frame_rate=-25.0 is not a number above 0'),
    (dict(data__missing='nan'), "data.missing='nan' is not one of 'zero', 'none'"),
    (dict(data__buckets=0), 'data.buckets=0 is not an integer at least 1'),
    (dict(data__buckets=(32, 0)), r'data.buckets=\(32, 0\) is not .* integers at least 1'),
    (dict(data__buckets=()), r'data.buckets=\(\) names no length'),
    (dict(data__streams=('hands', 0, 4)), r'data.streams=\(.*\) is not a mapping from names'),
    (dict(data__streams=dict(hands=(4,))), r'data.streams.hands=\(4,\) is not a tuple of 2'),
    (dict(data__streams=dict(hands=(-1, 4))), r'data.streams.hands=\(-1, 4\) is not .* least 0'),
    (dict(data__augmentation__noise=-0.1), 'data.augmentation.noise=-0.1 .* at least 0'),
    (dict(data__augmentation__time_masks=-1), 'data.augmentation.time_masks=-1 .* at least 0'),
    (dict(data__augmentation__stream_dropout=1.0), 'stream_dropout=1.0 is not .* below 1'),
    (dict(data__augmentation__stretch=(1.1, 1.2)), r'stretch=\(1.1, 1.2\) is not \(at most 1'),
    (dict(data__built_in__dev=0), 'data.built_in.dev=0 is not an integer at least 1'),
    (dict(model__student__attention_heads=3), 'student.attention_heads=3 does not divide .*=64'),
    (dict(model__teacher__lstm_layers=0), 'model.teacher.lstm_layers=0 is not an integer at least'),
    (dict(model__student__stream_widths=(('hands', 3),)), 'stream_widths=.* is not a mapping'),
    (dict(model__student__stream_widths=dict(hands=0)), 'stream_widths.hands=0 .* at least 1'),
    (dict(model__pack='yes'), "model.pack='yes' is not True or False"),
    (dict(sampler__stretch=1.0), r'^sampler.stretch=1.0 is less than the 1.1 of data.augmentation'),
    (dict(stage__train__sampler=dict(stretch=1.0)), r'^stage.train.sampler.stretch=1.0 is less'),
    (
        dict(stage__train__sampler=dict(name='bucketed', by='length')),
        r'^stage.train.sampler.stretch=1.0 is less',
    ),
    (dict(loss_weights=dict(ctc=1.0, distillation=0.5)), '^loss_weights.distillation=0.5 needs'),
    (
        dict(stage__train__loss_weights=dict(teacher_ctc=1.0)),
        '^stage.train.loss_weights.teacher_ctc=1.0 needs model.distill=True',
    ),
]


@pytest.mark.parametrize(('changes', 'message'), WRONG, ids=[next(iter(c)) for c, _ in WRONG])
def test_wrong_input_is_one_sentence(changes, message):
    with pytest.raises(UserError, match=message) as caught:
        config_lib.resolve(runs.change(runs.recipe('sign_ctc', ''), **changes))
    assert '\n' not in str(caught.value)


def test_a_dict_assigned_over_a_section_merges():
    config = runs.recipe('sign_ctc', '')
    config.best = dict(metric='val/final_loss')
    config.data.augmentation = dict(noise=0.5)
    config.model = dict(teacher=dict(width=32))
    resolved = config_lib.resolve(config)
    assert (resolved.best.metric, resolved.best.mode) == ('val/final_loss', 'min')
    augmentation = resolved.data.augmentation
    assert (augmentation.noise, augmentation.stretch) == (0.5, (0.9, 1.1))
    assert (resolved.model.teacher.width, resolved.model.teacher.lstm_layers) == (32, 2)
    assert resolved.model.student.lstm_layers == 1


def test_early_stopping_is_set_for_all_stages_by_one_key():
    config = runs.recipe('sign_ctc', 'distill,published')
    config_lib.override(config, [('early_stop.patience', '3')])
    plan = [stage.early_stop for stage, _ in stages.parse(config_lib.resolve(config))]
    assert [stop.metric for stop in plan] == ['dev/teacher_wer', 'dev/wer']
    assert [stop.patience for stop in plan] == [3, 3]
    with pytest.raises(UserError, match=r'set --config\.stage\.teacher\.early_stop\.metric'):
        config_lib.override(config, [('early_stop.metric', 'dev/ser')])


def test_streams_and_their_widths_are_set_by_name(folder):
    config = tiny('', folder)
    config_lib.override(
        config,
        [
            ('data.streams.face', '4,6,2'),
            ('data.streams.hand', '0,3'),
            ('model.student.stream_widths.hand', '3'),
            ('model.student.stream_widths.temporal', '5'),
        ],
    )
    built = build.run(config)
    widths = {stream.name: stream.width for stream in built.task.models['student'].streams}
    assert widths == {'hand': 3, 'face': 8}
    # Each number and its change; one landmark has no mean point of its own.
    assert built.task.models['student'].streams[-1].end == 2 * (3 + 2)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(model__student__stream_widths=dict(hand=3)), 'hand; the data have hands, face'),
        (
            dict(data__streams=dict(a=(0, 4), b=(3, 6))),
            r"streams 'a' \(0, 4\) and 'b' \(3, 6\) over",
        ),
        (dict(data__streams=dict(a=(0, 5, 2))), "'a' has 5 columns, which landmarks of 2"),
    ],
)
def test_settings_that_do_not_fit_the_data_end_before_the_first_step(folder, changes, message):
    with pytest.raises(UserError, match=message) as caught:
        build.run(tiny('', folder, **changes))
    assert '\n' not in str(caught.value)


def test_another_sampler_of_a_stage_needs_no_stretch(folder, small):
    build.run(tiny('', folder, stage__train__sampler=dict(name='shuffle')))


def test_options_reach_what_they_name(folder):
    """Sizes of each model, and what is made of the landmarks."""
    changes = dict(
        data__missing='none',
        data__differences=False,
        data__streams=dict(hands=(0, 4, 2), face=(4, 6)),
        model__teacher__cross_attention=True,
        model__student__dropout=0.4,
        precision='bfloat16',
    )
    built = build.run(tiny('distill', folder, **changes))
    models = built.task.models
    assert [model.lstm_layers for model in models.values()] == [1, 2]
    assert [model.dropout for model in models.values()] == [0.4, 0.1]
    assert [model.cross_attention for model in models.values()] == [False, True]
    assert {str(model.dtype) for model in models.values()} == {'bfloat16'}
    normalization = built.task.normalization
    assert (normalization.how, normalization.differences) == ('none', False)
    assert normalization.coordinates == {'hands': 2, 'face': 0}
    other = build.run(tiny('', folder, data__around=False)).task.normalization
    assert other.differences and not any(other.coordinates.values())
