"""Pictures of items: folders of both forms, every fault by name, and what an example holds."""

import json
import os
import pathlib
import pickle
import shutil
import time

import numpy as np
import pytest
from PIL import Image

from mmjax.data import augment, images, tokenizers
from mmjax.errors import UserError
from mmjax.recipes.retrieval import data as retrieval
from mmjax.recipes.retrieval import folder as retrieval_folder

COLOURS = (
    (200, 30, 30),
    (30, 200, 30),
    (30, 30, 200),
    (200, 200, 30),
    (30, 200, 200),
    (90, 90, 90),
)
TABLE, SPLITS = 'image_paths.json', 'image_splits.json'
SIZES = dict(train_items=3, val_items=2, test_items=2, shots=2, query_shots=1, gallery_shots=1)


def colour_of(item):
    return COLOURS[int(item.split('_')[1]) % len(COLOURS)]


class Folder:
    """A folder of items to be spoilt; each item is of one colour. Paths begin at `base`."""

    def __init__(self, root, counts, base=''):
        self.root, self.base = root, root / base
        self.table = {}
        (root / 'images').mkdir(parents=True)
        for split, (items, shots) in counts.items():
            for i in range(items):
                for shot in range(shots):
                    self.add(f'item_{i}', split, shot)
        self.write()

    def add(self, item, split, name):
        path = f'{"" if self.base.name == "images" else "images/"}{split}/{item}_{name}.jpg'
        self.table[path] = {'item_id': item, 'split': split}
        (self.base / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (24, 16), colour_of(item)).save(self.base / path)
        return path

    def write(self):
        (self.root / TABLE).write_text(json.dumps(self.table))
        splits = {}
        for path, entry in self.table.items():
            if isinstance(entry, dict) and isinstance(entry.get('split'), str):
                splits.setdefault(entry['split'], []).append(path)
        (self.root / SPLITS).write_text(json.dumps(splits))

    def prepare(self, cache, splits=('train', 'val'), **options):
        return retrieval.prepare_items(self.root, cache, splits=splits, **options)


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path / 'root', {'train': (3, 2), 'val': (2, 1)})


@pytest.fixture(scope='module')
def tokenizer():
    return tokenizers.train_tokenizer(['a red thing, number 0 1 2 3 4 5'] * 3, 280)


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
    """Six items of three pictures each in train and a seventh of one; two in val. Not to spoil."""
    place = tmp_path_factory.mktemp('items')
    folder = Folder(place / 'root', {'train': (6, 3), 'val': (2, 2)})
    folder.add('item_6', 'train', 0)
    folder.write()
    return folder.prepare(place / 'cache')


def split_of(prepared, split='train', **options):
    return retrieval.ItemImages(prepared, split, **{'image_size': 12, **options})


def prompts_of(data):
    return {item: f'a thing, number {item[5:]}' for item in data.items}


RNG = np.random.default_rng(0)


@pytest.mark.parametrize('base', ['', 'images'])
def test_paths_begin_at_the_root_or_at_its_images(tmp_path, tokenizer, base):
    folder = Folder(tmp_path / 'root', {'train': (3, 2), 'val': (2, 1)}, base)
    if not base:  # what lies in both places is taken from the root
        shutil.copytree(folder.root / 'images', folder.root / 'images/images')
    prepared = folder.prepare(tmp_path / 'cache')
    assert prepared.items == ('item_0', 'item_1', 'item_2')
    for split, identities in (('train', [0, 0, 1, 1, 2, 2]), ('val', [0, 1])):
        data = split_of(prepared, split)
        assert len(data) == len(identities) and data.index['identity'].tolist() == identities
        data = data.with_prompts(prompts_of(data), tokenizer, 16)
        for row, identity in enumerate(identities):
            record = data.record(row)
            assert record['item'] == f'item_{identity}'
            assert record['image_path'].startswith(f'images/{split}/item_{identity}_')
            assert data.example(row, RNG, False)['identity'] == identity
            assert abs(np.asarray(data.image(row)) - np.array(COLOURS[identity])).max() < 6


@pytest.mark.parametrize('base', ['', 'images'])
def test_a_missing_first_picture_does_not_decide_where_paths_begin(tmp_path, base):
    folder = Folder(tmp_path / 'root', {'train': (3, 2)}, base)
    (folder.base / next(iter(folder.table))).unlink()
    data = split_of(folder.prepare(tmp_path / 'cache', ('train',), max_fault_share=0.2))
    assert len(data) == 5 and data.skipped == {'missing_image': 1}


