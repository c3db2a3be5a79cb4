"""Chooses the charts of a run from the lines of metrics.jsonl, and the curves of each chart."""

import collections
import dataclasses
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mmjax.engine.report.chart import Chart, Series, Span, chart
from mmjax.engine.report.files import number

TRAIN = '#2f63c9'
EVALUATION = ('#d9541e', '#138a6b', '#8a4fc4', '#b8860b')
GROUPS = ('#2f63c9', '#d9541e', '#138a6b', '#8a4fc4', '#b8860b', '#c23b6b', '#3f8fb0', '#6b7280')
_MACHINE = ('examples_per_second', 'loss_scale')
_HIDDEN = ('step', 'epoch', 'step_seconds')


def _stage(line: Mapping[str, Any]) -> str:
    return str(line.get('stage', ''))


def spans(lines: Iterable[Mapping[str, Any]]) -> list[Span]:
    """Returns (stage, first step, last step) in order; a stage starts where the last one ends."""
    out: list[Span] = []
    for name, group in itertools.groupby(lines, _stage):
        steps = [line['step'] for line in group]
        out.append((name, out[-1][2] if out else min(steps[0], 0), max(steps)))
    return out


def collect(lines: Iterable[Mapping[str, Any]]) -> dict[str, Series]:
    """Returns one Series for every key of `lines` that holds numbers."""
    points: dict[str, list[tuple[int, float, int]]] = collections.defaultdict(list)
    for stage, (_, group) in enumerate(itertools.groupby(lines, _stage)):
        for line in group:
            for key, item in line.items():
                if key not in _HIDDEN and (value := number(item)) is not None:
                    points[key].append((line['step'], value, stage))
    return {
        key: Series(key, 'train', TRAIN, *map(list, zip(*of_key, strict=True)))
        for key, of_key in points.items()
    }


def draw(
    lines: Sequence[Mapping], best: Mapping[str, Any] | None
) -> tuple[dict[str, list[Chart]], dict[str, float]]:
    """Returns ({section: charts}, {key: value} of what never changed and is not drawn).

    `best` is the `best` entry of results.json; its point is marked.
    """
    curves = collect(lines)
    stages = spans(lines)
    train = {key: series for key, series in curves.items() if not key.startswith('eval/')}
    colours: dict[str, str] = {}  # of evaluators
    evaluations: dict[str, list[Series]] = collections.defaultdict(list)  # by metric
    for key in curves:
        if key.startswith('eval/') and key.count('/') > 1:
            _, evaluator, metric = key.split('/', 2)
            colour = colours.setdefault(evaluator, EVALUATION[len(colours) % len(EVALUATION)])
            curve = dataclasses.replace(curves[key], label=evaluator, colour=colour)
            evaluations[metric].append(curve)

    sections: dict[str, list[Chart]] = collections.defaultdict(list)
    constants: dict[str, float] = {}

    def add(section: str, title: str, series: Sequence[Series], **options: Any) -> None:
        if all(s.constant for s in series):
            for s in series:
                name = title if s.label == 'train' else f'{title} ({s.label})'
                constants[name] = s.value[-1]
            return
        if best and any(s.key == f'eval/{best["metric"]}' for s in series):
            options['best'] = best['step'], float(best['value'])
        sections[section].append(chart(title, series, stages, **options))

    def family(name: str, first: int = 0) -> list[Series]:
        keys = [key for key in train if key.startswith(f'{name}/')]
        labels = [key.removeprefix(f'{name}/') for key in keys]
        return _recolour([train[key] for key in keys], labels, first)

    for key in sorted(train, key=lambda key: key != 'loss'):
        if re.match('loss(/|$)', key):
            series = [train[key], *evaluations.pop(key.removeprefix('loss/'), [])]
            add('Losses', key, series, wide=key == 'loss', log=True)
    other = [k for k in train if not re.match(r'(loss|lr|weight|grad_norm)(/|$)', k)]
    diagnostics = {key: [train[key], *evaluations.pop(key, [])] for key in other}
    for title, series in _by_stem(evaluations, len(colours) > 1).items():
        add('Scores', title, series)
    add('Schedules', 'learning rate', family('lr'), log=True, gaps=True)
    add('Schedules', 'loss weight', family('weight'))
    norms = family('grad_norm', 1)
    if 'grad_norm' in train:
        total = dataclasses.replace(train['grad_norm'], label='all')
        norms = [total, *norms] if len(norms) > 1 else [total]
    add('Health', 'gradient norm', norms, log=True)
    for key, series in diagnostics.items():
        add('Health' if key in _MACHINE else 'Diagnostics', key, series)
    return dict(sections), constants


def _recolour(series: Sequence[Series], labels: Sequence[str], first: int = 0) -> list[Series]:
    return [
        dataclasses.replace(s, label=label, colour=GROUPS[i % len(GROUPS)])
        for i, (s, label) in enumerate(zip(series, labels, strict=True), first)
    ]


def _by_stem(evaluations: Mapping[str, list[Series]], many: bool) -> dict[str, list[Series]]:
    """Puts metrics that differ only in a last number (r1, r5, r10) under one title."""
    stems: dict[str, list[str]] = collections.defaultdict(list)
    for metric in evaluations:
        stems[re.sub(r'(?<=\D)\d+$', '', metric)].append(metric)
    out: dict[str, list[Series]] = {}
    for stem, metrics in stems.items():
        if len(metrics) == 1:
            out[metrics[0]] = evaluations[metrics[0]]
            continue
        pairs = [(metric.rsplit('_', 1)[-1], s) for metric in metrics for s in evaluations[metric]]
        labels = [f'{s.label} {short}' if many else short for short, s in pairs]
        title = f'{stem}{{{", ".join(metric.removeprefix(stem) for metric in metrics)}}}'
        out[title] = _recolour([s for _, s in pairs], labels)
    return out
