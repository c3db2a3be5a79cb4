"""Generation: greedy, sampling and beam search against plain Python, on tables and the decoder."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.decode.autoregressive import generate
from mmjax.models.decoder import Decoder

EOS, PAD = 1, 0
ENDS = {'eos': EOS, 'pad': PAD}


# ------------------------------------------- a model that is a table


def _table(rows, vocabulary, length, seed, spread=2.0):
    """Float64 logits [rows, V^0 + … + V^(length-1), V] of the token after each beginning."""
    count = sum(vocabulary**n for n in range(length))
    return np.random.default_rng(seed).normal(0, spread, (rows, count, vocabulary))


def _tabular(table):
    """The table as a model; its state is the number of the beginning, so a beam's own matters."""
    table = jnp.asarray(table, jnp.float32)

    def step(state, tokens, index):
        state = state * table.shape[-1] + tokens + 1
        return jax.vmap(lambda rows, at: rows[at])(table, state), state

    return step, table[:, 0]


def _reader(table, row):
    """Returns text → float64 log-probabilities [V] of its next token."""

    def log_probs(text):
        at = functools.reduce(lambda at, token: at * table.shape[-1] + token + 1, text, 0)
        return table[row, at] - np.log(np.exp(table[row, at]).sum())

    return log_probs


def _score(log_probs, text):
    return sum(log_probs(text[:place])[token] for place, token in enumerate(text))


def _greedy(log_probs, length):
    text = ()
    while len(text) < length and EOS not in text:
        text = (*text, int(log_probs(text).argmax()))
    return _score(log_probs, text), text


def _beam_search(log_probs, length, beams, penalty):
    """The rules of `beam_search` without stopping early: (score, text)."""
    live, ended = [(0.0, ())], []
    over = lambda text: text[-1] == EOS or len(text) == length
    for _ in range(length):
        candidates = [
            (total + p, (*text, token))
            for total, text in live
            for token, p in enumerate(log_probs(text))
        ]
        candidates = sorted(candidates, reverse=True)[: 2 * beams]
        ended += [(p / len(text) ** penalty, text) for p, text in candidates[:beams] if over(text)]
        live = [(p, text) for p, text in candidates if not over(text)][:beams]
    return max(ended)


@functools.cache
def _jitted(length, **options):
    def run(table, keys):
        step, first = _tabular(table)
        state = jnp.zeros((len(first), options.get('beams', 1)), jnp.int32)
        return generate(step, state, first, max_tokens=length, **ENDS, keys=keys, **options)

    return jax.jit(run)


def _run(table, length, keys=None, **options):
    found = _jitted(length, **options)(jnp.asarray(table, jnp.float32), keys)
    return jax.tree.map(np.asarray, found)


def _run_alone(row, table, length, **options):
    """What a row becomes where all rows are copies of it."""
    return jax.tree.map(lambda x: x[0], _run(table[[row] * len(table)], length, **options))


def _texts(found):
    """The texts as tuples, after checking that only padding follows them."""
    for tokens, length in zip(found.tokens, found.lengths, strict=True):
        assert (tokens[length:] == PAD).all() and EOS not in tokens[: length - 1]
    return [tuple(t[:n]) for t, n in zip(found.tokens.tolist(), found.lengths, strict=True)]


# ------------------------------------------- one token at a time


def test_greedy_takes_the_best_token_and_rows_end_alone():
    table = _table(6, 4, 5, seed=2)
    found = _run(table, 5, method='greedy')
    expected = [_greedy(_reader(table, row), 5) for row in range(6)]
    assert _texts(found) == [text for _, text in expected]
    np.testing.assert_allclose(found.scores, [score for score, _ in expected], rtol=1e-5)
    assert {*found.lengths} >= {1, 2, 5} and EOS not in found.tokens[found.lengths.argmax()]
    for row in range(6):
        alone = _run_alone(row, table, 5, method='greedy')
        chex.assert_trees_all_equal(alone, jax.tree.map(lambda x: x[row], found))


