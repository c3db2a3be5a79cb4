"""Contrastive losses against float64 NumPy, their floors, collapse values and tiled forms."""

import functools
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.losses import contrastive, pairs
from mmjax.losses.term import Term

supcon, infonce, sigmoid = (
    jax.jit(loss, static_argnames=('chunk', 'normalize'))
    for loss in (contrastive.supcon, contrastive.infonce, contrastive.sigmoid)
)
N, D = 13, 5
CHUNKS = [None, 5]  # 13 rows: three tiles, padded by 2


def data(n=N, d=D, labels=4, seed=0):
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(n, d)) * rng.uniform(0.5, 3, size=(n, 1))
    b = a + rng.normal(size=(n, d))
    return a, b, rng.integers(labels, size=n) * 7 - 9, rng.random(n) < 0.8


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def logsumexp(x):
    return x.max() + np.log(np.exp(x - x.max()).sum())


def supcon_oracle(z, labels, mask, temperature):
    """The definition, pair by pair; returns (total, count)."""
    z, rows = unit(z), np.flatnonzero(mask)
    total = count = 0
    for i in rows:
        others = [j for j in rows if j != i]
        positives = [j for j in others if labels[j] == labels[i]]
        if positives:
            below = logsumexp(z[others] @ z[i] / temperature)
            total -= np.mean([z[i] @ z[p] / temperature - below for p in positives])
            count += 1
    return total, count


def infonce_oracle(a, b, mask, temperature, labels=None):
    a, b, rows = unit(a), unit(b), np.flatnonzero(mask)
    total = count = 0
    for i in rows:
        kept = [j for j in rows if j == i or labels is None or labels[j] != labels[i]]
        own = a[i] @ b[i] / temperature
        total += (logsumexp(b[kept] @ a[i] / temperature) - own) / 2
        total += (logsumexp(a[kept] @ b[i] / temperature) - own) / 2
        count += len(kept) > 1
    return total, count


def sigmoid_oracle(a, b, mask, scale, bias, labels=None):
    a, b, rows = unit(a), unit(b), np.flatnonzero(mask)
    total = 0
    for i in rows:
        for j in rows:
            if i == j or labels is None or labels[i] != labels[j]:
                sign = 1 if i == j else -1
                total += np.logaddexp(0, -sign * (scale * (a[i] @ b[j]) + bias))
    return total, len(rows)


def numeric_gradient(function, x, step=1e-5):
    x = np.array(x, np.float64)
    gradient = np.zeros_like(x)
    for place in np.ndindex(x.shape):
        ends = []
        for sign in (1, -1):
            moved = x.copy()
            moved[place] += sign * step
            ends.append(function(moved))
        gradient[place] = (ends[0] - ends[1]) / (2 * step)
    return gradient


def assert_term(term, oracle, rtol=1e-5):
    assert term.total.dtype == term.count.dtype == jnp.float32
    np.testing.assert_allclose(term.total, oracle[0], rtol=rtol)
    assert float(term.count) == oracle[1]


def close(actual, expected, rtol=1e-5):
    """Equal to rtol of the largest entry: gradients of zero have no relative error."""
    expected = np.asarray(expected)
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=rtol * np.abs(expected).max())


# Values and gradients against float64


