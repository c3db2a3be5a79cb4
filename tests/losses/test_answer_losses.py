"""Losses and scores of classes and answers, against float64, hand counts and the libraries."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sacrebleu
from rouge_score import rouge_scorer

from mmjax.evals import classification as classes
from mmjax.evals import generation
from mmjax.losses import classification, language

RNG = np.random.default_rng(0)
MASK = np.array([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]], bool)
JITTED = pytest.mark.parametrize('jit', [lambda f: f, jax.jit], ids=['plain', 'jit'])


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


# Losses -------------------------------------------------------------------------------------


@JITTED
@pytest.mark.parametrize('smoothing', [0.0, 0.1])
def test_classes_cost_their_cross_entropy_and_its_gradient(jit, smoothing):
    logits = (5 * RNG.normal(size=(6, 4)) + 300).astype(np.float32)
    labels = RNG.integers(0, 4, 6).astype(np.int32)
    targets = (1 - smoothing) * np.eye(4)[labels] + smoothing / 4
    expected = -(targets * log_softmax(logits)).sum(1)
    rows = lambda x: classification.cross_entropy_rows(x, labels, smoothing=smoothing)
    np.testing.assert_allclose(jit(rows)(logits), expected, rtol=1e-4)
    found = jit(jax.grad(lambda x: rows(x).sum()))(logits)
    np.testing.assert_allclose(found, np.exp(log_softmax(logits)) - targets, atol=1e-5)


def test_half_precision_logits_are_summed_in_float32():
    logits = jnp.asarray(RNG.normal(size=(3, 5)), jnp.bfloat16)
    labels = np.array([0, 4, 2])
    found = classification.cross_entropy_rows(logits, labels)
    assert found.dtype == jnp.float32
    expected = -log_softmax(logits.astype(jnp.float32))[np.arange(3), labels]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    mask = np.ones((1, 3), bool)
    sums, _, _ = language.token_rows(logits[None], labels[None], mask)
    assert sums.dtype == jnp.float32
    np.testing.assert_allclose(sums, [expected.sum()], rtol=1e-5)


@pytest.mark.parametrize(
    ('logits', 'labels', 'smoothing', 'message'),
    [((2, 3), (3,), 0.0, 'labels'), ((3,), (3,), 0.0, 'labels'), ((2, 3), (2,), 1.0, r'\[0, 1\)')],
)
@pytest.mark.usefixtures('unchecked_shapes')
def test_classes_that_do_not_fit_are_refused(logits, labels, smoothing, message):
    with pytest.raises(ValueError, match=message):
        classification.cross_entropy_rows(
            jnp.zeros(logits), jnp.zeros(labels, jnp.int32), smoothing=smoothing
        )


def test_a_term_of_classes_leaves_rows_out_that_fill_a_batch():
    rows, mask = jnp.array([1.0, jnp.nan, 5.0]), jnp.array([True, False, True])
    assert tuple(map(float, classification.classification(rows, mask))) == (6, 2)
    none = classification.classification(rows, jnp.zeros(3, bool))
    assert float(none.mean()) == 0


@JITTED
def test_tokens_cost_their_cross_entropy_whatever_padding_holds(jit):
    logits = RNG.normal(size=(3, 4, 7)).astype(np.float32)
    targets = RNG.integers(0, 7, (3, 4)).astype(np.int32)
    targets[0, 1] = logits[0, 1].argmax()
    picked = np.take_along_axis(log_softmax(logits), targets[..., None], 2)[..., 0]
    right = (logits.argmax(-1) == targets) & MASK
    dirty = np.where(MASK[..., None], logits, np.nan)
    beyond = np.where(MASK, targets, -100)
    kept = beyond.copy(), dirty.copy()
    sums, counts, correct = jit(language.token_rows)(dirty, beyond, MASK)
    np.testing.assert_allclose(sums, -np.where(MASK, picked, 0).sum(1), rtol=1e-5)
    assert counts.tolist() == [4, 1, 0] and correct.tolist() == right.sum(1).tolist()
    assert correct[0] >= 1
    np.testing.assert_array_equal(beyond, kept[0])  # the original wrote −100 into its labels
    np.testing.assert_array_equal(dirty, kept[1])


@JITTED
def test_gradients_of_tokens_are_those_of_a_softmax_and_none_on_padding(jit):
    logits = RNG.normal(size=(3, 4, 7)).astype(np.float32)
    targets = RNG.integers(0, 7, (3, 4)).astype(np.int32)
    dirty = np.where(MASK[..., None], logits, np.nan)
    found = jit(jax.grad(lambda x: language.token_rows(x, targets, MASK)[0].sum()))(dirty)
    expected = (np.exp(log_softmax(logits)) - np.eye(7)[targets]) * MASK[..., None]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_of_equal_logits_the_first_is_what_is_said():
    mask = np.ones((1, 2), bool)
    _, _, correct = language.token_rows(jnp.zeros((1, 2, 3)), np.array([[0, 1]]), mask)
    assert correct.tolist() == [1]


@pytest.mark.usefixtures('unchecked_shapes')
def test_tokens_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r'\(1, 2, 3\), \(1, 3\) and \(1, 2\)'):
        language.token_rows(jnp.zeros((1, 2, 3)), np.zeros((1, 3), int), np.ones((1, 2)))


@JITTED
def test_a_decoder_reads_what_stands_before_and_says_what_it_was_told(jit):
    tokens = np.array([[5, 6, 7, 1], [8, 1, 0, 0], [0, 0, 0, 0]], np.int32)
    mask, kept = tokens > 0, tokens.copy()
    read, seen = jit(lambda t, m: language.shift_right(t, m, 9))(tokens, mask)
    assert read.dtype == np.int32 and read.tolist() == [[9, 5, 6, 7], [9, 8, 1, 0], [9, 0, 0, 0]]
    np.testing.assert_array_equal(seen, mask)
    np.testing.assert_array_equal(tokens, kept)


# Scores of classes --------------------------------------------------------------------------


def test_class_scores_are_those_of_a_hand_count():
    """Class 3 is neither true nor said: no mean counts it. Class 2 is said, and never right."""
    truth, answers = [0, 0, 0, 1, 1, 0], [0, 0, 1, 1, 2, 0]
    found, confusion = classes.score(truth, answers, 4)
    assert confusion.tolist() == [[3, 1, 0, 0], [0, 1, 1, 0], [0] * 4, [0] * 4]
    assert found['accuracy'] == pytest.approx(4 / 6) and found['majority'] == pytest.approx(4 / 6)
    assert found['precision'] == pytest.approx((1 + 1 / 2 + 0) / 3)
    assert found['recall'] == pytest.approx((3 / 4 + 1 / 2 + 0) / 3)
    assert found['f1'] == pytest.approx((6 / 7 + 1 / 2 + 0) / 3)
    assert (found['accuracy_low'], found['accuracy_high']) == classes.wilson(4, 6)


@pytest.mark.parametrize(
    ('truth', 'answers', 'message'),
    [([], [], 'n > 0'), ([0, 1], [0], 'n > 0'), ([0, 3], [0, 0], '0 … 2'), ([0], [-1], '0 … 2')],
)
def test_classes_out_of_range_are_refused(truth, answers, message):
    with pytest.raises(ValueError, match=message):
        classes.score(np.array(truth, int), np.array(answers, int), 3)


@pytest.mark.parametrize(
    ('right', 'n', 'low', 'high'),
    # Newcombe 1998, Table I, method 3: the score method without continuity correction.
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilsons_interval_is_the_published_one(right, n, low, high):
    assert classes.wilson(right, n) == pytest.approx((low, high), abs=5e-5)
    mirrored = classes.wilson(n - right, n)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_a_confusion_matrix_is_drawn_with_the_truth_down():
    drawn = classes.figure(np.array([[3, 1], [0, 7]]), ['none', 'some'])
    axis = drawn.axes[0]
    counts = {text.get_position(): text.get_text() for text in axis.texts}
    assert counts == {(0, 0): '3', (1, 0): '1', (0, 1): '0', (1, 1): '7'}
    assert (axis.get_xlabel(), axis.get_ylabel()) == ('answer', 'truth')


# Scores of texts ----------------------------------------------------------------------------

TRUTHS = ['There are two receipts here.', 'It is from the Corner Store.', 'Paid by card.', 'No.']
SAID = ['There are three receipts here.', 'It is from the corner shop', ' Paid by card. ', 'Yes.']


def test_text_scores_are_those_of_the_libraries_over_the_whole_lists():
    found = generation.score(TRUTHS, SAID)
    for order in range(1, 5):
        bleu = sacrebleu.metrics.BLEU(max_ngram_order=order).corpus_score(SAID, [TRUTHS])
        assert found[f'bleu{order}'] == pytest.approx(bleu.score / 100), order
    assert found['bleu4'] == pytest.approx(sacrebleu.corpus_bleu(SAID, [TRUTHS]).score / 100)
    sentences = [sacrebleu.sentence_bleu(s, [t]).score for s, t in zip(SAID, TRUTHS, strict=True)]
    assert found['sentence_bleu4'] == pytest.approx(np.mean(sentences) / 100)
    scorer = rouge_scorer.RougeScorer(['rouge1', 'rouge2', 'rougeL'])
    for name in ('rouge1', 'rouge2', 'rougeL'):
        each = [scorer.score(t, s)[name].fmeasure for t, s in zip(TRUTHS, SAID, strict=True)]
        assert found[name] == pytest.approx(np.mean(each)), name
    assert found['exact_match'] == 0.25


def test_bleu_of_words_counted_by_hand():
    """5 of 6 words, 3 of 5 pairs; a text one word shorter pays exp(1 − 6/5)."""
    found = generation.score(['a b c d e f'], ['a b c x e f'])
    assert found['bleu1'] == pytest.approx(5 / 6)
    assert found['bleu2'] == pytest.approx(math.sqrt(5 / 6 * 3 / 5))
    assert found['rouge2'] == pytest.approx(3 / 5)
    short = generation.score(['a b c d e f'], ['a b c d e'])
    assert short['bleu1'] == pytest.approx(math.exp(1 - 6 / 5))


def test_equal_texts_score_one_and_unlike_ones_nearly_nothing():
    texts = ['There are two of them.', 'I see no receipt at all.']
    assert list(generation.score(texts, texts).values()) == pytest.approx([1] * 9)
    found = generation.score(texts, ['purple', ''])
    assert found['exact_match'] == found['rouge1'] == 0 and found['bleu4'] < 0.1


def test_texts_are_not_scored_in_part():
    for truths, said in ((TRUTHS, SAID[:3]), ([], []), (TRUTHS[:3], SAID)):
        with pytest.raises(ValueError, match='references and'):
            generation.score(truths, said)
    with pytest.raises((TypeError, AttributeError)):  # no answer at all is an error, never a 0
        generation.score(TRUTHS, [None, *SAID[1:]])


def test_what_the_libraries_cannot_count_is_as_documented():
    short = generation.score(['No.', 'Yes.'], ['No.', 'Yes.'])
    assert short['bleu4'] == short['rouge2'] == 0 and short['bleu2'] == pytest.approx(1)
    assert short['sentence_bleu4'] == pytest.approx(1) and short['exact_match'] == 1
    foreign = generation.score(['один чек'], ['один чек'])
    assert foreign['rouge1'] == 0 and foreign['exact_match'] == 1
