"""Connectionist temporal classification: labels known in order, but not at which frames they fall.

The probability of a label sequence is summed over all alignments: paths of one symbol per frame
that become the labels once repeats are collapsed and blanks dropped. Source: Graves et al. 2006,
Connectionist Temporal Classification, https://doi.org/10.1145/1143844.1143891.
"""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Bool, Float, Int

from mmjax.losses.term import Term
from mmjax.typing import Array, Scalar


def ctc_rows(
    logits: Float[Array, 'batch frames vocab'],
    mask: Bool[Array, 'batch frames'],
    labels: Int[Array, 'batch labels'],
    label_mask: Bool[Array, 'batch labels'],
    *,
    blank: int = 0,
    blank_penalty: Scalar = 0.0,
) -> tuple[Float[jax.Array, ' batch'], Bool[jax.Array, ' batch']]:
    """Computes −log p(labels | logits) of each row, and which rows can be aligned at all.

      ℓ = −log Σ_{paths that become the labels} Π_t softmax(logits_t)[path_t]
    A label takes a frame, and two equal ones in a row need a blank between them: a row is feasible
    if it has as many frames as labels plus adjacent repeats, and its labels lie in 0 … V−1 and are
    not the blank. The others have loss 0 and a zero gradient, and do not touch the rest. A row
    without labels is valid: its one path is all blank. Floor 0, where values are clamped; the
    gradient is that of the unclamped loss. An empty batch returns no rows.

    Source: Graves et al. 2006, https://doi.org/10.1145/1143844.1143891.

    >>> import jax.numpy as jnp
    >>> frames, label = jnp.ones((1, 2), bool), jnp.ones((1, 1), bool)
    >>> losses, feasible = ctc_rows(jnp.zeros((1, 2, 2)), frames, jnp.array([[1]]), label)
    >>> round(float(losses[0]), 4), bool(feasible[0])  # three of four paths: −ln ¾
    (0.2877, True)

    Args:
      logits: any float type; computed in float32.
      mask: True for the first frames of a row; padding may hold anything, NaN included.
      labels: ids in 0 … V − 1 other than the blank.
      label_mask: True for the first labels of a row.
      blank: index of the blank.
      blank_penalty: is subtracted from the blank's logits, so that training starts with fewer
        blanks. A network learns to cancel it: the logits that are decoded need it as well.

    Returns:
      float32 losses, and `feasible`.

    Raises:
      ValueError: shapes or masks that do not fit.
    """
    _check(logits, mask)
    if label_mask.shape != labels.shape or label_mask.dtype != bool or len(labels) != len(logits):
        raise ValueError(
            f'labels must be [{len(logits)}, L] with a bool mask of that shape, got '
            f'{labels.shape} and {label_mask.dtype} {label_mask.shape}'
        )
    size = logits.shape[2]
    repeats = jnp.sum((labels[:, 1:] == labels[:, :-1]) & label_mask[:, 1:], axis=1)
    needed = jnp.sum(label_mask, axis=1) + repeats
    known = (labels >= 0) & (labels < size) & (labels != blank)
    feasible = (jnp.sum(mask, axis=1) >= needed) & jnp.all(known | ~label_mask, axis=1)
    # An infeasible row is computed as one without labels on zeros: what is selected away later
    # must be finite too, since 0 · inf in its backward pass is NaN.
    frames = mask & feasible[:, None]
    label_paddings = ~(label_mask & feasible[:, None])
    logits = jnp.where(frames[..., None], jnp.asarray(logits, jnp.float32), 0.0)
    logits = logits - blank_penalty * jax.nn.one_hot(blank, size)
    # One column more keeps the width above 0 where no row has a label.
    labels = jnp.pad(labels, ((0, 0), (0, 1)))
    label_paddings = jnp.pad(label_paddings, ((0, 0), (0, 1)), constant_values=True)
    # Products with one-hot labels inside must not round log-probabilities to the bfloat16 or TF32
    # of an accelerator, and log 0 must lie below the loss of any row: 1e5 does not.
    with jax.default_matmul_precision('highest'):
        losses = optax.ctc_loss(
            logits,
            (~frames).astype(jnp.float32),
            labels,
            label_paddings.astype(jnp.float32),
            blank_id=blank,
            log_epsilon=-1e30,
        )
    losses = jnp.where(feasible, losses, 0.0)
    # Rounding gives −8e-8 and the like; the gradient of a maximum would be lost there.
    return losses + jax.lax.stop_gradient(jnp.maximum(losses, 0.0) - losses), feasible


