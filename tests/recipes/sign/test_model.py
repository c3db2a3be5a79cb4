"""The sign-language model: its size, what a row may see, and that time is not pooled away."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.models import convolutions, packing
from mmjax.models.mobilenet1d import InvertedResidual, Row, SqueezeExcitation
from mmjax.recipes.sign.model import PARTS, CrossAttention, Sign, Stream, temporal_squares

STREAMS = (Stream('pose', 0, 6, 8), Stream('hands', 6, 16, 4))
BLOCKS = (Row(8, 8, 3, 1, True, nn.relu), Row(12, 6, 5, 2, True, nn.hard_swish))
TINY = functools.partial(
    Sign,
    7,
    STREAMS,
    stem=8,
    blocks=BLOCKS,
    width=12,
    lstm_features=6,
    attention_width=8,
    attention_heads=2,
)
VARIANTS = {'baseline': {}, 'next steps': dict(cross_attention=True, lstm_layers=2)}

TRAIN = dict.fromkeys(PARTS, True)
SLOW = pytest.mark.slow  # a compilation a length

# Programs that run once: fast code would take longer to make than it saves.
_jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})


def _random(length, seed=0, rows=1):
    return np.random.default_rng(seed).normal(size=(rows, length, 16)).astype(np.float32)


def _variables(module, *inputs, **options):
    """Random parameters and lived-in batch statistics, drawn without compiling anything."""
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        if path[0].key == 'batch_stats':
            return jnp.float32(rng.uniform(0.5, 1.5, leaf.shape))
        if path[-1].key == 'scale':
            return jnp.float32(rng.uniform(0.5, 1.5, leaf.shape))
        return jnp.float32(rng.normal(size=leaf.shape) * max(leaf.shape[0], 4) ** -0.5)

    make = functools.partial(module.init, **options)
    shapes = jax.eval_shape(make, jax.random.key(0), *inputs)
    return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.fixture(scope='module', params=VARIANTS)
def model(request):
    """(the model, its variables, jitted evaluation)."""
    model = TINY(**VARIANTS[request.param])
    variables = _variables(model, _random(8), np.ones((1, 8), bool))
    return model, variables, _jit(model.apply)


def _train(model, variables, x, mask):
    return model.apply(
        variables,
        x,
        mask,
        train=TRAIN,
        mutable=['batch_stats'],
        rngs={'dropout': jax.random.key(0)},
    )


def test_the_published_layout_has_the_published_number_of_parameters():
    shapes = jax.eval_shape(
        lambda: Sign(101).init(jax.random.key(0), jnp.zeros((1, 4, 6516)), jnp.ones((1, 4), bool))
    )
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes['params']))
    second_bias = 2 * 4 * 128  # PyTorch's LSTM: two directions, four gates
    assert count == 14_180_464 - second_bias


@pytest.mark.parametrize(
    'lengths', [(1, 6, 7), pytest.param((2, 3, 4, 5, 8, 9), marks=SLOW)], ids=str
)
def test_what_a_row_is_padded_to_does_not_change_its_log_probabilities(model, lengths):
    _, variables, evaluate = model
    for length in lengths:
        alone = evaluate(variables, _random(length, length), np.ones((1, length), bool))
        alone = jax.nn.log_softmax(alone[0])
        x = np.full((3, 13, 16), 1e6, np.float32)
        x[0, :length] = _random(length, length)[0]
        mask = np.arange(13) < np.array([length, 13, 0])[:, None]
        logits = evaluate(variables, x, mask)
        assert logits.dtype == jnp.float32 and logits.shape == (3, 13, 7)
        assert np.isfinite(logits).all()
        found = jax.nn.log_softmax(logits[0, :length])
        np.testing.assert_allclose(found, alone, atol=1e-5, err_msg=f'length {length}')


def test_what_rows_are_padded_to_does_not_change_a_training_step():
    model = TINY(dropout=0.0)
    # Enough frames that no feature's variance over them is near 0, which would magnify rounding.
    lengths = np.array([9, 4, 5, 8, 9, 7, 6, 9, 3, 8, 7, 9])
    x = _random(9, rows=len(lengths))
    masks = {time: np.arange(time) < lengths[:, None] for time in (9, 14)}
    variables = _variables(model, x, masks[9])
    step = _jit(functools.partial(_train, model))
    padded = np.full((len(x), 14, 16), 1e6, np.float32)
    padded[:, :9] = x
    short, short_stats = step(variables, x, masks[9])
    long, long_stats = step(variables, padded, masks[14])
    np.testing.assert_allclose(long[masks[14]], short[masks[9]], rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(long_stats, short_stats, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('attends', [False, pytest.param(True, marks=SLOW)])
def test_frames_encoded_without_their_padding_make_the_same_step(attends):
    """Whether a batch fits or not: one program does both."""
    model, x = TINY(dropout=0.0, cross_attention=attends), _random(10, rows=4)
    masks = [np.arange(10) < np.array(n)[:, None] for n in ([7, 10, 3, 4], [9, 10, 8, 10])]
    variables = _variables(model, x, masks[0])

    traces = []

    def step(params, x, mask, packed_length):
        traces.append(packed_length)

        def loss(params):
            found, stats = model.apply(
                {**variables, 'params': params},
                x,
                mask,
                train=TRAIN,
                packed_length=packed_length,
                mutable=['batch_stats'],
                rngs={'dropout': jax.random.key(0)},
            )
            found = jnp.where(mask[..., None], found, 0)
            return jnp.sum(found**2), (found, stats)

        return jax.value_and_grad(loss, has_aux=True)(params)

    packed = _jit(functools.partial(step, packed_length=6.5))
    padded = _jit(functools.partial(step, packed_length=None))
    for mask in masks:
        assert (mask.sum() <= 32) == (mask is masks[0])  # ⌈6.5 · 4 / 8⌉ · 8 rows
        bad = np.where(mask[..., None], x, np.float32(np.nan))
        found = packed(variables['params'], bad, mask)
        expected = padded(variables['params'], x, mask)
        chex.assert_trees_all_close(found, expected, rtol=2e-4, atol=2e-5)
        assert np.abs(found[1]['encoder_pose']['linear_1']['kernel']).max() > 1e-3
    assert traces == [6.5, None]


def test_packed_frames_are_encoded_again_for_their_gradient(monkeypatch):
    """As micro-batches are, under a checkpoint and in a scan, with the dropout of a plain cond."""
    model, x = TINY(dropout=0.5), _random(10, rows=8).reshape(2, 4, 10, 16)
    masks = np.arange(10) < np.array([[7, 10, 3, 4], [9, 10, 8, 10]])[..., None]
    variables = _variables(model, x[0], masks[0])

    def total(params, wrap):
        def body(sum_, item):
            x, mask, seed = item
            found, _ = model.apply(
                {**variables, 'params': params},
                x,
                mask,
                train=TRAIN,
                packed_length=6.5,
                mutable=['batch_stats'],
                rngs={'dropout': jax.random.key(seed)},
            )
            return sum_ + jnp.sum(jnp.where(mask[..., None], found, 0) ** 2), None

        return jax.lax.scan(wrap(body), 0.0, (x, masks, jnp.arange(2)))[0]

    run = lambda wrap: _jit(jax.value_and_grad(functools.partial(total, wrap=wrap)))(
        variables['params']
    )
    found = run(jax.checkpoint)
    monkeypatch.setattr(packing, 'cond', jax.lax.cond)
    expected = run(lambda body: body)
    chex.assert_trees_all_close(found, expected, rtol=2e-4, atol=2e-4)


def test_packed_frames_have_dropout_of_their_own():
    model, x = TINY(dropout=0.5), _random(10, rows=2)
    mask = np.arange(10) < np.array([[5], [4]])
    variables = _variables(model, x, mask)

    def run(seed, train, packed_length=5.0):
        inputs = (jnp.asarray(x), jnp.asarray(mask))
        encode = lambda model: model._encode(*inputs, train, packed_length)
        rngs = {'dropout': jax.random.key(seed)}
        return nn.apply(encode, model)(variables, rngs=rngs)

    same, other = (np.asarray(run(seed, True)) for seed in (1, 2))
    np.testing.assert_array_equal(same, run(1, True))
    assert (np.abs(same - other)[mask] > 0).any(1).all()  # in every frame
    np.testing.assert_allclose(run(1, False)[mask], run(2, False, None)[mask], atol=1e-5)
    assert np.abs(run(1, False)[mask] - same[mask]).max() > 0.1


def test_empty_rows_an_empty_batch_and_huge_padding_make_no_nan():
    model, x = TINY(), _random(6, rows=2)
    variables = _variables(model, x, np.ones((2, 6), bool))

    @_jit
    def gradient(params, x, mask):
        def loss(params):
            logits, stats = _train(model, {**variables, 'params': params}, x, mask)
            return jnp.sum(jnp.where(mask[:, :, None], logits, 0) ** 2), stats

        return jax.grad(loss, has_aux=True)(params)

    for lengths in ([6, 0], [0, 0]):
        mask = np.arange(6) < np.array(lengths)[:, None]
        huge = np.where(mask[:, :, None], x, np.float32(1e30))  # its square is not finite
        found = jax.tree.leaves(gradient(variables['params'], huge, mask))
        assert all(np.isfinite(leaf).all() for leaf in found)


@pytest.mark.parametrize('collapsed', [False, True])
def test_temporal_collapse_does_not_come_back(monkeypatch, collapsed):
    """What the LSTM reads moves with the input; were it pooled over time, the score would tell.

    Behind the LSTM, or within a stride of the transposed convolution, even equal features differ.
    """
    model, x, lengths = TINY(), _random(40, rows=2), np.array([40, 29])
    mask = np.arange(40) < lengths[:, None]
    if collapsed:
        upsample = convolutions.upsample
        pool = lambda x: jnp.broadcast_to(x.mean(1, keepdims=True), x.shape)
        pooled = lambda x, kernel: upsample(pool(x), kernel)
        monkeypatch.setattr(convolutions, 'upsample', pooled)

    @_jit
    def start(key):
        variables = model.init(key, x, mask)
        logits, changed = model.apply(variables, x, mask, mutable=['intermediates'])
        (read,), (hidden,) = (changed['intermediates'][name] for name in ('lstm_inputs', 'hidden'))
        return logits, read, hidden, temporal_squares(read, mask)

    logits, read, hidden, (squares, count) = start(jax.random.key(0))
    assert read.shape == (2, 40, 12) and hidden.shape == (2, 40, 12)
    variance = squares / count
    if collapsed:  # where the variances of all frames see nothing
        assert variance.max() < 1e-10 < 1e-6 < np.asarray(hidden)[:, 8:20].var(1).mean()
    else:
        assert variance.min() > 1e-2 and np.asarray(logits)[:, 8:20].var(1).mean() > 1e-6


def test_bfloat16_is_float32_within_its_rounding_and_keeps_the_mask():
    """Of 8 bits, over about 10 layers: logits of size 1 agree to 0.1; neighbours change nothing."""
    narrow, wide = (TINY(dtype=dtype) for dtype in (jnp.bfloat16, jnp.float32))
    x, lengths = _random(13, rows=3), np.array([13, 7, 1])
    mask = np.arange(13) < lengths[:, None]
    variables = _variables(wide, x, mask)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
    evaluate = {model: _jit(model.apply) for model in (narrow, wide)}
    found, wanted = (evaluate[model](variables, x, mask) for model in (narrow, wide))
    assert found.dtype == jnp.float32 and np.abs(wanted[mask]).mean() > 0.3
    apart = np.abs(found - wanted)[mask].max()
    assert 1e-5 < apart < 0.1  # and it is not float32
    for row, length in enumerate(lengths):
        alone = np.full((3, 13, 16), 1e6, np.float32)
        alone[1, :length] = x[row, :length]
        own = evaluate[narrow](variables, alone, np.arange(13) < np.array([0, length, 0])[:, None])
        np.testing.assert_allclose(own[1, :length], found[row, :length], atol=1e-5)
    short = evaluate[narrow](variables, x[1:2, :7], mask[1:2, :7])
    np.testing.assert_allclose(short[0], found[1, :7], atol=1e-5)


def test_every_stream_reaches_the_logits(model):
    _, variables, evaluate = model
    x, mask = _random(9), np.ones((1, 9), bool)
    before = evaluate(variables, x, mask)
    for stream in STREAMS:
        changed = x.copy()
        changed[:, :, stream.start : stream.end] *= -1
        assert np.abs(evaluate(variables, changed, mask) - before).max() > 1e-4


def test_cross_attention_does_not_let_frames_meet():
    streams = [jnp.float32(_random(5, seed, 2)[..., :width]) for seed, width in ((0, 3), (1, 6))]
    layer = CrossAttention(8, 2)
    before, variables = _jit(layer.init_with_output)(jax.random.key(0), streams)
    changed = [streams[0], streams[1].at[:, 2].add(1.0)]
    after = _jit(layer.apply)(variables, changed)
    for x, a, b in zip(streams, before, after, strict=True):
        assert a.shape == x.shape
        moved = np.abs(a - b).max((0, 2))
        assert moved[2] > 1e-4 and np.delete(moved, 2).max() < 1e-6


def test_squeeze_excitation_reads_the_mean_of_valid_frames():
    x = np.random.default_rng(0).normal(size=(2, 5, 4))
    mask = np.arange(5) < np.array([3, 5])[:, None]
    layer = SqueezeExcitation(3)
    found, variables = _jit(layer.init_with_output)(
        jax.random.key(0), jnp.float32(np.where(mask[..., None], x, 1e6)), mask
    )
    params = jax.tree.map(np.asarray, variables['params'])
    mean = np.stack([row[valid].mean(0) for row, valid in zip(x, mask, strict=True)])
    linear = lambda name, y: y @ params[name]['kernel'] + params[name]['bias']
    scale = np.clip(linear('expand', np.maximum(linear('reduce', mean), 0)) / 6 + 0.5, 0, 1)
    expected = x * scale[:, None]
    np.testing.assert_allclose(np.asarray(found)[mask], expected[mask], rtol=1e-4, atol=1e-6)


def test_a_block_adds_its_input_where_the_shape_stays_and_only_there():
    x, mask = jnp.ones((1, 6, 8)), np.ones((1, 6), bool)
    for row, kept in ((BLOCKS[0], True), (BLOCKS[1], False)):
        block = InvertedResidual(row)
        variables = _variables(block, x, mask, train=False)
        silent = jax.tree.map(jnp.zeros_like, variables['params']['project_norm'])
        params = {**variables['params'], 'project_norm': silent}
        apply = _jit(functools.partial(block.apply, train=False))
        y = apply({**variables, 'params': params}, x, mask)
        np.testing.assert_allclose(y, x if kept else jnp.zeros_like(y))
        assert ('expand' in params) == (row.expanded != 8)


def test_faults_of_shape_are_told(model):
    model, variables, _ = model
    with pytest.raises(ValueError, match='≥16'):
        model.apply(variables, np.zeros((1, 3, 15)), np.ones((1, 3), bool))
