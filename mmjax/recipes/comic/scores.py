"""Scores of the comic recipe: bounds of the losses, retrieval, collapse, two figures."""

import math
import textwrap

import numpy as np
from matplotlib.figure import Figure

from mmjax.engine.task import Evaluator, Scores
from mmjax.evals import collapse, retrieval
from mmjax.losses import contrastive

# Of the collapse verdict, for the report.
VERDICTS = {
    'healthy': ('good', 'Panels of a page differ, and images find the text of their panel.'),
    'weak_alignment': ('warn', 'Images find the text of their panel no better than by chance.'),
    'page_collapsed': ('bad', 'The panels of a page have nearly the same embedding.'),
    'collapsed': ('bad', 'All panels have nearly the same embedding.'),
}


class PageScores(Evaluator):
    """Scores a split as one batch: contrastive losses, retrieval, collapse.

    Contrastive terms depend on the batch: `contrastive_collapse` and `contrastive_floor` are their
    values for equal embeddings and for perfect pages. Retrieval within the page has the panels
    with text of pages with two of them or more as queries.
    """

    def __init__(self, pages, batch_size: int):
        self.dataset = pages
        self.batch_size = batch_size

    def run(self, predict, *, final, results):
        outputs = results.outputs
        panels = results.batch['panels'].astype(bool)
        has = results.batch['modality'].astype(bool)
        metrics = _bounds(panels, results.losses['contrastive'])
        metrics |= within_and_across(outputs, panels, has)
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
            v, t = (_unit(outputs[name][row][panels]) for name in ('vision', 'text'))
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


def _unit(x):
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-9)


def _similarity(fused, panels, pages=16):
    """Draws the cosines of the first pages' panels; a healthy model shows blocks."""
    rows = _unit(fused[:pages][panels[:pages]])
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
