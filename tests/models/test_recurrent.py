"""The BiLSTM: values against NumPy float64, gradients against a plain scan, the ends of rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.models.recurrent import BiLSTM, bilstm

BATCH, TIME, INPUTS, FEATURES = 4, 6, 3, 5
LENGTHS = np.array([6, 1, 0, 4])


@pytest.fixture(scope='module')
def arguments():
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=shape) * 0.7
    width = 4 * FEATURES
    return dict(
        x=normal(BATCH, TIME, INPUTS),
        kernel=normal(2, INPUTS, width),
        recurrent=normal(2, FEATURES, width),
        bias=normal(2, width),
    )


def _mask(lengths, time):
    return np.arange(time) < np.asarray(lengths)[:, None]


def _oracle(x, kernel, recurrent, bias, lengths):
    """Row by row and frame by frame, each direction over the row's own frames only."""
    sigmoid = lambda z: 1 / (1 + np.exp(-z))
    y = np.zeros((*x.shape[:2], 2 * FEATURES))
    for row, length in enumerate(lengths):
        for direction in range(2):
            h = c = np.zeros(FEATURES)
            frames = range(length) if direction == 0 else reversed(range(length))
            for t in frames:
                z = x[row, t] @ kernel[direction] + h @ recurrent[direction] + bias[direction]
                i, f, g, o = np.split(z, 4)
                c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
                h = sigmoid(o) * np.tanh(c)
                y[row, t, direction * FEATURES : (direction + 1) * FEATURES] = h
    return y


def _plain(x, mask, kernel, recurrent, bias):
    """A scan a direction, left to automatic differentiation."""
    valid = jnp.asarray(mask).T[:, :, None]

    def direction(d):
        def step(carry, frame):
            h, c = carry
            x, valid = frame
            i, f, g, o = jnp.split(x @ kernel[d] + h @ recurrent[d] + bias[d], 4, -1)
            new_c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            new_h = jax.nn.sigmoid(o) * jnp.tanh(new_c)
            h, c = jnp.where(valid, new_h, h), jnp.where(valid, new_c, c)
            return (h, c), jnp.where(valid, new_h, 0)

        zeros = jnp.zeros((x.shape[0], FEATURES))
        return jax.lax.scan(step, (zeros, zeros), (x.swapaxes(0, 1), valid), reverse=d == 1)[1]

    return jnp.concatenate([direction(0), direction(1)], -1).swapaxes(0, 1)


def test_both_directions_match_a_float64_lstm_over_each_row(arguments):
    found = jax.jit(bilstm)(mask=_mask(LENGTHS, TIME), **arguments)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, _oracle(**arguments, lengths=LENGTHS), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('lengths', [LENGTHS, [6] * BATCH], ids=['masked', 'full'])
def test_every_gradient_is_that_of_the_plain_scan(arguments, lengths):
    mask = _mask(lengths, TIME)
    weight = np.random.default_rng(1).normal(size=(BATCH, TIME, 2 * FEATURES))
    gradient = lambda f: jax.jit(
        jax.grad(lambda a: jnp.vdot(f(mask=mask, **a), jnp.float32(weight)))
    )
    arguments = jax.tree.map(jnp.float32, arguments)
    found, expected = gradient(bilstm)(arguments), gradient(_plain)(arguments)
    for name in arguments:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-5, err_msg=name)
    assert not np.asarray(found['x'])[~mask].any()


def test_padding_changes_nothing(arguments):
    arguments = jax.tree.map(jnp.float32, arguments)
    x = arguments.pop('x')
    run = jax.jit(bilstm)
    for length in (1, 5):
        alone = run(x[:, :length], np.ones((BATCH, length), bool), **arguments)
        garbage = np.full((BATCH, length + 4, INPUTS), 1e6, np.float32)
        garbage[:, :length] = x[:, :length]
        found = run(garbage, _mask([length] * BATCH, length + 4), **arguments)
        np.testing.assert_allclose(found[:, :length], alone, rtol=1e-5, atol=1e-6)
        assert not found[:, length:].any()


def test_the_layer_has_one_bias_a_gate_and_remembers_at_the_start():
    layer = BiLSTM(FEATURES)
    x, mask = jnp.zeros((1, 2, INPUTS), jnp.bfloat16), np.ones((1, 2), bool)
    y, variables = jax.jit(layer.init_with_output)(jax.random.key(0), x, mask)
    assert y.dtype == jnp.float32
    count = sum(leaf.size for leaf in jax.tree.leaves(variables))
    assert count == 2 * 4 * FEATURES * (INPUTS + FEATURES + 1)
    gates = np.asarray(variables['params']['bias']).reshape(2, 4, FEATURES)
    assert (gates[:, 1] == 1).all() and not gates[:, [0, 2, 3]].any()  # forget gate open


@pytest.mark.usefixtures('unchecked_shapes')
def test_a_mask_that_does_not_fit_is_refused(arguments):
    with pytest.raises(ValueError, match='mask'):
        bilstm(mask=np.ones((BATCH, TIME - 1), bool), **arguments)
