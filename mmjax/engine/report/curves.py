"""Chooses the curves of a run from the lines of metrics.jsonl: which belong together, and where."""

import collections
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mmjax.engine.report.chart import Chart, Series, chart

TRAIN = '#2f63c9'
EVALUATION = ('#d9541e', '#138a6b', '#8a4fc4', '#b8860b')
GROUPS = ('#2f63c9', '#d9541e', '#138a6b', '#8a4fc4', '#b8860b', '#c23b6b', '#3f8fb0', '#6b7280')
_MACHINE = ('examples_per_second', 'loss_scale')
_HIDDEN = ('step', 'epoch', 'step_seconds')


def number(value: Any) -> float | None:
    """Returns a JSON number, or the string of one that is not finite, as float; else None."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    return float(value) if value in ('nan', 'inf', '-inf') else None


def spans(lines: Iterable[Mapping]) -> list[tuple[str, int, int]]:
    """Returns (stage, first step, last step) in the order run; a stage starts where one ends."""
    out = []
    for line in lines:
        name, step = str(line.get('stage', '')), line['step']
        if not out or out[-1][0] != name:
            out.append([name, out[-1][2] if out else min(step, 0), step])
        out[-1][2] = max(out[-1][2], step)
    return [tuple(span) for span in out]


def collect(lines: Sequence[Mapping]) -> dict[str, Series]:
    """Returns one Series for every key of `lines` that holds numbers."""
    out, index, last = {}, -1, None
    for line in lines:
        if line.get('stage') != last or index < 0:
            index, last = index + 1, line.get('stage')
        for key, item in line.items():
            value = number(item)
            if value is None or key in _HIDDEN:
                continue
            series = out.setdefault(key, Series(key, key, TRAIN, [], [], []))
            series.step.append(line['step'])
            series.value.append(value)
            series.stage.append(index)
    return out


def draw(lines: Sequence[Mapping], best: Mapping | None) -> tuple[dict[str, list[Chart]], dict]:
    """Returns ({section: charts}, {key: value} of what never changed and is not drawn).

    `best` is the `best` entry of results.json; its point is ringed.
    """
    found, stages = collect(lines), spans(lines)
    evaluators = list(dict.fromkeys(k.split('/')[1] for k in found if k.count('/') > 1))
    colour = {e: EVALUATION[i % len(EVALUATION)] for i, e in enumerate(evaluators)}
    train = {key: series for key, series in found.items() if not key.startswith('eval/')}
    evaluations = collections.defaultdict(list)  # metric → series, one an evaluator
    for key, series in found.items():
        if key.startswith('eval/') and key.count('/') > 1:
            _, evaluator, metric = key.split('/', 2)
            series.label, series.colour = evaluator, colour[evaluator]
            evaluations[metric].append(series)

    still, sections = {}, collections.defaultdict(list)

    def add(section, title, series, **options):
        if all(s.constant for s in series):
            for s in series:
                same = s.label in (title, 'train')
                still[title if same else f'{title} ({s.label})'] = s.value[-1]
            return
        ring = _ring(best, series)
        sections[section].append(chart(title, series, stages, ring=ring, **options))

    def with_evaluations(key, metric):
        train[key].label = 'train'
        return [train[key], *evaluations.pop(metric, [])]

    if 'loss' in train:
        add('Losses', 'loss', with_evaluations('loss', 'loss'), wide=True, log=True)
    for key in [k for k in train if k.startswith('loss/')]:
        add('Losses', key, with_evaluations(key, key.removeprefix('loss/')), log=True)
    family = lambda prefix: [k for k in train if k.startswith(prefix)]
    other = [k for k in train if not re.match(r'(loss|lr|weight|count|grad_norm)(/|$)', k)]
    joined = {k: with_evaluations(k, k) for k in other}
    for stem, members in _stems(evaluations).items():
        add('Scores', stem, _members(members, evaluations, len(evaluators) > 1))
    if rates := [_grouped(train[k], i, k[3:]) for i, k in enumerate(family('lr/'))]:
        add('Schedules', 'learning rate', rates, log=True, zero='frozen')
    if weights := [_grouped(train[k], i, k[7:]) for i, k in enumerate(family('weight/'))]:
        add('Schedules', 'loss weight', weights)
    norms = [_grouped(train[k], i + 1, k[10:]) for i, k in enumerate(family('grad_norm/'))]
    if 'grad_norm' in train:
        train['grad_norm'].label = 'all'
        norms = [train['grad_norm'], *(norms if len(norms) > 1 else [])]
    if norms:
        add('Health', 'gradient norm', norms, log=True)
    for key in sorted(other, key=lambda k: k not in _MACHINE):
        add('Health' if key in _MACHINE else 'Diagnostics', key, joined[key])
    for key in family('count/'):
        add('Diagnostics', key, [train[key]])
    return dict(sections), still


def _grouped(series: Series, index: int, label: str) -> Series:
    series.label, series.colour = label, GROUPS[index % len(GROUPS)]
    return series


def _stems(evaluations: Mapping) -> dict[str, list[str]]:
    """Gathers metrics that differ only in a last number (r1, r5, r10) under one title."""
    stems = collections.defaultdict(list)
    for metric in evaluations:
        match = re.fullmatch(r'(.*\D)\d+', metric)
        stems[match.group(1) if match else metric].append(metric)
    return {
        f'{stem}{{{", ".join(m.removeprefix(stem) for m in members)}}}'
        if len(members) > 1
        else members[0]: members
        for stem, members in stems.items()
    }


def _members(members: list[str], evaluations: Mapping, many: bool) -> list[Series]:
    if len(members) == 1:
        return evaluations[members[0]]
    out = []
    for metric in members:
        for series in evaluations[metric]:
            short = metric.rsplit('_', 1)[-1]
            label = f'{series.label} {short}' if many else short
            out.append(_grouped(series, len(out), label))
    return out


def _ring(best: Mapping | None, series: Sequence[Series]) -> tuple[int, float, str] | None:
    """Returns (step, value, text) of the run's best point where this chart shows that metric."""
    value = number((best or {}).get('value'))
    if value is None or not any(s.key == f'eval/{best["metric"]}' for s in series):
        return None
    return best['step'], value, f'best {value:.4g}'
