"""Published weights make our towers compute what NumPy does with them, and come back unchanged."""

import json
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from mmjax.models.bert import Bert
from mmjax.models.resnet import ResNet
from mmjax.models.vit import ViT
from mmjax.pretrained import bert, resnet, siglip

erf = np.vectorize(math.erf)
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


# ------------------------------------------- tensors and forwards, by the publishers' names


class Torch:
    """Random tensors by name, and PyTorch's layers in float64 NumPy."""

    def __init__(self, shapes, seed=0):
        rng = np.random.default_rng(seed)
        self.tensors = {name: rng.normal(0, 0.5, s).astype(np.float32) for name, s in shapes}
        for name in self.tensors:
            if name.endswith('running_var'):
                self.tensors[name] = np.abs(self.tensors[name]) + 0.5

    def __getitem__(self, name):
        return self.tensors[name].astype(np.float64)

    def linear(self, name, x):
        return x @ self[f'{name}.weight'].T + self[f'{name}.bias']

    def norm(self, name, x, epsilon):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon)
        return x * self[f'{name}.weight'] + self[f'{name}.bias']

    def conv(self, name, x, stride, padding):
        """x [batch, channels, height, width], as PyTorch has it."""
        kernel = self[f'{name}.weight']
        size = kernel.shape[-1]
        x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
        windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), axis=(2, 3))
        return np.einsum('bihwuv,oiuv->bohw', windows[:, :, ::stride, ::stride], kernel)

    def batch_norm(self, name, x):
        shape = (1, -1, 1, 1)
        mean, variance = self[f'{name}.running_mean'], self[f'{name}.running_var']
        x = (x - mean.reshape(shape)) / np.sqrt(variance.reshape(shape) + 1e-5)
        return x * self[f'{name}.weight'].reshape(shape) + self[f'{name}.bias'].reshape(shape)


def attention(q, k, v, heads, mask=None):
    """Heads are consecutive slices of the width. q [batch, length, width], mask [batch, keys]."""
    outputs, size = [], q.shape[-1] // heads
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        logits = np.einsum('bqd,bkd->bqk', q[..., part], k[..., part]) / math.sqrt(size)
        if mask is not None:
            logits = np.where(mask[:, None, :], logits, -1e30)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        outputs.append(weights / weights.sum(-1, keepdims=True) @ v[..., part])
    return np.concatenate(outputs, -1)


def _linear(name, inputs, outputs):
    return [(f'{name}.weight', (outputs, inputs)), (f'{name}.bias', (outputs,))]


def _norm(name, width):
    return [(f'{name}.weight', (width,)), (f'{name}.bias', (width,))]


def _siglip_tensors(seed=0):
    w, m = 12, 20
    root = 'vision_model'
    shapes = [
        (f'{root}.embeddings.patch_embedding.weight', (w, 3, 4, 4)),
        (f'{root}.embeddings.patch_embedding.bias', (w,)),
        (f'{root}.embeddings.position_embedding.weight', (9, w)),
        (f'{root}.head.probe', (1, 1, w)),
        (f'{root}.head.attention.in_proj_weight', (3 * w, w)),
        (f'{root}.head.attention.in_proj_bias', (3 * w,)),
        *_linear(f'{root}.head.attention.out_proj', w, w),
        *_norm(f'{root}.head.layernorm', w),
        *_linear(f'{root}.head.mlp.fc1', w, m),
        *_linear(f'{root}.head.mlp.fc2', m, w),
        *_norm(f'{root}.post_layernorm', w),
    ]
    for i in range(2):
        layer = f'{root}.encoder.layers.{i}'
        for part in ('q_proj', 'k_proj', 'v_proj', 'out_proj'):
            shapes += _linear(f'{layer}.self_attn.{part}', w, w)
        shapes += _norm(f'{layer}.layer_norm1', w) + _norm(f'{layer}.layer_norm2', w)
        shapes += _linear(f'{layer}.mlp.fc1', w, m) + _linear(f'{layer}.mlp.fc2', m, w)
    return Torch(shapes, seed)


