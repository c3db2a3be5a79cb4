"""The sign-language config: every combination of its words builds, and wrong settings are named."""

import functools
import itertools

import jax
import pytest

from mmjax.engine import build
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
    build.check_terms(built)
    student = built.task.models['student']
    widths = {stream.name: stream.width for stream in student.streams}
    smoke, published = 'smoke' in words, 'published' in words
    hand = 16 if smoke else 128 if published else 64
    other = 16 if smoke else 64
    assert widths == dict(pose=other, left=hand, right=hand, face=other)
    assert built.batch_size == (4 if published or smoke else 16)
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
    assert built.task.blank_weight == 1
    augmentation = built.data.augmentation
    assert (augmentation.time_masks, augmentation.feature_dropout) == (2, 0.05)


def test_smoothing_is_a_weight_of_the_command_line_and_costs_nothing_at_0(folder, small):
    for words, weight in itertools.product(('', 'distill'), (0.0, 0.1)):
        built = build.run(tiny(words, folder, loss_weights__smoothing=weight))
        build.check_terms(built)
        learns = built.stages[-1]
        assert ('smoothing' in learns.losses) == bool(weight)
        found = jax.eval_shape(built.task.decode, built.abstract, built.batch)
        assert ('smoothing' in found['rows']) == bool(weight)
        assert len(built.stages) == 1 or 'smoothing' not in built.stages[0].losses


FLAT = ('hands', 0, 4)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(decode__beam=0), 'decode.beam=0 is not above 0'),
        (dict(losses__distillation_temperature=0.0), 'distillation_temperature=0.0 is not above'),
        (dict(losses__distillation_blank_weight=1.5), 'distillation_blank_weight=1.5 is not 0 … 1'),
        (dict(sampler__stretch=1.0), r'^sampler.stretch=1.0 leaves no room for data.augmentation'),
        (dict(stage__train__sampler=dict(stretch=1.0)), r'^stage.train.sampler.stretch=1.0 leaves'),
        (dict(stage__train__sampler=dict(name='bucketed', by='length')), 'stretch=1.0 leaves no'),
        (dict(loss_weights=dict(ctc=1.0, focal=1.0)), "loss_weights names 'focal'; there are ctc"),
        (dict(model__student__stream_widths=(('hand', 3),)), 'hand; the data have hands, face'),
        (dict(loss_weights=dict(ctc=1.0, distillation=0.5)), 'stage.train: .*model.distill=True'),
        (dict(stage__train__loss_weights=dict(teacher_ctc=1.0)), 'stage.train: .*model.distill'),
        (dict(data__buckets=0), 'data.buckets=0 is neither 1 or more nor lengths'),
        (dict(data__streams=FLAT), r"data.streams holds \(name, start, end\) .*not 'hands'"),
        (dict(data__streams=(FLAT, FLAT)), "data.streams names the stream 'hands' twice"),
    ],
)
def test_wrong_settings_end_before_the_first_step(folder, small, changes, message):
    with pytest.raises(UserError, match=message) as caught:
        build.check_terms(build.run(tiny('', folder, **changes)))
    assert '\n' not in str(caught.value)


def test_another_sampler_of_a_stage_needs_no_room(folder, small):
    build.run(tiny('', folder, stage__train__sampler=dict(name='shuffle')))


def test_widths_are_those_of_the_streams_there_are(folder):
    widths = (('hands', 3), ('temporal', 5))
    built = build.run(tiny('', folder, model__student__stream_widths=widths))
    found = {stream.name: stream.width for stream in built.task.models['student'].streams}
    assert found == {'hands': 3, 'face': 8}
