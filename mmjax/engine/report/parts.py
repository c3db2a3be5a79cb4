"""Makes the parts of a report; each reads the files of a run and yields its HTML."""

import io
import itertools
import statistics
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from mmjax.engine.logs.screen import clock
from mmjax.engine.report import curves, page
from mmjax.engine.report.files import RunFiles, number
from mmjax.engine.report.page import Markup, element, heading, muted, note, show, table

_LARGE = 3_000_000  # bytes of an image above which the page carries a reduced copy


def header(run: RunFiles) -> Iterator[Markup]:
    status = 'finished' if run.results else 'not finished' if run.lines else 'nothing logged yet'
    badge = element('span', status, class_=f'badge {"good" if run.results else "warn"}')
    yield element('div', element('h1', run.workdir.name), badge, class_='top')
    config = run.info.get('config') or {}
    if 'task' in config:
        yield muted('Task ', element('b', show(config['task'])))
    yield element('pre', run.info.get('command', 'command unknown: no config.json'))
    if not run.results:
        stop = f'after step {run.step:,}' if run.lines else 'before its first log line'
        yield note(f'No results.json: the run is still going, or it was interrupted {stop}.')
    yield from map(note, run.faults)
    yield page.cards(_facts(run))


def _facts(run: RunFiles) -> Iterator[tuple[str, object, str]]:
    planned = sum(stage.get('steps', 0) for stage in run.plan)
    yield 'updates', run.step, f'of {planned:,} planned' if planned else 'planned length unknown'
    if run.plan:
        yield 'stages', len(run.plan), ', '.join(str(stage['name']) for stage in run.plan)
    if best := run.results.get('best'):
        yield f'best {best["metric"]}', best['value'], f'at step {best["step"]:,}'
    elif losses := run.finite('loss'):
        yield 'last training loss', losses[-1], 'the last finite one logged'
    if speeds := run.finite('examples_per_second'):
        yield 'examples per second', statistics.median(speeds), 'median of the log'
    # A line has the mean time of the steps since the line before.
    means = [(line['step'], s) for line in run.lines if (s := number(line.get('step_seconds')))]
    pairs = itertools.pairwise([(0, 0.0), *means])
    if seconds := sum(mean * (step - last) for (last, _), (step, mean) in pairs):
        yield 'time in updates', clock(seconds), 'compilation included'


def trained(run: RunFiles) -> Iterator[Markup]:
    yield heading('What was trained')
    if not run.plan:
        yield note('The plan is unknown: config.json has none.')
        return
    yield page.strip([(stage['name'], stage.get('steps', 0)) for stage in run.plan])
    made = {name: last - first for name, first, last in curves.spans(run.lines)}
    rows = [
        (
            element('b', stage['name']),
            stage.get('steps'),
            made.get(stage['name'], 0),
            stage.get('epochs'),
            ', '.join(f'{k} × {show(v)}' for k, v in (stage.get('loss_weights') or {}).items())
            or None,
        )
        for stage in run.plan
    ]
    head = ['stage', 'updates planned', 'made', 'epochs', 'losses × weight at the start']
    yield table(head, rows, numeric=(1, 2, 3))
    groups: dict[str, list[object]] = {}
    for i, stage in enumerate(run.plan):
        for group in stage.get('groups') or []:
            name, *sizes = (group.get(key) for key in ('group', 'parameters', 'tensors'))
            row = groups.setdefault(name, [name, *sizes, *[None] * len(run.plan)])
            row[3 + i] = _rate(group.get('rate'))
    if groups:
        yield element('h3', 'Base learning rate per parameter group')
        head = ['group', 'parameters', 'tensors', *(stage['name'] for stage in run.plan)]
        yield table(head, groups.values(), numeric=range(1, len(head)))


def _rate(rate: float | None) -> Markup | None:
    if rate is None:
        return None
    words, kind = (f'{rate:.3g}', 'trains') if rate else ('frozen', 'frozen')
    return element('span', words, class_=kind)


def scores(run: RunFiles) -> Iterator[Markup]:
    """Makes one table per evaluator: the final scores beside their history."""
    yield heading('Scores')
    history: dict[str, list[tuple[int, Any]]] = {}
    for line in run.lines:
        for key, value in line.items():
            if key.startswith('eval/') and key.count('/') > 1:
                history.setdefault(key.removeprefix('eval/'), []).append((line['step'], value))
    final = run.results.get('final') or {}
    best = run.results.get('best') or {}
    if final:
        weights = f'the {run.results.get("weights")} weights'
        if run.results.get('weights') == 'best':
            weights += f' (step {best["step"]:,})'
        words = 'The column “final” holds the scores of '
        yield element('p', words, element('b', weights), '.')
    else:
        evaluated = 'these are the evaluations so far' if history else 'no evaluation is logged'
        yield note(f'No final scores yet: {evaluated}.')
    for name in dict.fromkeys([*final, *(key.split('/')[0] for key in history)]):
        last = final.get(name, {})
        logged = [k.removeprefix(f'{name}/') for k in history if k.startswith(f'{name}/')]
        metrics = list(dict.fromkeys([*last, *logged]))
        rows = [_score(run, m, last.get(m), history.get(f'{name}/{m}', [])) for m in metrics]
        marked = [i for i, m in enumerate(metrics) if f'{name}/{m}' == best.get('metric')]
        yield element('h3', name)
        head = ('metric', 'final', 'first evaluation', 'last evaluation', 'lowest', 'highest')
        yield table(head, rows, numeric=range(1, 6), best=marked)
        if marked:
            value = f'{show(best["value"])} at step {best["step"]:,}'
            yield muted(f'The marked metric picked the best weights: {value}.')
        for value in last.values():
            if verdict := run.verdict(value):
                yield element('p', element('b', value), f': {verdict[1]}')


