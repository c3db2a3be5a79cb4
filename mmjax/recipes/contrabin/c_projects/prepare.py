"""Makes rows of (source, comment, binary) from a folder of C projects, with a report.

    ROOT/PROJECT/….c  →  OUTPUT/train.jsonl.gz, val.jsonl.gz, test.jsonl.gz, report.json

A row is one function at one optimisation level, as `mmjax.recipes.contrabin.folder` reads it.
Functions defined in headers are not taken.
"""

import contextlib
import dataclasses
import functools
import hashlib
import os
import pathlib
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any, Literal

from mmjax.data.faults import Progress
from mmjax.errors import RecordError, UserError
from mmjax.recipes.contrabin import folder as code_jsonl
from mmjax.recipes.contrabin.c_projects import build
from mmjax.recipes.contrabin.c_projects import canonical as code_canonical
from mmjax.recipes.contrabin.c_projects.parse import CFunction, content_key, functions

SPLITS = ('test', 'val', 'train')  # duplicates are kept in the first: no test row is in train
_COMMENT_WORDS = 3
_COMMENT_TIMES = 2  # a comment above more functions of a file describes none of them
_EXAMPLES = 20


@dataclasses.dataclass
class FileResult:
    """The result of one file: functions kept, with their binaries by level, and the counts."""

    project: str
    path: str
    kept: list[tuple[CFunction, dict[str, str]]] = dataclasses.field(default_factory=list)
    files: Counter[str] = dataclasses.field(default_factory=Counter)
    functions: Counter[str] = dataclasses.field(default_factory=Counter)
    binaries: Counter[str] = dataclasses.field(default_factory=Counter)
    examples: list[tuple[str, str]] = dataclasses.field(default_factory=list)  # (reason, text)


class Counts:
    """Counts what is kept and left out, and finds duplicates, across files and splits."""

    def __init__(self, projects: build.Projects):
        parts = ('files', 'functions', 'binaries', 'twins', 'rows')
        self._counts: dict[str, Counter[str]] = {part: Counter() for part in parts}
        self._counts['files'].update(projects.skipped)
        self._projects = {project: Counter() for project in sorted(projects.files)}
        self._examples: dict[str, list[str]] = {}
        self._sources: set[bytes] = set()
        self._binaries: dict[bytes, tuple[bytes, str, str]] = {}  # → source, level, split

    def rows(self, split: str, result: FileResult) -> Iterator[dict[str, Any]]:
        """Counts one file and yields the rows of its functions that are new."""
        for part in ('files', 'functions', 'binaries'):
            self._counts[part].update(getattr(result, part))
        for reason, text in result.examples:
            self._examples.setdefault(reason, []).append(text)
        local = self._projects[result.project]
        local.update(files=1, compiled=result.files['compiled'])
        local.update({key: result.functions[key] for key in ('found', 'commented')})
        for function, binaries in result.kept:
            key = content_key(function.source, function.name)
            if key in self._sources:
                self._counts['functions']['equal_source'] += 1
                continue
            self._sources.add(key)
            self._counts['functions']['kept'] += 1
            local.update({f'{split}_rows': len(binaries)})
            for level, binary in binaries.items():
                self._count_binary(binary, key, level, split)
                metadata = dict(path=result.path, label='', opt_level=level, language='c')
                row = dict(source=function.source, binary=binary, comment=function.comment)
                yield dict(row, metadata=dict(metadata, name=function.name))

    def _count_binary(self, binary: str, key: bytes, level: str, split: str) -> None:
        digest = hashlib.sha256(binary.encode()).digest()
        source, first_level, first_split = self._binaries.setdefault(digest, (key, level, split))
        self._counts['rows'][split] += 1
        twins = self._counts['twins']
        if source == key:
            twins['binary_equal_at_two_levels'] += first_level != level
        else:
            twins['binary_of_another_source'] += 1
            twins['binary_of_another_split'] += first_split != split

    def report(self) -> dict[str, Any]:
        counts = {part: dict(+counter) for part, counter in self._counts.items()}
        examples = {reason: texts[:_EXAMPLES] for reason, texts in self._examples.items()}
        projects = {name: dict(counter) for name, counter in self._projects.items()}
        return dict(counts, projects=projects, examples=examples)


