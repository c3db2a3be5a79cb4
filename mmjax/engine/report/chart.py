"""Draws one chart of a run as compact SVG: curves over the step, with the stages marked."""

import dataclasses
import io
import math
import re
import warnings
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

BINS = 150  # points per curve, over all stages; denser logs are averaged
INK, MUTED = '#1d2733', '#66727f'
_STYLE: dict[Any, Any] = {
    'svg.fonttype': 'none',
    'svg.hashsalt': 'mmjax',
    'font.family': 'DejaVu Sans',
    'font.size': 8.5,
    'text.color': INK,
    'text.parse_math': False,
    'axes.edgecolor': '#b9c2cc',
    'axes.labelcolor': MUTED,
    'axes.linewidth': 0.8,
    'axes.unicode_minus': False,
    'axes.axisbelow': True,
    'axes.grid': True,
    'axes.grid.axis': 'y',
    'axes.spines.top': False,
    'axes.spines.right': False,
    'grid.color': '#e3e8ee',
    'grid.linewidth': 0.8,
    'xaxis.labellocation': 'right',
    'xtick.color': MUTED,
    'ytick.color': MUTED,
    'xtick.major.size': 3,
    'ytick.major.size': 3,
    'lines.markersize': 3.5,
    'legend.frameon': False,
    'legend.fontsize': 8,
    'legend.handlelength': 1.4,
    'legend.borderaxespad': 0,
    'legend.borderpad': 0,
    'legend.columnspacing': 1.4,
}
Span = tuple[str, int, int]  # stage, first step, last step


@dataclasses.dataclass(frozen=True)
class Chart:
    """A chart of the page; a `wide` one takes the whole width."""

    title: str
    caption: str
    svg: bytes
    wide: bool = False
    width: int = 1  # log lines averaged per point


@dataclasses.dataclass(frozen=True)
class Series:
    """The points of one curve; a curve does not connect points of different stages."""

    key: str  # in metrics.jsonl
    label: str
    colour: str
    step: list[int]
    value: list[float]
    stage: list[int]

    @property
    def dots(self) -> bool:
        """Whether it is an evaluation: every point has a mark, none is averaged."""
        return self.key.startswith('eval/')

    @property
    def constant(self) -> bool:
        return len(set(self.value)) <= 1 and all(map(math.isfinite, self.value))


def bins(series: Series) -> tuple[list[tuple[np.ndarray, ...]], int]:
    """Averages a curve to about BINS points; returns [(step, mean, low, high) per stage], width.

    A bin holds `width` neighbouring finite points of one stage; its step is their mean.
    """
    step, value, stage = map(np.asarray, (series.step, series.value, series.stage))
    finite = np.isfinite(value)
    width = 1 if series.dots else max(1, math.ceil(finite.sum() / BINS))
    parts: list[tuple[np.ndarray, ...]] = []
    for index in np.unique(stage[finite]):
        x, y = (array[finite & (stage == index)] for array in (step, value))
        edges = np.arange(0, len(x), width)
        size = np.diff(np.append(edges, len(x)))
        mean_x, mean_y = (np.add.reduceat(array, edges) / size for array in (x, y))
        parts.append((mean_x, mean_y, np.minimum.reduceat(y, edges), np.maximum.reduceat(y, edges)))
    return parts, width


