"""Built-in products: the same everywhere, described truly, and not to be found by colour alone."""

import dataclasses
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
from mmjax.recipes.retrieval.synthetic import drawing
from mmjax.recipes.retrieval.synthetic import items as synthetic

SIZES = {
    'train_items': 12,
    'val_items': 5,
    'test_items': 7,
    'shots': 3,
    'query_shots': 2,
    'gallery_shots': 4,
}
PRODUCTS = 400


def pixels(*key, **options) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(synthetic.photograph(*key, **options))))


def histogram(picture) -> np.ndarray:
    cell = (picture.reshape(-1, 3).astype(int) // 32) @ np.array([64, 8, 1])
    return np.bincount(cell, minlength=512) / len(cell)


def rank1(queries, gallery, labels) -> float:
    """Share of queries whose nearest gallery histogram (L1) has their label."""
    nearest = [np.abs(gallery - query).sum(1).argmin() for query in queries]
    return float(np.mean([labels[n] == i for i, n in enumerate(nearest)]))


@pytest.fixture(scope='module')
def products():
    return [synthetic.product(0, i) for i in range(PRODUCTS)]


def test_everything_is_the_same_in_another_process():
    code = (
        'import hashlib, json, sys\n'
        'from mmjax.recipes.retrieval.synthetic import items as synthetic\n'
        'files = [synthetic.photograph(3, "val", i, 1) for i in range(6)]\n'
        'assert not {"jax", "tensorflow", "torch"} & set(sys.modules)\n'
        'print(json.dumps([[hashlib.sha256(file).hexdigest() for file in files],\n'
        '      [synthetic.item(3, i) for i in range(6)],\n'
        f'      synthetic.catalogue(3, {SIZES})]))'
    )
    environment = {'PYTHONHASHSEED': '12345', 'PYTHONPATH': ':'.join(filter(None, sys.path))}
    fresh = subprocess.run(
        [sys.executable, '-c', code], env=environment, capture_output=True, text=True, check=True
    )
    digests, items, catalogue = json.loads(fresh.stdout)
    for i in reversed(range(6)):  # in another order, too
        file = synthetic.photograph(3, 'val', i, 1)
        assert hashlib.sha256(file).hexdigest() == digests[i]
        assert synthetic.item(3, i) == items[i]
    here = synthetic.catalogue(3, SIZES)
    assert catalogue == {split: [list(row) for row in rows] for split, rows in here.items()}


def test_seed_split_identity_and_shot_each_change_the_photograph():
    keys = [(0, 'train', 0, 0), (1, 'train', 0, 0), (0, 'val', 0, 0), (0, 'train', 1, 0)]
    keys += [(0, 'train', 0, shot) for shot in range(1, 6)]
    assert len({synthetic.photograph(*key) for key in keys}) == len(keys)


def test_photograph_is_a_jpeg_of_the_asked_side():
    for side in (64, 128):
        with Image.open(io.BytesIO(synthetic.photograph(0, 'train', 2, 0, side=side))) as picture:
            assert (picture.format, picture.mode, picture.size) == ('JPEG', 'RGB', (side, side))


def test_same_photograph_at_another_side():
    for identity in range(4):
        large = Image.fromarray(pixels(0, 'train', identity, 0)).reduce(2)
        small = pixels(0, 'train', identity, 0, side=64)
        assert np.corrcoef(np.asarray(large).ravel(), small.ravel())[0, 1] > 0.8


def test_identities_of_train_val_and_test_are_disjoint():
    rows = synthetic.catalogue(0, SIZES)
    found = {split: {identity for identity, _ in chosen} for split, chosen in rows.items()}
    assert {split: len(ids) for split, ids in found.items()} == {
        'train': 12,
        'val': 5,
        'query': 7,
        'gallery': 7,
    }
    assert found['query'] == found['gallery']
    assert not found['train'] & found['val']
    assert not (found['train'] | found['val']) & found['query']
    shots = {'train': 3, 'val': 3, 'query': 2, 'gallery': 4}
    for split, chosen in rows.items():
        assert sorted(chosen) == sorted((i, k) for i in found[split] for k in range(shots[split]))
    assert synthetic.photograph(0, 'query', 0, 0) != synthetic.photograph(0, 'gallery', 0, 0)


def test_more_training_identities_leave_the_other_splits_alone():
    few, many = (synthetic.catalogue(0, SIZES | {'train_items': n}) for n in (12, 300))
    assert few['train'] == many['train'][: len(few['train'])]
    assert all(few[split] == many[split] for split in ('val', 'query', 'gallery'))


def test_no_two_of_a_catalogue_look_the_same_to_a_text(monkeypatch):
    """With the colours cut to two and the patterns to one, every look comes up again and again."""
    monkeypatch.setattr(synthetic, 'COLOURS', {'red': (255, 0, 0), 'blue': (0, 0, 255), 'x': ()})
    monkeypatch.setattr(synthetic, 'PATTERNS', ('plain',))
    monkeypatch.setattr(synthetic, 'PARTS', {'mug': drawing.PARTS['mug']})
    synthetic.product.cache_clear()
    rows = synthetic.catalogue(0, SIZES)
    identities = sorted({identity for chosen in rows.values() for identity, _ in chosen})
    looks = {synthetic.look(synthetic.product(0, identity)) for identity in identities}
    synthetic.product.cache_clear()
    assert len(looks) == len(identities) == 24
    assert identities[-1] > 24  # some were passed over


@pytest.mark.parametrize('key', synthetic.SIZES)
def test_a_size_that_is_missing_or_too_small_is_named(key):
    with pytest.raises(UserError, match=rf'data\.built_in\.{key} is missing'):
        synthetic.catalogue(0, {k: v for k, v in SIZES.items() if k != key})
    with pytest.raises(UserError, match=rf'data\.built_in\.{key} must be at least 1, got 0'):
        synthetic.catalogue(0, SIZES | {key: 0})


def test_negative_numbers_are_refused():
    with pytest.raises(ValueError, match='must not be negative, got -1 and 0'):
        synthetic.item(-1, 0)
    with pytest.raises(ValueError, match='must not be negative, got 0 and -2'):
        synthetic.photograph(0, 'train', -2, 0)
    with pytest.raises(ValueError, match='shot must not be negative, got -1'):
        synthetic.photograph(0, 'train', 0, -1)


COLOUR = '|'.join(drawing.COLOURS)
NOUN = {noun: category for category, nouns in synthetic.NOUNS.items() for noun in nouns}
SIZE = {'bold': True, 'broad': True, 'fine': False, 'narrow': False}


def parse(sentence: str, category: str | None) -> dict:
    """What a sentence claims, read with patterns that the grammar under test does not know."""
    text = sentence.lower()
    words = re.findall(r'[a-z-]+', text)
    colours = [word for word in words if word in drawing.COLOURS]
    nouns = [noun for noun in NOUN if re.search(rf'\b{noun}\b', text)]
    if nouns and category is None:
        return {'category': NOUN[max(nouns, key=len)], 'colour': colours[0]}
    if 'taller' in words or 'wider' in words:
        return {'tall': 'taller' in words}
    if 'half' in words:
        return {'pattern': 'two-tone', 'second': colours[0]}
    if 'plain' in words or 'no pattern' in text:
        return {'pattern': 'plain'}
    shown = [word for word in words if word in drawing.PATTERNS]
    sizes = [SIZE[word] for word in words if word in SIZE]
    if shown and sizes:
        claim = {'pattern': shown[0], 'bold': sizes[0], 'second': colours[0]}
        directions = [word for word in words if word in synthetic.STRIPES]
        return claim | ({'direction': directions[0]} if directions else {})
    parts = [part for options in drawing.PARTS[category] for part in options if part]
    named = [part for part in parts if re.search(rf'\b{part}\b', text)]
    if named:
        return {'part': named[0]}
    assert len(colours) == 1, sentence
    return {'trim': colours[0]}


def test_descriptions_are_true_and_say_two_to_five_things(products):
    claims, lengths = {}, set()
    for identity, product in enumerate(products):
        about = synthetic.item(0, identity)
        assert about['item'] == f'{product.category}_{identity:04d}'
        assert about['color'] == product.colour
        first, *others = about['description']
        assert parse(first, None) == {'category': product.category, 'colour': product.colour}
        told = [tuple(parse(sentence, product.category).items()) for sentence in others]
        assert len(set(told)) == len(others)
        lengths.add(len(about['description']))
        for claim in map(dict, told):
            for name, value in claim.items():
                claims[name] = claims.get(name, 0) + 1
                if name == 'part':
                    assert value in product.parts
                elif name == 'tall':
                    assert value == (product.stretch > 0) and abs(product.stretch) > 0.2
                else:
                    assert value == getattr(product, name), (about, claim)
    assert lengths == {2, 3, 4, 5}
    assert set(claims) == {'pattern', 'bold', 'second', 'direction', 'part', 'trim', 'tall'}
    assert claims['direction'] < claims['bold'] < claims['pattern']
    everything = ' '.join(s for i in range(200) for s in synthetic.item(0, i)['description'])
    assert not re.search(r'\b(left|right)\b', everything.lower())
    assert not re.search(r'\b[Aa] [aeiou]|\b[Aa]n [^aeiou]', everything)


def test_what_a_text_may_claim_can_be_seen(products):
    """Another pattern, colour, part or proportion changes the drawing where it is not empty."""

    def drawn(product):
        return np.asarray(drawing.draw(product), np.int16)

    def change(product, **other):
        a, b = base, drawn(dataclasses.replace(product, **other))
        shown = (a[..., 3] > 0) | (b[..., 3] > 0)
        return (np.abs(a - b).max(-1) > 40)[shown].mean()

    of_each = {product.category: product for product in products[:60]}
    assert set(of_each) == set(drawing.PARTS)
    for product in (*of_each.values(), *products[60:64]):
        base = drawn(product)
        free = next(
            colour
            for colour in drawing.COLOURS
            if colour not in (product.colour, product.second, product.trim)
        )
        assert change(product, colour=free) > 0.06, product
        assert change(product, trim=free) > 0.012, product
        assert change(product, stretch=-product.stretch) > 0.05 or abs(product.stretch) < 0.2
        if product.pattern != 'plain':
            assert change(product, second=free) > 0.03, product
            assert change(product, pattern='plain') > 0.03, product
        for place, options in enumerate(drawing.PARTS[product.category]):
            for option in options:
                parts = tuple(option if i == place else p for i, p in enumerate(product.parts))
                assert option == product.parts[place] or change(product, parts=parts) > 0.012


def test_shape_alone_makes_another_product(products):
    for product in products[:16]:
        other = dataclasses.replace(product, shape=tuple(1 - v for v in product.shape))
        a, b = (np.asarray(drawing.draw(p)) for p in (product, other))
        assert (a != b).any(-1).mean() > 0.005


def test_categories_and_colours_are_balanced_and_shared(products):
    for name, options in (('category', drawing.PARTS), ('colour', drawing.COLOURS)):
        names = [getattr(product, name) for product in products]
        shares = np.array([names.count(option) for option in options]) / PRODUCTS * len(options)
        assert shares.min() > 0.6 and shares.max() < 1.5
    test = {identity for identity, _ in synthetic.catalogue(0, SIZES | {'test_items': 60})['query']}
    pairs = [(synthetic.product(0, i).category, synthetic.product(0, i).colour) for i in test]
    assert sum(pairs.count(pair) > 1 for pair in pairs) >= 15
    assert all(len({p.colour, p.second}) == 2 and p.trim != p.colour for p in products)


def test_no_drawing_is_cut_off_by_its_canvas(products):
    for product in products[:24]:
        for stretch, shape in ((-0.45, (1.0, 1.0, 1.0)), (0.45, (1.0, 1.0, 1.0))):
            extreme = dataclasses.replace(product, stretch=stretch, shape=shape, pattern='plain')
            there = np.asarray(drawing.draw(extreme))[..., 3] > 0
            assert not there[[0, -1]].any() and not there[:, [0, -1]].any(), extreme


def test_every_photograph_shows_much_of_its_product(monkeypatch):
    green = Image.new('RGB', (256, 256), (0, 255, 0))
    monkeypatch.setattr(synthetic, '_backdrop', lambda rng, side: green)
    monkeypatch.setattr(synthetic, '_light', lambda rng, picture: picture)
    shares = []
    for identity in range(30):
        seen = pixels(0, 'train', identity, 0).astype(int)
        # The shadow on the green ground leaves red and blue at nothing.
        shares.append(((seen[..., 0] + seen[..., 2]) > 40).mean())
    assert min(shares) > 0.04 and max(shares) < 0.8
    assert 0.12 < np.mean(shares) < 0.5


def test_colours_alone_do_not_find_a_product(monkeypatch):
    """A histogram finds most in even light on one ground, and few as they are photographed."""

    def score():
        shots = [
            [histogram(pixels(0, split, i, k, side=64)) for i in range(30) for k in range(count)]
            for split, count in (('query', 1), ('gallery', 2))
        ]
        return rank1(shots[0], np.stack(shots[1]), np.repeat(np.arange(30), 2))

    assert score() < 0.4
    monkeypatch.setattr(synthetic, '_light', lambda rng, picture: picture)
    monkeypatch.setattr(
        synthetic, '_backdrop', lambda rng, side: Image.new('RGB', (side, side), (128, 128, 128))
    )
    assert score() > 0.7
