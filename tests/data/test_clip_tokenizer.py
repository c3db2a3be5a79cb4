"""CLIP's tokenizer: published ids, files of three kinds, training, and texts that must fit."""

import collections
import gzip
import itertools
import json
import os
import pathlib
import random
import re
import subprocess
import sys

import numpy as np
import pytest

from mmjax.data import clip_tokenizer as clip
from mmjax.errors import UserError

PAIRS = ['a t</w>', 'c at</w>', 't h', 'th e</w>', "' s</w>", 'd o', 'do g</w>', 'Ã ©</w>', 'a t']
SIZE = 514 + len(PAIRS)
TEXTS = ['The cat sat on the mat.', "the dog's cat, that cat!", 'A thatched hat: 12 cats'] * 3
TRAIN = (
    'from mmjax.data.clip_tokenizer import train_clip_tokenizer as t; import sys; '
    'print(t(sys.argv[1].split(), 900).__getstate__())'
)
ASCII = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[a-z]+|[0-9]|[^\sa-z0-9]+")


def reference_merge(word, ranks):
    """Merges the pair of lowest rank, everywhere, until none is left: BPE as first published."""
    symbols = [*word[:-1], word[-1] + '</w>']
    while True:
        pairs = [pair for pair in itertools.pairwise(symbols) if pair in ranks]
        if not pairs:
            return symbols
        first, second = min(pairs, key=ranks.__getitem__)
        merged = []
        while symbols:
            if symbols[:2] == [first, second]:
                merged.append(first + second)
                del symbols[:2]
            else:
                merged.append(symbols.pop(0))
        symbols = merged


def reference_ids(text, merges):
    """Ids of an ASCII text: '!' is 0, bytes follow, then those that end a word, then merges."""
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    number = {chr(code): code - 33 for code in range(33, 127)}
    number |= {f'{symbol}</w>': 256 + index for symbol, index in number.items()}
    number |= {''.join(pair): 512 + rank for pair, rank in ranks.items()}
    words = (reference_merge(word, ranks) for word in ASCII.findall(text.lower()))
    ids = [number[symbol] for word in words for symbol in word]
    return [512 + len(merges), *ids, 513 + len(merges)]


def ids_of(tokenizer, text):
    ids, mask = tokenizer.encode([text], 400)
    return ids[0][mask[0]].tolist()


@pytest.fixture(scope='module')
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp('bpe') / clip.MERGES[1]
    path.write_text('\n'.join(['"x.txt#version: 0.2', *PAIRS, 'q q', '']), encoding='utf-8')
    return path


@pytest.fixture(scope='module')
def tokenizer(file):
    return clip.clip_tokenizer(file, SIZE)


@pytest.fixture(scope='module')
def trained():
    return clip.train_clip_tokenizer(TEXTS, 530)


def random_texts():
    rng = random.Random(3)
    letters = "catdoghe's.,!19 \n\t^"
    return [''.join(rng.choices(letters, k=rng.randint(1, 60))) + 'x' for _ in range(200)]


def test_ids_follow_the_merges_as_published(tokenizer):
    merges = [tuple(pair.split()) for pair in PAIRS]
    for text in [*TEXTS, *random_texts()]:
        assert ids_of(tokenizer, text) == reference_ids(text, merges), text


def test_bytes_have_the_published_ids_and_special_tokens_the_last(tokenizer):
    start, end = SIZE - 2, SIZE - 1
    assert ids_of(tokenizer, 'a') == [start, 320, end]  # 320 and 256 in every CLIP
    assert ids_of(tokenizer, '!') == [start, 256, end]
    hidden = [b for b in range(256) if not (33 <= b < 127 or 161 <= b < 173 or b >= 174)]
    assert ids_of(tokenizer, '\x7f') == [start, 256 + 188 + hidden.index(127), end]
    assert tokenizer.size == SIZE and tokenizer.pad_id == end


def test_texts_are_lower_case_composed_and_free_of_extra_space(tokenizer):
    assert ids_of(tokenizer, ' The\n\tCAT ') == ids_of(tokenizer, 'the cat')
    composed = ids_of(tokenizer, 'é')
    assert composed == ids_of(tokenizer, 'e\u0301') == ids_of(tokenizer, 'É')
    assert composed[1:-1] == [512 + PAIRS.index('Ã ©</w>')]
    assert len(ids_of(tokenizer, '12')) == 4  # a digit is a word
    assert ids_of(tokenizer, "dog's")[1:-1] == [512 + PAIRS.index(p) for p in (PAIRS[6], PAIRS[4])]