def _siglip_forward(t, images):
    root = 'vision_model'
    gelu = lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    mlp = lambda name, x: t.linear(f'{name}.fc2', gelu(t.linear(f'{name}.fc1', x)))
    embeddings = f'{root}.embeddings'
    x = t.conv(f'{embeddings}.patch_embedding', images.transpose(0, 3, 1, 2), 4, 0)
    x = x.reshape(*x.shape[:2], -1).transpose(0, 2, 1) + t[f'{embeddings}.patch_embedding.bias']
    x = x + t[f'{embeddings}.position_embedding.weight']
    for i in range(2):
        layer = f'{root}.encoder.layers.{i}'
        y = t.norm(f'{layer}.layer_norm1', x, 1e-6)
        q, k, v = (t.linear(f'{layer}.self_attn.{p}_proj', y) for p in 'qkv')
        x = x + t.linear(f'{layer}.self_attn.out_proj', attention(q, k, v, 3))
        x = x + mlp(f'{layer}.mlp', t.norm(f'{layer}.layer_norm2', x, 1e-6))
    x = t.norm(f'{root}.post_layernorm', x, 1e-6)
    head = f'{root}.head'
    weight, bias = t[f'{head}.attention.in_proj_weight'], t[f'{head}.attention.in_proj_bias']
    probe = np.repeat(t[f'{head}.probe'], len(x), 0)
    q, k, v = (
        y @ weight[12 * i : 12 * i + 12].T + bias[12 * i : 12 * i + 12]
        for i, y in enumerate((probe, x, x))
    )
    x = t.linear(f'{head}.attention.out_proj', attention(q, k, v, 3))
    return (x + mlp(f'{head}.mlp', t.norm(f'{head}.layernorm', x, 1e-6)))[:, 0]


def _bert_tensors(seed=0):
    w, m = 12, 20
    shapes = [
        ('embeddings.word_embeddings.weight', (30, w)),
        ('embeddings.position_embeddings.weight', (9, w)),
        ('embeddings.token_type_embeddings.weight', (2, w)),
        *_norm('embeddings.LayerNorm', w),
    ]
    for i in range(2):
        layer = f'encoder.layer.{i}'
        for part in ('self.query', 'self.key', 'self.value', 'output.dense'):
            shapes += _linear(f'{layer}.attention.{part}', w, w)
        shapes += _linear(f'{layer}.intermediate.dense', w, m)
        shapes += _linear(f'{layer}.output.dense', m, w)
        shapes += _norm(f'{layer}.attention.output.LayerNorm', w)
        shapes += _norm(f'{layer}.output.LayerNorm', w)
    return Torch(shapes, seed)


def _bert_forward(t, tokens, types, mask):
    x = t['embeddings.word_embeddings.weight'][tokens]
    x = x + t['embeddings.position_embeddings.weight'][: tokens.shape[1]]
    x = x + t['embeddings.token_type_embeddings.weight'][types]
    x = t.norm('embeddings.LayerNorm', x, 1e-12)
    for i in range(2):
        layer = f'encoder.layer.{i}'
        q, k, v = (t.linear(f'{layer}.attention.self.{p}', x) for p in ('query', 'key', 'value'))
        y = t.linear(f'{layer}.attention.output.dense', attention(q, k, v, 3, mask))
        x = t.norm(f'{layer}.attention.output.LayerNorm', x + y, 1e-12)
        y = t.linear(f'{layer}.intermediate.dense', x)
        y = t.linear(f'{layer}.output.dense', 0.5 * y * (1 + erf(y / math.sqrt(2))))
        x = t.norm(f'{layer}.output.LayerNorm', x + y, 1e-12)
    return x


def _resnet_tensors(bottleneck, width=4, seed=0):
    def conv(name, norm, inputs, outputs, kernel):
        stats = [(f'{norm}.running_mean', (outputs,)), (f'{norm}.running_var', (outputs,))]
        shape = (outputs, inputs, kernel, kernel)
        return [(f'{name}.weight', shape), *_norm(norm, outputs), *stats]

    shapes = conv('conv1', 'bn1', 3, width, 7)
    inputs = width
    for stage in (1, 2):
        inner = width * stage
        outputs = inner * 4 if bottleneck else inner
        for block in range(2):
            name = f'layer{stage}.{block}'
            convs = (
                [(inputs, inner, 1), (inner, inner, 3), (inner, outputs, 1)]
                if bottleneck
                else [(inputs, inner, 3), (inner, inner, 3)]
            )
            for number, (i, o, k) in enumerate(convs, 1):
                shapes += conv(f'{name}.conv{number}', f'{name}.bn{number}', i, o, k)
            if block == 0 and (bottleneck or stage == 2):
                shapes += conv(f'{name}.downsample.0', f'{name}.downsample.1', inputs, outputs, 1)
            inputs = outputs
    return Torch(shapes, seed)


