"""Towers and the comic model: published sizes, padding, absent modalities, freezing."""

import functools

import chex
import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.models import layers
from mmjax.models.bert import Bert, masked_mean
from mmjax.models.resnet import ResNet
from mmjax.models.vit import ViT
from mmjax.recipes.comic import model as comic
from mmjax.recipes.comic.config import FUSIONS

B, N, S, L, D = 2, 3, 16, 5, 12


# ---------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ('model', 'inputs', 'count'),
    [
        (ViT(), [(1, 224, 224, 3)], 92_884_224),
        (ResNet(), [(1, 224, 224, 3)], 23_508_032),
        (Bert(), [(1, 8), (1, 8)], 22_713_216 - (384 * 384 + 384)),  # less the pooler
    ],
    ids=['siglip', 'resnet50', 'minilm'],
)
def test_published_sizes_have_the_published_parameter_counts(model, inputs, count):
    inputs = [jax.ShapeDtypeStruct(x, jnp.int32 if len(x) == 2 else jnp.float32) for x in inputs]
    init = lambda key, *inputs: model.init(key, *inputs, train=False)
    variables = jax.eval_shape(init, jax.random.key(0), *inputs)
    leaves = jax.tree.leaves(variables['params'])
    assert sum(x.size for x in leaves) == count
    assert {x.dtype for x in leaves} == {jnp.dtype('float32')}


# ---------------------------------------------------------------- BERT


def _bert(**fields):
    return Bert(
        **{
            'vocabulary': 40,
            'width': 16,
            'depth': 2,
            'heads': 2,
            'mlp_width': 32,
            'max_length': 8,
            **fields,
        }
    )


def test_bert_ignores_padding_and_an_empty_row_pools_to_zeros():
    model = _bert()
    tokens = np.random.default_rng(0).integers(1, 40, (3, 6))
    mask = np.arange(6) < np.array([[6], [3], [0]])
    variables = _random(model.init, tokens, mask, train=False)
    embed = jax.jit(
        lambda tokens, mask: masked_mean(model.apply(variables, tokens, mask, train=False), mask)
    )
    pooled = np.asarray(embed(tokens, mask))
    np.testing.assert_array_equal(pooled, embed(np.where(mask, tokens, 7), mask))
    assert not pooled[2].any() and np.abs(pooled[:2]).min() > 0
    short = embed(tokens[1:2, :3], mask[1:2, :3])
    np.testing.assert_allclose(pooled[1:2], short, rtol=1e-5, atol=1e-6)


def test_towers_refuse_inputs_that_do_not_fit():
    with pytest.raises(ValueError, match='9 tokens do not fit max_length 8'):
        _bert().init(jax.random.key(0), jnp.zeros((1, 9), int), jnp.ones((1, 9)), train=False)
    with pytest.raises(ValueError, match='images'):
        ViT().init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False)


# ---------------------------------------------------------------- the comic model


def _model(backbone='both', fusion='attention', dtype=jnp.float32, dropout=0.0):
    siglip = ViT(S, 8, 16, 1, 2, 24, dropout=dropout, dtype=dtype)
    resnet = ResNet((1, 1), 4, False, 3, 2, False, dtype=dtype)
    return comic.ComicModel(
        siglip=siglip if backbone != 'resnet' else None,
        resnet=resnet if backbone != 'siglip' else None,
        bert=_bert(depth=1, dropout=dropout, dtype=dtype),
        features=D,
        siglip_hidden=10,
        resnet_hidden=14,
        composition_hidden=9,
        gate_hidden=11,
        reconstruction_hidden=13,
        visual_fusion=fusion,
        dropout=dropout,
        dtype=dtype,
    )


def _inputs(seed=0):
    rng = np.random.default_rng(seed)
    panels = np.array([[1, 1, 0], [1, 1, 1]], bool)
    modality = np.ones((B, N, 3), bool)
    modality[0, 1] = (1, 0, 1)  # a panel without text
    modality[1, 1] = (0, 1, 1)  # one without a picture
    modality[1, 2] = False  # one without anything
    return {
        'images': rng.integers(0, 256, (B, N, S, S, 3), dtype=np.uint8),
        'tokens': rng.integers(1, 40, (B, N, L)),
        'token_mask': rng.random((B, N, L)) > 0.3,
        'composition': rng.normal(size=(B, N, 7)).astype(np.float32),
        'modality': modality,
        'panels': panels,
    }


