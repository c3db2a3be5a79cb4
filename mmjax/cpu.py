"""Every trick for XLA:CPU, behind plain functions.

`benchmarks/cpu.py` times each against its plain form.

On other devices the functions compute the same numbers, by the same program unless they say
otherwise. A trick that gains less than 5 % there goes.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, UInt16

from mmjax.typing import Array, Keys


def materialize(x: Array) -> Array:
    """Returns x, which on CPU is written to memory before anything reads it.

    XLA:CPU would compute new moments a second time for the weights that they change, from old ones
    that it then had to copy before they are overwritten; and weights likewise for their average.
    """
    return jax.lax.optimization_barrier(x) if jax.default_backend() == 'cpu' else x


def matmul(
    x: Float[Array, '*rows inputs'], kernel: Float[Array, 'inputs features'], *_, **options
) -> Float[Array, '*rows features']:
    """Multiplies x by kernel, as one product of rows.

    XLA:CPU takes up to three times as long for the gradient of a product whose left side has more
    axes.

    Args:
      x, kernel: the factors.
      *_: what `jax.lax.dot_general` has for dimension numbers, so that a layer of Flax can call
        this in its place; not read.
      **options: further arguments of `jax.lax.dot_general`.
    """
    rows = x.reshape(-1, x.shape[-1])
    y = jax.lax.dot_general(rows, kernel, (((1,), (0,)), ((), ())), **options)
    return y.reshape(*x.shape[:-1], kernel.shape[-1])


def conv1x1(
    x: Float[Array, 'batch height width inputs'],
    kernel: Float[Array, 'inputs features'],
    stride: int = 1,
) -> Float[Array, 'batch rows columns features']:
    """Convolves with a kernel of one pixel, as a product: XLA:CPU's convolution is slower."""
    return x[:, ::stride, ::stride] @ kernel


def depthwise(
    x: Float[Array, 'batch time channels'],
    kernel: Float[Array, 'taps channels'],
    stride: int = 1,
) -> Float[Array, 'batch frames channels']:
    """Convolves each channel with its own column of the kernel, of an odd number of taps.

    Shifted copies are multiplied and added: XLA:CPU fuses the sum and its derivatives, where its
    grouped convolution is 10 times slower and more. Returns ⌈time / stride⌉ frames.
    """
    taps = len(kernel)
    last = (x.shape[1] - 1) // stride * stride  # the last frame a kernel is centred at
    x = jnp.pad(x, ((0, 0), (taps // 2, taps // 2), (0, 0)))
    return sum(x[:, k : k + last + 1 : stride] * kernel[k] for k in range(taps))


def argmax(logits: Float[Array, 'batch vocab']) -> Int[Array, ' batch']:
    """Returns the index of the largest logit, of equal ones the first.

    A sort of one is much faster than argmax over a vocabulary.
    """
    return jax.lax.top_k(logits, 1)[1][:, 0]


def random_bits16(key: Keys, shape: tuple[int, ...]) -> UInt16[Array, '...']:
    """Draws 16 random bits per value, two from each draw of 32; half the time of 32 per value."""
    pairs = *shape[:-1], -(-shape[-1] // 2)
    bits = jax.random.bits(key, pairs, jnp.uint32)
    bits = jax.lax.bitcast_convert_type(bits, jnp.uint16)
    return bits.reshape(*shape[:-1], 2 * pairs[-1])[..., : shape[-1]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _once(function, x):
    return jax.lax.optimization_barrier(function(jax.lax.optimization_barrier(x)))


def _once_backward(function, x, cotangent):
    return jax.lax.optimization_barrier(jax.vjp(function, x)[1](cotangent))


_once.defvjp(lambda function, x: (_once(function, x), x), _once_backward)


def elementwise(
    function: Callable[[jax.Array], jax.Array], x: Float[Array, '*shape']
) -> Float[Array, '*shape']:
    """Returns function(x); for activations that cost more than reading x.

    On CPU it is evaluated once forward and once backward: left to itself XLA:CPU fuses it into
    every product and sum beside it, and evaluates it for each. Elsewhere it is plain function(x).
    """
    return _once(function, x) if jax.default_backend() == 'cpu' else function(x)


def attend(
    query: Float[Array, 'batch queries heads size'],
    key: Float[Array, 'batch keys kv_heads size'],
    value: Float[Array, 'batch keys kv_heads size'],
    mask: Bool[Array, '#batch #heads #queries keys'] | None,
) -> Float[Array, 'batch queries heads size']:
    """Computes scaled dot-product attention with heads before rows, where products are fast.

    Inputs are float32. `jax.nn.dot_product_attention` multiplies with heads behind rows.
    """
    groups = query.shape[2] // key.shape[2]
    if groups > 1:
        key, value = (jnp.repeat(x, groups, axis=2) for x in (key, value))
    scores = (query * query.shape[-1] ** -0.5).transpose(0, 2, 1, 3) @ key.transpose(0, 2, 3, 1)
    if mask is not None:
        scores = jnp.where(mask, scores, -0.7 * jnp.finfo(scores.dtype).max)
    return (jax.nn.softmax(scores, -1) @ value.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)


@jax.custom_vjp
def bilstm_scan(
    forward: Float[Array, 'time batch gates'],
    backward: Float[Array, 'time batch gates'],
    recurrent: Float[Array, '2 features gates'],
    valid: Float[Array, 'time 2 batch 1'],
) -> tuple[Float[Array, 'time batch features'], Float[Array, 'time batch features']]:
    """Scans both directions of an LSTM at once.

    What a loop costs on a CPU is the number of its small operations: so the directions share every
    one of them, the gates are kept, and all weight gradients are products after the loop.

    Args:
      forward, backward: the inputs of the gates i, f, g, o of each direction, those of the backward
        one reversed in time; gates = 4 · features.
      recurrent: U of both directions.
      valid: in 0, 1; the same order in time.

    Returns:
      The states of each direction, in the same order.
    """
    return _bilstm_forward(forward, backward, recurrent, valid)[0]


def _bilstm_forward(forward, backward, recurrent, valid):
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


def _bilstm_backward(residuals, cotangents):
    states, c, gates, recurrent, valid = residuals
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


bilstm_scan.defvjp(_bilstm_forward, _bilstm_backward)