def test_it_decodes_pads_and_cuts_like_the_others(tokenizer):
    text = 'the é 日本 cat ! 😀'
    assert tokenizer.decode(ids_of(tokenizer, text)) == text
    ids, mask = tokenizer.encode(['the cat', ''], 6)
    assert (ids[~mask] == SIZE - 1).all() and mask.sum() == 4
    ids, mask = tokenizer.encode(['the cat'], 3)
    assert mask.all() and ids[0, [0, 2]].tolist() == [SIZE - 2, SIZE - 1]


def test_packed_files_read_the_same_and_faults_are_named(tmp_path, file, tokenizer, monkeypatch):
    content = file.read_bytes()
    path = tmp_path / 'merges'
    path.write_bytes(gzip.compress(content))
    assert clip.clip_tokenizer(path, SIZE).__getstate__() == tokenizer.__getstate__()
    for written, message in (
        (None, 'merges cannot be read'),
        (gzip.compress(content)[:-9], 'merges cannot be read'),
        (gzip.compress(content)[:10] + b'\xff' * 90, 'merges cannot be read'),
        (b'#version\na t</w>\na b c\n', 'merges line 3 holds 3 symbols'),
        (b'#version\na t</w>\n\n', 'merges line 3 holds 0 symbols'),
        (b'a t</w>\nat h\n', "merges line 2: no line before it makes 'at'"),
        (b'a t\nb at\nb a\nba t\n', "merges line 4: 'bat' is made twice"),
        (b'a t\nb at\n', 'merges has 2 merges, not the 9 expected'),
        (b'a t\nb \xff\n', 'merges line 2: not UTF-8'),
        (b'\x1f\x8b\x08\x00garbage', 'merges cannot be read'),
    ):
        path.unlink(missing_ok=True)
        if written is not None:
            path.write_bytes(written)
        with pytest.raises(UserError, match=re.escape(message)):
            clip.clip_tokenizer(path, SIZE)
    monkeypatch.setattr(clip, 'MAX_BYTES', 5000)
    path.write_bytes(gzip.compress(b'#' * 100_000))
    with pytest.raises(UserError, match='more than 5,000 bytes'):
        clip.clip_tokenizer(path, SIZE)


def test_a_folder_of_each_form_loads(tmp_path, file, tokenizer, monkeypatch):
    with pytest.raises(UserError, match=r'holds no tokenizer\.json, no vocab\.json'):
        clip.load_clip_tokenizer(tmp_path)
    monkeypatch.setattr(clip.clip_tokenizer, '__defaults__', (SIZE,))
    packed = tmp_path / clip.MERGES[0]
    packed.write_bytes(gzip.compress(file.read_bytes()))
    assert clip.load_clip_tokenizer(tmp_path).__getstate__() == tokenizer.__getstate__()

    model = json.loads(tokenizer.__getstate__())['model']
    # In a Hugging Face folder the numbers stand in their own file; the order is theirs.
    ids = {token: SIZE - 1 - index for token, index in model['vocab'].items()}
    (tmp_path / 'vocab.json').write_text(json.dumps(ids))
    (tmp_path / 'merges.txt').write_text('\n'.join(['#version: 0.2', *PAIRS]), encoding='utf-8')
    other = clip.load_clip_tokenizer(tmp_path)
    assert ids_of(other, TEXTS[1]) == [SIZE - 1 - index for index in ids_of(tokenizer, TEXTS[1])]

    tokenizer.save(tmp_path)
    assert ids_of(clip.load_clip_tokenizer(tmp_path), TEXTS[1]) == ids_of(tokenizer, TEXTS[1])


