"""Distillation: a student follows the softened distribution of a teacher, frame by frame."""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from mmjax.typing import Array, Scalar


def distillation(
    student_logits: Float[Array, 'batch frames vocab'],
    teacher_logits: Float[Array, 'batch frames vocab'],
    mask: Bool[Array, 'batch frames'],
    *,
    temperature: Scalar,
    weights: Float[Array, 'batch frames'] | None = None,
) -> tuple[Float[jax.Array, ' batch'], Float[jax.Array, ' batch']]:
    """Computes T²·KL(teacher ‖ student), summed over the valid frames of each row.

      ℓ = T² w Σₖ qₖ (ln qₖ − ln pₖ), q = softmax(teacher/T), p = softmax(student/T)
    T² keeps the gradient's size as T grows. The teacher is detached. Floor 0, where both agree up
    to a constant per frame. A row without frames, and so an empty batch, has sums and weights of 0
    with a zero gradient.

    Source: Hinton et al. 2015, Distilling the Knowledge in a Neural Network,
    https://arxiv.org/abs/1503.02531.

    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.zeros((1, 1, 2)), jnp.log(jnp.array([[[0.75, 0.25]]]))
    >>> sums, weights = distillation(student, teacher, jnp.ones((1, 1), bool), temperature=1.0)
    >>> round(float(sums[0]), 4), float(weights[0])  # .75 ln 1.5 + .25 ln .5
    (0.1308, 1.0)

    Args:
      student_logits, teacher_logits: any float type; computed in float32.
      mask: False on padding, which may hold anything, NaN included.
      temperature: T > 0.
      weights: w of each frame, detached; None: all 1.

    Returns:
      float32 sums, and weights of the valid frames (their number where all are 1).

    Raises:
      ValueError: shapes or a mask that do not fit, or a temperature of 0 or less.
    """
    shape = student_logits.shape
    if len(shape) != 3 or teacher_logits.shape != shape or mask.shape != shape[:2]:
        raise ValueError(
            f'logits must be [B, T, V] twice with a mask [B, T], got {shape}, '
            f'{teacher_logits.shape} and {mask.shape}'
        )
    if weights is not None and weights.shape != mask.shape:
        raise ValueError(f'weights {weights.shape} do not fit the mask {mask.shape}')
    if mask.dtype != bool:
        raise ValueError(f'mask must be bool, got {mask.dtype}')
    if isinstance(temperature, int | float) and not temperature > 0:
        raise ValueError(f'temperature must be above 0, got {temperature}')

    def log_softmax(logits: Array) -> jax.Array:
        # Masked before the softmax: 0 · NaN is a NaN gradient.
        logits = jnp.where(mask[..., None], jnp.asarray(logits, jnp.float32), 0.0)
        return jax.nn.log_softmax(logits / temperature)

    student = log_softmax(student_logits)
    teacher = jax.lax.stop_gradient(log_softmax(teacher_logits))
    divergence = jnp.sum(jnp.exp(teacher) * (teacher - student), axis=2)
    weights = jnp.ones(mask.shape) if weights is None else jax.lax.stop_gradient(weights)
    weights = jnp.where(mask, jnp.asarray(weights, jnp.float32), 0.0)
    return jnp.sum(temperature**2 * weights * divergence, axis=1), jnp.sum(weights, axis=1)


def frame_weights(
    teacher_logits: Float[Array, 'batch frames vocab'], blank_weight: Scalar, *, blank: int = 0
) -> Float[Array, 'batch frames']:
    """Computes weights for `distillation`: 1 where the teacher is sure of a label, less on blanks.

      w = 1 − (1 − blank_weight) p(blank)
    A network trained by CTC predicts the blank in nearly all frames and each label in one or two
    (Graves et al. 2006), so that labels hardly count in a mean over frames.

    >>> import jax.numpy as jnp
    >>> frame_weights(jnp.log(jnp.array([[[0.5, 0.5]]])), 0.5).tolist()
    [[0.75]]

    Args:
      teacher_logits: any float type; computed in float32.
      blank_weight: of a frame that is surely blank, in [0, 1]; 1 weighs all alike.
      blank: index of the blank.

    Returns:
      float32 weights.
    """
    probability = jax.nn.softmax(jnp.asarray(teacher_logits, jnp.float32))[..., blank]
    return 1 - (1 - blank_weight) * probability