@pytest.mark.parametrize('chunk', CHUNKS)
def test_supcon_is_the_definition(chunk):
    z, _, labels, mask = data()
    labels[0] = 100  # an anchor without positives
    mask[0] = True
    dirty = np.where(mask[:, None], z, np.nan).astype(np.float32)

    def total(z, temperature):
        term, aux = supcon(z, labels, mask, temperature=temperature, chunk=chunk)
        return term.total, (term, aux)

    gradients, (term, aux) = jax.jit(jax.grad(total, (0, 1), has_aux=True))(dirty, 0.2)
    assert_term(term, supcon_oracle(z, labels, mask, 0.2))
    close(gradients[0], numeric_gradient(lambda z: supcon_oracle(z, labels, mask, 0.2)[0], z))
    close(gradients[1], numeric_gradient(lambda t: supcon_oracle(z, labels, mask, t)[0], 0.2))

    sizes = np.array([np.sum(labels[mask] == label) for label in np.unique(labels[mask])])
    expected = {
        'rows': mask.sum(),
        'groups': np.sum(sizes > 1),
        'pairs': np.sum(sizes * (sizes - 1)) / 2,
        'floor': contrastive.supcon_floor(sizes),
        'collapse': contrastive.supcon_collapse(mask.sum()),
    }
    assert aux.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(aux[name], value, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize('labelled', [False, True])
@pytest.mark.parametrize('chunk', CHUNKS)
def test_infonce_is_the_definition(chunk, labelled):
    a, b, labels, mask = data()
    labels = labels if labelled else None
    dirty = np.where(mask[:, None], a, np.inf).astype(np.float32)

    def total(a, b, temperature):
        term = infonce(a, b, mask, temperature=temperature, labels=labels, chunk=chunk)
        return term.total, term

    gradients, term = jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))(
        dirty, b.astype(np.float32), 0.2
    )
    assert_term(term, infonce_oracle(a, b, mask, 0.2, labels))
    close(gradients[0], numeric_gradient(lambda a: infonce_oracle(a, b, mask, 0.2, labels)[0], a))
    close(gradients[1], numeric_gradient(lambda b: infonce_oracle(a, b, mask, 0.2, labels)[0], b))
    close(gradients[2], numeric_gradient(lambda t: infonce_oracle(a, b, mask, t, labels)[0], 0.2))


@pytest.mark.parametrize('labelled', [False, True])
@pytest.mark.parametrize('chunk', CHUNKS)
def test_sigmoid_is_the_definition(chunk, labelled):
    a, b, labels, mask = data()
    labels = labels if labelled else None

    def total(a, b, scale, bias):
        term = sigmoid(a, b, mask, scale=scale, bias=bias, labels=labels, chunk=chunk)
        return 3 * term.total, term

    arguments = a.astype(np.float32), b.astype(np.float32), 4.0, -2.0
    gradients, term = jax.jit(jax.grad(total, (0, 1, 2, 3), has_aux=True))(*arguments)
    assert_term(term, sigmoid_oracle(a, b, mask, 4.0, -2.0, labels))

    def oracle(a=a, b=b, scale=4.0, bias=-2.0):
        return 3 * sigmoid_oracle(a, b, mask, scale, bias, labels)[0]

    close(gradients[0], numeric_gradient(lambda x: oracle(a=x), a))
    close(gradients[1], numeric_gradient(lambda x: oracle(b=x), b))
    close(gradients[2], numeric_gradient(lambda x: oracle(scale=x), 4.0))
    close(gradients[3], numeric_gradient(lambda x: oracle(bias=x), -2.0))


FORMS = {
    'supcon': lambda a, b, labels, mask, t, chunk: supcon(
        jnp.concatenate([a, b]), jnp.tile(labels, 2), jnp.tile(mask, 2), temperature=t, chunk=chunk
    )[0],
    'infonce': lambda a, b, labels, mask, t, chunk: infonce(
        a, b, mask, temperature=t, labels=labels, chunk=chunk
    ),
    'sigmoid': lambda a, b, labels, mask, t, chunk: sigmoid(
        a, b, mask, scale=1 / t, bias=-10.0, labels=labels, chunk=chunk
    ),
}


def large():
    return data(n=150, d=16, labels=40)


@functools.cache
def gradient_of_mean(form, chunk):
    def mean(a, b, labels, mask, temperature):
        term = FORMS[form](a, b, labels, mask, temperature, chunk)
        return term.mean(), term

    return jax.jit(jax.value_and_grad(mean, (0, 1, 4), has_aux=True))


@pytest.mark.parametrize('form', FORMS)
def test_tiled_form_is_the_plain_form(form):
    a, b, labels, mask = large()
    plain, tiled = gradient_of_mean(form, None), gradient_of_mean(form, 64)
    for temperature in (0.5, 0.07, 0.01):
        arguments = a.astype(np.float32), b.astype(np.float32), labels, mask, temperature
        (_, expected), expected_gradients = plain(*arguments)
        (_, actual), gradients = tiled(*arguments)
        np.testing.assert_allclose(actual.total, expected.total, rtol=1e-5)
        assert actual.count == expected.count
        for actual, expected in zip(gradients, expected_gradients, strict=True):
            close(actual, expected)


