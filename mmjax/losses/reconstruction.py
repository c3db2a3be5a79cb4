"""Hides one item of a set and predicts its embedding from the mean of the others."""

import jax
import jax.numpy as jnp

from mmjax.losses.term import Term


def hidden_panel(keys, mask):
    """Draws one valid panel a page, each with the same chance.

    Args:
      keys: PRNG keys [B], one a page, so that the choice does not depend on the batch.
      mask: bool [B, N], valid panels.

    Returns:
      int32 [B]; 0 where a page has no valid panel (`reconstruction` leaves such pages out).
    """
    draws = jax.vmap(lambda key: jax.random.uniform(key, mask.shape[1:]))(keys)
    return jnp.argmax(jnp.where(mask, draws, -1.0), axis=1).astype(jnp.int32)


def context_mean(embeddings, mask, hidden, *, stop_gradient=False):
    """Returns the mean embedding of the valid panels other than the hidden one, float32 [B, D].

    Zero where there is none. The ablation `stop_gradient` lets the loss train the head alone.

    Args:
      embeddings: float [B, N, D].
      mask: bool [B, N].
      hidden: int [B].
    """
    _check(embeddings, mask)
    others = mask & (jnp.arange(mask.shape[1]) != hidden[:, None])
    values = jnp.where(others[..., None], embeddings.astype(jnp.float32), 0.0)
    count = jnp.sum(others, axis=1, keepdims=True, dtype=jnp.float32)
    context = jnp.sum(values, axis=1) / jnp.maximum(count, 1.0)
    return jax.lax.stop_gradient(context) if stop_gradient else context


def reconstruction(predicted, embeddings, mask, hidden) -> Term:
    """Mean squared error between the prediction and the hidden panel's embedding.

      ℓ = 1/D ‖predicted − stop_gradient(embeddings[hidden])‖²
    over pages with two valid panels or more. The target is detached: otherwise the embeddings
    shrink towards each other to make themselves predictable. Floor 0, also reached by collapse, so
    it must not be trained alone. No such page: Term(0, 0) with a zero gradient.

    Args:
      predicted: float [B, D].
      embeddings: float [B, N, D].
      mask: bool [B, N].
      hidden: int [B], the hidden panel, a valid one.

    Returns:
      Term; count = pages.
    """
    _check(embeddings, mask)
    if predicted.shape != (embeddings.shape[0], embeddings.shape[2]):
        raise ValueError(f'predicted must be [B, D], got {predicted.shape} for {embeddings.shape}')
    target = jnp.take_along_axis(embeddings, hidden[:, None, None], axis=1)[:, 0]
    target = jax.lax.stop_gradient(target).astype(jnp.float32)
    active = (jnp.sum(mask, axis=1) > 1) & jnp.take_along_axis(mask, hidden[:, None], axis=1)[:, 0]
    # Masked before the square: a page left out may hold NaN, and 0 · NaN is a NaN gradient.
    error = jnp.where(active[:, None], predicted.astype(jnp.float32) - target, 0.0)
    return Term(jnp.sum(jnp.mean(error**2, axis=1)), jnp.sum(active, dtype=jnp.float32))


def _check(embeddings, mask):
    if embeddings.ndim != 3 or mask.shape != embeddings.shape[:2] or mask.dtype != bool:
        raise ValueError(
            f'embeddings must be [B, N, D] with a bool mask [B, N], got {embeddings.shape} and '
            f'{mask.dtype} {mask.shape}'
        )
