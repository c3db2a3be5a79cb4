"""Prepares signed sentences, a folder's or the built-in ones, and takes training's statistics."""

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

from mmjax.data import prepare, processes, records
from mmjax.data.faults import Ledger, Progress
from mmjax.errors import UserError
from mmjax.recipes.sign import folder as sign_folder
from mmjax.recipes.sign import streams as sign_streams
from mmjax.recipes.sign.augment import Normalization
from mmjax.recipes.sign.folder import Vocabulary
from mmjax.recipes.sign.streams import Columns

VERSION = '1.0.0'  # of the prepared records; raise it when their content changes
_CHUNK = 128  # built-in sentences that a process makes at a time
GENERATOR = ('recipes/sign/synthetic/*.py',)


@dataclasses.dataclass(frozen=True)
class PreparedSequences:
    """Prepared splits; streams: name → columns of their features, from left to right."""

    prepared: prepare.Prepared
    splits: tuple[str, ...]
    streams: Mapping[str, Columns]

    def sentences(self, split: str) -> list[tuple[str, ...]]:
        """Returns the words of every row."""
        return [tuple(words.split()) for words in self.prepared.index(split)['words'].tolist()]

    def vocabulary(self) -> Vocabulary:
        """Returns the words of the training split."""
        return Vocabulary.of(self.sentences('train'))

    def normalization(
        self, missing: str = 'zero', differences: bool = False, around: bool = True
    ) -> Normalization:
        """Returns the statistics of the training split, and only of that.

        They are taken in one pass, the first time, and kept beside the records.

        Args:
          missing, differences: see `Normalization`.
          around: tells landmarks around their mean point, in streams that say what landmarks are.
        """
        spans = {name: (start, end) for name, (start, end, _) in self.streams.items()}
        landmarks = {name: columns.coordinates for name, columns in self.streams.items()}
        coordinates = landmarks if around else dict.fromkeys(landmarks, 0)
        # The records do not depend on the streams, the statistics do.
        kind = json.dumps([list(spans.items()), missing, differences, coordinates])
        name = f'normalization-{hashlib.sha256(kind.encode()).hexdigest()[:16]}.npz'
        path = self.prepared.directory / name
        if path.is_file():
            return Normalization.load(path)
        found = (records.unpack(record['features']) for record in self.prepared.open('train'))
        result = Normalization.measure(found, spans, missing, differences, coordinates)
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
      streams: name → (start, end) or (start, end, coordinates), instead of those of the folder.
      seed, synthetic_sizes: of the built-in sentences, as `sign_synthetic.catalogue` has them.
      max_fault_share: share of a split's rows that may be faulty; these are skipped and listed.
      wait: leave the preparation to another host, and poll until it is done.

    Raises:
      UserError: a fault of the folder's structure, or too many faults of rows.
    """
    settings: list[Any] = [VERSION]
    if streams:
        streams = sign_streams.check(streams, 'data.streams')
    if root is None:
        from mmjax.recipes.sign.synthetic import sentences as sign_synthetic
        from mmjax.recipes.sign.synthetic import skeleton

        own = {n: (*span, skeleton.COORDINATES) for n, span in skeleton.STREAMS.items()}
        streams = streams or sign_streams.check(own, 'sign_skeleton')
        for name, (_, end, _) in streams.items():
            if end > skeleton.FEATURES:
                width = skeleton.FEATURES
                raise UserError(f'data.streams: {name!r} ends at {end}, the built-in has {width}')
        sizes = dict(synthetic_sizes or {})
        plan = sign_synthetic.catalogue(seed, sizes)
        splits = tuple(plan) if splits is None else tuple(splits)
        settings += ['synthetic', seed, sorted(sizes.items()), prepare.source_digest(*GENERATOR)]
        sources = {s: functools.partial(_performed, s, seed, plan[s]) for s in splits}
    else:
        folder = sign_folder.open_folder(root, splits, streams)
        splits, streams = tuple(folder.rows), folder.streams
        settings += ['folder', folder.digest]
        sources = {split: functools.partial(folder.records, split) for split in splits}
    digest = hashlib.sha256(json.dumps([*settings, splits]).encode()).hexdigest()[:16]
    kind = 'synthetic' if root is None else 'folder'
    prepared = prepare.prepare(
        pathlib.Path(cache_dir) / f'sign-{kind}-{digest}',
        name=f'sign_{kind}',
        version=VERSION,
        splits=sources,
        blobs=('features',),
        index=_index,
        max_fault_share=max_fault_share,
        progress=progress,
        wait=wait,
    )
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
    ledger.rows = len(rows)
    perform = functools.partial(_perform, seed, split)
    performed = processes.ordered(perform, rows, chunk=_CHUNK)
    for (signer, index), signing in zip(rows, performed, strict=True):
        yield {
            'id': f'{split}_{index:05d}',
            'signer': f'signer_{signer:03d}',
            'words': signing.glosses,
            'line': index,
            'features': records.pack(signing.features),
        }
        ledger.tick()


def _perform(seed: int, split: str, row: tuple[int, int]):
    from mmjax.recipes.sign.synthetic import sentences as sign_synthetic

    return sign_synthetic.sentence(seed, split, *row)
