"""Makes report.html, the page of a run: `python -m mmjax.report WORKDIR`.

It reads only what the run left (config.json, metrics.jsonl, results.json, figures/*.png), so it
can be made at any time, also of a run that has just started or was killed: what is missing is
said on the page.
"""

import io
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from mmjax import logs, report_curves, report_page
from mmjax.data.dataset import DataError
from mmjax.report_curves import number
from mmjax.report_page import Markup, duration, element, join, show, table

_LARGE = 3_000_000  # bytes of a picture above which the page carries a reduced copy


class _Left:
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
        self.spans = report_curves.spans(self.lines)
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
    """Writes `workdir`/report.html and returns its path. Raises DataError if there is no folder."""
    workdir = epath.Path(workdir)
    if not workdir.is_dir():
        raise DataError(f'{workdir} is not the folder of a run')
    left = _Left(workdir)
    sections = (_header, _trained, _scores, _curves, _pictures, _data, _environment)
    body = [_safely(section, left) for section in sections]
    path = workdir / 'report.html'
    logs.replace(path, report_page.page(f'{workdir.name} · mmjax', body).encode())
    return path


def _safely(section, left: _Left) -> Markup:
    """A report must never end a run: a part that cannot be made says so, the others stand."""
    try:
        return section(left)
    except Exception as error:
        name = section.__name__.removeprefix('_')
        words = f'The part “{name}” could not be made: {type(error).__name__}: {error}'
        return element('p', words, class_='note')


def _note(words: str) -> Markup:
    return element('p', words, class_='note')


def _heading(words: str) -> Markup:
    return element('h2', words)


def _header(left: _Left) -> Markup:
    config = left.described.get('config') or {}
    if left.results:
        badge, kind = 'finished', 'good'
    elif left.lines:
        badge, kind = 'not finished', 'warn'
    else:
        badge, kind = 'nothing logged yet', 'warn'
    of = f'of {left.planned:,} planned' if left.planned else 'planned length unknown'
    items = [('updates', show(left.step), of)]
    if left.plan:
        stages = ', '.join(str(entry['name']) for entry in left.plan)
        items.append(('stages', show(len(left.plan)), show(stages)))
    best = left.results.get('best')
    if best:
        items.append((f'best {best["metric"]}', show(best['value']), f'at step {best["step"]:,}'))
    elif loss := left.train('loss'):
        items.append(('last training loss', show(loss[-1]), 'the last finite one logged'))
    if speed := left.train('examples_per_second'):
        items.append(('examples a second', show(statistics.median(speed)), 'median of the log'))
    if seconds := _seconds(left.lines):
        items.append(('time in updates', duration(seconds), 'from step_seconds in the log'))
    title = element('h1', left.workdir.name)
    parts = [
        element('div', title, element('span', badge, class_=f'badge {kind}'), class_='top'),
        element('p', 'Task ', element('b', show(config['task'])), class_='muted')
        if 'task' in config else '',
        element('pre', left.described.get('command', 'command unknown: no config.json')),
    ]  # fmt: skip
    if not left.results:
        parts.append(
            _note(
                'No results.json: the run is still going, or it was interrupted'
                f'{f" after step {left.step:,}" if left.lines else " before its first log line"}.'
            )
        )
    parts += [_note(fault) for fault in left.faults]
    return element('header', *parts, report_page.cards(items))


def _seconds(lines: Sequence[Mapping]) -> float:
    """Estimates the time spent in updates: step_seconds × the steps since the train line before."""
    total, last = 0.0, 0
    for line in lines:
        seconds = number(line.get('step_seconds'))
        if seconds is not None:
            total, last = total + seconds * (line['step'] - last), line['step']
    return total


