"""The receipts model: the image's tower and tokens, and answers that padding does not change."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.engine import optim
from mmjax.losses import language
from mmjax.models.decoder import Decoder
from mmjax.models.internvit import InternViT, shuffle_pixels
from mmjax.recipes.receipts.model import Classifier, CrossAttention, ReceiptsModel

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
VISION = InternViT(image_size=16, patch_size=4, width=8, depth=1, heads=2, mlp_width=12)
MODEL = ReceiptsModel(
    vision=VISION,
    language=Decoder(
        vocabulary=19, width=16, depth=2, heads=4, kv_heads=2, mlp_width=24, theta=100.0
    ),
    cross_heads=2,
)
IMAGE_TOKENS = 4  # a grid of 4, joined by 2


@pytest.fixture(scope='module', autouse=True)
def quick():
    """Runs once a shape: fast code would take longer to make than it saves."""
    jax.config.update('jax_disable_most_optimizations', True)
    yield
    jax.config.update('jax_disable_most_optimizations', False)


def random(shapes):
    """Every leaf random, so that no zero or one at the start hides a term."""
    return jax.tree.map(lambda x: jnp.asarray(RNG.normal(0, 0.3, x.shape), x.dtype), shapes)


@functools.cache
def variables():
    words, mask = jnp.zeros((3, 5), jnp.int32), jnp.ones((3, 5), bool)
    shapes = jax.eval_shape(
        MODEL.init, jax.random.key(0), IMAGES, jnp.ones(3, bool), words, mask, words, mask
    )
    made = random(shapes)
    made['batch_stats'] = jax.tree.map(jnp.abs, made['batch_stats'])
    return made


def said(lengths, width):
    """Returns (tokens, mask) whose padding is no zero: it may hold anything."""
    mask = np.arange(width) < np.array(lengths)[:, None]
    tokens = np.random.default_rng(sum(lengths)).integers(2, 19, (len(lengths), 12))[:, :width]
    return np.where(mask, tokens, 18).astype(np.int32), mask


@functools.cache
def forced():
    """Returns jitted (images, question, its mask, answer, its mask) → logits, by teacher."""

    def run(model, images, question, question_mask, answer, mask):
        image = model.encode(images, train=False)
        prefix, prefix_mask, _ = model.prefix(image, question, question_mask, train=False)
        tokens = language.shift_right(answer, mask, 1)
        return model.answer(prefix, prefix_mask, *tokens, train=False)

    return jax.jit(lambda *batch: MODEL.apply(variables(), *batch, method=run))


# Tower --------------------------------------------------------------------------------------


def test_pixels_are_shuffled_as_loops_do():
    tokens = RNG.normal(size=(2, 36, 5)).astype(np.float32)
    for factor in (2, 3):
        side = 6 // factor
        expected = np.zeros((2, side * side, factor * factor * 5), np.float32)
        for row in range(6):
            for column in range(6):
                place = (row // factor) * side + column // factor
                part = (row % factor) * factor + column % factor
                where = slice(part * 5, part * 5 + 5)
                expected[:, place, where] = tokens[:, row * 6 + column]
        np.testing.assert_array_equal(shuffle_pixels(tokens, factor), expected)
    np.testing.assert_array_equal(shuffle_pixels(tokens, 1), tokens)
    for wrong, factor in ((tokens[:, :35], 1), (tokens, 4)):
        with pytest.raises(ValueError, match='no square grid'):
            shuffle_pixels(wrong, factor)


def count(tree):
    return sum(x.size for x in jax.tree.leaves(tree))


def test_the_published_tower_has_its_published_size():
    """304.01 million of InternViT-300M-448px, less the class token and its position."""
    images = jax.ShapeDtypeStruct((1, 448, 448, 3), jnp.float32)
    init = functools.partial(InternViT().init, train=False)
    made = jax.eval_shape(init, jax.random.key(0), images)['params']
    block = 4 * (1024**2 + 1024) + 2 * 1024 * 4096 + 4096 + 1024 + 2 * 2 * 1024 + 2 * 1024
    embedding = 14 * 14 * 3 * 1024 + 1024 + (448 // 14) ** 2 * 1024
    assert count(made) == 24 * block + embedding == 304_012_288 - 2 * 1024
    assert len([name for name in made if name.startswith('block_')]) == 24


def test_the_published_model_joins_its_parts_to_256_image_tokens():
    model = ReceiptsModel(vision=InternViT(), language=Decoder())
    images = jax.ShapeDtypeStruct((1, 448, 448, 3), jnp.uint8)
    words, mask = jnp.zeros((1, 4), jnp.int32), jnp.ones((1, 4), bool)
    made = jax.eval_shape(model.init, jax.random.key(0), images, mask[0], words, mask, words, mask)
    params = made['params']
    assert count(params['projector_up']) == 4 * 1024 * 896 + 896
    assert count(params['cross_attention']) == 4 * (896**2 + 896) + 4 * 896
    head = 896 * 512 + 512 + 2 * 512 + 512 * 256 + 256 + 2 * 256 + 256 * 3 + 3
    assert count(params['classifier']) == head
    encode = functools.partial(model.apply, train=False, method='encode')
    assert jax.eval_shape(encode, made, images).shape == (1, 256, 896)


@pytest.mark.parametrize(('stem', 'norm'), [('patch', 'layer'), ('convolutions', 'rms')])
def test_towers_return_a_token_a_patch_in_the_order_of_the_picture(stem, norm):
    """Without blocks a token depends on the pixels around its own place and on no others."""
    tower = InternViT(
        image_size=16, patch_size=4, width=8, depth=0, heads=2, mlp_width=12, stem=stem, norm=norm
    )
    images = jnp.asarray(IMAGES, jnp.float32) / 255
    shapes = jax.eval_shape(functools.partial(tower.init, train=False), jax.random.key(0), images)
    run = jax.jit(functools.partial(tower.apply, random(shapes), train=False))
    tokens = run(images)
    assert tokens.shape == (3, 16, 8)
    changed = np.abs(run(images.at[:, 14:, 1:3].add(1.0)) - tokens).max((0, 2)).reshape(4, 4)
    assert changed[3, 0] > 1e-3 and not changed[:2].any() and not changed[:, 2:].any()
    assert stem != 'patch' or (changed > 0).sum() == 1


def test_a_block_adds_what_its_scales_let_through():
    for norm in ('layer', 'rms'):
        tower = InternViT(16, 4, 8, 1, 2, 12, norm=norm, layer_scale=0.0)
        images = jnp.asarray(IMAGES, jnp.float32)
        made = tower.init(jax.random.key(0), images, train=False)
        bare = {'params': {k: v for k, v in made['params'].items() if k != 'block_0'}}
        found = [tower.apply(made, images, train=False)]
        found.append(tower.clone(depth=0).apply(bare, images, train=False))
        np.testing.assert_array_equal(*found)
        assert ('bias' in made['params']['block_0']['norm_1']) == (norm == 'layer')


# Parts --------------------------------------------------------------------------------------


def test_cross_attention_is_that_of_loops_in_float64():
    question = RNG.normal(size=(2, 3, 8)).astype(np.float32)
    picture = RNG.normal(size=(2, 5, 8)).astype(np.float32)
    layer = CrossAttention(heads=2, dropout=0.5)
    init = functools.partial(layer.init, train=False)
    made = random(jax.eval_shape(init, jax.random.key(0), question, picture))
    found, weights = layer.apply(made, question, picture, train=False)
    assert weights.shape == (2, 2, 3, 5) and weights.dtype == jnp.float32
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)
    part = jax.tree.map(np.float64, made['params'])

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return x * part[name]['scale'] + part[name]['bias']

    linear = lambda x, name: x @ part[name]['kernel'] + part[name]['bias']
    seen = norm(np.float64(picture), 'picture_norm')
    query = linear(norm(np.float64(question), 'question_norm'), 'query')
    key, value = linear(seen, 'key'), linear(seen, 'value')
    joined = np.zeros((2, 3, 8))
    for b in range(2):
        for head in range(2):
            own = slice(head * 4, head * 4 + 4)
            for q in range(3):
                scores = np.exp([query[b, q, own] @ key[b, n, own] / 2 for n in range(5)])
                scores /= scores.sum()
                np.testing.assert_allclose(weights[b, head, q], scores, atol=1e-5)
                joined[b, q, own] = scores @ value[b, :, own]
    np.testing.assert_allclose(found, linear(joined, 'out'), atol=1e-5)
    # With dropout, what is drawn is still where they looked, not what was dropped.
    rngs = {'dropout': jax.random.key(1)}
    dropped, shown = layer.apply(made, question, picture, train=True, rngs=rngs)
    np.testing.assert_allclose(shown, weights, atol=1e-6)
    assert np.abs(dropped - found).max() > 1e-3


def test_rows_that_fill_a_batch_do_not_move_the_classifier():
    x = RNG.normal(size=(4, 6)).astype(np.float32)
    layer = Classifier(widths=(8, 4), dropouts=(0.0, 0.0))
    made = layer.init(jax.random.key(0), x, None, train=False)
    run = lambda x, mask: layer.apply(made, x, mask, train=True, mutable=['batch_stats'])
    other = np.concatenate([x, 100 + x[:2]])
    found, stats = run(other, jnp.arange(6) < 4)
    alone, own = run(x, jnp.ones(4, bool))
    np.testing.assert_allclose(found[:4], alone, atol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), stats, own)
    assert found.dtype == jnp.float32 and found.shape == (6, 3)


def test_classes_depend_on_the_mean_image_token():
    image = MODEL.apply(variables(), IMAGES, train=False, method='encode')
    assert image.shape == (3, IMAGE_TOKENS, 16)
    run = functools.partial(MODEL.apply, variables(), mask=None, train=False, method='classify')
    mean = jnp.broadcast_to(image.mean(1, keepdims=True), image.shape)
    np.testing.assert_allclose(run(image), run(mean[:, ::-1]), atol=1e-5)


# Answers ------------------------------------------------------------------------------------


def test_padding_changes_no_answer():
    question, answer = said([5, 2, 4], 5), said([4, 1, 3], 4)
    logits = forced()(IMAGES, *question, *answer)
    sums, counts, _ = language.token_rows(logits, *answer)
    assert counts.tolist() == [4, 1, 3]
    long, late = said([5, 2, 4], 8), said([4, 1, 3], 7)
    wide, _, _ = language.token_rows(forced()(IMAGES, *long, *late), *late)
    np.testing.assert_allclose(wide, sums, rtol=1e-5)
    other = np.where(question[1], question[0], 3), question[1]
    dirty = np.where(answer[1], answer[0], 3), answer[1]
    found, _, _ = language.token_rows(forced()(IMAGES, *other, *dirty), *dirty)
    np.testing.assert_allclose(found, sums, rtol=1e-5)
    # The question and the picture do matter.
    for batch in ((IMAGES[::-1], *question), (IMAGES, question[0][:, ::-1], question[1])):
        changed, _, _ = language.token_rows(forced()(*batch, *answer), *answer)
        assert np.abs(changed - sums)[0] > 1e-3


def test_a_token_does_not_see_itself_or_later_ones():
    question, (answer, mask) = said([5, 2, 4], 5), said([4, 4, 4], 4)
    logits = forced()(IMAGES, *question, answer, mask)
    later = forced()(IMAGES, *question, np.where(np.arange(4) < 2, answer, 3), mask)
    np.testing.assert_allclose(later[:, :3], logits[:, :3], atol=1e-5)
    assert np.abs(later[:, 3] - logits[:, 3]).max() > 1e-3


def test_step_by_step_with_a_cache_is_what_the_teacher_forces():
    question, (answer, mask) = said([5, 2, 4], 5), said([4, 4, 4], 4)
    expected = forced()(IMAGES, *question, answer, mask)

    def run(model, images, question, question_mask, answer):
        image = model.encode(images, train=False)
        prefix, prefix_mask, _ = model.prefix(image, question, question_mask, train=False)
        logits, cache = model.prefill(prefix, prefix_mask, jnp.ones(3, jnp.int32))
        found = [logits]
        suffix = MODEL.language.suffix(3, 2, 3)
        for index in range(3):
            tokens = jnp.stack([jnp.full(3, 7), answer[:, index]], 1)  # a beam, and the answer's
            logits, suffix = model.step(cache, suffix, tokens, jnp.int32(index))
            found.append(logits[:, 1])
        return jnp.stack(found, 1)

    call = jax.jit(functools.partial(MODEL.apply, variables(), method=run))
    found = call(IMAGES, *question, answer)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_answers_loss_trains_the_cross_attention():
    question, answer = said([5, 2, 4], 5), said([4, 1, 3], 4)

    def logits(model):
        image = model.encode(IMAGES, train=False)
        prefix, prefix_mask, _ = model.prefix(image, *question, train=False)
        return model.answer(prefix, prefix_mask, *language.shift_right(*answer, 1), train=False)

    def loss(params):
        out = nn.apply(logits, MODEL)({**variables(), 'params': params})
        return language.token_rows(out, *answer)[0].sum()

    gradients = jax.jit(jax.grad(loss))(variables()['params'])
    for part in ('cross_attention', 'vision', 'projector_up', 'language'):
        found = optim.flatten(gradients[part])  # a bias of keys moves no softmax
        assert all(np.abs(g).max() > 1e-6 for path, g in found.items() if 'bias' not in path), part
    assert not any(np.asarray(g).any() for g in jax.tree.leaves(gradients['classifier']))


def whole(model, made, **options):
    """Returns (class logits, answer logits) of all parts in turn."""
    question, (answer, mask) = said([5, 2, 4], 5), said([4, 1, 3], 4)

    def run(model):
        image = model.encode(IMAGES, **options)
        prefix = model.prefix(image, *question, **options)[:2]
        logits = model.answer(*prefix, *language.shift_right(answer, mask, 1), **options)
        return model.classify(image, None, train=False), logits

    return nn.apply(run, model)(made, rngs={'dropout': jax.random.key(5)})


def test_rematerialisation_changes_no_gradient():
    """Under the same names, dropout included."""

    def gradients(remat):
        parts = {'vision': VISION.clone(dropout=0.3, remat=remat)}
        parts['language'] = MODEL.language.clone(dropout=0.3, remat=remat)

        def loss(params):
            made = {**variables(), 'params': params}
            return sum((x**2).sum() for x in whole(MODEL.clone(**parts), made, train=True))

        return jax.jit(jax.value_and_grad(loss))(variables()['params'])

    (loss, found), (again, kept) = gradients(True), gradients(False)
    np.testing.assert_allclose(loss, again, rtol=1e-5)
    scale = max(float(np.abs(x).max()) for x in jax.tree.leaves(kept))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5 * scale)
    jax.tree.map(close, found, kept)


def test_bfloat16_computes_near_float32_in_the_whole_model():
    """Its numbers have 8 bits: logits stay within 3 % of their largest."""
    half = {'dtype': jnp.bfloat16}
    parts = {'vision': VISION.clone(**half), 'language': MODEL.language.clone(**half)}
    run = lambda model: jax.jit(lambda made: whole(model, made, train=False))(variables())
    for found, wanted in zip(run(MODEL.clone(**parts, **half)), run(MODEL), strict=True):
        assert found.dtype == wanted.dtype == jnp.float32
        error = np.abs(found - wanted).max() / np.abs(wanted).max()
        assert 1e-5 < error < 0.03, error
