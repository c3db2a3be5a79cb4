"""Signed sentences as examples: normalised landmarks by frame, glosses, and the length of both."""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mmjax.data import builders, records, sign_folder
from mmjax.data.dataset import DataError, Dataset
from mmjax.data.ledger import Ledger, Progress
from mmjax.data.sign_augment import Augmentation, Normalization
from mmjax.data.sign_folder import UNKNOWN_ID, Vocabulary

VERSION = '1.0.0'  # of the prepared records; raise it when their content changes


@dataclasses.dataclass(frozen=True)
class PreparedSequences:
    """Prepared splits; streams: name → columns [start, end) of their features."""

    prepared: builders.Prepared
    splits: tuple[str, ...]
    streams: Mapping[str, tuple[int, int]]

    def sentences(self, split: str) -> list[tuple[str, ...]]:
        """Returns the words of every row."""
        return [tuple(words.split()) for words in self.prepared.index(split)['words'].tolist()]

    def vocabulary(self) -> Vocabulary:
        """Returns the words of the training split."""
        return Vocabulary.of(self.sentences('train'))

    def normalization(
        self, missing: str = 'zero', differences: bool = False, coordinates: int = 0
    ) -> Normalization:
        """Returns the statistics of the training split, and only of that.

        They are taken in one pass, the first time, and kept beside the records.

        Args:
          missing, differences, coordinates: see `Normalization`.
        """
        kind = f'{missing}-differences' if differences else missing
        kind += f'-{coordinates}' if coordinates else ''
        path = self.prepared.directory / f'normalization-{kind}.npz'
        if path.is_file():
            return Normalization.load(path)
        found = (records.unpack(record['features']) for record in self.prepared.open('train'))
        result = Normalization.measure(found, self.streams, missing, differences, coordinates)
        with contextlib.suppress(OSError):  # a cache that may be read only is as good
            partial = path.with_name(f'.{os.getpid()}-{path.name}')
            result.save(partial)
            os.replace(partial, path)
        return result


def prepare_sequences(
    root: str | os.PathLike | None,
    cache_dir: str | os.PathLike,
    *,
    splits: Sequence[str] | None = None,
    streams: Mapping[str, Sequence[int]] | None = None,
    seed: int = 0,
    synthetic_sizes: Mapping[str, int] | None = None,
    max_fault_share: float = 0.01,
    wait: bool = False,
    progress: Progress | None = None,
) -> PreparedSequences:
    """Checks every file once and writes the records of the splits under `cache_dir`.

    Features are copied into the records, as float16 or float32, so that a run reads few files.

    Args:
      root: folder in the format of `sign_folder`; None performs the built-in sentences.
      splits: those needed; None for train, dev (or val, where the folder calls it so) and, where
        the folder has one, test.
      streams: name → columns [start, end), instead of those of the folder.
      seed, synthetic_sizes: of the built-in sentences, as `sign_synthetic.catalogue` has them.
      max_fault_share: share of a split's rows that may be faulty; these are skipped and listed.
      wait: leave the preparation to another host, and poll until it is done.

    Raises:
      DataError: a fault of the folder's structure, or too many faults of rows.
    """
    settings: list[Any] = [VERSION, max_fault_share]
    if streams:  # the statistics beside the records are those of the streams
        streams = sign_folder.check_streams(streams, 'data.streams')
        settings.append(streams)
    if root is None:
        from mmjax.data import sign_skeleton, sign_synthetic

        width = max(end for _, end in sign_skeleton.STREAMS.values())
        streams = streams or dict(sign_skeleton.STREAMS)
        for name, (_, end) in streams.items():
            if end > width:
                raise DataError(f'data.streams: {name!r} ends at {end}, the built-in has {width}')
        sizes = dict(synthetic_sizes or {})
        plan = sign_synthetic.catalogue(seed, sizes)
        splits = tuple(plan) if splits is None else tuple(splits)
        settings += ['synthetic', seed, sorted(sizes.items()), _generator_digest()]
        sources = {s: functools.partial(_performed, s, seed, plan[s]) for s in splits}
    else:
        folder = sign_folder.open_folder(root, splits, streams)
        splits, streams = tuple(folder.rows), folder.streams
        settings += ['folder', folder.digest]
        sources = {split: functools.partial(folder.records, split) for split in splits}
    digest = hashlib.sha256(json.dumps([*settings, splits]).encode()).hexdigest()[:16]
    kind = 'synthetic' if root is None else 'folder'
    prepared = builders.prepare(
        pathlib.Path(cache_dir) / f'sign-{kind}-{digest}',
        name=f'sign_{kind}', version=VERSION, splits=sources, blobs=('features',), index=_index,
        max_fault_share=max_fault_share, progress=progress, wait=wait,
    )  # fmt: skip
    return PreparedSequences(prepared, splits, streams)