def _trained(left: _Left) -> Markup:
    parts = [_heading('What was trained')]
    if not left.plan:
        return join([*parts, _note('The plan is unknown: config.json has none.')])
    done = {name: last - start for name, start, last in left.spans}
    parts.append(report_page.strip([(e['name'], e.get('steps', 0)) for e in left.plan]))
    rows = []
    for entry in left.plan:
        weights = entry.get('loss_weights') or {}
        rows.append((
            element('b', entry['name']), show(entry.get('steps')), show(done.get(entry['name'], 0)),
            show(entry.get('epochs')),
            ', '.join(f'{name} × {show(weight)}' for name, weight in weights.items()) or '–',
        ))  # fmt: skip
    head = ('stage', 'updates planned', 'made', 'epochs', 'losses × weight at the start')
    parts.append(table(head, rows, numeric=(1, 2, 3)))
    groups: dict[str, dict] = {}
    for index, entry in enumerate(left.plan):
        for group in entry.get('groups') or []:
            size = (group.get('parameters'), group.get('tensors'))
            groups.setdefault(group['group'], {'size': size})[index] = group.get('rate')
    if not groups:
        return join(parts)
    rows = [
        (name, *map(show, found['size']), *(_rate(found.get(i)) for i in range(len(left.plan))))
        for name, found in groups.items()
    ]
    parts.append(element('h3', 'Base learning rate of every parameter group'))
    head = ('group', 'parameters', 'tensors', *(entry['name'] for entry in left.plan))
    parts.append(table(head, rows, numeric=range(1, len(head))))
    return join(parts)


def _rate(rate: Any) -> Markup:
    if not rate:
        return element('td', 'frozen' if rate == 0 else '–', class_='n frozen')
    return element('td', element('span', f'{rate:.3g}', class_='trains'), class_='n')


def _scores(left: _Left) -> Markup:
    """One table an evaluator: the scores of the results beside their course over the run."""
    parts, course = [_heading('Scores')], {}
    for line in left.lines:
        for key, value in line.items():
            if key.startswith('eval/') and key.count('/') > 1:
                course.setdefault(key.removeprefix('eval/'), []).append((line['step'], value))
    final, which = left.results.get('final') or {}, left.results.get('weights')
    best = left.results.get('best') or {}
    if final:
        of = {
            'best': f'the best weights (step {best.get("step", "?")})',
            'last': 'the last weights',
        }
        parts.append(element('p', 'The column “final” holds the scores of ',
                             element('b', of.get(which, 'unnamed weights')), '.'))  # fmt: skip
    elif course:
        parts.append(_note('No final scores yet: the evaluations so far are shown.'))
    else:
        return join([*parts, _note('No evaluation has been logged.')])
    names = dict.fromkeys([*final, *(key.split('/')[0] for key in course)])
    for name in names:
        seen = [key.split('/', 1)[1] for key in course if key.split('/')[0] == name]
        metrics = list(dict.fromkeys([*final.get(name, {}), *seen]))
        rows = [_score(m, final.get(name, {}).get(m), course.get(f'{name}/{m}', []))
                for m in metrics]  # fmt: skip
        marked = [i for i, m in enumerate(metrics) if f'{name}/{m}' == best.get('metric')]
        parts.append(element('h3', name))
        head = ('metric', 'final', 'first evaluation', 'last evaluation', 'lowest', 'highest')
        parts.append(table(head, rows, numeric=range(1, 6), best=marked))
        if marked:
            parts.append(element('p', f'The marked metric picked the best weights: '
                                 f'{show(best.get("value"))} at step {best.get("step")}.',
                                 class_='muted'))  # fmt: skip
    return join(parts)


def _score(metric: str, final: Any, course: list[tuple[int, Any]]) -> tuple:
    words = {'healthy': 'good', 'collapsed': 'bad', 'page_collapsed': 'bad',
             'weak_alignment': 'warn'}  # fmt: skip
    cell = lambda v: (
        element('span', v, class_=f'badge {words[v]}')
        if isinstance(v, str) and v in words else show(v)
    )  # fmt: skip
    numbers = [(number(v), step) for step, v in course if number(v) is not None]
    numbers = [pair for pair in numbers if pair[0] == pair[0]]
    ends = [f'{show(v)} (step {step:,})' for v, step in (min(numbers), max(numbers))] \
        if len(numbers) > 1 else ['–', '–']  # fmt: skip
    first, last = (cell(course[i][1]) if course else '–' for i in (0, -1))
    return (metric, cell(final), first, last, *ends)


