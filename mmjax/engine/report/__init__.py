"""Makes report.html, the page of a run: `python -m mmjax.report WORKDIR`.

It reads only what the run left (config.json, metrics.jsonl, results.json, figures/*.png), so it
can be made at any time, also of a run that has just started or was killed: what is missing is
said on the page.
"""

import json

from etils import epath

from mmjax.engine import logs
from mmjax.engine.report import curves, page, parts
from mmjax.engine.report.curves import number
from mmjax.errors import UserError


class Left:
    """What a run left, read leniently; `faults` lists what could not be read."""

    def __init__(self, workdir: epath.Path):
        self.workdir, self.faults = workdir, []
        self.described = self._json('config.json')
        self.results = self._json('results.json')
        self.lines, bad = logs.read(workdir / 'metrics.jsonl')
        if bad:
            self.faults.append(f'metrics.jsonl: {bad} unreadable line(s) left out')
        folder = workdir / 'figures'
        found = folder.iterdir() if folder.exists() else ()
        self.figures = sorted(p for p in found if p.suffix == '.png' and p.name[0] != '.')
        self.spans = curves.spans(self.lines)
        plan = self.described.get('plan')
        plan = plan if isinstance(plan, list) else []
        self.plan = [entry for entry in plan if isinstance(entry, dict) and 'name' in entry]

    def _json(self, name: str) -> dict:
        path = self.workdir / name
        try:
            found = json.loads(path.read_text()) if path.exists() else {}
            if not isinstance(found, dict):
                raise ValueError(f'it holds a {type(found).__name__}, not an object')
            return found
        except (ValueError, OSError) as error:
            self.faults.append(f'{name} could not be read: {error}')
            return {}

    @property
    def step(self) -> int:
        return max((line['step'] for line in self.lines), default=0)

    @property
    def planned(self) -> int:
        return sum(entry.get('steps', 0) for entry in self.plan)

    def train(self, key: str) -> list[float]:
        """Returns the finite values of one key over the train lines."""
        found = (number(line.get(key)) for line in self.lines)
        return [value for value in found if value is not None and abs(value) < float('inf')]


def write(workdir) -> epath.Path:
    """Writes `workdir`/report.html and returns its path. Raises UserError if there is no folder."""
    workdir = epath.Path(workdir)
    if not workdir.is_dir():
        raise UserError(f'{workdir} is not the folder of a run')
    left = Left(workdir)
    body = [_safely(part, left) for part in parts.ALL]
    path = workdir / 'report.html'
    logs.replace(path, page.page(f'{workdir.name} · mmjax', body).encode())
    return path


def _safely(part, left: Left) -> page.Markup:
    """A report must never end a run: a part that cannot be made says so, the others stand."""
    try:
        return part(left)
    except Exception as error:
        name = part.__name__
        words = f'The part “{name}” could not be made: {type(error).__name__}: {error}'
        return page.element('p', words, class_='note')
