"""Compiles a folder of C projects once, and keeps the rows in the cache of prepared records."""

import hashlib
import json
import pathlib

from mmjax.data import prepare
from mmjax.data.faults import Progress
from mmjax.data.tables import file_stamp
from mmjax.errors import UserError
from mmjax.recipes.contrabin import data as code
from mmjax.recipes.contrabin.c_projects import build
from mmjax.recipes.contrabin.c_projects import prepare as code_prepare


def compile_once(
    folder: str,
    cache: pathlib.Path,
    *,
    wait: bool,
    timeout: float = 600.0,
    progress: Progress | None = None,
    workers: int = 2,
    compiler: str = 'auto',
    **options,
) -> tuple[pathlib.Path, dict]:
    """Returns the folder of the rows under `cache`, made if needed, and the report on them.

    The options, path, size and time of change of every C file and header, the compiler and the
    code that prepares decide the folder's name.

    Args:
      folder, workers, compiler, options: of `prepare.prepare`; `workers` changes no row.
      cache: folder of prepared records.
      wait: leave it to another host, which has the same compiler, and poll until it is done.
      timeout: seconds without a sign of life of that host.
      progress: called while files are compiled.

    Raises:
      UserError: no such folder, a fault of the files, or nobody to wait for.
    """
    root = pathlib.Path(folder).expanduser()
    if not root.is_dir():
        raise UserError(f'the folder of C code {root} is not a folder')
    files = sorted(path for path in root.rglob('*') if path.suffix in ('.c', '.h'))
    stamps = [[str(path.relative_to(root)), *file_stamp(path)] for path in files]
    makers = [
        build.find_compiler(compiler).identity,
        prepare.source_digest('recipes/contrabin/c_projects/*.py'),
    ]
    settings = json.dumps([code.VERSION, sorted(options.items()), stamps, makers])
    rows = cache / f'code-c-{hashlib.sha256(settings.encode()).hexdigest()[:16]}'
    report = rows / 'report.json'
    heartbeat = cache / f'.{rows.name}.heartbeat'
    if wait:
        what = f'{rows}: the process that compiles it'
        prepare.await_file(report, heartbeat, what, timeout, heartbeat)
    elif not report.is_file():
        cache.mkdir(parents=True, exist_ok=True)

        def alive(split: str, done: int, total: int) -> None:
            heartbeat.touch()
            if progress:
                progress(split, done, total)

        options |= {'workers': workers, 'compiler': compiler, 'progress': alive}
        try:
            code_prepare.prepare(root, rows, **options)
        finally:
            heartbeat.unlink(missing_ok=True)
    return rows, json.loads(report.read_text())
