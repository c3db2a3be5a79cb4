"""Sums over all pairs of rows, tile by tile, so that the similarity matrix is never whole.

Every contrastive loss here needs the same thing: for row i, something summed over the rows j of
*other* keys. A scan visits the tiles of the n×n matrix once; a tile's product serves its rows and
its columns. The backward pass is written by hand: it forms each tile again and adds the tile's two
products to the gradients, four products in all and memory linear in n. Under `jax.jit` over a mesh
and `jax.pmap` nothing need be said; inside `jax.shard_map` the tiled form wants `check_vma=False`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from mmjax.typing import Array, Scalar

LOG_ZERO = -1e30  # stands for log 0: finite, so that no gradient meets inf − inf
AUTO = 2048  # the tile of 'auto': smaller ones cost time on CPU, larger ones memory


def tile_size(n: int, chunk: int | str | None) -> int | None:
    """Returns the side of a tile for `n` rows, or None where the plain form is to be used.

    Args:
      chunk: a side in rows; None for the plain form; 'auto' for the plain form up to 2048 rows and
        above it the side ≤ 2048, a multiple of 128, that wastes the least on padding.

    Raises:
      ValueError: `chunk` is none of these.
    """
    if chunk is None:
        return None
    if chunk == 'auto':
        return None if n <= AUTO else -(-n // (128 * -(-n // AUTO))) * 128
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
        raise ValueError(f"chunk must be a positive int, 'auto' or None, got {chunk!r}")
    return chunk if chunk < n else None


def logsumexp_within(
    z: Float[Array, 'n d'],
    scale: Scalar,
    keys: Int[Array, ' n'],
    *,
    chunk: int | str | None = 'auto',
) -> Float[jax.Array, ' n']:
    """Returns log Σ exp(scale · zᵢ·zⱼ) over the rows j of other keys, for every row i.

    As the matrix is symmetric, only the tiles on and above its diagonal are formed.

    >>> import jax.numpy as jnp
    >>> keys = jnp.array([0, 1, -1])
    >>> [round(float(x), 2) for x in logsumexp_within(jnp.eye(3), 1.0, keys)[:2]]  # log exp 0
    [0.0, 0.0]

    Args:
      z: float32.
      scale: may be traced.
      keys: -1 on rows that take no part; the others must all differ.
      chunk: see `tile_size`.

    Returns:
      float32, `LOG_ZERO` where there is no such row.
    """
    tile = tile_size(len(z), chunk)
    if tile is None:
        return _plain_logsumexp(z, z, scale, keys)[0]
    # Each unordered pair is met once, from its row or from its column. Ordering by position
    # keeps the pairs of a tile below the diagonal out, whatever the keys are.
    position = jnp.where(keys >= 0, jnp.arange(len(z), dtype=jnp.int32), -1)
    rows, columns = _tiled(_logsumexp, z, z, position, tile, scale, True)
    return jnp.logaddexp(rows, columns)


def logsumexp_between(
    a: Float[Array, 'n d'],
    b: Float[Array, 'n d'],
    scale: Scalar,
    keys: Int[Array, ' n'],
    *,
    chunk: int | str | None = 'auto',
) -> tuple[Float[jax.Array, ' n'], Float[jax.Array, ' n']]:
    """Returns log Σ exp(scale · aᵢ·bⱼ) over pairs of different keys: by row and by column.

    >>> import jax.numpy as jnp
    >>> rows, columns = logsumexp_between(jnp.eye(2), 3 * jnp.eye(2)[::-1], 1.0, jnp.arange(2))
    >>> [round(float(x), 2) for x in (*rows, *columns)]
    [3.0, 3.0, 3.0, 3.0]

    Args:
      a, b: float32.
      scale: may be traced.
      keys: of aᵢ and of bᵢ; -1 on rows that take no part.
      chunk: see `tile_size`.

    Returns:
      float32 over j for each aᵢ, and over i for each bⱼ; `LOG_ZERO` where nothing is summed.
    """
    tile = tile_size(len(a), chunk)
    if tile is None:
        return _plain_logsumexp(a, b, scale, keys)
    return _tiled(_logsumexp, a, b, keys, tile, scale, False)


def softplus_between(
    a: Float[Array, 'n d'],
    b: Float[Array, 'n d'],
    scale: Scalar,
    bias: Scalar,
    keys: Int[Array, ' n'],
    *,
    chunk: int | str | None = 'auto',
) -> Float[jax.Array, '']:
    """Returns Σ log(1 + exp(scale · aᵢ·bⱼ + bias)) over pairs of different keys.

    >>> import jax.numpy as jnp
    >>> x = jnp.eye(2)
    >>> round(float(softplus_between(x, x, 1.0, 0.0, jnp.arange(2))), 4)  # 2 ln 2
    1.3863

    Args: as `logsumexp_between`, and `bias`, which may be traced.
    """
    tile = tile_size(len(a), chunk)
    if tile is None:
        scores, allowed = _scores(a, b, scale, keys, keys, False)
        return jnp.sum(jnp.where(allowed, jax.nn.softplus(scores + bias), 0.0))
    return _tiled(_softplus, a, b, keys, tile, scale, bias)


def unit_rows(
    embeddings: Float[Array, 'n d'], mask: Bool[Array, ' n'], normalize: bool
) -> Float[jax.Array, 'n d']:
    """Returns float32 rows of length 1; zero rows and masked ones are 0, without a gradient."""
    z = jnp.where(mask[:, None], jnp.asarray(embeddings, jnp.float32), 0.0)
    if not normalize:
        return z
    square = jnp.sum(z * z, axis=1, keepdims=True)
    positive = square > 1e-30
    return z * jnp.where(positive, jax.lax.rsqrt(jnp.where(positive, square, 1.0)), 0.0)


def inverse(temperature: Scalar) -> Float[jax.Array, '']:
    """Returns 1 / temperature, float32; raises ValueError for a number that is not above 0."""
    if isinstance(temperature, int | float) and not temperature > 0:
        raise ValueError(f'temperature must be above 0, got {temperature}')
    return 1.0 / jnp.asarray(temperature, jnp.float32)


def group_ids(labels: Int[Array, ' n']) -> Int[jax.Array, ' n']:
    """Returns labels numbered from 0, int32."""
    _, group = jnp.unique(labels, return_inverse=True, size=len(labels))
    return group.reshape(-1).astype(jnp.int32)


def row_keys(
    mask: Bool[Array, ' n'], labels: Int[Array, ' n'] | None = None
) -> Int[jax.Array, ' n']:
    """Returns the key of each row: its label's number or its position, -1 where masked."""
    group = jnp.arange(len(mask), dtype=jnp.int32) if labels is None else group_ids(labels)
    return jnp.where(mask, group, -1)


