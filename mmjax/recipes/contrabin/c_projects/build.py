"""Compiles C files of unknown origin within limits, and returns the listings of their functions.

Nothing is ever linked or run. The compiler has a clean environment, a folder of its own, and limits
of time, memory and output. It and the assembler may read only the project and the system's headers,
which is checked by their own lists of what they read. Precompiled headers, which would be loaded
into the compiler unchecked, are never used.
"""

import dataclasses
import functools
import itertools
import math
import os
import pathlib
import re
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Sequence

from mmjax.errors import RecordError, UserError
from mmjax.recipes.contrabin.c_projects import canonical

LEVELS = ('O0', 'O1', 'O2', 'O3')
_INPUT = 2_000_000  # bytes of a C file
_MEMORY = 2 << 30  # bytes of a process
_OUTPUT = 64 << 20  # bytes of a file that it writes
_HEADER_FOLDERS = 64

# One machine's defaults are not another's, so that what changes the code is written out.
_COMMON = ('-g0', '-w', '-fPIE', '-fno-stack-protector', '-fno-asynchronous-unwind-tables')
_FLAGS = {
    # Static functions that were inlined everywhere stay too, which also keeps them from being
    # cloned or merged; none is cut in two, so that all of it stands under its name. Inlining into
    # callers is left as it is in any binary.
    'gcc': (
        *_COMMON,
        '-fmax-errors=1',
        '-fcf-protection=none',
        '-ffunction-sections',
        '-fkeep-static-functions',
        '-fkeep-inline-functions',
        '-fno-partial-inlining',
        '-fno-reorder-blocks-and-partition',
    ),
    'clang': (*_COMMON, '-ferror-limit=1', '-emit-llvm'),
}
_FLAG = re.compile(r'-D[A-Za-z_]\w*(=.*)?|-I.+|-std=(c|gnu|iso)[\w:]+', re.S)
_ABSOLUTE = re.compile(rb'^\s*(?:#|%:|\?\?=)\s*(?:include(?:_next)?|import|embed)\s*[<"]\s*/', re.M)
_EMBED = re.compile(rb'^\s*(?:#|%:|\?\?=)\s*embed\b', re.M)
# Directives of the assembler that read files, or that could spell one of those, as what a macro
# substitutes after a backslash could. No compiler emits one, nor a backslash but in a text.
_READS = re.compile(
    r'(?<![\w$.])\.(inc\w*|macro|endm|exitm|purgem|i?re?p\w*|endr|altmacro|mri)\b', re.I
)
_TEXT = re.compile(
    r'\s*(?:\.(?:string|ascii|asciz|file|ident)\s+|#\s*\d+\s+)"(\\.|[^"\\])*"[\s\d]*'
)


def find_projects(
    root: pathlib.Path,
) -> tuple[dict[str, list[pathlib.Path]], dict[str, tuple[pathlib.Path, ...]], Counter[str]]:
    """Lists the C files under an absolute folder, sorted; no link is followed.

    Returns:
      Two dicts by top-level folder ('.' for files of the root itself), of its C files, and of the
      folders with headers and those above them, whose headers are included as "folder/name.h"; and
      how many files, and links to folders, are left out, by reason.

    Raises:
      UserError: no C file in the folder.
    """
    files: dict[str, list[pathlib.Path]] = {}
    headers: dict[str, tuple[pathlib.Path, ...]] = {}
    skipped: Counter[str] = Counter()
    for directory, folders, names in os.walk(root):
        folders.sort()
        here = pathlib.Path(directory)
        project = '.' if here == root else here.relative_to(root).parts[0]
        known = headers.setdefault(project, ())
        if any(name.endswith('.h') for name in names):
            above = (folder for folder in here.parents if folder.is_relative_to(root / project))
            headers[project] = tuple(dict.fromkeys((*known, here, *above)))
        skipped['link'] += sum((here / folder).is_symlink() for folder in folders)
        for path in sorted(here / name for name in names if name.endswith('.c')):
            if path.is_symlink() or not path.is_file():
                skipped['link' if path.is_symlink() else 'no_file'] += 1
            elif path.stat().st_size > _INPUT:
                skipped['too_large'] += 1
            else:
                files.setdefault(project, []).append(path)
    if not files:
        raise UserError(f'{root} holds no C file (*.c)')
    return files, headers, skipped


