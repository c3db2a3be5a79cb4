"""Scores of the comic recipe: bounds of losses, retrieval, collapse, modalities, two figures."""

import functools
import math
import textwrap
from collections.abc import Callable

import jax
import numpy as np
from matplotlib.figure import Figure

from mmjax.engine.task import Evaluator, Scores
from mmjax.evals import collapse, gallery, modalities, retrieval
from mmjax.losses import contrastive
from mmjax.recipes.comic.data import MODALITIES

MODALITY_PANELS = 4096  # about the most panels that `modality_scores` are of: they are quadratic
# (alone [rows, 3, D], present bool [rows, 3]) → fused [rows, D]
Fuse = Callable[[np.ndarray, np.ndarray], np.ndarray]

# Of the collapse verdict and the modality verdict, for the report.
VERDICTS = {
    'healthy': ('good', 'Panels of a page differ, and images find the text of their panel.'),
    'weak_alignment': ('warn', 'Images find the text of their panel no better than by chance.'),
    'page_collapsed': ('bad', 'The panels of a page have nearly the same embedding.'),
    'collapsed': ('bad', 'All panels have nearly the same embedding.'),
    **modalities.verdicts({'vision': 'image', 'text': 'text', 'composition': 'place'}),
}


class PageScores(Evaluator):
    """Scores a split as one batch: contrastive losses, retrieval, collapse.

    Contrastive terms depend on the batch: `contrastive_collapse` and `contrastive_floor` are their
    values for equal embeddings and for perfect pages. Retrieval within the page has the panels
    with text of pages with two of them or more as queries; it scores the towers. What the fused
    embedding keeps of each modality: see `modality_scores`.
    """

    def __init__(self, pages, batch_size: int, fuse):
        """fuse: `ComicTask.fuse`."""
        self.dataset = pages
        self.batch_size = batch_size
        self._fuse = jax.jit(fuse)

    def run(self, predict, *, final, results):
        outputs = results.outputs
        panels = results.batch['panels'].astype(bool)
        has = results.batch['modality'].astype(bool)
        metrics = _bounds(panels, results.losses['contrastive'])
        metrics |= within_and_across(outputs, panels, has)
        fuse = functools.partial(_in_chunks, functools.partial(self._fuse, predict.variables))
        pages = _spread(panels.sum(1), MODALITY_PANELS)
        has &= panels[..., None]
        metrics |= modality_scores(fuse, outputs['alone'][pages], has[pages])
        figures = {}
        if final:
            both = panels & has[..., 0] & has[..., 1]
            figures['pages'] = self._pages(outputs, results.batch, both)
            figures['similarity'] = _similarity(outputs['fused'], panels)
        return Scores(metrics, figures)

    def _pages(self, outputs, batch, queries, count=6):
        """Draws pages whose panels carry the text that the model finds for them."""
        rows = np.flatnonzero(queries.sum(1) > 1)[:count]
        figure = Figure(figsize=(12, 2.3 * max(len(rows), 1)), layout='constrained')
        widest = max([int(queries[row].sum()) for row in rows], default=1)
        axes = figure.subplots(max(len(rows), 1), widest, squeeze=False)
        figure.set_label(
            'Panels with the text of their page that their image retrieves; green if it is theirs.'
        )
        for axis in axes.flat:
            axis.axis('off')
        for line, row in enumerate(rows):
            panels = np.flatnonzero(queries[row])
            example = self.dataset.example(int(batch['row'][row]), np.random.default_rng(0), False)
            texts = self.dataset.record(int(batch['row'][row]))['texts']
            v, t = (retrieval.unit(outputs[name][row][panels]) for name in ('vision', 'text'))
            matches = np.argmax(v @ t.T, 1)
            for column, (panel, answer) in enumerate(zip(panels, matches, strict=True)):
                axis, right = axes[line, column], answer == column
                axis.imshow(example['images'][panel])
                axis.axis('on')
                axis.set(xticks=[], yticks=[])
                for spine in axis.spines.values():
                    spine.set(color='tab:green' if right else 'tab:red', linewidth=3)
                text = textwrap.fill(texts[panels[answer]], 26, max_lines=4)
                axis.set_title(text, fontsize=7, color='black' if right else 'tab:red')
        return figure