@pytest.mark.parametrize(
    ('temperature', 'top_k', 'top_p'),
    [(1.0, 0, 1.0), (1.3, 0, 0.6), (0.7, 4, 0.8), (1.0, 2, 1.0)],
)
def test_sampling_draws_only_what_is_allowed_as_often_as_it_should(temperature, top_k, top_p):
    logits, rows = np.array([0.3, -9.0, 1.1, 0.9, -0.4, 1.0]), 20_000  # all but certain not to end
    scaled = np.exp(logits / temperature)
    order = np.argsort(-scaled)[: top_k or None]
    shares = scaled[order] / scaled[order].sum()
    kept = 1 + int(np.searchsorted(np.cumsum(shares), top_p * (1 - 1e-9)))
    expected = np.zeros(6)
    expected[order[:kept]] = shares[:kept] / shares[:kept].sum()

    @jax.jit
    def run(keys):
        same = jnp.broadcast_to(jnp.float32(logits), (rows, 6))
        step = lambda state, tokens, index: (same[:, None], state)
        return generate(
            step,
            (),
            same,
            max_tokens=2,
            eos=-1,
            pad=PAD,
            method='sample',
            keys=keys,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
        )

    found = run(jax.random.split(jax.random.key(0), rows))
    pairs = np.zeros((6, 6))
    np.add.at(pairs, tuple(np.asarray(found.tokens).T), 1)
    both = np.outer(expected, expected)  # the second draw does not depend on the first
    assert not pairs[both == 0].any()
    assert (np.abs(pairs - rows * both) <= 5 * np.sqrt(rows * both * (1 - both)) + 1e-9).all()
    own = logits - np.log(np.exp(logits).sum())
    np.testing.assert_allclose(found.scores, own[found.tokens].sum(1), rtol=1e-4)


def test_what_a_row_draws_depends_on_its_key_only():
    table, keys = _table(6, 4, 5, seed=0), jax.random.split(jax.random.key(0), 6)
    found = _run(table, 5, method='sample', keys=keys)
    order = np.array([4, 1, 4, 4, 0, 5])  # other places, other neighbours
    moved = _run(table[order], 5, method='sample', keys=keys[order])
    np.testing.assert_array_equal(moved.tokens, found.tokens[order])
    other = _run(table, 5, method='sample', keys=jax.random.split(jax.random.key(1), 6))
    assert _texts(found) != _texts(other)


# ------------------------------------------- beam search


@pytest.mark.parametrize('penalty', [0.0, 1.5])
def test_a_wide_beam_finds_what_exhaustive_search_finds(penalty):
    vocabulary, length = 3, 4
    table = _table(5, vocabulary, length, seed=1, spread=1.0)
    found = _run(table, length, method='beam', beams=3**4, length_penalty=penalty)
    texts = [
        text
        for size in range(1, length + 1)
        for text in itertools.product(range(vocabulary), repeat=size)
        if EOS not in text[:-1] and (text[-1] == EOS or size == length)
    ]
    for row, text in enumerate(_texts(found)):
        read = functools.cache(_reader(table, row))
        scores = {t: _score(read, t) / len(t) ** penalty for t in texts}
        assert text == max(scores, key=scores.get)
        np.testing.assert_allclose(found.scores[row], scores[text], rtol=1e-5)


@pytest.mark.parametrize(('beams', 'penalty'), [(2, 0.0), (2, 1.0), (3, 2.0)])
def test_a_narrow_beam_follows_its_rules_and_stopping_early_changes_nothing(beams, penalty):
    length, table = 5, _table(40, 4, 5, seed=2, spread=1.5)
    options = {'method': 'beam', 'beams': beams, 'length_penalty': penalty}
    found = _run(table, length, **options)
    expected = [_beam_search(_reader(table, row), length, beams, penalty) for row in range(40)]
    assert _texts(found) == [text for _, text in expected]
    np.testing.assert_allclose(found.scores, [score for score, _ in expected], rtol=1e-5)
    assert len({*found.lengths}) > 2
    for row in (0, 7):
        alone = _run_alone(row, table, length, **options)
        chex.assert_trees_all_equal(alone, jax.tree.map(lambda x: x[row], found))


def test_a_beam_of_one_without_a_length_penalty_is_greedy():
    table = _table(40, 4, 5, seed=4)
    greedy = _run(table, 5, method='greedy')
    beam = _run(table, 5, method='beam', length_penalty=0.0)
    chex.assert_trees_all_close(beam, greedy, rtol=1e-6)


def test_loops_end_when_every_row_has_ended():
    length, table = 6, _table(1, 3, 6, seed=0, spread=0.1)
    table[0, 3] = [0, 30, 0]  # after the token 2 a text is over
    table[0, 0] = [0, 0, 30]
    calls = []

    def count(method, **options):
        step, first = _tabular(table)

        def counted(state, tokens, index):
            jax.debug.callback(lambda index: calls.append(int(index)), index)
            return step(state, tokens, index)

        state = jnp.zeros((1, 3 if method == 'beam' else 1), jnp.int32)
        run = jax.jit(
            lambda first: generate(
                counted, state, first, max_tokens=length, **ENDS, method=method, **options
            )
        )
        assert _texts(jax.tree.map(np.asarray, run(first))) == [(2, EOS)]
        jax.effects_barrier()
        return [calls.pop(0) for _ in range(len(calls))]

    assert count('greedy') == [0]
    assert count('beam', beams=3) == [0]


# ------------------------------------------- the decoder