def everything(root):
    return sorted((str(path), path.lstat().st_mtime_ns) for path in root.rglob('*'))


def spoil_root(folder):
    folder.root = folder.root / 'nowhere'


def spoil_table(folder):
    (folder.root / TABLE).unlink()


def written(name, text):
    """Returns what replaces a file."""
    data = text if isinstance(text, bytes) else text.encode()
    return lambda folder: (folder.root / name).write_bytes(data)


def entry(path, **changes):
    """Returns what adds or changes an entry of the table, without a picture."""

    def spoil(folder):
        folder.table[path] = {'item_id': 'item_0', 'split': 'train'} | changes
        (folder.root / TABLE).write_text(json.dumps(folder.table))

    return spoil


def spoil_split(folder):
    folder.table = {p: e for p, e in folder.table.items() if e['split'] != 'val'}
    folder.write()


def spoil_entries(folder):
    folder.table = {path: {'item': 'item_0', 'split': 'train'} for path in folder.table}
    folder.write()


def spoil_link(folder):
    outside = folder.root.parent / 'outside.jpg'
    Image.new('RGB', (9, 9)).save(outside)
    (folder.root / 'images/train/item_1_1.jpg').unlink()
    (folder.root / 'images/train/item_1_1.jpg').symlink_to(outside)


def spoil_images(folder):
    (folder.root / 'images').rename(folder.root.parent / 'elsewhere')
    (folder.root / 'images').symlink_to(folder.root.parent / 'elsewhere')
    folder.table = {path.removeprefix('images/'): e for path, e in folder.table.items()}
    folder.write()