def check(a: Array, b: Array, mask: Array, labels: Array | None) -> None:
    """Raises ValueError unless a, b [n, d], a bool mask [n] and labels [n] fit."""
    n = len(a)
    if a.ndim != 2 or a.shape != b.shape:
        raise ValueError(f'embeddings must be [n, d] of one shape, got {a.shape} and {b.shape}')
    if mask.shape != (n,) or mask.dtype != bool:
        raise ValueError(f'mask must be bool [{n}], got {mask.dtype} {list(mask.shape)}')
    if labels is not None and labels.shape != (n,):
        raise ValueError(f'labels must be [{n}], got {list(labels.shape)}')


def _scores(
    a: Array,
    b: Array,
    scale: Scalar,
    keys_a: Array,
    keys_b: Array,
    ordered: bool,
) -> tuple[jax.Array, jax.Array]:
    """Returns scale · a·bᵀ and which of its pairs count, of one tile or of the whole matrix."""
    # HIGHEST: accelerators otherwise round the factors to 10 or 8 bits, which a temperature
    # of .01 turns into an error of .1 in a logit.
    scores = jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST) * scale
    rows = jnp.asarray(keys_a)[:, None]
    columns = jnp.asarray(keys_b)[None, :]
    allowed = (rows < columns) if ordered else (rows != columns) & (columns >= 0)
    return scores, allowed & (rows >= 0)


def _plain_logsumexp(a: Array, b: Array, scale: Scalar, keys: Array) -> tuple[jax.Array, jax.Array]:
    scores, allowed = _scores(a, b, scale, keys, keys, False)
    scores = jnp.where(allowed, scores, LOG_ZERO)
    return jax.nn.logsumexp(scores, axis=1), jax.nn.logsumexp(scores, axis=0)


def _tiled(function: Callable, a: Array, b: Array, keys: Array, tile: int, *rest: Scalar) -> Any:
    """Cuts rows into tiles, padded with rows that take no part, and joins [n] results again."""
    n = len(a)
    padding = -n % tile
    a, b = (jnp.pad(x, ((0, padding), (0, 0))).reshape(-1, tile, x.shape[1]) for x in (a, b))
    keys = jnp.pad(keys, (0, padding), constant_values=-1).reshape(-1, tile)
    result = function(a, b, keys, *rest)
    return jax.tree.map(lambda x: x.reshape(-1)[:n] if x.ndim else x, result)


def _visits(tiles: int, ordered: bool) -> jax.Array:
    """Returns the (row tile, column tile) indices to visit, int32 [visits, 2]."""
    return jnp.array(
        [(i, j) for i in range(tiles) for j in range(i if ordered else 0, tiles)], jnp.int32
    )


