"""Signed sentences as examples: normalised landmarks by frame, glosses, and the length of both."""

import collections
import copy
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from mmjax.data import records, samplers
from mmjax.data.dataset import Dataset
from mmjax.errors import UserError
from mmjax.recipes.sign.augment import Augmentation, Normalization
from mmjax.recipes.sign.folder import UNKNOWN_ID, Vocabulary
from mmjax.recipes.sign.prepare import VERSION, PreparedSequences


class SignSequences(Dataset):
    """One prepared split; a row is a sentence.

    index: length (frames), n_labels, needed (frames that CTC needs: labels and repeats), signer
    (its place in `signers`, those of all splits). lengths: see `buckets`; streams: name → columns
    of an example's features. skipped: reason → rows left out; counts: unknown_words,
    unalignable_rows (length < needed, or an unknown word) and what was mended; unknown: word → how
    often.
    """

    length_key = 'length'

    def __init__(
        self,
        prepared: PreparedSequences,
        split: str,
        *,
        vocabulary: Vocabulary,
        normalization: Normalization,
        augmentation: Augmentation | None = None,
        buckets: int | Sequence[int] = 4,
    ):
        """Opens a split.

        Args:
          vocabulary, normalization: of the training split, or of another run.
          augmentation: applied when training; None for none.
          buckets: lengths that batches are padded to, or how many (at most) to choose: those that
            pad the training rows least, stretched as augmentation may. A split for evaluation with
            longer sequences has one more.

        Raises:
          UserError: buckets that are no such numbers.
        """
        for length in [buckets] if isinstance(buckets, int) else [len(buckets), *buckets]:
            if not length >= 1:
                raise UserError(
                    f'data.buckets={buckets} is neither 1 or more nor lengths in frames'
                )
        self.split, self.vocabulary, self.normalization = split, vocabulary, normalization
        self.augmentation, self.streams = augmentation, normalization.output_streams
        summary, indices = prepared.prepared.summary, {}
        for name in prepared.splits:
            indices[name] = prepared.prepared.index(name)
        self._name, books = summary['name'], summary['splits'][split]
        self._digest, self._records = books['digest'], prepared.prepared.open(split)
        own = indices[split]
        self._rows = np.arange(len(own['length']))
        self._words = [tuple(words.split()) for words in own['words'].tolist()]
        self._labels = [vocabulary.encode(words) for words in self._words]
        self._most = -(-max(int(index['n_labels'].max()) for index in indices.values()) // 4) * 4
        names = np.unique(np.concatenate([index['signer'] for index in indices.values()]))
        self.signers = tuple(names.tolist())
        place = np.searchsorted(names, own['signer']).astype(np.int32)
        self.index = {key: own[key] for key in ('length', 'n_labels', 'needed')} | {'signer': place}
        trained = 'train' if 'train' in indices else split
        self.lengths = self._lengths(indices[trained]['length'], buckets)
        rows = zip(self._words, self._labels, strict=True)
        pairs = (pair for words, ids in rows for pair in zip(words, ids.tolist(), strict=True))
        self.unknown = collections.Counter(word for word, i in pairs if i == UNKNOWN_ID)
        strange = np.array([UNKNOWN_ID in ids for ids in self._labels], bool)
        short = own['length'] < own['needed']
        self.skipped = dict(books['skipped'])
        self.counts = dict(books['counts']) | {
            'unknown_words': self.unknown.total(),
            'unalignable_rows': int((short | strange).sum()),
        }

    def _lengths(self, trained: np.ndarray, buckets: int | Sequence[int]) -> tuple[int, ...]:
        if isinstance(buckets, int):
            stretch = self.augmentation.stretch[1] if self.augmentation else 1.0
            longest = np.ceil(trained * stretch - 1e-6)
            buckets = samplers.bucket_lengths(longest, buckets)
        own = int(self.index['length'].max())
        beyond = own > max(buckets) and self.split != 'train'
        return tuple(sorted({*buckets, *([-(-own // 8) * 8] if beyond else [])}))

    def __len__(self) -> int:
        return len(self._words)

    def words(self, row: int) -> tuple[str, ...]:
        """Returns the reference of a row, words unknown to the vocabulary included."""
        return self._words[row]

    def record(self, row: int) -> dict[str, Any]:
        """Returns what was prepared of a row: id, signer, words, line, features (packed)."""
        return self._records[int(self._rows[row])]

    def subset(self, rows: np.ndarray) -> 'SignSequences':
        """Returns some of the rows, in the order given."""
        other = copy.copy(self)
        other._rows = self._rows[rows]
        other._words = [self._words[row] for row in rows]
        other._labels = [self._labels[row] for row in rows]
        other.index = {key: value[rows] for key, value in self.index.items()}
        chosen = f'{self._digest} {rows.tolist()}'
        other._digest = hashlib.sha256(chosen.encode()).hexdigest()
        return other

    def rooms(self, rows: int) -> dict[int, float]:
        """Returns frames a row that nearly all training batches of `rows` rows need, by length.

        Batches of one length each, their rows drawn and stretched at random: two standard errors
        above the mean, as few rows vary much, and one batch in 44 may take a third longer. A length
        without rows, or without use of a room, has none; see `samplers.packed_length`.
        """
        low, high = self.augmentation.stretch if self.augmentation else (1.0, 1.0)
        longest = np.ceil(self.index['length'] * high - 1e-6)
        bucket, out = np.searchsorted(self.lengths, longest), {}
        for place, length in enumerate(self.lengths):
            own = self.index['length'][bucket == place].astype(float)
            if len(own):
                # Rows of a batch differ: of few there is little to draw.
                rest = max(len(own) - rows, 0) / max(len(own) - 1, 1)
                tempo, spread = (low + high) / 2, (high - low) ** 2 / 12
                variance = rest * tempo**2 * own.var() + spread * (own**2).mean()
                room = samplers.packed_length(
                    tempo * own.mean(), variance, rows, length, standard_errors=2.0
                )
                out |= {length: room} if room else {}
        return out

    def of_features(self, features: np.ndarray) -> 'SignSequences':
        """Returns a split of one row, whose words nobody knows, from [T, F] as files have them."""
        other, length = copy.copy(self), len(features)
        other._rows, other._records = np.zeros(1, int), [{'features': records.pack(features)}]
        other._words, other._labels = [()], [np.zeros(0, np.int32)]
        numbers = {'length': length, 'n_labels': 0, 'needed': 0, 'signer': 0}
        other.index = {key: np.array([value], np.int32) for key, value in numbers.items()}
        if length > max(self.lengths):
            other.lengths = (*self.lengths, -(-length // 8) * 8)
        return other

    def example(self, row: int, rng: np.random.Generator, train: bool) -> dict[str, np.ndarray]:
        """Returns one sentence, normalised and then, when training, augmented.

        Returns:
          features: float32 [T, F']; labels: int32 [n], UNKNOWN_ID where training lacks the word;
          length: int32, T.
        """
        features = self.normalization(records.unpack(self.record(row)['features']))
        if train and self.augmentation:
            needed = int(self.index['needed'][row])
            changes = self.normalization.changes
            features = self.augmentation(features, self.streams, needed, rng, changes)
        labels, length = self._labels[row], np.int32(len(features))
        return {'features': features, 'labels': labels, 'length': length}

    def collate(self, examples: Sequence[dict], bucket: int) -> dict[str, np.ndarray]:
        """Pads examples to a batch.

        Args:
          bucket: frames to pad to; 0 for the largest of `lengths`.

        Returns:
          features: float32 [B, bucket, F'], 0 beyond a sequence's end; frames: bool [B, bucket],
          True up to it; labels: int32 [B, L], 0 beyond the last; label_mask: bool [B, L]; length:
          int32 [B]. L is the same for all batches and splits.

        Raises:
          UserError: a sequence is longer than the bucket.
        """
        bucket, length = bucket or self.lengths[-1], np.array([e['length'] for e in examples])
        if length.max() > bucket:
            raise UserError(f'a sequence of {length.max()} frames in a bucket of {bucket}')
        width = examples[0]['features'].shape[1]
        features = np.zeros((len(examples), bucket, width), np.float32)
        labels = np.zeros((len(examples), self._most), np.int32)
        for place, example in enumerate(examples):
            features[place, : example['length']] = example['features']
            labels[place, : len(example['labels'])] = example['labels']
        n_labels = np.array([len(example['labels']) for example in examples])
        return {
            'features': features,
            'frames': np.arange(bucket) < length[:, None],
            'labels': labels,
            'label_mask': np.arange(self._most) < n_labels[:, None],
            'length': length.astype(np.int32),
        }

    def fingerprint(self) -> dict[str, str | int]:
        statistics = (self.normalization.mean.tobytes(), self.normalization.deviation.tobytes())
        return {
            'name': self._name,
            'version': VERSION,
            'split': self.split,
            'size': len(self),
            'digest': self._digest,
            'vocabulary': hashlib.sha256(' '.join(self.vocabulary.words).encode()).hexdigest(),
            'normalization': hashlib.sha256(b''.join(statistics)).hexdigest(),
        }
