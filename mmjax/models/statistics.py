"""What small nets from scratch pool beside their last map: colours, and statistics of all maps."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float

from mmjax.typing import Array


def colour_histogram(
    pixels: Float[Array, 'batch height width 3'],
    bins: int = 8,
    limits: tuple[float, float] = (0.0, 1.0),
) -> Float[jax.Array, 'batch {bins}**3']:
    """Returns how much of an image is near each of bins³ colours, in square roots.

    A pixel gives its vote to the eight colours of the grid around it (trilinear). The square roots
    of the fractions have length 1, and their products are Hellinger affinities.

    Args:
      pixels: images.
      bins: colours along each axis, 2 or more.
      limits: where the grid of colours begins and ends; what is beyond votes for its rim.

    Returns:
      float32, without a gradient.
    """
    batch = len(pixels)
    low, high = limits
    position = (jax.lax.stop_gradient(pixels).astype(jnp.float32) - low) / (high - low) * (bins - 1)
    position = jnp.clip(position, 0, bins - 1).reshape(batch, -1, 3, 1)
    near = jnp.maximum(1 - jnp.abs(position - jnp.arange(bins)), 0)  # [batch, pixels, 3, bins]
    pairs = (near[:, :, 0, :, None] * near[:, :, 1, None, :]).reshape(batch, -1, bins * bins)
    votes = jnp.einsum('npq,npb->nqb', pairs, near[:, :, 2]) / near.shape[1]
    return jnp.sqrt(votes.reshape(batch, -1))


class ImageStatistics(nn.Module):
    """An image's colour histogram, and means and deviations of its maps, shallow ones included.

    Colours and textures reach the embedding directly: a small net that is trained from scratch on
    little data keeps them for what it has not seen, where the last map alone forgets. The
    histogram has length 1, the layer-normed statistics of all maps together `share`.
    """

    share: float = 1.0
    limits: tuple[float, float] = (0.0, 1.0)  # of the pixels

    @nn.compact
    def __call__(
        self,
        images: Float[Array, 'batch height width 3'],
        maps: list[Float[Array, 'batch _ _ _']],
    ) -> Float[jax.Array, 'batch features']:
        """Returns 8³ colours and two numbers for each channel of the maps."""
        colours = colour_histogram(images[:, ::2, ::2], limits=self.limits)
        statistics = []
        for index, x in enumerate(maps):
            x = x.astype(jnp.float32)
            x = jnp.concatenate([x.mean((1, 2)), jnp.sqrt(x.var((1, 2)) + 1e-6)], -1)
            statistics.append(nn.LayerNorm(name=f'norm_{index}')(x))
        statistics = jnp.concatenate(statistics, -1)
        statistics *= self.share * statistics.shape[-1] ** -0.5
        return jnp.concatenate([colours, statistics], -1)
