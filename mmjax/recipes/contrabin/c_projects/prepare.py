"""Makes rows of (source, comment, binary) from a folder of C projects, once, with a report.

    ROOT/PROJECT/….c  →  OUTPUT/train.jsonl.gz, val.jsonl.gz, test.jsonl.gz, report.json

A row is one function at one optimisation level, as `mmjax.recipes.contrabin.folder` reads it.
Functions defined in headers are not taken.
"""

import contextlib
import dataclasses
import functools
import gzip
import hashlib
import json
import os
import pathlib
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from typing import Any

from mmjax.data import prepare as data_prepare
from mmjax.data import tables
from mmjax.data.faults import Progress
from mmjax.errors import RecordError, UserError
from mmjax.recipes.contrabin.c_projects import build, canonical
from mmjax.recipes.contrabin.c_projects.parse import CFunction, content_key, functions
from mmjax.recipes.contrabin.data import VERSION

SPLITS = ('test', 'val', 'train')  # duplicates are kept in the first: no test row is in train
PARTS = ('files', 'functions', 'binaries', 'rows')  # of a report
_COMMENT_WORDS = 3
_COMMENT_TIMES = 2  # a comment above more functions of a file describes none of them
_EXAMPLES = 20


@dataclasses.dataclass
class FileResult:
    """The result of one file.

    functions: of each that is kept, the key of its content and its rows; counts: (part of the
    report, reason) → how many; examples: (reason, text).
    """

    functions: list[tuple[bytes, list[dict[str, Any]]]] = dataclasses.field(default_factory=list)
    counts: Counter[tuple[str, str]] = dataclasses.field(default_factory=Counter)
    examples: list[tuple[str, str]] = dataclasses.field(default_factory=list)


def compile_once(
    folder: str,
    cache: pathlib.Path,
    *,
    wait: bool,
    timeout: float = 600.0,
    progress: Progress = lambda *_: None,
    workers: int = 2,
    compiler: str = 'auto',
    **options,
) -> tuple[pathlib.Path, dict]:
    """Returns the folder of the rows under `cache`, made if needed, and the report on them.

    The options, path, size and time of change of every C file and header, the compiler and the
    code that prepares decide the folder's name.

    Args:
      folder, workers, compiler, options: of `prepare`; `workers` changes no row.
      cache: folder of prepared records.
      wait: leave it to another host, which has the same compiler, and poll until it is done.
      timeout: seconds without a sign of life of that host.
      progress: called while files are compiled.

    Raises:
      UserError: no such folder, a fault of the files, or nobody to wait for.
    """
    root = tables.data_root(folder, 'data.c_files')
    files = sorted(path for path in root.rglob('*') if path.suffix in ('.c', '.h'))
    stamps = [[str(path.relative_to(root)), *tables.file_stamp(path)] for path in files]
    makers = [
        build.find_compiler(compiler).identity,
        data_prepare.source_digest('recipes/contrabin/c_projects/*.py'),
    ]
    digest = data_prepare.settings_digest([VERSION, sorted(options.items()), stamps, makers])
    rows = cache / f'code-c-{digest}'
    report = rows / 'report.json'
    heartbeat = cache / f'.{rows.name}.heartbeat'
    if wait:
        what = f'{rows}: the process that compiles it'
        data_prepare.await_file(report, heartbeat, what, timeout, heartbeat)
    elif not report.is_file():

        def alive(split: str, done: int, total: int) -> None:
            heartbeat.touch()
            progress(split, done, total)

        options |= {'workers': workers, 'compiler': compiler, 'progress': alive}
        try:
            prepare(root, rows, **options)
        finally:
            with contextlib.suppress(OSError):  # the folder may not exist
                heartbeat.unlink()
    return rows, json.loads(report.read_text())


