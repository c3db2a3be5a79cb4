"""Cross-entropy of classes, one value per row."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Bool, Float, Int

from mmjax.losses.term import Term
from mmjax.typing import Array


def cross_entropy_rows(
    logits: Float[Array, 'batch classes'],
    labels: Int[Array, ' batch'],
    *,
    smoothing: float = 0.0,
) -> Float[jax.Array, ' batch']:
    """Computes the cross-entropy of each row.

      ℓ = −Σₖ qₖ log softmax(logits)ₖ, q = (1 − s)·one-hot + s/C for C classes
    Floor: the entropy of q, which is 0 for s = 0. An empty batch returns no rows.

    Source: label smoothing, Szegedy et al. 2016, https://arxiv.org/abs/1512.00567.

    >>> import jax.numpy as jnp
    >>> logits, labels = jnp.log(jnp.array([[0.5, 0.25, 0.25]])), jnp.array([0])
    >>> round(float(cross_entropy_rows(logits, labels)[0]), 4)  # −ln .5
    0.6931

    Args:
      logits: any float type; computed in float32.
      labels: in 0 … C − 1.
      smoothing: s in [0, 1).

    Returns:
      float32, 0 or more.

    Raises:
      ValueError: shapes or a smoothing that do not fit.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(f'logits must be [n, C], labels [n]: {logits.shape}, {labels.shape}')
    if not 0 <= smoothing < 1:
        raise ValueError(f'smoothing must be in [0, 1), got {smoothing}')
    logits = jnp.asarray(logits, jnp.float32)
    if not smoothing:
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    one_hot = labels[:, None] == jnp.arange(logits.shape[1])
    return optax.softmax_cross_entropy(logits, optax.smooth_labels(one_hot * 1.0, smoothing))


def classification(rows: Float[Array, ' batch'], mask: Bool[Array, ' batch']) -> Term:
    """Sums the losses of the valid rows.

    Floor: that of `rows`. Without a valid row: Term(0, 0) with a zero gradient.

    >>> import jax.numpy as jnp
    >>> term = classification(jnp.array([1.0, jnp.nan]), jnp.array([True, False]))
    >>> float(term.total), float(term.count)
    (1.0, 1.0)

    Args:
      rows: losses, of `cross_entropy_rows`.
      mask: False where a row does not exist; its loss may be anything, NaN included.

    Returns:
      Term; count = valid rows.
    """
    return Term(jnp.where(mask, rows, 0.0).sum(), mask.sum(dtype=jnp.float32))
