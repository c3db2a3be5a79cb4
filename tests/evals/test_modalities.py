"""What an embedding keeps of each modality: swaps, twins and the verdict, against brute force."""

import numpy as np
import pytest

from mmjax.evals import modalities


def test_cosines_are_those_of_each_row():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 7, 5))
    expected = [x @ y / np.linalg.norm(x) / np.linalg.norm(y) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(modalities.cosines(a * 100, b), expected, rtol=1e-12)
    assert modalities.cosines(np.zeros((1, 3)), np.ones((1, 3))).tolist() == [0.0]


def test_twins_that_an_embedding_cannot_tell_apart_score_half():
    rng = np.random.default_rng(0)
    queries, right, wrong = rng.normal(size=(3, 40, 6))
    expected = np.mean(
        [
            q @ r / np.linalg.norm(r) > q @ w / np.linalg.norm(w)
            for q, r, w in zip(queries, right, wrong, strict=True)
        ]
    )
    found = modalities.twin_accuracy(queries, right, wrong, margin=0)
    assert found == pytest.approx(expected)
    assert modalities.twin_accuracy(queries, right, 3 * right) == 0.5
    assert modalities.twin_accuracy(queries, queries, wrong) == 1.0
    assert np.isnan(modalities.twin_accuracy(*np.zeros((3, 0, 6))))


def test_the_verdict_names_what_hardly_moves_the_embedding():
    """The default comic run once ended with these cosines, and was called healthy."""
    found = {'vision': 0.744, 'text': 0.9986, 'composition': 0.93}
    assert modalities.verdict(found, 0.4) == 'ignores_text'
    assert modalities.verdict({**found, 'vision': 0.99}, 0.4) == 'ignores_vision, ignores_text'
    assert modalities.verdict({**found, 'text': 0.9}, 0.4) == 'balanced'
    # The same movement is much where embeddings are all alike.
    assert modalities.verdict({'text': 0.9986}, 0.99) == 'balanced'
    # A model that says the same of all examples ignores all of them, whatever rounding says.
    assert modalities.verdict({'text': 0.9999998}, 0.9999998) == 'ignores_text'
    assert modalities.verdict({'text': float('nan')}, 0.4) == 'unknown'
    assert modalities.verdict({'text': 0.5}, float('nan')) == 'unknown'


def test_each_verdict_has_a_sentence():
    words = modalities.verdicts({'image': 'picture', 'text': 'text', 'place': 'place'})
    assert len(words) == 2 + 7
    cosines = dict.fromkeys(('image', 'text', 'place'), 1.0)
    for name in cosines:
        assert modalities.verdict({**cosines, name: 0.5}, 0.4) in words
    assert words[modalities.verdict(cosines, 0.4)][0] == 'bad'
    assert 'Another text or place' in words['ignores_text, ignores_place'][1]


def test_twins_need_a_margin():
    """With a weight of .001 the sign of the difference is still right."""
    rng = np.random.default_rng(3)
    rest, own, other = rng.normal(size=(3, 50, 64))
    for weight, expected in ((1e-3, 0.5), (0.5, 1.0)):
        right, wrong = rest + weight * own, rest + weight * other
        assert modalities.twin_accuracy(own, right, wrong) == expected


def test_tower_scores_are_the_mean_cosines_of_different_items():
    rng = np.random.default_rng(2)
    rows = rng.normal(size=(12, 4)) + 0.3
    items = np.array(list('aabbbcdddeef'))
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    cosines = [unit[i] @ unit[j] for i in range(12) for j in range(12) if items[i] != items[j]]
    deaf = np.ones((12, 4)) + 1e-4 * rows
    scores = modalities.tower_scores({'image': (rows, items), 'text': (deaf, items)})
    assert scores['swap_cosine_image'] == pytest.approx(np.mean(cosines))
    assert scores['swap_cosine_text'] > 0.99
    assert scores['modality_verdict'] == 'ignores_text'
    assert modalities.tower_scores({'image': (rows, np.zeros(12))}) == {}
    words = modalities.verdicts({'image': 'picture'})
    assert words['ignores_image'][0] == 'bad' and words['balanced'][0] == 'good'
