"""Distillation against its definition in NumPy, with padding and a detached teacher."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.losses.distillation import distillation, frame_weights

B, T, V = 3, 5, 4
MASK = np.arange(T) < np.array([5, 2, 0])[:, None]


def data():
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, B, T, V)).astype(np.float32) * 3
    student[~MASK] = teacher[~MASK] = np.nan
    return student, teacher


def softmax(logits):
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize('temperature', [1.0, 3.0])
def test_sums_are_the_definition(temperature):
    student, teacher = data()
    expected = np.zeros(B)
    for row, frame in zip(*np.nonzero(MASK), strict=True):
        p = softmax(student[row, frame].astype(np.float64) / temperature)
        q = softmax(teacher[row, frame].astype(np.float64) / temperature)
        expected[row] += temperature**2 * np.sum(q * np.log(q / p))
    sums, counts = jax.jit(distillation)(student, teacher, MASK, temperature=temperature)
    np.testing.assert_allclose(sums, expected, rtol=1e-5)
    np.testing.assert_array_equal(counts, [5, 2, 0])
    assert sums.dtype == counts.dtype == jnp.float32


def test_frames_weigh_less_the_surer_the_teacher_is_of_the_blank():
    student, teacher = data()
    weights = np.zeros((B, T))
    expected = np.zeros(B)
    for row, frame in zip(*np.nonzero(MASK), strict=True):
        weights[row, frame] = 1 - 0.9 * softmax(teacher[row, frame].astype(np.float64))[2]
        p, q = (softmax(x[row, frame].astype(np.float64) / 2) for x in (student, teacher))
        expected[row] += 4 * weights[row, frame] * np.sum(q * np.log(q / p))
    given = frame_weights(teacher, 0.1, blank=2)
    sums, counts = distillation(student, teacher, MASK, temperature=2.0, weights=given)
    np.testing.assert_allclose(sums, expected, rtol=1e-5)
    np.testing.assert_allclose(counts, weights.sum(1), rtol=1e-5)
    np.testing.assert_array_equal(frame_weights(teacher, 1.0)[MASK], 1)
    through = lambda s, t: distillation(s, t, MASK, temperature=2.0, weights=frame_weights(t, 0.1))[
        0
    ].sum()
    for_student, for_teacher = jax.grad(through, (0, 1))(student, teacher)
    np.testing.assert_array_equal(for_teacher, 0)
    assert np.isfinite(for_student).all() and not for_student[~MASK].any()


def test_gradient_reaches_the_student_alone_and_no_padding():
    student, teacher = data()
    temperature = 3.0

    def total(student, teacher):
        return jnp.sum(distillation(student, teacher, MASK, temperature=temperature)[0])

    for_student, for_teacher = jax.jit(jax.grad(total, (0, 1)))(student, teacher)
    np.testing.assert_array_equal(for_teacher, 0)
    np.testing.assert_array_equal(for_student[~MASK], 0)
    # d/dstudent T²·KL(q ‖ p) = T (p − q)
    expected = softmax(student[MASK] / temperature) - softmax(teacher[MASK] / temperature)
    np.testing.assert_allclose(for_student[MASK], temperature * expected, rtol=1e-4, atol=1e-6)


def test_equal_up_to_a_constant_is_zero():
    _, teacher = data()
    sums, _ = jax.jit(distillation)(teacher + 2.5, teacher, MASK, temperature=3.0)
    np.testing.assert_allclose(sums, 0, atol=1e-5)


@pytest.mark.usefixtures('unchecked_shapes')
def test_what_does_not_fit_is_named():
    student, teacher = data()
    with pytest.raises(ValueError, match=r'logits must be \[B, T, V\] twice'):
        distillation(student, teacher[..., 1:], MASK, temperature=3.0)
    with pytest.raises(ValueError, match='mask must be bool'):
        distillation(student, teacher, MASK.astype(np.float32), temperature=3.0)
    with pytest.raises(ValueError, match=r'weights \(5,\) do not fit the mask \(3, 5\)'):
        distillation(student, teacher, MASK, temperature=3.0, weights=np.ones(T))
    with pytest.raises(ValueError, match='temperature must be above 0, got 0'):
        distillation(student, teacher, MASK, temperature=0)
