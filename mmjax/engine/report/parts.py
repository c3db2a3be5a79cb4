"""The parts of the page of a run; each reads a `mmjax.report.Left` and returns its HTML."""

import io
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from mmjax.engine.report import page
from mmjax.engine.report.curves import draw, number
from mmjax.engine.report.page import Markup, duration, element, join, show, table

_LARGE = 3_000_000  # bytes of a picture above which the page carries a reduced copy


def _note(words: str) -> Markup:
    return element('p', words, class_='note')


def _heading(words: str) -> Markup:
    return element('h2', words)


def header(left) -> Markup:
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
        items.append(('time in updates', duration(seconds), 'compilation included'))
    title = element('h1', left.workdir.name)
    parts = [
        element('div', title, element('span', badge, class_=f'badge {kind}'), class_='top'),
        element('p', 'Task ', element('b', show(config['task'])), class_='muted')
        if 'task' in config
        else '',
        element('pre', left.described.get('command', 'command unknown: no config.json')),
    ]
    if not left.results:
        parts.append(
            _note(
                'No results.json: the run is still going, or it was interrupted'
                f'{f" after step {left.step:,}" if left.lines else " before its first log line"}.'
            )
        )
    parts += [_note(fault) for fault in left.faults]
    return element('header', *parts, page.cards(items))


def _seconds(lines: Sequence[Mapping]) -> float:
    """Estimates the time spent in updates: step_seconds × the steps since the train line before."""
    total, last = 0.0, 0
    for line in lines:
        seconds = number(line.get('step_seconds'))
        if seconds is not None:
            total, last = total + seconds * (line['step'] - last), line['step']
    return total


def trained(left) -> Markup:
    parts = [_heading('What was trained')]
    if not left.plan:
        return join([*parts, _note('The plan is unknown: config.json has none.')])
    done = {name: last - start for name, start, last in left.spans}
    parts.append(page.strip([(e['name'], e.get('steps', 0)) for e in left.plan]))
    rows = []
    for entry in left.plan:
        weights = entry.get('loss_weights') or {}
        rows.append(
            (
                element('b', entry['name']),
                show(entry.get('steps')),
                show(done.get(entry['name'], 0)),
                show(entry.get('epochs')),
                ', '.join(f'{name} × {show(weight)}' for name, weight in weights.items()) or '–',
            )
        )
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


def scores(left) -> Markup:
    """One table an evaluator: the scores of the results beside their course over the run."""
    parts, course = [_heading('Scores')], {}
    for line in left.lines:
        for key, value in line.items():
            if key.startswith('eval/') and key.count('/') > 1:
                course.setdefault(key.removeprefix('eval/'), []).append((line['step'], value))
    final, which = left.results.get('final') or {}, left.results.get('weights')
    best = left.results.get('best') or {}
    if final:
        of = f'the {which} weights' + (f' (step {best["step"]:,})' if which == 'best' else '')
        parts.append(element('p', 'The column “final” holds the scores of ', element('b', of), '.'))
    elif course:
        parts.append(_note('No final scores yet: the evaluations so far are shown.'))
    else:
        return join([*parts, _note('No evaluation has been logged.')])
    names = dict.fromkeys([*final, *(key.split('/')[0] for key in course)])
    for name in names:
        seen = [key.split('/', 1)[1] for key in course if key.split('/')[0] == name]
        metrics = list(dict.fromkeys([*final.get(name, {}), *seen]))
        rows = [
            _score(m, final.get(name, {}).get(m), course.get(f'{name}/{m}', [])) for m in metrics
        ]
        marked = [i for i, m in enumerate(metrics) if f'{name}/{m}' == best.get('metric')]
        parts.append(element('h3', name))
        head = ('metric', 'final', 'first evaluation', 'last evaluation', 'lowest', 'highest')
        parts.append(table(head, rows, numeric=range(1, 6), best=marked))
        if marked:
            parts.append(
                element(
                    'p',
                    f'The marked metric picked the best weights: '
                    f'{show(best["value"])} at step {best["step"]:,}.',
                    class_='muted',
                )
            )
    return join(parts)


def _score(metric: str, final: Any, course: list[tuple[int, Any]]) -> tuple:
    words = {
        'healthy': 'good',
        'collapsed': 'bad',
        'page_collapsed': 'bad',
        'weak_alignment': 'warn',
    }
    cell = lambda v: (
        element('span', v, class_=f'badge {words[v]}')
        if isinstance(v, str) and v in words
        else show(v)
    )
    numbers = [(number(v), step) for step, v in course if number(v) is not None]
    numbers = [pair for pair in numbers if pair[0] == pair[0]]
    ends = ['–', '–']
    if len(numbers) > 1:
        low, high = min(numbers), max(numbers)
        where = lambda pair: f' (step {pair[1]:,})' if low[0] < high[0] else ''
        ends = [show(pair[0]) + where(pair) for pair in (low, high)]
    first, last = (cell(course[i][1]) if course else '–' for i in (0, -1))
    return (metric, cell(final), first, last, *ends)


def curves(left) -> Markup:
    if not left.lines:
        return join([_heading('Curves'), _note('Nothing has been logged.')])
    sections, still = draw(left.lines, left.results.get('best'))
    parts = []
    for name, charts in sections.items():
        drawn = [
            page.picture(c.svg, 'image/svg+xml', c.title, c.caption, wide=c.wide) for c in charts
        ]
        title = 'Scores over the run' if name == 'Scores' else name
        parts += [_heading(title), element('div', *drawn, class_='charts')]
    words = 'Dashed lines are the boundaries of stages. ' if len(left.spans) > 1 else ''
    if (width := max((c.width for charts in sections.values() for c in charts), default=1)) > 1:
        words += (
            f'A point of a dense curve is the mean of up to {width} neighbouring log lines of one '
            'stage, the band their range; evaluations are drawn one by one.'
        )
    if words:
        parts.insert(1, element('p', words, class_='muted'))
    if still:
        rows = [(key, show(value)) for key, value in still.items()]
        summary = element('summary', f'{len(still)} logged values that never changed')
        parts.append(element('details', summary, table(('key', 'value'), rows, numeric=(1,))))
    return join(parts)


def pictures(left) -> Markup:
    if not left.figures:
        return join([_heading('Pictures'), element('p', 'The task has left none.', class_='muted')])
    return join(
        [_heading('Pictures'), element('div', *map(_picture, left.figures), class_='pictures')]
    )


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
    return page.picture(content, 'image/png', path.stem, '; '.join(filter(None, words)))


def data(left) -> Markup:
    parts = [_heading('Data')]
    for split, fields in (left.described.get('data') or {}).items():
        rows = [
            (key, show(value) if not isinstance(value, int) else str(value))
            for key, value in fields.items()
        ]
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


def environment(left) -> Markup:
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


ALL = (header, trained, scores, curves, pictures, data, environment)