@dataclasses.dataclass(frozen=True)
class Compiler:
    """A compiler of this machine; kind: 'gcc' (binaries are assembly) or 'clang' (LLVM IR)."""

    kind: str
    path: str
    name: str  # kind and version
    headers: tuple[str, ...]  # folders of the system's headers
    identity: str  # the first line of `--version` of each program


def find_compiler(choice: str = 'auto') -> Compiler:
    """Finds clang or else gcc ('auto'), or the one named; gcc needs objdump too.

    Raises:
      UserError: a program that is not on the PATH or does not answer.
    """
    kind = choice if choice != 'auto' else ('clang' if shutil.which('clang') else 'gcc')
    programs = (kind, 'objdump') if kind == 'gcc' else (kind,)
    for program in programs:
        if not shutil.which(program):
            raise UserError(f'{program} is not on the PATH: install it (Debian: clang, binutils)')
    path = shutil.which(kind)
    version = '-dumpfullversion' if kind == 'gcc' else '-dumpversion'
    run = functools.partial(
        subprocess.run,
        env=_environment('/tmp'),
        stdin=subprocess.DEVNULL,
        text=True,
        capture_output=True,
        timeout=60,
        check=True,
    )
    try:
        number = run([path, version]).stdout.strip()
        verbose = run([path, '-E', '-v', '-x', 'c', os.devnull]).stderr
        lines = [run([program, '--version']).stdout.partition('\n')[0] for program in programs]
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(f'{path} does not answer: {error}') from error
    listed = verbose.partition('#include <...>')[2].partition('End of search list')[0]
    folders = tuple(os.path.realpath(line.strip()) for line in listed.splitlines()[1:])
    return Compiler(kind, path, f'{kind}-{number}', folders, '; '.join(lines))


def check_flags(flags: Sequence[str]) -> tuple[str, ...]:
    """Returns the user's flags, folders of `-I` made absolute; only -D, -I and -std are allowed.

    Raises:
      UserError: another flag, or an `-I` that is no folder.
    """
    checked = []
    for flag in flags:
        if not _FLAG.fullmatch(flag) or '\0' in flag:
            raise UserError(f'the compiler flag {flag!r} is none of -DNAME[=…], -IFOLDER, -std=…')
        if flag.startswith('-I'):
            folder = pathlib.Path(flag[2:]).expanduser()
            if not folder.is_dir():
                raise UserError(f'the compiler flag {flag!r} names no folder')
            flag = f'-I{folder.resolve()}'
        checked.append(flag)
    return tuple(checked)


def check_text(text: bytes, name: str) -> None:
    """Raises RecordError 'refused' for text that includes an absolute path or embeds files."""
    if _ABSOLUTE.search(text) or _EMBED.search(text):
        raise RecordError('refused', f'{name}: includes an absolute path or embeds a file')


