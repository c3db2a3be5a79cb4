"""Random access to the records of a prepared split, with every shard checked as it is opened."""

import io
import json
import os
import pathlib
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from mmjax.errors import UserError

Record = dict[str, Any]  # JSON values, and bytes under the keys declared as blobs


class Records(Sequence[Record]):
    """The records of a prepared split by position. Picklable and safe to read from threads.

    Raises UserError, naming the shard, where a shard is missing, cut or unreadable: a shard cut
    at a block boundary opens without complaint and would yield nothing.
    """

    def __init__(self, directory: str | os.PathLike, split: str):
        from array_record.python import array_record_module

        self.directory, self.split = pathlib.Path(directory), split
        info = self._load().splits.get(split)
        if info is None:
            raise UserError(f'{directory} holds no split {split!r}')
        self._paths = [str(path) for path in info.filepaths]
        self._ends = np.cumsum(info.shard_lengths)
        for path, expected in zip(self._paths, info.shard_lengths, strict=True):
            if not os.path.exists(path):
                raise self._fault(path, 'is missing')
            try:
                reader = array_record_module.ArrayRecordReader(path)
                found = reader.num_records()
            except Exception as error:  # the reader raises bare RuntimeErrors
                raise self._fault(path, f'cannot be read ({error})') from error
            if found != expected:
                raise self._fault(path, f'has {found} records where {expected} were written')
            reader.close()
        self._open()

    def _load(self):
        import tensorflow_datasets as tfds

        try:
            return tfds.builder_from_directory(self.directory).info
        except Exception as error:
            raise self._fault(self.directory, f'cannot be opened ({error})') from error

    def _open(self) -> None:
        self._lock, self._readers, self._features = threading.Lock(), None, None

    def _fault(self, path, what: str) -> UserError:
        return UserError(f'{path} {what}; remove {self.directory} to have it prepared again')

    def __getstate__(self):
        hidden = ('_lock', '_readers', '_features')
        return {key: value for key, value in self.__dict__.items() if key not in hidden}

    def __setstate__(self, state) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, position: int) -> Record:
        position = int(position)
        if not 0 <= position < len(self):
            raise IndexError(f'record {position} of {len(self)} in split {self.split}')
        if self._readers is None:
            with self._lock:
                if self._readers is None:
                    from array_record.python import array_record_data_source

                    starts = [0, *self._ends[:-1]]
                    spans = [e - s for s, e in zip(starts, self._ends, strict=True)]
                    names = [f'{p}[0:{n}]' for p, n in zip(self._paths, spans, strict=True)]
                    self._features = self._load().features
                    self._readers = array_record_data_source.ArrayRecordDataSource(names)
        shard = self._paths[int(np.searchsorted(self._ends, position, side='right'))]
        try:
            data = self._readers[position]
        except Exception as error:
            raise self._fault(shard, f'cannot be read ({error})') from error
        if not data:  # None or no bytes, as the reader's version has it
            raise self._fault(shard, f'yields nothing for record {position}')
        fields = self._features.deserialize_example_np(data)
        return {**json.loads(fields.pop('json').decode()), **fields}


def pack(array: np.ndarray) -> bytes:
    """Turns an array into bytes for a blob (.npy, no pickle); `unpack` reverses it."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def unpack(data: bytes) -> np.ndarray:
    """Reverses `pack`."""
    return np.load(io.BytesIO(data), allow_pickle=False)