def _bounds(panels, contrastive_loss: float) -> dict[str, float]:
    """Returns collapse and floor of the contrastive loss, and how far it fell between them."""
    sizes = panels.sum(1)
    floor = contrastive.supcon_floor(sizes)
    collapse_value = contrastive.supcon_collapse(int(sizes.sum()))
    span = collapse_value - floor
    return {
        'contrastive_floor': floor,
        'contrastive_collapse': collapse_value,
        'contrastive_fall': (collapse_value - contrastive_loss) / span if span else math.nan,
        'pages': len(panels),
        'panels': int(sizes.sum()),
    }


def within_and_across(outputs, panels, has) -> dict[str, float | str]:
    """Returns retrieval within the page and over the split, cosines, and the collapse verdict."""
    page = np.broadcast_to(np.arange(len(panels))[:, None], panels.shape)
    both = panels & has[..., 0] & has[..., 1]
    vision, text, groups = outputs['vision'][both], outputs['text'][both], page[both]
    forward = retrieval.within_groups(vision, text, groups)
    back = retrieval.within_groups(text, vision, groups)
    intra, inter = collapse.page_cosines(outputs['fused'][panels], page[panels])
    error = retrieval.bootstrap_by_group(forward.correct, forward.groups)
    out = {'image_to_text_chance': forward.chance[1], 'image_to_text_standard_error': error}
    for name, result in (('image_to_text', forward), ('text_to_image', back)):
        out |= {f'{name}_r{k}': value for k, value in result.recall.items()}
    for name, a, b in (('image_to_text', vision, text), ('text_to_image', text, vision)):
        out |= {f'{name}_global_r{k}': value for k, value in retrieval.paired(a, b).items()}
    out |= {'intra_page_cosine': intra, 'inter_page_cosine': inter}
    out['effective_rank'] = collapse.effective_rank(outputs['fused'][panels])
    accuracy, chance = forward.recall[1], forward.chance[1]
    out['collapse_verdict'] = (
        'no page with two texts'
        if math.isnan(accuracy)
        else collapse.verdict(intra, inter, accuracy, chance, max(error, forward.chance_error))
    )
    return out


def page_retrieval(fused, page) -> tuple[float, float]:
    """Returns (mAP, R@1) of the panels of a page among all others, by embeddings [n, D]."""
    rows = np.arange(len(page))
    scores = gallery.rank(fused, fused, page, page, query_rows=rows, gallery_rows=rows, ks=(1,))
    return scores.map, scores.rank[1]