def _score(
    run: RunFiles, metric: str, final: object, history: list[tuple[int, Any]]
) -> tuple[object, ...]:
    numbers = [(x, step) for step, value in history if (x := number(value)) is not None and x == x]
    ends: list[str | None] = [None, None]
    if len(numbers) > 1:
        low, high = min(numbers), max(numbers)
        step = ' (step {:,})' if low[0] < high[0] else ''
        ends = [show(value) + step.format(at) for value, at in (low, high)]
    first, last = (history[i][1] if history else None for i in (0, -1))
    return (metric, *(_badge(run, value) for value in (final, first, last)), *ends)


def _badge(run: RunFiles, value: object) -> object:
    """Colours a verdict."""
    verdict = run.verdict(value)
    return element('span', value, class_=f'badge {verdict[0]}') if verdict else value


def charts(run: RunFiles) -> Iterator[Markup]:
    yield heading('Curves')
    if not run.lines:
        yield note('Nothing has been logged.')
        return
    sections, constants = curves.draw(run.lines, run.results.get('best'))
    width = max((chart.width for drawn in sections.values() for chart in drawn), default=1)
    words = {
        'Dashed lines are the boundaries of stages.': len(curves.spans(run.lines)) > 1,
        f'A point of a dense curve is the mean of up to {width} neighbouring log lines of one '
        'stage, and the band is their range; evaluations are drawn one by one.': width > 1,
    }
    yield muted(' '.join(text for text, applies in words.items() if applies))
    for name, drawn in sections.items():
        yield heading('Scores over the run' if name == 'Scores' else name)
        images = [
            page.image(chart.svg, 'image/svg+xml', chart.title, chart.caption, wide=chart.wide)
            for chart in drawn
        ]
        yield element('div', *images, class_='charts')
    if constants:
        rows = table(('key', 'value'), constants.items(), numeric=(1,))
        yield page.details(f'{len(constants)} logged values that never changed', rows)


def figures(run: RunFiles) -> Iterator[Markup]:
    yield heading('Images')
    if not run.figures:
        yield muted('The task saved no image.')
    yield element('div', *map(_image, run.figures), class_='images')


def _image(path: epath.Path) -> Markup:
    from PIL import Image

    content = path.read_bytes()
    try:
        image = Image.open(io.BytesIO(content))
        image.load()
    except Exception as error:
        return note(f'{path.name} could not be read: {error!r}')
    words = [str(image.info.get('Description') or '')]
    if 'Step' in image.info:
        words.append(f'step {image.info["Step"]}')
    if len(content) > _LARGE:
        image.thumbnail((1600, 1600))
        buffer = io.BytesIO()
        image.save(buffer, 'png', optimize=True)
        content = buffer.getvalue()
        words.append(f'reduced; figures/{path.name} has the full size')
    return page.image(content, 'image/png', path.stem, '; '.join(filter(None, words)))


def data(run: RunFiles) -> Iterator[Markup]:
    yield heading('Data')
    splits = run.info.get('data') or {}
    for split, fields in splits.items():
        # A seed or a size is shown digit by digit.
        rows = [(key, str(v) if isinstance(v, int) else v) for key, v in fields.items()]
        yield element('h3', split)
        yield table(('field', 'value'), rows)
    if not splits:
        yield muted('Unknown: config.json does not describe the data.')
    skipped = run.results.get('skipped') or {}
    if skipped:
        yield element('h3', 'Skipped')
        yield table(('reason', 'count'), skipped.items(), numeric=(1,))
    elif run.results:
        yield element('p', 'No record was skipped.')
    else:
        yield muted('Skipped records are counted at the end of the run.')


def environment(run: RunFiles) -> Iterator[Markup]:
    yield heading('Environment and config')
    rows = [('device', run.info['device'])] if 'device' in run.info else []
    rows += (run.info.get('versions') or {}).items()
    yield table(('', 'version'), rows) if rows else note('Unknown: no config.json.')
    keys = [(element('code', k), v) for k, v in _flatten(run.info.get('config') or {})]
    if keys:
        yield page.details(f'The resolved config, {len(keys)} keys', table(('key', 'value'), keys))


def _flatten(config: Mapping[str, Any], prefix: str = '') -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f'{prefix}{key}.')
        else:
            yield f'{prefix}{key}', value


ALL = (header, trained, scores, charts, figures, data, environment)