@pytest.mark.parametrize('chunk', CHUNKS)
def test_temperature_so_low_that_a_common_shift_would_underflow(chunk):
    # Rows far from all others, among rows that coincide: exp((cos − 1)/T) is exp(−1000).
    rng = np.random.default_rng(3)
    z = np.eye(N) + 1e-3 * rng.normal(size=(N, N))
    z[1] = z[0]
    labels = np.arange(N) // 2
    mask = np.ones(N, bool)

    def mean(z):
        term, _ = supcon(z, labels, mask, temperature=1e-3, chunk=chunk)
        pair = infonce(z, -z, mask, temperature=1e-3, chunk=chunk)
        return term.mean() + pair.mean(), (term, pair)

    gradient, (term, pair) = jax.jit(jax.grad(mean, has_aux=True))(z.astype(np.float32))
    assert_term(term, supcon_oracle(z, labels, mask, 1e-3))
    assert_term(pair, infonce_oracle(z, -z, mask, 1e-3))
    assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0


@pytest.mark.parametrize('form', FORMS)
def test_bfloat16_input_gives_float32_terms(form):
    a, b, labels, mask = data()
    a, b = jnp.asarray(a, jnp.bfloat16), jnp.asarray(b, jnp.bfloat16)
    shapes = jax.eval_shape(lambda a, b: FORMS[form](a, b, labels, mask, 0.1, 4), a, b)
    assert shapes.total.dtype == shapes.count.dtype == jnp.float32
    if form == 'infonce':  # and the sums are made in float32
        term = infonce(a, b, mask, temperature=0.1)
        np.testing.assert_allclose(
            term.total, infonce_oracle(*np.float64([a, b]), mask, 0.1)[0], rtol=1e-5
        )


def test_length_of_embeddings_is_free_unless_normalize_is_off():
    a, b, _, mask = (jnp.asarray(x) for x in data())
    once = infonce(a, b, mask, temperature=0.1).total
    np.testing.assert_allclose(infonce(a * 7, b / 3, mask, temperature=0.1).total, once, rtol=1e-5)
    raw = infonce(a, b, mask, temperature=0.1, normalize=False).total
    assert abs(raw - once) > 0.1
    np.testing.assert_allclose(
        infonce(
            jnp.asarray(unit(np.asarray(a))),
            jnp.asarray(unit(np.asarray(b))),
            mask,
            temperature=0.1,
            normalize=False,
        ).total,
        once,
        rtol=1e-5,
    )


# Floors, optimum and collapse


def simplex(groups):
    return np.eye(groups) - 1 / groups


def mean(term):
    return float(term[0].mean() if not isinstance(term, Term) else term.mean())


def test_supcon_floor_optimum_and_collapse():
    identities, images, temperature = 16, 2, 0.07
    labels = np.repeat(np.arange(identities), 2 * images)
    mask = np.ones(len(labels), bool)
    best = simplex(identities)[labels].astype(np.float32)
    optimum = contrastive.supcon_simplex(identities, 2 * images, temperature)
    written_out = np.log(
        2 * images
        - 1
        + (2 * identities * images - 2 * images)
        * np.exp(-identities / ((identities - 1) * temperature))
    )
    np.testing.assert_allclose(optimum, written_out, rtol=1e-12)
    value = mean(supcon(best, labels, mask, temperature=temperature))
    np.testing.assert_allclose(value, optimum, rtol=1e-5)

    cold = mean(supcon(best, labels, mask, temperature=0.03))
    np.testing.assert_allclose(cold, contrastive.supcon_floor([4] * 16), rtol=1e-5)
    np.testing.assert_allclose(cold, np.log(3), rtol=1e-5)

    equal = np.ones_like(best)
    for temperature in (0.07, 1.0):
        value = mean(supcon(equal, labels, mask, temperature=temperature))
        np.testing.assert_allclose(value, contrastive.supcon_collapse(64), rtol=1e-5)
    np.testing.assert_allclose(contrastive.supcon_collapse(64), 4.1431, atol=5e-5)


