"""CLIP's published weights, in three forms, make our towers compute what NumPy does with them."""

import json
import math

import chex
import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from mmjax.errors import UserError
from mmjax.models import clip as models
from mmjax.pretrained import clip, files
from tests import clip_presets
from tests.pretrained.test_towers import Torch, _linear, _norm

W, M, F, V, L = 12, 20, 10, 30, 9  # width, MLP, features, vocabulary, length of the small ones
PART = {'hidden_size': W, 'num_hidden_layers': 1, 'num_attention_heads': 3, 'intermediate_size': M}
HUGGING_FACE = {
    'model_type': 'clip',
    'projection_dim': F,
    'vision_config': {**PART, 'image_size': 14, 'patch_size': 4, 'hidden_act': 'gelu'},
    'text_config': {**PART, 'vocab_size': V, 'max_position_embeddings': L, 'layer_norm_eps': 1e-3},
}
SHARED = {'width': W, 'layers': 1}
OPEN_CLIP = {
    'embed_dim': F,
    'vision_cfg': {**SHARED, 'image_size': 14, 'patch_size': 4, 'head_width': 4, 'mlp_ratio': 2},
    'text_cfg': {**SHARED, 'context_length': L, 'vocab_size': V, 'heads': 3, 'mlp_ratio': 1.7},
}
PIXELS = {'mean': [0.48145466, 0.4578275, 0.40821073], 'std': [0.26862954, 0.26130258, 0.27577711]}


# ------------------------------------------- tensors, by the publishers' names


def _resblock(name, width, mlp):
    return [
        (f'{name}.attn.in_proj_weight', (3 * width, width)),
        (f'{name}.attn.in_proj_bias', (3 * width,)),
        *_linear(f'{name}.attn.out_proj', width, width),
        *_norm(f'{name}.ln_1', width),
        *_norm(f'{name}.ln_2', width),
        *_linear(f'{name}.mlp.c_fc', width, mlp),
        *_linear(f'{name}.mlp.c_proj', mlp, width),
    ]


def _text(width, mlp):
    return [
        ('logit_scale', ()),
        ('token_embedding.weight', (V, width)),
        ('positional_embedding', (L, width)),
        ('text_projection', (width, F)),
        *_resblock('transformer.resblocks.0', width, mlp),
        *_norm('ln_final', width),
    ]


def _vit(width=W, mlp=M, text_mlp=M):
    return Torch(
        [
            ('visual.class_embedding', (width,)),
            ('visual.conv1.weight', (width, 3, 4, 4)),
            ('visual.positional_embedding', (10, width)),
            ('visual.proj', (width, F)),
            *_resblock('visual.transformer.resblocks.0', width, mlp),
            *_norm('visual.ln_pre', width),
            *_norm('visual.ln_post', width),
            *_text(width, text_mlp),
        ]
    )


def _resnet():
    def conv(name, norm, inputs, outputs, kernel):
        norm = f'visual.{norm}'
        running = [(f'{norm}.{x}', (outputs,)) for x in ('running_mean', 'running_var')]
        shape = (outputs, inputs, kernel, kernel)
        return [(f'visual.{name}.weight', shape), *_norm(norm, outputs), *running]

    shapes = conv('conv1', 'bn1', 3, 4, 3) + conv('conv2', 'bn2', 4, 4, 3)
    shapes += conv('conv3', 'bn3', 4, 8, 3)
    inputs = 8
    for name, inner in (('layer1.0', 8), ('layer1.1', 8), ('layer2.0', 16)):
        shapes += conv(f'{name}.conv1', f'{name}.bn1', inputs, inner, 1)
        shapes += conv(f'{name}.conv2', f'{name}.bn2', inner, inner, 3)
        shapes += conv(f'{name}.conv3', f'{name}.bn3', inner, 4 * inner, 1)
        if name.endswith('.0'):
            shapes += conv(f'{name}.downsample.0', f'{name}.downsample.1', inputs, 4 * inner, 1)
        inputs = 4 * inner
    shapes += [('visual.attnpool.positional_embedding', (5, 64))]
    for part in 'qkvc':
        shapes += _linear(f'visual.attnpool.{part}_proj', 64, F if part == 'c' else 64)
    return Torch(shapes + _text(448, 61))  # 448 · (61 / 448) < 61 in floating point