def cut(path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    path.write_bytes(path.read_bytes()[:-400])


TWICE = './images//train/item_0_0.jpg'


@pytest.mark.parametrize(
    ('spoil', 'message'),
    [
        (spoil_root, r'root.nowhere is not a folder'),
        (spoil_table, r'image_paths\.json does not exist'),
        (written(TABLE, '{\n "a.jpg": {"item_id": \'x\'}}'), r'\.json line 2: Expecting value'),
        (written(TABLE, '{"a.jpg"\n\n: {}'), r'image_paths\.json line 3: '),
        (written(TABLE, b'{\n"\xff.jpg": {}}'), r'image_paths\.json line 2: not UTF-8'),
        (written(TABLE, '[' * 100_000), r'image_paths\.json cannot be read'),
        (written(TABLE, '["a.jpg"]'), r'image_paths\.json is not an object, but a list'),
        (written(TABLE, '{}'), r"no image of split 'train' \(splits: none\)"),
        (spoil_split, r"image_paths\.json has no image of split 'val' \(splits: train\)"),
        (spoil_entries, r"entry 1 \('images/.*_0_0\.jpg'\) has no item_id, and no entry is well"),
        (entry('../outside.jpg'), r"image_paths\.json: the path '\.\./outside\.jpg' leads outside"),
        (entry('images/../../x.jpg'), r"the path 'images/\.\./\.\./x\.jpg' leads outside"),
        (entry('/etc/passwd'), r"the path '/etc/passwd' leads outside"),
        (entry('~/x.jpg'), r"the path '~/x\.jpg' leads outside"),
        (entry('a\0b.jpg'), r"the path 'a\\x00b\.jpg' leads outside"),
        (entry(''), r"the path '' leads outside"),
        (entry(TWICE, split='val'), r"entry 9 \('\./images//.*'\) names images/train/item_0_0"),
        (
            written(SPLITS, '{"val": ["images/train/item_0_0.jpg"]}'),
            r"splits\.json puts images/train/item_0_0\.jpg into 'val', image_paths\.json into '",
        ),
        (written(SPLITS, f'{{"val": ["{TWICE}"]}}'), r"into 'val', image_paths\.json into 'train'"),
        (written(SPLITS, '{"val": "x"}'), r"splits\.json: split 'val' is not a list of paths"),
        (written(SPLITS, '{"val": [7]}'), r"splits\.json: split 'val' holds 7, not a path"),
        (written(SPLITS, '[]'), r'image_splits\.json is not an object, but a list'),
        (written(SPLITS, '{\n"val": [}'), r'image_splits\.json line 2: Expecting value'),
    ],
)
def test_faults_of_structure_end_at_once_and_change_nothing(folder, tmp_path, spoil, message):
    spoil(folder)
    before = everything(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        folder.prepare(tmp_path / 'cache' / 'deep', max_fault_share=1.0)
    assert '\n' not in str(caught.value)
    assert [path for path, _ in everything(tmp_path)] == [path for path, _ in before]


@pytest.mark.parametrize(('spoil', 'path'), [(spoil_link, 'item_1_1'), (spoil_images, 'item_0_0')])
def test_images_outside_the_root_are_faults_and_never_read(folder, tmp_path, spoil, path):
    spoil(folder)
    message = rf"'images/train/{path}\.jpg' leads outside the data root .*1 of the 6 rows"
    with pytest.raises(UserError, match=message):
        folder.prepare(tmp_path / 'cache')
    if spoil is spoil_images:
        with pytest.raises(UserError, match=r'no usable record .*invalid_record 6'):
            folder.prepare(tmp_path / 'cache', max_fault_share=1.0)
    else:
        data = split_of(folder.prepare(tmp_path / 'cache', max_fault_share=1.0))
        assert data.skipped == {'invalid_record': 1} and len(data) == 5


@pytest.mark.parametrize(
    ('path', 'content', 'what'),
    [
        ('bad.jpg', 'train', r"\('bad\.jpg'\) is not an object"),
        ('bad.jpg', None, r"\('bad\.jpg'\) is not an object"),
        ('bad.jpg', {'split': 'train'}, r"\('bad\.jpg'\) has no item_id"),
        ('bad.jpg', {'item_id': 'item_0'}, r"\('bad\.jpg'\) has no split"),
        ('bad.jpg', {'item_id': 7, 'split': 'train'}, r"\('bad\.jpg'\): item_id is 7, not a name"),
        (
            'bad.jpg',
            {'item_id': '', 'split': 'train'},
            r"\('bad\.jpg'\): item_id is '', not a name",
        ),
        (
            'bad.jpg',
            {'item_id': 'item_0', 'split': None},
            r"\('bad\.jpg'\): split is None, not a name",
        ),
        ('bad.jpg', {'item_id': [1] * 999, 'split': 'train'}, r'.*item_id is \[1, [1, ]{,60}, not'),
        ('\ud800.jpg', {'item_id': 'item_0', 'split': 'train'}, r"\('\\ud800\.jpg'\) has half a"),
    ],
)
def test_malformed_entries_are_named(folder, tmp_path, path, content, what):
    folder.table = {path: content, **folder.table}
    folder.write()
    message = rf'image_paths\.json entry 1 {what}.*: 1 of the 7 rows of split train are faulty'
    with pytest.raises(UserError, match=message):
        folder.prepare(tmp_path / 'cache')
    assert not (tmp_path / 'cache').exists()


@pytest.mark.parametrize(
    ('spoil', 'reason'),
    [
        (cut, 'cannot be read: .*truncated'),
        (lambda path: path.write_bytes(b'not a picture'), 'cannot be read'),
        (lambda path: path.write_bytes(b''), 'cannot be read'),
        (lambda path: path.unlink(), 'does not exist'),
        (lambda path: (path.unlink(), path.mkdir()), 'cannot be read'),
        (lambda path: (path.unlink(), path.symlink_to(path)), 'cannot be read'),
        (
            lambda path: Image.new('RGB', (90, 80)).save(path),
            'has 90×80 pixels, more than the 5000',
        ),
    ],
    ids=['truncated', 'text', 'empty', 'missing', 'folder', 'loop', 'large'],
)
def test_unreadable_pictures_are_named(folder, tmp_path, spoil, reason):
    spoil(folder.root / 'images/val/item_1_0.jpg')
    message = rf'images/val/item_1_0\.jpg {reason}.*\(row 8\): 1 of the 2 rows of split val'
    with pytest.raises(UserError, match=message):
        folder.prepare(tmp_path / 'cache', max_pixels=5000)
    assert not (tmp_path / 'cache').exists()


def test_a_name_longer_than_any_file_is_a_missing_picture(folder, tmp_path):
    folder.table = {'x' * 300 + '.jpg': {'item_id': 'item_0', 'split': 'train'}, **folder.table}
    folder.write()
    with pytest.raises(UserError, match=r'x+\.jpg cannot be read.*1 of the 7 rows'):
        folder.prepare(tmp_path / 'cache')


def test_up_to_the_share_faults_are_skipped_listed_and_counted(tmp_path):
    folder = Folder(tmp_path / 'root', {'train': (3, 99), 'val': (1, 1)})
    cut = folder.root / folder.add('item_0', 'train', 'cut')
    cut.write_bytes(cut.read_bytes()[:-40])
    (folder.root / folder.add('item_1', 'train', 'gone')).unlink()
    folder.table['bad.jpg'] = {'split': 'query'}
    folder.write()
    prepared = folder.prepare(tmp_path / 'cache')
    data = split_of(prepared)
    assert len(data) == 297 and split_of(prepared, 'val').skipped == {}
    assert data.skipped == {'malformed_row': 1, 'unreadable_image': 1, 'missing_image': 1}
    listing = (prepared.directory / 'skipped.jsonl').read_text().splitlines()
    listed = [json.loads(line) for line in listing]
    assert [fault['row'] for fault in listed] == [301, 299, 300]
    assert listed[0]['detail'] == "image_paths.json entry 301 ('bad.jpg') has no item_id"
    assert 'images/train/item_0_cut.jpg' in listed[1]['detail']
    (folder.root / 'images/train/item_2_0.jpg').unlink()  # the fourth of 300
    message = r"entry 301 \('bad\.jpg'\).* … images/train/item_1_gone\.jpg.*4 of the 300 rows"
    with pytest.raises(UserError, match=message):
        folder.prepare(tmp_path / 'cache')


def test_prepared_pictures_are_found_again_until_one_changes_or_moves(
    folder, tmp_path, monkeypatch
):
    first = folder.prepare(tmp_path / 'cache')
    with monkeypatch.context() as patch:
        patch.setattr(images, 'check_image', None)
        assert folder.prepare(tmp_path / 'cache') == first
    path = folder.root / 'images/train/item_0_1.jpg'
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match=r'item_0_1\.jpg cannot be read'):
        folder.prepare(tmp_path / 'cache')
    second = folder.prepare(tmp_path / 'cache', max_fault_share=0.5)
    assert len(split_of(second)) == 5
    before, after = (split_of(prepared).fingerprint() for prepared in (first, second))
    assert {key for key in before if before[key] != after[key]} == {'digest', 'size'}
    folder.table['images/train/item_1_0.jpg']['item_id'] = 'item_2'
    folder.write()
    third = split_of(folder.prepare(tmp_path / 'cache', max_fault_share=0.5))
    assert [third.record(row)['item'][5:] for row in range(5)] == ['0', '2', '1', '2', '2']
    path.unlink()
    table = {p.removeprefix('images/'): e for p, e in folder.table.items() if 'item_0_1' not in p}
    (folder.root / TABLE).write_text(json.dumps(table))
    (folder.root / SPLITS).unlink()
    inner = split_of(folder.prepare(tmp_path / 'cache'))
    for name in ('train', 'val'):  # size and time stay as they are
        (folder.root / 'images' / name).rename(folder.root / name)
    outer = split_of(folder.prepare(tmp_path / 'cache'))
    assert [data.record(0)['image_path'] for data in (inner, outer)] == [
        'images/train/item_0_0.jpg',
        'train/item_0_0.jpg',
    ]


def test_a_large_table_takes_linear_time(tmp_path):
    table = {
        f'{i % 100}/{i}.jpg': {'item_id': f'item_{i // 3}', 'split': ('train', 'val')[i % 2]}
        for i in range(100_000)
    }
    (tmp_path / TABLE).write_text(json.dumps(table))
    (tmp_path / '0').mkdir()
    (tmp_path / '0/0.jpg').touch()
    start = time.process_time()
    opened = retrieval_folder.open_folder(tmp_path, ('train', 'val'))
    assert (len(opened.rows['train']), len(opened.items())) == (50_000, 33_334)
    assert time.process_time() - start < 30  # 2 s; a search in a list for each takes minutes
    named = retrieval_folder.named_splits(tmp_path)
    assert 'val' in named and 'query' not in named


def test_an_example_holds_picture_prompt_and_identity(prepared, tokenizer):
    data = split_of(prepared, 'val')
    with pytest.raises(ValueError, match='has no prompts yet'):
        data.example(0, RNG, False)
    prompts = {'item_0': 'a thing, number 0', 'item_1': 'a red thing'}  # none for the others
    data = data.with_prompts(prompts, tokenizer, 16)
    assert len(data) == 4
    for row, item in enumerate(('item_0', 'item_0', 'item_1', 'item_1')):
        example = data.example(row, RNG, train=False)
        shapes = {key: (value.shape, value.dtype.name) for key, value in example.items()}
        assert shapes == {
            'images': ((12, 12, 3), 'uint8'),
            'tokens': ((16,), 'int32'),
            'token_mask': ((16,), 'bool'),
            'identity': ((), 'int32'),
        }
        tokens, mask = tokenizer.encode([prompts[item]], 16)
        np.testing.assert_array_equal(example['tokens'], tokens[0])
        np.testing.assert_array_equal(example['token_mask'], mask[0])
        assert data.items[example['identity']] == item
    batch = data.collate([data.example(row, RNG, False) for row in range(4)], 0)
    assert batch['images'].shape == (4, 12, 12, 3) and batch['identity'].tolist() == [0, 0, 1, 1]


def test_items_without_a_prompt_are_counted_and_named(prepared, tokenizer):
    data = split_of(prepared)
    prompts = prompts_of(data)
    del prompts['item_2']
    prompts['item_4'] = ' \n'
    with pytest.raises(UserError, match=r"2 items of split train have no prompt, 'item_2' first"):
        data.with_prompts(prompts, tokenizer, 16)
    split_of(prepared, 'val').with_prompts(prompts, tokenizer, 16)  # it shows neither


def test_the_fingerprint_tells_prompts_and_parts_apart(prepared, tokenizer):
    plain = split_of(prepared)
    told = plain.with_prompts(prompts_of(plain), tokenizer, 16)
    again = split_of(prepared).with_prompts(prompts_of(plain), tokenizer, 16)
    other = told.with_prompts(prompts_of(plain) | {'item_3': 'a red thing'}, tokenizer, 16)
    assert told.fingerprint() == again.fingerprint()
    for changed in (plain, other):
        before, after = told.fingerprint(), changed.fingerprint()
        assert {key for key in before if before[key] != after[key]} == {'prompts'}
    digests = [
        told.subset(np.array(rows), 'train').fingerprint()['digest']
        for rows in ([0, 1], [0, 2], [0, 1])
    ]
    assert digests[0] == digests[2] != digests[1]
    told.skipped['prompts_cut'] = 1  # what a task adds to one is not added to the others
    assert plain.skipped == other.skipped == {}


def test_parts_keep_index_pictures_and_cache_together(prepared, tokenizer):
    data = split_of(prepared, cache_bytes=1 << 20).with_prompts(
        prompts_of(split_of(prepared)), tokenizer, 16
    )
    for row in range(len(data)):
        data.image(row)
    part = data.subset(np.array([17, 0, 10]), 'some')
    nested = part.subset(np.array([2, 0]), 'fewer')
    assert (part.split, nested.split, data.split) == ('some', 'fewer', 'train')
    for some, rows in ((part, [17, 0, 10]), (nested, [10, 17]), (part, [17, 0, 10])):
        assert len(some) == len(rows) and list(some.index) == ['identity']
        for row, whole in enumerate(rows):
            assert some.record(row) == data.record(whole)
            np.testing.assert_array_equal(some.image(row), data.image(whole))
            a, b = some.example(row, RNG, False), data.example(whole, RNG, False)
            for key in b:
                np.testing.assert_array_equal(a[key], b[key])
            assert some.index['identity'][row] == data.index['identity'][whole]
    assert data.image(3) is data.with_prompts(prompts_of(data), tokenizer, 8).image(3)


def test_whole_items_are_held_out_the_same_each_time(prepared):
    data = split_of(prepared)  # seven items, of which one has one picture
    for share, wanted in ((0.3, 2), (0.5, 4), (0.86, 6)):
        chosen = set()
        for seed in range(6):
            parts = data.hold_out(share, seed)
            assert {name: part.split for name, part in parts.items()} == {n: n for n in parts}
            train, val = (set(parts[name].index['identity'].tolist()) for name in ('train', 'val'))
            assert not train & val and train | val == set(range(7)) and len(val) == wanted
            assert 6 in train and len(parts['val']) == 3 * wanted
            assert len(parts['train']) + len(parts['val']) == len(data)
            again = split_of(prepared).hold_out(share, seed)['val']
            np.testing.assert_array_equal(again.index['identity'], parts['val'].index['identity'])
            chosen.add(tuple(sorted(val)))
        assert (len(chosen) > 1) == (wanted < 6)
    for share in (0.05, 0.95, 1.0, -0.3, 2.0):
        with pytest.raises(UserError, match=rf'val_items={share} of the 7 items of split train, 6'):
            data.hold_out(share, 0)


def test_pickled_it_gives_the_same_examples_and_leaves_its_cache(prepared, tokenizer):
    data = split_of(prepared, augmentation=augment.Augmentation()).subset(np.array([4, 2]), 'part')
    data = data.with_prompts(prompts_of(data), tokenizer, 16)
    before = len(pickle.dumps(data))
    first = data.example(1, np.random.default_rng(5), True)
    assert len(data._cache) == 1 and len(pickle.dumps(data)) == before < 50_000
    copy = pickle.loads(pickle.dumps(data))
    example = copy.example(1, np.random.default_rng(5), True)
    for key in first:
        np.testing.assert_array_equal(example[key], first[key])
    assert copy.fingerprint() == data.fingerprint() and len(copy) == 2


@pytest.fixture(scope='module')
def waves(tmp_path_factory):
    """One large picture with structure, and one smaller than is asked for."""
    place = tmp_path_factory.mktemp('waves')
    folder = Folder(place / 'root', {'train': (1, 2)})
    y, x = np.mgrid[:480, :720]
    rows = [np.sin(x / 31) + np.cos(y / 23), np.sin((x + y) / 37), np.cos((x - y) / 29)]
    picture = Image.fromarray((127 + 60 * np.stack(rows, -1)).clip(0, 255).astype(np.uint8))
    picture.save(folder.root / 'images/train/item_0_0.jpg', quality=95)
    return folder.prepare(place / 'cache', ('train',)), folder.root


def test_in_evaluation_it_is_the_centre_square_near_to_pils_own_resize(waves, tokenizer):
    prepared, root = waves
    for size in (16, 48, 300):
        data = split_of(prepared, image_size=size, augmentation=augment.Augmentation())
        data = data.with_prompts({'item_0': 'a red thing'}, tokenizer, 16)
        picture = data.image(0)
        assert min(picture.size) == min(round(1.5 * size), 480)
        assert picture.width / picture.height == pytest.approx(1.5, rel=0.01)
        found = data.example(0, RNG, False)['images']
        np.testing.assert_array_equal(found, augment.centre_crop(picture, size))
        whole = Image.open(root / 'images/train/item_0_0.jpg')
        errors = []
        for shift in (-4, 0, 4):  # pixels of the file
            box = (120 + shift, 0, 600 + shift, 480)
            plain = whole.resize((size, size), Image.Resampling.BILINEAR, box)
            errors.append(abs(found.astype(int) - np.asarray(plain)).mean())
        assert errors[1] < 3 and errors[1] < 0.7 * min(errors[0], errors[2])
        assert data.image(1).size == (24, 16)
        assert data.example(1, RNG, False)['images'].shape == (size, size, 3)


def test_in_training_it_varies_with_the_rng_alone(waves, tokenizer):
    prompts = {'item_0': 'a red thing'}
    data = split_of(waves[0], augmentation=augment.Augmentation(), cache_bytes=1 << 20)
    data = data.with_prompts(prompts, tokenizer, 16)
    one, two, three, plain = (
        data.example(0, np.random.default_rng(seed), train)['images']
        for seed, train in ((1, True), (2, True), (1, True), (1, False))
    )
    np.testing.assert_array_equal(one, three)
    assert (one != two).any() and (one != plain).any()
    fresh = split_of(waves[0], augmentation=augment.Augmentation(), cache_bytes=0)
    fresh = fresh.with_prompts(prompts, tokenizer, 16)
    again = fresh.example(0, np.random.default_rng(1), True)['images']
    np.testing.assert_array_equal(again, one)
    without = split_of(waves[0]).with_prompts(prompts, tokenizer, 16)
    np.testing.assert_array_equal(without.example(0, RNG, True)['images'], plain)


def test_a_picture_spoilt_after_preparation_is_named(folder, tmp_path, tokenizer):
    data = split_of(folder.prepare(tmp_path / 'cache'), 'val')
    data = data.with_prompts(prompts_of(data), tokenizer, 16)
    path = folder.root / 'images/val/item_1_0.jpg'
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match=r'images/val/item_1_0\.jpg cannot be read'):
        data.example(1, RNG, False)
    data.example(0, RNG, False)


