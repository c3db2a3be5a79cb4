"""Retrieval and collapse against brute force, with ties, one-panel pages and broken embeddings."""

import subprocess
import sys

import numpy as np
import pytest

from mmjax.evals import collapse, retrieval


def cosine(x, y):
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    return x @ y / (np.linalg.norm(x) * np.linalg.norm(y))


def brute_recall(queries, gallery, candidates_of, k, draws=4000):
    """Recall at k with ties broken by lot, many times; candidates_of(i) are gallery rows."""
    rng = np.random.default_rng(0)
    hits = []
    for i in range(len(queries)):
        candidates = candidates_of(i)
        scores = np.array([round(cosine(queries[i], gallery[j]), 5) for j in candidates])
        lots = rng.random((draws, len(candidates)))
        own = candidates.index(i)
        better = (scores > scores[own]) | ((scores == scores[own]) & (lots < lots[:, [own]]))
        hits.append(np.mean(better.sum(axis=1) < k))
    return np.array(hits)


def pages():
    rng = np.random.default_rng(1)
    groups = rng.permutation(np.repeat([40, -3, 7, 11, 12], [6, 4, 1, 3, 1]))
    queries = rng.normal(size=(15, 3)).astype(np.float32)
    gallery = queries + rng.normal(size=(15, 3)).astype(np.float32)
    first, second = np.flatnonzero(groups == 40)[:2]
    gallery[second] = 2 * gallery[first]  # a tie
    return queries, gallery, groups


def test_within_groups_is_brute_force():
    queries, gallery, groups = pages()
    found = retrieval.within_groups(queries, gallery, groups, ks=(1, 2, 5))
    scored = np.flatnonzero(~np.isin(groups, (7, 12)))
    assert found.left_out == 2 and len(found.correct) == len(found.groups) == 13
    for k in (1, 2, 5):
        hits = brute_recall(
            queries, gallery, lambda i: np.flatnonzero(groups == groups[i]).tolist(), k
        )[scored]
        np.testing.assert_allclose(found.recall[k], hits.mean(), atol=0.01)
        assert 0 < found.recall[k] <= 1
        sizes = np.array([np.sum(groups == groups[i]) for i in scored])
        np.testing.assert_allclose(found.chance[k], np.mean(np.minimum(k / sizes, 1)))
    assert found.recall[1] == found.correct.mean()
    for name in (40, -3, 11):
        rows = scored[groups[scored] == name]
        alone = retrieval.within_groups(queries[rows], gallery[rows], groups[rows])
        np.testing.assert_allclose(found.correct[found.groups == name], alone.correct)


def test_within_groups_chance_error_is_that_of_guessing():
    queries, gallery, groups = pages()
    found = retrieval.within_groups(queries, gallery, groups)
    rng = np.random.default_rng(0)
    sizes = np.array([np.sum(groups == group) for group in found.groups])
    guesses = (rng.random((20000, len(sizes))) < 1 / sizes).mean(axis=1)
    np.testing.assert_allclose(found.chance_error, guesses.std(), rtol=0.03)
    np.testing.assert_allclose(found.chance[1], guesses.mean(), rtol=0.03)


def test_pages_of_one_panel_only_give_no_accuracy():
    x = np.ones((3, 2), np.float32)
    found = retrieval.within_groups(x, x, np.arange(3))
    assert found.left_out == 3 and len(found.correct) == 0
    assert np.isnan(found.recall[1]) and np.isnan(found.chance[1])
    empty = retrieval.within_groups(x[:0], x[:0], np.arange(0))
    assert empty.left_out == 0 and np.isnan(empty.recall[1])