HUGGING_FACE_NAMES = (
    ('visual.transformer.resblocks', 'vision_model.encoder.layers'),
    ('transformer.resblocks', 'text_model.encoder.layers'),
    ('.attn.', '.self_attn.'),
    ('ln_1', 'layer_norm1'),
    ('ln_2', 'layer_norm2'),
    ('c_fc', 'fc1'),
    ('c_proj', 'fc2'),
    ('visual.class_embedding', 'vision_model.embeddings.class_embedding'),
    ('visual.conv1', 'vision_model.embeddings.patch_embedding'),
    ('visual.positional_embedding', 'vision_model.embeddings.position_embedding.weight'),
    ('visual.ln_pre', 'vision_model.pre_layrnorm'),
    ('visual.ln_post', 'vision_model.post_layernorm'),
    ('visual.proj', 'visual_projection.weight'),
    ('token_embedding', 'text_model.embeddings.token_embedding'),
    ('positional_embedding', 'text_model.embeddings.position_embedding.weight'),
    ('ln_final', 'text_model.final_layer_norm'),
    ('text_projection', 'text_projection.weight'),
)


def _hugging_face(tensors):
    """The same weights as CLIPModel names them."""
    renamed = {}
    for name, x in tensors.items():
        for theirs, ours in HUGGING_FACE_NAMES:
            name = name.replace(theirs, ours)
        if '.in_proj_' in name:
            for part, value in zip('qkv', np.split(x, 3), strict=True):
                renamed[name.replace('in_proj_', f'{part}_proj.')] = value
        else:
            renamed[name] = np.ascontiguousarray(x.T) if '_projection' in name else x
    return renamed


# ------------------------------------------- forwards in float64


quick = lambda x: x / (1 + np.exp(-1.702 * x))
exact = lambda x: 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def attend(query, key, value, heads, causal=False):
    outputs, size = [], query.shape[-1] // heads
    for part in (slice(i * size, (i + 1) * size) for i in range(heads)):
        logits = np.einsum('bqd,bkd->bqk', query[..., part], key[..., part]) / math.sqrt(size)
        if causal:
            logits = np.where(np.tri(logits.shape[1], dtype=bool), logits, -np.inf)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        outputs.append(weights / weights.sum(-1, keepdims=True) @ value[..., part])
    return np.concatenate(outputs, -1)


def block(t, name, x, heads, gelu, epsilon, causal=False):
    y = t.norm(f'{name}.ln_1', x, epsilon)
    y = y @ t[f'{name}.attn.in_proj_weight'].T + t[f'{name}.attn.in_proj_bias']
    x = x + t.linear(f'{name}.attn.out_proj', attend(*np.split(y, 3, -1), heads, causal))
    y = gelu(t.linear(f'{name}.mlp.c_fc', t.norm(f'{name}.ln_2', x, epsilon)))
    return x + t.linear(f'{name}.mlp.c_proj', y)


def vit_forward(t, pixels, heads, gelu):
    x = t.conv('visual.conv1', pixels.transpose(0, 3, 1, 2), 4, 0)
    x = x.reshape(*x.shape[:2], -1).transpose(0, 2, 1)
    token = np.broadcast_to(t['visual.class_embedding'], (len(x), 1, x.shape[-1]))
    x = np.concatenate([token, x], 1) + t['visual.positional_embedding']
    x = t.norm('visual.ln_pre', x, 1e-5)
    x = block(t, 'visual.transformer.resblocks.0', x, heads, gelu, 1e-5)
    return t.norm('visual.ln_post', x[:, 0], 1e-5) @ t['visual.proj']


