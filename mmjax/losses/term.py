"""What every loss returns: a sum over what was active, and how many were."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float


class Term(NamedTuple):
    """One loss of a batch, kept as a sum and a count so that division comes last.

    Masks, padding, micro-batches, devices and hosts stay exact because only sums are
    ever added. `count` is a float32 scalar, the number of active items (anchors, pairs,
    pages, tokens); a term with count 0 contributes 0.
    """

    total: Float[jax.Array, '']
    # type: ignore: this name hides tuple.count, which nobody calls on a term.
    count: Float[jax.Array, '']  # type: ignore[assignment]

    def mean(self) -> Float[jax.Array, '']:
        """Returns total / count as a float32 scalar, 0 with a zero gradient where count is 0.

        >>> import jax.numpy as jnp
        >>> float(Term(jnp.float32(6.0), jnp.float32(4.0)).mean())
        1.5
        >>> float(Term(jnp.float32(0.0), jnp.float32(0.0)).mean())
        0.0
        """
        safe = jnp.where(self.count > 0, self.count, 1.0)
        return jnp.where(self.count > 0, self.total / safe, 0.0)
