"""Receipts as examples: a whole picture, a question and its answer, and how many receipts it shows.

The rows of a picture, three as a rule, share it: it is stored and kept once.
"""

import copy
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from mmjax.data import images, prepare
from mmjax.data.dataset import Dataset
from mmjax.data.faults import Progress
from mmjax.data.tokenizers import Tokenizer
from mmjax.errors import RecordError, UserError
from mmjax.recipes.receipts import encoding
from mmjax.recipes.receipts import folder as receipts_folder

GENERATOR = ('data/drawing.py', 'recipes/receipts/text.py', 'recipes/receipts/synthetic/*.py')
VERSION = '1.1.0'  # of the prepared records; raise it when their content changes
SPLITS = receipts_folder.SPLITS
_AROUND = (127, 127, 127)  # beside a picture that is not square


@dataclasses.dataclass(frozen=True)
class PreparedReceipts:
    """Prepared splits, and where their pictures lie (None: inside the records)."""

    prepared: prepare.Prepared
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
    max_fault_share: float = 0.01,
    max_pixels: int = images.MAX_PIXELS,
    wait: bool = False,
    progress: Progress | None = None,
) -> PreparedReceipts:
    """Checks every picture once and writes the records of the splits under `cache_dir`.

    A folder's pictures stay where they are. Built-in ones are drawn and carried by the records.

    Args:
      root: folder in the format of `receipts_folder`; None draws the built-in pictures.
      seed, synthetic_sizes, synthetic_side: of the built-in pictures: split → how many, and their
        side in pixels.
      max_fault_share: share of a split's rows that may be faulty; these are skipped and listed.
      wait: leave the preparation to another host, and poll until it is done.

    Raises:
      UserError: a fault of the folder's structure, or too many faults of rows and pictures.
    """
    settings = [VERSION, list(splits), max_pixels, max_fault_share]
    if root is None:
        from mmjax.recipes.receipts.synthetic import pictures as receipts_synthetic

        sizes = receipts_synthetic.catalogue(synthetic_sizes or {}, splits)
        settings += ['synthetic', seed, sorted(sizes.items()), synthetic_side]
        settings.append(prepare.source_digest(*GENERATOR))
        drawn = functools.partial(receipts_synthetic.records, seed, side=synthetic_side)
        sources = {s: functools.partial(drawn, s, sizes[s]) for s in splits}
        where, blobs = None, ('image',)
    else:
        folder = receipts_folder.open_folder(root, splits)
        settings += ['folder', folder.digest]
        sources = {s: functools.partial(folder.records, s, max_pixels=max_pixels) for s in splits}
        where, blobs = folder.root.absolute(), ()
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
    kind = 'synthetic' if root is None else 'folder'
    prepared = prepare.prepare(
        pathlib.Path(cache_dir) / f'receipts-{kind}-{digest}',
        name=f'receipts_{kind}',
        version=VERSION,
        splits=sources,
        blobs=blobs,
        index=_index,
        max_fault_share=max_fault_share,
        progress=progress,
        wait=wait,
    )
    return PreparedReceipts(prepared, where, max_pixels)


def _index(record: Mapping[str, Any]) -> dict[str, Any]:
    return {'count': np.int32(record['count']), 'picture': np.int32(record['picture'])}


