"""Trains, loads and applies tokenizers of texts and listings. Free of jax."""

import os
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np

from mmjax.errors import UserError

SPECIAL = ('[PAD]', '[UNK]', '[CLS]', '[SEP]')
FILE = 'tokenizer.json'
VOCABULARY = 'vocab.json'  # RoBERTa's, with MERGES
MERGES = 'merges.txt'
ROBERTA = ('<s>', '<pad>', '</s>', '<unk>', '<mask>')


class Tokenizer:
    """A `tokenizers` model with fixed-length output. Picklable.

    begin_id, end_id: the tokens that `encode` puts before and after a text; None if none.
    pad_id: pads texts; 0 if no token is named for it.
    unknown_id, mask_id: the tokens of these names; None if there is none.
    truncated: how many texts `encode` has cut so far, in this process.
    """

    def __init__(self, serialized: str):
        self._serialized = serialized
        self._restore()

    def _restore(self) -> None:
        import tokenizers

        self._model = tokenizers.Tokenizer.from_str(self._serialized)
        self._model.no_padding()
        self._model.no_truncation()
        probe = self._model.encode('a')
        special = [bool(mark) for mark in probe.special_tokens_mask] or [False]
        self.begin_id: int | None = probe.ids[0] if special[0] else None
        self.end_id: int | None = probe.ids[-1] if special[-1] else None
        self.pad_id: int = self._id_of('[PAD]', '<pad>', '<|endoftext|>') or 0
        self.unknown_id = self._id_of('[UNK]', '<unk>')
        self.mask_id = self._id_of('[MASK]', '<mask>')
        self.truncated = 0

    def _id_of(self, *names: str) -> int | None:
        ids = map(self._model.token_to_id, names)
        return next((token for token in ids if token is not None), None)

    def __getstate__(self) -> str:
        return self._serialized

    def __setstate__(self, serialized: str) -> None:
        self._serialized = serialized
        self._restore()

    @property
    def size(self) -> int:
        """Number of ids, special tokens included."""
        return self._model.get_vocab_size()

    def encode(
        self, texts: Sequence[str], length: int, special: bool = True
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns ids int32 [texts, length] and mask bool [texts, length], True on tokens.

        An empty text has no tokens at all: its mask is False throughout. A text that is too long
        keeps its beginning and `end_id`, and adds one to `truncated`.

        Args:
          special: False leaves out what is put around a text, `begin_id` and `end_id`.
        """
        ids, mask, truncated = self.encode_and_count(texts, length, special)
        self.truncated += truncated
        return ids, mask

    def encode_and_count(
        self, texts: Sequence[str], length: int, special: bool = True
    ) -> tuple[np.ndarray, np.ndarray, int]:
        """Returns ids and mask as `encode` does, and how many of the texts were too long."""
        truncated = 0
        ids = np.full((len(texts), length), self.pad_id, np.int32)
        mask = np.zeros((len(texts), length), bool)
        for row, text in enumerate(texts):
            if not text.strip():
                continue
            tokens = self._model.encode(text, add_special_tokens=special).ids
            if len(tokens) > length:
                kept = int(special and self.end_id is not None)  # tokens kept at the end
                tokens = tokens[: length - kept] + tokens[len(tokens) - kept :]
                truncated += 1
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = True
        return ids, mask, truncated

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids, special tokens left out."""
        return self._model.decode(list(map(int, ids)), skip_special_tokens=True)

    def save(self, folder: str | os.PathLike) -> pathlib.Path:
        """Writes `tokenizer.json` into `folder` and returns its path."""
        path = pathlib.Path(folder) / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self._serialized)
        return path


