"""Query→gallery scores against full sorts in plain loops and against every order of the ties."""

import itertools
import math
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

from mmjax.evals import gallery, ties

TIE = 1e-6


def cosines(queries, rows):
    """float64 [q, g]; a zero row has cosine 0."""
    unit = lambda x: x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-300)
    return unit(np.asarray(queries, np.float64)) @ unit(np.asarray(rows, np.float64)).T


def of_ranking(truth):
    """Scores of one ranking, a list of right or wrong: ap, inp, first and hits at 1 … 50."""
    places = [place for place, right in enumerate(truth, 1) if right]
    ap = sum((done + 1) / place for done, place in enumerate(places)) / len(places)
    hits = [float(places[0] <= k) for k in range(1, 51)]
    return np.array([ap, len(places) / places[-1], places[0], *hits])


def every_order(scores, truth):
    """The mean of `of_ranking` over all orders of the candidates that tie."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    classes = [[order[0]]]
    for before, i in itertools.pairwise(order):
        if scores[before] - scores[i] > TIE:
            classes.append([])
        classes[-1].append(i)
    # Only where the right ones stand matters: each such order of a class is as likely as another.
    patterns = []
    for members in classes:
        right = sum(bool(truth[i]) for i in members)
        chosen = itertools.combinations(range(len(members)), right)
        patterns.append([[i in places for i in range(len(members))] for places in chosen])
    orders = [of_ranking(list(itertools.chain(*parts))) for parts in itertools.product(*patterns)]
    return np.mean(orders, axis=0)


def brute(queries, rows, query_ids, gallery_ids, query_rows=None, gallery_rows=None):
    """[scored], [scored, 3 + 50] by `every_order`, in plain loops over the whole gallery."""
    scores, scored, values = cosines(queries, rows), [], []
    for q in range(len(queries)):
        own = lambda g: query_rows is not None and query_rows[q] == gallery_rows[g]
        kept = [g for g in range(len(rows)) if not own(g)]
        truth = [query_ids[q] == gallery_ids[g] for g in kept]
        if any(truth):
            scored.append(q)
            values.append(every_order([scores[q, g] for g in kept], truth))
    return np.array(scored), np.array(values)


def check(found, scored, values, queries):
    np.testing.assert_array_equal(found.scored, scored)
    np.testing.assert_allclose(found.ap, values[:, 0], atol=1e-10)
    np.testing.assert_allclose(found.inp, values[:, 1], atol=1e-10)
    np.testing.assert_allclose(found.first, values[:, 2], atol=1e-10)
    np.testing.assert_allclose(found.cmc, values[:, 3:].mean(axis=0), atol=1e-10)
    np.testing.assert_allclose([found.map, found.minp], values[:, :2].mean(axis=0), atol=1e-10)
    for k, rank in found.rank.items():
        np.testing.assert_allclose(found.hits[k], values[:, 2 + k], atol=1e-10)
        np.testing.assert_allclose(rank, found.cmc[k - 1])
    assert found.left_out == queries - len(scored)


def case(seed, kind):
    """Queries, gallery and their identities: identities of one picture, some without a partner."""
    rng = np.random.default_rng(seed)
    rows, gallery_ids = rng.normal(size=(60, 5)), rng.integers(14, size=60)
    queries, query_ids = rng.normal(size=(17, 5)), rng.integers(17, size=17)
    if kind == 'ties':  # few directions, of several lengths: classes with right and wrong ones
        directions = rng.normal(size=(12, 5))
        rows = directions[rng.integers(12, size=14)] * rng.choice([0.3, 1, 7], size=(14, 1))
        gallery_ids, query_ids = rng.integers(4, size=14), rng.integers(5, size=17)
        queries[:6] = directions[:6]
    return queries.astype(np.float32), rows.astype(np.float32), query_ids, gallery_ids


@pytest.mark.parametrize('chunks', [(1, 1), (5, 13), (7, 60), (100, 100)])
@pytest.mark.parametrize('kind', ['random', 'ties'])
def test_rank_is_the_mean_over_every_order_of_a_full_sort(kind, chunks):
    for seed in range(4):
        queries, rows, query_ids, gallery_ids = case(seed, kind)
        expected = brute(queries, rows, query_ids, gallery_ids)
        found = gallery.rank(
            queries,
            rows,
            query_ids,
            gallery_ids,
            ks=(1, 2, 10),
            chunk_queries=chunks[0],
            chunk_gallery=chunks[1],
        )
        check(found, *expected, 17)
        assert 0 < found.left_out < 17


def test_the_mean_over_every_order_on_a_case_worked_by_hand():
    # Wrong above, then {right, right, wrong} tie: RRW, RWR and WRR behind the first.
    rows = np.array([[1, 0], [1, 1], [2, 2], [3, 3], [0, 1]], np.float32)
    found = gallery.rank(rows[:1], rows, [7], [0, 7, 7, 0, 0], ks=(1, 2, 3))
    ap = np.mean([(1 / 2 + 2 / 3) / 2, (1 / 2 + 2 / 4) / 2, (1 / 3 + 2 / 4) / 2])
    np.testing.assert_allclose(found.map, ap)
    np.testing.assert_allclose(found.minp, np.mean([2 / 3, 2 / 4, 2 / 4]))
    np.testing.assert_allclose(found.first, [np.mean([2, 2, 3])])
    np.testing.assert_allclose(list(found.rank.values()), [0, 2 / 3, 1], atol=1e-15)
    np.testing.assert_allclose(list(found.chance.values()), [2 / 5, 7 / 10, 9 / 10])


def test_the_query_itself_is_no_candidate():
    for kind in ('random', 'ties'):
        _, rows, _, ids = case(5, kind)
        ids = np.array([f'item {i}' for i in ids])
        pictures = np.random.default_rng(0).permutation(len(rows))
        pictures[3] = pictures[8]  # one picture that stands in the gallery twice
        expected = brute(rows, rows, ids, ids, pictures, pictures)
        found = gallery.rank(
            rows,
            rows,
            ids,
            ids,
            query_rows=pictures,
            gallery_rows=pictures,
            chunk_queries=11,
            chunk_gallery=9,
        )
        check(found, *expected, len(rows))
        sizes = np.array([np.sum(ids == name) for name in ids])
        assert found.left_out >= np.sum(sizes == 1)
        candidates = pictures != pictures[:, None]
        right = np.sum(candidates & (ids == ids[:, None]), axis=1)[found.scored]
        chance = np.mean(right / np.sum(candidates, axis=1)[found.scored])
        np.testing.assert_allclose(found.chance[1], chance)
        with_itself = gallery.rank(rows, rows, ids, ids)
        assert with_itself.left_out == 0 and with_itself.map > found.map


def test_perfect_embeddings_score_one_everywhere():
    ids = np.repeat(np.arange(9), [1, 2, 5, 1, 3, 4, 2, 7, 60])
    found = gallery.rank(np.eye(9), np.eye(9)[ids] * 4, np.arange(9), ids, chunk_gallery=8)
    for values in (found.cmc, found.ap, found.inp, found.first, *found.hits.values()):
        np.testing.assert_array_equal(values, 1)
    assert (found.map, found.minp, found.left_out) == (1, 1, 0)


@pytest.mark.parametrize('value', [1.0, 0.0, 0.1234567])
def test_collapsed_embeddings_score_chance_and_never_one(value):
    rng = np.random.default_rng(0)
    ids = rng.permutation(np.repeat([0, 1, 2], [3, 12, 85]))
    noise = rng.normal(size=(100, 33)) * 1e-8 * (value > 0)
    rows = (np.full((100, 33), value) + noise).astype(np.float32)
    found = gallery.rank(rows, rows, ids, ids, chunk_queries=9, chunk_gallery=33)
    assert found.rank == pytest.approx(found.chance, abs=1e-12)
    sizes = np.array([3, 12, 85])[ids]
    for k, chance in found.chance.items():
        missed = [math.comb(int(100 - size), k) / math.comb(100, k) for size in sizes]
        np.testing.assert_allclose(chance, 1 - np.mean(missed))
    orders = []
    for size in (3, 12, 85):
        truth = np.arange(100) < size
        orders.append(np.mean([of_ranking(rng.permutation(truth)) for _ in range(3000)], axis=0))
    np.testing.assert_allclose(found.ap, np.array(orders)[ids, 0], rtol=0.05)
    np.testing.assert_allclose(found.inp, np.array(orders)[ids, 1], rtol=0.05)
    assert found.map < 0.8 and found.chance[1] < 0.8


def test_precision_keeps_its_digits_far_down_a_ranking():
    before, size, right = np.array([10**6, 10**6, 0]), np.array([1, 4, 3]), np.array([1, 2, 3])
    found = ties.precision(before, size, np.array([0, 5, 0]), right)
    places = np.arange(1, 5)
    tied = np.mean((5 + 1 + (places - 1) / 3) / (10**6 + places))
    np.testing.assert_allclose(found, [1 / (10**6 + 1), tied, 1], atol=1e-9)
    np.testing.assert_allclose(found[0], 1 / (10**6 + 1), rtol=1e-9)


def test_no_query_with_a_right_picture_gives_nan():
    x = np.eye(3)
    found = gallery.rank(x, x, [1, 2, 3], [4, 5, 6])
    alone = gallery.rank(x, x, [1, 2, 3], [1, 2, 3], query_rows=[0, 1, 2], gallery_rows=[0, 1, 2])
    empty = gallery.rank(x[:0], x, [], [4, 5, 6])
    for scores, left_out in ((found, 3), (alone, 3), (empty, 0)):
        assert scores.left_out == left_out and len(scores.ap) == len(scores.scored) == 0
        numbers = [scores.map, scores.minp, scores.rank[1], scores.chance[1], *scores.cmc]
        assert np.isnan(numbers).all()


# Search


def brute_search(queries, rows, k):
    scores = cosines(queries, rows).astype(np.float32)
    order = [sorted(range(len(rows)), key=lambda g: (-line[g], g))[:k] for line in scores]
    return np.take_along_axis(scores, np.array(order), axis=1), np.array(order)


@pytest.mark.parametrize('chunk', [1, 7, 100])
def test_search_is_a_full_sort_and_of_equal_rows_the_lower_comes_first(chunk):
    for seed in range(4):
        for kind in ('random', 'ties'):
            queries, rows, _, _ = case(seed, kind)
            rows[[4, 9]] = rows[2]
            rows[5] = 0
            for k in (1, 6, 100):
                expected = brute_search(queries, rows, k)
                chunks = {'chunk_queries': chunk, 'chunk_gallery': chunk}
                found = gallery.search(queries, rows, k, **chunks)
                assert found[0].dtype == np.float32 and found[0].shape == (17, min(k, len(rows)))
                np.testing.assert_allclose(found[0], expected[0], atol=1e-7)
                np.testing.assert_array_equal(found[1], expected[1])


def test_search_of_equal_rows_does_not_depend_on_the_tiles():
    rng = np.random.default_rng(0)
    rows = np.tile(rng.normal(size=(3, 77)).astype(np.float32), (40, 1))
    queries = rng.normal(size=(5, 77)).astype(np.float32)
    for chunk in (3, 17, 64, 4096):
        _, found = gallery.search(queries, rows, 40, chunk_gallery=chunk)
        np.testing.assert_array_equal(found // 3, np.tile(np.arange(40), (5, 1)))


@pytest.mark.parametrize('scale', [1e-30, 1, 1e30])
def test_any_length_will_do(scale):
    queries, rows, query_ids, gallery_ids = case(1, 'random')
    found = gallery.rank(queries, rows * np.float32(scale), query_ids, gallery_ids)
    check(found, *brute(queries, rows, query_ids, gallery_ids), 17)
    np.testing.assert_array_equal(
        gallery.search(queries, rows * np.float32(scale), 9)[1], brute_search(queries, rows, 9)[1]
    )


def test_a_large_float16_memmap_is_never_copied_whole(tmp_path):
    rng = np.random.default_rng(0)
    g, d = 200_000, 64
    path = tmp_path / 'gallery.f16'
    rng.standard_normal((g, d), np.float32).astype(np.float16).tofile(path)
    rows = np.memmap(path, np.float16, 'r', shape=(g, d))
    picked = np.array([3, 99_999, 199_999])
    queries = rows[picked] + rng.normal(size=(3, d)).astype(np.float16) * np.float16(0.3)
    ids = np.arange(g) // 4
    tracemalloc.start()
    found = gallery.rank(queries, rows, ids[picked], ids)
    scores, places = gallery.search(queries, rows, 5)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < g * d * 2  # its own bytes, and half of what a float32 copy takes
    exact = cosines(queries, rows)
    order = np.argsort(-exact, axis=1)
    np.testing.assert_array_equal(places, order[:, :5])
    np.testing.assert_allclose(scores, np.take_along_axis(exact, places, 1), atol=1e-6)
    full = [of_ranking(ids[line] == ids[q])[:2] for line, q in zip(order, picked, strict=True)]
    np.testing.assert_allclose(np.stack([found.ap, found.inp], 1), full, rtol=1e-3)


def test_gallery_refuses_what_is_not_finite_or_does_not_fit():
    x, ids = np.ones((9, 2), np.float32), np.arange(9)
    broken = x.copy()
    broken[[5, 7], 1] = np.nan, np.inf
    cases = {
        'gallery: row 5 is not finite': (x, broken, ids, ids, {'chunk_gallery': 2}),
        'queries: row 5 is not finite': (broken, x, ids, ids, {'chunk_gallery': 3}),
        r'\[q, d\] and \[g, d\], got \(9, 1\)': (x[:, :1], x, ids, ids, {}),
        r'got \(9, 2\) and \(2,\)': (x, x[0], ids, ids, {}),
        'the gallery needs one row': (x, x[:0], ids, ids[:0], {}),
        r'must be \[9\] and \[9\], got \[9\] and \[8\]': (x, x, ids, ids[1:], {}),
        'integers or strings of one kind': (x, x, ids, ids.astype(str), {}),
        'go together': (x, x, ids, ids, {'query_rows': ids}),
        'k must be 1 or more, got 0': (x, x, ids, ids, {'ks': (5, 0)}),
    }
    for message, (*arrays, options) in cases.items():
        with pytest.raises(ValueError, match=message):
            gallery.rank(*arrays, **options)
    with pytest.raises(ValueError, match='gallery: row 5 is not finite'):
        gallery.search(x, broken, 1)
    with pytest.raises(ValueError, match='k must be 1 or more, got 0'):
        gallery.search(x, x, 0)


def test_search_of_many_queries_holds_one_tile():
    rng = np.random.default_rng(0)
    queries = rng.normal(size=(16_384, 4)).astype(np.float32)
    rows = rng.normal(size=(2048, 4)).astype(np.float32)
    tracemalloc.start()
    gallery.search(queries, rows, 1, chunk_queries=256, chunk_gallery=256)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < len(queries) * 256 * 4  # less than the cosines of a tile of all queries


# Figures


def test_figure_frames_right_in_green_and_wrong_in_red(tmp_path):
    picture = np.zeros((8, 6, 3), np.uint8)
    results = [[picture] * 12, [picture] * 2, []]
    right = [[True, False] * 6, [False, True], []]
    found = gallery.figure(
        [picture, 'a red shirt', picture], results, right, ['one', 'two', 'three']
    )
    assert found.get_label() and len(found.axes) == 3 * 11
    colours = [axis.spines['top'].get_edgecolor()[:3] for axis in found.axes if axis.axison]
    green, red = (44 / 255, 160 / 255, 44 / 255), (214 / 255, 39 / 255, 40 / 255)
    flags = right[0][:10] + right[1]
    np.testing.assert_allclose(colours, [green if flag else red for flag in flags], atol=1e-6)
    assert [found.axes[11 * i].get_title() for i in range(3)] == ['one', 'two', 'three']
    assert found.axes[11].texts[0].get_text() == 'a red shirt'
    found.savefig(tmp_path / 'figure.png')
    with pytest.raises(ValueError, match='shorter'):
        gallery.figure([picture], [[picture]], [[True]], [])
    gallery.figure([], [], [], [])


def test_gallery_works_without_jax():
    code = 'import sys; sys.modules["jax"] = None; import mmjax.evals.gallery'
    subprocess.run([sys.executable, '-c', code], check=True)
