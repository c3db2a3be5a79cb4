"""Reads a folder of signed sentences: tables and vocabulary, landmark files, the streams' columns.

    annotations/<split>.corpus.csv  columns id, signer and annotation, separated by |, others
                                    beside them as in PHOENIX-2014; glosses separated by spaces,
                                    nothing quoted
    features/<split>/<id>.npz       `features`: float16, float32 or float64 [frames, F]
    streams.json                    {name: [start, end]} over the F columns; those in none are
                                    left out. [start, end, n]: landmarks of n numbers each

Splits are train, dev (or val, and then called so) and test, if any. Faults of the folder's
structure raise UserError at once; faults of a row or its file are counted and listed by the
FaultReport. `features` or a split of it may be a link to elsewhere.
"""

import csv
import dataclasses
import functools
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from mmjax.data import records, tables
from mmjax.data.faults import FaultReport
from mmjax.errors import RecordError, UserError
from mmjax.recipes.sign import streams as sign_streams
from mmjax.recipes.sign.streams import Columns

BLANK = '<blank>'
BLANK_ID = 0
UNKNOWN = '<unknown>'  # a word that training lacks: no model can predict it
UNKNOWN_ID = -1
_COLUMNS = ('id', 'signer', 'annotation')


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The words a model can predict; `words[id]` is a word, `words[0]` the blank."""

    words: tuple[str, ...]

    @classmethod
    def of(cls, sentences: Iterable[Iterable[str]]) -> 'Vocabulary':
        """Makes the vocabulary of the training split: the blank, then words as first seen."""
        return cls((BLANK, *dict.fromkeys(word for words in sentences for word in words)))

    @classmethod
    def load(cls, path: str | os.PathLike) -> 'Vocabulary':
        """Reads `vocabulary.txt`, a word a line; the line's number, from 0, is the id.

        Raises:
          UserError: no such file, another first word than '<blank>', a word that stands twice, an
            empty line.
        """
        path = pathlib.Path(path)
        if not path.is_file():
            raise UserError(f'{path} does not exist')
        words = path.read_text('utf-8').removesuffix('\n').split('\n')
        if words[0] != BLANK:
            raise UserError(f'{path}: line 1 is {words[0]!r:.60}, not {BLANK!r}')
        seen: set[str] = set()
        for line, word in enumerate(words, start=1):
            if word.split() != [word] or word in seen:
                problem = 'stands twice' if word in seen else 'is not one word'
                raise UserError(f'{path}: line {line}: {word!r:.60} {problem}')
            seen.add(word)
        return cls(tuple(words))

    def save(self, path: str | os.PathLike) -> None:
        pathlib.Path(path).write_text('\n'.join(self.words) + '\n', 'utf-8')

    @functools.cached_property
    def _ids(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self.words) if i != BLANK_ID}

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, words: Iterable[str]) -> np.ndarray:
        """Returns int32 [words]: 1 … len − 1, or UNKNOWN_ID; never the blank."""
        return np.array([self._ids.get(word, UNKNOWN_ID) for word in words], np.int32)

    def decode(self, ids: np.typing.ArrayLike) -> tuple[str, ...]:
        """Reverses `encode`; UNKNOWN_ID becomes '<unknown>'."""
        return tuple(
            UNKNOWN if i == UNKNOWN_ID else self.words[i] for i in np.asarray(ids).tolist()
        )


@dataclasses.dataclass(frozen=True)
class Row:
    """One sentence of a table; `line` counts from 1, the header's."""

    line: int
    id: str
    signer: str
    words: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class SignFolder:
    """A folder whose structure has been checked.

    rows: split → its sentences in order; malformed: split → (line, problem); streams: name
    → columns, from left to right; width: F of the files; digest: of the tables and the files'
    sizes and times.
    """

    root: pathlib.Path
    rows: dict[str, list[Row]]
    malformed: dict[str, list[tuple[int, str]]]
    streams: dict[str, Columns]
    width: int
    digest: str

    def records(self, split: str, report: FaultReport) -> Iterator[dict[str, Any]]:
        """Yields {'id', 'signer', 'words', 'line', 'features'}; what is left out is reported."""
        report.rows = len(self.rows[split])
        report.malformed_rows(f'{_table(self.root, split)} line', self.malformed[split])
        for row in self.rows[split]:
            try:
                features = read_features(_features(self.root, split, row), self.width)
            except UserError as error:
                report.fault(error, row.line)
                continue
            if not_finite := int((~np.isfinite(features)).sum()):
                report.counts['values_not_finite'] += not_finite
            yield {**vars(row), 'features': records.pack(features)}