def train_tokenizer(
    texts: Iterable[str], vocabulary: int = 2000, *, lower_case: bool = True, pieces: str = 'text'
) -> Tokenizer:
    """Trains byte-level BPE: any text can be written, and the same texts give the same JSON.

    WordPiece is not offered for training: the library numbers its pieces in an order that
    differs from process to process. Trained elsewhere, it loads as any other.

    Args:
      texts: read once, in order.
      vocabulary: largest number of ids, of which 4 are special ([PAD] 0, [UNK], [CLS], [SEP]) and
        256 are bytes.
      lower_case: whether case is dropped, after Unicode NFKC.
      pieces: the longest text that can become one token: 'text', a word; for listings of machine
        code 'lines', an instruction, or 'words', a word of an instruction (better if registers
        keep their names, as most instructions are then rare). In listings line breaks take no
        token and are not decoded again.

    Raises:
      ValueError: a vocabulary too small for the special tokens and the bytes.
    """
    from tokenizers import (
        Regex,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )
    from tokenizers import Tokenizer as Model

    if vocabulary < len(SPECIAL) + 256:
        raise ValueError(
            f'a vocabulary of {vocabulary} is under {len(SPECIAL)} special + 256 bytes'
        )
    model = Model(models.BPE(unk_token='[UNK]'))
    lower = [normalizers.Lowercase()] if lower_case else []
    model.normalizer = normalizers.Sequence([normalizers.NFKC(), *lower])
    split = pre_tokenizers.Split
    splits = {
        'text': [],
        'lines': [split('\n', 'removed')],
        # A word keeps what separates it from the one before.
        'words': [split('\n', 'removed'), split(Regex(r',?\s?[^\s,]+'), 'isolated')],
    }
    text = pieces == 'text'
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=text, use_regex=text)
    model.pre_tokenizer = pre_tokenizers.Sequence([*splits[pieces], byte_level])
    model.decoder = decoders.ByteLevel()
    model.train_from_iterator(
        iter(texts),
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=list(SPECIAL),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    ends = [(token, model.token_to_id(token)) for token in ('[CLS]', '[SEP]')]
    model.post_processor = processors.TemplateProcessing(
        single='[CLS] $A [SEP]', special_tokens=ends
    )
    return Tokenizer(model.to_str())


def load_tokenizer(folder: str | os.PathLike) -> Tokenizer:
    """Loads `tokenizer.json` of a folder, or else RoBERTa's pair of files.

    Raises:
      UserError: naming the file that is missing or cannot be read.
    """
    folder = pathlib.Path(folder)
    path = folder / FILE
    if not path.exists() and (folder / VOCABULARY).exists():
        return _roberta(folder / VOCABULARY, folder / MERGES)
    try:
        return Tokenizer(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f'{path} does not exist') from error
    except Exception as error:  # the library raises bare Exceptions
        raise UserError(f'{path} is not a tokenizer ({error})') from error


def _roberta(vocabulary: pathlib.Path, merges: pathlib.Path) -> Tokenizer:
    """Reads byte-level BPE in two files, as RoBERTa (Liu et al., 2019) is published."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
    from tokenizers import Tokenizer as Model

    if not merges.exists():
        raise UserError(f'{merges} does not exist, which belongs to {vocabulary}')
    try:
        bpe = models.BPE.from_file(str(vocabulary), str(merges), unk_token='<unk>')
    except Exception as error:
        raise UserError(f'{vocabulary} and {merges} are no tokenizer ({error})') from error
    model = Model(bpe)
    # RoBERTa's special tokens come first; in other vocabularies that have them they do not.
    if [model.token_to_id(token) for token in ROBERTA[:4]] != [0, 1, 2, 3]:
        raise UserError(
            f"{vocabulary} is not RoBERTa's: it does not begin with <s> <pad> </s> <unk>"
        )
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    known = [token for token in ROBERTA if model.token_to_id(token) is not None]
    model.add_special_tokens([AddedToken(token, lstrip=token == '<mask>') for token in known])
    model.post_processor = processors.RobertaProcessing(('</s>', 2), ('<s>', 0), True, False)
    return Tokenizer(model.to_str())
