"""Builds or trains CLIP's tokenizer, and shortens texts to the tokens that its models read.

Byte-level BPE (Radford et al., arXiv:2103.00020; Sennrich et al., arXiv:1508.07909) over lower-case
text. A symbol stands for a byte; one that ends a word carries `</w>`. Ids are, in this order: 256
bytes, 256 bytes that end a word, the merges, <|startoftext|>, <|endoftext|>. Texts are padded with
<|endoftext|>: a text's vector stands at the first one. Free of jax.
"""

import gzip
import json
import os
import pathlib
import re
import zlib
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from mmjax.data import tokenizers
from mmjax.data.tokenizers import Tokenizer
from mmjax.errors import UserError

if TYPE_CHECKING:
    from tokenizers import normalizers, pre_tokenizers

CUTS = ('kept', 'front', 'end', 'words', 'unfit')
START, END = '<|startoftext|>', '<|endoftext|>'
VOCABULARY = 49_408  # ids of the published models
MERGES = ('bpe_simple_vocab_16e6.txt.gz', 'bpe_simple_vocab_16e6.txt')
MAX_BYTES = 50_000_000  # unpacked; the published file has 3.2 million
_SUFFIX = '</w>'
_FIXED = 2 * 256 + 2  # ids that are not merges
# Words: clitics, runs of letters, single digits, runs of anything else but white space.
_WORDS = r"'(?:s|t|re|ve|m|ll|d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
# Ends of sentences; possessive, so that a text of only full stops takes linear time.
_END = re.compile(
    r'(?<![.!?…।])(?!(?:\.\.++|…++)["\'”’»)\]]*+\s++[a-zß-ÿа-я])[.!?…।]++["\'”’»)\]]*+(?:\s++|$)'
    r'|[。！？｡]++["\'”’»)\]」』）】]*+\s*+|[\n\r\u2028\u2029]\s*+'
)
_PLAIN, _FINAL = 0xE000, 0xE100  # private characters that spell bytes while training


def clip_tokenizer(merges_file: str | os.PathLike, vocabulary: int = VOCABULARY) -> Tokenizer:
    """Builds the tokenizer from the published list of merges, `bpe_simple_vocab_16e6.txt[.gz]`.

    Ids are those of OpenAI's and Hugging Face's tokenizers: 'a photo of a cat' is 49406, 320, 1125,
    539, 320, 2368, 49407. OpenAI's mends mojibake and HTML entities first (ftfy); this one, as
    Hugging Face's, normalises by NFC only. Special tokens spelt out in a text are special.

    Args:
      merges_file: a header, then two symbols per line, the most frequent pair first; gzip or text.
      vocabulary: number of ids; the first `vocabulary` - 514 merges count, later ones are not read.

    Raises:
      UserError: the file is missing, malformed, larger than MAX_BYTES, or has too few merges.
    """
    path = pathlib.Path(merges_file)
    count = vocabulary - _FIXED
    symbols = set(_symbols())
    merges = []
    for line, merge in _read_merges(path, count):
        for symbol in merge:
            if symbol not in symbols:
                raise UserError(f'{path} line {line}: no line before it makes {symbol!r}')
        new = ''.join(merge)
        if new in symbols:
            raise UserError(f'{path} line {line}: {new!r} is made twice')
        symbols.add(new)
        merges.append(merge)
    if len(merges) < count:
        raise UserError(f'{path} has {len(merges)} merges, not the {count} expected')
    return _numbered(merges)


def load_clip_tokenizer(folder: str | os.PathLike) -> Tokenizer:
    """Loads CLIP's tokenizer from a folder, from the first of these files that it holds.

    `tokenizer.json` (written by mmjax or Hugging Face); `vocab.json` with `merges.txt` (Hugging
    Face); `bpe_simple_vocab_16e6.txt.gz` or `.txt` (OpenAI).

    Raises:
      UserError: the folder holds none of them, or one that is malformed or not CLIP's.
    """
    folder = pathlib.Path(folder)
    if (folder / tokenizers.FILE).exists():
        tokenizer = tokenizers.load_tokenizer(folder)
        ids, mask = tokenizer.encode(['a'], 16)
        if ids[0, mask[0].sum() - 1] != tokenizer.pad_id:
            raise UserError(f'{folder / tokenizers.FILE} does not end and pad texts with {END}')
        return tokenizer
    if (folder / 'vocab.json').exists():
        return _from_vocabulary(folder / 'vocab.json', folder / 'merges.txt')
    for name in MERGES:
        if (folder / name).exists():
            return clip_tokenizer(folder / name)
    raise UserError(f'{folder} holds no {tokenizers.FILE}, no vocab.json and no {MERGES[0]}')


