"""The hidden panel: who is hidden, what predicts it, and where gradients go."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.losses import reconstruction as r

B, N, D = 6, 5, 4
MASK = np.array(
    [
        [1, 1, 1, 1, 1],
        [0, 1, 0, 1, 0],
        [0, 0, 0, 1, 0],  # one panel: nothing to predict it from
        [0, 0, 0, 0, 0],  # padding
        [1, 1, 1, 0, 0],
        [0, 0, 0, 1, 1],
    ],
    bool,
)


def data(mask=MASK):
    rng = np.random.default_rng(0)
    embeddings = rng.normal(size=(B, N, D)).astype(np.float32)
    embeddings[~mask] = np.nan
    keys = jax.random.split(jax.random.key(1), B)
    return embeddings, r.hidden_panel(keys, mask)


def loss(embeddings, predictor, mask, hidden, **options):
    predicted = r.context_mean(embeddings, mask, hidden, **options) @ predictor
    return r.reconstruction(predicted, embeddings, mask, hidden)


def test_hidden_panel_is_valid_uniform_and_follows_the_key_of_its_page():
    pages = 3000
    mask = np.tile(np.array([1, 0, 1, 1, 0], bool), (pages, 1))
    keys = jax.random.split(jax.random.key(0), pages)
    hidden = jax.jit(r.hidden_panel)(keys, mask)
    counts = np.bincount(hidden, minlength=5)
    assert hidden.dtype == jnp.int32 and counts[[1, 4]].sum() == 0
    np.testing.assert_allclose(counts[[0, 2, 3]], 1000, atol=4 * np.sqrt(pages * 2 / 9))
    again = jax.jit(r.hidden_panel)(keys[::-1], mask)
    np.testing.assert_array_equal(again, hidden[::-1])


def test_context_and_loss_are_the_definition():
    embeddings, hidden = data()
    predictor = np.eye(D, dtype=np.float32) * 0.5
    context = r.context_mean(embeddings, MASK, hidden)
    total = 0
    for page in (0, 1, 4, 5):
        others = [k for k in range(N) if MASK[page, k] and k != hidden[page]]
        expected = embeddings[page, others].astype(np.float64).mean(axis=0)
        np.testing.assert_allclose(context[page], expected, rtol=1e-5)
        total += np.mean((0.5 * expected - embeddings[page, int(hidden[page])]) ** 2)
    np.testing.assert_array_equal(context[2:4], 0)
    term = jax.jit(loss)(embeddings, predictor, MASK, hidden)
    np.testing.assert_allclose(term.total, total, rtol=1e-5)
    assert term.count == 4 and term.total.dtype == jnp.float32


def test_defect_target_not_detached():
    embeddings, hidden = data()
    gradient = jax.jit(jax.grad(lambda z: loss(z, jnp.eye(D), MASK, hidden).mean()))(embeddings)
    for page in range(B):
        for panel in range(N):
            is_context = page in (0, 1, 4, 5) and MASK[page, panel] and panel != hidden[page]
            assert np.any(gradient[page, panel]) == is_context, (page, panel)


def test_context_can_be_detached_too():
    embeddings, hidden = data()
    grad = jax.jit(
        jax.grad(lambda z, w: loss(z, w, MASK, hidden, stop_gradient=True).mean(), (0, 1))
    )
    for_embeddings, for_predictor = grad(embeddings, jnp.eye(D))
    np.testing.assert_array_equal(for_embeddings, 0)
    assert np.any(for_predictor)


def test_pages_of_one_panel_do_not_count_whatever_they_hold():
    embeddings, hidden = data()
    predicted = np.ones((B, D), np.float32)
    expected = r.reconstruction(predicted, embeddings, MASK, hidden)
    predicted[2:4] = np.nan
    term = r.reconstruction(predicted, embeddings, MASK, hidden)
    assert term.count == expected.count == 4 and term.total == expected.total


def test_no_active_page_is_zero_with_count_zero_and_a_zero_gradient():
    mask = np.zeros((B, N), bool)
    mask[:, 2] = True
    embeddings, hidden = data(mask)

    def mean(z, w):
        term = loss(z, w, mask, hidden)
        return term.mean(), term

    gradients, term = jax.jit(jax.grad(mean, (0, 1), has_aux=True))(embeddings, jnp.eye(D))
    assert term.total == term.count == 0
    for gradient in gradients:
        np.testing.assert_array_equal(gradient, 0)


def test_bfloat16_input_gives_a_float32_term():
    embeddings, hidden = data()
    low = jnp.asarray(embeddings, jnp.bfloat16)
    context = r.context_mean(low, MASK, hidden)
    term = r.reconstruction(context.astype(jnp.bfloat16), low, MASK, hidden)
    assert context.dtype == term.total.dtype == term.count.dtype == jnp.float32


@pytest.mark.usefixtures('unchecked_shapes')
def test_wrong_shapes_are_named():
    embeddings, hidden = data()
    with pytest.raises(ValueError, match='bool mask'):
        r.context_mean(embeddings, MASK.astype(np.float32), hidden)
    with pytest.raises(ValueError, match=r'predicted must be \[B, D\]'):
        r.reconstruction(embeddings[0], embeddings, MASK, hidden)
