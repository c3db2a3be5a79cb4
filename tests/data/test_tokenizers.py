"""Tokenizers: deterministic training, fixed-length output, counted truncation."""

import json
import os
import pathlib
import pickle
import subprocess
import sys

import numpy as np
import pytest

from mmjax.data import clip_tokenizer, tokenizers
from mmjax.errors import UserError

TEXTS = [
    'Cheer up, Mimi... feelings are not facts!',
    "It's a fact that I'm sad!",
    'The fox runs. The fox jumps over the red wall.',
    'A bear and a fox eat honey on the hill.',
] * 3
TRAIN = (
    'from mmjax.data import tokenizers as t; import sys; '
    'print(t.train_tokenizer(eval(sys.argv[1]), 330).__getstate__())'
)


@pytest.fixture(scope='module')
def tokenizer():
    return tokenizers.train_tokenizer(TEXTS, 330)


def test_training_gives_the_same_json_in_every_process(tokenizer):
    repository = pathlib.Path(tokenizers.__file__).parents[2]
    for seed in ('1', '2'):
        printed = subprocess.run(
            [sys.executable, '-c', TRAIN, repr(TEXTS)],
            cwd=repository,
            env={**os.environ, 'PYTHONHASHSEED': seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        assert printed == tokenizer.__getstate__()


def test_special_tokens_come_first(tokenizer):
    ids, mask = tokenizer.encode(['fox'], 8)
    assert tokenizer.pad_id == 0
    assert ids[0, 0] == tokenizers.SPECIAL.index('[CLS]')
    assert ids[0, mask[0].sum() - 1] == tokenizers.SPECIAL.index('[SEP]')
    assert tokenizer.size <= 330


def test_encoding_pads_masks_and_leaves_empty_texts_empty(tokenizer):
    ids, mask = tokenizer.encode(['the fox', '', '  \n', 'a bear'], 16)
    assert ids.shape == mask.shape == (4, 16)
    assert ids.dtype == np.int32 and mask.dtype == bool
    assert not mask[1].any() and not mask[2].any() and not ids[1].any()
    assert (ids[~mask] == 0).all() and (ids[mask] != 0).all()
    for row in (0, 3):  # a prefix of tokens, then padding
        assert (np.diff(mask[row].astype(int)) <= 0).all()
    assert tokenizer.truncated == 0


def test_truncation_keeps_the_closing_token_and_is_counted():
    tokenizer = tokenizers.train_tokenizer(TEXTS, 330)
    whole, _ = tokenizer.encode([TEXTS[0]], 64)
    ids, mask = tokenizer.encode([TEXTS[0], 'a'], 6)
    assert tokenizer.truncated == 1
    assert mask[0].all()
    np.testing.assert_array_equal(ids[0, :5], whole[0, :5])
    assert ids[0, 5] == tokenizers.SPECIAL.index('[SEP]')


def test_any_text_survives_in_lower_case(tokenizer):
    text = 'Ça va, 日本! ☃ Fox'
    ids, mask = tokenizer.encode([text], 64)
    assert tokenizer.decode(ids[0][mask[0]]).strip() == text.lower()
    assert tokenizers.SPECIAL.index('[UNK]') not in ids[0]
    upper, lower = tokenizer.encode(['FOX', 'fox'], 8)[0]
    np.testing.assert_array_equal(upper, lower)
    cased = tokenizers.train_tokenizer(TEXTS, 330, lower_case=False)
    assert (cased.encode(['The'], 8)[0] != cased.encode(['the'], 8)[0]).any()


def test_saved_loaded_and_pickled_it_encodes_the_same(tokenizer, tmp_path):
    expected, _ = tokenizer.encode(TEXTS[:4], 32)
    path = tokenizer.save(tmp_path / 'new')
    assert path.name == 'tokenizer.json'
    for other in (
        tokenizers.load_tokenizer(tmp_path / 'new'),
        pickle.loads(pickle.dumps(tokenizer)),
    ):
        np.testing.assert_array_equal(other.encode(TEXTS[:4], 32)[0], expected)
        assert other.pad_id == tokenizer.pad_id and other.size == tokenizer.size


def test_a_tokenizer_of_another_library_file_loads(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {'<s>': 0, '<pad>': 1, 'fox': 2, 'bear': 3, '<unk>': 4}
    model = Tokenizer(models.WordLevel(vocabulary, unk_token='<unk>'))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    model.add_special_tokens(['<s>', '<pad>', '<unk>'])
    model.enable_padding(pad_id=1, pad_token='<pad>', length=50)
    model.enable_truncation(1)
    model.save(str(tmp_path / 'tokenizer.json'))
    ids, mask = tokenizers.load_tokenizer(tmp_path).encode(['fox bear fox', 'bear'], 4)
    np.testing.assert_array_equal(ids, [[2, 3, 2, 1], [3, 1, 1, 1]])
    np.testing.assert_array_equal(mask, ids != 1)


def test_roberta_s_pair_of_files_gives_what_its_library_gives(tmp_path):
    from tokenizers import ByteLevelBPETokenizer

    special = ['<s>', '<pad>', '</s>', '<unk>', '<mask>']
    theirs = ByteLevelBPETokenizer()
    theirs.train_from_iterator(TEXTS, vocab_size=330, special_tokens=special, show_progress=False)
    theirs.save_model(str(tmp_path))
    ours = tokenizers.load_tokenizer(tmp_path)
    assert ours.size == theirs.get_vocab_size() and ours.pad_id == 1
    texts = [*TEXTS[:4], 'for (i = 0; i < n; i++) größer', 'over <mask> here']
    ids, mask = ours.encode(texts, 64)
    for text, row, seen in zip(texts[:-1], ids, mask, strict=False):
        assert row[seen].tolist() == [0, *theirs.encode(text).ids, 2]
        assert ours.decode(row[seen]) == text
    around = [theirs.encode(text).ids for text in ('over', ' here')]  # no blank before the mask
    assert ids[-1][mask[-1]].tolist() == [0, *around[0], special.index('<mask>'), *around[1], 2]
    ours.save(tmp_path / 'own')
    np.testing.assert_array_equal(
        tokenizers.load_tokenizer(tmp_path / 'own').encode(texts, 64)[0], ids
    )
    (tmp_path / 'merges.txt').write_text('one\n')
    with pytest.raises(UserError, match=r'merges\.txt are no tokenizer'):
        tokenizers.load_tokenizer(tmp_path)
    (tmp_path / 'merges.txt').unlink()
    with pytest.raises(UserError, match=r'merges\.txt does not exist'):
        tokenizers.load_tokenizer(tmp_path)
    (tmp_path / 'merges.txt').write_text('#version: 0.2\n')
    (tmp_path / 'vocab.json').write_text(json.dumps({'</s>': 0, '<pad>': 1, '<s>': 2, '<unk>': 3}))
    with pytest.raises(UserError, match=r"vocab\.json is not RoBERTa's"):
        tokenizers.load_tokenizer(tmp_path)


def test_faults_are_named(tmp_path):
    with pytest.raises(UserError, match=r'tokenizer\.json does not exist'):
        tokenizers.load_tokenizer(tmp_path)
    (tmp_path / 'tokenizer.json').write_text('{"version"')
    with pytest.raises(UserError, match=r'tokenizer\.json is not a tokenizer'):
        tokenizers.load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match='a vocabulary of 259 is under 4 special'):
        tokenizers.train_tokenizer(['a'], 259)


def bert(tmp_path):
    """A WordPiece tokenizer in the library's own file, its special tokens in another order."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    names = ['[SEP]', 'fox', '[CLS]', '[MASK]', '[PAD]', '[UNK]', 'a']
    vocabulary = {name: number for number, name in enumerate(names)}
    model = Tokenizer(models.WordPiece(vocabulary, unk_token='[UNK]'))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    model.post_processor = processors.BertProcessing(('[SEP]', 0), ('[CLS]', 2))
    model.add_special_tokens(['[SEP]', '[CLS]', '[MASK]', '[PAD]', '[UNK]'])
    model.save(str(tmp_path / 'tokenizer.json'))
    return tokenizers.load_tokenizer(tmp_path)


def plain(tmp_path):
    """A tokenizer that puts nothing around a text and knows no other special token."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    model = Tokenizer(models.WordLevel({'fox': 0, '<unk>': 1}, unk_token='<unk>'))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    model.save(str(tmp_path / 'tokenizer.json'))
    return tokenizers.load_tokenizer(tmp_path)


def roberta(tmp_path):
    from tokenizers import ByteLevelBPETokenizer

    special = ['<s>', '<pad>', '</s>', '<unk>', '<mask>']
    theirs = ByteLevelBPETokenizer()
    theirs.train_from_iterator(TEXTS, vocab_size=330, special_tokens=special, show_progress=False)
    theirs.save_model(str(tmp_path))
    return tokenizers.load_tokenizer(tmp_path)


def clip(tmp_path):
    return clip_tokenizer.train_clip_tokenizer(TEXTS, 530)


def trained(tmp_path):
    return tokenizers.train_tokenizer(TEXTS, 330)


@pytest.mark.parametrize(
    ('make', 'begin', 'end', 'pad', 'unknown', 'mask'),
    [
        (trained, 2, 3, 0, 1, None),
        (bert, 2, 0, 4, 5, 3),
        (roberta, 0, 2, 1, 3, 4),
        (plain, None, None, 0, 1, None),
        (clip, -2, -1, -1, None, None),
    ],
)
def test_special_tokens_have_public_ids(tmp_path, make, begin, end, pad, unknown, mask):
    made = make(tmp_path)
    number = lambda place: place % made.size if place is not None else None
    assert (made.begin_id, made.end_id) == (number(begin), number(end))
    assert (made.pad_id, made.unknown_id, made.mask_id) == (number(pad), unknown, mask)
    again = pickle.loads(pickle.dumps(made))
    for name in ('begin_id', 'end_id', 'pad_id', 'unknown_id', 'mask_id'):
        assert getattr(again, name) == getattr(made, name)
    ids, seen = made.encode(['fox'], 12)
    inner, seen_inner = made.encode(['fox'], 12, special=False)
    around = [token for token in (made.begin_id, made.end_id) if token is not None]
    whole = ids[seen].tolist()
    assert whole == [*around[:1], *inner[seen_inner].tolist(), *around[1:]]
    assert not {*around} & {*inner[seen_inner].tolist()}


def test_a_text_cut_without_special_tokens_keeps_only_its_beginning(tokenizer):
    whole, mask = tokenizer.encode([TEXTS[0]], 64, special=False)
    cut, cut_mask = tokenizer.encode([TEXTS[0]], 6, special=False)
    assert cut_mask.all() and mask.sum() > 6
    np.testing.assert_array_equal(cut[0], whole[0, :6])
