"""Greedy and beam decoding against exhaustive search, and the bigram model that joins them."""

import collections
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.decode import ctc, ngram

greedy = jax.jit(ctc.greedy)
beam_search = jax.jit(ctc.beam_search, static_argnames=('beam', 'max_length', 'symbols'))


def spelled(path):
    return tuple(symbol for symbol, _ in itertools.groupby(path) if symbol)


@functools.cache
def all_paths(frames, size):
    paths = np.array(list(itertools.product(range(size), repeat=frames)), int)
    return paths.reshape(size**frames, frames), [spelled(path) for path in paths.tolist()]


def exhaustive(log_probs):
    """{sequence: ln of the sum over all its paths} in float64."""
    log_probs = np.asarray(log_probs, np.float64)
    paths, sequences = all_paths(*log_probs.shape)
    found = collections.defaultdict(lambda: -np.inf)
    scores = log_probs[np.arange(len(log_probs)), paths].sum(axis=1)
    for sequence, score in zip(sequences, scores.tolist(), strict=True):
        found[sequence] = np.logaddexp(found[sequence], score)
    return dict(found)


def prefix_search(log_probs, beam):
    """The published search for one row, with a dict of prefixes, in float64."""
    beams = {(): (0.0, -np.inf)}
    for frame in np.asarray(log_probs, np.float64):
        new = collections.defaultdict(lambda: [-np.inf, -np.inf])
        for prefix, (blank, symbol) in beams.items():
            total = np.logaddexp(blank, symbol)
            new[prefix][0] = np.logaddexp(new[prefix][0], total + frame[0])
            if prefix:
                new[prefix][1] = np.logaddexp(new[prefix][1], symbol + frame[prefix[-1]])
            for k in range(1, len(frame)):
                source = blank if prefix and k == prefix[-1] else total
                grown = new[(*prefix, k)]
                grown[1] = np.logaddexp(grown[1], source + frame[k])
        best = sorted(new.items(), key=lambda item: -np.logaddexp(*item[1]))[:beam]
        beams = {prefix: tuple(pair) for prefix, pair in best}
    return {prefix: np.logaddexp(*pair) for prefix, pair in beams.items()}


