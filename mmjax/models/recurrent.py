"""A bidirectional LSTM that starts and ends where each row does, with a backward pass by hand."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax.models.layers import product

_init = nn.initializers.variance_scaling(1.0, 'fan_avg', 'uniform', batch_axis=0)


def _bias_init(key, shape, dtype=jnp.float32):
    """Ones for the forget gate (Jozefowicz 2015), zeros for the others; shape [2, 4 · features]."""
    features = shape[-1] // 4
    return jnp.zeros(shape, dtype).at[:, features : 2 * features].set(1)


def bilstm(
    x: jax.Array, mask: jax.Array, kernel: jax.Array, recurrent: jax.Array, bias: jax.Array
) -> jax.Array:
    """Runs an LSTM over each row from its start and another from its last valid frame.

        i, f, o = σ(·), g = tanh(·) of x_t W + h_{t−1} U + b
        c_t = f c_{t−1} + i g,  h_t = o tanh(c_t)                (Hochreiter & Schmidhuber 1997)

    Frames beyond the end of a row leave c and h at 0, where the backward direction begins, and
    have no gradient.

    Args:
      x: [batch, time, inputs], finite.
      mask: bool [batch, time], True on a prefix of each row.
      kernel: W [2, inputs, 4 · features], forward and backward; gates in the order i, f, g, o.
      recurrent: U [2, features, 4 · features].
      bias: b [2, 4 · features].

    Returns:
      [batch, time, 2 · features] float32, forward then backward, 0 beyond the end of a row.
    """
    x, kernel, recurrent, bias = (v.astype(jnp.float32) for v in (x, kernel, recurrent, bias))
    if mask.shape != x.shape[:2]:
        raise ValueError(f'mask {mask.shape} does not fit x {x.shape}')
    x = x.swapaxes(0, 1)
    valid = mask.T[:, :, None].astype(jnp.float32)
    forward, backward = _recur(
        product(x, kernel[0]) + bias[0],
        product(x[::-1], kernel[1]) + bias[1],
        recurrent,
        jnp.stack([valid, valid[::-1]], 1),
    )
    return jnp.concatenate([forward, backward[::-1]], -1).swapaxes(0, 1)


@jax.custom_vjp
def _recur(forward, backward, recurrent, valid):
    """Scans both directions at once.

    Takes the gates' inputs of each direction [time, batch, 4 · features], those of the backward
    one reversed in time, U [2, features, 4 · features] and valid [time, 2, batch, 1] in 0, 1.
    Returns the states of each direction [time, batch, features], in the same order.

    What a loop costs on a CPU is the number of its small operations: so the directions share every
    one of them, the gates are kept, and all weight gradients are products after the loop.
    """
    return _recur_forward(forward, backward, recurrent, valid)[0]


def _recur_forward(forward, backward, recurrent, valid):
    features = recurrent.shape[1]
    # σ(z) = (1 + tanh(z / 2)) / 2: with it one tanh serves all four gates.
    scale = jnp.repeat(jnp.array([0.5, 0.5, 1.0, 0.5]), features)
    shift = jnp.repeat(jnp.array([0.5, 0.5, 0.0, 0.5]), features)

    def step(carry, xs):
        h, c = carry  # [2, batch, features]
        forward, backward, valid = xs
        z = jnp.einsum('dbh,dhz->dbz', h, recurrent) + jnp.stack([forward, backward])
        gates = jnp.tanh(z * scale) * scale + shift
        i, f, g, o = jnp.split(gates, 4, -1)
        c = (f * c + i * g) * valid
        h = o * jnp.tanh(c) * valid
        return (h, c), (h[0], h[1], c, gates)

    zeros = jnp.zeros((2, forward.shape[1], features))
    _, (*states, c, gates) = jax.lax.scan(step, (zeros, zeros), (forward, backward, valid))
    return tuple(states), (states, c, gates, recurrent, valid)


def _recur_backward(kept, cotangents):
    states, c, gates, recurrent, valid = kept
    features = recurrent.shape[1]
    transposed = recurrent.swapaxes(1, 2)
    before = lambda x: jnp.concatenate([jnp.zeros_like(x[:1]), x[:-1]])

    def step(carry, xs):
        dh, dc = carry
        forward, backward, gates, c, c_before, valid = xs
        i, f, g, o = jnp.split(gates, 4, -1)
        tanh_c = jnp.tanh(c)
        dh = dh + jnp.stack([forward, backward])
        # Beyond the end of a row c is 0, so that dc is all that has to be stopped there.
        dc = (dc + dh * o * (1 - tanh_c**2)) * valid
        dz = jnp.concatenate(
            [
                dc * g * i * (1 - i),
                dc * c_before * f * (1 - f),
                dc * i * (1 - g**2),
                dh * tanh_c * o * (1 - o),
            ],
            -1,
        )
        return (jnp.einsum('dbz,dzh->dbh', dz, transposed), dc * f), (dz[0], dz[1])

    zeros = jnp.zeros_like(c[0])
    xs = (*cotangents, gates, c, before(c), valid)
    _, inputs = jax.lax.scan(step, (zeros, zeros), xs, reverse=True)
    products = [
        before(h).reshape(-1, features).T @ dz.reshape(-1, 4 * features)
        for h, dz in zip(states, inputs, strict=True)
    ]
    return *inputs, jnp.stack(products), jnp.zeros_like(valid)


_recur.defvjp(_recur_forward, _recur_backward)


class BiLSTM(nn.Module):
    """One layer of `bilstm`: `features` a direction, one bias a gate.

    2 · 4 · features · (inputs + features + 1) parameters; PyTorch adds a second bias to the first,
    2 · 4 · features more.
    """

    features: int

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Maps x [batch, time, inputs], mask [batch, time] to [batch, time, 2·features] float32."""
        width = 4 * self.features
        kernel = self.param('kernel', _init, (2, x.shape[-1], width))
        recurrent = self.param('recurrent', _init, (2, self.features, width))
        bias = self.param('bias', _bias_init, (2, width))
        return bilstm(x, mask, kernel, recurrent, bias)