def _random(init, *inputs, seed=0, **kwargs):
    """Variables with every leaf random, so that no zero or one at the start hides a term."""
    shapes = jax.eval_shape(functools.partial(init, **kwargs), jax.random.key(0), *inputs)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.uniform(0.1, 0.6, x.shape), x.dtype), shapes)


def _variables(model):
    return _random(model.init, *_inputs().values())


def _train(train, frozen=()):
    return {name: train and name not in frozen for name in comic.TOWERS}


@functools.cache  # equal models share one compilation
def _jitted(model, train, frozen):
    def apply(variables, inputs, key):
        return model.apply(
            variables,
            **inputs,
            train=_train(train, frozen),
            method='encode',
            mutable=['batch_stats'],
            rngs={'dropout': key},
        )

    return jax.jit(apply)


def _encode(model, variables, inputs, *, train, frozen=frozenset(), dropout_key=0):
    apply = _jitted(model, train, frozen)
    outputs, stats = apply(variables, inputs, jax.random.key(dropout_key))
    return jax.tree.map(np.asarray, outputs), jax.tree.map(np.asarray, stats['batch_stats'])


@pytest.mark.parametrize('train', [True, False], ids=['train', 'eval'])
def test_padded_panels_and_absent_modalities_influence_nothing(train):
    model, inputs = _model(), _inputs()
    variables, other = _variables(model), _inputs(seed=1)
    present = inputs['modality'] & inputs['panels'][..., None]  # [B, N, 3]
    changed = dict(inputs)
    for index, names in enumerate((['images'], ['tokens', 'token_mask'], ['composition'])):
        for name in names:
            seen = present[..., index].reshape(B, N, *[1] * (inputs[name].ndim - 2))
            changed[name] = np.where(seen, inputs[name], other[name])
    outputs, stats = _encode(model, variables, inputs, train=train)
    found, found_stats = _encode(model, variables, changed, train=train)
    chex.assert_trees_all_equal(stats, found_stats)
    for name in ('fused', 'gates'):
        np.testing.assert_array_equal(outputs[name], found[name])
    for index, name in enumerate(('vision', 'text')):
        seen = present[..., index]
        np.testing.assert_array_equal(outputs[name][seen], found[name][seen])
    assert not np.array_equal(outputs['vision'], found['vision'])  # the change was a change


def test_a_panel_with_nothing_is_zero_and_its_gradient_finite():
    model, inputs = _model('siglip'), _inputs()
    variables = _variables(model)
    outputs, _ = _encode(model, variables, inputs, train=False)
    present = inputs['modality'] & inputs['panels'][..., None]
    nothing = ~present.any(-1)
    assert nothing.sum() == 2
    assert not outputs['fused'][nothing].any() and np.abs(outputs['fused'][~nothing]).max() > 0
    np.testing.assert_allclose(outputs['gates'].sum(-1), ~nothing, atol=1e-6)
    assert not outputs['gates'][~present].any()
    chex.assert_tree_all_finite(outputs)

    def loss(params, inputs):
        fused = model.apply(
            {**variables, 'params': params},
            **inputs,
            train=_train(True),
            method='encode',
            rngs={'dropout': jax.random.key(0)},
            mutable=['batch_stats'],
        )[0]['fused']
        return jnp.sum(fused**2)

    nowhere = {**inputs, 'panels': np.zeros((B, N), bool)}
    gradient = jax.jit(jax.grad(loss))
    chex.assert_tree_all_finite(gradient(variables['params'], inputs))
    chex.assert_tree_all_finite(gradient(variables['params'], nowhere))


