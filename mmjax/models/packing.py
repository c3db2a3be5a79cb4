"""Real tokens side by side, so that what works on each alone does not work on padding."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Int, PyTree, Shaped

from mmjax.typing import Array


class PackIndices(NamedTuple):
    """Where the real tokens of a batch stand once they are packed, in their order.

    mask: True on real tokens; order: the position in the flattened batch that each packed row is
    from, those of padding last; inverse: the packed row of each token, meaningless on padding.
    """

    mask: Bool[Array, 'batch length']
    order: Int[Array, ' packed']
    inverse: Int[Array, 'batch length']


def packed_rows(mask: Shaped[Array, 'batch length'], packed_length: float | None) -> int:
    """Returns how many packed rows a batch gets, at most all of its tokens.

    Args:
      mask: of the batch.
      packed_length: packed rows per row of the batch; None or 0 for all of its tokens. The result
        is a multiple of 8, except for all.
    """
    if not packed_length:
        return mask.size
    return min(math.ceil(packed_length * len(mask) / 8) * 8, mask.size)


def pack_indices(mask: Shaped[Array, 'batch length'], rows: int) -> PackIndices:
    """Returns where the tokens of `mask` stand in `rows` packed rows.

    There must not be more real tokens than rows: those beyond would be lost.
    """
    mask = mask.astype(bool)
    flat = mask.reshape(-1)
    order = jnp.argsort(~flat, stable=True)[:rows]
    inverse = jnp.clip(jnp.cumsum(flat) - 1, 0, rows - 1).reshape(mask.shape)
    return PackIndices(mask, order, inverse)


# Each is declared as the other's transpose, so that none is a scatter, which is slow on CPU.
@jax.custom_vjp
def pack(
    x: Shaped[Array, 'batch length *features'], indices: PackIndices
) -> Shaped[Array, ' packed *features']:
    """Maps a batch to its packed rows; rows beyond the last token are those of padding."""
    return x.reshape(-1, *x.shape[2:])[indices.order]


@jax.custom_vjp
def unpack(
    y: Shaped[Array, ' packed *features'], indices: PackIndices
) -> Shaped[Array, 'batch length *features']:
    """Maps packed rows to a batch, 0 on padding."""
    mask = indices.mask.reshape(*indices.mask.shape, *[1] * (y.ndim - 1))
    return jnp.where(mask, y[indices.inverse], 0)


def _pack_backward(indices, cotangent):
    # Rows beyond the last token came from padding, whose gradient is of no use.
    return unpack(cotangent, indices), None


def _unpack_backward(indices, cotangent):
    real = jnp.arange(len(indices.order)) < indices.mask.sum()
    packed = pack(cotangent, indices)
    return jnp.where(real.reshape(-1, *[1] * (packed.ndim - 1)), packed, 0), None


pack.defvjp(lambda x, indices: (pack(x, indices), indices), _pack_backward)
unpack.defvjp(lambda y, indices: (unpack(y, indices), indices), _unpack_backward)


def cond(
    pred: Bool[Array, ''], usual: Callable, rare: Callable, params: PyTree, *data: PyTree
) -> PyTree:
    """Returns usual(params, *data) where `pred`, and rare(params, *data) where not.

    A `jax.lax.cond` under whose gradient the rare branch costs nothing until it is taken: there
    each branch fills with zeros the residuals of the other, weights included. Here `rare` has none
    and is run again for its gradient. Both are functions of their arguments alone. Only params, a
    pytree of float arrays, have a gradient: that of `data` is 0.
    """
    treedef = None

    @jax.custom_vjp
    def run(pred, params, data):
        call = lambda function: lambda params, data: function(params, *data)
        return jax.lax.cond(pred, call(usual), call(rare), params, data)

    def forward(pred, params, data):
        def usual_vjp(params, data):
            nonlocal treedef
            outputs, vjp = jax.vjp(lambda params: usual(params, *data), params)
            residuals, treedef = jax.tree.flatten(vjp)
            return outputs, residuals

        def rare_only(params, data):
            residuals = jax.eval_shape(usual_vjp, params, data)[1]
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), residuals)
            return rare(params, *data), zeros

        outputs, residuals = jax.lax.cond(pred, usual_vjp, rare_only, params, data)
        return outputs, (pred, params, data, residuals)

    def backward(saved, cotangent):
        def pull_usual(params, data, residuals, cotangent):
            return jax.tree.unflatten(treedef, residuals)(cotangent)[0]

        def pull_rare(params, data, residuals, cotangent):
            return jax.vjp(lambda params: rare(params, *data), params)[1](cotangent)[0]

        pred, *rest = saved
        return None, jax.lax.cond(pred, pull_usual, pull_rare, *rest, cotangent), None

    run.defvjp(forward, backward)
    return run(pred, params, data)
