"""Receipts as examples: a whole image, a question and its answer, and how many receipts it shows.

The rows of an image, usually three, share it: it is written and cached once.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Unpack

import numpy as np
from PIL import Image

from mmjax.data import images, prepare
from mmjax.data.tokenizers import Tokenizer
from mmjax.errors import UserError
from mmjax.recipes.receipts import folder as receipts_folder
from mmjax.recipes.receipts import text as receipts_text

GENERATOR = ('data/drawing.py', 'recipes/receipts/text.py', 'recipes/receipts/synthetic/*.py')
VERSION = '1.1.0'  # of the prepared records; raise it when their content changes
SPLITS = receipts_folder.SPLITS
TOKENS_VERSION = 1  # raise it when what `encode_texts` returns changes
_GREY = (127, 127, 127)  # beside an image that is not square


@dataclasses.dataclass(frozen=True)
class PreparedReceipts(prepare.Prepared):
    """Prepared splits; root: the folder of the images, None if the records hold them."""

    root: pathlib.Path | None
    max_pixels: int


def prepare_receipts(
    root: str | os.PathLike | None,
    cache_dir: str | os.PathLike,
    *,
    splits: Sequence[str] = SPLITS,
    seed: int = 0,
    synthetic_sizes: Mapping[str, int] | None = None,
    synthetic_side: int = 112,
    synthetic_most: int = 3,
    max_pixels: int = images.MAX_PIXELS,
    **options: Unpack[prepare.Options],
) -> PreparedReceipts:
    """Checks every image once and writes the records of the splits under `cache_dir`.

    A folder's images stay in place. The records of built-in ones hold them.

    Args:
      root: folder in the format of `receipts_folder`; None draws the built-in images.
      seed, synthetic_sizes, synthetic_side, synthetic_most: of the built-in images: split → how
        many, their side in pixels, and the most receipts in one.
      options: of `prepare.prepare`.

    Raises:
      UserError: a fault of the folder's structure, or too many faults of rows and images.
    """
    if root is None:
        from mmjax.recipes.receipts.synthetic import pictures

        sizes = pictures.catalogue(synthetic_sizes or {}, splits)
        code = prepare.source_digest(*GENERATOR)
        settings = [seed, sorted(sizes.items()), synthetic_side, synthetic_most, code]
        drawn = {'sizes': sizes, 'side': synthetic_side, 'most': synthetic_most}
        records = functools.partial(pictures.records, seed=seed, **drawn)
    else:
        folder = receipts_folder.open_folder(root, splits)
        settings = [folder.digest]
        root = folder.root.absolute()
        records = functools.partial(folder.records, max_pixels=max_pixels)
    prepared = prepare.prepare_cached(
        cache_dir,
        f'receipts_{"folder" if root else "synthetic"}',
        [*settings, max_pixels],
        version=VERSION,
        splits={split: functools.partial(records, split) for split in splits},
        blobs=() if root else ('image',),
        index=_index,
        **options,
    )
    return PreparedReceipts(prepared.directory, root, max_pixels)


def _index(record: Mapping[str, Any]) -> dict[str, Any]:
    return {'count': np.int32(record['count']), 'picture': np.int32(record['picture'])}


def whole_square(image: Image.Image, size: int) -> Image.Image:
    """Fits a whole image into `size` × `size`, sides in proportion, grey beside it."""
    scale = size / max(image.size)
    sides = tuple(max(round(side * scale), 1) for side in image.size)
    fitted = image.resize(sides, Image.Resampling.BILINEAR, reducing_gap=2.0)
    if fitted.size == (size, size):
        return fitted
    square = Image.new('RGB', (size, size), _GREY)
    square.paste(fitted, ((size - sides[0]) // 2, (size - sides[1]) // 2))
    return square


def encode_texts(
    texts: Iterable[str], tokenizer: Tokenizer, longest: int, closing: int | None
) -> dict[str, np.ndarray]:
    """Encodes each different text once.

    Args:
      texts: n of them, read in order.
      longest: L, tokens of a text that are kept.
      closing: as in `receipts_text.plain_tokens`.

    Returns:
      ids: int32 [different texts, L], without special tokens, then padding; lengths: int32
      [different texts], L + 1 for longer ones; rows: int32 [n], the position of each text among the
      different ones; closing: int32, the token that closes texts.

    Raises:
      UserError: the closing token is text.
    """
    positions: dict[str, int] = {}
    rows = np.array([positions.setdefault(text, len(positions)) for text in texts], np.int32)
    tokens, closing = receipts_text.plain_tokens(tokenizer, list(positions), longest + 1, closing)
    ids = np.full((len(tokens), longest), tokenizer.pad_id, np.int32)
    for row, text in zip(ids, tokens, strict=True):
        row[: min(len(text), longest)] = text[:longest]
    lengths = np.array([len(text) for text in tokens], np.int32)
    return {'ids': ids, 'rows': rows, 'lengths': lengths, 'closing': np.int32(closing)}


class ReceiptQuestions(prepare.PreparedDataset):
    """One prepared split; a row is a question about an image.

    index: count of receipts, label (its class), picture (rows of one image share it); with a
    tokenizer n_question, n_answer and length, the greater of both.
    texts_cut: rows whose question or answer was too long for the largest bucket.
    """

    prepared: PreparedReceipts
    length_key = 'length'

    def __init__(
        self,
        prepared: PreparedReceipts,
        split: str,
        *,
        image_size: int,
        buckets: Sequence[int],
        classes: int = 3,
        augmentation: images.Augmentation | None = None,
        cache_bytes: int = 1 << 30,
    ):
        """Opens a split.

        Args:
          image_size: S, side of an image in pixels.
          buckets: lengths in tokens that questions and answers of a batch are padded to.
          classes: C; label = min(count, C − 1): 3 separates none, one, and two or more.
          augmentation: applied when training; None for none.
          cache_bytes: memory, in each process, for decoded images; 0 for none.
        """
        if not buckets or min(buckets) < 2:
            raise UserError(f'data.buckets is {tuple(buckets)}: lengths from 2 are needed')
        super().__init__(prepared, split)
        self.image_size = image_size
        self.classes = classes
        self.augmentation = augmentation
        self.lengths = tuple(sorted(set(buckets)))
        self.index['label'] = np.minimum(self.index['count'], classes - 1).astype(np.int32)
        self.texts_cut = 0
        self.tokenizer: Tokenizer | None = None
        self._tokens: tuple[np.ndarray, ...] = ()
        self._cache = images.ImageCache(cache_bytes)

    def texts(self) -> Iterator[str]:
        """Yields question and answer of every row, in order, to train a tokenizer on."""
        for row in range(len(self)):
            record = self.record(row)
            yield from (record['question'], record['answer'])

    def with_tokenizer(
        self, tokenizer: Tokenizer, closing: int | None = None
    ) -> 'ReceiptQuestions':
        """Returns the same split with its texts in tokens, and their lengths in the index.

        What the tokenizer puts around a text is left out; an answer ends with `closing_id`:
        `tokenizer.end_id`, or else `closing`, or else the pad token. Tokens are made once and kept
        beside the records.

        Raises:
          UserError: the closing token is text.
        """
        longest = self.lengths[-1]
        settings = [TOKENS_VERSION, longest, closing, tokenizer.__getstate__()]
        make = lambda: encode_texts(self.texts(), tokenizer, longest, closing)
        tokens = self.prepared.cached_arrays(f'tokens-{self.split}', settings, make)
        return self._tokenized(tokenizer, tokens)

    def _tokenized(self, tokenizer: Tokenizer, encoded: Mapping) -> 'ReceiptQuestions':
        longest = self.lengths[-1]
        questions = encoded['rows'][0::2]
        answers = encoded['rows'][1::2]
        n_question = encoded['lengths'][questions]
        n_answer = encoded['lengths'][answers] + 1
        lengths = {
            'n_question': np.minimum(n_question, longest),
            'n_answer': np.minimum(n_answer, longest),
            'length': np.minimum(np.maximum(n_question, n_answer), longest),
        }
        return self.replace(
            tokenizer=tokenizer,
            closing_id=int(encoded['closing']),
            texts_cut=int((np.maximum(n_question, n_answer) > longest).sum()),
            index={**self.index, **lengths},
            _tokens=(encoded['ids'], questions, answers),
        )

    def with_question(self, path: str | os.PathLike, question: str) -> 'ReceiptQuestions':
        """Returns a split of one row: an image and a question whose answer is unknown.

        Raises:
          UserError: an image that is missing or unreadable, a question that is empty or too long.
        """
        if not question.strip():
            raise UserError('the question is empty')
        path = pathlib.Path(path)
        if not path.is_file():
            raise UserError(f'{path} does not exist')
        record = {'question': question, 'answer': '', 'count': 0, 'pair': 0, 'picture': 0}
        record |= {'image_path': str(path), 'image': path.read_bytes(), 'line': 0}
        other = self.with_record(
            record,
            {**_index(record), 'label': np.int32(0)},
            prepared=dataclasses.replace(self.prepared, root=None),
            _cache=images.ImageCache(0),
            _tokens=(),
        )
        other.image(0)
        if not self.tokenizer:
            return other
        longest = self.lengths[-1]
        encoded = encode_texts(other.texts(), self.tokenizer, longest, self.closing_id)
        if encoded['lengths'][0] > longest:
            raise UserError(
                f'the question has more than {longest} tokens, the largest of data.buckets'
            )
        return other._tokenized(self.tokenizer, encoded)

    def image(self, row: int) -> Image.Image:
        """Returns the whole image of a row in RGB, in its full size."""
        return self._open(row, None)

    def _open(self, row: int, at_least: tuple[int, int] | None) -> Image.Image:
        record = self.record(row)
        name = record['image_path']
        if self.prepared.root is None:  # the first row of an image holds it
            source = self._records[int(self._rows[row]) - record['pair']]['image']
        else:
            source = self.prepared.root / name
        limit = self.prepared.max_pixels
        return images.open_image(source, name, max_pixels=limit, at_least=at_least)

    def example(self, row: int, rng: np.random.Generator, train: bool) -> dict[str, np.ndarray]:
        """Returns one image, question and answer; L is the largest bucket.

        Returns:
          images: uint8 [S, S, 3], the whole image; question: int32 [L] and question_mask:
          bool [L]; answer: int32 [L] and answer_mask: bool [L], the closing token included; label:
          int32, the class of the number of receipts. Where a mask is False tokens are padding.

        Raises:
          UserError: an image that has become unreadable since it was prepared.
        """
        if self.tokenizer is None:
            raise ValueError('ReceiptQuestions has no tokenizer yet: see with_tokenizer')
        size = self.image_size
        make = lambda: whole_square(self._open(row, (2 * size, 2 * size)), size)
        square = self._cache.get(int(self.index['picture'][row]), make)
        if train and self.augmentation:
            box = self.augmentation.box((0.0, 0.0, 1.0, 1.0), rng)
            pixels = self.augmentation.tone(images.crop_resize(square, box, size), rng)
        else:
            pixels = np.asarray(square)
        ids, questions, answers = self._tokens
        positions = np.arange(ids.shape[1])
        closing = self.index['n_answer'][row] - 1
        answer = np.where(positions == closing, self.closing_id, ids[answers[row]])
        return {
            'images': pixels,
            'question': ids[questions[row]],
            'question_mask': positions < self.index['n_question'][row],
            'answer': answer.astype(np.int32),
            'answer_mask': positions <= closing,
            'label': self.index['label'][row],
        }

    def collate(self, examples: Sequence[dict], bucket: int) -> dict[str, np.ndarray]:
        """Stacks examples, texts cut to `bucket` tokens (0: all); one that does not fit raises."""
        batch = super().collate(examples, bucket)
        if not bucket:
            return batch
        for key in ('question', 'answer'):
            if batch[f'{key}_mask'][:, bucket:].any():
                raise UserError(f'a {key} of split {self.split} is longer than the bucket {bucket}')
            for name in (key, f'{key}_mask'):
                batch[name] = batch[name][:, :bucket]
        return batch

    def fingerprint(self) -> dict[str, str | int]:
        return super().fingerprint() | {'classes': self.classes}