def test_adaptive_fusion_matches_its_formula():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 4, D))  # [modalities, rows, D]
    present = np.array([[1, 1, 1], [1, 0, 1], [0, 1, 0], [0, 0, 0]], bool)
    layer = comic.AdaptiveFusion(11)
    shapes = jax.eval_shape(layer.init, jax.random.key(0), tuple(x), present)['params']
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), shapes)
    fused, gates = jax.jit(layer.apply)({'params': params}, tuple(jnp.float32(x)), present)
    normed = []
    for name, y in zip(('vision', 'text', 'composition'), x, strict=True):
        p = params[f'{name}_norm']
        y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-5)
        normed.append(y * p['scale'] + p['bias'])
    y = np.stack(normed, 1) * present[..., None]
    hidden = np.concatenate([y.reshape(4, -1), present], -1) @ params['gate_hidden']['kernel']
    hidden = np.asarray(jax.nn.gelu(hidden + params['gate_hidden']['bias'], approximate=False))
    logits = hidden @ params['gate']['kernel'] + params['gate']['bias']
    odds = np.exp(logits) * present
    weights = odds / np.maximum(odds.sum(-1, keepdims=True), 1e-30)
    mean = y.sum(1) / np.maximum(present.sum(-1, keepdims=True), 1)  # absent ones do not count
    expected = np.einsum('rm,rmd->rd', weights, y) + params['residual'] * mean
    np.testing.assert_allclose(gates, weights, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(fused, expected, rtol=1e-4, atol=1e-4)


def test_residual_weight_starts_at_a_tenth():
    init = jax.jit(comic.AdaptiveFusion(4).init)
    inputs = (jnp.zeros((1, 2)),) * 3, jnp.ones((1, 3), bool)
    params = init(jax.random.key(0), *inputs)['params']
    np.testing.assert_allclose(params['residual'], 0.1)


def test_each_backbone_gets_the_pixel_statistics_it_was_trained_with():
    model, inputs = _model('both'), _inputs()
    variables = _variables(model)
    pixels = inputs['images'].reshape(-1, S, S, 3) / np.float64(255)
    imagenet = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    subtree = lambda name: {kind: tree.get(name, {}) for kind, tree in variables.items()}

    @jax.jit
    def see(halves, imagenet):
        siglip = model.siglip.apply(subtree('siglip'), halves, train=False)
        resnet = model.resnet.apply(subtree('resnet'), imagenet, train=False)
        head = comic.VisionHead(D, 10, 14)
        return head.apply(subtree('vision_head'), siglip, resnet, train=False)

    expected = see(jnp.float32(pixels * 2 - 1), jnp.float32(imagenet))
    outputs, _ = _encode(model, variables, inputs, train=False)
    np.testing.assert_allclose(outputs['vision'].reshape(-1, D), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match='uint8'):
        layers.normalize_pixels(jnp.zeros((1, 2, 2, 3)), comic.SIGLIP_PIXELS)


@pytest.mark.parametrize('fusion', FUSIONS)
def test_two_backbones_are_fused_as_named(fusion):
    rng = np.random.default_rng(0)
    siglip, resnet = jnp.float32(rng.normal(size=(4, 6))), jnp.float32(rng.normal(size=(4, 8)))
    head = comic.VisionHead(D, 10, 14, fusion)
    params = _random(head.init, siglip, resnet, train=False)['params']
    dense = lambda name, x: x @ params[name]['kernel'] + params[name]['bias']

    @jax.jit
    def fuse():
        views = []
        for name, hidden, pooled in (('siglip', 10, siglip), ('resnet', 14, resnet)):
            subtree = {'params': params[f'{name}_projector']}
            views.append(comic.Projector(hidden, D, 0.0).apply(subtree, pooled, train=False))
        both = jnp.concatenate(views, -1)
        if fusion == 'concat':
            return dense('concat', both)
        if fusion == 'gate':
            both = jax.nn.gelu(dense('gate_hidden', both), approximate=False)
        weights = jax.nn.softmax(dense(fusion, both))
        return weights[:, :1] * views[0] + weights[:, 1:] * views[1]

    expected = fuse()
    apply = jax.jit(functools.partial(head.apply, train=False))
    found = apply({'params': params}, siglip, resnet)
    chex.assert_shape(found, (4, D))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_frozen_towers_run_as_at_evaluation():
    model, inputs = _model('both', dropout=0.5), _inputs()
    variables = _variables(model)
    heads = frozenset({'vision_head'})
    run = lambda frozen, key: _encode(
        model, variables, inputs, train=True, frozen=frozen | heads, dropout_key=key
    )
    frozen = frozenset({'siglip', 'resnet', 'bert'})
    (first, stats), (second, _) = run(frozen, 0), run(frozen, 1)
    evaluated, _ = _encode(_model('both'), variables, inputs, train=False)
    for name in ('vision', 'text'):
        np.testing.assert_array_equal(first[name], second[name])
        np.testing.assert_allclose(first[name], evaluated[name], rtol=1e-5)
    before = jax.tree.map(np.asarray, variables['batch_stats'])
    chex.assert_trees_all_equal(stats['resnet'], before['resnet'])
    assert not np.array_equal(
        stats['composition']['norm_0']['mean'], before['composition']['norm_0']['mean']
    )
    thawed, stats = run(frozenset({'siglip'}), 0)
    assert not np.array_equal(thawed['text'], evaluated['text'])
    assert not np.array_equal(
        stats['resnet']['stem_norm']['mean'], before['resnet']['stem_norm']['mean']
    )


@pytest.mark.parametrize(
    ('frozen', 'count'),
    [((), 0), (('bert',), 1), (('siglip', 'resnet'), 2), (('siglip', 'resnet', 'bert'), 3)],
)
def test_outputs_of_frozen_backbones_are_named_for_checkpointing(frozen, count):
    model, inputs = _model('both'), _inputs()
    jaxpr = jax.make_jaxpr(
        lambda variables: model.apply(
            variables,
            **inputs,
            train=_train(True, frozen),
            method='encode',
            mutable=['batch_stats'],
            rngs={'dropout': jax.random.key(0)},
        )
    )(_variables(model))
    assert str(jaxpr).count('name=frozen') == count


def test_bfloat16_computes_in_half_and_keeps_parameters_and_outputs_in_float32():
    inputs, half = _inputs(), _model('siglip', dtype=jnp.bfloat16)
    variables = _variables(half)
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype('float32')}
    outputs, _ = _encode(half, variables, inputs, train=False)
    assert {x.dtype for x in outputs.values()} == {np.dtype('float32')}
    expected, _ = _encode(_model('siglip'), variables, inputs, train=False)
    error = np.abs(outputs['text'] - expected['text']).max() / np.abs(expected['text']).max()
    assert 1e-6 < error < 0.05


