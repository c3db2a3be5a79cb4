"""Next-token cross-entropy with teacher forcing: sums and counts per row, padding left out."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Bool, Float, Int

from mmjax.typing import Array


def shift_right(
    tokens: Int[Array, 'batch length'],
    mask: Bool[Array, 'batch length'],
    start: int | Int[Array, ''],
) -> tuple[Int[jax.Array, 'batch length'], Bool[Array, 'batch length']]:
    """Returns the decoder's input for the targets `tokens`: the start token, then all but the last.

    >>> import jax.numpy as jnp
    >>> inputs, _ = shift_right(jnp.array([[5, 6, 7]]), jnp.ones((1, 3), bool), 9)
    >>> inputs.tolist()
    [[9, 5, 6]]

    Args:
      tokens: the targets; they are left as they are.
      mask: True for the first tokens of a row.
      start: id of the token that begins a text.

    Returns:
      The inputs and their mask, which is that of the targets.
    """
    first = jnp.full_like(tokens[:, :1], start)
    return jnp.concatenate([first, tokens[:, :-1]], 1), mask


def token_rows(
    logits: Float[Array, 'batch length vocab'],
    targets: Int[Array, 'batch length'],
    mask: Bool[Array, 'batch length'],
) -> tuple[Float[Array, ' batch'], Float[Array, ' batch'], Float[Array, ' batch']]:
    """Sums the cross-entropy of each row's tokens.

      ℓ = −log softmax(logits)[target]
    Floor 0. exp(Σ sums / Σ counts) is the perplexity. A row without tokens, and so an empty batch,
    has sums and counts of 0 with a zero gradient.

    Source: teacher forcing, Williams & Zipser 1989, https://doi.org/10.1162/neco.1989.1.2.270.

    >>> import jax.numpy as jnp
    >>> mask = jnp.array([[True, True, False]])
    >>> sums, counts, correct = token_rows(jnp.zeros((1, 3, 4)), jnp.array([[0, 1, 2]]), mask)
    >>> round(float(sums[0]), 4), float(counts[0]), float(correct[0])  # 2 ln 4
    (2.7726, 2.0, 1.0)

    Args:
      logits: any float type; computed in float32.
      targets: in 0 … V − 1.
      mask: False on padding, where logits and targets may hold anything, NaN included.

    Returns:
      float32 (sums, counts, correct) per row; `correct` counts the tokens with the largest logit
      (of equal ones the first).

    Raises:
      ValueError: shapes that do not fit.
    """
    if logits.ndim != 3 or not targets.shape == mask.shape == logits.shape[:2]:
        raise ValueError(
            f'logits must be [n, length, V] with targets and mask [n, length], got {logits.shape}, '
            f'{targets.shape} and {mask.shape}'
        )
    logits = jnp.where(mask[..., None], jnp.asarray(logits, jnp.float32), 0.0)
    targets = jnp.where(mask, targets, 0)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    correct = (logits.argmax(-1) == targets) & mask
    sums = jnp.where(mask, losses, 0.0).sum(1)
    return sums, mask.sum(1, dtype=jnp.float32), correct.sum(1, dtype=jnp.float32)
