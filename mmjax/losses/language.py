"""Next-token cross-entropy with teacher forcing: sums and counts a row, padding left out."""

import jax.numpy as jnp
import optax


def shifted(tokens, mask, opening):
    """Returns what a decoder reads where `tokens` are what it shall say.

    The input is the opening token and all tokens but the last; `tokens` itself is left as it is.

    Args:
      tokens: int [n, length]; mask: bool [n, length], True for the first tokens of a row.
      opening: int, id of the token that opens a text.

    Returns:
      int [n, length] and its mask bool [n, length]: a row without tokens has none to read either.
    """
    first = jnp.full_like(tokens[:, :1], opening)
    # The input at place i is there where the target at place i is.
    return jnp.concatenate([first, tokens[:, :-1]], 1), mask


def token_rows(logits, targets, mask):
    """Returns the cross-entropy of each row's tokens: (sums, counts, correct), float32 [n] each.

    −log softmax(logits)[target], summed over the tokens that `mask` allows; `correct` counts those
    where the target has the largest logit (of equal ones the first). Padding may hold anything,
    NaN included. exp(Σ sums / Σ counts) is the perplexity.

    Args:
      logits: float [n, length, V].
      targets: int [n, length]; mask: bool [n, length].

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
    right = (logits.argmax(-1) == targets) & mask
    sums = jnp.where(mask, losses, 0.0).sum(1)
    return sums, mask.sum(1, dtype=jnp.float32), right.sum(1, dtype=jnp.float32)