def test_reconstruction_keeps_the_shape_and_drops_only_in_training():
    model = _model('siglip', dropout=0.5)
    variables, context = _variables(model), jnp.ones((B, D))

    @functools.partial(jax.jit, static_argnums=(0, 2))
    def run(train, key=0, frozen=frozenset()):
        rngs = {'dropout': jax.random.key(key)}
        return model.apply(
            variables,
            context,
            train=train and 'reconstruction' not in frozen,
            method='reconstruct',
            rngs=rngs,
        )

    chex.assert_shape(run(True), (B, D))
    assert not np.array_equal(run(True, 0), run(True, 1))
    frozen = frozenset({'reconstruction'})
    np.testing.assert_array_equal(run(True, 0, frozen), run(False))


def test_a_model_without_eyes_is_refused():
    model = _model('siglip').clone(siglip=None)
    with pytest.raises(ValueError, match='visual backbone'):
        model.init(jax.random.key(0), *_inputs().values())
    with pytest.raises(ValueError, match="fusion 'sum'"):
        jax.eval_shape(lambda: _model('both', 'sum').init(jax.random.key(0), *_inputs().values()))


def test_parameters_live_under_the_names_that_rules_use():
    params = _variables(_model('both'))['params']
    assert set(params) == {
        'siglip',
        'resnet',
        'bert',
        'vision_head',
        'text_head',
        'composition',
        'fusion',
        'reconstruction',
    }
    paths = flax.traverse_util.flatten_dict(params, sep='/')
    for path in (
        'siglip/block_0/mlp/up/kernel',
        'resnet/block_1/conv_1/kernel',
        'bert/block_0/norm_2/scale',
        'vision_head/siglip_projector/out/bias',
    ):
        assert path in paths
