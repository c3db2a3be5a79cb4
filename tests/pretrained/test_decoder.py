"""Published decoders make ours compute what NumPy does with their weights, and come back."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from mmjax.errors import UserError
from mmjax.models.decoder import Decoder
from mmjax.pretrained import decoder
from tests.pretrained.test_towers import Torch

V, W, M, H, K, S = 30, 24, 20, 6, 2, 4  # vocabulary, width, MLP, heads, of keys, their size
SIZES = {
    'hidden_act': 'silu',
    'vocab_size': V,
    'hidden_size': W,
    'num_hidden_layers': 2,
    'num_attention_heads': H,
    'num_key_value_heads': K,
    'intermediate_size': M,
    'rms_norm_eps': 1e-2,
}
LLAMA = {**SIZES, 'model_type': 'llama', 'rope_theta': 500.0, 'rope_scaling': None}
QWEN2 = {
    **SIZES,
    'model_type': 'qwen2',
    'tie_word_embeddings': True,
    'use_sliding_window': False,
    'rope_parameters': {'rope_theta': 1000000, 'rope_type': 'default'},
}
INTERNLM2 = {
    **SIZES,
    'model_type': 'internlm2',
    'bias': False,
    'rope_theta': 100,
    'rope_scaling': {'type': 'dynamic', 'factor': 2.0},
}


# ------------------------------------------- tensors and a forward, by the publishers' names


def _tensors(*, biases, tied, kv_heads=K):
    shapes = [('model.embed_tokens.weight', (V, W)), ('model.norm.weight', (W,))]
    shapes += [] if tied else [('lm_head.weight', (V, W))]
    for layer in ('model.layers.0', 'model.layers.1'):
        for part, heads in (('q', H), ('k', kv_heads), ('v', kv_heads)):
            shapes.append((f'{layer}.self_attn.{part}_proj.weight', (heads * S, W)))
            if biases:
                shapes.append((f'{layer}.self_attn.{part}_proj.bias', (heads * S,)))
        shapes += [
            (f'{layer}.self_attn.o_proj.weight', (W, W)),
            (f'{layer}.mlp.gate_proj.weight', (M, W)),
            (f'{layer}.mlp.up_proj.weight', (M, W)),
            (f'{layer}.mlp.down_proj.weight', (W, M)),
            (f'{layer}.input_layernorm.weight', (W,)),
            (f'{layer}.post_attention_layernorm.weight', (W,)),
        ]
    return Torch(shapes)


def _forward(t, tokens, positions, theta):
    """Logits [batch, length, V], float64; head by head, one query at a time."""

    def linear(name, x):
        bias = t[f'{name}.bias'] if f'{name}.bias' in t.tensors else 0
        return x @ t[f'{name}.weight'].T + bias

    def norm(name, x):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-2) * t[f'{name}.weight']

    def rotate(x):  # [batch, length, S]
        turn = np.exp(1j * positions[..., None] / theta ** (np.arange(0, S, 2) / S))
        turned = (x[..., : S // 2] + 1j * x[..., S // 2 :]) * turn
        return np.concatenate([turned.real, turned.imag], -1)

    def attention(name, x):
        query, key, value = (linear(f'{name}.{part}_proj', x) for part in 'qkv')
        part = lambda x, head: x[..., head * S : (head + 1) * S]
        shared, heads = H // (key.shape[-1] // S), []
        for head in range(H):
            q, k = rotate(part(query, head)), rotate(part(key, head // shared))
            weights = np.exp(np.einsum('bqs,bks->bqk', q, k) / np.sqrt(S))
            weights = weights * np.tri(x.shape[1])
            weights /= weights.sum(-1, keepdims=True)
            heads.append(weights @ part(value, head // shared))
        return linear(f'{name}.o_proj', np.concatenate(heads, -1))

    x = t['model.embed_tokens.weight'][tokens]
    for layer in ('model.layers.0', 'model.layers.1'):
        x = x + attention(f'{layer}.self_attn', norm(f'{layer}.input_layernorm', x))
        y = norm(f'{layer}.post_attention_layernorm', x)
        gate = linear(f'{layer}.mlp.gate_proj', y)
        y = gate / (1 + np.exp(-gate)) * linear(f'{layer}.mlp.up_proj', y)
        x = x + linear(f'{layer}.mlp.down_proj', y)
    head = 'model.embed_tokens' if 'lm_head.weight' not in t.tensors else 'lm_head'
    return norm('model.norm', x) @ t[f'{head}.weight'].T


def _write(folder, tensors, config):
    folder.mkdir()
    save_file(tensors, folder / 'model.safetensors')
    (folder / 'config.json').write_text(json.dumps(config))
    return folder


def _agree(folder, t, theta):
    params, stats = decoder.load(folder)
    assert stats == {}
    model = Decoder(**decoder.fields(folder))
    tokens = np.random.default_rng(1).integers(0, V, (2, 7))

    def run(params):
        apply = lambda *xs, **kwargs: model.apply({'params': params}, *xs, **kwargs)
        embeddings = apply(tokens, method='embed')
        hidden = apply(embeddings, jnp.ones((2, 7)), train=False)
        return apply(hidden, method='logits')

    found = np.asarray(jax.jit(run)(params))
    expected = _forward(t, tokens, np.arange(7), theta)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    return params, decoder.fields(folder)


def _internlm2(tensors):
    """The same weights as InternLM2 names and fuses them."""
    renamed = {}
    for name, x in tensors.items():
        for theirs, ours in (
            ('embed_tokens', 'tok_embeddings'),
            ('lm_head', 'output'),
            ('input_layernorm', 'attention_norm'),
            ('post_attention_layernorm', 'ffn_norm'),
            ('self_attn.o_proj', 'attention.wo'),
            ('mlp.gate_proj', 'feed_forward.w1'),
            ('mlp.up_proj', 'feed_forward.w3'),
            ('mlp.down_proj', 'feed_forward.w2'),
        ):
            name = name.replace(theirs, ours)
        renamed[name] = x
    for layer in ('model.layers.0', 'model.layers.1'):
        heads = {
            part: np.split(renamed.pop(f'{layer}.self_attn.{part}_proj.weight'), count)
            for part, count in (('q', H), ('k', K), ('v', K))
        }
        rows = []
        for group in range(K):
            rows += heads['q'][group * H // K : (group + 1) * H // K]
            rows += [heads['k'][group], heads['v'][group]]
        renamed[f'{layer}.attention.wqkv.weight'] = np.concatenate(rows)
    return renamed


# ------------------------------------------- the families


def test_llama_weights_give_the_published_forward_and_come_back(tmp_path):
    t = _tensors(biases=False, tied=False)
    counter = {'model.layers.0.self_attn.rotary_emb.inv_freq': np.ones(2, 'f')}
    params, fields = _agree(_write(tmp_path / 'a', {**t.tensors, **counter}, LLAMA), t, 500.0)
    tensors, config = decoder.export(params, fields)
    chex.assert_trees_all_equal(tensors, t.tensors)
    assert config['architectures'] == ['LlamaForCausalLM'] and config['eos_token_id'] is None
    assert decoder.fields(_write(tmp_path / 'b', tensors, config)) == fields


def test_qwen2_weights_give_the_published_forward_and_come_back(tmp_path):
    t = _tensors(biases=True, tied=True)
    stored = {'lm_head.weight': np.zeros((V, W), 'f')}  # some store a tied head, which is not read
    params, fields = _agree(_write(tmp_path / 'a', {**t.tensors, **stored}, QWEN2), t, 1e6)
    tensors, config = decoder.export(params, fields)
    chex.assert_trees_all_equal(tensors, t.tensors)
    assert config['architectures'] == ['Qwen2ForCausalLM']
    assert decoder.fields(_write(tmp_path / 'b', tensors, config)) == fields


def test_internlm2_in_an_internvl_gives_the_published_forward(tmp_path):
    t = _tensors(biases=False, tied=False)
    tensors = {f'language_model.{name}': x for name, x in _internlm2(t.tensors).items()}
    tensors |= {'vision_model.a': np.ones(1, 'f'), 'mlp1.0.weight': np.ones(1, 'f')}
    whole = {'model_type': 'internvl_chat', 'llm_config': INTERNLM2}
    params, fields = _agree(_write(tmp_path / 'a', tensors, whole), t, 100.0)
    chex.assert_trees_all_equal(decoder.export(params, fields)[0], t.tensors)


def test_heads_of_their_own_are_what_no_number_means(tmp_path):
    t = _tensors(biases=False, tied=False, kv_heads=H)
    config = {**LLAMA, 'num_key_value_heads': None, 'head_dim': S}
    _, fields = _agree(_write(tmp_path / 'a', t.tensors, config), t, 500.0)
    assert fields == {
        'vocabulary': V,
        'width': W,
        'depth': 2,
        'heads': H,
        'kv_heads': H,
        'mlp_width': M,
        'theta': 500.0,
        'qkv_bias': False,
        'tied': False,
        'epsilon': 1e-2,
    }


# ------------------------------------------- refusals


@pytest.mark.parametrize(
    ('config', 'message'),
    [
        ({**LLAMA, 'model_type': 'gpt2'}, "'model_type' is 'gpt2'; expected 'llama' or 'qwen2' or"),
        (SIZES, "config.json: key 'model_type' is missing"),
        ({'llm_config': SIZES}, "config.json, llm_config: key 'model_type' is missing"),
        ({'llm_config': 3}, "key 'llm_config' is 3, not an object"),
        ({**LLAMA, 'attention_bias': True}, "'attention_bias' is True; expected False"),
        ({**QWEN2, 'use_sliding_window': True}, "'use_sliding_window' is True; expected False"),
        ({**INTERNLM2, 'bias': True}, "'bias' is True; expected False"),
        ({**LLAMA, 'hidden_act': 'gelu'}, "'hidden_act' is 'gelu'; expected 'silu'"),
        ({**LLAMA, 'head_dim': 8}, "'head_dim' is 8; expected None or 4.0"),
        ({**LLAMA, 'rope_scaling': {'rope_type': 'llama3'}}, "'rope_type' is 'llama3'; expected"),
        ({**LLAMA, 'rope_theta': 'big'}, "'rope_theta' is 'big', not a positive number"),
        ({**LLAMA, 'num_key_value_heads': 0}, "'num_key_value_heads' is 0, not a positive whole"),
    ],
)
def test_configs_of_other_decoders_are_refused(tmp_path, config, message):
    (tmp_path / 'config.json').write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        decoder.fields(tmp_path)


def test_missing_and_unknown_tensors_are_named(tmp_path):
    tensors = _tensors(biases=False, tied=False).tensors
    folder = _write(tmp_path / 'a', _internlm2(tensors), {**INTERNLM2, 'num_hidden_layers': 3})
    with pytest.raises(
        UserError, match=r"tensor 'model.layers.2.attention_norm.weight' is missing"
    ):
        decoder.load(folder)
    folder = _write(tmp_path / 'b', tensors, {**LLAMA, 'tie_word_embeddings': True})
    assert 'head' not in decoder.load(folder)[0]
    del tensors['lm_head.weight']
    folder = _write(tmp_path / 'c', tensors, LLAMA)
    with pytest.raises(UserError, match=r"tensor 'lm_head.weight' is missing"):
        decoder.load(folder)
