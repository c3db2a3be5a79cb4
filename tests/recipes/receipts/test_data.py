"""Receipts with questions: what an example holds, and built-in rows as they were drawn."""

import os
import pickle

import numpy as np
import pytest
from PIL import Image

from mmjax.data import images, tokenizers
from mmjax.data import prepare as builders
from mmjax.errors import UserError
from mmjax.recipes.receipts import data as receipts
from mmjax.recipes.receipts.synthetic import pictures as receipts_synthetic
from tests.recipes.receipts.test_folder import Folder

SIZES = {'train': 3, 'val': 2, 'test': 2}
RNG = np.random.default_rng(0)


@pytest.fixture(scope='module')
def tokenizer():
    return tokenizers.train_tokenizer(['how many receipts are there? it is 0 1 2 3 4 5.'] * 3, 290)


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
    place = tmp_path_factory.mktemp('receipts')
    return Folder(place / 'root', {'train': 5, 'val': 2}).prepare(place / 'cache')


@pytest.fixture(scope='module')
def built_in(tmp_path_factory):
    cache = tmp_path_factory.mktemp('built_in')
    return receipts.prepare_receipts(None, cache, seed=2, synthetic_sizes=SIZES, synthetic_side=64)


def questions(prepared, split='train', **options):
    options = {'image_size': 24, 'buckets': (8, 32), **options}
    return receipts.ReceiptQuestions(prepared, split, **options)


def test_an_example_holds_picture_question_answer_and_class(prepared, tokenizer):
    data = questions(prepared)
    with pytest.raises(ValueError, match='has no tokenizer yet'):
        data.example(0, RNG, False)
    data = data.with_tokenizer(tokenizer)
    separator = tokenizer.encode(['a'], 8)[0][0][tokenizer.encode(['a'], 8)[1][0]][-1]
    assert data.closing_id == separator and data.texts_cut == 0
    for row in range(len(data)):
        example, record = data.example(row, RNG, train=False), data.record(row)
        shapes = {key: (value.shape, value.dtype.name) for key, value in example.items()}
        assert shapes == {
            'images': ((24, 24, 3), 'uint8'),
            'label': ((), 'int32'),
            'question': ((32,), 'int32'),
            'question_mask': ((32,), 'bool'),
            'answer': ((32,), 'int32'),
            'answer_mask': ((32,), 'bool'),
        }
        for key in ('question', 'answer'):
            tokens = example[key][example[f'{key}_mask']]
            assert tokenizer.decode(tokens).strip() == record[key].lower()
            assert len(tokens) == data.index[f'n_{key}'][row]
            assert (example[key][len(tokens) :] == tokenizer.pad_id).all()
            assert (np.diff(example[f'{key}_mask'].astype(int)) <= 0).all()
        assert tokens[-1] == data.closing_id and data.closing_id not in tokens[:-1]
        assert data.closing_id not in example['question']
        assert example['label'] == min(record['count'], 2)
    longest = np.maximum(data.index['n_question'], data.index['n_answer'])
    assert data.index['length'].tolist() == longest.tolist()


@pytest.mark.parametrize(('classes', 'labels'), [(2, [0, 1, 1, 1]), (4, [0, 1, 2, 3])])
def test_classes_group_the_counts(prepared, classes, labels):
    assert questions(prepared, classes=classes).index['label'][0:8:2].tolist() == labels
    for buckets in ((), (1, 8)):
        with pytest.raises(UserError, match=r'data\.buckets is .*: lengths from 2 are needed'):
            questions(prepared, buckets=buckets)
    with pytest.raises(UserError, match="no split 'test'"):
        questions(prepared, 'test')


def test_a_batch_is_cut_to_its_bucket_and_nothing_is_lost(prepared, tokenizer):
    data = questions(prepared, buckets=(32, 24)).with_tokenizer(tokenizer)
    assert data.lengths == (24, 32) and data.length_key == 'length'
    examples = [data.example(row, RNG, False) for row in range(4)]
    whole, cut = data.collate(examples, 0), data.collate(examples, 24)
    assert whole['answer'].shape == (4, 32) and cut['answer'].shape == (4, 24)
    for key in ('question', 'answer'):
        np.testing.assert_array_equal(whole[key][:, :24], cut[key])
        assert whole[f'{key}_mask'].sum() == cut[f'{key}_mask'].sum() > 0
    assert cut['images'].shape == (4, 24, 24, 3) and cut['label'].tolist() == [0, 0, 1, 1]
    with pytest.raises(UserError, match='a question of split train is longer than the bucket 3'):
        data.collate(examples, 3)