def ctc(
    losses: Float[Array, ' batch'],
    label_counts: Int[Array, ' batch'],
    feasible: Bool[Array, ' batch'],
    mask: Bool[Array, ' batch'],
) -> tuple[Term, dict[str, Float[jax.Array, '']]]:
    """Sums the losses of the feasible rows, and computes diagnostics.

    Floor 0. Without a feasible row: Term(0, 0) with a zero gradient, and diagnostics of 0.

    >>> import jax.numpy as jnp
    >>> valid = jnp.array([True, True])
    >>> losses, feasible = jnp.array([6.0, 0.0]), jnp.array([True, False])
    >>> term, diagnostics = ctc(losses, jnp.array([3, 9]), feasible, valid)
    >>> float(term.mean()), float(diagnostics['ctc_per_label']), float(diagnostics['infeasible'])
    (6.0, 2.0, 1.0)

    Args:
      losses, feasible: of `ctc_rows`.
      label_counts: labels of each row.
      mask: False where the row does not exist.

    Returns:
      Term (count = feasible rows) and diagnostics, float32 scalars: `infeasible` (rows left out)
      and `ctc_per_label`, the mean of loss / max(labels, 1), which is PyTorch's 'mean'.
    """
    active = mask & feasible
    losses = jnp.where(active, losses, 0.0)
    count = jnp.sum(active, dtype=jnp.float32)
    per_label = Term(jnp.sum(losses / jnp.maximum(label_counts, 1)), count).mean()
    diagnostics = {
        'infeasible': jnp.sum(mask & ~feasible, dtype=jnp.float32),
        'ctc_per_label': per_label,
    }
    return Term(jnp.sum(losses), count), jax.lax.stop_gradient(diagnostics)


def smoothing(
    logits: Float[Array, 'batch frames vocab'], mask: Bool[Array, 'batch frames']
) -> tuple[Float[jax.Array, ' batch'], Float[jax.Array, ' batch']]:
    """Computes the KL divergence of each frame's distribution from the uniform one.

      ℓ = KL(p ‖ 1/V) = ln V + Σₖ pₖ ln pₖ
    a term beside CTC, with a small weight. Floor 0 (uniform), at most ln V (certain). A row without
    frames, and so an empty batch, has a sum and a count of 0 with a zero gradient.

    Source: Kim et al. 2018, Improved Training for Online End-to-end Speech Recognition Systems,
    https://arxiv.org/abs/1711.02212.

    >>> import jax.numpy as jnp
    >>> logits = jnp.log(jnp.array([[[0.75, 0.25]]]))
    >>> sums, counts = smoothing(logits, jnp.ones((1, 1), bool))
    >>> round(float(sums[0]), 4), float(counts[0])  # ln 2 + .75 ln .75 + .25 ln .25
    (0.1308, 1.0)

    Args:
      logits: any float type; computed in float32.
      mask: False on padding, which may hold anything.

    Returns:
      float32 sums over the valid frames of each row, and their number.

    Raises:
      ValueError: shapes or a mask that do not fit.
    """
    _check(logits, mask)
    logits = jnp.where(mask[..., None], jnp.asarray(logits, jnp.float32), 0.0)
    log_p = jax.nn.log_softmax(logits)
    divergence = jnp.log(logits.shape[2]) + jnp.sum(jnp.exp(log_p) * log_p, axis=2)
    sums = jnp.sum(jnp.where(mask, divergence, 0.0), axis=1)
    return sums, jnp.sum(mask, axis=1, dtype=jnp.float32)


def _check(logits: Array, mask: Array) -> None:
    if logits.ndim != 3 or mask.shape != logits.shape[:2] or mask.dtype != bool:
        raise ValueError(
            f'logits must be [B, T, V] with a bool mask [B, T], got {logits.shape} and '
            f'{mask.dtype} {mask.shape}'
        )
