"""Scores of the retrieval recipe: images and prompts as queries of val, and of the gallery."""

import pathlib

import numpy as np
from matplotlib.figure import Figure

from mmjax.engine.outputs import write_prediction
from mmjax.engine.task import Evaluator, Scores, gather
from mmjax.evals import gallery as search
from mmjax.evals import modalities

VERDICTS = modalities.verdicts({'image': 'image', 'text': 'text'})


class ItemScores(Evaluator):
    """Scores images and prompts of a split as queries of its images.

    An image queries all others of the split; the prompt of an item queries all images. Losses
    take the whole split as one batch.
    """

    def __init__(self, images, batch_size: int):
        self.dataset = images
        self.batch_size = batch_size

    def run(self, predict, *, final, results):
        images = results.outputs['image']
        identity = results.batch['identity']
        rows = results.batch['row']
        ranked = search.rank(images, images, identity, identity, query_rows=rows, gallery_rows=rows)
        metrics = {'rank1': ranked.rank[1], 'map': ranked.map, 'rank1_chance': ranked.chance[1]}
        return Scores(metrics | _text_to_image(results))


class QueryGallery(Evaluator):
    """Scores images of one split, and the prompt of each item, as queries of a gallery.

    Losses are those of the gallery as one batch.
    """

    methods = ('embed_images',)

    def __init__(self, query, gallery, batch_size: int):
        self.query = query
        self.dataset = gallery
        self.batch_size = batch_size

    def run(self, predict, *, final, results):
        queries, batch = gather(predict, 'embed_images', self.query, self.batch_size, ('identity',))
        images = results.outputs['image']
        ids = batch['identity'], results.batch['identity']
        ranked = search.rank(queries, images, *ids)
        metrics = {f'rank{k}': value for k, value in ranked.rank.items()}
        metrics |= {
            'map': ranked.map,
            'minp': ranked.minp,
            'rank1_chance': ranked.chance[1],
            **_text_to_image(results),
            'queries': len(ranked.scored),
            'queries_left_out': ranked.left_out,
            'gallery': len(images),
        }
        figures = {}
        if final:
            figures = {'queries': self._queries(queries, images, *ids), 'cmc': _cmc(ranked.cmc)}
        return Scores(metrics, figures)

    def _queries(self, queries, images, query_ids, gallery_ids, count=8):
        """Draws queries of different items, each with its ten nearest images."""
        _, first = np.unique(query_ids, return_index=True)
        rows = np.sort(first)[np.linspace(0, len(first) - 1, min(count, len(first))).astype(int)]
        _, nearest = search.search(queries[rows], images, 10)
        pixels = lambda split, row: np.asarray(split.image(int(row)))
        return search.figure(
            [pixels(self.query, row) for row in rows],
            [[pixels(self.dataset, hit) for hit in hits] for hits in nearest],
            gallery_ids[nearest] == query_ids[rows][:, None],
            [self.query.items[query_ids[row]] for row in rows],
        )


def write_nearest(embedding, image, query: str, embeddings, gallery, output: pathlib.Path) -> str:
    """Writes nearest.json and nearest.png: the ten gallery images nearest to one query.

    Args:
      embedding: float [1, features], of the query.
      image: the query, to be drawn; None for a text.
      query: its name.
      embeddings: float [images, features], of the gallery's rows.

    Returns:
      A line per image, to be printed.
    """
    cosines, rows = search.search(embedding, embeddings, 10)
    lines = [f'nearest to {query}:']
    nearest = []
    drawn = [] if image is None else [('query', image)]
    for cosine, row in zip(cosines[0].tolist(), rows[0].tolist(), strict=True):
        record = gallery.record(row)
        item = record['item']
        path = record['image_path']
        nearest.append({'item_id': item, 'path': path, 'cosine': round(cosine, 4)})
        lines.append(f'{len(nearest):2d}  {cosine:.3f}  {item}  {path}')
        drawn.append((item, gallery.image(row)))
    write_prediction(output, 'nearest', {'query': query, 'nearest': nearest})
    figure = Figure(figsize=(1.5 * len(drawn), 2), layout='constrained')
    for axis, (title, pixels) in zip(
        figure.subplots(1, len(drawn), squeeze=False)[0], drawn, strict=True
    ):
        axis.imshow(np.asarray(pixels))
        axis.set_title(title, fontsize=7)
        axis.axis('off')
    figure.savefig(output / 'nearest.png', dpi=120)
    return '\n'.join([*lines, f'drawn: {output / "nearest.png"}'])


def _text_to_image(results) -> dict[str, float | str]:
    """Returns the scores of one prompt per item as queries of all images, and of each tower."""
    identity = results.batch['identity']
    items, first = np.unique(identity, return_index=True)
    images = results.outputs['image']
    texts = results.outputs['text'][first]
    ranked = search.rank(texts, images, items, identity)
    return {
        'text_to_image_r1': ranked.rank[1],
        'text_to_image_map': ranked.map,
        **modalities.tower_scores({'image': (images, identity), 'text': (texts, items)}),
    }


def _cmc(cmc):
    figure = Figure(figsize=(5, 3.2), layout='constrained')
    figure.set_label('Fraction of queries with a right image among the first k.')
    axis = figure.subplots()
    axis.plot(np.arange(1, len(cmc) + 1), cmc)
    axis.set(xlabel='k', ylabel='match rate', ylim=(0, 1.02), title='cumulative match curve')
    axis.grid(alpha=0.3)
    return figure
