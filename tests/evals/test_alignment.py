"""Word error rates against jiwer, what they are not, and the pictures beside them."""

import io
import subprocess
import sys
import warnings

import jiwer
import numpy as np
import pytest

from mmjax.evals import alignment, posteriorgram


def sentences(count, seed=0, shortest=0):
    """Random references and hypotheses of few words, so that there are many ties."""
    rng = np.random.default_rng(seed)
    words = np.array(['a', 'b', 'c', 'd', 'e'])
    size = rng.integers(1, 6, count)
    pairs = [
        [words[rng.integers(n, size=rng.integers(low, 10))].tolist() for low in (shortest, 0)]
        for n in size
    ]
    return [a for a, _ in pairs], [b for _, b in pairs]


def joined(texts):
    return [' '.join(words) for words in texts]


def test_totals_and_rates_are_those_of_jiwer():
    references, hypotheses = sentences(400)
    found = alignment.errors(references, hypotheses)
    expected = jiwer.process_words(joined(references), joined(hypotheses))
    assert found.substitutions == expected.substitutions
    assert found.deletions == expected.deletions
    assert found.insertions == expected.insertions
    assert found.wer == pytest.approx(expected.wer)
    assert found.words == sum(len(words) for words in references)
    assert found.sentences == 400
    assert found.wrong == sum(a != b for a, b in zip(references, hypotheses, strict=True))
    assert found.ser == found.wrong / 400 and 0 < found.ser < 1


def test_alignments_are_those_of_jiwer_ties_too():
    references, hypotheses = sentences(400, seed=1, shortest=1)
    expected = jiwer.process_words(joined(references), joined(hypotheses)).alignments
    for a, b, chunks in zip(references, hypotheses, expected, strict=True):
        steps = []
        for chunk in chunks:
            left = a[chunk.ref_start_idx : chunk.ref_end_idx]
            right = b[chunk.hyp_start_idx : chunk.hyp_end_idx]
            length = max(len(left), len(right))
            steps += zip(
                [chunk.type] * length,
                left or [None] * length,
                right or [None] * length,
                strict=True,
            )
        assert alignment.align(a, b) == steps


def test_steps_spell_both_sides_and_kinds_are_told_apart():
    reference = ['the', 'rain', 'comes', 'in', 'the', 'north']
    hypothesis = ['rain', 'comes', 'from', 'the', 'the']
    steps = alignment.align(reference, hypothesis)
    assert steps == [
        ('delete', 'the', None),
        ('equal', 'rain', 'rain'),
        ('equal', 'comes', 'comes'),
        ('substitute', 'in', 'from'),
        ('equal', 'the', 'the'),
        ('substitute', 'north', 'the'),
    ]
    found = alignment.errors([reference, [1, 2]], [hypothesis, [3, 1, 2]])
    assert (found.substitutions, found.deletions, found.insertions) == (2, 1, 1)
    assert (found.words, found.sentences, found.wrong) == (8, 2, 2)
    assert found.confusions == {('in', 'from'): 1, ('north', 'the'): 1}


def test_defect_wer_capped_at_one_and_arguments_swapped():
    found = alignment.errors([['a']], [['b', 'c']])
    assert found.wer == 2.0 and found.insertions == 1 and found.deletions == 0
    assert alignment.errors([['b', 'c']], [['a']]).wer == 1.0
    one = alignment.errors([['x', 'y', 'z']], [['x']])
    assert (one.deletions, one.insertions) == (2, 0) and one.wer == pytest.approx(2 / 3)


def test_rates_are_of_all_words_together_not_means_of_sentences():
    references = [['a'] * 9, ['b']]
    assert alignment.errors(references, [['a'] * 9, ['c']]).wer == 0.1


def test_empty_sentences():
    found = alignment.errors([[], ['a'], []], [['b', 'c'], [], []])
    assert (found.insertions, found.deletions, found.words, found.wrong) == (2, 1, 1, 2)
    assert found.wer == 3.0
    silent = alignment.errors([[], []], [['b'], []])
    assert np.isnan(silent.wer) and silent.insertions == 1 and silent.ser == 0.5
    none = alignment.errors([], [])
    assert np.isnan(none.wer) and np.isnan(none.ser)