@pytest.mark.parametrize('value', [1.0, 0.0, 0.1234567])
def test_collapsed_embeddings_score_chance_and_never_one(value):
    rng = np.random.default_rng(0)
    collapsed = np.full((24, 33), value, np.float32)
    noise = rng.normal(size=collapsed.shape).astype(np.float32) * 1e-8
    groups = np.repeat(np.arange(6), 4)
    found = retrieval.within_groups(collapsed, collapsed + noise * (value > 0), groups)
    np.testing.assert_allclose(found.recall[1], 1 / 4)
    assert found.recall == pytest.approx(found.chance)
    whole = retrieval.paired(collapsed, collapsed, ks=(1, 5), chunk=7)
    np.testing.assert_allclose([whole[1], whole[5]], [1 / 24, 5 / 24])


@pytest.mark.parametrize('chunk', [4, 15, 100])
def test_paired_is_brute_force_whatever_the_tile(chunk):
    queries, gallery, _ = pages()
    found = retrieval.paired(queries, gallery, ks=(1, 3, 10, 50), chunk=chunk)
    for k in (1, 3, 10):
        hits = brute_recall(queries, gallery, lambda i: list(range(15)), k)
        np.testing.assert_allclose(found[k], hits.mean(), atol=0.01)
    assert found[50] == 1


def test_perfect_and_reversed_pairs():
    x = np.eye(8, dtype=np.float32)
    assert retrieval.paired(x * 3, x) == {1: 1.0, 5: 1.0, 10: 1.0}
    turned = retrieval.paired(x, np.roll(x, 1, axis=0), ks=(1,))
    assert turned[1] == 0


def test_retrieval_refuses_what_is_not_finite_or_does_not_fit():
    x = np.ones((4, 2), np.float32)
    broken = x.copy()
    broken[2, 0] = np.nan
    with pytest.raises(ValueError, match=r'gallery: row 2 is not finite \(1 of 4 rows\)'):
        retrieval.paired(x, broken)
    with pytest.raises(ValueError, match='queries: row 2 is not finite'):
        retrieval.within_groups(broken, x, np.zeros(4, int))
    with pytest.raises(ValueError, match='of one shape'):
        retrieval.paired(x, x[1:])
    with pytest.raises(ValueError, match=r'groups must be \[4\], got \[3\]'):
        retrieval.within_groups(x, x, np.zeros(3, int))
    with pytest.raises(ValueError, match='got none'):
        retrieval.paired(x[:0], x[:0])


def test_bootstrap_resamples_whole_pages():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(200), 5)
    right = np.repeat(rng.random(200) < 0.3, 5).astype(float)  # a page is right or wrong as one
    error = retrieval.bootstrap_by_group(right, groups, samples=2000)
    by_page = np.sqrt(right.mean() * (1 - right.mean()) / 200)
    np.testing.assert_allclose(error, by_page, rtol=0.1)  # √5 times the error by panel
    assert error == retrieval.bootstrap_by_group(right, groups, samples=2000)
    shuffled = rng.permutation(1000)
    np.testing.assert_allclose(
        retrieval.bootstrap_by_group(right[shuffled], groups[shuffled], samples=2000), error
    )
    assert retrieval.bootstrap_by_group([1.0, 0.0], [3, 3]) == float('inf')
    with pytest.raises(ValueError, match='one length'):
        retrieval.bootstrap_by_group([1.0, 0.0], [3])


# Collapse


def page_embeddings(spread, pages=20, panels=4, d=32, shared=0.0):
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(pages, d)) + shared
    rows = np.repeat(centres, panels, axis=0)
    return rows + spread * rng.normal(size=rows.shape), np.repeat(np.arange(pages), panels)


def test_page_cosines_are_brute_force():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(17, 4)) + 0.3
    page = rng.permutation(np.repeat([5, 2, 9, -1], [8, 1, 5, 3]))
    same, different = [], []
    for i in range(17):
        for j in range(17):
            if i != j:
                (same if page[i] == page[j] else different).append(cosine(x[i], x[j]))
    intra, inter = collapse.page_cosines(x, page)
    np.testing.assert_allclose([intra, inter], [np.mean(same), np.mean(different)], rtol=1e-10)


