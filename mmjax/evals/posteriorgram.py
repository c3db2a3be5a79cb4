"""Figures of what a CTC model reads: posteriors over time, and which words it confuses."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from mmjax.evals.alignment import align


def posteriorgram(
    log_probs: np.ndarray,
    spans: Sequence[tuple[int, int, int]],
    reference: Sequence[int],
    names: Sequence[str],
    title: str = '',
) -> Figure:
    """Draws the posterior of the blank and of each decoded or referenced symbol over the frames.

    Below stand what was decoded, at its frames, and the reference, whose times nobody knows: each
    word under the one it is aligned with, deleted ones between their neighbours. Green is right,
    red is wrong.

    Args:
      log_probs: float [T, V] of one row, without its padding; symbol 0 is the blank.
      spans: (symbol, first frame, frame after the last) of what was decoded, in order.
      reference: symbols.
      names: of all symbols, V of them.
      title: a line above.

    Raises:
      ValueError: log_probs that are not [T, V] with a name for each symbol.
    """
    log_probs = np.asarray(log_probs, np.float64)
    if log_probs.ndim != 2 or log_probs.shape[1] != len(names):
        raise ValueError(f'log_probs must be [T, {len(names)}], got {list(log_probs.shape)}')
    tracks = list(dict.fromkeys([0, *(symbol for symbol, _, _ in spans), *reference]))
    decoded, expected = _words(spans, reference, len(log_probs))
    heights = [len(tracks), 4]
    fig = Figure(figsize=(10, 1.6 + 0.24 * sum(heights)), layout='constrained')
    fig.set_label('Posterior of each frame, what was decoded from it, and the reference.')
    upper, lower = fig.subplots(2, 1, sharex=True, height_ratios=heights)
    edges = -0.5, len(log_probs) - 0.5, len(tracks) - 0.5, -0.5
    image = upper.imshow(
        np.exp(log_probs[:, tracks]).T,
        aspect='auto',
        interpolation='nearest',
        cmap='Greys',
        vmin=0,
        vmax=1,
        extent=edges,
    )
    fig.colorbar(image, ax=upper, label='probability', pad=0.01)
    upper.set_yticks(range(len(tracks)), [names[symbol] for symbol in tracks], fontsize=7)
    upper.set_title(title, fontsize=9)
    upper.hlines(np.arange(1, len(tracks)) - 0.5, *edges[:2], color='0.85', linewidth=0.5)
    for symbol, start, end, correct in decoded:
        colour = 'tab:green' if correct else 'tab:red'
        row = tracks.index(symbol)
        upper.plot([start - 0.5, end - 0.5], [row + 0.4] * 2, color=colour, linewidth=2)
        lower.barh(0, end - start, left=start - 0.5, height=0.3, color=colour)
        _label(lower, (start + end - 1) / 2, 0.25, names[symbol], colour)
    for symbol, x, correct in expected:
        _label(lower, x, 1.0, names[symbol], 'tab:green' if correct else 'tab:red')
    lower.set(xlabel='frame', ylim=(2.2, -0.4), yticks=[0, 1.15])
    lower.set_yticklabels(['decoded', 'reference'], fontsize=7)
    return fig


def confusions(counts: Mapping[tuple[str, str], int], top_k: int = 20) -> Figure:
    """Draws the most frequent substitutions as bars, 'reference → hypothesis'.

    Args:
      counts: {(reference, hypothesis): how often}, as `alignment.Errors.confusions`.
      top_k: bars at most.
    """
    # Equal counts in alphabetical order, so that the figure does not depend on the data's.
    pairs = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:top_k]
    fig = Figure(figsize=(7, 1.0 + 0.24 * max(len(pairs), 1)), layout='constrained')
    fig.set_label('The most frequent substitutions: reference → what was decoded instead.')
    axis = fig.subplots()
    axis.barh(range(len(pairs)), [count for _, count in pairs], color='tab:red')
    axis.set_yticks(range(len(pairs)), [f'{a} → {b}' for (a, b), _ in pairs], fontsize=7)
    axis.invert_yaxis()
    axis.set_xlabel('times')
    axis.xaxis.get_major_locator().set_params(integer=True)
    return fig


def _words(spans, reference, frames):
    """Returns (symbol, start, end, correct) of decoded, (symbol, x, correct) of true words."""
    steps = align(list(reference), [symbol for symbol, _, _ in spans])
    decoded = []
    positions = []
    correct = []
    span = 0
    for kind, _, _ in steps:
        if kind != 'delete':
            symbol, start, end = spans[span]
            decoded.append((symbol, start, end, kind == 'equal'))
            span += 1
        if kind != 'insert':
            positions.append(np.nan if kind == 'delete' else (start + end - 1) / 2)
            correct.append(kind == 'equal')
    index = np.arange(-1, len(positions) + 1)
    positions = np.array([-0.5, *positions, frames - 0.5])
    known = np.isfinite(positions)
    positions = np.interp(index, index[known], positions[known])[1:-1]
    return decoded, list(zip(reference, positions, correct, strict=True))


def _label(axis, x, y, text, colour):
    axis.text(x, y, text, fontsize=7, color=colour, ha='center', va='top', rotation=30)
