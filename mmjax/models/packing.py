"""Real tokens side by side, so that what works on each alone does not work on padding."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Places(NamedTuple):
    """Where the real tokens of a batch stand once they are packed, in their order.

    mask: bool [batch, length], True on real tokens; order: int [room], the place in the flattened
    batch that each packed row is from, those of padding last; back: int [batch, length], the packed
    row of each token, meaningless on padding.
    """

    mask: jax.Array
    order: jax.Array
    back: jax.Array


def rows_for(mask: jax.Array, room: float | None) -> int:
    """Returns how many packed rows a batch of mask [batch, length] gets, at most all of its tokens.

    room: tokens a row of the batch, on average; None or 0 for all. A multiple of 8, but for all.
    """
    return min(math.ceil(room * len(mask) / 8) * 8, mask.size) if room else mask.size


def places(mask: jax.Array, room: int) -> Places:
    """Returns the places of the tokens of `mask` [batch, length] in `room` rows.

    There must not be more real tokens than rows: those beyond would be lost.
    """
    mask = mask.astype(bool)
    flat = mask.reshape(-1)
    order = jnp.argsort(~flat, stable=True)[:room]
    return Places(mask, order, jnp.clip(jnp.cumsum(flat) - 1, 0, room - 1).reshape(mask.shape))


# Each is the other's transpose. Told so, none is a scatter, which is slow on CPU.
@jax.custom_vjp
def pack(x: jax.Array, where: Places) -> jax.Array:
    """Maps x [batch, length, …] to [room, …]; rows beyond the last token are those of padding."""
    return x.reshape(-1, *x.shape[2:])[where.order]


@jax.custom_vjp
def unpack(y: jax.Array, where: Places) -> jax.Array:
    """Maps y [room, …] to [batch, length, …], 0 on padding."""
    mask = where.mask.reshape(*where.mask.shape, *[1] * (y.ndim - 1))
    return jnp.where(mask, y[where.back], 0)


def _pack_back(where, change):
    # Rows beyond the last token came from padding, whose change is of no use.
    return unpack(change, where), None


def _unpack_back(where, change):
    real = jnp.arange(len(where.order)) < where.mask.sum()
    packed = pack(change, where)
    return jnp.where(real.reshape(-1, *[1] * (packed.ndim - 1)), packed, 0), None


pack.defvjp(lambda x, where: (pack(x, where), where), _pack_back)
unpack.defvjp(lambda y, where: (unpack(y, where), where), _unpack_back)


def either(fits, usual, rare, params, *data):
    """Returns usual(params, *data) where `fits`, a bool, and rare(params, *data) where not.

    A `jax.lax.cond` under whose gradient the rare branch costs nothing until it is taken: there
    each branch fills with zeros what the other keeps, weights included. Here `rare` keeps nothing
    and is run again for its gradient. Both are functions of their arguments alone. Only params, a
    pytree of float arrays, have a gradient: what comes back to `data` is 0.
    """
    form = None

    @jax.custom_vjp
    def run(fits, params, data):
        call = lambda function: lambda params, data: function(params, *data)
        return jax.lax.cond(fits, call(usual), call(rare), params, data)

    def forward(fits, params, data):
        def keep(params, data):
            nonlocal form
            found, pull = jax.vjp(lambda params: usual(params, *data), params)
            kept, form = jax.tree.flatten(pull)
            return found, kept

        def bare(params, data):
            kept = jax.eval_shape(keep, params, data)[1]
            return rare(params, *data), jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), kept)

        found, kept = jax.lax.cond(fits, keep, bare, params, data)
        return found, (fits, params, data, kept)

    def backward(saved, change):
        def pull(params, data, kept, change):
            return jax.tree.unflatten(form, kept)(change)[0]

        def again(params, data, kept, change):
            return jax.vjp(lambda params: rare(params, *data), params)[1](change)[0]

        fits, *rest = saved
        return None, jax.lax.cond(fits, pull, again, *rest, change), None

    run.defvjp(forward, backward)
    return run(fits, params, data)