def test_verdicts_on_constructed_embeddings():
    cases = {
        'collapsed': (page_embeddings(0.01, shared=10.0), 0.9),
        'page_collapsed': (page_embeddings(0.05), 0.9),
        'weak_alignment': (page_embeddings(0.7), 0.27),
        'healthy': (page_embeddings(0.7), 0.9),
    }
    for expected, ((embeddings, page), accuracy) in cases.items():
        intra, inter = collapse.page_cosines(embeddings, page)
        assert collapse.verdict(intra, inter, accuracy, 0.25, 0.02) == expected
        assert intra > inter


def test_verdict_at_its_thresholds():
    assert collapse.verdict(0.96, 0.87, 1.0, 0.25, 0.01) == 'collapsed'
    assert collapse.verdict(0.96, 0.85, 1.0, 0.25, 0.01) == 'page_collapsed'
    assert collapse.verdict(0.94, 0.93, 1.0, 0.25, 0.01) == 'healthy'
    assert collapse.verdict(0.5, 0.1, 0.26, 0.25, 0.01) == 'weak_alignment'
    assert collapse.verdict(0.5, 0.1, 0.28, 0.25, 0.01) == 'healthy'
    assert collapse.verdict(0.5, 0.1, 0.9, 0.25, float('inf')) == 'weak_alignment'


def test_full_ties_on_equal_pages_are_weak_although_their_bootstrap_error_is_zero():
    groups = np.repeat(np.arange(9), 3)
    found = retrieval.within_groups(np.ones((27, 4)), np.ones((27, 4)), groups)
    error = retrieval.bootstrap_by_group(found.correct, found.groups)
    assert error < 1e-9
    assert collapse.verdict(0.5, 0.1, found.recall[1], found.chance[1], error) == 'weak_alignment'


def test_broken_numbers_raise_instead_of_reading_healthy():
    good = {'intra': 0.5, 'inter': 0.1, 'accuracy': 0.9, 'chance': 0.25, 'standard_error': 0.01}
    assert collapse.verdict(**good) == 'healthy'
    for name in good:
        with pytest.raises(ValueError, match=f'{name} is nan'):
            collapse.verdict(**{**good, name: float('nan')})
    x, page = page_embeddings(0.7)
    for broken in (np.nan, np.inf, 0.0):
        y = x.copy()
        y[3] = broken
        with pytest.raises(ValueError, match=r'row 3 is zero or not finite \(1 of 80 rows\)'):
            collapse.page_cosines(y, page)
    for one_kind in (np.arange(80), np.zeros(80, int)):
        with pytest.raises(ValueError, match='a page with two panels and a second page'):
            collapse.page_cosines(x, one_kind)
    with pytest.raises(ValueError, match=r'pages must be \[80\], got \[79\]'):
        collapse.page_cosines(x, page[1:])


def test_effective_rank():
    np.testing.assert_allclose(collapse.effective_rank(np.ones((50, 8))), 1, rtol=1e-4)
    np.testing.assert_allclose(collapse.effective_rank(np.tile(np.eye(8), (6, 1))), 8, rtol=1e-6)
    np.testing.assert_allclose(collapse.effective_rank(np.eye(64)[:5]), 5, rtol=1e-6)
    x = np.random.default_rng(0).normal(size=(30, 6)) * [9, 3, 1, 1, 0.1, 0.01]
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    shares = np.linalg.svd(x, compute_uv=False)
    shares /= shares.sum()
    expected = np.exp(-np.sum(shares * np.log(shares)))
    np.testing.assert_allclose(collapse.effective_rank(x * 5), expected, rtol=1e-6)


def test_evals_work_without_jax():
    code = (
        'import sys; sys.modules["jax"] = None; import mmjax.evals.retrieval, mmjax.evals.collapse'
    )
    subprocess.run([sys.executable, '-c', code], check=True)