def _gradients(
    a: Array,
    b: Array,
    keys: Array,
    scale: Scalar,
    ordered: bool,
    weigh: Callable,
) -> tuple:
    """Visits every tile with its scores' derivatives W and adds up W·b and Wᵀ·a.

    `weigh(scores, i, j)` returns W before masking, and a pytree of elementwise values whose masked
    sums are returned too. `scale` is not multiplied in.
    """

    def visit(carry: tuple, tile: jax.Array) -> tuple:
        grad_a, grad_b = carry
        i, j = tile
        scores, allowed = _scores(a[i], b[j], scale, keys[i], keys[j], ordered)
        weights, values = jax.tree.map(lambda x: jnp.where(allowed, x, 0.0), weigh(scores, i, j))
        product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
        grad_a = grad_a.at[i].add(product(weights, b[j]))
        grad_b = grad_b.at[j].add(product(weights.T, a[i]))
        return (grad_a, grad_b), jax.tree.map(jnp.sum, values)

    zeros = jnp.zeros_like(a), jnp.zeros_like(b)
    sums: tuple
    (grad_a, grad_b), sums = jax.lax.scan(visit, zeros, _visits(len(a), ordered))
    return grad_a, grad_b, jax.tree.map(jnp.sum, sums)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _logsumexp(
    a: Array, b: Array, keys: Array, scale: Scalar, ordered: bool
) -> tuple[jax.Array, jax.Array]:
    """a, b [tiles, tile, d]; keys [tiles, tile] → logsumexp of rows and of columns, as keys."""

    def visit(carry: tuple, tile: jax.Array) -> tuple:
        rows, columns = carry
        i, j = tile
        scores, allowed = _scores(a[i], b[j], scale, keys[i], keys[j], ordered)
        scores = jnp.where(allowed, scores, LOG_ZERO)
        # Each row and column has its own running shift: with one shift for all, a row whose
        # best match is far from its scale would underflow to log 0 at low temperatures.
        rows = rows.at[i].set(jnp.logaddexp(rows[i], jax.nn.logsumexp(scores, axis=1)))
        columns = columns.at[j].set(jnp.logaddexp(columns[j], jax.nn.logsumexp(scores, axis=0)))
        return (rows, columns), None

    nothing = jnp.full(keys.shape, LOG_ZERO, a.dtype)
    return jax.lax.scan(visit, (nothing, nothing), _visits(len(a), ordered))[0]


def _logsumexp_forward(a: Array, b: Array, keys: Array, scale: Scalar, ordered: bool) -> tuple:
    sums = _logsumexp(a, b, keys, scale, ordered)
    return sums, (a, b, keys, scale, sums)


def _logsumexp_backward(ordered: bool, residuals: tuple, cotangents: tuple) -> tuple:
    a, b, keys, scale, (rows, columns) = residuals
    grad_rows, grad_columns = cotangents

    def weigh(scores: jax.Array, i: jax.Array, j: jax.Array) -> tuple:
        by_row = jnp.exp(scores - rows[i][:, None]) * grad_rows[i][:, None]
        by_column = jnp.exp(scores - columns[j]) * grad_columns[j]
        return by_row + by_column, ()

    grad_a, grad_b, _ = _gradients(a, b, keys, scale, ordered, weigh)
    return grad_a * scale, grad_b * scale, None, jnp.sum(grad_a * a)


_logsumexp.defvjp(_logsumexp_forward, _logsumexp_backward)


@jax.custom_vjp
def _softplus(a: Array, b: Array, keys: Array, scale: Scalar, bias: Scalar) -> jax.Array:
    """a, b [tiles, tile, d]; keys [tiles, tile] → the sum over all tiles, a scalar."""

    def visit(total: None, tile: jax.Array) -> tuple:
        i, j = tile
        scores, allowed = _scores(a[i], b[j], scale, keys[i], keys[j], False)
        return total, jnp.sum(jnp.where(allowed, jax.nn.softplus(scores + bias), 0.0))

    return jnp.sum(jax.lax.scan(visit, None, _visits(len(a), False))[1])


def _softplus_forward(a: Array, b: Array, keys: Array, scale: Scalar, bias: Scalar) -> tuple:
    # The total is a scalar, so its gradient is known up to a factor while the tile is at hand:
    # three products instead of four.
    def weigh(scores: jax.Array, i: jax.Array, j: jax.Array) -> tuple:
        slope = jax.nn.sigmoid(scores + bias)
        return slope, (jax.nn.softplus(scores + bias), slope)

    grad_a, grad_b, (total, grad_bias) = _gradients(a, b, keys, scale, False, weigh)
    return total, (grad_a * scale, grad_b * scale, jnp.sum(grad_a * a), grad_bias)


def _softplus_backward(residuals: tuple, cotangent: jax.Array) -> tuple:
    grad_a, grad_b, grad_scale, grad_bias = jax.tree.map(lambda x: x * cotangent, residuals)
    return grad_a, grad_b, None, grad_scale, grad_bias


_softplus.defvjp(_softplus_forward, _softplus_backward)