def text_forward(t, tokens, ends, heads, gelu, epsilon=1e-5):
    x = t['token_embedding.weight'][tokens] + t['positional_embedding'][: tokens.shape[1]]
    x = block(t, 'transformer.resblocks.0', x, heads, gelu, epsilon, causal=True)
    return t.norm('ln_final', x[np.arange(len(x)), ends], epsilon) @ t['text_projection']


def resnet_forward(t, pixels):
    relu = lambda x: np.maximum(x, 0)
    halve = lambda x: sum(x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)) / 4
    norm_conv = lambda conv, norm, x, stride=1, padding=0: t.batch_norm(
        f'visual.{norm}', t.conv(f'visual.{conv}', x, stride, padding)
    )
    x = relu(norm_conv('conv1', 'bn1', pixels.transpose(0, 3, 1, 2), 2, 1))
    x = relu(norm_conv('conv2', 'bn2', x, 1, 1))
    x = halve(relu(norm_conv('conv3', 'bn3', x, 1, 1)))
    for name, average in (('layer1.0', np.array), ('layer1.1', np.array), ('layer2.0', halve)):
        y = relu(norm_conv(f'{name}.conv1', f'{name}.bn1', x))
        y = average(relu(norm_conv(f'{name}.conv2', f'{name}.bn2', y, 1, 1)))
        y = norm_conv(f'{name}.conv3', f'{name}.bn3', y)
        if name.endswith('.0'):
            x = norm_conv(f'{name}.downsample.0', f'{name}.downsample.1', average(x))
        x = relu(x + y)
    x = x.reshape(*x.shape[:2], -1).transpose(0, 2, 1)
    x = np.concatenate([x.mean(1, keepdims=True), x], 1) + t['visual.attnpool.positional_embedding']
    query, key, value = (t.linear(f'visual.attnpool.{part}_proj', x) for part in 'qkv')
    return t.linear('visual.attnpool.c_proj', attend(query[:, :1], key, value, 1)[:, 0])


def _write(folder, tensors, config=None, *, file=files.SINGLE):
    """`config` is open_clip's where it has an embed_dim, else Hugging Face's."""
    folder.mkdir()
    save_file(tensors, folder / file)
    if config and 'embed_dim' in config:
        whole = {'model_cfg': config, 'preprocess_cfg': PIXELS}
        (folder / clip.OPEN_CLIP_CONFIG).write_text(json.dumps(whole))
    elif config:
        (folder / files.CONFIG).write_text(json.dumps(config))
    return folder


def _check(folder, vision, text):
    """Compares the towers of a folder with forwards of NumPy; returns what was loaded."""
    model, (params, stats) = models.build(**clip.fields(folder)), clip.load(folder)
    rng, size = np.random.default_rng(1), model.vision.image_size
    images = rng.integers(0, 256, (2, size, size, 3), dtype=np.uint8)
    tokens, ends = rng.integers(0, V, (2, 7)), np.array([6, 3])
    expected = vision((images / 255 - PIXELS['mean']) / PIXELS['std']), text(tokens, ends)
    variables = {'params': params, 'batch_stats': stats}
    found = jax.jit(model.apply)(variables, images, tokens, np.arange(7) <= ends[:, None])
    for a, b in zip(found[:2], expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())
    np.testing.assert_allclose(found[2], np.exp(params['logit_scale']), rtol=1e-6)
    return params, stats


# ------------------------------------------- the towers compute what the publishers' do


