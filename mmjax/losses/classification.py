"""Cross-entropy of classes, a value a row."""

import jax.numpy as jnp
import optax

from mmjax.losses.term import Term


def cross_entropy_rows(logits, labels, *, smoothing=0.0):
    """Returns −log softmax(logits)[label] of each row, float32 [n]; never negative.

    With `smoothing` s, targets are (1 − s)·one-hot + s/C (Szegedy 2016,
    https://arxiv.org/abs/1512.00567): the floor is then their entropy.

    Args:
      logits: float [n, C].
      labels: int [n], in 0 … C − 1.
      smoothing: s in [0, 1).

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


def classification(rows, mask) -> Term:
    """Returns the Term of per-row losses [n] where `mask` bool [n] is True; count = rows."""
    return Term(jnp.where(mask, rows, 0.0).sum(), mask.sum(dtype=jnp.float32))
