"""Packed tokens: the same numbers and gradients as padded ones, and what too many tokens do."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.models import layers, packing
from mmjax.models.bert import Bert, masked_mean

BATCH, LENGTH = 6, 10


def _mask(counts):
    return jnp.arange(LENGTH) < jnp.asarray(counts)[:, None]


@pytest.mark.parametrize('counts', [(3, 10, 0, 1, 7, 2), (0,) * BATCH, (4,) * BATCH])
def test_pack_and_unpack_are_each_other_s_transpose(counts):
    mask, rows = _mask(counts), 24
    where = packing.pack_indices(mask, rows)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((BATCH, LENGTH, 3)).astype(np.float32)
    y = rng.standard_normal((rows, 3)).astype(np.float32)
    real = np.asarray(mask).reshape(-1)
    packed = np.asarray(packing.pack(x, where))
    np.testing.assert_array_equal(packed[: sum(counts)], x.reshape(-1, 3)[real])
    expected = np.zeros((BATCH * LENGTH, 3), np.float32)
    expected[real] = y[: sum(counts)]
    np.testing.assert_array_equal(np.asarray(packing.unpack(y, where)).reshape(-1, 3), expected)
    # <pack x, y> = <x, packᵀ y> on real rows; the transposes are what gradients use.
    weights = jnp.where(jnp.arange(rows) < sum(counts), 1.0, 0.0)[:, None] * y
    change = jax.grad(lambda x: (packing.pack(x, where) * weights).sum())(x)
    np.testing.assert_array_equal(np.asarray(change).reshape(-1, 3), expected)
    change = jax.grad(lambda y: (packing.unpack(y, where) * x).sum())(y)
    kept = np.concatenate([x.reshape(-1, 3)[real], np.zeros((rows - sum(counts), 3), np.float32)])
    np.testing.assert_array_equal(change, kept)


def _bert(dropout=0.0):
    return Bert(
        vocabulary=50,
        width=16,
        depth=2,
        heads=2,
        mlp_width=24,
        max_length=LENGTH + 2,
        types=2,
        position_offset=2,
        dropout=dropout,
        epsilon=1e-5,
    )


@pytest.mark.parametrize('counts', [(3, 10, 1, 1, 7, 2), (10, 10, 9, 10, 8, 10), (0,) * BATCH])
def test_a_packed_bert_equals_a_padded_one(counts):
    """Few tokens, more than are packed, none; in float64: rounding is no part."""
    with jax.enable_x64(True):
        model, mask = _bert().clone(dtype=jnp.float64), _mask(counts)
        rng = np.random.default_rng(1)
        tokens, types = (jnp.asarray(rng.integers(0, n, mask.shape)) for n in (50, 2))
        params = model.init(jax.random.key(0), tokens, mask, types, train=False)
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)

        def run(packed_length):
            def pooled(params):
                found = model.apply(
                    params, tokens, mask, types, train=True, packed_length=packed_length
                )
                return masked_mean(found, mask)

            gradient = jax.grad(lambda params: (pooled(params)[:, :5] ** 3).sum())
            return jax.jit(lambda params: (pooled(params), gradient(params)))(params)

        packed, padded = run(4.0), run(None)
        chex.assert_trees_all_close(packed, padded, atol=1e-10)
        assert np.abs(packed[0]).sum() > 0 or not sum(counts)


def test_one_trace_serves_batches_that_fit_and_that_do_not():
    model = _bert()
    tokens = jnp.zeros((BATCH, LENGTH), int)
    params = model.init(jax.random.key(0), tokens, _mask((5,) * BATCH), train=False)

    @jax.jit
    @chex.assert_max_traces(1)
    def run(mask):
        return model.apply(params, tokens, mask, train=False, packed_length=4.0)

    for counts in ((3, 2, 4, 1, 1, 1), (10,) * BATCH):
        found, mask = run(_mask(counts)), _mask(counts)
        expected = model.apply(params, tokens, mask, train=False)
        np.testing.assert_allclose(found[mask], expected[mask], atol=1e-5)
        if sum(counts) <= 4 * BATCH:  # nothing was computed there
            assert (found[~mask] == 0).all()


def test_no_packed_length_is_no_packing_and_packed_rows_have_a_mask():
    model, mask = _bert(), _mask((3, 2, 4, 1, 1, 1))
    tokens = jnp.zeros(mask.shape, int)
    params = model.init(jax.random.key(0), tokens, mask, train=False)
    run = lambda packed_length: model.apply(
        params, tokens, mask, train=False, packed_length=packed_length
    )
    np.testing.assert_array_equal(run(0.0), run(None))
    where = packing.pack_indices(mask, 16)
    with pytest.raises(ValueError, match='packed rows attend to themselves'):
        layers.Attention(2).init(jax.random.key(0), jnp.zeros((16, 8)), indices=where)


def test_a_packed_bert_has_dropout():
    model, mask = _bert(dropout=0.5), _mask((3, 2, 4, 1, 1, 1))
    tokens = jnp.zeros(mask.shape, int)
    params = model.init(jax.random.key(0), tokens, mask, train=False)
    run = lambda seed: model.apply(
        params, tokens, mask, train=True, packed_length=4.0, rngs={'dropout': jax.random.key(seed)}
    )
    assert (run(0) == run(0)).all() and (run(0)[mask] != run(1)[mask]).any()


def test_a_packed_bert_in_bfloat16_is_a_padded_one_within_rounding():
    model, mask = _bert().clone(dtype=jnp.bfloat16), _mask((3, 2, 4, 1, 1, 7))
    tokens = jnp.asarray(np.random.default_rng(2).integers(0, 50, mask.shape))
    params = model.init(jax.random.key(0), tokens, mask, train=False)
    run = lambda packed_length: model.apply(
        params, tokens, mask, train=False, packed_length=packed_length
    )
    packed, padded = run(4.0), run(None)
    assert packed.dtype == padded.dtype == jnp.bfloat16
    difference = np.abs(np.float32(packed)[mask] - np.float32(padded)[mask])
    # Summed in another order: some numbers fall to the neighbouring value of 8 bits, none far off.
    assert difference.max() < 0.05 and difference.mean() < 0.005
    assert (packed[~mask] == 0).all() and np.abs(np.float32(padded)[mask]).mean() > 0.5


def test_cond_is_one_of_its_functions_with_its_gradient():
    weights = {'a': jnp.array([2.0, -1.0]), 'b': jnp.float32(3.0)}
    x, count = jnp.array([0.5, 4.0]), jnp.array([1, 2])
    usual = lambda w, x, count: jnp.sum(jnp.sin(w['a'] * x) * w['b'] ** 2) * count[0]
    rare = lambda w, x, count: jnp.sum(w['a'] ** 3 * x) - w['b'] * count[1]

    @jax.jit
    @chex.assert_max_traces(1)
    def found(fits, weights, x):
        run = lambda w: packing.cond(fits, usual, rare, w, x, count)
        return run(weights), jax.value_and_grad(run)(weights)

    for fits in (True, False):
        for scale in (1.0, 2.0):
            scaled = jax.tree.map(lambda w, scale=scale: w * scale, weights)
            expected = jax.value_and_grad(usual if fits else rare)(scaled, x, count)
            alone, both = found(jnp.bool_(fits), scaled, x)
            np.testing.assert_allclose(alone, expected[0], rtol=1e-6)
            chex.assert_trees_all_close(both, expected, rtol=1e-6)


def test_cond_may_be_run_again_for_its_gradient():
    """As micro-batches are: under a checkpoint, in a scan, some fitting and some not."""
    weights, xs = jnp.array([0.5, -1.0]), jnp.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    usual, rare = lambda w, x: jnp.sum(jnp.sin(w * x)), lambda w, x: jnp.sum(w**3 * x)

    def total(run, weights):
        body = jax.checkpoint(lambda sum_, x: (sum_ + run(weights, x) ** 2, None))
        return jax.lax.scan(body, 0.0, xs)[0]

    ours = lambda w, x: packing.cond(x[0] < 4, usual, rare, w, x)
    plain = lambda w, x: jnp.where(x[0] < 4, usual(w, x), rare(w, x))
    found, expected = (
        jax.jit(jax.value_and_grad(lambda w, run=run: total(run, w)))(weights)
        for run in (ours, plain)
    )
    chex.assert_trees_all_close(found, expected, rtol=1e-6)


def test_the_rare_function_keeps_nothing_for_its_gradient():
    """Each branch of a `lax.cond` fills what the other keeps, weights included."""
    weights, x = jnp.ones((300, 7)), jnp.ones((5, 300))
    usual = lambda w, x: jnp.sum(x[:1] @ w)
    rare = lambda w, x: jnp.sum(jnp.tanh(x @ w) ** 2 * w[0])

    def given(run):
        """Shapes that the cond of the forward pass gives."""
        equations = jax.make_jaxpr(lambda w: jax.vjp(run, w))(weights).eqns
        forward = next(e for e in equations if e.primitive.name == 'cond')
        return {variable.aval.shape for variable in forward.outvars}

    cond = lambda w: jax.lax.cond(x[0, 0] > 0, usual, rare, w, x)
    ours = lambda w: packing.cond(x[0, 0] > 0, usual, rare, w, x)
    assert (5, 7) in given(cond) and given(ours) <= {(), (1, 300)}