def test_supcon_floor_of_pages_of_several_sizes():
    sizes = [1, 2, 3, 6, 1]
    labels = np.repeat(np.arange(5), sizes)
    term, aux = supcon(
        np.eye(5, dtype=np.float32)[labels], labels, np.ones(13, bool), temperature=0.01
    )
    expected = (2 * np.log(1) + 3 * np.log(2) + 6 * np.log(5)) / 11
    np.testing.assert_allclose(contrastive.supcon_floor(sizes), expected, rtol=1e-12)
    np.testing.assert_allclose(term.mean(), expected, rtol=1e-5)
    np.testing.assert_allclose(aux['floor'], expected, rtol=1e-5)
    assert contrastive.supcon_floor([1, 1]) == 0
    np.testing.assert_allclose(contrastive.supcon_simplex(1, 5, 0.1), np.log(4))


def test_infonce_and_sigmoid_optimum_and_collapse():
    n = 8
    mask = np.ones(n, bool)
    best, equal = simplex(n).astype(np.float32), np.ones((n, n), np.float32)
    value = mean(infonce(best, best, mask, temperature=0.3))
    np.testing.assert_allclose(value, np.log1p((n - 1) * np.exp(-n / ((n - 1) * 0.3))), rtol=1e-5)
    value = mean(infonce(equal, equal, mask, temperature=0.3))
    np.testing.assert_allclose(value, contrastive.infonce_collapse(n), rtol=1e-6)
    value = mean(sigmoid(equal, equal, mask, scale=10.0, bias=-10.0))
    np.testing.assert_allclose(value, 8 * np.log(2), rtol=1e-5)


# Empty batches and the defects of the original


@pytest.mark.parametrize('chunk', [None, 64])
@pytest.mark.parametrize('form', FORMS)
def test_empty_batch_is_zero_with_count_zero_and_a_zero_gradient(form, chunk):
    a, b, labels, mask = large()
    (value, term), gradients = gradient_of_mean(form, chunk)(
        np.full_like(a, np.nan, np.float32), b.astype(np.float32), labels, np.zeros_like(mask), 0.1
    )
    assert value == term.total == term.count == 0
    for gradient in gradients:
        np.testing.assert_array_equal(gradient, np.zeros_like(gradient))


@pytest.mark.parametrize('chunk', [None, 4])
def test_defect_zero_loss_without_gradient_below_two_valid_rows_and_nobody_told(chunk):
    a, b, labels, _ = data()
    mask = np.arange(N) == 3
    term, aux = supcon(a, labels, mask, temperature=0.1, chunk=chunk)
    assert term.total == term.count == aux['pairs'] == aux['groups'] == 0 and aux['rows'] == 1
    assert aux['floor'] == aux['collapse'] == 0
    term = infonce(a, b, mask, temperature=0.1, chunk=chunk)
    assert term.total == term.count == 0
    same = np.zeros(N, int)
    term = infonce(a, b, ~mask, temperature=0.1, labels=same, chunk=chunk)
    assert term.total == term.count == 0


def test_defect_anchors_without_positives_counted_in_the_mean():
    z = np.eye(4, dtype=np.float32)[[0, 0, 1, 2]]
    labels = np.array([5, 5, 6, 7])
    term, _ = supcon(z, labels, np.ones(4, bool), temperature=1.0)
    assert term.count == 2
    np.testing.assert_allclose(term.mean(), np.log(1 + 2 * np.exp(-1)), rtol=1e-6)


def test_defect_one_way_alignment():
    # Every picture finds its text, but the first two texts find each other's picture as well.
    a = np.eye(3, dtype=np.float32)[[0, 0, 1]]
    b = unit(np.array([[1, 0, 0], [1, 0, 1], [0, 1, 0]])).astype(np.float32)
    mask = np.ones(3, bool)
    forward = infonce(a, b, mask, temperature=0.1)
    backward = infonce(b, a, mask, temperature=0.1)
    np.testing.assert_allclose(forward.total, backward.total, rtol=1e-6)
    assert_term(forward, infonce_oracle(a, b, mask, 0.1))
    scores = a.astype(np.float64) @ b.T / 0.1
    ways = [np.mean([logsumexp(s[i]) - s[i, i] for i in range(3)]) for s in (scores, scores.T)]
    assert abs(ways[0] - ways[1]) > 0.1
    np.testing.assert_allclose(forward.mean(), np.mean(ways), rtol=1e-5)


