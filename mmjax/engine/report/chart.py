"""Draws one chart of a run as compact SVG: curves over the step, with the stages marked."""

import dataclasses
import io
import math
import re
import warnings
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

BINS = 150  # points a line, over all stages; denser logs are averaged
INK, MUTED, GRID = '#1d2733', '#66727f', '#e3e8ee'
_STYLE = {
    'svg.fonttype': 'none',
    'svg.hashsalt': 'mmjax',
    'font.family': 'DejaVu Sans',
    'font.size': 8.5,
    'axes.edgecolor': '#b9c2cc',
    'axes.labelcolor': MUTED,
    'text.color': INK,
    'xtick.color': MUTED,
    'ytick.color': MUTED,
    'axes.linewidth': 0.8,
    'axes.unicode_minus': False,
    'text.parse_math': False,
}


@dataclasses.dataclass(frozen=True)
class Chart:
    """One picture of the page; `wide` ones take the whole width."""

    title: str
    caption: str
    svg: bytes
    wide: bool = False
    width: int = 1  # log lines averaged to a point


@dataclasses.dataclass
class Series:
    """Points of one curve; `stage` keeps a line from crossing into the next stage."""

    key: str  # in metrics.jsonl
    label: str
    colour: str
    step: list[int]
    value: list[float]
    stage: list[int]

    @property
    def dots(self) -> bool:
        """Whether it is an evaluation: every point marked, none averaged."""
        return self.key.startswith('eval/')

    @property
    def constant(self) -> bool:
        return len(set(self.value)) <= 1 and all(map(math.isfinite, self.value))


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
        out.append(
            (
                np.add.reduceat(x, edges) / size,
                np.add.reduceat(y, edges) / size,
                np.minimum.reduceat(y, edges),
                np.maximum.reduceat(y, edges),
            )
        )
    return out, width


def chart(title, series, stages, *, wide=False, log=False, ring=None, zero='') -> Chart:
    """Draws one chart, on a log axis where `log` allows it and the values span a factor of 30.

    `zero` is what the value 0 means in a series that would leave such an axis.
    """
    notes = []
    if silent := [s.label for s in series if zero and not any(s.value)]:
        notes.append(f'{zero} throughout: {", ".join(silent)}')
        series = [s for s in series if s.label not in silent]
    series = _merged(series)
    values = np.array([v for s in series for v in s.value if math.isfinite(v)])
    positive = values[values > 0]
    log = log and len(positive) > 0 and positive.max() > 30 * positive.min()
    log = bool(log and (zero or len(positive) == len(values)))
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.simplefilter('ignore')  # glyphs that only the reader's fonts have
        legend = _rows(series, 150 if wide else 68)
        figure, axis = _canvas(11.4 if wide else 5.6, 2.6 if wide else 1.9, len(legend))
        _stages(axis, stages, 150 if wide else 68)
        width, broken = 1, 0
        for s in series:
            width = max(width, _curve(axis, s, log, band=len(series) < 4))
            broken += _broken(axis, s)
        if log:
            axis.set_yscale('log')
            axis.set_ylim(bottom=max(positive.min() * 0.8, positive.max() * 1e-4))
        elif len(values) and 0 <= values.min() < 0.35 * values.max():
            axis.set_ylim(bottom=0)
        elif len(values) and np.ptp(values) < (least := 0.02 * np.abs(values).max()):
            axis.set_ylim(*(np.mean([values.min(), values.max()]) + np.array([-1, 1]) * least))
        if ring:
            _mark(axis, *ring)
        _dress(axis, log, legend)
        buffer = io.StringIO()
        figure.savefig(buffer, format='svg', metadata={'Date': None, 'Creator': None})
    if log:
        notes.insert(0, 'log scale')
    if broken:
        notes.append(f'{broken} value{"s" * (broken > 1)} not finite (red marks)')
    if log and zero and len(positive) < len(values):
        notes.append(f'gaps: {zero} or at 0')
    return Chart(title, '; '.join(notes), _web_fonts(buffer.getvalue()).encode(), wide, width)


def _merged(series: Sequence[Series]) -> list[Series]:
    """Puts curves that coincide, such as groups of one rate, under one label."""
    out: dict[tuple, Series] = {}
    for s in series:
        key = (tuple(s.step), tuple(s.value), s.dots)
        if key in out:
            out[key] = dataclasses.replace(out[key], label=f'{out[key].label}, {s.label}')
        else:
            out[key] = s
    return list(out.values())