def prepare(
    root: str | os.PathLike,
    output: pathlib.Path,
    *,
    levels: Sequence[str] = build.LEVELS,
    compiler: str = 'auto',
    flags: Sequence[str] = (),
    split_by: str = 'project',
    val: float = 0.1,
    test: float = 0.1,
    seed: int = 0,
    min_instructions: int = 5,
    max_instructions: int = 400,
    symbols: bool = False,
    registers: str = 'keep',
    workers: int = 2,
    time_limit: float = 20.0,
    progress: Progress = lambda *_: None,
) -> dict[str, Any]:
    """Writes the three splits and report.json, all or none; returns the report.

    A project is a top-level folder of the root; files that lie in the root itself are one too.
    Projects, or files, are ranked by a hash of (seed, name); the first `test` of them are for test,
    the next `val` for val, at least one each if there are three. With fewer projects, files are
    split, and the report says so. Functions whose text is equal except for comments, white space
    and name are kept once, in the first split of test, val, train. Equal binaries of different
    functions are kept, and counted where an earlier split has them. The same rows make the same
    bytes.

    Args:
      output: a folder to make; one that another process has completed is left as it is.
      levels: of 'O0' to 'O3'.
      compiler, flags: of `build.find_compiler` and `build.check_flags`.
      split_by: 'project' or 'file'.
      val, test: fractions, in 0–1, of the projects, or files.
      min_instructions, max_instructions: other binaries are left out and counted.
      symbols, registers: of `canonical.canonical_assembly`.
      workers: files compiled at a time; the result does not depend on it.
      time_limit: seconds for one run of the compiler; a file that takes longer at one level keeps
        what came before it.
      progress: called after each file.

    Raises:
      UserError: a root that is no folder or holds no C file, a compiler, grammar or folder of a
        flag that is not there, no row at all, or an output that cannot be written to.
    """
    root = tables.data_root(root).resolve()
    files, headers, skipped = build.find_projects(root)
    found = build.find_compiler(compiler)
    options = (build.check_flags(flags), time_limit, root)
    builders = {
        project: build.Builder(found, root / project, folders, *options)
        for project, folders in headers.items()
    }
    note = ''
    if split_by == 'project' and len(files) < 3:
        split_by = 'file'
        note = f'split by file: {len(files)} projects make no three splits'
    parts = _assign(files, root, split_by, val, test, seed)
    form = functools.partial(canonical.canonical_assembly, registers=registers)
    if found.kind == 'clang':
        form = canonical.canonical_llvm
    write = functools.partial(form, symbols=symbols)
    bounds = (min_instructions, max_instructions)
    make = lambda job: _make(job[1], root, builders[job[0]], levels, bounds, write)
    counts = Counter({('files', reason): n for reason, n in skipped.items()})
    examples: dict[str, list[str]] = {}
    seen: set[bytes] = set()
    first_split: dict[bytes, str] = {}  # digest of a binary → the first split that has it
    pool = futures.ThreadPoolExecutor(workers)  # threads: they wait for compilers
    partial = output.with_name(f'.{output.name}.{os.getpid()}.partial')
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of a killed process that had the same id
        partial.mkdir(parents=True)
        for split in SPLITS:
            with gzip.GzipFile(partial / f'{split}.jsonl.gz', 'wb', mtime=0) as file:
                for done, result in enumerate(pool.map(make, parts[split]), 1):
                    counts.update(result.counts)
                    for reason, text in result.examples:
                        examples.setdefault(reason, []).append(text)
                    for key, rows in result.functions:
                        if key in seen:
                            counts['functions', 'equal_source'] += 1
                            continue
                        seen.add(key)
                        counts['functions', 'kept'] += 1
                        counts['rows', split] += len(rows)
                        for row in rows:
                            digest = hashlib.sha256(row['binary'].encode()).digest()
                            first = first_split.setdefault(digest, split)
                            counts['binaries', 'equal_in_another_split'] += first != split
                            file.write(json.dumps(row).encode() + b'\n')
                    progress(split, done, len(parts[split]))
        report = {
            'settings': {
                'compiler': found.name,
                'levels': list(levels),
                'flags': list(flags),
                'split_by': split_by,
                'val': val,
                'test': test,
                'seed': seed,
                'min_instructions': min_instructions,
                'max_instructions': max_instructions,
                'symbols': symbols,
                'registers': registers,
            },
            'note': note,
            **{
                part: {reason: n for (of, reason), n in counts.items() if of == part and n}
                for part in PARTS
            },
            'examples': {reason: texts[:_EXAMPLES] for reason, texts in examples.items()},
        }
        if not report['rows']:
            why = next((texts[0] for texts in examples.values()), 'see its comments')
            raise UserError(f'no function under {root} makes a row, for one: {why}')
        (partial / 'report.json').write_text(json.dumps(report, indent=1) + '\n')
        if not (output / 'report.json').is_file():
            os.replace(partial, output)
    except OSError as error:
        raise UserError(f'{output} cannot be written to: {error}') from error
    finally:
        pool.shutdown(cancel_futures=True)
        shutil.rmtree(partial, ignore_errors=True)
    return report


