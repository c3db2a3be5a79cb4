"""Types that signatures share; shapes and dtypes are written around them with jaxtyping.

They are checked where jaxtyping's import hook is installed, as in the tests, and cost nothing
elsewhere.
"""

import jax
import numpy as np
from jaxtyping import Float, Key, UInt32

Array = jax.Array | np.ndarray  # where NumPy's arrays are as good as JAX's
Scalar = float | int | np.floating | Float[Array, '']  # a number, or a scalar that may be traced
Keys = Key[jax.Array, '*axes'] | UInt32[Array, '*axes 2']  # PRNG keys, typed or raw
DType = jax.typing.DTypeLike
