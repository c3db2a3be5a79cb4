"""The primary loss of ContraBin: pairs are matched, with targets softened by likeness within.

Its intermediate loss, of interpolated against binary embeddings, is `contrastive.infonce`. Masks,
`chunk`, precision and empty batches are as in `mmjax.losses.contrastive`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from mmjax.losses import pairs
from mmjax.losses.term import Term
from mmjax.typing import Array, Scalar


def primary(
    a: Float[Array, 'n d'],
    b: Float[Array, 'n d'],
    mask: Bool[Array, ' n'],
    *,
    temperature: Scalar,
    softness: Scalar = 1.0,
    labels: Int[Array, ' n'] | None = None,
    normalize: bool = True,
    chunk: int | str | None = 'auto',
) -> Term:
    """Computes the symmetric cross-entropy of aᵢ·bⱼ/T with targets between one-hot and soft.

      L = a·bᵀ/T,  S = softmax by row of (a·aᵀ + b·bᵀ)/2T,  P = (1 − s)·I + s·S
      ℓᵢ = ½ Σⱼ Pᵢⱼ (−log softmax by row of L − log softmax by column of L)[i, j]
    Columns take Pᵀ for targets, whose rows need not sum to 1. s = 0 is `contrastive.infonce`; s = 1
    with `normalize=False` is the published loss, whose value then depends on the size of the
    embeddings and on the batch. Gradients flow through the targets too, as published. With
    `labels`, the k valid rows of one label share the one-hot part, 1/k each instead of I: none is
    a wrong answer to another (identical texts). InfoNCE leaves such rows out instead; here they
    are answers, as they are of the soft part.

    Lower bound: 0 (T → 0, every pair found, rows apart), with `labels` and s = 0 the mean of ln k.
    All embeddings equal: ln n for every s, `contrastive.infonce_collapse`; the gradient is 0 there.
    Near it the targets are as flat as the logits: at s = 1 the gradient falls with the cube of the
    rows' spread (at cosine .9999 it is thousands of times smaller than at s = 0), the loss stays at
    ln n. Nothing active: Term(0, 0) with a zero gradient.

    Source: Zhang et al. 2025, Pre-Training Representations of Binary Code Using Contrastive
    Learning, equations 2 to 6, https://arxiv.org/abs/2210.05102.

    >>> import jax.numpy as jnp
    >>> a = jnp.eye(2)
    >>> term = primary(a, a, jnp.ones(2, bool), temperature=1.0, softness=0.0)
    >>> round(float(term.mean()), 4), float(term.count)  # InfoNCE: ln(1 + 1/e)
    (0.3133, 2.0)

    Args:
      a, b: row i of both belonging together.
      mask: True where both exist.
      temperature: T > 0.
      softness: s in [0, 1].
      labels: any values, or None.
      normalize: whether rows are brought to length 1.
      chunk: rows per tile, 'auto' or None.

    Returns:
      Term; count = valid rows, but 0 where only one is: it has no wrong answer and no gradient.

    Raises:
      ValueError: shapes, temperature, softness or chunk are not as above.
    """
    pairs.check(a, b, mask, labels)
    if isinstance(softness, int | float) and not 0 <= softness <= 1:
        raise ValueError(f'softness must be from 0 to 1, got {softness}')
    a = pairs.unit_rows(a, mask, normalize)
    b = pairs.unit_rows(b, mask, normalize)
    scale = pairs.inverse(temperature)
    keys = pairs.row_keys(mask)

    # −log softmax of the matching pair as softplus(others − matched): near 0 it keeps its digits,
    # where the difference of two logarithms of size 1/T would lose them.
    rows, columns = pairs.logsumexp_between(a, b, scale, keys, chunk=chunk)
    matched = scale * jnp.sum(a * b, axis=1)
    by_row = jax.nn.softplus(rows - matched)
    by_column = jax.nn.softplus(columns - matched)
    infonce = (by_row + by_column) / 2

    z = jnp.concatenate([a, b], axis=1)  # z·zᵀ = a·aᵀ + b·bᵀ
    diagonal = scale / 2 * jnp.sum(z * z, axis=1)
    others = pairs.logsumexp_within(z, scale / 2, keys, chunk=chunk)
    off_diagonal = _off_diagonal(
        (a, z, matched + by_row, jnp.logaddexp(diagonal, others), keys),
        (b, z, matched + by_column, keys),
        scale,
        pairs.tile_size(len(a), chunk),
    )
    soft = jax.nn.sigmoid(diagonal - others) * infonce + off_diagonal

    hard = infonce
    if labels is not None:
        (mean_a, mean_b), group_size = _label_means((a, b), mask, labels)
        answers = scale * jnp.sum(a * mean_b + b * mean_a, axis=1) / 2
        # A row alone under its label keeps the digits of softplus.
        hard = jnp.where(group_size > 1, infonce + matched - answers, infonce)
    active = mask & (rows > pairs.LOG_ZERO / 2)
    losses = (1 - softness) * hard + softness * soft
    return Term(jnp.sum(jnp.where(active, losses, 0.0)), jnp.sum(active, dtype=jnp.float32))


def _label_means(
    sides: tuple[jax.Array, ...], mask: Array, labels: Array
) -> tuple[list[jax.Array], jax.Array]:
    """Returns for every row the means of its label's valid rows [n, d], and their number [n].

    The rows that `mask` leaves out must be 0 in `sides`.
    """
    group = pairs.group_ids(labels)
    by_label = lambda x: jax.ops.segment_sum(x, group, num_segments=len(mask))[group]
    group_size = by_label(mask.astype(jnp.float32))
    return [by_label(x) / jnp.maximum(group_size, 1.0)[:, None] for x in sides], group_size


def _off_diagonal(
    by_row: tuple[jax.Array, ...],
    by_column: tuple[jax.Array, ...],
    scale: jax.Array,
    tile: int | None,
) -> jax.Array:
    """Returns Σ_{j≠i} Sᵢⱼ (½(rowsᵢ + columnsⱼ) − Lᵢⱼ), float32 [n], by strips of `tile` rows.

    Args:
      by_row: (a [n, d], z [n, 2d], logsumexp of the rows of L [n], and of the logits of S [n],
        keys [n], −1 on rows that take no part).
      by_column: (b [n, d], z [n, 2d], logsumexp of the columns of L [n], keys [n]).
      tile: rows per strip; None for the whole matrix at once.
    """
    b, z, columns, keys = by_column
    product = lambda x, y: jnp.matmul(x, y.T, precision=jax.lax.Precision.HIGHEST)

    def strip(part: tuple[jax.Array, ...]) -> jax.Array:
        a_part, z_part, rows, shift, keys_part = part
        allowed = (keys_part[:, None] != keys) & (keys_part[:, None] >= 0) & (keys >= 0)
        logits = scale / 2 * product(z_part, z) - shift[:, None]
        # Masked before the exponential: a pair left out must not overflow into the gradient.
        targets = jnp.exp(jnp.where(allowed, logits, pairs.LOG_ZERO))
        losses = (rows[:, None] + columns) / 2 - scale * product(a_part, b)
        return jnp.sum(targets * losses, axis=1)

    if tile is None:
        return strip(by_row)
    n = len(b)

    def cut(x: jax.Array) -> jax.Array:
        padding = [(0, -n % tile)] + [(0, 0)] * (x.ndim - 1)
        fill = -1 if x.dtype == jnp.int32 else 0
        return jnp.pad(x, padding, constant_values=fill).reshape(-1, tile, *x.shape[1:])

    # Recomputed in the backward pass: otherwise it would keep every strip.
    strips = jax.lax.map(jax.checkpoint(strip), jax.tree.map(cut, by_row))
    return strips.reshape(-1)[:n]
