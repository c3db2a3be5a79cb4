"""Texts in tokens: made once and found again, whatever the cache allows; questions that fit."""

import json

import numpy as np
import pytest
from PIL import Image

from mmjax.data import tokenizers
from mmjax.errors import UserError
from mmjax.recipes.receipts import data as receipts

SIZES = {'train': 3, 'val': 2, 'test': 2}


@pytest.fixture
def prepared(tmp_path):
    return receipts.prepare_receipts(
        None, tmp_path, seed=2, synthetic_sizes=SIZES, synthetic_side=16
    )


def questions(prepared, **options):
    options = {'image_size': 16, 'buckets': (8, 64), **options}
    return receipts.ReceiptQuestions(prepared, 'train', **options)


@pytest.fixture(scope='module')
def tokenizer():
    return tokenizers.train_tokenizer(['how many receipts do you see? i see one.'] * 3, 280)


def kept(prepared):
    return sorted(path.name for path in prepared.directory.glob('*tokens-*'))


def same(a, b):
    assert a.closing_id == b.closing_id and a.texts_cut == b.texts_cut
    for name in a.index:
        np.testing.assert_array_equal(a.index[name], b.index[name])
    for row in range(len(a)):
        for key, value in a.example(row, None, False).items():
            np.testing.assert_array_equal(value, b.example(row, None, False)[key])


def test_texts_are_encoded_once_a_tokenizer_and_length(prepared, tokenizer, monkeypatch):
    first = questions(prepared).with_tokenizer(tokenizer)
    assert len(kept(prepared)) == 1 and kept(prepared)[0].startswith('tokens-train-')
    with monkeypatch.context() as patch:
        patch.setattr(receipts.ReceiptQuestions, 'texts', lambda self: pytest.fail('read again'))
        again = questions(prepared).with_tokenizer(tokenizer)
    same(first, again)
    short = questions(prepared, buckets=(8,)).with_tokenizer(tokenizer)
    assert short.texts_cut > 0 == first.texts_cut and short.index['length'].max() == 8
    other = tokenizers.train_tokenizer(['how many receipts do you see? i see one.'] * 3, 300)
    assert questions(prepared).with_tokenizer(other).index['length'].max() <= 64
    assert len(kept(prepared)) == 3
    same(first, questions(prepared).with_tokenizer(tokenizer))


def test_a_cache_that_may_be_read_only_is_as_good(prepared, tokenizer, monkeypatch):
    def refuse(*arguments, **options):
        raise PermissionError(13, 'Permission denied')

    with monkeypatch.context() as patch:
        patch.setattr(np, 'savez', refuse)
        found = questions(prepared).with_tokenizer(tokenizer)
    assert kept(prepared) == []
    same(found, questions(prepared).with_tokenizer(tokenizer))


def test_a_folder_never_holds_half_of_the_tokens(prepared, tokenizer, monkeypatch):
    """A write that ends early leaves no file that is read."""
    write = np.savez

    def torn(path, **arrays):
        write(path, **arrays)
        path.write_bytes(path.read_bytes()[:50])
        raise OSError(28, 'No space left on device')

    with monkeypatch.context() as patch:
        patch.setattr(np, 'savez', torn)
        found = questions(prepared).with_tokenizer(tokenizer)
    assert not any(name.startswith('tokens-') for name in kept(prepared))
    same(found, questions(prepared).with_tokenizer(tokenizer))


def test_every_text_is_there_once(tokenizer):
    found = receipts.encode_texts(['see one', 'one', 'see one', ''], tokenizer, 3, None)
    assert found['rows'].tolist() == [0, 1, 0, 2] and found['ids'].shape == (3, 3)
    assert found['lengths'][2] == 0 < found['lengths'][1]
    assert found['ids'][2].tolist() == [tokenizer.pad_id] * 3


def test_a_question_asked_by_hand_is_whole_or_refused(prepared, tokenizer, tmp_path):
    path = tmp_path / 'mine.png'
    Image.new('RGB', (30, 30)).save(path)
    data = questions(prepared).with_tokenizer(tokenizer)
    # 'z' was in no word of training: it is a token each, after the space that opens a text.
    fits = data.with_question(path, 'z' * 63)
    assert fits.index['n_question'].tolist() == [64]
    with pytest.raises(UserError, match=r'has more than 64 tokens, the largest of data\.buckets'):
        data.with_question(path, 'z' * 64)
    for empty in ('', ' \n'):
        with pytest.raises(UserError, match='the question is empty'):
            data.with_question(path, empty)
    assert len(kept(prepared)) == 1  # of the split, not of the question


def test_a_tokenizer_that_closes_no_text_closes_with_what_it_is_told(prepared, tokenizer):
    bare = json.loads(tokenizer.__getstate__()) | {'post_processor': None}
    bare = tokenizers.Tokenizer(json.dumps(bare))
    data = questions(prepared).with_tokenizer(bare, 3)
    example = data.example(0, None, False)
    assert data.closing_id == 3 and example['answer'][example['answer_mask']][-1] == 3
    assert questions(prepared).with_tokenizer(bare).closing_id == bare.pad_id
    with pytest.raises(UserError, match='cannot: it is the text'):
        questions(prepared).with_tokenizer(bare, 50)
