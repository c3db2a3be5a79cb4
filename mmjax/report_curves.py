"""Draws a run's curves from the lines of metrics.jsonl as compact SVG, stages marked."""

import collections
import dataclasses
import io
import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

BINS = 150  # points a line, over all stages; denser logs are averaged
INK, MUTED, GRID = '#1d2733', '#66727f', '#e3e8ee'
TRAIN = '#2f63c9'
EVALUATION = ('#d9541e', '#138a6b', '#8a4fc4', '#b8860b')
GROUPS = ('#2f63c9', '#d9541e', '#138a6b', '#8a4fc4', '#b8860b', '#c23b6b', '#3f8fb0', '#6b7280')
_HIDDEN = ('step', 'epoch', 'step_seconds')
_STYLE = {
    'svg.fonttype': 'none', 'svg.hashsalt': 'mmjax', 'font.family': 'DejaVu Sans',
    'font.size': 8.5, 'axes.edgecolor': '#b9c2cc', 'axes.labelcolor': MUTED, 'text.color': INK,
    'xtick.color': MUTED, 'ytick.color': MUTED, 'axes.linewidth': 0.8, 'axes.unicode_minus': False,
    'text.parse_math': False,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Chart:
    """One picture of the page; `wide` ones take the whole width."""

    title: str
    caption: str
    svg: bytes
    wide: bool = False


@dataclasses.dataclass
class Series:
    """Points of one curve; `stage` keeps a line from crossing into the next stage."""

    label: str
    colour: str
    step: list[int]
    value: list[float]
    stage: list[int]
    dots: bool = False  # evaluation: every point marked, never averaged

    @property
    def constant(self) -> bool:
        return len(set(self.value)) <= 1 and all(map(math.isfinite, self.value))


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
            series = out.setdefault(key, Series(key, TRAIN, [], [], [], key.startswith('eval/')))
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
        ring = _ring(best, title, series)
        sections[section].append(_chart(title, series, stages, ring=ring, **options))

    def with_evaluations(key, metric):
        train[key].label = 'train'
        return [train[key], *evaluations.pop(metric, [])]

    if 'loss' in train:
        add('Losses', 'loss', with_evaluations('loss', 'loss'), wide=True)
    for key in [k for k in train if k.startswith('loss/')]:
        add('Losses', key, with_evaluations(key, key.removeprefix('loss/')))
    family = lambda prefix: [k for k in train if k.startswith(prefix)]
    other = [k for k in train if not re.match(r'(loss|lr|weight|count|grad_norm)(/|$)', k)]
    joined = {k: with_evaluations(k, k) for k in other}
    for stem, members in _stems(evaluations).items():
        add('Scores', stem, _members(members, evaluations, len(evaluators) > 1))
    if rates := [_grouped(train[k], i, k[3:]) for i, k in enumerate(family('lr/'))]:
        add('Schedules', 'learning rate', rates, zero='frozen')
    if weights := [_grouped(train[k], i, k[7:]) for i, k in enumerate(family('weight/'))]:
        add('Schedules', 'loss weight', weights)
    norms = [_grouped(train[k], i + 1, k[10:]) for i, k in enumerate(family('grad_norm/'))]
    if 'grad_norm' in train:
        train['grad_norm'].label = 'all'
        norms = [train['grad_norm'], *(norms if len(norms) > 1 else [])]
    if norms:
        add('Health', 'gradient norm', norms)
    for key in sorted(other, key=lambda k: k != 'examples_per_second'):
        add('Health', key, joined[key])
    for key in family('count/'):
        add('Health', key, [train[key]])
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
            label = f'{series.label} {metric}' if many else metric
            out.append(_grouped(series, len(out), label))
    return out


def _ring(best: Mapping | None, title: str, series: Sequence[Series]):
    """Returns (step, value, text) of the run's best point where this chart shows that metric."""
    evaluator, _, metric = str((best or {}).get('metric', '')).partition('/')
    value = number((best or {}).get('value'))
    labels = [metric, f'{evaluator} {metric}']
    if metric in (title, title.removeprefix('loss/')):
        labels.append(evaluator)
    shown = value is not None and any(s.dots and s.label in labels for s in series)
    return (best['step'], value, f'best {value:.4g}') if shown else None


# One chart -------------------------------------------------------------------------------------


def bins(series: Series) -> tuple[list[tuple[np.ndarray, ...]], int]:
    """Averages a curve to about BINS points; returns [(step, mean, low, high) a stage], width.

    A bin holds `width` neighbouring finite points of one stage; its step is their mean.
    """
    step, value, stage = map(np.asarray, (series.step, series.value, series.stage))
    finite = np.isfinite(value)
    width = 1 if series.dots else max(1, -(-int(finite.sum()) // BINS))
    out = []
    for index in dict.fromkeys(stage.tolist()):
        x, y = step[finite & (stage == index)], value[finite & (stage == index)]
        edges = np.arange(0, len(x), width)
        if not len(edges):
            continue
        size = np.diff(np.append(edges, len(x)))
        out.append((
            np.add.reduceat(x, edges) / size, np.add.reduceat(y, edges) / size,
            np.minimum.reduceat(y, edges), np.maximum.reduceat(y, edges),
        ))  # fmt: skip
    return out, width


def _chart(title, series, stages, *, wide=False, ring=None, zero='') -> Chart:
    """Draws one chart; `zero` says what a value 0 means where it cannot stand on a log axis."""
    notes = []
    silent = [s.label for s in series if zero and not any(s.value)]
    if silent:
        notes.append(f'{zero} throughout: {", ".join(silent)}')
        series = [s for s in series if s.label not in silent]
    values = np.array([v for s in series for v in s.value if math.isfinite(v)])
    positive = values[values > 0]
    log = len(positive) and positive.max() > 30 * positive.min()
    log = bool(log and (zero or len(positive) == len(values)))
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.simplefilter('ignore')  # glyphs that only the reader's fonts have
        figure = Figure(figsize=(11.4, 3.1) if wide else (5.6, 2.5), layout='constrained')
        axis = figure.subplots()
        _stages(axis, stages, 110 if wide else 50)
        width, broken = 1, 0
        for s in series:
            width, broken = max(width, _curve(axis, s, log)), broken + _broken(axis, s)
        if log:
            axis.set_yscale('log')
        if ring:
            axis.plot(*ring[:2], 'o', ms=10, mfc='none', mec=INK, mew=1.2, zorder=5)
            axis.annotate(ring[2], ring[:2], xytext=(0, 9), textcoords='offset points', ha='center',
                          fontsize=8, fontweight='bold', annotation_clip=False)  # fmt: skip
        _dress(axis, log, legend=len(series) > 1, columns=6 if wide else 3)
        buffer = io.StringIO()
        figure.savefig(buffer, format='svg', metadata={'Date': None, 'Creator': None})
    if width > 1:
        notes.append(f'each point is the mean of {width} log lines, the band their range')
    if broken:
        notes.append(f'{broken} value{"s" * (broken > 1)} not finite (red marks)')
    if log and zero and len(positive) < len(values):
        notes.append(f'gaps: {zero}')
    return Chart(title, '; '.join(notes), _web_fonts(buffer.getvalue()).encode(), wide)


def _curve(axis, s: Series, log: bool) -> int:
    parts, width = bins(s)
    for i, (x, mean, low, high) in enumerate(parts):
        label = s.label if i == 0 else None
        if log:
            mean, low, high = (np.where(y > 0, y, np.nan) for y in (mean, low, high))
        few = s.dots or len(x) < 3
        axis.plot(x, mean, color=s.colour, lw=1.5, marker='o' if few else None, ms=3.5,
                  label=label, zorder=4 if s.dots else 3, solid_joinstyle='round')  # fmt: skip
        if width > 1:
            axis.fill_between(x, low, high, color=s.colour, alpha=0.16, lw=0)
    if s.dots and len(parts) > 1:  # one evaluation a stage would otherwise be lone dots
        x, y = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
        axis.plot(x, np.where(y > 0, y, np.nan) if log else y, color=s.colour, lw=0.8, alpha=0.5)
    return width


def _broken(axis, s: Series) -> int:
    """Marks the steps where a value is NaN or infinite at the foot of the chart."""
    at = [step for step, value in zip(s.step, s.value, strict=True) if not math.isfinite(value)]
    axis.plot(at, [0.03] * len(at), 'x', color='#c81e1e', ms=5, mew=1.4, clip_on=False, zorder=6,
              transform=axis.get_xaxis_transform())  # fmt: skip
    return len(at)


def _stages(axis, stages, room: int) -> None:
    """Shades every other stage, draws its boundary and writes its name above, cut to fit."""
    end = max((last for _, _, last in stages), default=1) or 1
    axis.set_xlim(-0.01 * end, 1.01 * end)
    for i, (name, start, last) in enumerate(stages):
        if len(stages) > 1 and i % 2:
            axis.axvspan(start, last, color='#f3f6fa', lw=0, zorder=0)
        if i:
            axis.axvline(start, color='#8b97a5', lw=0.9, ls=(0, (4, 3)), zorder=1)
        letters = int(room * (last - start) / end)
        text = name if len(name) <= letters else name[: max(letters - 1, 0)] + '…'
        if letters >= 3:
            axis.text((start + last) / 2, 1.02, text, ha='center', va='bottom', fontsize=8,
                      color=MUTED, transform=axis.get_xaxis_transform())  # fmt: skip


def _dress(axis, log: bool, *, legend: bool, columns: int) -> None:
    axis.grid(axis='y', color=GRID, lw=0.8)
    axis.set_axisbelow(True)
    axis.spines[['top', 'right']].set_visible(False)
    axis.xaxis.set_major_locator(MaxNLocator(7, integer=True))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f'{x:,.0f}'))
    axis.set_xlabel('step')
    if log:
        axis.set_ylabel('log scale')
        axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f'{y:.3g}'))
        axis.minorticks_off()
    if legend:
        axis.legend(loc='upper center', bbox_to_anchor=(0.5, -0.2), ncols=columns, frameon=False,
                    fontsize=8, handlelength=1.4, borderaxespad=0)  # fmt: skip


def _web_fonts(svg: str) -> str:
    """Lets the reader's interface font, which has every script, stand for matplotlib's own."""
    return re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, 'Segoe UI', Roboto, sans-serif", svg)
