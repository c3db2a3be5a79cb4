"""The captioning example learns from its images, and a stopped run ends as an unbroken one."""

import collections
import json

import jax
import numpy as np
import pytest
from PIL import Image

from examples.captioning import task as captioning
from mmjax import main, testing
from mmjax.data.tokenizers import load_tokenizer
from mmjax.engine import config as config_lib
from mmjax.engine.checkpoint import load_weights
from tests.runs import ROOT

SPEC = f'{ROOT}/examples/captioning/config.py:smoke'
SMALL = ('--config.width=32', '--config.log.tensorboard=false', '--config.log.every_steps=1')
LEARNS = (
    '--config.images=512',
    '--config.stage.all.epochs=30',
    '--config.evaluate.every_epochs=15',
)


def run(workdir, *arguments) -> int:
    code = main.main(['main', f'--config={SPEC}', f'--workdir={workdir}', *SMALL, *arguments])
    jax.clear_caches()
    return code


def scores(workdir) -> dict:
    return json.loads((workdir / 'results.json').read_text())['final']['val']


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp('captioning')
    assert run(workdir, *LEARNS) == 0
    return workdir


def val_captions() -> list[str]:
    rng = np.random.default_rng([0, 1])
    return [captioning.draw(rng)[1] for _ in range(64)]


def blind_loss(workdir) -> float:
    """Returns the least loss per token of a model that does not see: 4 colours, 3 shapes, twice."""
    _, mask = load_tokenizer(workdir).encode(val_captions(), captioning.LENGTH + 1)
    return 2 * (np.log(4) + np.log(3)) / mask[:, 1:].sum(1).mean()


def test_the_engine_accepts_it():
    config = config_lib.load(SPEC)
    config.width = 32
    testing.check_forward(testing.build(config))


def test_it_learns_captions(trained):
    assert scores(trained)['exact_match'] > 0.7
    assert scores(trained)['bleu4'] > 0.85
    assert scores(trained)['caption'] < 0.4 * blind_loss(trained)
    evaluations = testing.metrics(trained, 'eval/val/exact_match')
    assert [line['step'] for line in evaluations] == [240, 480, 496]


def test_evaluate_repeats_the_scores(trained, capsys):
    assert run(trained, *LEARNS, '--mode=evaluate') == 0
    again = json.loads(capsys.readouterr().out)['val']
    assert again == pytest.approx(scores(trained), rel=1e-6)


def test_captions_come_from_the_image(trained, capsys, monkeypatch):
    """With the image of another row a model knows no more than one that sees nothing."""
    original = captioning.CaptionTask.__init__

    def swapped(self, config, assets=None):
        original(self, config, assets)
        val = self.datasets['val']
        rows = [val.example(row, np.random.default_rng(0), False) for row in range(len(val))]
        pixels = np.roll(np.stack([row['pixels'] for row in rows]), 1, axis=0)
        tokens = np.stack([row['tokens'] for row in rows])
        self.datasets['val'] = testing.Arrays('val', pixels=pixels, tokens=tokens)

    monkeypatch.setattr(captioning.CaptionTask, '__init__', swapped)
    assert run(trained, *LEARNS, '--mode=evaluate') == 0
    blind = json.loads(capsys.readouterr().out)['val']
    most_frequent = collections.Counter(val_captions()).most_common(1)[0][1] / 64
    assert blind['exact_match'] <= most_frequent < 0.1
    assert blind['caption'] >= blind_loss(trained)


def test_predict_prints_the_caption(trained, capsys, tmp_path):
    pixels, caption = captioning.draw(np.random.default_rng([0, 0]))
    Image.fromarray(pixels).save(tmp_path / 'image.png')
    assert run(trained, *LEARNS, '--mode=predict', f'--input={tmp_path}/image.png') == 0
    assert capsys.readouterr().out.strip() == caption


def test_embed_writes_mean_image_tokens(trained, tmp_path):
    assert run(trained, *LEARNS, '--mode=embed', f'--output={tmp_path}') == 0
    embeddings = np.load(tmp_path / 'embeddings.npy')
    index = [json.loads(line) for line in (tmp_path / 'index.jsonl').read_text().splitlines()]
    assert embeddings.shape == (64, 32) and np.isfinite(embeddings).all()
    assert len(np.unique(embeddings, axis=0)) == 64
    assert [entry['caption'] for entry in index] == val_captions()


def test_a_stopped_run_ends_as_an_unbroken_one(tmp_path):
    runs = tmp_path / 'unbroken', tmp_path / 'stopped'
    assert run(runs[0]) == 0
    assert run(runs[1], '--max_steps=1') == 0  # in the first stage
    assert not (runs[1] / 'results.json').exists()
    assert run(runs[1]) == 0
    losses = [[line['loss'] for line in testing.metrics(folder)] for folder in runs]
    assert len(losses[0]) == 4 and losses[0] == losses[1]
    assert scores(runs[0]) == scores(runs[1])
    weights = [load_weights(f'{folder}/checkpoints')[0] for folder in runs]
    jax.tree.map(np.testing.assert_array_equal, *weights)