def _resnet_forward(t, images, bottleneck):
    relu = lambda x: np.maximum(x, 0)
    norm_conv = lambda conv, norm, x, stride, padding: t.batch_norm(
        norm, t.conv(conv, x, stride, padding)
    )
    x = relu(norm_conv('conv1', 'bn1', images.transpose(0, 3, 1, 2), 2, 3))
    x = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=-np.inf)
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(2, 3))
    x = windows[:, :, ::2, ::2].max((-1, -2))
    for stage in (1, 2):
        for block in range(2):
            name = f'layer{stage}.{block}'
            stride = 2 if stage == 2 and block == 0 else 1
            y = x
            plan = [(1, 0), (stride, 1), (1, 0)] if bottleneck else [(stride, 1), (1, 1)]
            for number, (step, padding) in enumerate(plan, 1):
                y = norm_conv(f'{name}.conv{number}', f'{name}.bn{number}', y, step, padding)
                y = relu(y) if number < len(plan) else y
            if f'{name}.downsample.0.weight' in t.tensors:
                x = norm_conv(f'{name}.downsample.0', f'{name}.downsample.1', x, stride, 0)
            x = relu(x + y)
    return x.mean((2, 3))


def _close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


# ------------------------------------------- the towers compute what the publishers' do


def test_siglip_weights_give_the_published_forward_and_come_back(tmp_path):
    t = _siglip_tensors()
    folder = _write(tmp_path / 'a', t.tensors, SIGLIP)
    params, stats = siglip.load(folder)
    assert stats == {}
    fields = siglip.fields(folder)
    model = ViT(**fields)
    images = np.random.default_rng(1).normal(size=(2, 14, 14, 3))  # 14 = 3 patches and 2 pixels
    apply = jax.jit(lambda params, x: model.apply({'params': params}, x, train=False))
    _close(apply(params, jnp.float32(images)), _siglip_forward(t, images))
    chex.assert_trees_all_equal(siglip.export(params), t.tensors)


def test_bert_weights_give_the_published_forward_and_come_back(tmp_path):
    t = _bert_tensors()
    folder = _write(tmp_path / 'a', t.tensors, BERT)
    params, stats = bert.load(folder)
    assert stats == {}
    model = Bert(**bert.fields(folder))
    rng = np.random.default_rng(1)
    tokens, types = rng.integers(0, 30, (2, 7)), rng.integers(0, 2, (2, 7))
    mask = np.arange(7) < np.array([[7], [4]])
    apply = jax.jit(
        lambda params: model.apply({'params': params}, tokens, mask, types, train=False)
    )
    _close(np.asarray(apply(params))[mask], _bert_forward(t, tokens, types, mask)[mask])
    chex.assert_trees_all_equal(bert.export(params), t.tensors)


@pytest.mark.parametrize('bottleneck', [True, False], ids=['bottleneck', 'basic'])
def test_resnet_weights_give_the_published_forward_and_come_back(tmp_path, bottleneck):
    t = _resnet_tensors(bottleneck)
    counters = {
        name.replace('running_mean', 'num_batches_tracked'): np.array(7)
        for name in t.tensors
        if name.endswith('running_mean')
    }
    classifier = {'fc.weight': np.zeros((5, 8), 'f'), 'fc.bias': np.zeros(5, 'f')}
    folder = _write(tmp_path / 'a', {**t.tensors, **counters, **classifier})
    params, stats = resnet.load(folder)
    fields = resnet.fields(folder)
    assert fields == {
        'stage_sizes': (2, 2),
        'width': 4,
        'bottleneck': bottleneck,
        'stem_kernel': 7,
    }
    model = ResNet(**fields)
    images = np.random.default_rng(1).normal(size=(2, 19, 18, 3))  # odd: paddings show
    apply = jax.jit(
        lambda params, stats, x: model.apply(
            {'params': params, 'batch_stats': stats}, x, train=False
        )
    )
    _close(apply(params, stats, jnp.float32(images)), _resnet_forward(t, images, bottleneck))
    chex.assert_trees_all_equal(resnet.export(params, stats), t.tensors)