def _assign(
    files: Mapping[str, list[pathlib.Path]],
    root: pathlib.Path,
    split_by: str,
    val: float,
    test: float,
    seed: int,
) -> dict[str, list[tuple[str, pathlib.Path]]]:
    """Returns split → (project, file), in the order of paths."""
    every = [(project, file) for project in sorted(files) for file in files[project]]
    group = lambda entry: entry[0] if split_by == 'project' else str(entry[1].relative_to(root))
    rank = lambda name: hashlib.sha256(os.fsencode(f'{seed}/{name}')).digest()
    names = sorted({group(entry) for entry in every}, key=rank)
    count = lambda part: max(round(part * len(names)), int(part > 0 and len(names) >= 3))
    test_end = min(count(test), max(0, len(names) - 2))
    val_end = min(test_end + count(val), len(names) - 1)  # some are left to train on
    members = {
        'test': {*names[:test_end]},
        'val': {*names[test_end:val_end]},
        'train': {*names[val_end:]},
    }
    return {split: [e for e in every if group(e) in members[split]] for split in SPLITS}


def _make(
    file: pathlib.Path,
    root: pathlib.Path,
    builder: build.Builder,
    levels: Sequence[str],
    bounds: tuple[int, int],
    write: Callable[[str, str], str],
) -> FileResult:
    """Parses and compiles one file; one without a function to keep is not compiled."""
    name = os.fsencode(file.relative_to(root).as_posix()).decode(errors='replace')
    result = FileResult()
    counts = result.counts
    counts['files', 'found'] += 1
    described: list[CFunction] = []
    built: dict[str, dict[str, str]] = {}  # level → symbol → listing
    try:
        text = file.read_bytes()
        build.check_text(text, name)
        counts['files', 'not_utf8'] += text.decode(errors='ignore').encode() != text
        defined = functions(text)
        times = Counter(function.comment for function in defined if not function.fault)
        for function in defined:
            reason = function.fault or _comment_problem(function, times)
            counts.update([('functions', 'found'), ('functions', reason or 'commented')])
            described += [] if reason else [function]
        if not described:
            counts['files', 'nothing_to_compile'] += 1
            return result
        with tempfile.TemporaryDirectory(prefix='mmjax-code-') as folder:
            for level in levels:
                built[level] = builder.functions(file, level, pathlib.Path(folder))
    except (OSError, RecordError) as error:
        reason = getattr(error, 'reason', 'unreadable')
        result.examples.append((reason, f'{error}, at {level}' if built else str(error)))
        if reason != 'time_limit' or not built:
            counts['files', reason] += 1
            counts['functions', f'file_{reason}'] += len(described)
            return result
    counts['files', 'compiled'] += 1
    counts['binaries', 'time_limit'] += (len(levels) - len(built)) * len(described)
    shared = {'path': name, 'label': '', 'language': 'c', 'compiler': builder.compiler.name}
    for function in described:
        rows = []
        for level, listed in built.items():
            if function.name not in listed:
                counts['binaries', 'not_in_object'] += 1
                continue
            binary = write(listed[function.name], function.name)
            length = canonical.count_instructions(binary)
            if bounds[0] <= length <= bounds[1]:
                metadata = {**shared, 'opt_level': level, 'name': function.name}
                row = {'source': function.source, 'binary': binary, 'comment': function.comment}
                rows.append({**row, 'metadata': metadata})
            else:
                counts['binaries', 'too_short' if length < bounds[0] else 'too_long'] += 1
        if rows:
            result.functions.append((content_key(function.source, function.name), rows))
        counts['functions', 'no_binary'] += not rows
    return result


def _comment_problem(function: CFunction, times: Mapping[str, int]) -> str:
    """Returns why a comment does not describe its function, '' if it may.

    Args:
      times: how often each comment occurs in the file.
    """
    if not (comment := function.comment):
        return 'no_comment'
    words = [word for word in comment.split() if function.name not in word]
    if sum(bool(re.search(r'[^\W\d_]{2}', word)) for word in words) < _COMMENT_WORDS:
        return 'comment_too_short'
    return 'comment_repeated' if times[comment] > _COMMENT_TIMES else ''


def table(report: Mapping[str, Any]) -> str:
    """Returns a report of `prepare` as lines for a terminal."""
    settings = report['settings']
    lines = [f'{settings["compiler"]}, split by {settings["split_by"]}', report['note']]
    for part in PARTS:
        counts = (f'{reason.replace("_", " ")} {n:,}' for reason, n in report[part].items())
        lines.append(f'{part:<10}{", ".join(counts)}')
    for reason, texts in report['examples'].items():
        lines.append(f'{reason.replace("_", " ")}, for one: {texts[0]}')
    return '\n'.join(filter(None, lines))
