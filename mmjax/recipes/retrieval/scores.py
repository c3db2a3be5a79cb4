"""Scores of the retrieval recipe: losses and retrieval on val, query against gallery, pictures."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from mmjax.engine.task import Evaluator, Scores, gather
from mmjax.evals import gallery as search
from mmjax.losses.term import Term


class ItemScores(Evaluator):
    """Embeds a split once, in order, and scores it as one batch, with identities as labels.

    Every picture asks all others of the split; pictures that are the only one of their item ask
    nothing. Prompts ask all pictures.
    """

    def __init__(self, task, pictures, batch_size: int, weights: dict[str, float]):
        self.task, self.pictures, self.batch_size, self.weights = (
            task,
            pictures,
            batch_size,
            weights,
        )

    def run(self, apply, *, final):
        outputs, identity = _embedded(apply, 'encode', self.pictures, self.batch_size)
        arrays = {name: jnp.asarray(x) for name, x in outputs.items()}
        terms = self.task._terms(
            apply.variables,
            arrays,
            jnp.asarray(identity),
            jnp.ones(len(identity), bool),
            tuple(self.weights),
        )
        metrics = {n: float(x.mean() if isinstance(x, Term) else x) for n, x in terms.items()}
        metrics['loss'] = sum(weight * metrics[name] for name, weight in self.weights.items())
        rows = np.arange(len(identity))
        found = search.rank(
            outputs['image'],
            outputs['image'],
            identity,
            identity,
            query_rows=rows,
            gallery_rows=rows,
        )
        metrics |= {'rank1': found.rank[1], 'map': found.map, 'rank1_chance': found.chance[1]}
        texts, items = _one_text_an_item(outputs['text'], identity)
        asked = search.rank(texts, outputs['image'], items, identity)
        metrics |= {'text_to_image_r1': asked.rank[1], 'text_to_image_map': asked.map}
        return Scores(metrics)


class QueryGallery(Evaluator):
    """Every query picture, and the text of every item, asks the whole gallery."""

    def __init__(self, query, gallery, batch_size: int):
        self.query, self.gallery, self.batch_size = query, gallery, batch_size

    def run(self, apply, *, final):
        ask, wanted = _embedded(apply, 'embed_images', self.query, self.batch_size)
        encoded, items = _embedded(apply, 'encode', self.gallery, self.batch_size)
        images = encoded['image']
        found = search.rank(ask, images, wanted, items)
        texts, told = _one_text_an_item(encoded['text'], items)
        asked = search.rank(texts, images, told, items)
        metrics = {f'rank{k}': value for k, value in found.rank.items()}
        metrics |= {
            'map': found.map,
            'minp': found.minp,
            'rank1_chance': found.chance[1],
            'text_to_image_r1': asked.rank[1],
            'text_to_image_map': asked.map,
            'queries': len(found.scored),
            'queries_left_out': found.left_out,
            'gallery': len(images),
        }
        drawn = {}
        if final:
            drawn = {'queries': self._queries(ask, images, wanted, items), 'cmc': _cmc(found.cmc)}
        return Scores(metrics, drawn)

    def _queries(self, ask, images, wanted, items, count=8):
        """Draws queries of different items with their first ten."""
        _, first = np.unique(wanted, return_index=True)
        rows = np.sort(first)[np.linspace(0, len(first) - 1, min(count, len(first))).astype(int)]
        _, found = search.search(ask[rows], images, 10)
        picture = lambda data, row: np.asarray(data.image(int(row)))
        return search.figure(
            [picture(self.query, row) for row in rows],
            [[picture(self.gallery, hit) for hit in hits] for hits in found],
            items[found] == wanted[rows][:, None],
            [self.query.items[wanted[row]] for row in rows],
        )


def shown(found, picture, asked: str, gallery_embeddings, gallery, output) -> str:
    """Tells the ten gallery pictures nearest to one embedding [1, features], and draws them."""
    scores, rows = search.search(found, gallery_embeddings, 10)
    output = pathlib.Path(output)
    output.mkdir(parents=True, exist_ok=True)
    lines, hits = [f'nearest to {asked}:'], []
    for place, (score, row) in enumerate(zip(scores[0], rows[0], strict=True), start=1):
        record = gallery.record(int(row))
        hits.append(
            {
                'item_id': record['item'],
                'path': record['image_path'],
                'cosine': round(float(score), 4),
            }
        )
        lines.append(f'{place:2d}  {score:.3f}  {record["item"]}  {record["image_path"]}')
    (output / 'nearest.json').write_text(json.dumps({'query': asked, 'nearest': hits}, indent=1))
    count = len(hits) + (picture is not None)
    figure = Figure(figsize=(1.5 * count, 2), layout='constrained')
    axes = figure.subplots(1, count, squeeze=False)[0]
    drawn = [('query', picture)] if picture is not None else []
    drawn += [(h['item_id'], gallery.image(int(r))) for h, r in zip(hits, rows[0], strict=True)]
    for axis, (title, image) in zip(axes, drawn, strict=True):
        axis.imshow(np.asarray(image))
        axis.set_title(title, fontsize=7)
        axis.axis('off')
    figure.savefig(output / 'nearest.png', dpi=120)
    return '\n'.join([*lines, f'drawn: {output / "nearest.png"}'])


def _embedded(apply, method, data, batch_size):
    outputs, batch = gather(apply, method, data, batch_size, ('identity',))
    return outputs, batch['identity']


def _one_text_an_item(texts, identity):
    items, first = np.unique(identity, return_index=True)
    return texts[first], items


def _cmc(cmc):
    figure = Figure(figsize=(5, 3.2), layout='constrained')
    figure.set_label('Share of queries with a right picture among the first k.')
    axis = figure.subplots()
    axis.plot(np.arange(1, len(cmc) + 1), cmc)
    axis.set(xlabel='k', ylabel='match rate', ylim=(0, 1.02), title='cumulative match curve')
    axis.grid(alpha=0.3)
    return figure
