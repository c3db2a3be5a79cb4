"""Hides one item of a set and predicts its embedding from the mean of the others."""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from mmjax.losses.term import Term
from mmjax.typing import Array, Keys


def hidden_panel(keys: Keys, mask: Bool[Array, 'pages panels']) -> Int[jax.Array, ' pages']:
    """Draws one valid panel of each page, all with the same probability.

    >>> import jax, jax.numpy as jnp
    >>> keys = jax.random.split(jax.random.key(0), 1)
    >>> hidden_panel(keys, jnp.array([[False, False, True]])).tolist()
    [2]

    Args:
      keys: PRNG keys [pages], so that the choice does not depend on the batch.
      mask: True on valid panels.

    Returns:
      int32; 0 where a page has no valid panel (`reconstruction` leaves such pages out).
    """
    draws = jax.vmap(lambda key: jax.random.uniform(key, mask.shape[1:]))(keys)
    return jnp.argmax(jnp.where(mask, draws, -1.0), axis=1).astype(jnp.int32)


def context_mean(
    embeddings: Float[Array, 'pages panels features'],
    mask: Bool[Array, 'pages panels'],
    hidden: Int[Array, ' pages'],
    *,
    stop_gradient: bool = False,
) -> Float[jax.Array, 'pages features']:
    """Averages the embeddings of the valid panels other than the hidden one.

    >>> import jax.numpy as jnp
    >>> embeddings = jnp.array([[[1.0], [3.0], [8.0]]])
    >>> context_mean(embeddings, jnp.ones((1, 3), bool), jnp.array([2])).tolist()
    [[2.0]]

    Args:
      embeddings: any float type; averaged in float32.
      mask: True on valid panels.
      hidden: the panel of each page that is left out.
      stop_gradient: an ablation: the loss then trains the predictor alone.

    Returns:
      float32, 0 where a page has no other valid panel.
    """
    _check(embeddings, mask)
    others = mask & (jnp.arange(mask.shape[1]) != hidden[:, None])
    values = jnp.where(others[..., None], embeddings.astype(jnp.float32), 0.0)
    count = jnp.sum(others, axis=1, keepdims=True, dtype=jnp.float32)
    context = jnp.sum(values, axis=1) / jnp.maximum(count, 1.0)
    return jax.lax.stop_gradient(context) if stop_gradient else context


def reconstruction(
    predicted: Float[Array, 'pages features'],
    embeddings: Float[Array, 'pages panels features'],
    mask: Bool[Array, 'pages panels'],
    hidden: Int[Array, ' pages'],
) -> Term:
    """Computes the mean squared error between predictions and the hidden panels' embeddings.

      ℓ = 1/D ‖predicted − stop_gradient(embeddings[hidden])‖²
    over pages with two valid panels or more. The target is detached: otherwise the embeddings
    shrink towards each other to make themselves predictable. Floor 0, also reached by collapse, so
    it must not be trained alone. No such page: Term(0, 0) with a zero gradient.

    Source: after masked prediction of embeddings, Baevski et al. 2022,
    https://arxiv.org/abs/2202.03555.

    >>> import jax.numpy as jnp
    >>> embeddings = jnp.array([[[1.0, 0.0], [3.0, 1.0]]])
    >>> predicted = jnp.array([[1.0, 0.0]])
    >>> term = reconstruction(predicted, embeddings, jnp.ones((1, 2), bool), jnp.array([1]))
    >>> float(term.total), float(term.count)  # (2² + 1²) / 2
    (2.5, 1.0)

    Args:
      predicted: what is predicted of the hidden panel.
      embeddings: of all panels.
      mask: True on valid panels.
      hidden: the hidden panel of each page, a valid one.

    Returns:
      Term; count = pages.

    Raises:
      ValueError: shapes or a mask that do not fit.
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


def _check(embeddings: Array, mask: Array) -> None:
    if embeddings.ndim != 3 or mask.shape != embeddings.shape[:2] or mask.dtype != bool:
        raise ValueError(
            f'embeddings must be [B, N, D] with a bool mask [B, N], got {embeddings.shape} and '
            f'{mask.dtype} {mask.shape}'
        )
