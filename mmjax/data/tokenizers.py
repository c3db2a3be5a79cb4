"""Trains, loads and applies the tokenizer of panel texts. Free of jax."""

import os
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np

from mmjax.errors import UserError

SPECIAL = ('[PAD]', '[UNK]', '[CLS]', '[SEP]')
FILE = 'tokenizer.json'
VOCABULARY, MERGES = 'vocab.json', 'merges.txt'  # RoBERTa's
ROBERTA = ('<s>', '<pad>', '</s>', '<unk>', '<mask>')
_PADS = ('[PAD]', '<pad>', '<|endoftext|>')


class Tokenizer:
    """A `tokenizers` model with fixed-length output. Picklable.

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
        found = (self._model.token_to_id(pad) for pad in _PADS)
        self.pad_id: int = next((pad for pad in found if pad is not None), 0)
        self.truncated = 0

    def __getstate__(self) -> str:
        return self._serialized

    def __setstate__(self, serialized: str) -> None:
        self._serialized = serialized
        self._restore()

    @property
    def size(self) -> int:
        """Number of ids, special tokens included."""
        return self._model.get_vocab_size()

    def encode(self, texts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns ids int32 [texts, length] and mask bool [texts, length], True on tokens.

        An empty text has no tokens at all: its mask is False throughout. A text that is too long
        keeps its beginning and its closing special token, and adds one to `truncated`.
        """
        ids = np.full((len(texts), length), self.pad_id, np.int32)
        mask = np.zeros((len(texts), length), bool)
        for row, text in enumerate(texts):
            if not text.strip():
                continue
            encoding = self._model.encode(text)
            tokens = encoding.ids
            if len(tokens) > length:
                closing = bool(encoding.special_tokens_mask[-1])
                tokens = tokens[: length - closing] + tokens[len(tokens) - closing :]
                self.truncated += 1
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = True
        return ids, mask

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
      pieces: what a token does not reach beyond: 'text', a word; for listings of machine code
        'lines', an instruction, which may become one token, or 'words', a word of one, as where
        registers have names of their own most instructions are rare. Of listings line breaks take
        no token and are not decoded again.

    Raises:
      ValueError: a vocabulary without room for bytes; unknown pieces.
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
    steps = [normalizers.NFKC(), *([normalizers.Lowercase()] if lower_case else [])]
    model.normalizer = normalizers.Sequence(steps)
    split = pre_tokenizers.Split
    before = {
        'text': [],
        'lines': [split('\n', 'removed')],
        # A word has with it what sets it apart from the one before.
        'words': [split('\n', 'removed'), split(Regex(r',?\s?[^\s,]+'), 'isolated')],
    }
    if pieces not in before:
        raise ValueError(f"pieces '{pieces}' is not one of {', '.join(before)}")
    text = pieces == 'text'
    steps = [*before[pieces], pre_tokenizers.ByteLevel(add_prefix_space=text, use_regex=text)]
    model.pre_tokenizer = pre_tokenizers.Sequence(steps)
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
    """Loads `tokenizer.json` of a folder, or where it has none RoBERTa's pair of files.

    Raises:
      UserError: naming the file that is not there or cannot be read.
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
    """Reads what RoBERTa (Liu 2019) and its kin are published as: byte-level BPE in two files."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
    from tokenizers import Tokenizer as Model

    if not merges.exists():
        raise UserError(f'{merges} does not exist, which belongs to {vocabulary}')
    try:
        bpe = models.BPE.from_file(str(vocabulary), str(merges), unk_token='<unk>')
    except Exception as error:
        raise UserError(f'{vocabulary} and {merges} are no tokenizer ({error})') from error
    model = Model(bpe)
    ids = {token: model.token_to_id(token) for token in ROBERTA}
    # Where RoBERTa's own come first, as in no other that has them.
    if [ids[token] for token in ROBERTA[:4]] != [0, 1, 2, 3]:
        raise UserError(
            f"{vocabulary} is not RoBERTa's: it does not begin with <s> <pad> </s> <unk>"
        )
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens(
        [AddedToken(t, lstrip=t == '<mask>') for t in ROBERTA if ids[t] is not None]
    )
    ends = ('</s>', ids['</s>']), ('<s>', ids['<s>'])
    model.post_processor = processors.RobertaProcessing(*ends, True, False)
    return Tokenizer(model.to_str())
