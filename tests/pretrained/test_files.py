"""Folders of published weights: names, precisions, shards, and every fault told by its name."""

import json

import chex
import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from mmjax.errors import UserError
from mmjax.models.bert import Bert
from mmjax.models.vit import ViT
from mmjax.pretrained import bert, files, resnet, siglip

SIGLIP = {
    'model_type': 'siglip_vision_model',
    'hidden_size': 12,
    'num_hidden_layers': 2,
    'num_attention_heads': 3,
    'intermediate_size': 20,
    'image_size': 14,
    'patch_size': 4,
}
BERT = {
    'model_type': 'bert',
    'vocab_size': 30,
    'hidden_size': 12,
    'num_hidden_layers': 2,
    'num_attention_heads': 3,
    'intermediate_size': 20,
    'max_position_embeddings': 9,
}


def _write(folder, tensors, config=None):
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / 'model.safetensors')
    if config is not None:
        (folder / 'config.json').write_text(json.dumps(config))
    return folder


def _random(model, export, *inputs):
    """Random tensors under the published names."""
    init = lambda key: model.init(key, *inputs, train=False)
    shapes = jax.eval_shape(init, jax.random.key(0))['params']
    rng = np.random.default_rng(0)
    return export(jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes))


def _siglip_tensors():
    return _random(ViT(14, 4, 12, 2, 3, 20), siglip.export, np.zeros((1, 14, 14, 3)))


def _bert_tensors():
    model = Bert(vocabulary=30, width=12, depth=2, heads=3, mlp_width=20, max_length=9)
    return _random(model, bert.export, np.zeros((1, 4), int), np.ones((1, 4)))


# ------------------------------------------- names, precisions, shards


def test_prefixes_old_names_and_unused_tensors_are_understood(tmp_path):
    tensors = _bert_tensors()
    old = {
        f'bert.{name}'.replace('LayerNorm.weight', 'LayerNorm.gamma').replace(
            'LayerNorm.bias', 'LayerNorm.beta'
        ): x
        for name, x in tensors.items()
    }
    old['bert.pooler.dense.bias'] = old['cls.predictions.bias'] = np.zeros(3, 'f')
    chex.assert_trees_all_equal(
        bert.load(_write(tmp_path / 'old', old, BERT))[0],
        bert.load(_write(tmp_path / 'new', tensors, BERT))[0],
    )
    tensors = _siglip_tensors()
    whole = {**tensors, 'logit_scale': np.zeros(1, 'f'), 'text_model.x': np.zeros(1, 'f')}
    bare = {name.removeprefix('vision_model.'): x for name, x in tensors.items()}
    nested = {'model_type': 'siglip', 'vision_config': SIGLIP}
    chex.assert_trees_all_equal(
        siglip.load(_write(tmp_path / 'whole', whole, nested))[0],
        siglip.load(_write(tmp_path / 'bare', bare, SIGLIP))[0],
    )


def test_a_published_config_that_says_little_means_the_family_defaults(tmp_path):
    config = {'model_type': 'siglip', 'vision_config': {'model_type': 'siglip_vision_model'}}
    assert siglip.fields(_write(tmp_path / 'a', {}, config)) == {
        name: getattr(ViT(), name)
        for name in ('image_size', 'patch_size', 'width', 'depth', 'heads', 'mlp_width', 'epsilon')
    }


@pytest.mark.parametrize('dtype', [np.float16, ml_dtypes.bfloat16], ids=['half', 'bfloat16'])
def test_half_precision_files_load_as_float32(tmp_path, dtype):
    tensors = {name: x.astype(dtype) for name, x in _bert_tensors().items()}
    params, _ = bert.load(_write(tmp_path / 'a', tensors, BERT))
    leaf = params['words']['embedding']
    assert leaf.dtype == np.float32
    np.testing.assert_array_equal(
        leaf, tensors['embeddings.word_embeddings.weight'].astype(np.float32)
    )


def _shard(folder, tensors):
    names = sorted(tensors)
    shards = {'one.safetensors': names[::2], 'two.safetensors': names[1::2]}
    folder.mkdir()
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in shards.items() for name in part}
    (folder / files.INDEX).write_text(json.dumps({'weight_map': weight_map}))
    (folder / files.CONFIG).write_text(json.dumps(BERT))
    return folder


def test_shards_are_read_by_their_index_and_a_lost_one_is_named(tmp_path):
    tensors = _bert_tensors()
    folder = _shard(tmp_path / 'a', tensors)
    chex.assert_trees_all_equal(bert.export(bert.load(folder)[0]), tensors)
    (folder / 'two.safetensors').unlink()
    with pytest.raises(UserError, match=r'two\.safetensors: no such file'):
        bert.load(folder)