def _curves(left: _Left) -> Markup:
    if not left.lines:
        return join([_heading('Curves'), _note('Nothing has been logged.')])
    sections, still = report_curves.draw(left.lines, left.results.get('best'))
    parts = []
    for name, charts in sections.items():
        drawn = [report_page.picture(c.svg, 'image/svg+xml', c.title, c.caption, wide=c.wide)
                 for c in charts]  # fmt: skip
        title = 'Scores over the run' if name == 'Scores' else name
        parts += [_heading(title), element('div', *drawn, class_='charts')]
    if len(left.spans) > 1:
        parts.insert(1, element('p', 'Dashed lines are the boundaries of stages.', class_='muted'))
    if still:
        rows = [(key, show(value)) for key, value in still.items()]
        summary = element('summary', f'{len(still)} logged values that never changed')
        parts.append(element('details', summary, table(('key', 'value'), rows, numeric=(1,))))
    return join(parts)


def _pictures(left: _Left) -> Markup:
    if not left.figures:
        return join([_heading('Pictures'), element('p', 'The task has left none.', class_='muted')])
    return join([_heading('Pictures'),
                 element('div', *map(_picture, left.figures), class_='pictures')])  # fmt: skip


def _picture(path: epath.Path) -> Markup:
    from PIL import Image

    content = path.read_bytes()
    try:
        image = Image.open(io.BytesIO(content))
        image.load()
    except Exception as error:
        return _note(f'{path.name} could not be read: {type(error).__name__}: {error}')
    words = [str(image.info.get('Description') or '')]
    if 'Step' in image.info:
        words.append(f'step {image.info["Step"]}')
    if len(content) > _LARGE:
        image.thumbnail((1600, 1600))
        buffer = io.BytesIO()
        image.save(buffer, 'png', optimize=True)
        content = buffer.getvalue()
        words.append(f'reduced; figures/{path.name} has it whole')
    return report_page.picture(content, 'image/png', path.stem, '; '.join(filter(None, words)))


def _data(left: _Left) -> Markup:
    parts = [_heading('Data')]
    for split, fields in (left.described.get('data') or {}).items():
        rows = [(key, show(value) if not isinstance(value, int) else str(value))
                for key, value in fields.items()]  # fmt: skip
        parts += [element('h3', split), table(('field', 'value'), rows)]
    if len(parts) == 1:
        parts.append(element('p', 'Unknown: config.json says nothing of the data.', class_='muted'))
    if not left.results:
        return join(
            [*parts, element('p', 'Records left out are counted in the end.', class_='muted')]
        )
    skipped = left.results.get('skipped') or {}
    if not skipped:
        return join([*parts, element('p', 'No record was left out.')])
    rows = [(reason, show(count)) for reason, count in skipped.items()]
    return join([*parts, element('h3', 'Left out'), table(('reason', 'count'), rows, numeric=(1,))])


def _environment(left: _Left) -> Markup:
    parts = [_heading('Environment and config')]
    rows = [('device', show(left.described['device']))] if 'device' in left.described else []
    rows += [
        (name, str(version)) for name, version in (left.described.get('versions') or {}).items()
    ]
    parts.append(table(('', 'version'), rows) if rows else _note('Unknown: no config.json.'))
    flat = list(_flatten(left.described.get('config') or {}))
    if flat:
        inner = table(('key', 'value'), [(element('code', k), show(v)) for k, v in flat])
        summary = element('summary', f'The resolved config, {len(flat)} keys')
        parts.append(element('details', summary, inner))
    return join(parts)


def _flatten(config: Mapping, prefix: str = ''):
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f'{prefix}{key}.')
        else:
            yield f'{prefix}{key}', value


if __name__ == '__main__':
    if len(sys.argv) != 2:
        sys.exit('usage: python -m mmjax.report WORKDIR')
    try:
        print(write(sys.argv[1]))
    except DataError as error:
        sys.exit(f'mmjax: {error}')
