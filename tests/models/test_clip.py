"""CLIP's towers: published sizes, padding, masked rows, the start, and a temperature that moves."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.models import clip
from mmjax.models.modified_resnet import AttentionPool
from mmjax.models.resnet import Block
from tests import clip_presets

VISION = {
    'image_size': 14,
    'patch_size': 4,
    'width': 12,
    'depth': 1,
    'heads': 3,
    'mlp_width': 20,
    'features': 10,
}
RESNET = {'image_size': 16, 'stage_sizes': (1, 1), 'width': 4, 'heads': 2, 'features': 10}
TEXT = {
    'vocabulary': 30,
    'max_length': 9,
    'width': 12,
    'depth': 1,
    'heads': 3,
    'mlp_width': 20,
    'features': 10,
}
TOWERS = {14: VISION, 16: RESNET}  # by picture size


def _inputs(size, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (3, size, size, 3), dtype=np.uint8)
    return images, rng.integers(1, 30, (3, 7)), np.arange(7) < np.array([[7], [4], [2]])


@functools.cache
def _random(size):
    """Variables with every leaf random, so that no zero or one at the start hides a term."""
    model = clip.build(TOWERS[size], TEXT)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *_inputs(size))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.uniform(0.1, 0.6, x.shape), x.dtype), shapes)


@pytest.mark.parametrize(
    ('preset', 'count'),
    [
        (clip_presets.vit_b_32, 151_277_313),
        (clip_presets.vit_b_16, 149_620_737),
        (clip_presets.vit_l_14, 427_616_513),
        (clip_presets.rn50, 102_007_137),
    ],
)
def test_presets_have_the_published_parameter_counts(preset, count):
    model = clip.build(**preset())
    shape = jax.ShapeDtypeStruct
    inputs = shape((1, 224, 224, 3), jnp.uint8), shape((1, 77), int), shape((1, 77), bool)
    variables = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    leaves = jax.tree.leaves(variables['params'])
    assert sum(x.size for x in leaves) == count
    assert {x.dtype for x in leaves} == {jnp.dtype('float32')}


def test_quick_gelu_is_its_formula():
    x = np.linspace(-6, 6, 101)
    np.testing.assert_allclose(
        clip.quick_gelu(jnp.float32(x)), x / (1 + np.exp(-1.702 * x)), rtol=1e-5, atol=1e-6
    )


# ------------------------------------------- text


def test_padding_has_no_influence_and_an_empty_text_is_finite():
    model = clip.ClipText(**TEXT)
    _, tokens, mask = _inputs(14)
    params = _random(14)['params']['text']
    embed = jax.jit(lambda tokens, mask: model.apply({'params': params}, tokens, mask, train=False))
    embedded = np.asarray(embed(tokens, mask))
    for pad in (0, 29):
        np.testing.assert_array_equal(embedded, embed(np.where(mask, tokens, pad), mask))
    np.testing.assert_allclose(embedded[1:2], embed(tokens[1:2, :4], mask[1:2, :4]), rtol=1e-5)
    for place in (0, 3):  # what comes before the end, and the end itself, do have influence
        changed = tokens.copy()
        changed[1, place] = tokens[1, place] % 29 + 1
        difference = np.abs(np.asarray(embed(changed, mask)) - embedded).max(1)
        assert difference[1] > 1e-4 and not difference[[0, 2]].any()
    nothing = np.asarray(embed(tokens, np.zeros_like(mask)))
    first = embed(tokens, np.arange(7) < np.ones((3, 1)))
    np.testing.assert_array_equal(nothing, first)
    chex.assert_tree_all_finite(nothing)


# ------------------------------------------- pictures


@pytest.mark.usefixtures('unchecked_shapes')
@pytest.mark.parametrize('vision', [VISION, RESNET], ids=['vit', 'resnet'])
def test_pictures_are_normalised_as_clip_was_trained(vision):
    model, (images, *_) = clip.build(vision, TEXT), _inputs(vision['image_size'])
    variables = _random(vision['image_size'])
    mean = np.array([0.48145466, 0.4578275, 0.40821073])
    deviation = np.array([0.26862954, 0.26130258, 0.27577711])
    tower = {kind: tree['vision'] for kind, tree in variables.items()}
    pixels = jnp.float32((images / 255 - mean) / deviation)
    expected = jax.jit(lambda x: model.vision.apply(tower, x, train=False))(pixels)
    encode = functools.partial(model.apply, variables, method='encode_image')
    found = jax.jit(lambda x: encode(x, None, False))(images)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match='uint8'):
        encode(jnp.zeros(images.shape), None, False)


def test_masked_rows_stay_out_of_the_batch_statistics():
    model, (images, *_) = clip.build(RESNET, TEXT), _inputs(16)
    variables = _random(16)
    mask = np.array([True, False, True])

    @functools.partial(jax.jit, static_argnums=2)
    def encode(images, mask, train):
        return model.apply(
            variables, images, mask, train, method='encode_image', mutable=['batch_stats']
        )

    other = np.where(mask[:, None, None, None], images, 255 - images)
    (one, stats), (two, other_stats) = encode(images, mask, True), encode(other, mask, True)
    chex.assert_trees_all_equal(stats, other_stats)
    np.testing.assert_array_equal(one[mask], two[mask])
    assert not np.array_equal(one[1], two[1])
    everyone, _ = encode(images, np.ones(3, bool), True)
    assert np.abs(everyone - one)[mask].min() > 0
    _, still = encode(images, mask, False)
    chex.assert_trees_all_equal(still['batch_stats'], variables['batch_stats'])
    pairs = zip(jax.tree.leaves(stats), jax.tree.leaves(still), strict=True)
    assert all(not np.array_equal(a, b) for a, b in pairs)  # every norm moved


def test_towers_refuse_inputs_and_sizes_that_do_not_fit():
    def init(vision=VISION, text=TEXT, size=14, length=7):
        images, tokens = jnp.zeros((1, size, size, 3), jnp.uint8), jnp.ones((1, length), int)
        model = clip.build(vision, text)
        jax.eval_shape(model.init, jax.random.key(0), images, tokens, tokens)

    for change, message in (
        ({'size': 15}, r'images \(1, 15, 15, 3\) are not \[batch, 14, 14, 3\]'),
        ({'length': 10}, '10 tokens do not fit max_length 9'),
        ({'vision': {**VISION, 'patch_size': 15}}, 'image_size 14 is smaller than patch_size 15'),
        ({'vision': {**VISION, 'heads': 5}}, 'width 12 is not a multiple of 5 heads'),
        ({'vision': RESNET}, r'are not \[batch, 16, 16, 3\]'),
        ({'vision': {**RESNET, 'image_size': 20}, 'size': 20}, '20 is not a multiple of 8'),
        ({'vision': {**RESNET, 'heads': 5}, 'size': 16}, 'width 32 is not a multiple of 5 heads'),
    ):
        with pytest.raises(ValueError, match=message):
            init(**change)


# ------------------------------------------- temperature


def test_scale_is_clamped_and_can_come_back():
    model = clip.build(VISION, TEXT)

    @jax.jit
    def scale(value, sign):
        variables = {'params': {'logit_scale': value}}
        found = lambda value: model.apply(
            {'params': {**variables['params'], 'logit_scale': value}}, method='scale'
        )
        return found(value), jax.grad(lambda x: sign * found(x))(value)

    for value, expected in ((-math.log(0.07), 1 / 0.07), (math.log(120), 100), (math.log(99), 99)):
        found, gradient = scale(jnp.float32(value), 1.0)
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        # Descent along a positive gradient lowers the scale: it passes wherever the scale is.
        np.testing.assert_allclose(gradient, math.exp(value), rtol=1e-5)
        _, gradient = scale(jnp.float32(value), -1.0)
        np.testing.assert_allclose(gradient, -math.exp(value) if value < 4.6 else 0, rtol=1e-5)
    tight = clip.build(VISION, TEXT, max_scale=20.0)
    np.testing.assert_allclose(
        tight.apply({'params': {'logit_scale': jnp.float32(4)}}, method='scale'), 20
    )


# ------------------------------------------- the start


def test_towers_start_with_the_published_deviations():
    width, depths = 64, {'vision': 1, 'text': 2}
    sizes = {'width': width, 'heads': 2, 'mlp_width': 256, 'features': 64}
    vision = {**sizes, 'image_size': 32, 'patch_size': 8, 'depth': depths['vision']}
    text = {**sizes, 'vocabulary': 500, 'max_length': 60, 'depth': depths['text']}
    model = clip.build(vision, text, temperature=0.05)
    images, tokens = jnp.zeros((1, 32, 32, 3), jnp.uint8), jnp.ones((1, 7), int)
    key = jax.random.key(0, impl='rbg')  # compiles faster
    params = jax.jit(model.init)(key, images, tokens, tokens)['params']
    np.testing.assert_allclose(params['logit_scale'], math.log(1 / 0.05), rtol=1e-6)
    for tower, depth in depths.items():
        into_residual = (2 * depth * width) ** -0.5
        block = params[tower]['block_0']
        for name, deviation in (
            ('query', width**-0.5),
            ('key', width**-0.5),
            ('value', width**-0.5),
            ('out', into_residual),
            ('up', (2 * width) ** -0.5),
            ('down', into_residual),
        ):
            np.testing.assert_allclose(block[name]['kernel'].std(), deviation, rtol=0.05)
            assert not block[name]['bias'].any()
        np.testing.assert_allclose(params[tower]['projection']['kernel'].std(), 1 / 8, rtol=0.05)
    np.testing.assert_allclose(params['vision']['positions'].std(), 1 / 8, rtol=0.1)
    np.testing.assert_allclose(params['vision']['class_token'].std(), 1 / 8, rtol=0.3)
    np.testing.assert_allclose(params['text']['positions'].std(), 0.01, rtol=0.05)
    np.testing.assert_allclose(params['text']['words']['embedding'].std(), 0.02, rtol=0.05)


def test_resnet_starts_with_batch_norms_of_one_and_the_published_pool():
    key, channels = jax.random.key(0, impl='rbg'), 128
    x = jnp.zeros((1, 2, 2, channels))
    block = functools.partial(Block(8, 2, average=True).init, train=False)
    params = jax.jit(block)(key, x, None)['params']
    for name in ('norm_1', 'norm_2', 'norm_3', 'shortcut_norm'):
        assert (params[name]['scale'] == 1).all()
    params = jax.jit(AttentionPool(4, 64).init)(key, x)['params']
    for name in ('query', 'key', 'value', 'out'):
        np.testing.assert_allclose(params[name]['kernel'].std(), channels**-0.5, rtol=0.05)


@pytest.mark.parametrize('vision', [VISION, RESNET], ids=['vit', 'resnet'])
def test_bfloat16_computes_in_half_and_keeps_parameters_and_outputs_in_float32(vision):
    images, *texts = inputs = _inputs(vision['image_size'])
    half, whole = (clip.build(vision, TEXT, dtype=x) for x in (jnp.bfloat16, jnp.float32))
    variables = _random(vision['image_size'])
    shapes = jax.eval_shape(half.init, jax.random.key(0), *inputs)
    assert {x.dtype for x in jax.tree.leaves(shapes)} == {jnp.dtype('float32')}

    def outputs(model):
        encode = functools.partial(model.apply, variables, train=False)
        image = lambda: encode(images, None, method='encode_image')
        text = lambda: encode(*texts, method='encode_text')
        return [jax.jit(tower)() for tower in ((image, text) if vision is VISION else (image,))]

    for found, expected in zip(outputs(half), outputs(whole), strict=True):
        assert found.dtype == expected.dtype == jnp.float32
        assert 1e-6 < np.abs(found - expected).max() / np.abs(expected).max() < 0.05