def test_hugging_face_weights_give_the_published_forward_and_come_back(tmp_path):
    t = _vit()
    folder = _write(tmp_path / 'a', _hugging_face(t.tensors), HUGGING_FACE)
    vision = lambda pixels: vit_forward(t, pixels, 3, exact)
    params, stats = _check(folder, vision, lambda *x: text_forward(t, *x, 3, quick, 1e-3))
    assert stats == {}
    tensors, config = clip.export(params, stats, clip.fields(folder))
    chex.assert_trees_all_equal(tensors, _hugging_face(t.tensors))
    assert config['text_config']['eos_token_id'] == V - 1
    assert clip.fields(_write(tmp_path / 'b', tensors, config)) == clip.fields(folder)


@pytest.mark.parametrize('form', ['open_clip', 'openai'])
def test_openai_names_give_the_published_forward_with_and_without_a_config(tmp_path, form):
    if form == 'open_clip':
        t, heads, gelu = _vit(mlp=24), 3, exact
        folder = _write(tmp_path / 'a', t.tensors, OPEN_CLIP, file=files.OPEN_CLIP)
    else:
        t, heads, gelu = _vit(128, 80, 72), 2, quick
        folder = _write(tmp_path / 'a', t.tensors | {'input_resolution': np.array(7)})
    vision = lambda pixels: vit_forward(t, pixels, heads, gelu)
    params, stats = _check(folder, vision, lambda *x: text_forward(t, *x, heads, gelu))
    tensors, config = clip.export(params, stats, clip.fields(folder))
    chex.assert_trees_all_equal(tensors, _hugging_face(t.tensors))
    again = _write(tmp_path / 'b', tensors, config)
    assert clip.fields(again) == clip.fields(folder)
    chex.assert_trees_all_equal(clip.load(again)[0], params)


def test_resnet_weights_give_the_published_forward_and_come_back(tmp_path):
    t = _resnet()
    folder = _write(tmp_path / 'a', t.tensors | {'visual.bn1.num_batches_tracked': np.array(7)})
    vision = lambda pixels: resnet_forward(t, pixels)
    params, stats = _check(folder, vision, lambda *x: text_forward(t, *x, 7, quick))
    tensors, config = clip.export(params, stats, clip.fields(folder))
    chex.assert_trees_all_equal(tensors, t.tensors)
    assert clip.fields(_write(tmp_path / 'b', tensors, config['model_cfg'])) == clip.fields(folder)
    half = {name: x.astype(np.float16) for name, x in t.tensors.items()}
    loaded = clip.load(_write(tmp_path / 'c', half))
    assert {x.dtype for x in jax.tree.leaves(loaded)} == {np.dtype('float32')}


def test_configs_that_say_little_mean_the_published_defaults(tmp_path):
    config = {'model_type': 'clip', 'vision_config': {}, 'text_config': 3, 'text_config_dict': {}}
    name = 'vision_model.post_layernorm.bias'
    folder = _write(tmp_path / 'a', {name: np.zeros(1, 'f')}, config)
    assert clip.fields(folder) == clip_presets.vit_b_32()
    config = {
        'embed_dim': 512,
        'quick_gelu': True,
        'vision_cfg': {'pool_type': 'tok'},
        'text_cfg': {'tokenizer_kwargs': {'clean': 'lower'}},
    }
    folder = _write(tmp_path / 'b', {'visual.proj': np.zeros(1, 'f')}, config)
    assert clip.fields(folder) == clip_presets.vit_b_16()


# ------------------------------------------- another picture size


