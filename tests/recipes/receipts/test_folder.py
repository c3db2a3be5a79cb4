"""Folders of receipts: what is read in which order, and every fault by name."""

import csv
import json
import os
import pathlib
import shutil

import pytest
from PIL import Image

from mmjax.errors import UserError
from mmjax.recipes.receipts import data as receipts
from mmjax.recipes.receipts import folder as receipts_folder

HEADER = ('filename', 'receipt_count', 'question', 'answer', 'qa_pair_idx')


class Folder:
    """A folder to be spoilt: picture i of a split shows i % 4 receipts and has two questions."""

    def __init__(self, root, counts):
        self.root, self.header, self.lines, self.encoding = root, HEADER, {}, 'utf-8'
        for split, number in counts.items():
            (root / split / 'images').mkdir(parents=True)
            self.lines[split] = []
            for i in range(number):
                colour = (40 * (i % 6), 200, 90)
                Image.new('RGB', (24, 16), colour).save(root / split / f'images/p{i}.png')
                asked = ('How many receipts are there?', 'What is the total?')
                for pair, question in enumerate(asked):
                    answer = f'There are {i % 4}.' if not pair else f'It is {i}.50.'
                    self.lines[split].append([f'p{i}.png', str(i % 4), question, answer, str(pair)])
        self.write()

    def write(self):
        for split, lines in self.lines.items():
            table = self.root / split / 'metadata.csv'
            with table.open('w', newline='', encoding=self.encoding) as file:
                csv.writer(file).writerows([self.header, *lines])

    def prepare(self, cache, splits=('train', 'val'), **options):
        return receipts.prepare_receipts(self.root, cache, splits=splits, **options)


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path / 'root', {'train': 5, 'val': 2})


def questions(prepared, split='train', **options):
    options = {'image_size': 24, 'buckets': (8, 32), **options}
    return receipts.ReceiptQuestions(prepared, split, **options)


def test_a_folder_is_read_in_order_with_columns_in_any(folder, tmp_path):
    order = [4, 2, 0, 3, 1]
    folder.header = (*(HEADER[i] for i in order), 'note')
    turned = lambda lines: [[*(line[i] for i in order), ''] for line in lines]
    folder.lines = {split: turned(lines) for split, lines in folder.lines.items()}
    folder.write()
    data = questions(folder.prepare(tmp_path / 'cache'))
    assert len(data) == 10 and data.skipped == {}
    assert data.index['count'].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 0, 0]
    assert data.index['label'].tolist() == [0, 0, 1, 1, 2, 2, 2, 2, 0, 0]
    assert data.index['picture'].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert data.record(5) == {
        'line': 7,
        'count': 2,
        'question': 'What is the total?',
        'answer': 'It is 2.50.',
        'pair': 1,
        'picture': 2,
        'image_path': 'train/images/p2.png',
    }


def test_train_and_val_are_wanted_and_test_where_there_is_one(folder, tmp_path):
    assert receipts_folder.named_splits(folder.root) == ('train', 'val')
    shutil.copytree(folder.root / 'val', folder.root / 'test')
    assert receipts_folder.named_splits(folder.root) == ('train', 'val', 'test')
    for split, known in (('val', 'train, test'), ('train', 'test')):
        (folder.root / split / 'metadata.csv').unlink()
        splits = receipts_folder.named_splits(folder.root)
        message = rf'{split}/metadata\.csv does not exist \(splits: {known}\)'
        with pytest.raises(UserError, match=message):
            folder.prepare(tmp_path / 'cache', splits)


def test_a_table_that_may_not_be_read_is_named(folder, tmp_path, monkeypatch):
    opened = pathlib.Path.open

    def refuse(self, *arguments, **options):
        if self.name == 'metadata.csv':
            raise PermissionError(13, 'Permission denied', str(self))
        return opened(self, *arguments, **options)

    monkeypatch.setattr(pathlib.Path, 'open', refuse)
    with pytest.raises(UserError, match=r'train/metadata\.csv cannot be read: Permission denied'):
        folder.prepare(tmp_path / 'cache')


def test_rows_of_a_picture_need_not_be_neighbours(folder, tmp_path):
    lines = folder.lines['train']
    folder.lines['train'] = [*lines[0::2], *([f'./{line[0]}', *line[1:]] for line in lines[1::2])]
    folder.write()
    data = questions(folder.prepare(tmp_path / 'cache'))
    assert data.index['picture'].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert [data.record(row)['line'] for row in range(4)] == [2, 7, 3, 8]


@pytest.mark.parametrize('column', HEADER)
def test_a_wrong_column_is_named(folder, tmp_path, column):
    folder.header = tuple('x' if name == column else name for name in HEADER)
    folder.write()
    with pytest.raises(UserError, match=rf"train/metadata\.csv has no column '{column}' \(col.* x"):
        folder.prepare(tmp_path / 'cache')
    folder.header = (*HEADER, column)
    folder.write()
    with pytest.raises(UserError, match=rf"has more than one column '{column}'"):
        folder.prepare(tmp_path / 'cache')
    assert not (tmp_path / 'cache').exists()


def outside(name):
    return lambda folder: folder.lines['val'][1].__setitem__(0, name)


def spoil_link(folder):
    Image.new('RGB', (9, 9)).save(folder.root.parent / 'outside.png')
    (folder.root / 'train/images/p1.png').unlink()
    (folder.root / 'train/images/p1.png').symlink_to(folder.root.parent / 'outside.png')


