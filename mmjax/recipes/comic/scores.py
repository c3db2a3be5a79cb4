"""Scores of the comic recipe: losses over the whole split, retrieval, collapse, two pictures."""

import math
import textwrap

import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from mmjax.engine.task import Evaluator, Scores
from mmjax.evals import collapse, retrieval
from mmjax.losses import contrastive
from mmjax.losses.term import Term


class PageScores(Evaluator):
    """Embeds a split once, in order, and scores it as one batch.

    Contrastive terms depend on the batch, so the whole split is one: `contrastive_collapse` and
    `contrastive_floor` are its values for equal embeddings and for perfect pages. Retrieval
    within the page asks only panels with text on pages with two of them or more.
    """

    def __init__(self, task, pages, batch_size: int, weights: dict[str, float]):
        self.task, self.pages, self.batch_size, self.weights = task, pages, batch_size, weights

    def run(self, apply, *, final):
        outputs, batches = [], []
        for output, batch in apply('encode', self.pages, self.batch_size):
            outputs.append(output)
            batches.append({key: batch[key] for key in ('panels', 'modality', 'row')})
        outputs, batch = _stack(outputs), _stack(batches)
        panels, has = batch['panels'].astype(bool), batch['modality'].astype(bool)
        metrics = self._losses(outputs, panels, has)
        metrics |= within_and_across(outputs, panels, has)
        drawn = {}
        if final:
            drawn['pages'] = self._pages(outputs, batch, panels & has[..., 0] & has[..., 1])
            drawn['similarity'] = _similarity(outputs['fused'], panels)
        return Scores(metrics, drawn)

    def _losses(self, outputs, panels, has):
        arrays = {key: jnp.asarray(value) for key, value in outputs.items()}
        terms = self.task._terms(arrays, jnp.asarray(panels), jnp.asarray(has))
        out = {name: float(term.mean()) for name, term in terms.items() if isinstance(term, Term)}
        out['loss'] = sum(weight * out[name] for name, weight in self.weights.items())
        sizes = panels.sum(1)
        out['contrastive_floor'] = contrastive.supcon_floor(sizes)
        out['contrastive_collapse'] = contrastive.supcon_collapse(int(sizes.sum()))
        span = out['contrastive_collapse'] - out['contrastive_floor']
        out['contrastive_fall'] = (out['contrastive_collapse'] - out['contrastive']) / span
        return out | {'pages': len(panels), 'panels': int(sizes.sum())}

    def _pages(self, outputs, batch, asked, count=6):
        """Draws pages whose panels carry the text that the model finds for them."""
        rows = np.flatnonzero(asked.sum(1) > 1)[:count]
        figure = Figure(figsize=(12, 2.3 * max(len(rows), 1)), layout='constrained')
        widest = max([int(asked[row].sum()) for row in rows], default=1)
        axes = figure.subplots(max(len(rows), 1), widest, squeeze=False)
        figure.set_label(
            'Panels with the text of their page that their picture finds; green where it is theirs.'
        )
        for axis in axes.flat:
            axis.axis('off')
        for line, row in enumerate(rows):
            shown = np.flatnonzero(asked[row])
            example = self.pages.example(int(batch['row'][row]), np.random.default_rng(0), False)
            texts = self.pages.record(int(batch['row'][row]))['texts']
            v, t = (_unit(outputs[name][row][shown]) for name in ('vision', 'text'))
            found = np.argmax(v @ t.T, 1)
            for column, (panel, answer) in enumerate(zip(shown, found, strict=True)):
                axis, right = axes[line, column], answer == column
                axis.imshow(example['images'][panel])
                axis.axis('on')
                axis.set(xticks=[], yticks=[])
                for spine in axis.spines.values():
                    spine.set(color='tab:green' if right else 'tab:red', linewidth=3)
                text = textwrap.fill(texts[shown[answer]], 26, max_lines=4)
                axis.set_title(text, fontsize=7, color='black' if right else 'tab:red')
        return figure


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
    for name, found in (('image_to_text', forward), ('text_to_image', back)):
        out |= {f'{name}_r{k}': value for k, value in found.recall.items()}
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


def _stack(parts: list[dict]) -> dict[str, np.ndarray]:
    """Joins batches whose panel axis may differ in length (buckets); pads with zeros."""
    key = 'panels' if 'panels' in parts[0] else 'fused'
    width = max(part[key].shape[1] for part in parts)

    def pad(x):
        if x.ndim < 2 or x.shape[1] >= width:
            return x
        return np.pad(x, [(0, 0), (0, width - x.shape[1])] + [(0, 0)] * (x.ndim - 2))

    ragged = ('fused', 'vision', 'text', 'gates', 'panels', 'modality')
    join = lambda name: [pad(p[name]) if name in ragged else p[name] for p in parts]
    return {name: np.concatenate(join(name)) for name in parts[0]}


def _unit(x):
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-9)


def _similarity(fused, panels, pages=16):
    """Draws the cosines of the first pages' panels; a healthy model shows blocks."""
    rows = _unit(fused[:pages][panels[:pages]])
    figure = Figure(figsize=(6, 5), layout='constrained')
    figure.set_label('Cosines of fused panel embeddings; lines part pages.')
    axis = figure.subplots()
    image = axis.imshow(rows @ rows.T, vmin=-1, vmax=1, cmap='RdBu_r')
    for edge in np.cumsum(panels[:pages].sum(1))[:-1] - 0.5:
        axis.axhline(edge, color='black', linewidth=0.4)
        axis.axvline(edge, color='black', linewidth=0.4)
    axis.set(xlabel='panel', ylabel='panel', title=f'cosine of panel embeddings, {pages} pages')
    figure.colorbar(image)
    return figure
