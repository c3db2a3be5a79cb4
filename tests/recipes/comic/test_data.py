"""Comic pages: both forms on disk, every fault by name, and what an example holds."""

import io
import json
import os
import pickle

import numpy as np
import pytest
from PIL import Image

from mmjax.data import images as pictures
from mmjax.data import tables, tokenizers
from mmjax.errors import RecordError, UserError
from mmjax.recipes.comic import data as comic
from mmjax.recipes.comic import folder as comic_folder
from mmjax.recipes.comic.synthetic import pages

W, H = 120, 80


@pytest.fixture(scope='module')
def tokenizer():
    return tokenizers.train_tokenizer(['a red fox', 'left right'] * 3, 280)


def panel(x, y, w, h, text='a red fox'):
    return {'bbox': [x, y, w, h], 'text': text, 'confidence': 1.0}


def page(*panels, width=W, height=H):
    return {
        'image_width': width,
        'image_height': height,
        'panels': list(panels),
        'full_page_text': '',
    }


def halves():
    """A page whose left half is red and whose right half is blue."""
    pixels = np.zeros((H, W, 3), np.uint8)
    pixels[:, : W // 2, 0] = 255
    pixels[:, W // 2 :, 2] = 255
    return Image.fromarray(pixels)


def encoded(picture, form='JPEG'):
    buffer = io.BytesIO()
    picture.save(buffer, form, **({'quality': 95, 'subsampling': 0} if form == 'JPEG' else {}))
    return buffer.getvalue()


HALVES = encoded(halves())
DEFAULT = page(panel(0, 0, W // 2, H, 'left'), panel(W // 2, 0, W // 2, H, 'right'))


class Folder:
    """A folder of pages to be spoilt."""

    def __init__(self, root, counts):
        self.root = root
        self.rows, self.labels = [], {}
        for name in ('images', 'json'):
            (root / name).mkdir(parents=True)
        for split, count in counts.items():
            for i in range(count):
                self.add(f'{split}_{i}', split)
        self.write()

    def add(self, name, split, content=DEFAULT, picture=HALVES, kind='narrative'):
        self.rows.append((name, f'images/{name}.jpg', split))
        self.labels[name] = kind
        (self.root / f'images/{name}.jpg').write_bytes(picture)
        text = content if isinstance(content, str) else json.dumps(content)
        (self.root / f'json/{name}.json').write_text(text)

    def write(self, header='canonical_id,image_path,split'):
        lines = [header, *(','.join(row) for row in self.rows)]
        (self.root / 'pages.csv').write_text('\n'.join(lines) + '\n')
        (self.root / 'labels.json').write_text(json.dumps(self.labels))

    def prepare(self, cache, splits=('train', 'val'), **options):
        return comic.prepare_pages(self.root, cache, splits=splits, **options)


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path / 'root', {'train': 6, 'val': 2})


def pages_of(prepared, split='train', tokenizer=None, **options):
    options = {'image_size': 16, 'max_tokens': 8, 'cache_bytes': 0, **options}
    return comic.ComicPages(prepared, split, tokenizer=tokenizer, **options)


def one_page(tmp_path, content, tokenizer=None, picture=HALVES, **options):
    folder = Folder(tmp_path / 'root', {})
    folder.add('one', 'train', content, picture)
    folder.write()
    prepared = folder.prepare(tmp_path / 'cache', ('train',))
    return pages_of(prepared, tokenizer=tokenizer, **options)


RNG = np.random.default_rng(0)


def test_an_example_holds_each_panel_with_its_text_and_place(folder, tmp_path, tokenizer):
    data = pages_of(folder.prepare(tmp_path / 'cache'), 'val', tokenizer)
    assert len(data) == 2
    example = data.example(1, RNG, train=False)
    shapes = {key: (value.shape, value.dtype.name) for key, value in example.items()}
    assert shapes == {
        'images': ((16, 16, 16, 3), 'uint8'),
        'tokens': ((16, 8), 'int32'),
        'token_mask': ((16, 8), 'bool'),
        'composition': ((16, 7), 'float32'),
        'modality': ((16, 3), 'bool'),
        'panels': ((16,), 'bool'),
        'boxes': ((16, 4), 'float32'),
        'texts_cut': ((), 'int32'),
    }
    colours = example['images'][:2, 3:-3, 3:-3].reshape(2, -1, 3).astype(int)
    assert abs(colours - np.array([[[255, 0, 0]], [[0, 0, 255]]])).max() < 12
    np.testing.assert_allclose(
        example['composition'][:2],
        [[60 / 80, 0.5, 0, 0, 0, 0.25, 0.5], [60 / 80, 0.5, 0, 0, 0, 0.75, 0.5]],
        rtol=1e-6,
    )
    np.testing.assert_array_equal(example['panels'], np.arange(16) < 2)
    np.testing.assert_array_equal(example['modality'], example['panels'][:, None].repeat(3, 1))
    expected = tokenizer.encode(['left', 'right'], 8)
    np.testing.assert_array_equal(example['tokens'][:2], expected[0])
    np.testing.assert_array_equal(example['token_mask'][:2], expected[1])
    for key, value in example.items():  # nothing outside the panels
        assert not value.ndim or not value[2:].any(), key
    assert example['texts_cut'] == 0
    assert data.record(1)['canonical_id'] == 'val_1'
    assert data.index['n_panels'].tolist() == [2, 2] == data.index['n_text'].tolist()
    assert list(data.texts()) == ['left', 'right', 'left', 'right']


def test_without_composition_the_modality_is_absent(folder, tmp_path, tokenizer):
    prepared = folder.prepare(tmp_path / 'cache')
    without = pages_of(prepared, 'val', tokenizer, use_composition=False).example(0, RNG, False)
    whole = pages_of(prepared, 'val', tokenizer).example(0, RNG, False)
    assert not without['composition'].any() and not without['modality'][:, 2].any()
    np.testing.assert_array_equal(without['modality'][:, :2], whole['modality'][:, :2])
    np.testing.assert_array_equal(without['images'], whole['images'])


def test_the_vlm_form_is_read_by_number_with_y_first(tmp_path, tokenizer):
    content = {
        'panels': [
            {
                'panel_number': 2,
                'box_2d': [0, 500, 1000, 1000],
                'description': 'a fox',
                'text_content': [{'text': 'right'}, {'text': ' '}, {'text': 'red'}],
            },
            {'panel_number': 1, 'box_2d': [0, 0, 500, 500], 'description': '', 'text_content': []},
            {'panel_number': 3, 'box_2d': [500, 0, 1000, 500], 'text_content': [{'text': 'left'}]},
        ]
    }
    data = one_page(tmp_path, content, tokenizer)
    record = data.record(0)
    assert record['texts'] == ['', 'a fox right red', 'left']
    assert record['boxes'] == [[0, 0, 0.5, 0.5], [0.5, 0, 1, 1], [0, 0.5, 0.5, 1]]
    example = data.example(0, RNG, False)
    np.testing.assert_allclose(
        example['composition'][:3],
        [
            [60 / 40, 0.25, 0.0, 0, 0, 0.25, 0.25],
            [60 / 80, 0.5, 0.5, 0, 0, 0.75, 0.5],
            [60 / 40, 0.25, 1.0, 0, 0, 0.25, 0.75],
        ],
        rtol=1e-6,
    )
    assert example['modality'][:4, 1].tolist() == [False, True, True, False]
    assert data.index['n_text'].tolist() == [2]


def test_boxes_are_in_the_annotations_pixels_not_the_pictures(tmp_path):
    data = one_page(tmp_path, page(panel(100, 0, 100, 200), width=200, height=200))
    assert data.record(0)['boxes'] == [[0.5, 0, 1, 1]]
    assert (data.record(0)['width'], data.record(0)['height']) == (W, H)


def test_boxes_are_clipped_counted_and_dropped_when_nothing_is_left(tmp_path):
    content = page(panel(-30, -8, 60, 48), panel(90, 40, 60, 400), panel(W, 0, 9, 9), DEFAULT_PANEL)
    data = one_page(tmp_path, content)
    assert data.record(0)['boxes'] == [[0, 0, 0.25, 0.5], [0.75, 0.5, 1, 1], [0, 0, 0.5, 1]]
    assert data.counts == {'boxes_clipped': 2, 'boxes_empty': 1}
    assert data.skipped == {}


DEFAULT_PANEL = panel(0, 0, W // 2, H)


def test_the_first_sixteen_panels_are_kept_and_the_rest_counted(tmp_path, tokenizer):
    content = page(*(panel(5 * i, 0, 5, H, f'{i}') for i in range(20)))
    data = one_page(tmp_path, content, tokenizer)
    assert data.record(0)['texts'] == [f'{i}' for i in range(16)]
    assert data.counts == {'panels_over_limit': 4}
    assert data.example(0, RNG, True)['panels'].all()


def test_empty_texts_have_no_tokens_and_no_modality(tmp_path, tokenizer):
    content = page(panel(0, 0, 60, 80, ''), panel(60, 0, 60, 80, None), panel(0, 0, 9, 9, ' \n'))
    data = one_page(tmp_path, content, tokenizer)
    example = data.example(0, RNG, False)
    assert not example['token_mask'].any() and not example['tokens'].any()
    assert example['modality'][:3].tolist() == [[True, False, True]] * 3
    assert list(data.texts()) == []


def test_augmentation_follows_the_rng_and_is_off_in_evaluation(folder, tmp_path, tokenizer):
    data = pages_of(folder.prepare(tmp_path / 'cache'), 'train', tokenizer)
    first, again, other, plain = (
        data.example(0, np.random.default_rng(seed), train)['images']
        for seed, train in ((1, True), (1, True), (2, True), (3, False))
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any() and (first != plain).any()
    np.testing.assert_array_equal(data.example(0, np.random.default_rng(9), False)['images'], plain)


def test_pickled_and_cached_it_gives_the_same_examples(folder, tmp_path, tokenizer):
    data = pages_of(folder.prepare(tmp_path / 'cache'), 'train', tokenizer, cache_bytes=1 << 20)
    first = data.example(2, np.random.default_rng(5), True)
    assert data._cache  # the second call reads the kept picture
    for other in (data, pickle.loads(pickle.dumps(data)), data.with_tokenizer(tokenizer)):
        example = other.example(2, np.random.default_rng(5), True)
        for key in first:
            np.testing.assert_array_equal(example[key], first[key])
    full = pages_of(folder.prepare(tmp_path / 'cache'), 'train', tokenizer, cache_bytes=10)
    full.example(2, np.random.default_rng(5), True)
    assert not full._cache


def test_large_jpegs_are_reduced_no_further_than_the_cuts_need(tmp_path, tokenizer):
    large = halves().resize((W * 8, H * 8))
    content = page(panel(0, 0, 60, 80), panel(60, 0, 60, 80))
    data = one_page(tmp_path, content, tokenizer, encoded(large), image_size=32)
    reduced = data._reduced(0, data.record(0))
    assert reduced.size == (W, H)  # panels of 60 × 80 for cuts of 32; 1/16 does not exist
    larger = one_page(
        tmp_path / 'b', content, tokenizer, encoded(large), image_size=60
    )  # 60 · 1.15 pixels need more than 1/8
    assert larger._reduced(0, larger.record(0)).size == (W * 2, H * 2)
    assert data.image(0).size == (W * 8, H * 8)


def test_other_page_types_are_skipped_but_are_no_faults(folder, tmp_path):
    for i, kind in enumerate(('story', 'cover', 'cover', 'advertisement')):
        folder.add(f'other_{i}', 'train', kind=kind)
    folder.add('blank', 'train', page())
    del folder.labels['train_5']
    folder.write()
    data = pages_of(folder.prepare(tmp_path / 'cache'))
    assert len(data) == 6
    assert data.skipped == {
        'page_type:cover': 2,
        'page_type:advertisement': 1,
        'page_type:missing': 1,
        'no_panels': 1,
    }
    assert data.prepared.page_types == ('narrative', 'story')
    assert data.index['page_type'].tolist() == [0, 0, 0, 0, 0, 1]


def everything(root):
    return sorted((str(path), path.stat().st_mtime_ns) for path in root.rglob('*'))


def spoil_root(folder):
    folder.root = folder.root / 'nowhere'


def spoil_table(folder):
    (folder.root / 'pages.csv').unlink()


def spoil_labels(folder):
    (folder.root / 'labels.json').unlink()


def spoil_label_syntax(folder):
    (folder.root / 'labels.json').write_text('{\n "a": narrative}')


def spoil_label_type(folder):
    (folder.root / 'labels.json').write_text('{"train_0": 3}')


def spoil_column(folder):
    folder.write('canonical_id,path,split')


def spoil_encoding(folder):
    (folder.root / 'pages.csv').write_bytes(b'canonical_id,image_path,split\n\xff\xfe,a,b\n')


def spoil_split(folder):
    folder.rows = [row for row in folder.rows if row[2] != 'val']
    folder.write()


def spoil_path(folder):
    folder.rows[3] = ('train_3', '../outside.jpg', 'train')
    folder.write()


def spoil_absolute(folder):
    folder.rows[3] = ('train_3', '/etc/passwd', 'train')
    folder.write()


def spoil_id(folder):
    folder.rows[3] = ('../../x', 'images/train_3.jpg', 'train')
    folder.write()


def spoil_twice(folder):
    folder.rows.append(folder.rows[1])
    folder.write()


def spoil_link(folder):
    outside = folder.root.parent / 'outside.jpg'
    outside.write_bytes(HALVES)
    (folder.root / 'images/train_2.jpg').unlink()
    (folder.root / 'images/train_2.jpg').symlink_to(outside)


@pytest.mark.parametrize(
    ('spoil', 'message'),
    [
        (spoil_root, r'root.nowhere is not a folder'),
        (spoil_table, r'pages\.csv does not exist'),
        (spoil_labels, r'labels\.json does not exist'),
        (spoil_label_syntax, r'labels\.json line 2: Expecting value'),
        (spoil_label_type, r"page type of 'train_0' is not a string"),
        (spoil_column, r"pages\.csv has no column 'image_path' \(columns: canonical_id, path"),
        (spoil_encoding, r'pages\.csv is not a CSV table in UTF-8'),
        (spoil_split, r"no page of split 'val' \(splits: train\)"),
        (spoil_path, r"line 5: the path '\.\./outside\.jpg' leads outside"),
        (spoil_absolute, r"line 5: the path '/etc/passwd' leads outside"),
        (spoil_id, r"line 5: the path '\.\./\.\./x' leads outside"),
        (spoil_twice, r"'train_1' stands on line 3 and again on 10"),
    ],
)
def test_faults_of_structure_end_at_once_and_change_nothing(folder, tmp_path, spoil, message):
    spoil(folder)
    before = everything(tmp_path)
    with pytest.raises(UserError, match=message):
        folder.prepare(tmp_path / 'cache' / 'deep', max_fault_share=1.0)
    assert [path for path, _ in everything(tmp_path)] == [path for path, _ in before]


def test_an_image_outside_the_root_is_a_fault_and_never_read(folder, tmp_path):
    spoil_link(folder)
    message = r"'images/train_2\.jpg' leads outside the data root .*1 of the 6 rows"
    with pytest.raises(UserError, match=message):
        folder.prepare(tmp_path / 'cache')
    data = pages_of(folder.prepare(tmp_path / 'cache', max_fault_share=1.0))
    assert data.skipped == {'invalid_record': 1}
    assert [data.record(row)['canonical_id'] for row in range(len(data))] == [
        f'train_{i}' for i in (0, 1, 3, 4, 5)
    ]


BROKEN = '{"panels": [\n{"bbox": [0, 0, 9, 9], "text": "x"},\n{"bbox" [0]}]}'


@pytest.mark.parametrize(
    ('content', 'reason'),
    [
        (BROKEN, r'json/bad\.json line 3: Expecting'),
        ('[' * 100_000, r'json/bad\.json cannot be read'),
        ('{"panels": {}}', r'json/bad\.json holds no list of panels'),
        ('[1]', r'json/bad\.json holds no list of panels'),
        ('{"panels": [{"bbox": [1, 2, 3], "text": ""}]}', r'panel 1 has no bbox of four numbers'),
        ('{"panels": [{"bbox": [1, NaN, 3, 4]}]}', r'panel 1 has no bbox of four numbers'),
        ('{"panels": [{"box_2d": "0 0 1 1"}]}', r'panel 1 has no box_2d of four numbers'),
        ('{"panels": [{"bbox": [0, 0, 9, 9], "text": 7}]}', r'panel 1 has a text that is not'),
        ('{"image_width": 0, "panels": []}', r'image_width or image_height is not a size'),
        (None, r'json/bad\.json does not exist'),
    ],
)
def test_malformed_json_is_named_with_its_line(folder, tmp_path, content, reason):
    folder.add('bad', 'train', content or '')
    if content is None:
        (folder.root / 'json/bad.json').unlink()
    folder.write()
    with pytest.raises(UserError, match=reason + r'.*\(row 10\).*1 of the 7 rows of split train'):
        folder.prepare(tmp_path / 'cache')
    assert not (tmp_path / 'cache').exists()


@pytest.mark.parametrize(
    ('picture', 'reason'),
    [
        (HALVES[:-40], r'images/bad\.jpg cannot be read: .*truncated'),
        (HALVES[:200], r'images/bad\.jpg cannot be read'),
        (b'not a picture', r'images/bad\.jpg cannot be read'),
        (b'', r'images/bad\.jpg cannot be read'),
        (encoded(halves(), 'PNG')[:-40], r'images/bad\.jpg cannot be read'),
        (b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n', r'images/bad\.jpg cannot be read'),
        (encoded(halves().resize((400, 300))), r'400×300 pixels, more than the 100000 allowed'),
        (None, r'images/bad\.jpg does not exist'),
    ],
)
def test_unreadable_pictures_are_named(folder, tmp_path, picture, reason):
    folder.add('bad', 'val', picture=picture or b'')
    if picture is None:
        (folder.root / 'images/bad.jpg').unlink()
    folder.write()
    with pytest.raises(UserError, match=reason + r'.*1 of the 3 rows of split val'):
        folder.prepare(tmp_path / 'cache', max_pixels=100_000)
    assert not (tmp_path / 'cache').exists()


def test_more_than_the_share_of_faults_ends_the_preparation(tmp_path):
    folder = Folder(tmp_path / 'root', {'train': 197})
    for i in range(3):
        folder.add(f'bad_{i}', 'train', BROKEN)
    folder.write()
    message = (
        r'json/bad_0\.json line 3: .*\(row 199\) … json/bad_2\.json line 3.* 3 of the 200 rows'
    )
    with pytest.raises(UserError, match=message):
        folder.prepare(tmp_path / 'cache', ('train',))
    assert not (tmp_path / 'cache').exists()


def test_up_to_the_share_faults_are_skipped_listed_and_counted(tmp_path):
    folder = Folder(tmp_path / 'root', {'train': 298})
    folder.add('bad_json', 'train', BROKEN)
    folder.add('bad_picture', 'train', picture=HALVES[:-40])
    folder.write()
    with (folder.root / 'pages.csv').open('a') as table:
        table.write('\nonly_one_field\n')
    data = pages_of(folder.prepare(tmp_path / 'cache', ('train',)))
    assert len(data) == 298
    assert data.skipped == {'malformed_json': 1, 'unreadable_image': 1, 'malformed_row': 1}
    listing = data.prepared.directory / 'skipped.jsonl'
    listed = [json.loads(line) for line in listing.read_text().splitlines()]
    assert [entry['row'] for entry in listed] == [303, 300, 301]
    assert listed[0]['detail'] == 'pages.csv line 303 has 1 fields, the header 3'
    assert 'json/bad_json.json line 3' in listed[1]['detail']
    assert 'images/bad_picture.jpg' in listed[2]['detail']


def test_a_picture_spoilt_after_preparation_is_named(folder, tmp_path, tokenizer):
    data = pages_of(folder.prepare(tmp_path / 'cache'), 'val', tokenizer)
    (folder.root / 'images/val_1.jpg').write_bytes(HALVES[:-40])
    with pytest.raises(
        UserError, match=r'row 1 of split val \(val_1\) .*val_1\.jpg cannot be read'
    ):
        data.example(1, RNG, False)
    data.example(0, RNG, False)


def test_prepared_pages_are_found_again_until_a_file_changes(folder, tmp_path, monkeypatch):
    first = folder.prepare(tmp_path / 'cache')
    with monkeypatch.context() as patch:
        patch.setattr(pictures, 'check_image', None)
        assert folder.prepare(tmp_path / 'cache') == first
    path = folder.root / 'json/train_0.json'
    path.write_text(json.dumps(page(panel(0, 0, 9, 9, 'changed'))))
    os.utime(path, (1, 1))
    second = folder.prepare(tmp_path / 'cache')
    assert pages_of(second).record(0)['texts'] == ['changed']
    before, after = (pages_of(prepared).fingerprint() for prepared in (first, second))
    assert {key for key in before if before[key] != after[key]} == {'digest'}
    assert after['size'] == 6 and after['split'] == 'train'


def test_the_fingerprint_depends_on_content_not_on_times(folder, tmp_path):
    first = pages_of(folder.prepare(tmp_path / 'cache')).fingerprint()
    for path in folder.root.rglob('*.*'):
        os.utime(path, (7, 7))
    assert pages_of(folder.prepare(tmp_path / 'cache')).fingerprint() == first


def test_progress_reaches_the_number_of_rows(folder, tmp_path):
    seen = []
    folder.add('other', 'train', kind='cover')
    folder.write()
    folder.prepare(tmp_path / 'cache', progress=lambda *state: seen.append(state))
    assert ('train', 7, 7) in seen and ('val', 2, 2) in seen


def stub_page(seed, split, index):
    kind = ('narrative', 'story', 'cover')[index % 3]
    box = [index, 0, W - index, H]
    return {
        'canonical_id': f'{split}_{seed}_{index}',
        'image': HALVES,
        'page_type': kind,
        'page': page({'bbox': box, 'text': f'page {index}', 'confidence': 1.0}),
    }


def test_built_in_pages_carry_their_pictures(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setattr(pages, 'page', stub_page)
    sizes = {'train': 6, 'val': 3}
    prepared = comic.prepare_pages(None, tmp_path, seed=3, synthetic_sizes=sizes)
    data = pages_of(prepared, 'train', tokenizer)
    assert len(data) == 4 and data.skipped == {'page_type:cover': 2}
    assert data.record(2)['canonical_id'] == 'train_3_3'
    assert list(data.texts()) == ['page 0', 'page 1', 'page 3', 'page 4']
    images = data.example(0, RNG, False)['images']
    assert images[0, 8, 2].tolist()[0] > 240 and images[0, 8, 13].tolist()[2] > 240
    other = comic.prepare_pages(None, tmp_path, seed=4, synthetic_sizes=sizes)
    assert other.directory != prepared.directory
    with pytest.raises(UserError, match='need a size'):
        comic.prepare_pages(None, tmp_path, synthetic_sizes={'train': 3})


def test_the_real_generator_fits(tmp_path, tokenizer):
    sizes = {'train': 4, 'val': 2}
    first, second = (
        comic.prepare_pages(None, tmp_path / name, synthetic_sizes=sizes) for name in 'ab'
    )
    a, b = (pages_of(prepared, 'train', tokenizer) for prepared in (first, second))
    assert a.fingerprint() == b.fingerprint()
    example = a.example(0, RNG, True)
    assert example['panels'].sum() == a.index['n_panels'][0] > 0
    assert example['images'][0].std() > 5


def test_crops_equal_plain_ones_within_rounding():
    rng = np.random.default_rng(1)
    picture = Image.fromarray(rng.integers(0, 255, (40, 60, 3), dtype=np.uint8))
    cut = pictures.crop_resize(picture, (0.25, 0.5, 0.75, 1.0), 18)
    plain = np.asarray(picture.crop((15, 20, 45, 40)).resize((18, 18), Image.Resampling.BILINEAR))
    inner = np.s_[1:-1, 1:-1]  # at the rim the filter also sees the neighbours of the box
    assert abs(cut[inner].astype(int) - plain[inner]).max() <= 1
    assert pictures.crop_resize(picture, (0.999, 0.999, 0.999, 0.999), 4).shape == (4, 4, 3)
    beyond = pictures.crop_resize(picture, (-1, -1, 2, 2), 10)
    np.testing.assert_array_equal(beyond, pictures.crop_resize(picture, (0, 0, 1, 1), 10))


def test_tone_is_the_formula_and_boxes_stay_near():
    augmentation = pictures.Augmentation()
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    draw = np.random.default_rng(4).uniform(-1, 1, 2)
    expected = (pixels.astype(float) - 127.5) * (1 + 0.15 * draw[1]) + 127.5 + 25.5 * draw[0]
    toned = augmentation.tone(pixels, np.random.default_rng(4))
    np.testing.assert_array_equal(toned, np.clip(np.rint(expected), 0, 255))
    rng = np.random.default_rng(0)
    boxes = np.array([augmentation.box((0.2, 0.3, 0.6, 0.5), rng) for _ in range(500)])
    moved = abs(boxes - [0.2, 0.3, 0.6, 0.5]).max(0)
    limit = (0.04 + 0.03) * np.array([0.4, 0.2, 0.4, 0.2])
    assert (moved <= limit + 1e-9).all() and (moved > 0.8 * limit).all()
    assert (augmentation.box((0, 0, 1, 1), rng) >= 0).all()


@pytest.mark.parametrize('orientation', range(1, 9))
def test_pictures_are_turned_as_their_exif_says(orientation):
    """What a viewer shows: EXIF's tables of where row 0 and column 0 of the file lie."""
    pixels = np.arange(6, dtype=np.uint8).reshape(2, 3, 1).repeat(3, 2) * 40
    shown = {
        1: lambda x: x,
        2: np.fliplr,
        3: lambda x: np.rot90(x, 2),
        4: np.flipud,
        5: lambda x: x.swapaxes(0, 1),
        6: lambda x: np.rot90(x, -1),
        7: lambda x: np.rot90(x, 2).swapaxes(0, 1),
        8: np.rot90,
    }
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(buffer, 'PNG', exif=exif)
    expected = shown[orientation](pixels)
    np.testing.assert_array_equal(np.asarray(pictures.open_image(buffer.getvalue())), expected)
    assert pictures.check_image(buffer.getvalue()) == expected.shape[1::-1]


def test_a_key_that_stands_twice_is_malformed(tmp_path):
    (tmp_path / 'a.json').write_text('{"a": 1, "b": {"c": 2, "c": 3}}')
    with pytest.raises(RecordError, match=r"a\.json: 'c' stands twice"):
        tables.read_json(tmp_path / 'a.json', 'a.json')


@pytest.mark.parametrize('mode', ['RGB', 'RGBA', 'L', 'LA', 'P', '1', 'CMYK', 'I;16'])
def test_every_mode_becomes_rgb_on_white_paper(mode):
    if mode == 'I;16':
        picture = Image.fromarray(np.full((4, 4), 40_000, np.uint16))
        data, expected = encoded(picture, 'PNG'), [156, 156, 156]
    elif mode in ('RGBA', 'LA'):
        data, expected = encoded(Image.new(mode, (4, 4), (0,) * len(mode)), 'PNG'), [255] * 3
    else:
        form = 'TIFF' if mode == 'CMYK' else 'PNG'
        data, expected = encoded(Image.new('RGB', (4, 4), 'white').convert(mode), form), [255] * 3
    opened = pictures.open_image(data)
    assert opened.mode == 'RGB' and opened.getpixel((1, 1)) == tuple(expected)


def test_inside_follows_links_and_refuses_what_leads_out(tmp_path):
    root = tmp_path / 'root'
    (root / 'images').mkdir(parents=True)
    (root / 'away').symlink_to(tmp_path)
    (root / 'near').symlink_to(root / 'images')
    assert pictures.inside(root, 'images/a.jpg') == root / 'images/a.jpg'
    assert pictures.inside(root, 'near/a.jpg') == root / 'near/a.jpg'
    assert pictures.inside(root, 'images/../images/a.jpg').name == 'a.jpg'
    for path in ('../a.jpg', '/a.jpg', 'images/../../a.jpg', 'away/a.jpg', '', 'a\0b'):
        with pytest.raises(UserError):
            pictures.inside(root, path)


def test_record_errors_pass_between_processes():
    error = pickle.loads(pickle.dumps(RecordError('malformed_json', 'a.json line 3')))
    assert (error.reason, str(error)) == ('malformed_json', 'a.json line 3')
    assert isinstance(error, UserError)


def test_labels_and_tables_with_a_byte_order_mark_are_read(folder, tmp_path):
    for name in ('pages.csv', 'labels.json', 'json/train_0.json'):
        path = folder.root / name
        path.write_bytes(b'\xef\xbb\xbf' + path.read_bytes())
    assert comic_folder.open_folder(folder.root, ['train']).rows == {'train': 6}
    assert len(pages_of(folder.prepare(tmp_path / 'cache'))) == 6