def spoil_all(folder):
    folder.lines['val'] = [['', *line[1:]] for line in folder.lines['val']]


def spoil_images(folder):
    (folder.root / 'val/images').rename(folder.root / 'val/pictures')


@pytest.mark.parametrize(
    ('spoil', 'message'),
    [
        (lambda f: f.root.rename(f.root.with_name('moved')), r'root .*root is not a folder'),
        (
            lambda f: (f.root / 'val/metadata.csv').unlink(),
            r'val/metadata\.csv does not exist \(splits: train\)',
        ),
        (spoil_images, r'val/images is not a folder'),
        (outside('../p0.png'), r"val/metadata\.csv line 3: the path '\.\./p0\.png' leads outside"),
        (outside('a/../../../p0.png'), r'line 3: the path .* leads outside'),
        (outside('/etc/passwd'), r"line 3: the path '/etc/passwd' leads outside"),
        (outside('~/p0.png'), r"line 3: the path '~/p0\.png' leads outside"),
        (spoil_all, r'val/metadata\.csv line 2 has an empty filename, and no row is well formed'),
        (lambda f: f.lines.update(val=[]), r'val/metadata\.csv line 1 is followed by nothing'),
        (lambda f: setattr(f, 'encoding', 'utf-16'), r'metadata\.csv is not a CSV table in UTF-8'),
    ],
)
def test_faults_of_structure_end_at_once(folder, tmp_path, spoil, message):
    spoil(folder)
    if folder.root.exists() and (folder.root / 'val/metadata.csv').exists():
        folder.write()
    with pytest.raises(UserError, match=message) as caught:
        folder.prepare(tmp_path / 'cache', max_fault_share=1.0)
    assert '\n' not in str(caught.value) and not (tmp_path / 'cache').exists()


def test_every_row_of_an_image_outside_the_root_is_a_fault(folder, tmp_path):
    spoil_link(folder)
    folder.write()
    with pytest.raises(UserError, match=r"'train/images/p1\.png' leads outside the data root"):
        folder.prepare(tmp_path / 'cache')
    data = questions(folder.prepare(tmp_path / 'cache', max_fault_share=1.0))
    paths = {data.record(row)['image_path'] for row in range(len(data))}
    assert data.skipped == {'invalid_record': 10 - len(data)} and len(data) < 10
    assert 'train/images/p1.png' not in paths


@pytest.mark.parametrize(
    ('column', 'value', 'what'),
    [
        (1, 'two', r"has 'two' for a receipt_count, not a whole number from 0"),
        (1, '²', r"has '²' for a receipt_count, not a whole number"),
        (1, '4000', r'has a receipt_count of 4000, more than 1000'),
        (1, '2', r'counts 2 receipts in p1\.png, line 4 1'),
        (2, ' ', r'has an empty question'),
        (3, '', r'has an empty answer'),
        (4, 'first', r"has 'first' for a qa_pair_idx"),
        (4, None, r'has 4 fields, the header 5'),
    ],
)
def test_malformed_rows_are_named_and_counted(folder, tmp_path, column, value, what):
    folder.lines['train'][3][column:] = [
        *([] if value is None else [value]),
        *folder.lines['train'][3][column + 1 :],
    ]
    folder.write()
    message = rf'train/metadata\.csv line 5 {what}.*: 1 of the 10 rows of split train are faulty'
    with pytest.raises(UserError, match=message):
        folder.prepare(tmp_path / 'cache')
    prepared = folder.prepare(tmp_path / 'cache', max_fault_share=0.1)
    assert questions(prepared).skipped == {'malformed_row': 1} and len(questions(prepared)) == 9
    listed = (prepared.directory / 'skipped.jsonl').read_text().splitlines()
    assert [json.loads(line)['row'] for line in listed] == [5]


@pytest.mark.parametrize('spoil', ['missing', 'truncated', 'text', 'large'])
def test_every_row_of_an_unreadable_picture_is_a_fault(folder, tmp_path, spoil):
    path = folder.root / 'train/images/p2.png'
    reasons = {'missing': 'missing_image', 'large': 'image_too_large'}
    if spoil == 'missing':
        path.unlink()
    elif spoil == 'large':
        Image.new('RGB', (90, 80)).save(path)
    else:
        path.write_bytes(path.read_bytes()[:60] if spoil == 'truncated' else b'no picture')
    with pytest.raises(UserError, match=r'train/images/p2\.png .*\(row 6\): 1 of the 10 rows'):
        folder.prepare(tmp_path / 'cache', max_pixels=5000)
    data = questions(folder.prepare(tmp_path / 'cache', max_fault_share=0.2, max_pixels=5000))
    assert len(data) == 8 and data.skipped == {reasons.get(spoil, 'unreadable_image'): 2}


def test_prepared_rows_are_found_again_until_a_table_or_picture_changes(folder, tmp_path):
    first = folder.prepare(tmp_path / 'cache')
    assert folder.prepare(tmp_path / 'cache') == first
    os.utime(folder.root / 'train/images/p0.png', ns=(1, 1))
    second = folder.prepare(tmp_path / 'cache')
    folder.lines['val'][0][3] = 'Some.'
    folder.write()
    third = folder.prepare(tmp_path / 'cache')
    assert len({p.directory for p in (first, second, third)}) == 3
