"""Built-in comic pages: the same everywhere, true to their texts, and blind where they must be."""

import csv
import hashlib
import io
import json
import re
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from mmjax.data.drawing import COLOURS
from mmjax.recipes.comic.synthetic import drawing, figures, words
from mmjax.recipes.comic.synthetic import pages as synthetic

PAGES = 120
SCALE = 0.3


def digest(picture) -> str:
    return hashlib.sha256(np.asarray(picture).tobytes()).hexdigest()


@pytest.fixture(scope='module')
def pages():
    """(picture, page type, page) of the first pages of a split."""
    return [synthetic.draw_page(0, 'val', i, scale=SCALE) for i in range(PAGES)]


@pytest.fixture(scope='module')
def told(pages):
    return [page for _, kind, page in pages if kind in synthetic.NARRATIVE]


def spoken(page) -> list[str]:
    return [panel['text'] for panel in page['panels'] if panel['text']]


def said(text: str, phrases: dict[str, tuple[str, ...]]) -> set[str]:
    """The keys one of whose phrases stands in the text, as whole words."""
    text = text.lower()
    return {k for k, v in phrases.items() if any(re.search(rf'\b{p}\b', text) for p in v)}


ACTIONS = {k: words._DOING[k] + words._SOUND[k] for k in figures.ACTIONS}


def test_page_is_a_pure_function_of_seed_split_and_index(pages):
    picture, kind, page = synthetic.draw_page(0, 'val', 7, scale=SCALE)
    assert digest(picture) == digest(pages[7][0])
    assert (kind, page) == pages[7][1:]
    code = (
        'import hashlib, sys, json\n'
        'from mmjax.recipes.comic.synthetic import pages as comic_synthetic\n'
        f'picture, kind, page = comic_synthetic.draw_page(0, "val", 7, scale={SCALE})\n'
        'assert not {"jax", "tensorflow", "torch"} & set(sys.modules)\n'
        'print(hashlib.sha256(picture.tobytes()).hexdigest(), json.dumps(page))'
    )
    environment = {'PYTHONHASHSEED': '12345', 'PYTHONPATH': ':'.join(filter(None, sys.path))}
    fresh = subprocess.run(
        [sys.executable, '-c', code], env=environment, capture_output=True, text=True, check=True
    )
    sha, described = fresh.stdout.split(' ', 1)
    assert sha == digest(picture)
    assert json.loads(described) == page


def test_seed_split_and_index_each_change_every_page(pages):
    digests = [digest(picture) for picture, _, _ in pages]
    others = [
        digest(synthetic.draw_page(seed, split, i, scale=SCALE)[0])
        for seed, split in ((0, 'train'), (1, 'val'))
        for i in range(20)
    ]
    assert len(set(digests + others)) == len(digests) + len(others)
    texts = {tuple(spoken(page)) for _, _, page in pages if len(spoken(page)) > 1}
    assert len(texts) == sum(len(spoken(page)) > 1 for _, _, page in pages)


def test_record_has_the_format_of_the_disk():
    record = synthetic.page(3, 'train', 4, scale=SCALE)
    assert set(record) == {'canonical_id', 'image', 'page_type', 'page'}
    assert record['canonical_id'] == 'synthetic__train__000004'
    page = record['page']
    assert set(page) == {'image_width', 'image_height', 'panels', 'full_page_text'}
    with Image.open(io.BytesIO(record['image'])) as picture:
        assert picture.size == (page['image_width'], page['image_height'])
        assert picture.mode == 'RGB'
    for panel in page['panels']:
        assert set(panel) == {'bbox', 'text', 'confidence'}
        assert 0.9 <= panel['confidence'] <= 1
    assert json.loads(json.dumps(page)) == page


def test_panels_lie_inside_the_page_and_apart(pages):
    for picture, _, page in pages:
        width, height = page['image_width'], page['image_height']
        assert picture.size == (width, height)
        taken = np.zeros((height, width), int)
        for x, y, w, h in (panel['bbox'] for panel in page['panels']):
            assert x >= 0 and y >= 0 and w > 20 and h > 20
            assert x + w <= width and y + h <= height
            taken[y : y + h, x : x + w] += 1
        assert taken.max(initial=0) <= 1
        assert len(page['panels']) <= 9


def test_layouts_types_and_silence_come_in_the_promised_shares(pages, told):
    counts = [len(page['panels']) for page in told]
    assert 4 <= np.mean(counts) <= 6
    assert {1, 3, 4, 6} <= set(counts)
    silent = np.mean([not panel['text'] for page in told for panel in page['panels']])
    assert 0.05 < silent < 0.16
    kinds = [kind for _, kind, _ in pages]
    assert set(kinds) == {'narrative', 'story', 'cover', 'credits'}
    assert 0.85 < np.mean([kind in synthetic.NARRATIVE for kind in kinds]) < 0.99
    for _, kind, page in pages:
        assert kind != 'credits' or (not page['panels'] and page['full_page_text'])
        assert kind != 'cover' or len(page['panels']) == 1
        if kind != 'credits':
            assert page['full_page_text'] == '\n'.join(spoken(page))


def test_texts_of_a_page_differ_in_action_and_item(told):
    for page in told:
        texts = spoken(page)
        actions = [said(text, ACTIONS) for text in texts]
        items = [said(text, words._ITEM) for text in texts]
        assert all(len(found) == 1 for found in actions + items), texts
        assert len(set().union(*actions)) == len(texts)
        assert len(set().union(*items)) == len(texts)


