"""Signed sentences as examples: normalised landmarks by frame, glosses, and the length of both."""

import dataclasses
import functools
import hashlib
import itertools
import os
from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import numpy as np

from mmjax.data import prepare, records, samplers
from mmjax.errors import UserError
from mmjax.recipes.sign import folder as sign_folder
from mmjax.recipes.sign import streams as sign_streams
from mmjax.recipes.sign.augment import Augmentation, Normalization
from mmjax.recipes.sign.folder import UNKNOWN_ID, Vocabulary
from mmjax.recipes.sign.streams import Columns

VERSION = '1.1.0'  # of the prepared records; raise it when their content changes
GENERATOR = ('recipes/sign/synthetic/*.py',)


@dataclasses.dataclass(frozen=True)
class PreparedSequences(prepare.Prepared):
    """Prepared splits; streams: name → columns of their features, from left to right."""

    splits: tuple[str, ...]
    streams: Mapping[str, Columns]

    def sentences(self, split: str) -> list[tuple[str, ...]]:
        """Returns the words of every row."""
        return [tuple(words.split()) for words in self.index(split)['words'].tolist()]

    def vocabulary(self) -> Vocabulary:
        """Returns the words of the training split."""
        return Vocabulary.of(self.sentences('train'))

    def normalization(
        self, missing: str = 'zero', differences: bool = False, around: bool = True
    ) -> Normalization:
        """Returns the statistics of the training split, and only of that.

        They are measured in one pass, the first time, and kept beside the records.

        Args:
          missing, differences: see `Normalization`.
          around: expresses landmarks relative to their mean point, in streams with `coordinates`.
        """
        spans = {name: (start, end) for name, (start, end, _) in self.streams.items()}
        landmarks = {name: columns.coordinates for name, columns in self.streams.items()}
        coordinates = landmarks if around else dict.fromkeys(landmarks, 0)

        def measure() -> dict[str, np.ndarray]:
            sequences = (records.unpack(record['features']) for record in self.open('train'))
            return Normalization.measure(
                sequences, spans, missing, differences, coordinates
            ).to_arrays()

        # The records do not depend on the streams, the statistics do.
        settings = [list(spans.items()), missing, differences, coordinates]
        return Normalization.from_arrays(self.cached_arrays('normalization', settings, measure))


def prepare_sequences(
    root: str | os.PathLike | None,
    cache_dir: str | os.PathLike,
    *,
    streams: Mapping[str, Sequence[int]] | None = None,
    seed: int = 0,
    synthetic_sizes: Mapping[str, int] | None = None,
    **options: Unpack[prepare.Options],
) -> PreparedSequences:
    """Checks every file once and writes the records of the splits under `cache_dir`.

    Features are copied into the records, as float16 or float32, so that a run reads few files.

    The splits are train, dev (or val, if the folder calls it so) and test, if the folder has one.

    Args:
      root: folder in the format of `sign_folder`; None performs the built-in sentences.
      streams: name → (start, end) or (start, end, coordinates), instead of those of the folder.
      seed, synthetic_sizes: arguments of the built-in sentences' `catalogue`.
      options: of `prepare.prepare`.

    Raises:
      UserError: a fault of the folder's structure, or too many faults of rows.
    """
    if streams:
        streams = sign_streams.check(streams, 'data.streams')
    if root is None:
        from mmjax.recipes.sign.synthetic import sentences, skeleton

        built_in = {n: (*span, skeleton.COORDINATES) for n, span in skeleton.STREAMS.items()}
        streams = streams or sign_streams.check(built_in, 'sign_skeleton')
        last, (_, end, _) = list(streams.items())[-1]
        if end > skeleton.FEATURES:
            raise UserError(
                f'data.streams: {last!r} ends at {end}, the built-in has {skeleton.FEATURES}'
            )
        sizes = dict(synthetic_sizes or {})
        plan = sentences.catalogue(seed, sizes)
        splits = tuple(plan)
        kind = 'synthetic'
        settings = [seed, sorted(sizes.items()), prepare.source_digest(*GENERATOR)]
        read = functools.partial(sentences.records, seed=seed, plan=plan)
    else:
        folder = sign_folder.open_folder(root, streams)
        splits = tuple(folder.rows)
        streams = folder.streams
        kind = 'folder'
        settings = [folder.digest]
        read = folder.records
    prepared = prepare.prepare_cached(
        cache_dir,
        f'sign_{kind}',
        settings,
        version=VERSION,
        splits={split: functools.partial(read, split) for split in splits},
        blobs=('features',),
        index=_index,
        **options,
    )
    return PreparedSequences(prepared.directory, splits, streams)


def _index(record: Mapping[str, Any]) -> dict[str, Any]:
    words = record['words']
    repeats = sum(one == two for one, two in itertools.pairwise(words))
    return {
        'length': np.int32(len(records.unpack(record['features']))),
        'n_labels': np.int32(len(words)),
        'needed': np.int32(len(words) + repeats),
        'words': ' '.join(words),
    }


