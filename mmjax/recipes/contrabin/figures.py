"""Figures of the ContraBin recipe: likeness of modalities, where they lie, and interpolation."""

from collections import Counter
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

_ROWS, _POINTS = 64, 600  # functions drawn
_GREY = '0.8'


def similarity(outputs: Mapping[str, np.ndarray], pool: np.ndarray, has: np.ndarray) -> Figure:
    """Draws cosines of binaries with sources, and with the comments that there are.

    Args:
      outputs: embeddings by modality, float [functions, features].
      pool: int, rows of the functions to draw, of which the first 64 are.
      has: bool [functions], whether there is a comment.
    """
    figure = Figure(figsize=(8, 4), layout='constrained')
    figure.set_label(
        f'Cosines of binaries (down) and of source and comment (across), up to {_ROWS} functions.'
    )
    unit = lambda x: x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9)
    axes = figure.subplots(1, 2)
    for axis, name in zip(axes, ('source', 'comment'), strict=True):
        rows = (pool if name == 'source' else pool[has[pool]])[:_ROWS]
        cosines = unit(outputs['binary'][rows]) @ unit(outputs[name][rows]).T
        axis.set(xlabel=name, ylabel='binary')
        if cosines.size:
            image = axis.imshow(cosines, vmin=-1, vmax=1, cmap='RdBu_r')
    figure.colorbar(image, ax=axes)
    return figure


def projection(outputs: Mapping[str, np.ndarray], has: np.ndarray, labels: Sequence[str]) -> Figure:
    """Draws the two main directions of all three modalities, and binaries coloured by label.

    Args:
      outputs, has: as `similarity`; the first 600 functions are drawn.
      labels: of those functions, '' for none; the 20 most frequent have colours.
    """
    has = has[:_POINTS]
    rows = {name: outputs[name][:_POINTS] for name in ('source', 'comment', 'binary')}
    rows['comment'] = rows['comment'][has]
    whole = np.concatenate(list(rows.values()))
    _, _, directions = np.linalg.svd(whole - whole.mean(0), full_matrices=False)
    flat = {name: (points - whole.mean(0)) @ directions[:2].T for name, points in rows.items()}
    figure = Figure(figsize=(9, 4), layout='constrained')
    figure.set_label('Embeddings along their two main directions: by modality, binaries by label.')
    left, right = figure.subplots(1, 2)
    for name, points in flat.items():
        left.scatter(*points.T, s=6, label=name, alpha=0.6)
    left.legend(fontsize=7)
    labels = np.array(labels[:_POINTS])
    palette = matplotlib.colormaps['tab20'].colors
    counts = Counter(label for label in labels.tolist() if label)
    known = sorted(label for label, _ in counts.most_common(len(palette)))
    other = ~np.isin(labels, known)
    if other.any():
        right.scatter(*flat['binary'][other].T, s=6, color=_GREY, label='none or others')
    for label, colour in zip(known, palette, strict=False):
        right.scatter(*flat['binary'][labels == label].T, s=6, color=[colour], label=label)
    if known:
        right.legend(fontsize=6, loc='upper left', bbox_to_anchor=(1, 1))
    return figure


def weights(outputs: Mapping[str, np.ndarray], has: np.ndarray) -> Figure:
    """Draws how often λ (`lambda_<kind>`, float [functions]) has which value."""
    figure = Figure(figsize=(6, 3), layout='constrained')
    figure.set_label('Share of the source in the interpolation with its comment, by function.')
    axis = figure.subplots()
    for kind in ('linear', 'nonlinear'):
        values = outputs[f'lambda_{kind}'][has]
        axis.hist(values, bins=np.linspace(0, 1, 51), alpha=0.6, label=kind)
    axis.set(xlabel='λ', ylabel='functions')
    axis.legend()
    return figure