def test_folders_of_other_tokenizers_are_refused(tmp_path, tokenizer):
    vocabulary, merges = tmp_path / 'vocab.json', tmp_path / 'merges.txt'
    ids = json.loads(tokenizer.__getstate__())['model']['vocab']
    merges.write_text('#version: 0.2\nx y\n', encoding='utf-8')
    for content, message in (
        ('{', 'vocab.json is not JSON'),
        ('{"a": 1}', 'does not number its tokens from 0'),
        (json.dumps(ids | {'a': 'b'}), 'does not number its tokens from 0'),
        (json.dumps({'a': 0}), "has no token '!'"),
        (json.dumps(ids), r"merges.txt line 2: .*vocab.json has no 'xy'"),
    ):
        vocabulary.write_text(content)
        with pytest.raises(UserError, match=message):
            clip.load_clip_tokenizer(tmp_path)
    from mmjax.data.tokenizers import train_tokenizer

    train_tokenizer(TEXTS, 300).save(tmp_path)
    with pytest.raises(UserError, match=r'does not end and pad texts with <\|endoftext\|>'):
        clip.load_clip_tokenizer(tmp_path)


def test_training_gives_the_same_json_in_every_process():
    rng = random.Random(0)  # short words of few letters, for many ties
    words = [''.join(rng.choices('abcdefgh', k=rng.randint(1, 6))) for _ in range(400)]
    trained = clip.train_clip_tokenizer(words, 900)
    repository = pathlib.Path(clip.__file__).parents[2]
    for seed in ('1', '2'):
        printed = subprocess.run(
            [sys.executable, '-c', TRAIN, ' '.join(words)],
            cwd=repository,
            env={**os.environ, 'PYTHONHASHSEED': seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        assert printed == trained.__getstate__()


def test_a_vocabulary_without_room_for_the_bytes_is_refused():
    with pytest.raises(ValueError, match='a vocabulary of 513 is under 512 bytes'):
        clip.train_clip_tokenizer(['a'], 513)


def test_every_merge_trained_was_the_most_frequent_pair(trained):
    words = [word for text in TEXTS for word in ASCII.findall(text.lower())]
    merges = [tuple(m) for m in json.loads(trained.__getstate__())['model']['merges']]
    assert len(merges) == 530 - 514
    for index, merge in enumerate(merges):
        ranks = {pair: rank for rank, pair in enumerate(merges[:index])}
        counts = collections.Counter()
        for word in words:
            symbols = reference_merge(word, ranks)
            counts.update(itertools.pairwise(symbols))
        assert counts[merge] == max(counts.values()), (index, merge)


def test_a_trained_tokenizer_is_of_the_same_make(trained, tmp_path):
    merges = [tuple(m) for m in json.loads(trained.__getstate__())['model']['merges']]
    for text in [*TEXTS, *random_texts()]:
        assert ids_of(trained, text) == reference_ids(text, merges), text
    assert trained.size == 514 + len(merges) and trained.pad_id == trained.size - 1
    trained.save(tmp_path)
    again = clip.load_clip_tokenizer(tmp_path)
    np.testing.assert_array_equal(again.encode(TEXTS, 77)[0], trained.encode(TEXTS, 77)[0])
    assert len(ids_of(trained, 'that cat')) < len('that cat')
    assert clip.train_clip_tokenizer([], 514).size == 514


def test_tokens_are_counted_whole_and_leave_no_trace(trained):
    tokenizer = clip.train_clip_tokenizer(TEXTS, 530)
    count = clip.token_counter(tokenizer)
    for text in ['the cat', 'cat', 'é' * 500, '\U0001d160' * 300, '\u0958' * 50, '!', "'s" * 90]:
        assert count(text) == len(trained._model.encode(text).ids)
    assert count('') == count(' \n') == 0
    assert tokenizer.truncated == 0


def test_published_ids(tmp_path):
    folder = os.environ.get('MMJAX_CLIP_BPE', '')
    if not folder:
        pytest.skip('MMJAX_CLIP_BPE names no folder with the published vocabulary')
    tokenizer = clip.load_clip_tokenizer(folder)
    assert tokenizer.size == 49408 and tokenizer.pad_id == 49407
    for text, ids in {
        'a photo of a cat': [320, 1125, 539, 320, 2368],
        'a diagram': [320, 22697],
        'Hello  World!': [3306, 1002, 256],
        'a dog': [320, 1929],
    }.items():
        assert ids_of(tokenizer, text) == [49406, *ids, 49407]
