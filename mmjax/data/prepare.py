"""Prepares splits of any recipe as TFDS datasets of ArrayRecord shards, and opens them again.

A prepared folder appears whole or not at all: shards, index and books are written to a hidden
`.<name>.partial` folder beside it, which is renamed at the end, kept after a kill (its journal
lets the next run continue) and removed after a fault. TensorFlow is never imported.
"""

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mmjax.data import processes
from mmjax.data.faults import Ledger, Progress
from mmjax.data.records import Record, Records
from mmjax.errors import UserError

Source = Callable[[Ledger], Iterable[Record]]  # sets ledger.rows, then yields the records
_SUMMARY = 'prepared.json'
_SHARD_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A complete folder of prepared splits."""

    directory: pathlib.Path

    @property
    def summary(self) -> dict[str, Any]:
        """`name`, `version` and, under `splits`, records, digest, rows, faults, skipped, counts."""
        return json.loads((self.directory / _SUMMARY).read_text())

    def index(self, split: str) -> dict[str, np.ndarray]:
        """The small arrays kept beside the shards, each [records]."""
        with np.load(self.directory / f'index-{split}.npz', allow_pickle=False) as arrays:
            return {key: arrays[key] for key in arrays.files}

    def open(self, split: str) -> Records:
        return Records(self.directory, split)


def cache_dir(given: str | None) -> pathlib.Path:
    """Returns where prepared records are kept: `given`, else $MMJAX_CACHE, else ~/.cache/mmjax."""
    return pathlib.Path(given or os.environ.get('MMJAX_CACHE', '~/.cache/mmjax')).expanduser()


def source_digest(*patterns: str) -> str:
    """Digests the code that makes data, so that a change of it is a change of the data.

    Args:
      patterns: of files below the package, like 'recipes/comic/synthetic/*.py'.
    """
    folder = pathlib.Path(__file__).parent.parent
    sources = [source for pattern in patterns for source in sorted(folder.glob(pattern))]
    return hashlib.sha256(b''.join(source.read_bytes() for source in sources)).hexdigest()


def prepare(
    directory: str | os.PathLike,
    *,
    name: str,
    splits: Mapping[str, Source],
    blobs: Sequence[str] = (),
    index: Callable[[Record], Mapping[str, Any]] | None = None,
    version: str = '1.0.0',
    max_fault_share: float = 0.01,
    progress: Progress | None = None,
    wait: bool = False,
    timeout: float = 600.0,
) -> Prepared:
    """Writes the splits to `directory` unless they are there already, and returns them.

    The caller puts a digest of whatever decides the content into the folder's name. Processes of
    one machine take turns by a file lock; of several hosts one prepares and the others pass
    `wait`, which polls until the folder is there.

    Args:
      directory: the folder to make; its parents are made as needed.
      name: snake_case name of the TFDS dataset; `version` goes with it.
      splits: split → function that takes the split's Ledger and yields its records in order.
      blobs: keys whose values are bytes, stored as they are (encoded pictures, packed arrays).
      index: record → scalars kept as arrays in `index-<split>.npz`.
      max_fault_share: share of a split's rows that may be faulty; ends with UserError above it,
        also where an earlier call that allowed more has made the folder.
      timeout: seconds without a sign of life after which a waiting process gives up.

    Raises:
      UserError: too many faults, a split without records, or nobody to wait for. Nothing of the
        attempt is left on disk.
    """
    processes.check_main()  # before the lock, which the parent holds
    directory = pathlib.Path(directory).absolute()
    partial = _partial(directory)
    there = (directory / _SUMMARY).is_file()
    if wait and not there:
        what = f'{directory}: the process that prepares it'
        await_file(directory / _SUMMARY, partial / 'heartbeat', what, timeout, partial)
    elif not there:
        build = functools.partial(
            _build, partial / 'tfds', name, version, splits, blobs, index, max_fault_share, progress
        )
        _make(directory, build)
    prepared = Prepared(directory)
    _check_faults(prepared, max_fault_share)
    return prepared


def _make(directory: pathlib.Path, build: Callable[[], pathlib.Path]) -> None:
    """Makes the folder unless another process of this machine has made it meanwhile."""
    partial = _partial(directory)
    made = [parent for parent in directory.parents if not parent.exists()]
    directory.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _locked(directory.parent / f'.{directory.name}.lock'):
            if (directory / _SUMMARY).is_file():
                return
            if directory.exists():
                raise UserError(f'{directory} is in the way: it holds no {_SUMMARY}; move it')
            for stale in partial.glob('tfds*'):
                shutil.rmtree(stale)
            partial.mkdir(exist_ok=True)
            try:
                os.replace(build(), directory)
            except Exception:  # a kill or Ctrl-C keeps the journal for the next run
                shutil.rmtree(partial)
                raise
            shutil.rmtree(partial)
    except Exception:
        with contextlib.suppress(OSError):
            for parent in made:  # innermost first; one that is not empty ends it
                parent.rmdir()
        raise


def _check_faults(prepared: Prepared, share: float) -> None:
    for split, books in prepared.summary['splits'].items():
        if books['faults'] > share * books['rows']:
            raise UserError(
                f'{books["faults"]} of the {books["rows"]} rows of split {split} are faulty, more '
                f'than the allowed share of {share:g}: see {prepared.directory / "skipped.jsonl"}'
            )


def _partial(directory: pathlib.Path) -> pathlib.Path:
    return directory.parent / f'.{directory.name}.partial'


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[None]:
    while True:
        file = path.open('a')
        fcntl.flock(file, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                break
        file.close()  # its last holder removed the file that we waited for
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()


def await_file(
    done: pathlib.Path, beat: pathlib.Path, what: str, timeout: float, place: pathlib.Path
) -> None:
    """Waits for a file that another process makes.

    Args:
      beat: a file that this process touches while it lives.
      what: the process, for the error.
      timeout: seconds without a touch after which it is given up.
      place: what it removes when it ends: gone without the file, it has failed.

    Raises:
      UserError: the process has ended or gives no sign of life.
    """
    seen, last, since = False, None, time.monotonic()
    while not done.is_file():
        alive = beat.stat().st_mtime_ns if beat.exists() else None
        if alive is not None and alive != last:
            seen, last, since = True, alive, time.monotonic()
        idle = time.monotonic() - since
        gone = seen and alive is None and not place.exists() and idle > 2
        if (gone and not done.is_file()) or idle > timeout:
            why = 'ended without finishing' if gone else f'gave no sign of life for {timeout:g} s'
            raise UserError(f'{what} {why}')
        time.sleep(0.2)


def _build(root, name, version, splits, blobs, index, share, progress) -> pathlib.Path:
    """Runs the TFDS builder under `root`; returns the folder it made, with index and books."""
    import tensorflow_datasets as tfds

    summary = {'name': name, 'version': version, 'splits': {}}
    ledgers = {split: Ledger(split, root.parent, share, progress) for split in splits}
    builder = _builder(name, version, blobs, root)
    for split, source in splits.items():
        builder.sources[split] = _observed(split, source, index, ledgers[split], summary, root)
    builder.download_and_prepare(
        download_dir=root.with_name('tfds-downloads'),
        download_config=tfds.download.DownloadConfig(try_download_gcs=False),
    )
    built = pathlib.Path(builder.data_path)
    for extra in root.glob('index-*.npz'):
        extra.rename(built / extra.name)
    with (built / 'skipped.jsonl').open('wb') as skipped:
        for ledger in ledgers.values():
            skipped.write(ledger.listing.read_bytes())
    (built / _SUMMARY).write_text(json.dumps(summary, indent=1))
    return built


def _observed(split, source, index, ledger, summary, root) -> Callable[[], Iterator[Record]]:
    """Wraps a source so that its records are indexed and digested as they pass."""

    def records() -> Iterator[Record]:
        columns: dict[str, list] = {}
        digest, count = hashlib.sha256(), 0
        for record in source(ledger):
            for key, value in (index(record) if index else {}).items():
                columns.setdefault(key, []).append(value)
            for key in sorted(record):
                value = record[key]
                data = value if isinstance(value, bytes) else json.dumps(value).encode()
                digest.update(f'{key} {len(data)} '.encode() + data)
            count += 1
            yield record
        if not count:
            left = ', '.join(f'{reason} {n}' for reason, n in sorted(ledger.skipped.items()))
            raise UserError(
                f'split {split} has no usable record among {ledger.rows} rows ({left or "empty"})'
            )
        np.savez(root / f'index-{split}.npz', **{k: np.asarray(v) for k, v in columns.items()})
        summary['splits'][split] = {
            'records': count,
            'digest': digest.hexdigest(),
            'rows': ledger.rows,
            'faults': ledger.faults,
            'skipped': dict(ledger.skipped),
            'counts': dict(ledger.counts),
        }

    return records


def _builder(name: str, version: str, blobs: Sequence[str], root: pathlib.Path):
    """Returns a TFDS builder with empty `sources`; made here so that importing stays light."""
    import tensorflow_datasets as tfds
    from array_record.python import array_record_module
    from tensorflow_datasets.core import example_serializer, naming
    from tensorflow_datasets.core import splits as split_infos

    class Info(tfds.core.DatasetInfo):
        def initialize_from_bucket(self) -> None:
            """Looks for no published copy: no network, no temporary folder."""

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(version)
        code_path = None  # belongs to no package of TFDS, so there are no checksums to look up

        def __init__(self):
            self.sources: dict[str, Callable[[], Iterator[Record]]] = {}
            super().__init__(data_dir=root, file_format='array_record')

        def _info(self):
            field = tfds.features.Tensor(shape=(), dtype=np.object_)
            features = tfds.features.FeaturesDict(dict.fromkeys(('json', *blobs), field))
            return Info(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(split) for split in self.sources}

        def _generate_examples(self, split):
            for row, record in enumerate(self.sources[split]()):
                text = {key: value for key, value in record.items() if key not in blobs}
                yield row, {'json': json.dumps(text), **{key: record[key] for key in blobs}}

        def _download_and_prepare(self, dl_manager, download_config=None):
            # Records stream to shards of a bounded size: the base class buffers a gigabyte of
            # them and then spills through tf.io, which needs TensorFlow.
            features = self.info.features
            serializer = example_serializer.ExampleSerializer(features.get_serialized_info())
            infos = []
            for split, records in self._split_generators(dl_manager).items():
                template = naming.ShardedFileTemplate(
                    dataset_name=self.name,
                    data_dir=self.data_path,
                    split=split,
                    filetype_suffix='array_record',
                    template='{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}',
                )
                lengths, sizes, writer = [], [], None
                for _, record in records:
                    if writer is None or sizes[-1] >= _SHARD_BYTES:
                        if writer is not None:
                            writer.close()
                        path = template.sharded_filepath(shard_index=len(lengths), num_shards=None)
                        writer = array_record_module.ArrayRecordWriter(str(path), 'group_size:1')
                        lengths.append(0)
                        sizes.append(0)
                    data = serializer.serialize_example(features.encode_example(record))
                    writer.write(data)
                    lengths[-1] += 1
                    sizes[-1] += len(data)
                writer.close()
                infos.append(
                    split_infos.SplitInfo(
                        name=split,
                        shard_lengths=lengths,
                        num_bytes=sum(sizes),
                        filename_template=template,
                    )
                )
            self.info.set_splits(split_infos.SplitDict(infos))

        def _log_download_bytes(self) -> None:
            """Leaves the progress to the caller."""

        def _log_download_done(self) -> None:
            """Leaves the progress to the caller."""

    Builder.name = name
    return Builder()
