"""Prepares splits of any recipe as TFDS datasets of ArrayRecord shards, and opens them again.

A recipe yields records and says its version; the digest of its settings names the folder. A
prepared folder appears whole or not at all: shards, index and counts are written to a hidden
`.<name>.partial` folder beside it, which is renamed at the end, kept after a kill (its journal
lets the next run continue) and removed after a fault. TensorFlow is never imported.
"""

import contextlib
import copy
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
from typing import Any, Self, TypedDict, Unpack

import numpy as np

from mmjax.data import processes
from mmjax.data.dataset import Dataset
from mmjax.data.faults import FaultReport, Progress
from mmjax.data.records import Record, Records, write_splits
from mmjax.errors import UserError

Source = Callable[[FaultReport], Iterable[Record]]  # sets report.rows, then yields the records
_SUMMARY = 'prepared.json'


class Options(TypedDict, total=False):
    """What `prepare` takes and the content does not depend on."""

    max_fault_share: float
    wait: bool
    progress: Progress | None


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A complete folder of prepared splits."""

    directory: pathlib.Path

    @property
    def summary(self) -> dict[str, Any]:
        """`name`, `version` and, under `splits`, records, digest, rows, faults, skipped, counts."""
        return json.loads((self.directory / _SUMMARY).read_text())

    def index(self, split: str) -> dict[str, np.ndarray]:
        """Returns the small arrays kept beside the shards, each [records]."""
        return _load_arrays(self.directory / f'index-{split}.npz')

    def open(self, split: str) -> Records:
        return Records(self.directory, split)

    def cached_arrays(
        self, name: str, settings: Sequence[object], make: Callable[[], Mapping[str, np.ndarray]]
    ) -> dict[str, np.ndarray]:
        """Returns arrays derived from the records, made once and kept beside them.

        Args:
          name: begins the file's name, which ends in a digest of `settings`.
          settings: JSON values that decide the arrays.
        """
        path = self.directory / f'{name}-{settings_digest(settings)}.npz'
        if path.is_file():
            return _load_arrays(path)
        arrays = dict(make())
        with contextlib.suppress(OSError):  # a read-only cache is as good
            partial = path.with_name(f'.{os.getpid()}-{path.name}')
            _save_arrays(partial, arrays)
            os.replace(partial, path)
        return arrays


class PreparedDataset(Dataset):
    """One prepared split: records by row, their index, what was skipped, the fingerprint.

    A subclass says what an example is.

    skipped: reason → rows left out while preparing; counts: name → how often something was
    repaired.
    """

    def __init__(self, prepared: Prepared, split: str):
        """Opens a split; raises UserError if there is none of this name."""
        summary = prepared.summary
        if split not in summary['splits']:
            raise UserError(f'{prepared.directory} holds no split {split!r}')
        report = summary['splits'][split]
        self.prepared = prepared
        self.split = split
        self.index = prepared.index(split)
        self.skipped = dict(report['skipped'])
        self.counts = dict(report['counts'])
        self._names = {'name': summary['name'], 'version': summary['version']}
        self._digest = report['digest']
        self._records: Sequence[Record] | Records = prepared.open(split)
        self._rows = np.arange(len(self._records))  # row → position among the records

    def __len__(self) -> int:
        return len(self._rows)

    def record(self, row: int) -> Record:
        """Returns what was prepared of a row."""
        return self._records[int(self._rows[row])]

    def replace(self, **attributes: object) -> Self:
        """Returns a copy with other values of some attributes, like `dataclasses.replace`."""
        other = copy.copy(self)
        vars(other).update(attributes)
        return other

    def subset(self, rows: np.ndarray, split: str | None = None) -> Self:
        """Returns some of the rows, in the order given, under the name `split` if any."""
        return self.replace(
            split=split or self.split,
            skipped=dict(self.skipped),
            index={key: values[rows] for key, values in self.index.items()},
            _rows=self._rows[rows],
            _digest=hashlib.sha256(f'{self._digest} {rows.tolist()}'.encode()).hexdigest(),
        )

    def with_record(
        self, record: Record, entry: Mapping[str, object], **attributes: object
    ) -> Self:
        """Returns a split of one record, such as a file to predict.

        Args:
          entry: its entry of the index.
          attributes: as of `replace`.
        """
        index = {key: np.asarray([value]) for key, value in entry.items()}
        return self.replace(index=index, _records=[record], _rows=np.zeros(1, int), **attributes)

    def fingerprint(self) -> dict[str, str | int]:
        return {**self._names, 'split': self.split, 'size': len(self), 'digest': self._digest}


def cache_dir(given: str | None) -> pathlib.Path:
    """Returns the folder of prepared records: `given`, else $MMJAX_CACHE, else ~/.cache/mmjax."""
    return pathlib.Path(given or os.environ.get('MMJAX_CACHE', '~/.cache/mmjax')).expanduser()


def source_digest(*patterns: str) -> str:
    """Digests the code that makes data, so that a change of it is a change of the data.

    Args:
      patterns: of files below the package, like 'recipes/comic/synthetic/*.py'.
    """
    folder = pathlib.Path(__file__).parent.parent
    sources = [source for pattern in patterns for source in sorted(folder.glob(pattern))]
    return hashlib.sha256(b''.join(source.read_bytes() for source in sources)).hexdigest()


def settings_digest(settings: Sequence[object]) -> str:
    """Digests JSON values."""
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]


def prepare_cached(
    cache: str | os.PathLike,
    name: str,
    settings: Sequence[object],
    *,
    version: str,
    splits: Mapping[str, Source],
    blobs: Sequence[str] = (),
    index: Callable[[Record], Mapping[str, Any]] | None = None,
    **options: Unpack[Options],
) -> Prepared:
    """Calls `prepare` with the folder of the cache that a digest of the settings names.

    Args:
      name: of the data set, like 'comic_folder'; it begins the folder's name.
      settings: JSON values that decide the content: sizes, a digest of the tables or of the code
        that makes the records. `version` and the names of the splits need not be among them.
      version, splits, blobs, index, options: of `prepare`.
    """
    digest = settings_digest([version, list(splits), *settings])
    directory = pathlib.Path(cache) / f'{name.replace("_", "-")}-{digest}'
    return prepare(
        directory,
        name=name,
        version=version,
        splits=splits,
        blobs=blobs,
        index=index,
        **options,
    )


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
    """Writes the splits to `directory` unless they exist, and returns them.

    Processes of one machine take turns by a file lock; of several hosts one prepares and the
    others pass `wait`, which polls until the folder exists.

    Args:
      directory: the folder to make; its parents are made as needed.
      name: snake_case name of the TFDS dataset; `version` goes with it.
      splits: split → function that takes the split's FaultReport and yields its records in order.
      blobs: keys whose values are bytes, stored unchanged (encoded images, packed arrays).
      index: record → scalars kept as arrays in `index-<split>.npz`.
      max_fault_share: fraction of a split's rows that may be faulty; the others are skipped and
        listed in `skipped.jsonl`.
      timeout: seconds without a sign of life after which a waiting process gives up.

    Raises:
      UserError: too many faults, also if an earlier call that allowed more has made the folder; a
        split without records; nobody to wait for. Nothing of the attempt is left on disk.
    """
    processes.check_main()  # before the lock, which the parent holds
    directory = pathlib.Path(directory).absolute()
    partial = directory.parent / f'.{directory.name}.partial'
    if not (directory / _SUMMARY).is_file():
        if wait:
            what = f'{directory}: the process that prepares it'
            await_file(directory / _SUMMARY, partial / 'heartbeat', what, timeout, partial)
        else:
            new_report = lambda split: FaultReport(split, partial, max_fault_share, progress)
            build = functools.partial(_build, name, version, splits, blobs, index, new_report)
            _make(directory, partial, build)
    prepared = Prepared(directory)
    for split, report in prepared.summary['splits'].items():
        if report['faults'] > max_fault_share * report['rows']:
            raise UserError(
                f'{report["faults"]} of the {report["rows"]} rows of split {split} are faulty, '
                f'more than the allowed share of {max_fault_share:g}: see '
                f'{directory / "skipped.jsonl"}'
            )
    return prepared


def _make(
    directory: pathlib.Path, partial: pathlib.Path, build: Callable[[pathlib.Path], None]
) -> None:
    """Makes the folder unless another process of this machine has made it by now."""
    new_parents = [parent for parent in directory.parents if not parent.exists()]
    directory.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _locked(directory.parent / f'.{directory.name}.lock'):
            if (directory / _SUMMARY).is_file():
                return
            if directory.exists():
                raise UserError(f'{directory} is in the way: it holds no {_SUMMARY}; move it')
            built = partial / 'tfds'
            shutil.rmtree(built, ignore_errors=True)  # of a killed process
            built.mkdir(parents=True)
            try:
                build(built)
                os.replace(built, directory)
            except Exception:  # a kill or Ctrl-C keeps the journal for the next run
                shutil.rmtree(partial)
                raise
            shutil.rmtree(partial)
    except Exception:
        with contextlib.suppress(OSError):
            for parent in new_parents:  # innermost first; one that is not empty ends it
                parent.rmdir()
        raise


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
    done: pathlib.Path, heartbeat: pathlib.Path, what: str, timeout: float, partial: pathlib.Path
) -> None:
    """Waits for a file that another process makes.

    Args:
      heartbeat: a file that this process touches while it lives.
      what: the process, for the error.
      timeout: seconds without a touch after which the process counts as dead.
      partial: what it removes when it ends; if both are missing, it has failed.

    Raises:
      UserError: the process has ended or gives no sign of life.
    """
    seen = False
    last = None
    since = time.monotonic()
    while not done.is_file():
        touched = heartbeat.stat().st_mtime_ns if heartbeat.exists() else None
        if touched is not None and touched != last:
            seen = True
            last = touched
            since = time.monotonic()
        idle = time.monotonic() - since
        gone = seen and touched is None and not partial.exists() and idle > 2
        if (gone and not done.is_file()) or idle > timeout:
            why = 'ended without finishing' if gone else f'gave no sign of life for {timeout:g} s'
            raise UserError(f'{what} {why}')
        time.sleep(0.2)


def _build(
    name: str,
    version: str,
    splits: Mapping[str, Source],
    blobs: Sequence[str],
    index: Callable[[Record], Mapping[str, Any]] | None,
    new_report: Callable[[str], FaultReport],
    root: pathlib.Path,
) -> None:
    """Writes shards, index, summary and listing to `root`."""
    reports = {split: new_report(split) for split in splits}
    summaries: dict[str, dict] = {}

    def observed(split: str) -> Iterator[Record]:
        """Yields the records of a source, indexed and digested as they pass."""
        report = reports[split]
        columns: dict[str, list] = {}
        digest = hashlib.sha256()
        count = 0
        for record in splits[split](report):
            for key, value in (index(record) if index else {}).items():
                columns.setdefault(key, []).append(value)
            for key in sorted(record):
                value = record[key]
                data = value if isinstance(value, bytes) else json.dumps(value).encode()
                digest.update(f'{key} {len(data)} '.encode() + data)
            count += 1
            yield record
            report.advance()
        if not count:
            reasons = ', '.join(f'{reason} {n}' for reason, n in sorted(report.skipped.items()))
            raise UserError(
                f'split {split} has no usable record among {report.rows} rows '
                f'({reasons or "empty"})'
            )
        arrays = {key: np.asarray(values) for key, values in columns.items()}
        _save_arrays(root / f'index-{split}.npz', arrays)
        summaries[split] = {
            'records': count,
            'digest': digest.hexdigest(),
            'rows': report.rows,
            'faults': report.faults,
            'skipped': dict(report.skipped),
            'counts': dict(report.counts),
        }

    write_splits(root, name, version, blobs, {split: observed(split) for split in splits})
    with (root / 'skipped.jsonl').open('wb') as skipped:
        for report in reports.values():
            skipped.write(report.listing.read_bytes())
    summary = {'name': name, 'version': version, 'splits': summaries}
    (root / _SUMMARY).write_text(json.dumps(summary, indent=1))


def _load_arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


def _save_arrays(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    np.savez(path, **dict(arrays))  # type: ignore[arg-type]  # a key named allow_pickle