def rows(lengths, size, seed=0, scale=1.5):
    """log_probs [B, T, V] whose padding is NaN, and the mask."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(len(lengths), max(lengths), size)) * scale
    log_probs = logits - np.logaddexp.reduce(logits, axis=2, keepdims=True)
    mask = np.arange(max(lengths)) < np.array(lengths)[:, None]
    return np.where(mask[..., None], log_probs, np.nan).astype(np.float32), mask


def from_path(paths, size, confidence=0.97):
    """log_probs whose most probable path is the given one."""
    rest = np.log((1 - confidence) / (size - 1))
    log_probs = np.full((len(paths), len(paths[0]), size), rest, np.float32)
    np.put_along_axis(log_probs, np.array(paths)[..., None], np.log(confidence), axis=2)
    return log_probs


def sequences(beams, row):
    pairs = zip(beams.ids[row].tolist(), beams.lengths[row].tolist(), strict=True)
    return [tuple(ids[:n]) for ids, n in pairs]


def check(beams, row, expected):
    """Finds the expected sequences, each once, with their scores, and returns them best first."""
    count = int(np.sum(np.isfinite(beams.scores[row])))
    found = sequences(beams, row)[:count]
    assert len(found) == len(set(found)) and set(found) == set(expected)
    values = [expected[sequence] for sequence in found]
    np.testing.assert_allclose(beams.scores[row, :count], values, rtol=1e-5, atol=1e-5)
    return found


PATHS = [
    [1, 1, 0, 1, 2, 2, 0, 0],  # 'a', a blank, 'a', then 'b' with no blank before it
    [0, 0, 3, 3, 3, 3, 3, 3],
    [2, 0, 0, 2, 0, 2, 2, 1],
    [0, 0, 0, 0, 0, 0, 0, 0],
]


def test_greedy_collapses_repeats_then_drops_blanks_and_tells_the_frames():
    mask = np.ones((5, 8), bool)
    mask[4, 3:] = False
    log_probs = from_path([*PATHS, PATHS[0]], 4)  # padding that looks real
    found = greedy(log_probs, mask)
    words = [[1, 1, 2], [3], [2, 2, 2, 1], [], [1]]
    spans = [
        [(0, 2), (3, 4), (4, 6)],
        [(2, 8)],
        [(0, 1), (3, 4), (5, 7), (7, 8)],
        [],
        [(0, 2)],
    ]
    np.testing.assert_array_equal(found.lengths, [3, 1, 4, 0, 1])
    for row in range(5):
        n = int(found.lengths[row])
        assert found.ids[row, :n].tolist() == words[row]
        both = zip(found.starts[row, :n].tolist(), found.ends[row, :n].tolist(), strict=True)
        assert list(both) == spans[row]
        for values in (found.ids, found.starts, found.ends):
            assert values.dtype == jnp.int32 and not np.any(values[row, n:])


def test_greedy_is_the_best_path_of_random_rows():
    log_probs, mask = rows([30, 17, 0, 1], 4)
    found = greedy(log_probs, mask)
    for row, length in enumerate([30, 17, 0, 1]):
        path = np.argmax(log_probs[row, :length], axis=1)
        ids = found.ids[row, : int(found.lengths[row])].tolist()
        assert tuple(ids) == spelled(path)
        for n, symbol in enumerate(ids):
            assert set(path[found.starts[row, n] : found.ends[row, n]]) == {symbol}


LENGTHS, SIZE = [6, 4, 1, 0], 4  # one shape, so that few programs are compiled


def test_a_large_beam_is_exhaustive_search():
    log_probs, mask = rows(LENGTHS, SIZE)
    beams = beam_search(log_probs, mask, beam=512)
    for row, length in enumerate(LENGTHS):
        expected = exhaustive(log_probs[row, :length])
        found = check(beams, row, expected)
        n = len(found)
        assert found[0] == max(expected, key=expected.get)
        assert not np.any(beams.ids[row, n:]) and not np.any(beams.lengths[row, n:])
    assert beams.ids.shape == (4, 512, 6) and np.all(np.diff(beams.scores[0, :9]) <= 0)


@pytest.mark.parametrize('beam', [2, 5])
def test_a_small_beam_is_the_published_search(beam):
    # Prefixes leave the beam and come back here, while their children are in it; and only beam + 1
    # symbols of 11 may grow a prefix, where the oracle tries all.
    lengths = [24, 13] * 8
    log_probs, mask = rows(lengths, 12, seed=beam, scale=1.0)
    beams = beam_search(log_probs, mask, beam=beam)
    for row, length in enumerate(lengths):
        expected = prefix_search(log_probs[row, :length], beam)
        assert sequences(beams, row) == list(expected)
        np.testing.assert_allclose(beams.scores[row], list(expected.values()), rtol=1e-5)


def test_defect_one_score_a_prefix():
    p = np.zeros((4, 6, SIZE), np.float32)
    p[0, :3, :2] = [0.4, 0.6]  # 'aa' has one path, 'a' all others: it must not repeat as new
    p[1, :2, :2] = [0.6, 0.4]  # the best path is blank, and yet 'a' is more probable than nothing
    mask = np.arange(6) < np.array([3, 2, 0, 0])[:, None]
    with np.errstate(divide='ignore'):
        log_probs = np.log(p)
    beams = beam_search(log_probs, mask, beam=512)
    both = 0.6 * 0.4 * 0.6
    check(beams, 0, {(1, 1): np.log(both), (): np.log(0.4**3), (1,): np.log(1 - both - 0.4**3)})
    assert greedy(log_probs, mask).lengths[1] == 0
    assert check(beams, 1, {(1,): np.log(0.64), (): np.log(0.36)})[0] == (1,)


def test_defect_repeats_not_collapsed_a_confident_input_is_greedy():
    rng = np.random.default_rng(0)
    paths = np.repeat(rng.integers(0, 20, size=(3, 40)), 4, axis=1)
    log_probs, mask = from_path(paths, 20), np.ones((3, 160), bool)
    beams, best = beam_search(log_probs, mask, beam=8, max_length=48), greedy(log_probs, mask)
    np.testing.assert_array_equal(beams.ids[:, 0], best.ids[:, :48])
    np.testing.assert_array_equal(beams.lengths[:, 0], best.lengths)
    for row in range(3):
        assert sequences(beams, row)[0] == spelled(paths[row].tolist())


def test_no_sequence_is_longer_than_max_length():
    log_probs, mask = rows(LENGTHS, SIZE)
    beams = beam_search(log_probs, mask, beam=512, max_length=2)
    assert beams.ids.shape == (4, 512, 2)
    check(beams, 0, {s: p for s, p in exhaustive(log_probs[0]).items() if len(s) <= 2})


def test_symbols_of_probability_zero_are_never_read():
    log_probs, mask = rows(LENGTHS, SIZE)
    log_probs[0, :, 2] = -np.inf
    log_probs[0, 3] = [-np.inf, 0, -np.inf, -np.inf]
    beams = beam_search(log_probs, mask, beam=512)
    assert not np.isnan(beams.scores).any()
    check(beams, 0, {s: p for s, p in exhaustive(log_probs[0]).items() if p > -np.inf})


def test_hashes_tell_prefixes_apart():
    keys = np.asarray(ctc._ROOT)[None]
    grow, every = jax.jit(ctc._grow), [keys]
    for _ in range(5):
        keys = np.asarray(grow(np.repeat(keys, 9, axis=0), np.tile(np.arange(1, 10), len(keys))))
        every.append(keys)
    keys = np.concatenate(every)
    whole = keys[:, 0].astype(np.uint64) << np.uint64(32) | keys[:, 1]
    assert len(keys) == (9**6 - 1) // 8 == len(np.unique(whole))
    for half in keys.T:  # by chance 66430² / 2³³ ≈ 0.5 collisions a half
        assert len(keys) - len(np.unique(half)) < 6


# The language model


SENTENCES = [[1, 2, 3], [1, 2], [2, 3, 3], [1, 2, 3, 1], [], [3], [1, 3]]


def log_p(table, sentence):
    """ln p(sentence, end) in float64."""
    steps = zip((0, *sentence), (*sentence, 0), strict=True)
    return sum(float(table[step]) for step in steps)


def test_every_context_sums_to_one_and_unseen_symbols_have_mass():
    table = ngram.bigrams(SENTENCES, 6).astype(float)
    assert table.shape == (6, 6) and np.isfinite(table).all()
    np.testing.assert_allclose(np.exp(table).sum(1), 1, rtol=1e-6)
    assert table[1, 3] > table[1, 4]  # seen after 1, and never
    np.testing.assert_array_equal(table[4], table[5])  # never seen at all: the unigrams


def test_bigrams_are_the_formula_by_hand():
    table = ngram.bigrams([[1, 2], [1, 2], [1, 3]], 5)
    # Bigrams: 0→1 three times, 1→2 twice, 2→end twice, 1→3 and 3→end once: D₂ = 2/(2 + 2·2).
    # Unigrams by how many came before: 1, 2 and 3 one each, the end two: D₁ = 3/(3 + 2·1).
    unigrams = np.array([2 - 0.6, 1 - 0.6, 1 - 0.6, 1 - 0.6, 0]) / 5 + 0.6 * 4 / 5 / 5
    after_1 = np.array([0, 0, 2 - 1 / 3, 1 - 1 / 3, 0]) / 3 + (1 / 3) * 2 / 3 * unigrams
    after_0 = np.array([0, 3 - 1 / 3, 0, 0, 0]) / 3 + (1 / 3) * 1 / 3 * unigrams
    after_2 = np.array([2 - 1 / 3, 0, 0, 0, 0]) / 2 + (1 / 3) * 1 / 2 * unigrams
    after_3 = np.array([1 - 1 / 3, 0, 0, 0, 0]) + (1 / 3) * unigrams
    wanted = [after_0, after_1, after_2, after_3, unigrams]
    np.testing.assert_allclose(table, np.log(wanted), rtol=1e-6)
    assert table.dtype == np.float32


def test_bigrams_refuse_what_they_cannot_count():
    with pytest.raises(ValueError, match='sentence 1 holds 4, outside 1 … 3'):
        ngram.bigrams([[1], [2, 4]], 4)
    with pytest.raises(ValueError, match='sentence 0 holds 0'):
        ngram.bigrams([[1, 0], [3]], 4)
    with pytest.raises(ValueError, match='got 0 sentences and 4 symbols'):
        ngram.bigrams([], 4)
    with pytest.raises(ValueError, match='at most 5000 symbols, got 1 sentences and 5001'):
        ngram.bigrams([[1]], 5001)


@pytest.mark.parametrize('bonus', [0.0, 0.7])
def test_shallow_fusion_is_exhaustive_search(bonus):
    log_probs, mask = rows(LENGTHS, SIZE)
    table = ngram.bigrams(SENTENCES, SIZE)
    options = dict(language_model=table, weight=0.8, length_bonus=bonus)
    beams = beam_search(log_probs, mask, beam=512, **options)
    for row, length in enumerate(LENGTHS):
        expected = {
            sequence: score + 0.8 * log_p(table, sequence) + bonus * len(sequence)
            for sequence, score in exhaustive(log_probs[row, :length]).items()
        }
        assert check(beams, row, expected)[0] == max(expected, key=expected.get)


def test_the_language_model_decides_where_the_frames_do_not():
    p = np.full((4, 6, SIZE), 1e-6, np.float32)
    p[0, 0, 1:3] = [0.48, 0.49]
    p[0, 1, 1:4:2] = [0.49, 0.48]
    mask = np.arange(6) < np.array([2, 0, 0, 0])[:, None]
    table = ngram.bigrams([[1, 3]] * 9 + [[2, 3]], SIZE)
    alone = beam_search(np.log(p), mask, beam=512)
    assert sequences(alone, 0)[0] == (2, 1)
    options = dict(beam=512, language_model=table, weight=0.5, length_bonus=0.0)
    every = beam_search(np.log(p), mask, **options)
    assert sequences(every, 0)[0] == (1, 3)
    few = beam_search(np.log(p), mask, **options, symbols=2)
    scores = dict(zip(sequences(every, 0), np.asarray(every.scores[0]), strict=True))
    found = [s for s, p in zip(sequences(few, 0), few.scores[0], strict=True) if np.isfinite(p)]
    assert found[0] == (1, 3) and (3, 1) in scores and (3, 1) not in found
    np.testing.assert_allclose(few.scores[0, :4], [scores[s] for s in found[:4]], rtol=1e-5)


@pytest.mark.usefixtures('unchecked_shapes')
def test_what_does_not_fit_is_named():
    log_probs, mask = rows([3], 4)
    with pytest.raises(ValueError, match=r'log_probs must be \[B, T, V\]'):
        ctc.greedy(log_probs[0], mask)
    with pytest.raises(ValueError, match='beam must be 1 or more'):
        ctc.beam_search(log_probs, mask, beam=0)
    with pytest.raises(ValueError, match=r'language_model must be \[4, 4\], got \[5, 5\]'):
        ctc.beam_search(log_probs, mask, beam=2, language_model=np.zeros((5, 5)))
