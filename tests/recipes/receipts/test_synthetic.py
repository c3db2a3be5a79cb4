"""Built-in receipts: the same everywhere, asked and answered truly, and not to be guessed."""

import collections
import hashlib
import io
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from mmjax.errors import UserError
from mmjax.recipes.receipts import text
from mmjax.recipes.receipts.synthetic import drawing
from mmjax.recipes.receipts.synthetic import pictures as synthetic

PICTURES = 600
NUMBERS = ('no', 'one', 'two', 'three', 'four', 'five')


def shown(split, index) -> list:
    return [one.what for one in synthetic.receipts(synthetic.scene(0, split, index))]


def pixels(*key, **options) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(synthetic.picture(*key, **options))))


@pytest.fixture(scope='module')
def scenes():
    return [synthetic.scene(0, 'train', i) for i in range(PICTURES)]


@pytest.fixture(scope='module')
def asked():
    return [synthetic.questions(0, 'train', i) for i in range(PICTURES)]


def test_everything_is_the_same_in_another_process():
    code = (
        'import hashlib, json, sys\n'
        'from mmjax.recipes.receipts.synthetic import pictures as synthetic\n'
        'files = [synthetic.picture(3, "val", i) for i in range(6)]\n'
        'assert not {"jax", "tensorflow", "torch"} & set(sys.modules)\n'
        'print(json.dumps([[hashlib.sha256(file).hexdigest() for file in files],\n'
        '      [synthetic.questions(3, "val", i) for i in range(6)]]))'
    )
    environment = {'PYTHONHASHSEED': '12345', 'PYTHONPATH': ':'.join(filter(None, sys.path))}
    fresh = subprocess.run(
        [sys.executable, '-c', code], env=environment, capture_output=True, text=True, check=True
    )
    digests, questions = json.loads(fresh.stdout)
    for i in reversed(range(6)):  # in another order, too
        assert hashlib.sha256(synthetic.picture(3, 'val', i)).hexdigest() == digests[i]
        assert synthetic.questions(3, 'val', i) == questions[i]


def test_seed_split_and_index_each_change_picture_and_words():
    keys = [(0, 'train', 0), (1, 'train', 0), (0, 'val', 0), (0, 'test', 0), (0, 'train', 1)]
    assert len({synthetic.picture(*key) for key in keys}) == len(keys)
    assert len({json.dumps(synthetic.questions(*key)) for key in keys}) == len(keys)


def test_picture_is_a_jpeg_of_the_asked_side_and_shows_the_same_at_another():
    for i in range(3):
        with Image.open(io.BytesIO(synthetic.picture(0, 'train', i, side=96))) as picture:
            assert (picture.format, picture.mode, picture.size) == ('JPEG', 'RGB', (96, 96))
        small, large = (pixels(0, 'train', i, side=side) for side in (96, 192))
        large = np.asarray(Image.fromarray(large).reduce(2))
        assert np.corrcoef(small.ravel(), large.ravel())[0, 1] > 0.9