@dataclasses.dataclass(frozen=True)
class Builder:
    """Compiles the files of one project.

    root: the project's folder, absolute and without links; header_folders: those within it that
    hold headers, or lie above some; flags: of `check_flags`; time_limit: seconds a run of a
    program; base: where the paths of messages begin, the root by default.
    """

    compiler: Compiler
    root: pathlib.Path
    header_folders: tuple[pathlib.Path, ...] = ()
    flags: tuple[str, ...] = ()
    time_limit: float = 20.0
    base: pathlib.Path | None = None

    def functions(self, file: pathlib.Path, level: str, folder: pathlib.Path) -> dict[str, str]:
        """Compiles one file of the root and returns symbol → listing of objdump or LLVM IR.

        Args:
          file: absolute path; level: 'O0' to 'O3'; folder: an empty folder to work in.

        Raises:
          RecordError: 'does_not_compile' with the first line of what the compiler says,
            'time_limit', or 'refused': it or the assembler read files outside the project, or its
            assembly might.
        """
        name = file.relative_to(self.base or self.root).as_posix()
        standard = () if any(f.startswith('-std=') for f in self.flags) else ('-std=gnu17',)
        assembly = folder / 'out.s'
        dependencies = folder / 'out.d'
        first = folder / 'first.h'
        assembly.unlink(missing_ok=True)
        # A token before all else: gcc takes no precompiled header after the first one, and whoever
        # wrote NAME.h.gch beside NAME.h would otherwise write into the compiler's memory.
        first.write_text(';\n')
        self._run(
            [
                self.compiler.path,
                *_FLAGS[self.compiler.kind],
                *standard,
                f'-{level}',
                *self.flags,
                *_searched(self.root, self.header_folders, file.parent),
                '-include',
                str(first),
                '-S',
                '-MD',
                '-MF',
                str(dependencies),
                '-o',
                str(assembly),
                str(file),
            ],
            folder,
            name,
        )
        self._check_read(dependencies, name)
        text = assembly.read_text(errors='replace')
        if self.compiler.kind == 'clang':
            return canonical.split_llvm(text)
        for line in text.splitlines():
            if (_READS.search(line) or '\\' in line) and not _TEXT.fullmatch(line):
                raise RecordError('refused', f'{name}: its assembly has {line.strip():.60}')
        assemble = [
            self.compiler.path,
            '-c',
            f'-Wa,--MD,{dependencies.name}',
            '-o',
            'out.o',
            str(assembly),
        ]
        self._run(assemble, folder, name)
        self._check_read(dependencies, name)
        listed = self._run(['objdump', '-d', '-r', '--no-show-raw-insn', 'out.o'], folder, name)
        return canonical.split_assembly(listed)

    def _check_read(self, listing: pathlib.Path, name: str) -> None:
        """Raises RecordError if a program's list names a file it may not read."""
        rule = listing.read_text(errors='replace').replace('\\\n', ' ')
        included = [flag[2:] for flag in self.flags if flag.startswith('-I')]
        local = map(os.path.realpath, (self.root, listing.parent))
        allowed = (*local, *self.compiler.headers, *included)
        for escaped in re.findall(r'(?:\\.|\S)+', rule.partition(': ')[2]):
            path = re.sub(r'\\(.)', r'\1', escaped).replace('$$', '$')
            real = os.path.realpath(listing.parent / path)
            if not any(real.startswith(folder.rstrip('/') + '/') for folder in allowed):
                raise RecordError('refused', f'{name}: reads {path}, outside the project')

    def _run(self, argv: list[str], folder: pathlib.Path, name: str) -> str:
        """Runs a program within the limits and returns what it wrote to standard output."""
        # Set by the shell: Python code between fork and exec may hang if there are threads.
        limits = (
            f'ulimit -t {math.ceil(self.time_limit) + 1} && ulimit -v {_MEMORY >> 10} && '
            f'ulimit -f {_OUTPUT >> 9} && ulimit -c 0 && exec "$@"'
        )
        stdout = folder / 'stdout'
        stderr = folder / 'stderr'
        with stdout.open('wb') as out, stderr.open('wb') as err:
            process = subprocess.Popen(
                ['/bin/sh', '-c', limits, 'sh', *argv],
                cwd=folder,
                env=_environment(str(folder)),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
            try:
                code = process.wait(self.time_limit)
            except BaseException as error:
                os.killpg(process.pid, signal.SIGKILL)  # the group: the driver has children
                process.wait()
                if not isinstance(error, subprocess.TimeoutExpired):
                    raise
                late = f'{name}: {pathlib.Path(argv[0]).name} took over {self.time_limit:g} s'
                raise RecordError('time_limit', late) from None
        if code:
            with stderr.open(errors='replace') as file:
                lines = [line.strip() for line in file.read(1 << 16).splitlines() if line.strip()]
            first = next((line for line in lines if 'error' in line), (lines or ['no message'])[0])
            first = first.replace(f'{self.base or self.root}/', '')
            text = first if first.startswith(name) else f'{name}: {first}'
            raise RecordError('does_not_compile', f'{text:.300}')
        return stdout.read_text(errors='replace')


@functools.lru_cache(maxsize=64)  # for all files of a folder, at all levels
def _searched(
    root: pathlib.Path, header_folders: tuple[pathlib.Path, ...], folder: pathlib.Path
) -> tuple[str, ...]:
    """Returns flags that search headers nearest to `folder` first, after the system's for `<…>`."""
    distance = lambda path: len(os.path.relpath(path, folder).split(os.sep))
    nearest = sorted({root, *header_folders}, key=lambda path: (distance(path), path))
    # Never -I: a string.h of the project would replace the system's.
    pairs = [('-iquote', str(path), '-idirafter', str(path)) for path in nearest[:_HEADER_FOLDERS]]
    return tuple(itertools.chain.from_iterable(pairs))


def _environment(temporary: str) -> dict[str, str]:
    path = os.environ.get('PATH', os.defpath)
    return {'PATH': path, 'LC_ALL': 'C', 'TMPDIR': temporary}
