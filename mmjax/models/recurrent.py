"""A bidirectional LSTM that starts and ends where each row does, with a backward pass by hand."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from mmjax import cpu
from mmjax.typing import Array

_init = nn.initializers.variance_scaling(1.0, 'fan_avg', 'uniform', batch_axis=0)


def _bias_init(key, shape, dtype=jnp.float32):
    """Ones for the forget gate (Jozefowicz 2015), zeros for the others; shape [2, 4 · features]."""
    features = shape[-1] // 4
    return jnp.zeros(shape, dtype).at[:, features : 2 * features].set(1)


def bilstm(
    x: Float[Array, 'batch time inputs'],
    mask: Bool[Array, 'batch time'],
    kernel: Float[Array, '2 inputs gates'],
    recurrent: Float[Array, '2 features gates'],
    bias: Float[Array, '2 gates'],
) -> Float[jax.Array, 'batch time 2*features']:
    """Runs an LSTM over each row from its start and another from its last valid frame.

        i, f, o = σ(·), g = tanh(·) of x_t W + h_{t−1} U + b
        c_t = f c_{t−1} + i g,  h_t = o tanh(c_t)                (Hochreiter & Schmidhuber 1997)

    Frames beyond the end of a row leave c and h at 0, where the backward direction begins, and
    have no gradient.

    Args:
      x: finite.
      mask: True on a prefix of each row.
      kernel: W, forward and backward; gates = 4 · features, in the order i, f, g, o.
      recurrent: U.
      bias: b.

    Returns:
      float32, forward then backward, 0 beyond the end of a row.
    """
    x, kernel, recurrent, bias = (v.astype(jnp.float32) for v in (x, kernel, recurrent, bias))
    if mask.shape != x.shape[:2]:
        raise ValueError(f'mask {mask.shape} does not fit x {x.shape}')
    x = x.swapaxes(0, 1)
    valid = mask.T[:, :, None].astype(jnp.float32)
    forward, backward = cpu.bilstm_scan(
        cpu.matmul(x, kernel[0]) + bias[0],
        cpu.matmul(x[::-1], kernel[1]) + bias[1],
        recurrent,
        jnp.stack([valid, valid[::-1]], 1),
    )
    return jnp.concatenate([forward, backward[::-1]], -1).swapaxes(0, 1)


class BiLSTM(nn.Module):
    """One layer of `bilstm`: `features` per direction, one bias per gate.

    2 · 4 · features · (inputs + features + 1) parameters; PyTorch adds a second bias to the first,
    2 · 4 · features more.
    """

    features: int

    @nn.compact
    def __call__(
        self, x: Float[Array, 'batch time inputs'], mask: Bool[Array, 'batch time']
    ) -> Float[jax.Array, 'batch time {2*self.features}']:
        """Runs the layer as `bilstm` says; float32."""
        width = 4 * self.features
        kernel = self.param('kernel', _init, (2, x.shape[-1], width))
        recurrent = self.param('recurrent', _init, (2, self.features, width))
        bias = self.param('bias', _bias_init, (2, width))
        return bilstm(x, mask, kernel, recurrent, bias)
