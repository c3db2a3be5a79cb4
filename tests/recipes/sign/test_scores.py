"""What the sign-language recipe decodes and scores: beams, fetched outputs, temporal variance."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.engine import build, evaluate
from mmjax.recipes.sign import scores
from mmjax.recipes.sign import task as sign
from mmjax.recipes.sign.model import temporal_squares
from tests.decode.test_ctc import exhaustive
from tests.recipes.sign.test_task import FRAMES, Small, batch_of, tiny, write


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp('data') / 'root')


@pytest.fixture(scope='module', autouse=True)
def small():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sign, 'Sign', lambda words, _, *, width, **more: Small(words, width))
        yield


@pytest.fixture(scope='module')
def built(folder):
    changes = dict(decode__language_model=0.7, decode__length_bonus=0.4, decode__beam=2)
    return build.run(tiny('', folder, **changes))


def known(logits):
    """Returns what a model with these logits would return."""
    inputs = jnp.zeros((*logits.shape[:2], 2))
    return jnp.float32(logits), {'intermediates': {'lstm_inputs': [inputs]}}


def test_the_language_model_takes_part_in_decoding(built, monkeypatch):
    """Equal to exhaustive search with the table's weight, traced as an evaluation traces it."""
    task, batch = built.task, batch_of(built.task, 'dev', [2])
    monkeypatch.setitem(task.beam_options, 'beam', 64)
    logits = np.random.default_rng(1).normal(size=(1, batch['frames'].shape[1], 5))
    batch['frames'] &= np.arange(logits.shape[1]) < 4
    monkeypatch.setattr(task, '_apply', lambda *arguments, **options: known(logits))
    ids, lengths = jax.jit(lambda batch: task.decode({}, batch))(batch)['beam']
    table = task.beam_options['language_model'].astype(float)
    total = {}
    for sequence, score in exhaustive(jax.nn.log_softmax(logits[0, :4])).items():
        steps = zip((0, *sequence), (*sequence, 0), strict=True)
        fusion = 0.7 * sum(table[step] for step in steps) + 0.4 * len(sequence)
        total[sequence] = score + fusion
    best = max(total, key=total.get)
    assert tuple(ids[0, : int(lengths[0])].tolist()) == best
    alone = exhaustive(jax.nn.log_softmax(logits[0, :4]))
    assert max(alone, key=alone.get) != best


def test_a_beam_is_as_long_as_the_frames_allow(built, monkeypatch):
    monkeypatch.setitem(built.task.beam_options, 'beam', 1)
    path = np.tile([1, 2], 45)
    logits = 20.0 * jax.nn.one_hot(path, 5)[None]
    monkeypatch.setattr(built.task, '_apply', lambda *arguments, **options: known(logits))
    ids, lengths = built.task.decode({}, {'frames': np.ones((1, 90), bool)})['beam']
    assert lengths[0] == 90 and ids[0].tolist() == path.tolist()


def test_scores_and_predictions_read_fetched_outputs_only(built, folder, tmp_path, monkeypatch):
    """Outputs of a sharded model live on many hosts: `predict` fetches them, and pads the batch."""
    real = evaluate.Predictor(built.task, built.init_variables(), built.mesh)
    asked = []

    def predict(method, dataset, batch_size):  # without the weights
        for outputs, batch in real(method, dataset, batch_size):
            asked.append((method, len(batch['row'])))
            assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(outputs))
            yield outputs, batch

    monkeypatch.setattr(scores, 'DRAWN', 2)  # of three
    drawn = built.evaluators['dev'].run(predict, final=True).figures
    assert {'sentence_0', 'sentence_2', 'confusions', 'lengths'} == set(drawn)
    assert asked == [('decode', 3), ('log_probs', 2)]
    path = folder / 'features/test/test1.npz'
    built.task.predict(predict, str(path), tmp_path)
    assert asked[2:] == [('log_probs', 1)]
    assert json.loads((tmp_path / 'glosses.json').read_text())['input'] == str(path)
    # What is drawn of a sentence stops at its end.
    edges = drawn['sentence_2'].axes[0].images[0].get_extent()
    assert edges[1] == FRAMES['dev'][2] - 0.5


def test_temporal_variance_is_that_of_frames_a_stride_apart():
    rng = np.random.default_rng(0)
    x, lengths = rng.normal(2, 3, (3, 13, 2)).astype(np.float32), np.array([13, 9, 2])
    frames = np.arange(13) < lengths[:, None]
    squares, count = temporal_squares(np.where(frames[..., None], x, 1e6), frames)
    for row, length in enumerate(lengths):
        phases = [x[row, [t for t in range(1, length - 1) if t % 4 == k]] for k in range(4)]
        wanted = sum(len(p) * p.var(0).sum() for p in phases if len(p))
        assert float(squares[row]) == pytest.approx(wanted, rel=1e-5)
        assert int(count[row]) == 2 * max(length - 2, 0)
    # Equal frames of the MobileNet differ within a stride, and at the ends of a row.
    still = np.tile(x[:, :4], (1, 4, 1))[:, :13]
    still[:, 0] += 1
    still[1, 8] -= 1
    assert abs(temporal_squares(still, frames)[0]).max() < 1e-9