def prepare(
    root: str | os.PathLike,
    output: str | os.PathLike,
    *,
    levels: Sequence[str] = build.LEVELS,
    compiler: str = 'auto',
    flags: Sequence[str] = (),
    split_by: Literal['project', 'file'] = 'project',
    val: float = 0.1,
    test: float = 0.1,
    seed: int = 0,
    min_instructions: int = 5,
    max_instructions: int = 400,
    symbols: bool = False,
    registers: code_canonical.Registers = 'keep',
    workers: int = 2,
    time_limit: float = 20.0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Writes the three splits and report.json, all or none; returns the report.

    A project is a top-level folder of the root; files that lie in the root itself are one too.
    Projects, or files, are ranked by a hash of (seed, name); the first `test` of them are for test,
    the next `val` for val, at least one each if there are three. With fewer projects, files are
    split, and the report says so. Functions whose text is equal except for comments, white space
    and name are kept once, in the first split of test, val, train. Equal binaries of different
    functions are counted and kept.

    Args:
      levels: of 'O0' to 'O3'.
      compiler, flags: of `build.find_compiler` and `build.check_flags`.
      val, test: fractions, in 0–1, of the projects, or files.
      min_instructions, max_instructions: other binaries are left out and counted.
      symbols, registers: of `canonical.canonical_assembly`.
      workers: files compiled at a time; the result does not depend on it.
      time_limit: seconds for one run of the compiler; a file that takes longer at one level keeps
        what came before it.

    Raises:
      UserError: a root that is no folder or holds no C file, an argument out of its range, a
        compiler or grammar that is not installed, or no row at all.
    """
    began = time.monotonic()
    settings = dict(
        levels=list(levels),
        flags=list(flags),
        split_by=split_by,
        val=val,
        test=test,
        seed=seed,
        min_instructions=min_instructions,
        max_instructions=max_instructions,
        symbols=symbols,
        registers=registers,
    )
    _check(levels, split_by, val, test)
    root = pathlib.Path(root).expanduser().resolve()
    projects = build.find_projects(root)
    compiler = build.find_compiler(compiler)
    options = (build.check_flags(flags), time_limit, root)
    builders = {
        project: build.Builder(compiler, root / project, tuple(headers), *options)
        for project, headers in projects.headers.items()
    }
    note = ''
    if split_by == 'project' and len(projects.files) < 3:
        split_by = 'file'
        note = f'split by file: {len(projects.files)} projects make no three splits'
    parts = _assign(projects.files, root, split_by, val, test, seed)
    form = code_canonical.canonical_llvm
    if compiler.kind == 'gcc':
        form = functools.partial(code_canonical.canonical_assembly, registers=registers)
    bounds = (min_instructions, max_instructions)
    canonical = functools.partial(form, symbols=symbols)
    make = lambda job: _make(*job, root, builders[job[0]], levels, bounds, canonical)
    counts = Counts(projects)
    pool = futures.ThreadPoolExecutor(max(1, workers))  # threads: they wait for compilers
    with contextlib.ExitStack() as stack:
        writer = stack.enter_context(code_jsonl.Writer(pathlib.Path(output).expanduser(), SPLITS))
        stack.callback(pool.shutdown, cancel_futures=True)
        for split in SPLITS:
            last_report = 0.0
            whole = len(parts[split])
            for done, result in enumerate(pool.map(make, parts[split]), 1):
                for row in counts.rows(split, result):
                    row['metadata']['compiler'] = compiler.name
                    writer.write(split, row)
                if progress and (time.monotonic() - last_report > 0.5 or done == whole):
                    last_report = time.monotonic()
                    progress(split, done, whole)
        settings |= dict(compiler=compiler.name, split_by=split_by)
        report = dict(settings=settings, note=note, **counts.report())
        if not sum(report['rows'].values()):
            why = next((texts[0] for texts in report['examples'].values()), 'see its comments')
            raise UserError(f'no function under {root} makes a row, for one: {why}')
        report['seconds'] = round(time.monotonic() - began, 1)
        writer.finish(report)
    return report


def _check(levels: Sequence[str], split_by: str, val: float, test: float) -> None:
    if not levels or set(levels) - {*build.LEVELS} or len({*levels}) < len(levels):
        known = ', '.join(build.LEVELS)
        raise UserError(f'levels are {tuple(levels)!r}; each of {known} may stand there once')
    if split_by not in ('project', 'file'):
        raise UserError(f"split_by is {split_by!r}; it may be 'project' or 'file'")
    if val < 0 or test < 0 or val + test >= 1:
        raise UserError(f'val {val:g} and test {test:g} do not leave some to train on')


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
    split_of = dict.fromkeys(names, 'train')
    split_of |= dict.fromkeys(names[test_end:val_end], 'val')
    split_of |= dict.fromkeys(names[:test_end], 'test')
    parts: dict[str, list[tuple[str, pathlib.Path]]] = {split: [] for split in SPLITS}
    for entry in every:
        parts[split_of[group(entry)]].append(entry)
    return parts


def _make(
    project: str,
    file: pathlib.Path,
    root: pathlib.Path,
    builder: build.Builder,
    levels: Sequence[str],
    bounds: tuple[int, int],
    canonical: Callable[[str, str], str],
) -> FileResult:
    """Parses and compiles one file; one without a function to keep is not compiled."""
    name = os.fsencode(file.relative_to(root).as_posix()).decode(errors='replace')
    result = FileResult(project, name)
    result.files['found'] += 1
    kept = []
    try:
        text = file.read_bytes()
        build.check_text(text, name)
        result.files['not_utf8'] += text.decode(errors='ignore').encode() != text
        defined = functions(text, name)
        times = Counter(function.comment for function in defined if not function.fault)
        for function in defined:
            reason = function.fault or _comment_problem(function, times)
            result.functions.update(['found', reason or 'commented'])
            kept += [] if reason else [function]
        if not kept:
            result.files['nothing_to_compile'] += 1
            return result
        with tempfile.TemporaryDirectory(prefix='mmjax-code-') as folder:
            built = _compiled(builder, file, levels, pathlib.Path(folder), result)
    except (OSError, RecordError) as error:
        reason = getattr(error, 'reason', 'unreadable')
        result.examples.append((reason, str(error)))
        result.files[reason] += 1
        if kept:
            result.functions[f'file_{reason}'] += len(kept)
        return result
    result.files['compiled'] += 1
    if left := len(levels) - len(built):
        result.binaries['time_limit'] += left * len(kept)
    for function in kept:
        binaries = {}
        for level, listed in built.items():
            if function.name not in listed:
                result.binaries['not_in_object'] += 1
                continue
            binary = canonical(listed[function.name], function.name)
            count = code_canonical.count_instructions(binary)
            if bounds[0] <= count <= bounds[1]:
                binaries[level] = binary
            else:
                result.binaries['too_short' if count < bounds[0] else 'too_long'] += 1
        if binaries:
            result.kept.append((function, binaries))
        result.functions['no_binary'] += not binaries
    return result


def _compiled(
    builder: build.Builder,
    file: pathlib.Path,
    levels: Sequence[str],
    folder: pathlib.Path,
    result: FileResult,
) -> dict[str, dict[str, str]]:
    """Returns level → symbol → listing; a level past the time limit ends it, unless it is first."""
    built = {}
    for level in levels:
        try:
            built[level] = builder.functions(file, level, folder)
        except RecordError as error:
            if error.reason != 'time_limit' or not built:
                raise
            result.examples.append(('time_limit', f'{error}, at {level}'))
            break
    return built


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
    lines = [f'{report["settings"]["compiler"]}, split by {report["settings"]["split_by"]}']
    lines += [report['note']] if report['note'] else []
    for part in ('files', 'functions', 'binaries', 'twins', 'rows'):
        counts = ', '.join(f'{key.replace("_", " ")} {n:,}' for key, n in report[part].items())
        lines.append(f'{part:<10}{counts}')
    width = max(map(len, report['projects']), default=0)
    for name, project in report['projects'].items():
        counts = ', '.join(f'{key.replace("_", " ")} {n:,}' for key, n in project.items())
        lines.append(f'  {name:<{width}}  {counts}')
    for reason, examples in report['examples'].items():
        lines.append(f'{reason.replace("_", " ")}, for one: {examples[0]}')
    return '\n'.join(lines)