def modality_scores(fuse: Fuse, alone: np.ndarray, has: np.ndarray) -> dict[str, float | str]:
    """Returns what the fused embedding keeps of each modality.

    * `page_map`, `page_r1`: panels of the page among all panels, by the fused embedding of what
      each has.

    The others are over the `complete_panels`, which have all modalities. A modality that less than
    a twentieth of the panels has is left out.

    * `page_map_complete`, `_only_m`, `_without_m` (and `page_r1_…`): by the embedding of all or a
      part of the modalities, of queries and gallery alike;
    * `panel_r1_from_m`: the panel itself among all, by modality m alone;
    * `swap_cosine_m`: mean cosine of a panel's embedding before and after modality m is replaced by
      that of a panel of another page; `modality_verdict` names those that hardly move it;
    * `twin_m`: how often modality m alone is nearer to its own panel than to the twin that differs
      in m alone; `twin_m_by_page`: the same of the mean of the other panels of the page.

    Args:
      fuse: maps modalities [rows, 3, D] and which are present [rows, 3] to embeddings [rows, D].
      alone: float [pages, panels, 3, D], the layer-normed modalities.
      has: bool [pages, panels, 3], all False where there is no panel.
    """
    panels = has.any(-1)
    page, _ = np.nonzero(panels)
    out: dict[str, float | str] = {}
    if len(np.unique(page)) < len(page):
        out['page_map'], out['page_r1'] = page_retrieval(fuse(alone[panels], has[panels]), page)
    known = has.sum((0, 1)) >= max(0.05 * panels.sum(), 1)
    complete = (has | ~known).all(-1) & panels
    page, _ = np.nonzero(complete)
    x = alone[complete]
    out['complete_panels'] = len(x)
    names = {index: MODALITIES[index] for index in np.flatnonzero(known)}
    largest = np.bincount(page).max(initial=0)
    if len(names) < 2 or len(page) < 2 * largest:
        return {**out, 'modality_verdict': modalities.UNKNOWN}
    present = lambda *indices: np.isin(np.arange(3), indices)[None].repeat(len(x), 0)
    subsets = {'complete': tuple(names)}
    subsets |= {f'only_{name}': (index,) for index, name in names.items()}
    if len(names) > 2:
        for index, name in names.items():
            subsets[f'without_{name}'] = tuple(other for other in names if other != index)
    for suffix, indices in subsets.items():
        scores = page_retrieval(fuse(x, present(*indices)), page)
        out[f'page_map_{suffix}'], out[f'page_r1_{suffix}'] = scores
    fused = fuse(x, present(*names))
    # Rows are in the order of pages: half of them further on is another page, of another book.
    other = np.roll(np.arange(len(x)), -max(largest, len(x) // 2))
    units = retrieval.unit(fused)
    sums = np.zeros((len(alone), x.shape[-1]))
    np.add.at(sums, page, units)
    context = sums[page] - units  # zero for the only panel of its page
    accompanied = np.bincount(page)[page] > 1
    swaps = {}
    for index, name in names.items():
        swapped = x.copy()
        swapped[:, index] = x[other, index]
        twin = fuse(swapped, present(*names))
        swaps[name] = float(modalities.cosines(fused, twin).mean())
        out[f'panel_r1_from_{name}'] = retrieval.paired(x[:, index], fused, ks=(1,))[1]
        out[f'twin_{name}'] = modalities.twin_accuracy(x[:, index], fused, twin)
        out[f'twin_{name}_by_page'] = modalities.twin_accuracy(
            context[accompanied], fused[accompanied], twin[accompanied]
        )
    out |= {f'swap_cosine_{name}': value for name, value in swaps.items()}
    far = float(modalities.cosines(fused, fused[other]).mean())
    out['modality_verdict'] = modalities.verdict(swaps, far)
    return out


def _spread(sizes: np.ndarray, limit: int) -> np.ndarray:
    """Returns rows spread evenly over the pages, with about `limit` panels at most."""
    count = min(len(sizes), max(int(len(sizes) * limit / max(sizes.sum(), 1)), 1))
    return np.linspace(0, len(sizes) - 1, count).round().astype(int)


def _in_chunks(fuse: Fuse, alone: np.ndarray, present: np.ndarray, rows: int = 4096) -> np.ndarray:
    """Returns fuse(alone, present), computed on padded chunks of one shape."""
    rows = min(rows, len(alone))
    parts = []
    for start in range(0, len(alone), rows):
        part = alone[start : start + rows]
        pad = rows - len(part)
        inputs = (
            np.pad(part, ((0, pad), (0, 0), (0, 0))),
            np.pad(present[start : start + rows], ((0, pad), (0, 0))),
        )
        parts.append(np.asarray(fuse(*inputs))[: len(part)])
    return np.concatenate(parts)


def _similarity(fused, panels, pages=16):
    """Draws the cosines of the first pages' panels; a healthy model shows blocks."""
    rows = retrieval.unit(fused[:pages][panels[:pages]])
    figure = Figure(figsize=(6, 5), layout='constrained')
    figure.set_label('Cosines of fused panel embeddings; lines separate pages.')
    axis = figure.subplots()
    image = axis.imshow(rows @ rows.T, vmin=-1, vmax=1, cmap='RdBu_r')
    for edge in np.cumsum(panels[:pages].sum(1))[:-1] - 0.5:
        axis.axhline(edge, color='black', linewidth=0.4)
        axis.axvline(edge, color='black', linewidth=0.4)
    axis.set(xlabel='panel', ylabel='panel', title=f'cosine of panel embeddings, {pages} pages')
    figure.colorbar(image)
    return figure