def _index(record: Mapping[str, Any]) -> dict[str, Any]:
    words = record['words']
    repeats = sum(one == two for one, two in itertools.pairwise(words))
    return {
        'length': np.int32(len(records.unpack(record['features']))),
        'n_labels': np.int32(len(words)),
        'needed': np.int32(len(words) + repeats),
        'signer': record['signer'],
        'words': ' '.join(words),
    }


def _performed(
    split: str, seed: int, rows: list[tuple[int, int]], ledger: Ledger
) -> Iterator[dict[str, Any]]:
    """Yields the built-in sentences of a split as records."""
    from mmjax.data import sign_synthetic

    ledger.rows = len(rows)
    for signer, index in rows:
        signing = sign_synthetic.sentence(seed, split, signer, index)
        yield {
            'id': f'{split}_{index:05d}',
            'signer': f'signer_{signer:03d}',
            'words': signing.glosses,
            'line': index,
            'features': records.pack(signing.features),
        }
        ledger.tick()


def _generator_digest() -> str:
    """Of the code that performs, so that a change of it is a change of the data."""
    sources = sorted(pathlib.Path(__file__).parent.glob('sign_s*.py'))
    return hashlib.sha256(b''.join(source.read_bytes() for source in sources)).hexdigest()


class SignSequences(Dataset):
    """One prepared split; a row is a sentence.

    index: length (frames), n_labels, needed (frames that CTC needs: labels and repeats), signer
    (its place in `signers`, those of all splits). lengths: see `buckets`; streams: name → columns
    of an example's features. skipped: reason → rows left out; counts: unknown_words,
    unalignable_rows (length < needed) and what was mended; unknown: word → how often.
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
          buckets: lengths that batches are padded to, or how many (at most) to choose: quantiles
            of the training lengths, stretched as augmentation may, rounded up to multiples of 8.
            A split for evaluation with longer sequences has one more.
        """
        self.split, self.vocabulary, self.normalization = split, vocabulary, normalization
        self.augmentation, self.streams = augmentation, normalization.output_streams
        summary, indices = prepared.prepared.summary, {}
        for name in prepared.splits:
            indices[name] = prepared.prepared.index(name)
        self._name, books = summary['name'], summary['splits'][split]
        self._digest, self._records = books['digest'], prepared.prepared.open(split)
        own = indices[split]
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
        self.skipped = dict(books['skipped'])
        self.counts = dict(books['counts']) | {
            'unknown_words': self.unknown.total(),
            'unalignable_rows': int((own['length'] < own['needed']).sum()),
        }

    def _lengths(self, trained: np.ndarray, buckets: int | Sequence[int]) -> tuple[int, ...]:
        if isinstance(buckets, int):
            stretch = self.augmentation.stretch[1] if self.augmentation else 1.0
            longest = np.ceil(trained * stretch - 1e-6)
            chosen = np.quantile(longest, np.arange(1, buckets + 1) / buckets)
            buckets = (-(-chosen // 8) * 8).astype(int).tolist()
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
        return self._records[int(row)]

    def example(self, row: int, rng: np.random.Generator, train: bool) -> dict[str, np.ndarray]:
        """Returns one sentence, normalised and then, when training, augmented.

        Returns:
          features: float32 [T, F']; labels: int32 [n], UNKNOWN_ID where training lacks the word;
          length: int32, T.
        """
        features = self.normalization(records.unpack(self.record(row)['features']))
        if train and self.augmentation:
            needed = int(self.index['needed'][row])
            features = self.augmentation(features, self.streams, needed, rng)
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
          DataError: a sequence is longer than the bucket.
        """
        bucket, length = bucket or self.lengths[-1], np.array([e['length'] for e in examples])
        if length.max() > bucket:
            raise DataError(f'a sequence of {length.max()} frames in a bucket of {bucket}')
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
