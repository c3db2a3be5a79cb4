"""Real tokens side by side, so that what works on each alone does not work on padding."""

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