def test_grammar_is_small_and_takes_no_side(told):
    everything = ' '.join(text.lower() for page in told for text in spoken(page))
    vocabulary = set(re.findall(r'\w+', everything))
    assert 100 < len(vocabulary) < 200
    assert not vocabulary & {'left', 'right'}
    assert not re.search(r'\ba [aeiou]|\ban [^aeiou]', everything)


def test_text_says_what_was_drawn(monkeypatch):
    """What reaches the pen is what the text tells: action, item, and colours where it names one."""
    drawn = []

    def spy(rng, width, height, scene, seen):
        drawn.append(seen)
        return Image.new('RGB', (width, height))

    monkeypatch.setattr(drawing, 'panel', spy)
    colours = {colour: (colour,) for colour in COLOURS}
    for index in range(60):
        drawn.clear()
        _, kind, page = synthetic.draw_page(0, 'val', index, scale=SCALE)
        if kind not in synthetic.NARRATIVE:
            continue
        for seen, panel in zip(drawn, page['panels'], strict=True):
            assert seen.balloon == bool(panel['text'])
            if not seen.balloon:
                continue
            assert said(panel['text'], ACTIONS) == {seen.action}
            assert said(panel['text'], words._ITEM) == {seen.item}
            shown = {seen.item_colour, seen.who.colour}
            shown |= {seen.companion.colour} if seen.companion else set()
            assert said(panel['text'], colours) <= shown


def test_every_action_item_and_species_looks_different():
    """Redrawn with the same stream, a change of one attribute alone changes the picture."""
    cast = figures.Character('cat', 'red', 'none', 'blue')
    scene = drawing.Scene('beach', 'day', 'clear', (0, 0, 0))

    def look(who=cast, **change):
        seen = dict(action='run', item='ball', item_colour='red', companion=None, balloon=True)
        happening = drawing.Happening(who=who, **(seen | change))
        rng = np.random.default_rng(0)
        return np.asarray(drawing.panel(rng, 96, 96, scene, happening), np.int16)

    for key, options in (('action', figures.ACTIONS), ('item', figures.ITEMS)):
        looks = [look(**{key: option}) for option in options]
        for i, a in enumerate(looks):
            for b in looks[:i]:
                assert (np.abs(a - b).max(-1) > 60).mean() > 0.015
    species = [look(figures.Character(kind, 'red', 'none', 'blue')) for kind in figures.SPECIES]
    assert len({digest(picture) for picture in species}) == len(figures.SPECIES)


def test_balloons_and_boxes_know_nothing_of_the_text(monkeypatch):
    """Other words, of any length, leave every pixel and every box as they are."""
    before = [synthetic.draw_page(5, 'train', i, scale=SCALE) for i in range(12)]
    monkeypatch.setattr(words, 'tell', lambda rng, scene, seen: 'word ' * int(rng.integers(1, 60)))
    after = [synthetic.draw_page(5, 'train', i, scale=SCALE) for i in range(12)]
    for (picture, _, page), (other, _, changed) in zip(before, after, strict=True):
        assert digest(picture) == digest(other)
        boxes = [panel['bbox'] for panel in page['panels']]
        assert boxes == [panel['bbox'] for panel in changed['panels']]


def test_length_of_text_goes_with_neither_ink_nor_layout():
    """Brightness of the balloon's band, position and shape of a panel: no correlation."""
    lengths, features = [], []
    for index in range(150):
        picture, kind, page = synthetic.draw_page(9, 'train', index, scale=SCALE)
        if kind not in synthetic.NARRATIVE:
            continue
        pixels = np.asarray(picture.convert('L'), np.float64)
        for position, panel in enumerate(page['panels']):
            if panel['text']:
                x, y, w, h = panel['bbox']
                band = pixels[y : y + max(1, h // 4), x : x + w]
                lengths.append(len(panel['text']))
                features.append((band.mean(), band.std(), w / h, w * h, x + w / 2, y, position))
    correlations = np.corrcoef(np.array(features).T, lengths)[-1, :-1]
    assert len(lengths) > 500
    assert np.abs(correlations).max() < 4 / np.sqrt(len(lengths))


def test_folder_holds_what_page_returns(tmp_path):
    synthetic.write_folder(tmp_path, {'train': 4, 'val': 2}, 11, scale=SCALE)
    with (tmp_path / 'pages.csv').open(newline='') as file:
        rows = list(csv.DictReader(file))
    assert [row['split'] for row in rows] == ['train'] * 4 + ['val'] * 2
    labels = json.loads((tmp_path / 'labels.json').read_text())
    for row, index in zip(rows, (0, 1, 2, 3, 0, 1), strict=True):
        record = synthetic.page(11, row['split'], index, scale=SCALE)
        name = row['canonical_id']
        assert name == record['canonical_id']
        assert labels[name] == record['page_type']
        assert (tmp_path / row['image_path']).read_bytes() == record['image']
        assert json.loads((tmp_path / 'json' / f'{name}.json').read_text()) == record['page']


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ((-1, 'train', 0, 1.0), 'must not be negative, got -1 and 0'),
        ((0, 'train', -2, 1.0), 'must not be negative, got 0 and -2'),
        ((0, 'train', 0, 0.0), 'scale must be positive, got 0.0'),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    *place, scale = arguments
    with pytest.raises(ValueError, match=message):
        synthetic.page(*place, scale=scale)


def test_a_page_takes_milliseconds():
    """The bound is ten times what one core needs, to hold on a busy machine (CPU time)."""
    start = time.process_time()
    for index in range(10):
        synthetic.page(2, 'train', index)
    assert (time.process_time() - start) / 10 < 0.15