def test_pictures_are_kept_up_to_a_limit_and_by_row():
    made = []

    def make(size):
        made.append(size)
        return Image.new('RGB', (size, 10))

    kept = images.ImageCache(1000)
    first = kept.get(3, lambda: make(20))  # 800 bytes
    assert kept.get(3, lambda: make(20)) is first and made == [20]
    assert kept.get(0, lambda: make(6)).size == (6, 10) and len(kept) == 1  # 240 more: too many
    assert kept.get(0, lambda: make(5)).size == (5, 10) and len(kept) == 2  # 200: just enough
    assert made == [20, 6, 5]
    assert kept.get(1, lambda: make(1)).size == (1, 10) and len(kept) == 2
    copy = pickle.loads(pickle.dumps(kept))
    assert len(copy) == 0 and copy.get(3, lambda: make(25)).size == (25, 10) and len(copy) == 1


@pytest.fixture(scope='module')
def built_in(tmp_path_factory):
    cache = tmp_path_factory.mktemp('built_in')
    return retrieval.prepare_items(None, cache, seed=2, synthetic_sizes=SIZES), cache


def test_built_in_items_carry_their_pictures_and_descriptions(built_in, tokenizer):
    prepared, _ = built_in
    splits = {name: split_of(prepared, name, image_size=32) for name in retrieval.SPLITS}
    assert {name: len(data) for name, data in splits.items()} == {
        'train': 6,
        'val': 4,
        'query': 2,
        'gallery': 2,
    }
    used = {name: set(data.index['identity'].tolist()) for name, data in splits.items()}
    assert used['query'] == used['gallery'] and prepared.root is None
    parts = [used['train'], used['val'], used['query']]
    assert [len(part) for part in parts] == [3, 2, 2] and set.union(*parts) == set(range(7))
    assert tuple(entry['item'] for entry in prepared.descriptions) == prepared.items
    prompts = {entry['item']: entry['description'][0] for entry in prepared.descriptions}
    for data in splits.values():
        told = data.with_prompts(prompts, tokenizer, 32)
        for row in range(len(told)):
            example, record = told.example(row, RNG, True), told.record(row)
            assert told.items[example['identity']] == record['item']
            assert example['images'].shape == (32, 32, 3) and example['images'].std() > 5
            assert record['image_path'].startswith(record['item'] + '/' + data.split)
    shown = [splits[name].image(0).tobytes() for name in ('query', 'gallery')]
    assert shown[0] != shown[1]