def train_clip_tokenizer(texts: Iterable[str], vocabulary: int = 2000) -> Tokenizer:
    """Trains a tokenizer like CLIP's: the same texts give the same JSON in every process.

    Args:
      texts: read once, in order.
      vocabulary: largest number of ids, of which 512 are bytes and the last 2 special.

    Raises:
      ValueError: a vocabulary too small for the bytes and the special tokens.
    """
    from tokenizers import Tokenizer as Model
    from tokenizers import models, pre_tokenizers, trainers

    if vocabulary < _FIXED:
        raise ValueError(f'a vocabulary of {vocabulary} is under 512 bytes + 2 special')
    count = vocabulary - _FIXED
    normalizer, splitter = _text_steps()
    values = {symbol: value for value, symbol in _bytes().items()}

    # The library numbers symbols with a suffix in an order that differs from process to process,
    # and ties between merges follow the numbers. Written as one character each, they are sorted.
    def spelled(word: str) -> str:
        *plain, final = (values[symbol] for symbol in word)
        return ''.join(chr(_PLAIN + value) for value in plain) + chr(_FINAL + final)

    def lines() -> Iterator[str]:
        for text in texts:
            words = splitter.pre_tokenize_str(normalizer.normalize_str(text))
            yield ' '.join(spelled(word) for word, _ in words)

    spelling = {chr(_PLAIN + value): symbol for value, symbol in _bytes().items()}
    spelling |= {chr(_FINAL + value): symbol + _SUFFIX for value, symbol in _bytes().items()}
    model = Model(models.BPE())
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(
        vocab_size=len(spelling) + count, initial_alphabet=sorted(spelling), show_progress=False
    )
    model.train_from_iterator(lines(), trainer)
    table = str.maketrans(spelling)
    merges = json.loads(model.to_str())['model']['merges']
    return _numbered([(left.translate(table), right.translate(table)) for left, right in merges])


def token_counter(tokenizer: Tokenizer) -> Callable[[str], int]:
    """Returns text → number of its tokens, special ones included; a blank text has none."""
    from tokenizers import Tokenizer as Model

    model = Model.from_str(tokenizer.__getstate__())
    model.no_padding()
    model.no_truncation()
    return lambda text: len(model.encode(text)) if text.strip() else 0


def shorten(text: str, count: Callable[[str], int], limit: int = 77) -> tuple[str, str]:
    """Shortens a text until `count` finds at most `limit` tokens; no word is cut.

    Args:
      text: what is shortened.
      count: text → number of its tokens; more text has no fewer tokens.
      limit: the largest number of tokens.

    Returns:
      (kind of cut, text) for the first of these that fits, with as much text as possible:
        kept: the whole text.
        front: the text without sentences at the front, a template's among them.
        end: the text without sentences at the end, from the first sentence that fits by itself.
        words: one sentence without words at its end (white space separates words): of those whose
          first word fits, the sentence of fewest tokens.
        unfit: '', also if `text` is white space.
    """
    fits = lambda part: count(part) <= limit
    if text.strip() and fits(text):
        return 'kept', text
    spans = _spans(text)
    n = len(spans)
    run = lambda start, stop: text[spans[start][0] : spans[stop - 1][1]]
    if n > 1 and fits(run(n - 1, n)):
        first = bisect_left(range(1, n - 1), True, key=lambda start: fits(run(start, n)))
        return 'front', run(1 + first, n)
    for start in range(n):
        if fits(run(start, start + 1)):
            stops = range(start + 2, n + 1)
            more = bisect_left(stops, True, key=lambda stop: not fits(run(start, stop)))
            return 'end', run(start, start + 1 + more)
    for start, stop in sorted(spans, key=lambda span: count(text[slice(*span)])):
        words = [start + word.end() for word in re.finditer(r'\S+', text[start:stop])]
        if fits(text[start : words[0]]):
            more = bisect_left(words, True, lo=1, key=lambda end: not fits(text[start:end]))
            return 'words', text[start : words[more - 1]]
    return 'unfit', ''


def sentences(text: str) -> list[str]:
    """Splits a text into sentences, in order; at most white space is left out between them.

    A sentence ends with full stops (and closing quotes or brackets) before white space, so that 3.5
    stays whole; with an ellipsis if no small letter follows; with full-width stops; with a line.
    A piece without letters or digits ('!!!', an emoji) belongs to the sentence before it, or else
    to the one after it.
    """
    return [text[start:end] for start, end in _spans(text)]


def _spans(text: str) -> list[tuple[int, int]]:
    """Returns (start, end) of each sentence."""
    spans: list[tuple[int, int]] = []
    last_has_word = True
    start = 0
    for end in [*(end.end() for end in _END.finditer(text)), len(text)]:
        piece = text[start:end]
        if piece.strip():
            first = end - len(piece.lstrip())
            has_word = any(map(str.isalnum, piece))
            if spans and not (has_word and last_has_word):
                first = spans.pop()[0]
                has_word = has_word or last_has_word
            spans.append((first, start + len(piece.rstrip())))
            last_has_word = has_word
        start = end
    return spans


