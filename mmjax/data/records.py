"""Writes and reads records as a TFDS dataset of ArrayRecord shards, without TensorFlow.

Every shard is checked as it is opened.
"""

import contextlib
import io
import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mmjax.errors import UserError

Record = dict[str, Any]  # JSON values, and bytes under the keys declared as blobs
_SHARD_BYTES = 64 << 20


class Records:
    """The records of a prepared split by position. Picklable and safe to read from threads.

    Raises UserError, naming the shard, if a shard is missing, cut or unreadable: a shard cut at a
    block boundary opens without complaint and would yield nothing.
    """

    def __init__(self, directory: str | os.PathLike, split: str):
        import tensorflow_datasets as tfds
        from array_record.python import array_record_data_source, array_record_module

        self.directory = pathlib.Path(directory)
        self.split = split
        try:
            info = tfds.builder_from_directory(self.directory).info
        except Exception as error:
            raise self._fault(self.directory, f'cannot be opened ({error})') from error
        if split not in info.splits:
            raise UserError(f'{directory} holds no split {split!r}')
        lengths = info.splits[split].shard_lengths
        self._paths = [str(path) for path in info.splits[split].filepaths]
        self._ends = np.cumsum(lengths)
        for path, expected in zip(self._paths, lengths, strict=True):
            if not os.path.exists(path):
                raise self._fault(path, 'is missing')
            try:
                reader = array_record_module.ArrayRecordReader(path)
                number = reader.num_records()
            except Exception as error:  # the reader raises bare RuntimeErrors
                raise self._fault(path, f'cannot be read ({error})') from error
            if number != expected:
                raise self._fault(path, f'has {number} records where {expected} were written')
            reader.close()
        parts = [f'{path}[0:{n}]' for path, n in zip(self._paths, lengths, strict=True)]
        self._features = info.features
        self._readers = array_record_data_source.ArrayRecordDataSource(parts)  # opens lazily

    def __reduce__(self) -> tuple:
        return Records, (self.directory, self.split)

    def _fault(self, path: str | os.PathLike, what: str) -> UserError:
        return UserError(f'{path} {what}; remove {self.directory} to have it prepared again')

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, position: int) -> Record:
        position = int(position)
        if not 0 <= position < len(self):
            raise IndexError(f'record {position} of {len(self)} in split {self.split}')
        shard = self._paths[int(np.searchsorted(self._ends, position, side='right'))]
        try:
            data = self._readers[position]
        except Exception as error:
            raise self._fault(shard, f'cannot be read ({error})') from error
        if not data:  # None or no bytes, by the reader's version
            raise self._fault(shard, f'yields nothing for record {position}')
        fields = self._features.deserialize_example_np(data)
        return {**json.loads(fields.pop('json').decode()), **fields}


def write_splits(
    folder: pathlib.Path,
    name: str,
    version: str,
    blobs: Sequence[str],
    splits: Mapping[str, Iterable[Record]],
) -> None:
    """Writes splits to `folder` as a TFDS dataset, in shards of a bounded size."""
    import tensorflow_datasets as tfds
    from array_record.python import array_record_module
    from tensorflow_datasets.core import example_serializer, naming

    field = tfds.features.Tensor(shape=(), dtype=np.object_)
    features = tfds.features.FeaturesDict(dict.fromkeys(('json', *blobs), field))
    serializer = example_serializer.ExampleSerializer(features.get_serialized_info())
    template = naming.ShardedFileTemplate(
        dataset_name=name,
        data_dir=folder,
        filetype_suffix='array_record',
        template='{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}',
    )
    infos = []
    for split, records in splits.items():
        split_template = template.replace(split=split)
        lengths: list[int] = []
        sizes: list[int] = []
        with contextlib.ExitStack() as stack:
            for record in records:
                if not sizes or sizes[-1] >= _SHARD_BYTES:
                    stack.close()
                    path = split_template.sharded_filepath(shard_index=len(sizes), num_shards=None)
                    writer = array_record_module.ArrayRecordWriter(str(path), 'group_size:1')
                    stack.callback(writer.close)
                    lengths.append(0)
                    sizes.append(0)
                values = {key: value for key, value in record.items() if key not in blobs}
                fields = {'json': json.dumps(values), **{key: record[key] for key in blobs}}
                data = serializer.serialize_example(features.encode_example(fields))
                writer.write(data)
                lengths[-1] += 1
                sizes[-1] += len(data)
        infos.append(
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=lengths,
                num_bytes=sum(sizes),
                filename_template=split_template,
            )
        )
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=features,
        split_infos=infos,
        version=version,
        filename_template=template,
        check_data=False,  # it would read a record with TensorFlow
        disable_shuffling=True,
    )


def pack(array: np.ndarray) -> bytes:
    """Turns an array into bytes for a blob (.npy, no pickle); `unpack` reverses it."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def unpack(data: bytes) -> np.ndarray:
    """Reverses `pack`."""
    return np.load(io.BytesIO(data), allow_pickle=False)