@pytest.mark.parametrize('chunk', [None, 64])
@pytest.mark.parametrize('form', ['infonce', 'sigmoid'])
def test_defect_alignment_had_no_gradient_at_all(form, chunk):
    a, b, labels, mask = large()
    _, (grad_a, grad_b, grad_temperature) = gradient_of_mean(form, chunk)(
        a.astype(np.float32), b.astype(np.float32), labels, mask, 0.1
    )
    for gradient in (grad_a, grad_b):
        assert (np.abs(gradient[mask]).max(axis=1) > 1e-6).all()
        np.testing.assert_array_equal(gradient[~mask], 0)
    assert grad_temperature != 0


@pytest.mark.parametrize('form', FORMS)
def test_defect_quadratic_similarity_matrix(form):
    def temporary(n):
        shapes = [
            jax.ShapeDtypeStruct((n, 8), jnp.float32),
            jax.ShapeDtypeStruct((n, 8), jnp.float32),
            jax.ShapeDtypeStruct((n,), jnp.int32),
            jax.ShapeDtypeStruct((n,), bool),
        ]
        compiled = gradient_of_mean(form, 128).lower(*shapes, 0.1).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    small, large = temporary(1024), temporary(4096)
    assert large < 4.2 * small
    assert large < 4096 * 4096 * 4 / 16


# Tiles, meshes, faults


@pytest.mark.usefixtures('unchecked_shapes')
def test_tile_size():
    assert pairs.tile_size(2048, 'auto') is None
    assert pairs.tile_size(16384, 'auto') == 2048
    assert pairs.tile_size(2049, 'auto') == 1152  # two tiles and 255 rows of padding, not 2047
    for n in (2049, 5000, 70001):
        tile = pairs.tile_size(n, 'auto')
        assert tile <= 2048 and tile % 128 == 0
    assert pairs.tile_size(10, 10) is pairs.tile_size(10, None) is None
    assert pairs.tile_size(10, 3) == 3
    for bad in (0, -1, True, 2.0, 'all'):
        with pytest.raises(ValueError, match='chunk must be a positive int'):
            pairs.tile_size(10, bad)


@pytest.mark.usefixtures('unchecked_shapes')
def test_wrong_arguments_are_named():
    a, b, labels, mask = data()
    with pytest.raises(ValueError, match=r'one shape, got \(13, 5\) and \(12, 5\)'):
        contrastive.infonce(a, b[1:], mask, temperature=0.1)
    with pytest.raises(ValueError, match=r'mask must be bool \[13\], got float64'):
        contrastive.infonce(a, b, mask * 1.0, temperature=0.1)
    with pytest.raises(ValueError, match=r'labels must be \[13\], got \[12\]'):
        contrastive.supcon(a, labels[1:], mask, temperature=0.1)
    for temperature in (0, -0.1, float('nan')):
        with pytest.raises(ValueError, match='temperature must be above 0'):
            contrastive.supcon(a, labels, mask, temperature=temperature)


def test_eight_devices_give_the_losses_of_one():
    script = """
        import jax, numpy as np
        from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
        from tests.losses.test_contrastive import FORMS, data

        @jax.jit
        def everything(a, b, labels, mask, temperature):
            def loss(a, b, temperature):
                terms = [form(a, b, labels, mask, temperature, 24) for form in FORMS.values()]
                return sum(term.mean() for term in terms), terms
            return jax.grad(loss, (0, 1, 2), has_aux=True)(a, b, temperature)

        mesh = jax.make_mesh((4, 2), ('data', 'fsdp'), axis_types=(AxisType.Auto,) * 2)
        rows = NamedSharding(mesh, P(('data', 'fsdp')))
        a, b, labels, mask = data(n=64, d=8, labels=9)
        batch = a.astype('f4'), b.astype('f4'), labels, mask
        with jax.set_mesh(mesh):
            one = everything(*batch, 0.1)
            eight = everything(*(jax.device_put(x, rows) for x in batch), 0.1)
        assert len(eight[0][0].sharding.device_set) == 8
        for x, y in zip(jax.tree.leaves(eight), jax.tree.leaves(one), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5 * np.abs(y).max())
    """
    devices = {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': '--xla_force_host_platform_device_count=8'}
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    command = [sys.executable, '-c', textwrap.dedent(script)]
    subprocess.run(command, check=True, cwd=root, env={**os.environ, **devices})
