"""Distillation: a student follows the softened distribution of a teacher, frame by frame."""

import jax
import jax.numpy as jnp


def distillation(student_logits, teacher_logits, mask, *, temperature, weights=None):
    """Returns T²·KL(teacher ‖ student) summed over the valid frames of each row, and their weights.

      ℓ = T² w Σₖ qₖ (ln qₖ − ln pₖ), q = softmax(teacher/T), p = softmax(student/T)
    T² keeps the gradient's size as T grows. The teacher is detached. Floor 0, where both agree up
    to a constant a frame. Padding may hold anything, NaN included, and gets a zero gradient.

    Source: Hinton et al. 2015, Distilling the Knowledge in a Neural Network,
    https://arxiv.org/abs/1503.02531.

    Args:
      student_logits, teacher_logits: float [B, T, V].
      mask: bool [B, T].
      temperature: T > 0, a number or a traced scalar.
      weights: w, float [B, T], detached; None: all 1.

    Returns:
      float32 [B] sums, and float32 [B] weights of valid frames (their number where all are 1).

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

    def log_softmax(logits):
        # Masked before the softmax: 0 · NaN is a NaN gradient.
        logits = jnp.where(mask[..., None], jnp.asarray(logits, jnp.float32), 0.0)
        return jax.nn.log_softmax(logits / temperature)

    student = log_softmax(student_logits)
    teacher = jax.lax.stop_gradient(log_softmax(teacher_logits))
    divergence = jnp.sum(jnp.exp(teacher) * (teacher - student), axis=2)
    weights = jnp.ones(mask.shape) if weights is None else jax.lax.stop_gradient(weights)
    weights = jnp.where(mask, jnp.asarray(weights, jnp.float32), 0.0)
    return jnp.sum(temperature**2 * weights * divergence, axis=1), jnp.sum(weights, axis=1)


def without_blanks(teacher_logits, blank_weight, *, blank=0):
    """Returns weights of frames: 1 where the teacher is sure of a label, less where of the blank.

      w = 1 − (1 − blank_weight) p(blank)
    A network trained by CTC says blank in nearly all frames and names each label in one or two
    (Graves et al. 2006), so that a mean over frames hardly tells of labels.

    Args:
      teacher_logits: float [B, T, V].
      blank_weight: of a frame that is surely blank, in [0, 1]; 1 weighs all alike.
      blank: index of the blank.

    Returns:
      float32 [B, T].
    """
    sure = jax.nn.softmax(jnp.asarray(teacher_logits, jnp.float32))[..., blank]
    return 1 - (1 - blank_weight) * sure
