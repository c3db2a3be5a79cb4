"""Contrastive losses over the rows of a whole batch, with the values they floor and collapse at.

All return float32 whatever comes in, take a mask (False: the row does not exist, and may hold
anything, NaN included), normalise rows to length 1 inside (`normalize=False` if they are already),
can be jitted, and take a `chunk`: rows per tile, so that the similarity matrix is never whole;
'auto' uses the plain form up to 2048 rows; None always. Both forms agree to 1e-5 in values and
gradients; the tiled one has first-order reverse-mode gradients only.

Dividing `total` by `count` gives the usual mean. A batch in which nothing is active returns
Term(0, 0) with a zero, finite gradient.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from mmjax.losses import pairs
from mmjax.losses.term import Term
from mmjax.typing import Array, Scalar


def supcon(
    embeddings: Float[Array, 'n d'],
    labels: Int[Array, ' n'],
    mask: Bool[Array, ' n'],
    *,
    temperature: Scalar,
    chunk: int | str | None = 'auto',
    normalize: bool = True,
) -> tuple[Term, dict[str, Float[jax.Array, '']]]:
    """Computes the supervised contrastive loss: rows of one label attract, all others repel.

    For an anchor i with positives P(i) = {p ≠ i: same label, valid}, z of length 1:
      ℓᵢ = −1/|P(i)| Σ_{p∈P(i)} log( exp(zᵢ·zₚ/T) / Σ_{j≠i, valid} exp(zᵢ·zⱼ/T) )
    summed over anchors with at least one positive; the others are no anchors (they stay negatives)
    and are not counted.

    Lower bound: `supcon_floor` (reached as T → 0). All embeddings equal: `supcon_collapse`. Optimum
    for equal groups at temperature T: `supcon_simplex`. Nothing active: Term(0, 0).

    Source: Khosla et al. 2020, Supervised Contrastive Learning, the L_out form,
    https://arxiv.org/abs/2004.11362.

    >>> import jax.numpy as jnp
    >>> embeddings = jnp.array([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
    >>> labels, mask = jnp.array([7, 7, 5]), jnp.ones(3, bool)
    >>> term, _ = supcon(embeddings, labels, mask, temperature=1.0)
    >>> round(float(term.mean()), 4), float(term.count)  # ln(1 + 1/e), two anchors
    (0.3133, 2.0)

    Args:
      embeddings: of any length.
      labels: any values.
      mask: False where the row does not exist.
      temperature: T > 0.
      chunk: rows per tile, 'auto' or None.
      normalize: whether rows are brought to length 1.

    Returns:
      Term (count = anchors) and diagnostics, float32 scalars: `rows` (valid), `groups` (labels with
      two valid rows or more), `pairs` (unordered positive pairs), `floor` and `collapse` (the mean
      loss at this batch's bound and with all rows equal).

    Raises:
      ValueError: shapes, mask, temperature or chunk are not as above.
    """
    pairs.check(embeddings, embeddings, mask, labels)
    z = pairs.unit_rows(embeddings, mask, normalize)
    scale = pairs.inverse(temperature)
    group = pairs.group_ids(labels)
    n = len(z)

    def by_label(values: Array) -> jax.Array:
        return jax.ops.segment_sum(values, group, num_segments=n)

    size = by_label(mask.astype(jnp.float32))[group]  # valid rows of the same label, self included
    anchors = mask & (size > 1)
    positives = jnp.where(anchors, size - 1, 1.0)
    # Σₚ zᵢ·zₚ = zᵢ·(Σ of the label − zᵢ): the positives need no matrix.
    attraction = scale * jnp.sum(z * (by_label(z)[group] - z), axis=1) / positives
    keys = jnp.where(mask, jnp.arange(n, dtype=jnp.int32), -1)
    repulsion = pairs.logsumexp_within(z, scale, keys, chunk=chunk)

    count = _total(anchors)
    rows = _total(mask)
    term = Term(jnp.sum(jnp.where(anchors, repulsion - attraction, 0.0)), count)
    floor = Term(jnp.sum(jnp.where(anchors, jnp.log(positives), 0.0)), count).mean()
    diagnostics = {
        'rows': rows,
        'groups': jnp.sum(jnp.where(anchors, 1.0 / (positives + 1), 0.0)),
        'pairs': jnp.sum(jnp.where(anchors, positives, 0.0)) / 2,
        'floor': floor,
        'collapse': jnp.where(count > 0, jnp.log(jnp.maximum(rows - 1, 1.0)), 0.0),
    }
    return term, jax.lax.stop_gradient(diagnostics)


def infonce(
    a: Float[Array, 'n d'],
    b: Float[Array, 'n d'],
    mask: Bool[Array, ' n'],
    *,
    temperature: Scalar,
    labels: Int[Array, ' n'] | None = None,
    chunk: int | str | None = 'auto',
    normalize: bool = True,
) -> Term:
    """Computes symmetric InfoNCE (the CLIP loss): aᵢ must find bᵢ among all b, and bᵢ find aᵢ.

      ℓᵢ = ½ (−log softmaxⱼ(aᵢ·bⱼ/T)[i] − log softmaxⱼ(aⱼ·bᵢ/T)[i])
    With `labels`, rows j ≠ i of i's label are left out of both denominators: they are not wrong
    answers (identical texts, other images of one product).

    Lower bound: 0 (T → 0); optimum of n pairs at temperature T: ln(1 + (n−1)·exp(−n/((n−1)T))),
    where aᵢ = bᵢ are the corners of a regular simplex. All embeddings equal: `infonce_collapse`.
    Nothing active: Term(0, 0).

    Source: van den Oord et al. 2018, https://arxiv.org/abs/1807.03748; Radford et al. 2021,
    https://arxiv.org/abs/2103.00020.

    >>> import jax.numpy as jnp
    >>> images = texts = jnp.eye(2)
    >>> term = infonce(images, texts, jnp.ones(2, bool), temperature=1.0)
    >>> round(float(term.mean()), 4), float(term.count)  # ln(1 + 1/e)
    (0.3133, 2.0)

    Args:
      a, b: row i of both belonging together.
      mask: True where both exist.
      temperature: T > 0.
      labels: any values, or None.
      chunk: rows per tile, 'auto' or None.
      normalize: whether rows are brought to length 1.

    Returns:
      Term; count = pairs that have a negative. That is every valid pair, unless all valid rows are
      one pair (or one label): their loss is 0 without a gradient, and they are not counted.

    Raises:
      ValueError: shapes, mask, temperature or chunk are not as above.
    """
    pairs.check(a, b, mask, labels)
    a = pairs.unit_rows(a, mask, normalize)
    b = pairs.unit_rows(b, mask, normalize)
    scale = pairs.inverse(temperature)
    keys = pairs.row_keys(mask, labels)
    rows, columns = pairs.logsumexp_between(a, b, scale, keys, chunk=chunk)
    positive = scale * jnp.sum(a * b, axis=1)
    losses = jax.nn.softplus(rows - positive) + jax.nn.softplus(columns - positive)
    active = mask & (rows > pairs.LOG_ZERO / 2)
    return Term(jnp.sum(jnp.where(active, losses / 2, 0.0)), _total(active))


def sigmoid(
    a: Float[Array, 'n d'],
    b: Float[Array, 'n d'],
    mask: Bool[Array, ' n'],
    *,
    scale: Scalar,
    bias: Scalar,
    labels: Int[Array, ' n'] | None = None,
    chunk: int | str | None = 'auto',
    normalize: bool = True,
) -> Term:
    """Computes the pairwise sigmoid loss (SigLIP): every pair is a binary classification.

      ℓ = −Σᵢⱼ log σ(yᵢⱼ (scale · aᵢ·bⱼ + bias)), y = 1 where i = j, −1 elsewhere
    With `labels`, pairs i ≠ j of one label are left out.

    The sum over all pairs is divided by the number of valid *rows* (count), as published: the mean
    is a row's positive plus all its negatives, and grows with the batch at a fixed bias. Lower
    bound: 0 (scale → ∞). All embeddings of n rows equal: ln(1 + exp(−t)) + (n−1)·ln(1 + exp(t)),
    t = scale + bias. Nothing valid: Term(0, 0).

    Source: Zhai et al. 2023, Sigmoid Loss for Language Image Pre-Training,
    https://arxiv.org/abs/2303.15343.

    >>> import jax.numpy as jnp
    >>> a = jnp.eye(2)
    >>> term = sigmoid(a, a, jnp.ones(2, bool), scale=1.0, bias=0.0)
    >>> round(float(term.mean()), 4), float(term.count)  # ln(1 + 1/e) + ln 2
    (1.0064, 2.0)

    Args:
      a, b: row i of both belonging together.
      mask: True where both exist.
      scale, bias: published start: 10 and −10.
      labels: any values, or None.
      chunk: rows per tile, 'auto' or None.
      normalize: whether rows are brought to length 1.

    Returns:
      Term; count = valid rows.

    Raises:
      ValueError: shapes, mask or chunk are not as above.
    """
    pairs.check(a, b, mask, labels)
    a = pairs.unit_rows(a, mask, normalize)
    b = pairs.unit_rows(b, mask, normalize)
    scale = jnp.asarray(scale, jnp.float32)
    bias = jnp.asarray(bias, jnp.float32)
    negatives = pairs.softplus_between(a, b, scale, bias, pairs.row_keys(mask, labels), chunk=chunk)
    positives = jax.nn.softplus(-(scale * jnp.sum(a * b, axis=1) + bias))
    return Term(jnp.sum(jnp.where(mask, positives, 0.0)) + negatives, _total(mask))


def supcon_floor(sizes: Sequence[int] | np.ndarray) -> float:
    """Returns Σ n·ln(n−1) / Σ n over groups of n ≥ 2 valid rows: no SupCon mean is lower.

    By Jensen: the softmax of an anchor's n−1 positives sums to at most 1. Reached as T → 0 by
    groups that are points apart from each other. `sizes` are the valid rows of each group; groups
    of one row have no anchors and are left out; 0 without any anchor.

    >>> supcon_floor([1, 2, 2])
    0.0
    """
    sizes = np.asarray(sizes, np.float64)
    sizes = sizes[sizes > 1]
    return float(np.sum(sizes * np.log(sizes - 1)) / np.sum(sizes)) if len(sizes) else 0.0


def supcon_collapse(n_valid: int | np.integer) -> float:
    """Returns ln(n−1), the SupCon mean at any temperature when all n valid rows are equal.

    >>> round(supcon_collapse(3), 4)
    0.6931
    """
    return math.log(n_valid - 1)


def supcon_simplex(groups: int, size: int, temperature: float) -> float:
    """Returns the least SupCon mean of `groups` groups of `size` rows each, at temperature T.

    ln(size−1 + (groups−1)·size·exp(−g/((g−1)T))), g = groups: every group one point, the points a
    regular simplex (cosine −1/(g−1)), which needs d ≥ g−1. For P identities × K images and both
    modalities, groups = P and size = 2K. Source: Graf et al. 2021,
    https://arxiv.org/abs/2102.08817.

    >>> round(supcon_simplex(2, 2, 1.0), 4)  # ln(1 + 2 exp(−2))
    0.2395
    """
    if groups == 1:
        return math.log(size - 1)
    gap = groups / ((groups - 1) * temperature)
    return math.log(size - 1 + (groups - 1) * size * math.exp(-gap))


def infonce_collapse(n_valid: int | np.integer) -> float:
    """Returns ln n, the InfoNCE mean when all embeddings are equal (n pairs, no labels).

    >>> round(infonce_collapse(2), 4)
    0.6931
    """
    return math.log(n_valid)


def _total(flags: Array) -> jax.Array:
    return jnp.sum(flags, dtype=jnp.float32)