V, W, P, T = 13, 16, 6, 7


@functools.cache
def _decoder():
    """A decoder whose logits differ enough to be told apart, and an uneven prompt."""
    model = Decoder(vocabulary=V, width=W, depth=1, heads=4, kv_heads=2, mlp_width=24, theta=50.0)
    init = functools.partial(model.init, train=False)
    shapes = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 2, W)), jnp.ones((1, 2)))
    rng = np.random.default_rng(5)
    draw = lambda x: jnp.asarray(rng.normal(0, 0.5, x.shape), x.dtype)
    mask = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 0, 1, 0, 0], [0, 0, 1, 1, 1, 0]], bool)
    return model, jax.tree.map(draw, shapes), rng.normal(size=(3, P, W)).astype('f'), mask


def _cached(model, variables, embeddings, mask, beams):
    apply = functools.partial(model.apply, variables)
    last, prefix = apply(embeddings, mask, method='prefill')

    def step(suffix, tokens, index):
        x = apply(tokens, method='embed')
        hidden, suffix = apply(x, prefix, suffix, index, method='step')
        return apply(hidden, method='logits'), suffix

    state = model.suffix(len(mask), beams, T - 1)
    return step, state, apply(last, method='logits')


@functools.cache
def _generator(method, beams):
    model = _decoder()[0]

    def run(variables, embeddings, mask):
        step, state, first = _cached(model, variables, embeddings, mask, beams)
        return generate(
            step,
            state,
            first,
            max_tokens=T,
            **ENDS,
            method=method,
            beams=beams,
            length_penalty=0.7,
        )

    return jax.jit(run)


@functools.cache
def _recompute():
    """Log-probabilities after one whole text, without a cache: the prompt is read anew too."""
    model = _decoder()[0]

    @jax.jit
    def read(variables, embeddings, mask, tokens, length):
        apply = functools.partial(model.apply, variables)
        joined = jnp.concatenate([embeddings, apply(tokens, method='embed')])[None]
        real = jnp.concatenate([mask, jnp.arange(T) < length])
        hidden = apply(joined, real[None], train=False)[0]
        last = jnp.where(real, jnp.arange(P + T), 0).max()
        return jax.nn.log_softmax(apply(hidden[last], method='logits'))

    return read


@pytest.mark.parametrize(('method', 'beams'), [('greedy', 1), ('beam', 3)])
def test_generation_with_the_cache_is_that_of_reading_every_text_from_scratch(method, beams):
    _, variables, embeddings, mask = _decoder()
    generator, texts = _generator(method, beams), []
    for shift in (0.0, 0.4, 0.8):
        changed = embeddings + np.float32(shift), np.roll(mask, int(shift > 0.5), 0)
        found = jax.tree.map(np.asarray, generator(variables, *changed))
        for row, text in enumerate(_texts(found)):
            given = [x[row] for x in changed]
            read = functools.cache(
                lambda text: np.asarray(
                    _recompute()(
                        variables, *given, np.array([*text, *[0] * (T - len(text))]), len(text)
                    ),
                    np.float64,
                )
            )
            score, expected = (
                _greedy(read, T) if method == 'greedy' else _beam_search(read, T, beams, 0.7)
            )
            assert text == expected
            np.testing.assert_allclose(found.scores[row], score, rtol=1e-5)
            texts.append(text)
    assert generator._cache_size() == 1  # changed inputs do not compile anew
    assert len({*texts}) > 6 and len({len(text) for text in texts}) > 2


def test_generation_refuses_arguments_out_of_range():
    step, first = _tabular(_table(2, 4, 1, seed=0))
    keys = jax.random.split(jax.random.key(0), 2)
    for change, message in (
        ({'method': 'best'}, "method 'best' is not one of greedy, sample, beam"),
        ({'max_tokens': 0}, 'max_tokens is 0, not positive'),
        ({'pad': 4}, 'pad 4 is not in the vocabulary of 4'),
        ({'method': 'sample', 'temperature': 0.0}, 'temperature is 0.0, not positive'),
        ({'method': 'sample', 'top_p': 0.0}, r'top_p is 0.0, not in \(0, 1\]'),
        ({'method': 'sample', 'top_p': 1.1}, r'top_p is 1.1, not in \(0, 1\]'),
        ({'method': 'beam', 'beams': 0}, 'beams is 0, not positive'),
        ({'method': 'sample', 'keys': None}, r'keys are not \[batch\], 2 of them'),
        ({'method': 'sample', 'keys': keys[:1]}, r'keys are not \[batch\], 2 of them'),
    ):
        options = {'method': 'greedy', 'max_tokens': 2, **ENDS, 'keys': keys, **change}
        with pytest.raises(ValueError, match=message):
            generate(step, (), first, **options)