def chart(
    title: str,
    series: Sequence[Series],
    stages: Sequence[Span],
    *,
    wide: bool = False,
    log: bool = False,
    gaps: bool = False,
    best: tuple[int, float] | None = None,
) -> Chart:
    """Draws one chart.

    Args:
      title: of the chart.
      series: its curves.
      stages: of the run.
      wide: whether it takes the whole width of the page.
      log: asks for a log axis, which is used if all values allow it and span a factor of 30.
      gaps: whether curves are rates, which are 0 where a group is frozen: gaps on a log axis.
      best: (step, value) of the point to mark.
    """
    several = len(series) > 1
    series = _merge(series)
    values = np.array([v for s in series for v in s.value if math.isfinite(v)])
    positive = values[values > 0]
    log = log and len(positive) > 0 and bool(positive.max() > 30 * positive.min())
    log = log and (gaps or len(positive) == len(values))
    letters = 150 if wide else 68
    columns = max(1, letters // (7 + max((len(s.label) for s in series), default=0)))
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.simplefilter('ignore')  # glyphs that only the reader's fonts have
        size = (11.4, 3.4) if wide else (5.6, 2.7)
        figure = Figure(figsize=size, layout='constrained')
        axis = figure.subplots()
        _draw_stages(axis, stages, letters)
        averaged = [_draw_curve(axis, s, band=len(series) < 4) for s in series]
        if log:
            axis.set_yscale('log', nonpositive='mask')
            axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f'{y:.3g}'))
            axis.minorticks_off()
        if best:
            step, value = best
            axis.plot(step, value, 'o', ms=10, mfc='none', mec=INK, mew=1.2, zorder=5)
            axis.set_title(f'best {value:.4g}', loc='right', fontsize=8, fontweight='bold', pad=14)
        axis.xaxis.set_major_locator(MaxNLocator(7, integer=True))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f'{x:,.0f}'))
        axis.set_xlabel('step', labelpad=1)
        if several:
            figure.legend(loc='outside lower left', ncols=columns)
        buffer = io.StringIO()
        figure.savefig(buffer, format='svg', metadata={'Date': None, 'Creator': None})
    broken = sum(len(s.value) for s in series) - len(values)
    frozen = [s.label for s in series if gaps and not any(s.value)]
    unfit = [s.label for s in series if not np.isfinite(s.value).any()]
    notes = {
        'log scale': log,
        f'frozen throughout: {", ".join(frozen)}': frozen,
        f'never finite: {", ".join(unfit)}': unfit,
        f'{broken} value{"s" * (broken > 1)} not finite (red marks)': broken,
    }
    caption = '; '.join(words for words, applies in notes.items() if applies)
    # The reader's interface font has every script, matplotlib's own has not.
    fonts = "system-ui, 'Segoe UI', Roboto, sans-serif"
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", fonts, buffer.getvalue()).encode()
    return Chart(title, caption, svg, wide, max(averaged, default=1))


def _merge(series: Sequence[Series]) -> list[Series]:
    """Puts equal curves, which would hide each other, under one label."""
    equal: dict[tuple, list[Series]] = {}
    for s in series:
        equal.setdefault((tuple(s.step), str(s.value), s.dots), []).append(s)
    join = lambda curves: ', '.join(s.label for s in curves)
    return [dataclasses.replace(curves[0], label=join(curves)) for curves in equal.values()]


def _draw_curve(axis: Axes, s: Series, *, band: bool) -> int:
    """Draws one curve, and red marks where it is not finite; returns the width of its bins."""
    parts, width = bins(s)
    axis.plot([], [], color=s.colour, lw=1.4, marker='o' if s.dots else None, label=s.label)
    for x, mean, low, high in parts:
        marker = 'o' if s.dots or len(x) < 3 else None
        axis.plot(x, mean, color=s.colour, lw=1.4, marker=marker, zorder=3 + s.dots)
        if width > 1 and band:
            axis.fill_between(x, low, high, color=s.colour, alpha=0.16, lw=0)
    broken = [x for x, y in zip(s.step, s.value, strict=True) if not math.isfinite(y)]
    options: dict[str, Any] = {'color': '#c81e1e', 'ms': 5, 'mew': 1.4, 'clip_on': False}
    axis.plot(broken, [0.03] * len(broken), 'x', transform=axis.get_xaxis_transform(), **options)
    return width


def _draw_stages(axis: Axes, stages: Sequence[Span], letters: int) -> None:
    """Shades every other stage, draws its boundary and writes its name above, cut to fit."""
    end = max((last for _, _, last in stages), default=1) or 1
    axis.set_xlim(-0.01 * end, 1.01 * end)
    for i, (name, first, last) in enumerate(stages):
        if i % 2:
            axis.axvspan(first, last, color='#f3f6fa', lw=0, zorder=0)
        if i:
            axis.axvline(first, color='#8b97a5', lw=0.9, ls=(0, (4, 3)), zorder=1)
        fits = int(letters * (last - first) / end)
        if fits >= 3:
            axis.text(
                (first + last) / 2,
                1.02,
                name if len(name) <= fits else name[: fits - 1] + '…',
                ha='center',
                va='bottom',
                fontsize=8,
                color=MUTED,
                transform=axis.get_xaxis_transform(),
            )
