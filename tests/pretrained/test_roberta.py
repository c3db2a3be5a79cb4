"""RoBERTa's weights, as of GraphCodeBERT and CodeBERT: positions, prefixes, faults, sizes."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.errors import UserError
from mmjax.models.bert import Bert
from mmjax.pretrained import bert
from tests.pretrained.test_towers import Torch, _close, _linear, _norm, _write, attention, erf

PAD = 1
CONFIG = {
    'model_type': 'roberta',
    'vocab_size': 30,
    'hidden_size': 12,
    'num_hidden_layers': 2,
    'num_attention_heads': 3,
    'intermediate_size': 20,
    'max_position_embeddings': 11,
    'type_vocab_size': 1,
    'layer_norm_eps': 1e-5,
    'pad_token_id': PAD,
}


def _tensors():
    w, m, embeddings = 12, 20, 'roberta.embeddings'
    shapes = [
        (f'{embeddings}.word_embeddings.weight', (30, w)),
        (f'{embeddings}.position_embeddings.weight', (11, w)),
        (f'{embeddings}.token_type_embeddings.weight', (1, w)),
        *_norm(f'{embeddings}.LayerNorm', w),
    ]
    for i in range(2):
        layer = f'roberta.encoder.layer.{i}'
        for part in ('self.query', 'self.key', 'self.value', 'output.dense'):
            shapes += _linear(f'{layer}.attention.{part}', w, w)
        shapes += _linear(f'{layer}.intermediate.dense', w, m)
        shapes += _linear(f'{layer}.output.dense', m, w)
        shapes += _norm(f'{layer}.attention.output.LayerNorm', w)
        shapes += _norm(f'{layer}.output.LayerNorm', w)
    return Torch(shapes)


def _forward(t, tokens):
    """By Hugging Face's rule: position PAD + the tokens so far, and PAD for PAD itself."""
    mask = tokens != PAD
    positions = PAD + np.cumsum(mask, 1) * mask
    embeddings = 'roberta.embeddings'
    x = t[f'{embeddings}.word_embeddings.weight'][tokens]
    x = x + t[f'{embeddings}.position_embeddings.weight'][positions]
    x = x + t[f'{embeddings}.token_type_embeddings.weight'][0]
    x = t.norm(f'{embeddings}.LayerNorm', x, 1e-5)
    for i in range(2):
        layer = f'roberta.encoder.layer.{i}'
        q, k, v = (t.linear(f'{layer}.attention.self.{p}', x) for p in ('query', 'key', 'value'))
        y = t.linear(f'{layer}.attention.output.dense', attention(q, k, v, 3, mask))
        x = t.norm(f'{layer}.attention.output.LayerNorm', x + y, 1e-5)
        y = t.linear(f'{layer}.intermediate.dense', x)
        y = t.linear(f'{layer}.output.dense', 0.5 * y * (1 + erf(y / math.sqrt(2))))
        x = t.norm(f'{layer}.output.LayerNorm', x + y, 1e-5)
    return x


def test_roberta_weights_give_the_published_forward_and_come_back(tmp_path):
    t = _tensors()
    folder = _write(tmp_path / 'a', t.tensors, CONFIG)
    params, stats = bert.load(folder)
    assert stats == {}
    fields = bert.fields(folder)
    assert fields == {
        'vocabulary': 30,
        'width': 12,
        'depth': 2,
        'heads': 3,
        'mlp_width': 20,
        'max_length': 11,
        'types': 1,
        'epsilon': 1e-5,
        'position_offset': 2,
    }
    model, rng = Bert(**fields), np.random.default_rng(1)
    mask = np.arange(9) < np.array([[9], [4], [1]])  # 9 = 11 − 2, as many as there can be
    tokens = np.where(mask, rng.integers(PAD + 1, 30, (3, 9)), PAD)
    apply = jax.jit(lambda params: model.apply({'params': params}, tokens, mask, train=False))
    _close(np.asarray(apply(params))[mask], _forward(t, tokens)[mask])
    bare = {name.removeprefix('roberta.'): x for name, x in t.tensors.items()}
    chex.assert_trees_all_equal(bert.export(params), bare)


def test_prefix_heads_and_buffers_are_understood(tmp_path):
    tensors = _tensors().tensors
    heads = (
        'lm_head.dense.weight',
        'lm_head.bias',
        'classifier.out_proj.weight',
        'roberta.pooler.dense.bias',
        'roberta.embeddings.position_ids',
    )
    whole = {**tensors, **{name: np.zeros(3, 'f') for name in heads}}
    bare = {name.removeprefix('roberta.'): x for name, x in tensors.items()}
    chex.assert_trees_all_equal(
        bert.load(_write(tmp_path / 'whole', whole, CONFIG))[0],
        bert.load(_write(tmp_path / 'bare', bare, CONFIG))[0],
    )
    stray = {**tensors, 'roberta.embeddings.patches': np.zeros(3, 'f')}
    with pytest.raises(UserError, match=r"'roberta\.embeddings\.patches' has no place"):
        bert.load(_write(tmp_path / 'stray', stray, CONFIG))


def test_a_config_that_says_little_means_the_family_defaults(tmp_path):
    fields = bert.fields(_write(tmp_path / 'a', {}, {'model_type': 'roberta'}))
    assert fields['vocabulary'] == 50265 and fields['position_offset'] == 2
    fields = bert.fields(_write(tmp_path / 'b', {}, {'model_type': 'roberta', 'pad_token_id': 0}))
    assert fields['position_offset'] == 1
    fields = bert.fields(_write(tmp_path / 'c', {}, {'model_type': 'bert', 'pad_token_id': 1}))
    assert fields['vocabulary'] == 30522 and 'position_offset' not in fields


@pytest.mark.parametrize('pad', [None, True, -1, 10, '1'])
def test_a_padding_token_that_leaves_no_positions_is_refused(tmp_path, pad):
    folder = _write(tmp_path / 'a', {}, {**CONFIG, 'pad_token_id': pad})
    with pytest.raises(UserError, match=rf"config\.json: key 'pad_token_id' is {pad!r}, not a who"):
        bert.fields(folder)


def test_graphcodebert_has_its_published_size_and_refuses_longer_texts():
    model = Bert(
        vocabulary=50265,
        width=768,
        depth=12,
        mlp_width=3072,
        max_length=514,
        types=1,
        position_offset=2,
        epsilon=1e-5,
    )
    init = lambda key, *inputs: model.init(key, *inputs, train=False)
    tokens = jax.ShapeDtypeStruct((1, 512), jnp.int32)
    params = jax.eval_shape(init, jax.random.key(0), tokens, tokens)['params']
    pooler = 768 * 768 + 768
    assert sum(x.size for x in jax.tree.leaves(params)) == 124_645_632 - pooler
    longer = jax.ShapeDtypeStruct((1, 513), jnp.int32)
    with pytest.raises(ValueError, match='513 tokens do not fit max_length 514 with position_off'):
        jax.eval_shape(init, jax.random.key(0), longer, longer)
