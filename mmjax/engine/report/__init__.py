"""Makes report.html, the page of a run: `python -m mmjax.engine.report WORKDIR`.

It reads only files of the run (config.json, metrics.jsonl, results.json, figures/*.png), so it
works at any time, also for a run that has just started or was killed. The page names what is
missing.
"""

from collections.abc import Callable, Iterable

from etils import epath

from mmjax.engine import logs
from mmjax.engine.report import page, parts
from mmjax.engine.report.files import RunFiles
from mmjax.errors import UserError


def write(workdir: epath.PathLike) -> epath.Path:
    """Writes `workdir`/report.html; returns its path. Raises UserError if there is no folder."""
    workdir = epath.Path(workdir)
    if not workdir.is_dir():
        raise UserError(f'{workdir} is not the folder of a run')
    run = RunFiles(workdir)
    body = [_make(part, run) for part in parts.ALL]
    path = workdir / 'report.html'
    logs.replace(path, page.document(f'{workdir.name} · mmjax', body).encode())
    return path


def _make(part: Callable[[RunFiles], Iterable[page.Markup]], run: RunFiles) -> page.Markup:
    """Returns one part of the page, or its error as a note: a report must not end a run."""
    try:
        return page.join(part(run))
    except Exception as error:
        return page.note(f'The part “{part.__name__}” could not be made: {error!r}')