def _bytes() -> dict[int, str]:
    """Returns byte → symbol in the order of the published ids: printable bytes first."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = sorted(set(range(256)) - set(printable))
    codes = [*printable, *range(256, 256 + len(others))]
    return dict(zip([*printable, *others], map(chr, codes), strict=True))


def _symbols() -> list[str]:
    """Returns the symbols of single bytes in the order of the published ids."""
    symbols = list(_bytes().values())
    return symbols + [symbol + _SUFFIX for symbol in symbols]


def _numbered(merges: Sequence[tuple[str, str]]) -> Tokenizer:
    """Builds a tokenizer with the published order of ids."""
    tokens = [*_symbols(), *map(''.join, merges), START, END]
    return _build({token: i for i, token in enumerate(tokens)}, merges)


def _text_steps() -> 'tuple[normalizers.Sequence, pre_tokenizers.Sequence]':
    """Returns what normalizes a text, and what splits it into words written in symbols."""
    from tokenizers import Regex, normalizers, pre_tokenizers

    space = normalizers.Replace(Regex(r'\s+'), ' ')
    words = pre_tokenizers.Split(Regex(_WORDS), behavior='removed', invert=True)
    symbols = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    normalizer = normalizers.Sequence([normalizers.NFC(), space, normalizers.Lowercase()])
    return normalizer, pre_tokenizers.Sequence([words, symbols])


def _build(ids: dict[str, int], merges: Sequence[tuple[str, str]]) -> Tokenizer:
    from tokenizers import Tokenizer as Model
    from tokenizers import decoders, models, processors

    model = Model(models.BPE(ids, list(merges), end_of_word_suffix=_SUFFIX))
    model.add_special_tokens([START, END])
    model.normalizer, model.pre_tokenizer = _text_steps()
    # The end of a word is decoded to the symbol of a space, before symbols become bytes.
    space = decoders.Replace(_SUFFIX, _bytes()[ord(' ')])
    model.decoder = decoders.Sequence([space, decoders.ByteLevel(), decoders.Strip(' ', 0, 1)])
    model.post_processor = processors.TemplateProcessing(
        single=f'{START} $A {END}', special_tokens=[(token, ids[token]) for token in (START, END)]
    )
    return Tokenizer(model.to_str())


def _from_vocabulary(vocabulary_file: pathlib.Path, merges_file: pathlib.Path) -> Tokenizer:
    """Reads the two files of a Hugging Face folder."""
    try:
        ids = json.loads(_read(vocabulary_file))
    except (ValueError, RecursionError) as error:
        raise UserError(f'{vocabulary_file} is not JSON: {error}') from error
    whole = isinstance(ids, dict) and all(type(value) is int for value in ids.values())
    if not whole or sorted(ids.values()) != list(range(len(ids))):
        raise UserError(f'{vocabulary_file} does not number its tokens from 0 on')
    for token in (*_symbols(), START, END):
        if token not in ids:
            raise UserError(f'{vocabulary_file} has no token {token!r}')
    merges = []
    for line, merge in _read_merges(merges_file, len(ids) - _FIXED):
        for token in (*merge, ''.join(merge)):
            if token not in ids:
                raise UserError(f'{merges_file} line {line}: {vocabulary_file} has no {token!r}')
        merges.append(merge)
    return _build(ids, merges)


def _read_merges(path: pathlib.Path, most: int) -> Iterator[tuple[int, tuple[str, str]]]:
    """Yields (line, merge) of at most `most` merges of a file; a header is skipped."""
    lines = _read(path).removesuffix('\n').split('\n')
    header = '#version' in lines[0]
    for line, content in enumerate(lines[header : header + most], 1 + header):
        symbols = content.split()
        if len(symbols) != 2:
            raise UserError(
                f'{path} line {line} holds {len(symbols)} symbols, not the 2 of a merge'
            )
        yield line, (symbols[0], symbols[1])


def _read(path: pathlib.Path) -> str:
    """Returns the text of a file, gzip or not; an error if it is larger than MAX_BYTES."""
    try:
        with path.open('rb') as file:
            compressed = file.read(2) == b'\x1f\x8b'
            file.seek(0)
            source = gzip.GzipFile(fileobj=file) if compressed else file
            content = source.read(MAX_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f'{path} cannot be read: {error}') from error
    if len(content) > MAX_BYTES:
        raise UserError(
            f'{path} holds more than {MAX_BYTES:,} bytes; it is not a vocabulary of CLIP'
        )
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b'\n') + 1
        raise UserError(f'{path} line {line}: not UTF-8') from error
