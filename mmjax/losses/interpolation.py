"""The primary loss of ContraBin: pairs are matched, with targets softened by likeness within.

Its intermediate loss, of interpolated against binary embeddings, is `contrastive.infonce`. Masks,
`chunk`, precision and empty batches are as in `mmjax.losses.contrastive`.
"""

import jax
import jax.numpy as jnp

from mmjax.losses import contrastive, pairs
from mmjax.losses.term import Term


def primary(
    a, b, mask, *, temperature, softness=1.0, labels=None, normalize=True, chunk='auto'
) -> Term:
    """Symmetric cross-entropy of aᵢ·bⱼ/T with targets between one-hot and soft.

      L = a·bᵀ/T,  S = softmax by row of (a·aᵀ + b·bᵀ)/2T,  P = (1 − s)·I + s·S
      ℓᵢ = ½ Σⱼ Pᵢⱼ (−log softmax by row of L − log softmax by column of L)[i, j]
    Columns take Pᵀ for targets, whose rows need not sum to 1. s = 0 is `contrastive.infonce`; s = 1
    with `normalize=False` is the published loss, whose value then depends on the size of the
    embeddings and on the batch. Gradients flow through the targets too, as published. With
    `labels`, the k valid rows of one label share the one-hot part, 1/k each instead of I: none is
    a wrong answer to another (identical texts). InfoNCE leaves such rows out instead; here they
    are answers, as they are of the soft part.

    Lower bound: 0 (T → 0, every pair found, rows apart), with `labels` and s = 0 the mean of ln k.
    All embeddings equal: ln n for every s,
    `contrastive.infonce_collapse`; the gradient is 0 there. Near it the targets are as flat as the
    logits: at s = 1 the gradient falls with the cube of the rows' spread (at cosine .9999 it is
    thousands of times smaller than at s = 0), the loss stays at ln n. Nothing active: Term(0, 0).

    Source: Zhang et al. 2025, Pre-Training Representations of Binary Code Using Contrastive
    Learning, equations 2 to 6, https://arxiv.org/abs/2210.05102.

    Args:
      a, b: float [n, d], row i of both belonging together.
      mask: bool [n], True where both are there.
      temperature: T > 0, a number or a traced scalar.
      softness: s in [0, 1], a number or a traced scalar.
      labels: int [n] or None.
      normalize: whether rows are brought to length 1.
      chunk: int | 'auto' | None, rows a tile.

    Returns:
      Term; count = valid rows, but 0 where only one is: it has no wrong answer and no gradient.

    Raises:
      ValueError: shapes, temperature, softness or chunk are not as above.
    """
    contrastive._check(a, b, mask, labels)
    if isinstance(softness, int | float) and not 0 <= softness <= 1:
        raise ValueError(f'softness must be from 0 to 1, got {softness}')
    a, b = (contrastive._unit(x, mask, normalize) for x in (a, b))
    scale = contrastive._inverse(temperature)
    keys = contrastive._keys(mask, None)

    # −log softmax of the matching pair as softplus(others − own): near 0 it keeps its digits, where
    # the difference of two logarithms of size 1/T would lose them.
    rows, columns = pairs.logsumexp_between(a, b, scale, keys, chunk=chunk)
    matched = scale * jnp.sum(a * b, axis=1)
    by_row, by_column = jax.nn.softplus(rows - matched), jax.nn.softplus(columns - matched)
    own_pair = (by_row + by_column) / 2

    z = jnp.concatenate([a, b], axis=1)  # z·zᵀ = a·aᵀ + b·bᵀ
    own = scale / 2 * jnp.sum(z * z, axis=1)
    others = pairs.logsumexp_within(z, scale / 2, keys, chunk=chunk)
    moved = _moved(
        (a, z, matched + by_row, jnp.logaddexp(own, others), keys),
        (b, z, matched + by_column, keys),
        scale,
        pairs.tile_size(len(a), chunk),
    )
    soft = jax.nn.sigmoid(own - others) * own_pair + moved

    hard = own_pair
    if labels is not None:
        (mean_a, mean_b), alike = _shared((a, b), mask, labels)
        answers = scale * jnp.sum(a * mean_b + b * mean_a, axis=1) / 2
        # A row alone under its label keeps the digits of softplus.
        hard = jnp.where(alike > 1, own_pair + matched - answers, own_pair)
    active = mask & (rows > pairs.NONE / 2)
    losses = (1 - softness) * hard + softness * soft
    return Term(jnp.sum(jnp.where(active, losses, 0.0)), jnp.sum(active, dtype=jnp.float32))


def _shared(sides, mask, labels):
    """Returns for every row the means of its label's valid rows [n, d], and how many there are.

    The rows that `mask` leaves out must be 0 in `sides`.
    """
    group = contrastive._group(labels)
    by_label = lambda x: jax.ops.segment_sum(x, group, num_segments=len(mask))[group]
    alike = by_label(mask.astype(jnp.float32))
    return [by_label(x) / jnp.maximum(alike, 1.0)[:, None] for x in sides], alike


def _moved(by_row, by_column, scale, tile):
    """Returns Σ_{j≠i} Sᵢⱼ (½(rowsᵢ + columnsⱼ) − Lᵢⱼ), float32 [n], by strips of `tile` rows.

    Args:
      by_row: (a [n, d], z [n, 2d], logsumexp of the rows of L [n], and of the logits of S [n],
        keys [n], −1 on rows that take no part).
      by_column: (b [n, d], z [n, 2d], logsumexp of the columns of L [n], keys [n]).
      tile: rows a strip; None for the whole matrix at once.
    """
    b, z, columns, keys = by_column
    product = lambda x, y: jnp.matmul(x, y.T, precision=jax.lax.Precision.HIGHEST)

    def strip(part):
        a_part, z_part, rows, shift, keys_part = part
        allowed = (keys_part[:, None] != keys) & (keys_part[:, None] >= 0) & (keys >= 0)
        logits = scale / 2 * product(z_part, z) - shift[:, None]
        # Masked before the exponential: a pair left out must not overflow into the gradient.
        targets = jnp.exp(jnp.where(allowed, logits, pairs.NONE))
        losses = (rows[:, None] + columns) / 2 - scale * product(a_part, b)
        return jnp.sum(targets * losses, axis=1)

    if tile is None:
        return strip(by_row)
    n = len(b)

    def cut(x):
        padding = [(0, -n % tile)] + [(0, 0)] * (x.ndim - 1)
        fill = -1 if x.dtype == jnp.int32 else 0
        return jnp.pad(x, padding, constant_values=fill).reshape(-1, tile, *x.shape[1:])

    # Recomputed in the backward pass: otherwise it would keep every strip.
    strips = jax.lax.map(jax.checkpoint(strip), jax.tree.map(cut, by_row))
    return strips.reshape(-1)[:n]
