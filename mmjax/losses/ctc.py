"""Connectionist temporal classification: labels known in order, but not at which frames they fall.

The probability of a label sequence is summed over all alignments: paths of one symbol a frame that
become the labels once repeats are collapsed and blanks dropped. Source: Graves et al. 2006,
Connectionist Temporal Classification, https://doi.org/10.1145/1143844.1143891.
"""

import jax
import jax.numpy as jnp
import optax

from mmjax.losses.term import Term


def ctc_rows(logits, mask, labels, label_mask, *, blank=0, blank_penalty=0.0):
    """Returns −log p(labels | logits) of each row, and which rows can be aligned at all.

    A label takes a frame, and two equal ones in a row need a blank between them: a row is feasible
    if it has as many frames as labels plus adjacent repeats, and its labels lie in 0 … V−1 and are
    not the blank. The others have loss 0 and a zero gradient, and poison nothing. A row without
    labels is valid: its one path is all blank. Floor 0, where values are clamped; the gradient is
    that of the unclamped loss. Padding may hold anything, NaN included.

    Args:
      logits: float [B, T, V].
      mask: bool [B, T], True for the first frames of a row.
      labels: int [B, L].
      label_mask: bool [B, L], True for the first labels of a row.
      blank: index of the blank.
      blank_penalty: is subtracted from the blank's logits, so that training starts with fewer
        blanks. A network learns to cancel it: the logits that are decoded need it as well.

    Returns:
      float32 [B] losses, and bool [B] `feasible`.

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
    frames, kept = mask & feasible[:, None], label_mask & feasible[:, None]
    logits = jnp.where(frames[..., None], jnp.asarray(logits, jnp.float32), 0.0)
    logits = logits - blank_penalty * jax.nn.one_hot(blank, size)
    # One column more keeps the width above 0 where no row has a label.
    labels = jnp.pad(labels, ((0, 0), (0, 1)))
    label_paddings = jnp.pad(~kept, ((0, 0), (0, 1)), constant_values=True)
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


def ctc(losses, label_counts, feasible, mask):
    """Returns the CTC loss a sequence, and what else is worth a curve.

    Args:
      losses, feasible: float [B] and bool [B], of `ctc_rows`.
      label_counts: int [B], labels of each row.
      mask: bool [B], False where the row does not exist.

    Returns:
      Term (count = feasible rows) and diagnostics, float32 scalars: `infeasible` (rows left out)
      and `ctc_per_label`, the mean of loss / max(labels, 1), which is PyTorch's 'mean'. No row:
      Term(0, 0) and 0.
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


def smoothing(logits, mask):
    """KL divergence of each frame's distribution from the uniform one, as sums and counts of rows.

      ℓ = KL(p ‖ 1/V) = ln V + Σₖ pₖ ln pₖ
    a term of its own beside CTC, with a small weight. Range 0 (uniform) … ln V (certain).

    Source: Kim et al. 2018, Improved Training for Online End-to-end Speech Recognition Systems,
    https://arxiv.org/abs/1711.02212.

    Args:
      logits: float [B, T, V].
      mask: bool [B, T]; padding may hold anything.

    Returns:
      float32 [B] sums over valid frames, and float32 [B] valid frames.

    Raises:
      ValueError: shapes or a mask that do not fit.
    """
    _check(logits, mask)
    logits = jnp.where(mask[..., None], jnp.asarray(logits, jnp.float32), 0.0)
    log_p = jax.nn.log_softmax(logits)
    divergence = jnp.log(logits.shape[2]) + jnp.sum(jnp.exp(log_p) * log_p, axis=2)
    sums = jnp.sum(jnp.where(mask, divergence, 0.0), axis=1)
    return sums, jnp.sum(mask, axis=1, dtype=jnp.float32)


def _check(logits, mask):
    if logits.ndim != 3 or mask.shape != logits.shape[:2] or mask.dtype != bool:
        raise ValueError(
            f'logits must be [B, T, V] with a bool mask [B, T], got {logits.shape} and '
            f'{mask.dtype} {mask.shape}'
        )