def _rows(series: Sequence[Series], letters: int) -> list[list[Series]]:
    """Breaks the legend into rows of at most `letters`; one curve needs none."""
    rows, room = [], 0
    for s in series if len(series) > 1 else ():
        need = len(s.label) + 7
        if not rows or need > room:
            rows.append([])
            room = letters
        rows[-1].append(s)
        room -= need
    return rows


def _canvas(width: float, height: float, legend: int):
    """Returns a figure and its axes of `height` inches, with room for `legend` rows below."""
    top, bottom, left, right = 0.24, 0.42 + 0.2 * legend, 0.6, 0.1
    total = top + height + bottom
    figure = Figure(figsize=(width, total))
    box = (left / width, bottom / total, 1 - (left + right) / width, height / total)
    return figure, figure.add_axes(box)


def _curve(axis, s: Series, log: bool, *, band: bool) -> int:
    parts, width = bins(s)
    for x, mean, low, high in parts:
        if log:
            mean, low, high = (np.where(y > 0, y, np.nan) for y in (mean, low, high))
        few = s.dots or len(x) < 3
        axis.plot(
            x,
            mean,
            color=s.colour,
            lw=1.5 if band else 1.2,
            marker='o' if few else None,
            ms=3.5,
            zorder=4 if s.dots else 3,
            solid_joinstyle='round',
        )
        if width > 1 and band:
            axis.fill_between(x, low, high, color=s.colour, alpha=0.16, lw=0)
    if s.dots and len(parts) > 1:  # one evaluation a stage would otherwise be lone dots
        x, y = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
        axis.plot(x, np.where(y > 0, y, np.nan) if log else y, color=s.colour, lw=0.8, alpha=0.5)
    return width


def _broken(axis, s: Series) -> int:
    """Marks the steps where a value is NaN or infinite at the foot of the chart."""
    at = [step for step, value in zip(s.step, s.value, strict=True) if not math.isfinite(value)]
    axis.plot(
        at,
        [0.03] * len(at),
        'x',
        color='#c81e1e',
        ms=5,
        mew=1.4,
        clip_on=False,
        zorder=6,
        transform=axis.get_xaxis_transform(),
    )
    return len(at)


def _mark(axis, step: float, value: float, words: str) -> None:
    axis.plot(step, value, 'o', ms=10, mfc='none', mec=INK, mew=1.2, zorder=5)
    across, up = axis.transAxes.inverted().transform(axis.transData.transform((step, value)))
    side = 'right' if across > 0.9 else 'left' if across < 0.1 else 'center'
    axis.annotate(
        words,
        (step, value),
        xytext=(0, -16 if up > 0.5 else 10),
        textcoords='offset points',
        ha=side,
        fontsize=8.5,
        fontweight='bold',
        annotation_clip=False,
        zorder=7,
        bbox={'fc': 'white', 'ec': 'none', 'pad': 1.2, 'alpha': 0.85},
    )


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
            axis.text(
                (start + last) / 2,
                1.02,
                text,
                ha='center',
                va='bottom',
                fontsize=8,
                color=MUTED,
                transform=axis.get_xaxis_transform(),
            )


def _dress(axis, log: bool, legend: Sequence[Sequence[Series]]) -> None:
    axis.grid(axis='y', color=GRID, lw=0.8)
    axis.set_axisbelow(True)
    axis.spines[['top', 'right']].set_visible(False)
    axis.tick_params(length=3)
    axis.xaxis.set_major_locator(MaxNLocator(7, integer=True))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f'{x:,.0f}'))
    axis.set_xlabel('step', loc='right', labelpad=1)
    if log:
        axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f'{y:.3g}'))
        axis.minorticks_off()
    elif max(map(abs, axis.get_ylim())) >= 1e4:
        axis.yaxis.set_major_formatter(EngFormatter(sep=''))
    for i, row in enumerate(legend):
        lines = [
            Line2D([], [], color=s.colour, lw=1.6, marker='o' if s.dots else None, ms=3.5)
            for s in row
        ]
        foot = (0.0, -(24 + 14 * i) / 72 / (axis.bbox.height / axis.figure.dpi))
        axis.add_artist(
            Legend(
                axis,
                lines,
                [s.label for s in row],
                loc='upper left',
                bbox_to_anchor=foot,
                ncols=len(row),
                frameon=False,
                fontsize=8,
                handlelength=1.4,
                borderaxespad=0,
                borderpad=0,
                columnspacing=1.4,
            )
        )


def _web_fonts(svg: str) -> str:
    """Lets the reader's interface font, which has every script, stand for matplotlib's own."""
    return re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, 'Segoe UI', Roboto, sans-serif", svg)