def open_folder(
    root: str | os.PathLike, streams: Mapping[str, Columns] | None = None
) -> SignFolder:
    """Checks the structure of a folder, and of its files the first that can be read.

    Args:
      streams: checked ones, instead of those of streams.json.

    Raises:
      UserError: a missing root, table or streams.json; a table without its columns or with an id
        twice, an id that leads elsewhere, the gloss '<blank>'; streams that overlap, or go
        beyond the columns of the files.
    """
    root = tables.data_root(root)
    streams = streams or sign_streams.read(root)
    read = {split: _read_table(_table(root, split)) for split in _splits(root)}
    rows = {split: sentences for split, (sentences, _) in read.items()}
    malformed = {split: problems for split, (_, problems) in read.items()}
    width, name = _width(root, rows)
    last, (_, end, _) = list(streams.items())[-1]
    if width < end:
        raise UserError(f'{root}: stream {last!r} ends at {end}, but {name} has {width}')
    files = [(_features(root, split, row),) for split in rows for row in rows[split]]
    digest = tables.folder_digest([_table(root, split) for split in rows], files, len(files))
    return SignFolder(root, rows, malformed, streams, width, digest)


def read_features(path: pathlib.Path, width: int | None = None) -> np.ndarray:
    """Reads the `features` of a file: float16 or float32 [frames, F].

    Raises:
      RecordError: no such file, not an .npz of plain arrays, another key, type or shape, another
        F than `width`, or more than half of the values not finite.
    """
    name = '/'.join(path.parts[-3:])
    if not os.path.isfile(path):  # unlike pathlib's, never raises
        raise RecordError('missing_features', f'{name} does not exist')
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if 'features' not in arrays:
                raise ValueError(f"it has no 'features', but {arrays.files}")
            features = arrays['features']
    except Exception as error:  # zipfile, zlib and NumPy raise a dozen kinds
        raise RecordError('unreadable_features', f'{name} cannot be read: {error}') from error
    dtype = features.dtype
    shape = features.shape
    fits = len(shape) == 2 and features.size and shape[1] == (width or shape[1])
    if dtype.kind != 'f' or dtype.itemsize > 8 or not fits:
        raise RecordError(
            'malformed_features',
            f'{name}: features are {dtype} {shape}, not float16, float32 or float64 '
            f'[frames, {width or "F"}]',
        )
    with np.errstate(over='ignore'):  # beyond float32 they count as not finite
        kept = np.float16 if dtype.itemsize == 2 else np.float32
        features = features.astype(kept, order='C', copy=False)
    fraction = float(np.mean(~np.isfinite(features)))
    if fraction > 0.5:
        raise RecordError('not_finite', f'{name}: {fraction:.0%} of the values are not finite')
    return features


def _table(root: pathlib.Path, split: str) -> pathlib.Path:
    return root / 'annotations' / f'{split}.corpus.csv'


def _features(root: pathlib.Path, split: str, row: Row) -> pathlib.Path:
    return root / 'features' / split / f'{row.id}.npz'


def _splits(root: pathlib.Path) -> tuple[str, ...]:
    splits = [s for s in ('train', 'dev', 'val', 'test') if _table(root, s).is_file()]
    if {'dev', 'val'} <= set(splits):
        raise UserError(f'{root / "annotations"} has both dev.corpus.csv and val.corpus.csv')
    for needed, names in (('train', {'train'}), ('dev', {'dev', 'val'})):
        if not names & set(splits):
            raise UserError(f'{_table(root, needed)} does not exist')
    return tuple(splits)


def _read_table(path: pathlib.Path) -> tuple[list[Row], list[tuple[int, str]]]:
    """Returns the rows of a table and (line, problem) of those that are none."""
    rows: dict[str, Row] = {}
    malformed = []
    for line, values, problem in tables.csv_rows(
        path, _COLUMNS, optional=('signer',), delimiter='|', quoting=csv.QUOTE_NONE
    ):
        if problem:
            malformed.append((line, problem))
            continue
        name, signer, annotation = values
        row = Row(line, name, signer, tuple(annotation.split()))
        tables.check_inside(name, f'{path}: line {line}')
        if BLANK in row.words:
            raise UserError(f'{path}: line {line}: the gloss {BLANK!r} is taken by CTC')
        if name in rows:
            raise UserError(f'{path}: lines {rows[name].line} and {line} have the id {name!r}')
        rows[name] = row
    if not rows:
        raise UserError(f'{path} has no sentence')
    return list(rows.values()), malformed


def _width(root: pathlib.Path, rows: dict[str, list[Row]]) -> tuple[int, str]:
    """Returns F of the first file that can be read, and that file's name."""
    files = [_features(root, split, row) for split in rows for row in rows[split][:100]]
    faults = []
    for path in files:
        try:
            return read_features(path).shape[1], '/'.join(path.parts[-3:])
        except RecordError as error:
            faults.append(error)
    raise UserError(f'{root}: of the first hundred files of a split none can be read: {faults[0]}')