def test_positions_are_resized_for_another_picture_size(tmp_path):
    folder = _write(tmp_path / 'a', _siglip_tensors(), SIGLIP)
    same, _ = siglip.load(folder, image_size=14)
    larger, _ = siglip.load(folder, image_size=24)
    chex.assert_shape(larger['positions'], (36, 12))
    chex.assert_trees_all_equal(same['norm'], larger['norm'])
    # Half-pixel centres: the middle of a doubled grid lies 1/4 and 3/4 between old centres.
    rows = np.array([[1, 0, 0], [3, 1, 0], [1, 3, 0], [0, 3, 1], [0, 1, 3], [0, 0, 1]], float)
    rows /= rows.sum(1, keepdims=True)
    expected = np.einsum('yi,xj,ijd->yxd', rows, rows, same['positions'].reshape(3, 3, 12))
    np.testing.assert_allclose(larger['positions'].reshape(6, 6, 12), expected, atol=1e-6)


# ------------------------------------------- faults


def _without(name):
    return lambda tensors: tensors.pop(name)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (
            _without('encoder.layer.1.output.dense.bias'),
            r"'encoder\.layer\.1\.output\.dense\.bias'",
        ),
        (lambda x: x.update(stray=np.zeros(1, 'f')), r"model\.safetensors: tensor 'stray' has no"),
        (
            lambda x: x.update({'embeddings.LayerNorm.bias': np.zeros(5, 'f')}),
            r"model\.safetensors: .*LayerNorm\.bias' has shape \[5\], the model needs \[12\]",
        ),
        (
            lambda x: x.update({'bert.embeddings.LayerNorm.bias': np.zeros(12, 'f')}),
            'are the same one',
        ),
    ],
    ids=['missing', 'extra', 'shape', 'twice'],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, change, message):
    tensors = dict(_bert_tensors())
    change(tensors)
    with pytest.raises(UserError, match=message):
        bert.load(_write(tmp_path / 'a', tensors, BERT))


@pytest.mark.parametrize(
    ('family', 'config', 'message'),
    [
        (bert, {**BERT, 'hidden_act': 'relu'}, "'hidden_act' is 'relu'; expected 'gelu'"),
        (bert, {**BERT, 'model_type': 'albert'}, "'model_type' is 'albert'"),
        (bert, {**BERT, 'hidden_size': '12'}, "'hidden_size' is '12', not a positive whole"),
        (siglip, {**SIGLIP, 'num_hidden_layers': 0}, "'num_hidden_layers' is 0, not a positive"),
        (siglip, {**SIGLIP, 'model_type': 'clip'}, "'model_type' is 'clip'"),
    ],
)
def test_configs_of_other_models_are_refused_by_key(tmp_path, family, config, message):
    with pytest.raises(UserError, match=message):
        family.fields(_write(tmp_path / 'a', {}, config))


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(UserError, match='absent: no such folder'):
        resnet.load(tmp_path / 'absent')
    (tmp_path / 'pytorch_model.bin').write_bytes(b'pickle')
    with pytest.raises(UserError, match=r'found neither model\.safetensors nor'):
        files.Weights(tmp_path)
    (tmp_path / files.SINGLE).write_bytes(b'not safetensors')
    with pytest.raises(UserError, match=r'model\.safetensors: not a readable safetensors file'):
        files.Weights(tmp_path)
    (tmp_path / files.CONFIG).write_text('{\n"a": }')
    with pytest.raises(UserError, match=r'config\.json, line 2: malformed JSON'):
        bert.fields(tmp_path)
    with pytest.raises(UserError, match="not named as torchvision's"):
        resnet.fields(_write(tmp_path / 'a', {'x': np.zeros(1, 'f')}))


def test_grafting_checks_every_leaf():
    fresh = {'norm': {'scale': np.ones(3), 'bias': np.zeros(3)}}
    loaded = {'norm': {'scale': np.full(3, 2.0), 'bias': np.ones(3)}}
    chex.assert_trees_all_equal(files.graft(fresh, loaded, 'here'), loaded)
    with pytest.raises(UserError, match=r"here: .*'norm/bias' has shape \[4\], .* needs \[3\]"):
        files.graft(fresh, {'norm': {**loaded['norm'], 'bias': np.ones(4)}}, 'here')
    with pytest.raises(UserError, match="no weights for the model's parameter 'norm/bias'"):
        files.graft(fresh, {'norm': {'scale': np.ones(3)}}, 'here')
    with pytest.raises(UserError, match="'extra' is not in the model"):
        files.graft(fresh, {**loaded, 'extra': np.ones(1)}, 'here')


def test_export_refuses_a_tree_that_is_not_the_familys(tmp_path):
    params, _ = bert.load(_write(tmp_path / 'a', _bert_tensors(), BERT))
    with pytest.raises(ValueError, match="'params/pooler' has no published name"):
        bert.export({**params, 'pooler': np.ones(2)})
    del params['norm']
    with pytest.raises(ValueError, match="no leaf 'params/norm/scale'"):
        bert.export(params)
