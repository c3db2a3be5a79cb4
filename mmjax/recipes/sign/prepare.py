"""Prepares signed sentences, a folder's or the built-in ones, and measures training statistics."""

import dataclasses
import functools
import itertools
import os
from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import numpy as np

from mmjax.data import prepare, records
from mmjax.errors import UserError
from mmjax.recipes.sign import folder as sign_folder
from mmjax.recipes.sign import streams as sign_streams
from mmjax.recipes.sign.augment import Normalization
from mmjax.recipes.sign.folder import Vocabulary
from mmjax.recipes.sign.streams import Columns

VERSION = '1.0.0'  # of the prepared records; raise it when their content changes
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
    splits: Sequence[str] | None = None,
    streams: Mapping[str, Sequence[int]] | None = None,
    seed: int = 0,
    synthetic_sizes: Mapping[str, int] | None = None,
    **options: Unpack[prepare.Options],
) -> PreparedSequences:
    """Checks every file once and writes the records of the splits under `cache_dir`.

    Features are copied into the records, as float16 or float32, so that a run reads few files.

    Args:
      root: folder in the format of `sign_folder`; None performs the built-in sentences.
      splits: those needed; None for train, dev (or val, if the folder calls it so) and test, if the
        folder has one.
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
        for name, (_, end, _) in streams.items():
            if end > skeleton.FEATURES:
                width = skeleton.FEATURES
                raise UserError(f'data.streams: {name!r} ends at {end}, the built-in has {width}')
        sizes = dict(synthetic_sizes or {})
        plan = sentences.catalogue(seed, sizes)
        splits = tuple(plan) if splits is None else tuple(splits)
        kind = 'synthetic'
        settings = [seed, sorted(sizes.items()), prepare.source_digest(*GENERATOR)]
        read = functools.partial(sentences.records, seed=seed, plan=plan)
    else:
        folder = sign_folder.open_folder(root, splits, streams)
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
        'signer': record['signer'],
        'words': ' '.join(words),
    }