def test_by_length_are_the_sentences_of_each_length():
    references, hypotheses = sentences(60)
    table = alignment.by_length(references, hypotheses)
    assert list(table) == sorted({len(words) for words in references})
    for length, found in table.items():
        rows = [i for i, words in enumerate(references) if len(words) == length]
        alone = [references[i] for i in rows], [hypotheses[i] for i in rows]
        assert found == alignment.errors(*alone)
        assert found.words == length * len(rows)
    whole = alignment.errors(references, hypotheses)
    assert sum(found.substitutions for found in table.values()) == whole.substitutions


def test_what_does_not_fit_is_named():
    for function in (alignment.errors, alignment.by_length):
        with pytest.raises(ValueError, match='2 references, but 1 hypotheses'):
            function([['a'], ['b']], [['a']])
        with pytest.raises(ValueError, match='must be a list of words, got a string'):
            function(['the rain'], [['the', 'rain']])


# Pictures

NAMES = ['<blank>', 'RAIN', 'NORTH', 'SUN', 'WIND', 'MUCH']


def texts(axis):
    """{(text, rounded place): colour} of an axis."""
    return {(t.get_text(), round(t.get_position()[0], 2)): t.get_color() for t in axis.texts}


def rendered(figure):
    with warnings.catch_warnings():
        warnings.simplefilter('error')  # a missing glyph, labels that do not fit
        figure.savefig(io.BytesIO(), format='png', dpi=40)
    return figure


def test_posteriorgram_shows_tracks_spans_and_the_reference_under_what_it_became():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(30, 6))
    log_probs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    spans = [(1, 2, 5), (3, 10, 11), (4, 20, 24)]
    figure = posteriorgram.posteriorgram(log_probs, spans, [1, 2, 5, 4], NAMES, 'a title')
    upper, lower = rendered(figure).axes[:2]
    tracks = [label.get_text() for label in upper.get_yticklabels()]
    assert tracks == ['<blank>', 'RAIN', 'SUN', 'WIND', 'NORTH', 'MUCH']
    drawn = upper.images[0].get_array()
    np.testing.assert_allclose(drawn, np.exp(log_probs[:, [0, 1, 3, 4, 2, 5]]).T, rtol=1e-6)
    assert upper.get_title() == 'a title' and figure.get_label()
    bars = [(p.get_x(), p.get_width(), p.get_facecolor()[:3]) for p in lower.patches]
    assert [bar[:2] for bar in bars] == [(1.5, 3), (9.5, 1), (19.5, 4)]  # a frame is its centre ± ½
    assert bars[0][2] == bars[2][2] != bars[1][2]
    green, red = 'tab:green', 'tab:red'
    # NORTH became SUN; MUCH was deleted, and stands half way between its neighbours.
    assert texts(lower) == {
        ('RAIN', 3.0): green,
        ('SUN', 10.0): red,
        ('WIND', 21.5): green,
        ('NORTH', 10.0): red,
        ('MUCH', 15.75): red,
    }


def test_posteriorgram_of_nothing_decoded_or_nothing_expected():
    log_probs = np.log(np.full((9, 6), 1 / 6))
    nothing = rendered(posteriorgram.posteriorgram(log_probs, [], [1, 1, 2], NAMES))
    assert set(texts(nothing.axes[1]).values()) == {'tab:red'}
    assert [x for _, x in texts(nothing.axes[1])] == [1.75, 4.0, 6.25]
    extra = rendered(posteriorgram.posteriorgram(log_probs, [(3, 0, 2)], [], NAMES))
    assert texts(extra.axes[1]) == {('SUN', 0.5): 'tab:red'}
    with pytest.raises(ValueError, match=r'log_probs must be \[T, 5\], got \[9, 6\]'):
        posteriorgram.posteriorgram(log_probs, [], [], NAMES[:5])


def test_confusions_are_drawn_most_frequent_first():
    counts = {('SUN', 'RAIN'): 3, ('WIND', 'MUCH'): 7, ('RAIN', 'NORTH'): 3, ('RAIN', 'SUN'): 1}
    axis = rendered(posteriorgram.confusions(counts, top_k=3)).axes[0]
    labels = [label.get_text() for label in axis.get_yticklabels()]
    assert labels == ['WIND → MUCH', 'RAIN → NORTH', 'SUN → RAIN']
    assert [bar.get_width() for bar in axis.patches] == [7, 3, 3]
    assert axis.yaxis_inverted()
    assert not rendered(posteriorgram.confusions({})).axes[0].patches


def test_they_work_without_jax():
    code = 'import sys; sys.modules["jax"] = None; import mmjax.evals.posteriorgram'
    subprocess.run([sys.executable, '-c', code], check=True)