def test_store_values_and_layout_are_never_together_in_two_splits():
    def of(split):
        found = [what for i in range(PICTURES) for what in shown(split, i)]
        return [(what.store, len(what.goods), what.total, what.layout) for what in found]

    train, val, test = (of(split) for split in synthetic.SPLITS)
    assert not {*train} & {*val} and not {*train} & {*test} and not {*val} & {*test}
    # The rule itself, over all there are: each split's share, and every pair of the three in train.
    shares, pairs = collections.Counter(), collections.defaultdict(set)
    for colour in drawing.COLOURS:
        for sign in drawing.SIGNS:
            for items in synthetic.ITEMS:
                for total in synthetic.TOTALS:
                    for layout in drawing.LAYOUTS:
                        goods = (('TEA', 1),) * items
                        what = drawing.Receipt(colour, sign, total, 'cash', goods, layout, '')
                        sixth = synthetic.combination(what)
                        split = next(s for s, own in synthetic.SPLITS.items() if sixth in own)
                        shares[split] += 1
                        store, values = (colour, sign), (items, total)
                        pairs[split] |= {(store, values), (values, layout), (store, layout)}
    whole = 8 * 8 * 4 * 8 * 6
    assert shares == {'train': whole * 4 // 6, 'val': whole // 6, 'test': whole // 6}
    assert pairs['train'] == pairs['val'] | pairs['test'] | pairs['train']
    assert len(pairs['train']) == 64 * 32 + 32 * 6 + 64 * 6


def test_number_and_choice_of_what_is_shown_are_spread(scenes):
    counts = np.bincount([len(synthetic.receipts(scene)) for scene in scenes], minlength=4)
    assert len(counts) == 4 and counts.min() > 0.12 * PICTURES
    classes = np.array([counts[0], counts[1], counts[2:].sum()]) / PICTURES
    assert classes.min() > 0.22 and classes.max() < 0.46
    whats = [what.what for scene in scenes for what in synthetic.receipts(scene)]
    for values, among in (
        ([what.colour for what in whats], drawing.COLOURS),
        ([what.sign for what in whats], drawing.SIGNS),
        ([len(what.goods) for what in whats], synthetic.ITEMS),
        ([what.total for what in whats], synthetic.TOTALS),
        ([what.payment for what in whats], drawing.PAYMENTS),
        ([what.layout for what in whats], drawing.LAYOUTS),
    ):
        share = np.array([values.count(value) for value in among]) / len(values) * len(among)
        assert share.min() > 0.7 and share.max() < 1.4
    things = collections.Counter(
        one.what for scene in scenes for one in scene if isinstance(one.what, str)
    )
    assert set(things) == set(drawing.THINGS)
    assert all(2 <= len(scene) <= 6 for scene in scenes)
    for what in whats:
        assert sum(cents for _, cents in what.goods) == 100 * what.total
        assert min(cents for _, cents in what.goods) > 0
        assert len({name for name, _ in what.goods}) == len(what.goods)


def test_questions_of_a_picture_and_answers_that_are_true(scenes, asked):
    """Answers are read with patterns that do not know the templates."""
    kinds = collections.Counter()
    for scene, three in zip(scenes, asked, strict=True):
        receipts = [one.what for one in synthetic.receipts(scene)]
        assert len(three) == 3 and three[0]['kind'] == 'count'
        assert len({q['question'] for q in three}) == 3
        for q in three:
            kinds[q['kind']] += 1
            words = re.findall(r'[a-z]+|\d+', q['answer'].lower())
            what = next(
                (
                    w
                    for side, w in (('left', receipts[:1]), ('right', receipts[-1:]))
                    if f' {side} ' in q['question']
                ),
                receipts,
            )
            match q['kind']:
                case 'count':
                    none = {'none', 'nothing', 'zero', 'no'} & set(words)
                    number = next((n for n in (3, 2, 1) if NUMBERS[n] in words), 0)
                    number = 1 if 'single' in words else number
                    assert number == len(receipts) and bool(none) == (not receipts)
                case 'exist':
                    assert words[0] == ('yes' if receipts else 'no')
                case 'store':
                    assert f'{what[0].colour} {what[0].sign}' in ' '.join(words)
                case 'items':
                    assert NUMBERS[len(what[0].goods)] in words
                case 'total':
                    assert str(what[0].total) in words
                case 'payment':
                    assert {*words} & {*drawing.PAYMENTS} == {what[0].payment}
            if q['kind'] not in ('count', 'exist'):
                assert len(what) == 1
    assert set(kinds) == {*text.TEMPLATES}
    assert min(kinds.values()) > 0.06 * 3 * PICTURES


def test_left_and_right_are_plainly_so(scenes, asked):
    sides = 0
    for scene, three in zip(scenes, asked, strict=True):
        x = sorted(one.x for one in scene if not isinstance(one.what, str))
        for q in three:
            if ' left ' in q['question']:
                assert x[1] - x[0] > 10
            if ' right ' in q['question']:
                assert x[-1] - x[-2] > 10
            sides += ' left ' in q['question'] or ' right ' in q['question']
    assert sides > 0.1 * 3 * PICTURES


def test_the_question_fixes_the_frame_of_the_answer_and_not_its_content(asked):
    """Of one wording and one content there is one answer; no wording has one answer only."""
    answers = collections.defaultdict(set)
    kinds = {}
    for q in (q for three in asked for q in three):
        said = text.content(q['kind'], q['answer'])
        answers[q['template'], said].add(q['answer'])
        assert kinds.setdefault(q['template'], q['kind']) == q['kind']
        assert q['kind'] == text.kind(q['question'])
    assert max(map(len, answers.values())) == 1
    assert set(kinds) == set(range(1, 61))
    for template, kind in kinds.items():
        contents = {said for t, said in answers if t == template}
        assert len(contents) >= {'exist': 2, 'payment': 3}.get(kind, 3), template


def test_the_wording_of_a_count_tells_nothing_of_the_count(scenes, asked):
    """Chi-squared over 10 wordings × 4 counts: 27 degrees of freedom, 55.5 at p = .001.

    Nor does it tell that a count is asked for at all, or again: 3 degrees of freedom, 16.3.
    """
    table, rows, again = np.zeros((10, 4)), np.zeros(4), np.zeros(4)
    for scene, three in zip(scenes, asked, strict=True):
        count = len(synthetic.receipts(scene))
        rows[count] += 1
        wordings = [(q['template'] - 1) % 10 for q in three if q['kind'] == 'count']
        again[count] += len(wordings) - 1
        for wording in wordings:
            table[wording, count] += 1
    expected = table.sum(1, keepdims=True) * table.sum(0) / table.sum()
    assert ((table - expected) ** 2 / expected).sum() < 55.5
    table = np.stack([again, rows - again])
    expected = table.sum(1, keepdims=True) * table.sum(0) / table.sum()
    assert again.sum() > 0.1 * PICTURES
    assert ((table - expected) ** 2 / expected).sum() < 16.3


def test_whether_there_is_a_receipt_is_asked_as_often_of_pictures_without(asked):
    answers = [q['answer'][:2] for three in asked for q in three if q['kind'] == 'exist']
    assert 0.4 < answers.count('No') / len(answers) < 0.6


def test_simple_statistics_of_a_picture_do_not_count():
    """Ridge regression on 16 × 16 pixels stays near the most common class, and far from .75."""
    count = 320
    shots = np.stack(
        [pixels(0, 'train', i, side=64).reshape(16, 4, 16, 4, 3).mean((1, 3)) for i in range(count)]
    )
    labels = np.array([min(len(shown('train', i)), 2) for i in range(count)])
    features = shots.reshape(count, -1) / 255 - 0.5
    train, test = slice(0, 220), slice(220, count)
    centre, targets = features[train].mean(0), np.eye(3)[labels]
    x, share = features[train] - centre, targets[train].mean(0)
    kernel = x @ x.T + 100 * np.eye(len(x))
    guess = (features[test] - centre) @ x.T @ np.linalg.solve(kernel, targets[train] - share)
    assert ((guess + share).argmax(1) == labels[test]).mean() < 0.62
    bright, papers = shots.mean((1, 2, 3)), (shots.min(-1) > 140).mean((1, 2))
    for value in (
        bright,
        papers,
        np.array([len(synthetic.scene(0, 'train', i)) for i in range(count)]),
    ):
        assert abs(np.corrcoef(value, labels)[0, 1]) < 0.4


def test_each_thing_asked_of_a_receipt_can_be_seen():
    """Another store, total, payment, layout or number of goods changes the drawing."""

    def drawn(**changes):
        goods = (('TEA', 100), ('JAM', 200), ('RICE', 400))
        what = {'colour': 'red', 'sign': 'star', 'total': 7, 'payment': 'cash', 'goods': goods}
        what |= {'layout': (0, 1), 'date': '01-02-2026'} | changes
        picture = drawing.receipt(drawing.Receipt(**what), np.random.default_rng(0), 2)
        return np.asarray(picture.convert('RGB'), int)

    base = drawn()
    of_each = {
        'colour': [{'colour': name} for name in drawing.COLOURS if name != 'red'],
        'sign': [{'sign': name} for name in drawing.SIGNS if name != 'star'],
        'total': [{'total': n} for n in synthetic.TOTALS if n != 7],
        'payment': [{'payment': name} for name in drawing.PAYMENTS if name != 'cash'],
        'layout': [{'layout': layout} for layout in drawing.LAYOUTS if layout != (0, 1)],
    }
    for name, changes in of_each.items():
        for change in changes:
            moved = (np.abs(drawn(**change) - base).max(-1) > 40).mean()
            assert moved > (0.003 if name == 'total' else 0.015), change
    heights = [len(drawn(goods=(('TEA', 100),) * n)) for n in synthetic.ITEMS]
    assert heights == sorted(set(heights))


def test_digits_and_letters_are_all_different():
    letters = [drawing.lettering(letter, 5).tobytes() for letter in 'ABCDEFGHIJKLMNOPQRSTUVWXYZ']
    digits = [drawing.lettering(digit, 5).tobytes() for digit in '0123456789']
    assert len(set(letters)) == 26 and len(set(digits)) == 10
    seven = np.asarray(drawing.lettering('7', 5)) > 0
    assert seven.shape == (5, 4) and seven[0].tolist() == [True] * 3 + [False]
    assert seven[1:, 2].all() and not seven[1:, :2].any()


def test_receipts_lie_within_the_picture_and_hardly_on_each_other(scenes):
    for scene in scenes:
        receipts = [one for one in scene if not isinstance(one.what, str)]
        for one in receipts:
            assert 12 < one.x < 100 and 20 < one.y < 92
        for i, one in enumerate(receipts):
            for other in receipts[:i]:
                assert abs(one.x - other.x) > 22 or abs(one.y - other.y) > 34


def test_unknown_names_and_negative_numbers_are_refused():
    with pytest.raises(ValueError, match='must not be negative, got -1 and 0'):
        synthetic.scene(-1, 'train', 0)
    with pytest.raises(ValueError, match='must not be negative, got 0 and -2'):
        synthetic.questions(0, 'train', -2)
    with pytest.raises(ValueError, match="no split 'dev': train, val, test"):
        synthetic.picture(0, 'dev', 0)
    assert synthetic.catalogue({'train': 3, 'val': 1}, ('train',)) == {'train': 3}
    for sizes, message in (
        ({}, r'data\.built_in\.train is missing'),
        ({'train': 0}, r'data\.built_in\.train must be at least 1, got 0'),
    ):
        with pytest.raises(UserError, match=message):
            synthetic.catalogue(sizes, ('train',))
    with pytest.raises(UserError, match="no split 'dev': train, val, test"):
        synthetic.catalogue({'dev': 1}, ('dev',))