def _bicubic(old, new):
    """Weights [new, old] of Keys' cubic (a = −½) at half-pixel centres, stretched to shrink."""
    stretch = max(1.0, old / new)
    x = np.abs((np.arange(new)[:, None] + 0.5) * old / new - 0.5 - np.arange(old)) / stretch
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights = np.where(x <= 1, near, np.where(x < 2, far, 0.0))
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize(('size', 'old', 'new'), [(20, 3, 5), (8, 3, 2), (32, 2, 4)])
def test_positions_are_resized_and_the_first_stays(tmp_path, size, old, new):
    t = _resnet() if (resnet := old == 2) else _vit(64, 80, 72)
    folder = _write(tmp_path / 'a', t.tensors)
    params, _ = clip.load(folder, image_size=size)
    found = (params['vision']['pool'] if resnet else params['vision'])['positions']
    name = 'visual.attnpool.positional_embedding' if resnet else 'visual.positional_embedding'
    rows, square = _bicubic(old, new), t[name][1:].reshape(old, old, 64)
    expected = np.einsum('yi,xj,ijd->yxd', rows, rows, square).reshape(new * new, 64)
    np.testing.assert_allclose(found, np.concatenate([t[name][:1], expected]), atol=1e-5)
    message = '36 is not a multiple of 8' if resnet else 'image_size 3 is below 4'
    with pytest.raises(UserError, match=message):
        clip.load(folder, image_size=36 if resnet else 3)


# ------------------------------------------- faults


@pytest.mark.parametrize(
    ('name', 'shape', 'message'),
    [
        ('visual.ln_pre.bias', None, "tensor 'visual.ln_pre.bias' is missing"),
        ('logit_scale', None, "tensor 'logit_scale' is missing"),
        ('logit_scale', (1,), r"'logit_scale' has shape \[1\], the model needs \[\]"),
        ('logit_bias', (), r"open_clip_model\.safetensors: tensor 'logit_bias' has no place"),
        ('ln_final.bias', (5,), r"'ln_final.bias' has shape \[5\], the model needs \[12\]"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, name, shape, message):
    tensors = _vit(mlp=24).tensors
    tensors.pop(name, None)
    tensors |= {} if shape is None else {name: np.zeros(shape, 'f')}
    with pytest.raises(UserError, match=message):
        clip.load(_write(tmp_path / 'a', tensors, OPEN_CLIP, file=files.OPEN_CLIP))


@pytest.mark.parametrize(
    ('form', 'path', 'value', 'message'),
    [
        ('clip', 'model_type', 'siglip', "'model_type' is 'siglip'; expected 'clip'"),
        ('clip', 'text_config/hidden_act', 'relu', "text_config: key 'hidden_act' is 'relu'"),
        ('clip', 'vision_config', 3, "key 'vision_config' is 3, not an object"),
        ('open', 'vision_cfg/timm_model_name', 'x', "vision_cfg: key 'timm_model_name' is 'x'"),
        ('open', 'text_cfg/pool_type', 'last', "text_cfg: key 'pool_type' is 'last'"),
        ('open', 'vision_cfg/head_width', 5, 'width 12 is not a multiple of the head width 5'),
        ('open', 'vision_cfg/layers', [2, 0], r"'layers' is \[2, 0\], not block counts"),
    ],
)
def test_configs_of_other_models_are_refused_by_key(tmp_path, form, path, value, message):
    config = json.loads(json.dumps(HUGGING_FACE if form == 'clip' else OPEN_CLIP))
    *parents, key = path.split('/')
    (config[parents[0]] if parents else config)[key] = value
    name = 'text_model.x' if form == 'clip' else 'visual.x'
    with pytest.raises(UserError, match=message):
        clip.fields(_write(tmp_path / 'a', {name: np.zeros(1, 'f')}, config))


def test_other_pixels_and_names_are_refused(tmp_path):
    folder = _write(tmp_path / 'a', {'text_model.x': np.zeros(1, 'f')}, HUGGING_FACE)
    (folder / clip.PREPROCESSOR).write_text('{"image_mean": [0.5, 0.5, 0.5]}')
    with pytest.raises(UserError, match=r"preprocessor_config\.json: key 'image_mean' is \[0\.5"):
        clip.fields(folder)
    with pytest.raises(UserError, match="not named as CLIPModel's or OpenAI's"):
        clip.load(_write(tmp_path / 'b', {'x': np.zeros(1, 'f')}))
    with pytest.raises(UserError, match='width 12 is not a multiple of the head width 64'):
        clip.fields(_write(tmp_path / 'c', _vit().tensors))