def test_texts_too_long_keep_their_beginning_and_the_closing_token(prepared, tokenizer):
    whole = questions(prepared).with_tokenizer(tokenizer)
    longest = int(whole.index['n_answer'].max())
    short = questions(prepared, buckets=(longest - 1,)).with_tokenizer(tokenizer)
    fits = (whole.index['length'] <= longest - 1).sum()
    assert short.texts_cut == len(short) - fits > 0 == whole.texts_cut
    row = int(whole.index['n_answer'].argmax())
    a, b = (data.example(row, RNG, False)['answer'] for data in (whole, short))
    np.testing.assert_array_equal(b[:-1], a[: longest - 2])
    assert b[-1] == whole.closing_id
    assert short.index['n_answer'][row] == longest - 1


def test_the_whole_picture_is_shown_in_proportion(tmp_path):
    grid = np.zeros((40, 80, 3), np.uint8)
    grid[:, :40], grid[:, 40:] = (250, 0, 0), (0, 0, 250)
    square = np.asarray(receipts.whole_square(Image.fromarray(grid), 20), int)
    assert (square[:5] == 127).all() and (square[15:] == 127).all()
    assert (abs(square[5:15, :9] - (250, 0, 0)) < 6).all()
    assert (abs(square[5:15, 11:] - (0, 0, 250)) < 6).all()
    tall = np.asarray(receipts.whole_square(Image.fromarray(grid.transpose(1, 0, 2)), 20), int)
    np.testing.assert_array_equal(tall, square.transpose(1, 0, 2))
    assert receipts.whole_square(Image.new('RGB', (900, 1)), 20).size == (20, 20)


def test_in_training_it_varies_with_the_rng_alone_and_is_pickled(built_in, tokenizer):
    options = {'image_size': 48, 'augmentation': images.Augmentation()}
    data = questions(built_in, **options).with_tokenizer(tokenizer)
    one, two, three, plain = (
        data.example(4, np.random.default_rng(seed), train)['images']
        for seed, train in ((1, True), (2, True), (1, True), (1, False))
    )
    np.testing.assert_array_equal(one, three)
    assert (one != two).any() and (one != plain).any()
    again = pickle.loads(pickle.dumps(data))
    for key, value in data.example(4, np.random.default_rng(1), True).items():
        np.testing.assert_array_equal(again.example(4, np.random.default_rng(1), True)[key], value)
    assert again.fingerprint() == data.fingerprint() and len(pickle.dumps(data)) < 100_000


def test_built_in_rows_share_the_picture_that_was_drawn(built_in, tokenizer):
    for split, size in SIZES.items():
        data = questions(built_in, split, image_size=64).with_tokenizer(tokenizer)
        assert data.index['picture'].tolist() == np.repeat(np.arange(size), 3).tolist()
        for row in range(len(data)):
            number, record = row // 3, data.record(row)
            asked = receipts_synthetic.questions(2, split, number)[row % 3]
            assert all(record[key] == asked[key] for key in ('question', 'answer'))
            shown = receipts_synthetic.receipts(receipts_synthetic.scene(2, split, number))
            assert data.index['count'][row] == len(shown)
            file = receipts_synthetic.picture(2, split, number, side=64)
            assert record['image'] == (b'' if row % 3 else file)
            drawn = np.asarray(images.open_image(file))
            np.testing.assert_array_equal(data.example(row, RNG, False)['images'], drawn)
            np.testing.assert_array_equal(np.asarray(data.image(row)), drawn)


def test_built_in_pictures_are_found_again_by_seed_size_side_and_code(built_in, monkeypatch):
    cache = built_in.directory.parent
    options = {'seed': 2, 'synthetic_sizes': SIZES, 'synthetic_side': 64}
    assert receipts.prepare_receipts(None, cache, **options) == built_in
    for change in ({'seed': 3}, {'synthetic_sizes': SIZES | {'val': 1}}, {'synthetic_side': 80}):
        receipts.prepare_receipts(None, cache, **(options | change))
    monkeypatch.setattr(builders, 'source_digest', lambda *patterns: 'other code')
    receipts.prepare_receipts(None, cache, **options)
    assert len(os.listdir(cache)) == 5
    with pytest.raises(UserError, match=r'data\.built_in\.train is missing'):
        receipts.prepare_receipts(None, cache)


def test_any_picture_can_be_asked_a_question(prepared, tokenizer, tmp_path):
    Image.new('RGB', (30, 30), (9, 99, 199)).save(tmp_path / 'mine.png')
    data = questions(prepared).with_tokenizer(tokenizer)
    asked = data.with_question(tmp_path / 'mine.png', 'how many?')
    example = asked.example(0, RNG, False)
    assert len(asked) == 1 and tuple(example['images'][3, 3]) == (9, 99, 199)
    assert tokenizer.decode(example['question'][example['question_mask']]).strip() == 'how many?'
    assert example['answer'][example['answer_mask']].tolist() == [data.closing_id]
    assert set(asked.index) == set(data.index) and len(data) == 10
    with pytest.raises(UserError, match=r'none\.png does not exist'):
        data.with_question(tmp_path / 'none.png', 'how many?')