def test_built_in_items_are_found_again_by_seed_size_and_code(built_in, tmp_path, monkeypatch):
    prepared, cache = built_in
    read, seen = pathlib.Path.read_bytes, set()
    monkeypatch.setattr(
        pathlib.Path, 'read_bytes', lambda self: (seen.add(self.as_posix()), read(self))[1]
    )
    again = retrieval.prepare_items(None, cache, seed=2, synthetic_sizes=SIZES)
    assert again == prepared
    made_by = ('recipes/retrieval/synthetic/items.py', 'data/drawing.py')
    assert all(any(path.endswith(f'mmjax/{source}') for path in seen) for source in made_by)
    elsewhere = retrieval.prepare_items(
        None, tmp_path, splits=('train',), seed=2, synthetic_sizes=SIZES
    )
    one, two = (split_of(p).fingerprint() for p in (prepared, elsewhere))
    assert {key for key in one if one[key] != two[key]} == set()
    other = retrieval.prepare_items(None, tmp_path, seed=3, splits=('val',), synthetic_sizes=SIZES)
    assert split_of(other, 'val').fingerprint() != split_of(prepared, 'val').fingerprint()
    assert len(os.listdir(tmp_path)) == 2
    for seed, change in ((2, {}), (3, {}), (2, {'shots': 1})):
        splits = {'splits': ('train',), 'synthetic_sizes': SIZES | change}
        retrieval.prepare_items(None, tmp_path, seed=seed, **splits)
    assert len(os.listdir(tmp_path)) == 4
    for sizes in (None, {}, {**SIZES, 'shots': 0}):
        with pytest.raises(UserError, match=r'train_items is missing|shots must be at least 1'):
            retrieval.prepare_items(None, tmp_path, synthetic_sizes=sizes)