class SignSequences(prepare.PreparedDataset):
    """One prepared split; a row is a sentence.

    index: length (frames), n_labels, needed (frames that CTC needs: labels and repeats). lengths:
    see `buckets`; streams: name → columns of an example's features. counts: also unknown_words and
    unalignable_rows (length < needed, or an unknown word).
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
            longer sequences gets one more.
        """
        super().__init__(prepared, split)
        self.vocabulary = vocabulary
        self.normalization = normalization
        self.augmentation = augmentation
        self.streams = normalization.output_streams
        indices = {name: prepared.index(name) for name in prepared.splits}
        longest = max(int(index['n_labels'].max()) for index in indices.values())
        self._max_labels = -(-longest // 4) * 4
        self.lengths = self._lengths(indices['train']['length'], buckets)
        # By record.
        self._words = [tuple(words.split()) for words in self.index.pop('words').tolist()]
        self._labels = [vocabulary.encode(words) for words in self._words]
        unknown = np.array([np.sum(labels == UNKNOWN_ID) for labels in self._labels])
        too_short = self.index['length'] < self.index['needed']
        self.counts['unknown_words'] = int(unknown.sum())
        self.counts['unalignable_rows'] = int((too_short | (unknown > 0)).sum())

    def _lengths(self, trained: np.ndarray, buckets: int | Sequence[int]) -> tuple[int, ...]:
        if isinstance(buckets, int):
            stretch = self.augmentation.stretch[1] if self.augmentation else 1.0
            longest = np.ceil(trained * stretch - 1e-6)
            buckets = samplers.bucket_lengths(longest, buckets)
        longest = int(self.index['length'].max())
        beyond = longest > max(buckets) and self.split != 'train'
        return tuple(sorted({*buckets, *([-(-longest // 8) * 8] if beyond else [])}))

    def words(self, row: int) -> tuple[str, ...]:
        """Returns the reference of a row, words unknown to the vocabulary included."""
        return self._words[self._rows[row]]

    def packed_lengths(self, rows: int) -> dict[int, float]:
        """Returns frames per row that nearly all training batches of `rows` rows need, by length.

        Batches have one length each, their rows drawn and stretched at random: two standard errors
        above the mean, as few rows vary much, and one batch in 44 may take a third longer. Lengths
        without rows, or for which packing saves nothing, are left out: `samplers.packed_length`.
        """
        low, high = self.augmentation.stretch if self.augmentation else (1.0, 1.0)
        longest = np.ceil(self.index['length'] * high - 1e-6)
        bucket = np.searchsorted(self.lengths, longest)
        packed = {}
        for i, length in enumerate(self.lengths):
            frames = self.index['length'][bucket == i].astype(float)
            if len(frames):
                # Rows of a batch differ: few rows leave little to draw.
                rest = max(len(frames) - rows, 0) / max(len(frames) - 1, 1)
                tempo = (low + high) / 2
                spread = (high - low) ** 2 / 12
                variance = rest * tempo**2 * frames.var() + spread * (frames**2).mean()
                room = samplers.packed_length(
                    tempo * frames.mean(), variance, rows, length, standard_errors=2.0
                )
                packed |= {length: room} if room else {}
        return packed

    def with_features(self, features: np.ndarray) -> 'SignSequences':
        """Returns a split of one row without words, from [T, F] as in the files."""
        length = len(features)
        return self.with_record(
            {'features': records.pack(features)},
            {'length': np.int32(length), 'n_labels': np.int32(0), 'needed': np.int32(0)},
            lengths=(-(-length // 8) * 8,) if length > max(self.lengths) else self.lengths,
            _words=[()],
            _labels=[np.zeros(0, np.int32)],
        )

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
        labels = self._labels[self._rows[row]]
        return {'features': features, 'labels': labels, 'length': np.int32(len(features))}

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
        bucket = bucket or self.lengths[-1]
        length = np.array([example['length'] for example in examples])
        if length.max() > bucket:
            raise UserError(f'a sequence of {length.max()} frames in a bucket of {bucket}')
        width = examples[0]['features'].shape[1]
        features = np.zeros((len(examples), bucket, width), np.float32)
        labels = np.zeros((len(examples), self._max_labels), np.int32)
        for row, example in enumerate(examples):
            features[row, : example['length']] = example['features']
            labels[row, : len(example['labels'])] = example['labels']
        n_labels = np.array([len(example['labels']) for example in examples])
        return {
            'features': features,
            'frames': np.arange(bucket) < length[:, None],
            'labels': labels,
            'label_mask': np.arange(self._max_labels) < n_labels[:, None],
            'length': length.astype(np.int32),
        }

    def fingerprint(self) -> dict[str, str | int]:
        words = ' '.join(self.vocabulary.words).encode()
        statistics = self.normalization.mean.tobytes() + self.normalization.std.tobytes()
        return super().fingerprint() | {
            'vocabulary': hashlib.sha256(words).hexdigest(),
            'normalization': hashlib.sha256(statistics).hexdigest(),
        }
