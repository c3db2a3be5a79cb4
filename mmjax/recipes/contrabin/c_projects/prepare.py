"""Makes rows of (source, comment, binary) from a folder of C projects, and says what was left out.

    ROOT/PROJECT/….c  →  OUTPUT/train.jsonl.gz, val.jsonl.gz, test.jsonl.gz, report.json

A row is one function at one optimisation level, as `mmjax.recipes.contrabin.folder` reads it.
Functions defined in headers are not taken.
"""

import contextlib
import functools
import hashlib
import os
import pathlib
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from typing import Any, Literal

from mmjax.data.faults import Progress
from mmjax.errors import RecordError, UserError
from mmjax.recipes.contrabin import folder as code_jsonl
from mmjax.recipes.contrabin.c_projects import build, counts
from mmjax.recipes.contrabin.c_projects import canonical as code_canonical
from mmjax.recipes.contrabin.c_projects.parse import CFunction, functions

SPLITS = ('test', 'val', 'train')  # the order in which twins are kept: a test row has none in train
_COMMENT_WORDS = 3
_COMMENT_TIMES = 2  # what stands above more functions of a file tells none from another


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
    """Writes the three splits and report.json, all or none; returns the report of `code_books`.

    A project is a top-level folder of the root; files that lie in the root itself are one too.
    Projects, or files, are ranked by a hash of (seed, name); the first `test` of them are tested
    on, the next `val` validated, at least one each where there are three. With fewer projects,
    files are split, which the report says. Functions whose text is equal but for comments, blanks
    and name are kept once, in the first split of test, val, train. Equal binaries of different
    functions are counted and kept.

    Args:
      levels: of 'O0' to 'O3'.
      compiler, flags: as `code_build.find_compiler` and `check_flags` take them.
      val, test: shares in 0–1 of the projects, or files.
      min_instructions, max_instructions: other binaries are left out and counted.
      symbols, registers: as `code_canonical` takes them.
      workers: files compiled at a time; the result does not depend on it.
      time_limit: seconds for one run of the compiler; a file that takes longer at one level keeps
        what came before it.

    Raises:
      UserError: a root that is no folder or holds no C file, an argument out of its range, a
        compiler or grammar that is not installed, or not one row.
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
    found = build.find_projects(root)
    compiler = build.find_compiler(compiler)
    options = (build.check_flags(flags), time_limit, root)
    builders = {
        project: build.Builder(compiler, root / project, tuple(headers), *options)
        for project, headers in found.headers.items()
    }
    note = ''
    if split_by == 'project' and len(found.files) < 3:
        split_by, note = 'file', f'split by file: {len(found.files)} projects make no three splits'
    parts = _assign(found.files, root, split_by, val, test, seed)
    form = code_canonical.canonical_llvm
    if compiler.kind == 'gcc':
        form = functools.partial(code_canonical.canonical_assembly, registers=registers)
    asked = (levels, (min_instructions, max_instructions), functools.partial(form, symbols=symbols))
    make = lambda job: _make(*job, root, builders[job[0]], *asked)
    books = counts.Books(found)
    pool = futures.ThreadPoolExecutor(max(1, workers))  # threads: they wait for compilers
    with contextlib.ExitStack() as stack:
        writer = stack.enter_context(code_jsonl.Writer(pathlib.Path(output).expanduser(), SPLITS))
        stack.callback(pool.shutdown, cancel_futures=True)
        for split in SPLITS:
            told, whole = 0.0, len(parts[split])
            for done, made in enumerate(pool.map(make, parts[split]), 1):
                for row in books.rows(split, made):
                    row['metadata']['compiler'] = compiler.name
                    writer.write(split, row)
                if progress and (time.monotonic() - told > 0.5 or done == whole):
                    told = time.monotonic()
                    progress(split, done, whole)
        settings |= dict(compiler=compiler.name, split_by=split_by)
        report = dict(settings=settings, note=note, **books.report())
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
        raise UserError(f'val {val:g} and test {test:g} are no shares that leave some to train on')


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
    take = lambda share: max(round(share * len(names)), int(share > 0 and len(names) >= 3))
    tested = min(take(test), max(0, len(names) - 2))
    ends = min(tested + take(val), len(names) - 1)  # some are left to train on
    split_of = dict.fromkeys(names, 'train')
    split_of |= dict.fromkeys(names[tested:ends], 'val')
    split_of |= dict.fromkeys(names[:tested], 'test')
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
) -> counts.Made:
    """Parses and compiles one file; one without a function to keep is not compiled."""
    name = os.fsencode(file.relative_to(root).as_posix()).decode(errors='replace')
    made = counts.Made(project, name)
    made.files['found'] += 1
    wanted = []
    try:
        text = file.read_bytes()
        build.check_text(text, name)
        made.files['not_utf8'] += text.decode(errors='ignore').encode() != text
        found = functions(text, name)
        times = Counter(function.comment for function in found if not function.fault)
        for function in found:
            reason = function.fault or _lack(function, times)
            made.functions.update(['found', reason or 'commented'])
            wanted += [] if reason else [function]
        if not wanted:
            made.files['nothing_to_compile'] += 1
            return made
        with tempfile.TemporaryDirectory(prefix='mmjax-code-') as folder:
            built = _compiled(builder, file, levels, pathlib.Path(folder), made)
    except (OSError, RecordError) as error:
        reason = error.reason if isinstance(error, RecordError) else 'unreadable'
        made.examples.append((reason, str(error)))
        made.files[reason] += 1
        if wanted:
            made.functions[f'file_{reason}'] += len(wanted)
        return made
    made.files['compiled'] += 1
    if left := len(levels) - len(built):
        made.binaries['time_limit'] += left * len(wanted)
    for function in wanted:
        binaries = {}
        for level, listed in built.items():
            if function.name not in listed:
                made.binaries['not_in_object'] += 1
                continue
            binary = canonical(listed[function.name], function.name)
            count = code_canonical.count_instructions(binary)
            if bounds[0] <= count <= bounds[1]:
                binaries[level] = binary
            else:
                made.binaries['too_short' if count < bounds[0] else 'too_long'] += 1
        if binaries:
            made.kept.append((function, binaries))
        made.functions['no_binary'] += not binaries
    return made


def _compiled(
    builder: build.Builder,
    file: pathlib.Path,
    levels: Sequence[str],
    folder: pathlib.Path,
    made: counts.Made,
) -> dict[str, dict[str, str]]:
    """Returns level → symbol → listing; a level past the time limit ends it, unless it is first."""
    built = {}
    for level in levels:
        try:
            built[level] = builder.functions(file, level, folder)
        except RecordError as error:
            if error.reason != 'time_limit' or not built:
                raise
            made.examples.append(('time_limit', f'{error}, at {level}'))
            break
    return built


def _lack(function: CFunction, times: Mapping[str, int]) -> str:
    """Says why a comment does not describe its function; '' if it may. times: in this file."""
    if not (comment := function.comment):
        return 'no_comment'
    words = [word for word in comment.split() if function.name not in word]
    if sum(bool(re.search(r'[^\W\d_]{2}', word)) for word in words) < _COMMENT_WORDS:
        return 'comment_too_short'
    return 'comment_repeated' if times[comment] > _COMMENT_TIMES else ''
