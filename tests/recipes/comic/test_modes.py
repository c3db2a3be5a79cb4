"""What `--mode=predict`, embed and export do with the comic recipe, on fresh weights."""

import json

import jax
import numpy as np
import pytest
from etils import epath
from safetensors.numpy import load_file

from mmjax.engine import build, evaluate, modes, optim
from mmjax.errors import UserError
from tests import runs


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    """Returns (built run, predictor) of the smoke config at its smallest."""
    config = runs.recipe('stage3', 'smoke')
    config.data.cache = str(tmp_path_factory.mktemp('cache'))
    config.data.built_in = dict(train=12, val=6)
    config.model.resnet.update(width=4, stage_sizes=(1,))
    built = build.run(config)
    with jax.set_mesh(built.mesh):
        yield built, evaluate.Predictor(built.task, built.init_variables(), built.mesh)


def test_embed_writes_every_panel_of_every_page(model, tmp_path):
    built, predictor = model
    built.task.embed(predictor, tmp_path)
    embeddings, mask = np.load(tmp_path / 'embeddings.npy'), np.load(tmp_path / 'mask.npy')
    index = [json.loads(line) for line in (tmp_path / 'index.jsonl').read_text().splitlines()]
    pages = [built.task.dataset(split) for split in ('train', 'val')]
    assert embeddings.shape == (sum(map(len, pages)), 16, 64) and mask.shape == (len(index), 16)
    counts = np.concatenate([page.index['n_panels'] for page in pages])
    np.testing.assert_array_equal(mask.sum(1), counts)
    assert not embeddings[~mask].any() and (np.abs(embeddings[mask]).sum(-1) > 0).all()
    # One page by itself, in another batch, gets the same.
    page, row = pages[1], len(pages[0])
    example = page.example(0, np.random.default_rng(0), False)
    batch = {**page.collate([example], 16), 'mask': np.ones(1, bool), 'row': np.zeros(1, np.int32)}
    alone = built.task.encode(predictor.variables, batch)['fused'][0]
    np.testing.assert_allclose(alone, embeddings[row], rtol=1e-4, atol=1e-5)
    assert index[row] == {
        'row': row,
        'split': 'val',
        'canonical_id': page.record(0)['canonical_id'],
    }


def test_predict_answers_for_a_page_and_names_a_missing_one(model, tmp_path):
    built, predictor = model
    page = built.task.dataset('val')
    record = page.record(0)
    (tmp_path / 'page.jpg').write_bytes(record['image'])
    sides = np.array([record['width'], record['height']] * 2)
    boxes = np.array(record['boxes']) * sides
    panels = [
        {'bbox': [x0, y0, x1 - x0, y1 - y0], 'text': text}
        for (x0, y0, x1, y1), text in zip(boxes.tolist(), record['texts'], strict=True)
    ]
    (tmp_path / 'page.json').write_text(json.dumps({'panels': panels}))
    told = built.task.predict(predictor, str(tmp_path / 'page.jpg'), tmp_path / 'out')
    found = np.load(tmp_path / 'out/embeddings.npy')
    assert found.shape == (len(panels), 64) and f'{len(panels)} panels' in told
    lines = [line for line in told.splitlines() if line.startswith('panel ')]
    assert [line.split()[1] for line in lines] == [str(i + 1) for i in range(len(panels))]
    expected = next(iter(predictor('encode', page, 2)))[0]['fused'][0]
    np.testing.assert_allclose(found, expected[: len(found)], rtol=1e-3, atol=1e-4)
    with pytest.raises(UserError, match=r'none\.png does not exist'):
        built.task.predict(predictor, str(tmp_path / 'none.png'), tmp_path / 'out')


def test_export_writes_every_leaf(model, tmp_path):
    built, predictor = model
    modes.export(built.task, predictor.variables, epath.Path(tmp_path), built.config)
    written, held = load_file(tmp_path / 'model.safetensors'), optim.flatten(predictor.variables)
    assert written.keys() == held.keys()
    for name, array in written.items():
        np.testing.assert_array_equal(array, np.asarray(held[name]))
    assert json.loads((tmp_path / 'config.json').read_text()) == modes.plain(built.config)