def whole_square(picture: Image.Image, size: int) -> Image.Image:
    """Fits a whole picture into `size` × `size`, sides in proportion, grey beside it."""
    share = size / max(picture.size)
    sides = tuple(max(round(side * share), 1) for side in picture.size)
    fitted = picture.resize(sides, Image.Resampling.BILINEAR, reducing_gap=2.0)
    if fitted.size == (size, size):
        return fitted
    square = Image.new('RGB', (size, size), _AROUND)
    square.paste(fitted, ((size - sides[0]) // 2, (size - sides[1]) // 2))
    return square


class ReceiptQuestions(Dataset):
    """One prepared split; a row is a question of a picture.

    index: count of receipts, label (its class), picture (rows of one share it); with a tokenizer
    n_question, n_answer and length, the greater of both. skipped: reason → rows left out.
    texts_cut: rows whose question or answer was too long for the largest bucket.
    """

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
          image_size: S, side of a picture in pixels.
          buckets: lengths in tokens that questions and answers of a batch are padded to.
          classes: C; label = min(count, C − 1), so 3 tells none, one, and two or more.
          augmentation: applied when training; None for none.
          cache_bytes: memory, in each process, for decoded pictures; 0 for none.
        """
        if classes < 2:
            raise UserError(f'data.classes is {classes}, less than 2')
        if not buckets or min(buckets) < 2:
            raise UserError(f'data.buckets is {tuple(buckets)}: lengths from 2 are needed')
        self.split, self.prepared, self.image_size = split, prepared, image_size
        self.classes, self.augmentation = classes, augmentation
        self.lengths, self.length_key = tuple(sorted(set(buckets))), 'length'
        self._kept = images.ImageCache(cache_bytes)
        summary = prepared.prepared.summary
        if split not in summary['splits']:
            raise UserError(f'{prepared.prepared.directory} holds no split {split!r}')
        self._name, self._books = summary['name'], summary['splits'][split]
        self.index = prepared.prepared.index(split)
        self.index['label'] = np.minimum(self.index['count'], classes - 1).astype(np.int32)
        self.skipped, self.texts_cut = dict(self._books['skipped']), 0
        self._records = prepared.prepared.open(split)
        self.tokenizer: Tokenizer | None = None
        self._tokens: tuple[np.ndarray, ...] = ()

    def __len__(self) -> int:
        return len(self._records)

    def record(self, row: int) -> dict[str, Any]:
        """Returns what was prepared of a row: question, answer, count, pair, image_path, line."""
        return self._records[row]

    def texts(self) -> Iterator[str]:
        """Yields question and answer of every row, in order, to train a tokenizer on."""
        for row in range(len(self)):
            record = self._records[row]
            yield from (record['question'], record['answer'])

    def with_tokenizer(
        self, tokenizer: Tokenizer, closing: int | None = None
    ) -> 'ReceiptQuestions':
        """Returns the same split with its texts in tokens, and their lengths in the index.

        What the tokenizer itself puts around a text is left out; an answer ends with `closing_id`:
        the token that the tokenizer closes texts with, or, where it has none, `closing`, or its pad
        token where that is None. Tokens are made once and kept beside the records.

        Raises:
          UserError: the closing token is text.
        """
        folder, longest = self.prepared.prepared.directory, self.lengths[-1]
        return self._tokenized(
            tokenizer,
            encoding.encoded(folder, self.split, self.texts, tokenizer, longest, closing),
        )

    def _tokenized(self, tokenizer: Tokenizer, encoded: Mapping) -> 'ReceiptQuestions':
        other, longest = copy.copy(self), self.lengths[-1]
        other.tokenizer, other.closing_id = tokenizer, int(encoded['closing'])
        questions, answers = encoded['rows'][0::2], encoded['rows'][1::2]
        other._tokens = encoded['ids'], questions, answers
        n_question, n_answer = encoded['lengths'][questions], encoded['lengths'][answers] + 1
        other.texts_cut = int((np.maximum(n_question, n_answer) > longest).sum())
        n_question, n_answer = np.minimum(n_question, longest), np.minimum(n_answer, longest)
        longer = np.maximum(n_question, n_answer)
        other.index = {
            **self.index,
            'n_question': n_question,
            'n_answer': n_answer,
            'length': longer,
        }
        return other

    def with_question(self, picture: str | os.PathLike, question: str) -> 'ReceiptQuestions':
        """Returns a split of one row: a picture that is asked a question, its answer unknown.

        Raises:
          UserError: a picture that is missing or unreadable, a question that is empty or too long.
        """
        if not question.strip():
            raise UserError('the question is empty')
        path = pathlib.Path(picture)
        if not path.is_file():
            raise UserError(f'{path} does not exist')
        other = copy.copy(self)
        other.prepared = dataclasses.replace(self.prepared, root=None)
        other._kept, other._tokens = images.ImageCache(0), ()
        record = {'question': question, 'answer': '', 'count': 0, 'pair': 0, 'picture': 0}
        other._records = [record | {'image_path': str(path), 'image': path.read_bytes(), 'line': 0}]
        other.index = {key: np.asarray([value]) for key, value in _index(record).items()}
        other.index['label'] = np.zeros(1, np.int32)
        other.picture(0)
        if not self.tokenizer:
            return other
        longest = self.lengths[-1]
        encoded = encoding.encode(other.texts(), self.tokenizer, longest, self.closing_id)
        if encoded['lengths'][0] > longest:
            raise UserError(
                f'the question has more than {longest} tokens, the largest of data.buckets'
            )
        return other._tokenized(self.tokenizer, encoded)

    def picture(self, row: int) -> Image.Image:
        """Returns the whole picture of a row in RGB, as large as it is."""
        return self._open(row, None)

    def _open(self, row: int, at_least: tuple[int, int] | None) -> Image.Image:
        record = self._records[row]
        name = record['image_path']
        if self.prepared.root is None:
            source = (self._records[row - record['pair']] if record['pair'] else record)['image']
        else:
            source = self.prepared.root / name
        try:
            return images.open_image(
                source, name, max_pixels=self.prepared.max_pixels, at_least=at_least
            )
        except RecordError as error:
            raise UserError(str(error)) from error

    def example(self, row: int, rng: np.random.Generator, train: bool) -> dict[str, np.ndarray]:
        """Returns one picture, question and answer; L is the largest bucket.

        Returns:
          images: uint8 [S, S, 3], the whole picture; question: int32 [L] and question_mask:
          bool [L]; answer: int32 [L] and answer_mask: bool [L], the closing token included; label:
          int32, the class of the number of receipts. Where a mask is False tokens are padding.

        Raises:
          UserError: a picture that has become unreadable since it was prepared.
        """
        if self.tokenizer is None:
            raise ValueError('ReceiptQuestions has no tokenizer yet: see with_tokenizer')
        size = self.image_size
        make = lambda: whole_square(self._open(row, (2 * size, 2 * size)), size)
        picture = self._kept.get(int(self.index['picture'][row]), make)
        if train and self.augmentation:
            box = self.augmentation.box((0.0, 0.0, 1.0, 1.0), rng)
            image = self.augmentation.tone(images.crop_resize(picture, box, size), rng)
        else:
            image = np.asarray(picture)
        ids, questions, answers = self._tokens
        places = np.arange(ids.shape[1])
        question_mask = places < self.index['n_question'][row]
        closing = self.index['n_answer'][row] - 1
        answer = np.where(places == closing, self.closing_id, ids[answers[row]])
        return {
            'images': image,
            'question': ids[questions[row]],
            'question_mask': question_mask,
            'answer': answer.astype(np.int32),
            'answer_mask': places <= closing,
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
        return {
            'name': self._name,
            'version': VERSION,
            'split': self.split,
            'size': len(self),
            'digest': self._books['digest'],
            'classes': self.classes,
        }
