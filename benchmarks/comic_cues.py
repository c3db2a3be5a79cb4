"""How far may the contrastive term fall on a folder of comic pages? What cues alone can tell.

    python benchmarks/comic_cues.py --root=FOLDER [--embeddings=FOLDER]

Two panels are as alike as a weighted sum of cues says. The weights are those of the least
contrastive loss over all panels of a split as one batch, a convex problem: fitted on the training
pages, and on the validation pages that are scored, which no model may do. The fall is the share of
the way from collapse to floor.

  format    told whether both are from a strip (`other` beside books named in the ids)
  book      told whether both are from one book (what stands before the last `__` of an id)
  text      likeness of words, rare ones weighing more; both silent
  pixels    colours of both, apart as pages of one book are, learnt on training pages; tone
  layout    how near heights, widths and places are
  overlap   of two boxes on their pages: panels of one page lie apart. Pairs can tell, embeddings
            not: two panels at the same place have the same one as far as places go
  model     cosine of what a run's --mode=embed has written to --embeddings; its training pages are
            too well known to fit weights on

Writes benchmarks/results/comic_cues.json.
"""

import argparse
import io
import json
import pathlib

import comic_floors
import numpy as np
from PIL import Image
from scipy.optimize import minimize
from scipy.special import logsumexp

SETS = (
    ('format',),
    ('book',),
    ('text',),
    ('pixels',),
    ('layout',),
    ('text', 'pixels'),
    ('text', 'pixels', 'layout'),
    ('text', 'pixels', 'layout', 'format'),
    ('text', 'pixels', 'layout', 'book'),
    ('text', 'pixels', 'layout', 'overlap'),
)

MODEL = (('model',), ('model', 'text', 'pixels', 'layout'), ('model', 'book'))


def panels(root: pathlib.Path, split: str) -> dict:
    """Returns page, id, book, text, box (in shares of the page) and colours of all panels."""
    found = {name: [] for name in ('page', 'id', 'book', 'text', 'box', 'colours')}
    for number, record in enumerate(comic_floors.folder(root, split)):
        picture = Image.open(io.BytesIO(record['image'])).convert('RGB')
        width, height = record['page']['image_width'], record['page']['image_height']
        for panel in record['page']['panels']:
            x, y, w, h = panel['bbox']
            cut = picture.crop((x, y, x + w, y + h)).resize((64, 64), Image.Resampling.BOX)
            found['page'].append(number)
            found['id'].append(record['id'])
            found['book'].append(record['id'].rpartition('__')[0])
            found['text'].append(panel['text'])
            found['box'].append((x / width, y / height, w / width, h / height))
            found['colours'].append(comic_floors.colours(np.asarray(cut)[None])[0])
    return {name: np.array(values) for name, values in found.items()}


def embedded(folder: pathlib.Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the unit embeddings of all panels of a split, and the ids of their pages."""
    rows = [json.loads(line) for line in (folder / 'index.jsonl').read_text().splitlines()]
    own = [place for place, row in enumerate(rows) if row['split'] == split]
    mask = np.load(folder / 'mask.npy')[own]
    z = np.load(folder / 'embeddings.npy')[own][mask]
    pages = np.repeat([rows[place]['canonical_id'] for place in own], mask.sum(1))
    return z / np.linalg.norm(z, axis=1, keepdims=True), pages


def words(train: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Unit tf-idf rows; a word that training lacks weighs like one seen once."""
    split = lambda texts: [set(comic_floors.words(text)) for text in texts]
    seen = [word for text in split(train) for word in text]
    names, counts = np.unique(seen, return_counts=True)
    times = dict(zip(names.tolist(), counts.tolist(), strict=True))
    texts = split(own)
    column = {word: i for i, word in enumerate(sorted(set().union(*texts)))}
    bags = np.zeros((len(texts), len(column)))
    for row, text in enumerate(texts):
        for word in text:
            bags[row, column[word]] = np.log(len(train) / times.get(word, 1))
    return bags / np.maximum(np.linalg.norm(bags, axis=1, keepdims=True), 1e-9)


def metric(train: dict, shrinkage: float = 0.1) -> np.ndarray:
    """Returns W so that x W is white inside the pages of training, where x are colours."""
    x, places = train['colours'], np.unique(train['page'], return_inverse=True)[1]
    sums = np.zeros((places.max() + 1, x.shape[1]))
    np.add.at(sums, places, x)
    rest = x - (sums / np.bincount(places)[:, None])[places]
    spread = rest.T @ rest / len(x)
    spread += shrinkage * np.trace(spread) / len(spread) * np.eye(len(spread))
    values, vectors = np.linalg.eigh(spread)
    return vectors / np.sqrt(values)


def cues(own: dict, train: dict) -> dict[str, list[np.ndarray]]:
    """Returns [n, n] cues of pairs, by name, each of mean 0 and deviation 1."""
    apart = lambda x: np.abs(x[:, None] - x[None])
    far = lambda x: np.sqrt(np.maximum((x**2).sum(1)[:, None] + (x**2).sum(1) - 2 * x @ x.T, 0))
    silent = np.char.strip(own['text']) == ''
    x, y, w, h = own['box'].T
    side = lambda a, b: np.maximum(
        np.minimum((a + b)[:, None], a + b) - np.maximum(a[:, None], a), 0
    )
    overlap = side(x, w) * side(y, h) / np.minimum(*np.meshgrid(w * h, w * h))
    bags, colours = words(train['text'], own['text']), own['colours']
    books = own['book'][:, None] == own['book']
    strip = np.char.count(own['book'], '__') == 0
    found = {
        'format': [strip[:, None] == strip],
        'book': [books],
        'text': [bags @ bags.T, np.sqrt(np.maximum(bags @ bags.T, 0)), silent[:, None] & silent],
        'pixels': [
            far(colours @ metric(train)),
            far(colours[:, 6:]),
            far(colours[:, :3]),
            far(colours[:, 3:6]),
        ],
        'layout': [
            apart(h),
            apart(w),
            apart(y),
            apart(x),
            np.sqrt(apart(h)),
            np.sqrt(apart(y)),
            apart(y + h),
        ],
        'overlap': [overlap, overlap > 0.05],
    }
    for name in ('pixels', 'layout'):
        found[name] += [c**2 for c in found[name]]
    scaled = lambda c: (c - c.mean()) / (c.std() + 1e-9)
    return {name: [scaled(np.float64(c)) for c in group] for name, group in found.items()}


def loss(weights: np.ndarray, pairs: np.ndarray, page: np.ndarray) -> tuple[float, np.ndarray]:
    """SupCon (L_out) with likenesses Σ weight · cue over all panels; its gradient."""
    others = ~np.eye(len(page), dtype=bool)
    same = (page[:, None] == page) & others
    anchors = same.any(1)
    share = same[anchors] / same[anchors].sum(1, keepdims=True)
    scores = np.where(others, np.tensordot(weights, pairs, 1), -np.inf)[anchors]
    total = logsumexp(scores, axis=1, keepdims=True)
    inside = np.where(share > 0, scores, 0)
    value = np.mean(total[:, 0] - (share * inside).sum(1))
    change = np.exp(scores - total) - share
    return value, np.einsum('kij,ij->k', pairs[:, anchors], change) / anchors.sum()


def bounds(page: np.ndarray) -> tuple[float, float]:
    """Returns (collapse, floor) of the mean loss."""
    size = np.bincount(page)[page]
    return float(np.log(len(page) - 1)), float(np.log(size[size > 1] - 1).mean())


def fall(weights: np.ndarray, pairs: np.ndarray, page: np.ndarray) -> float:
    collapse, floor = bounds(page)
    return (collapse - loss(weights, pairs, page)[0]) / (collapse - floor)


def fitted(pairs: np.ndarray, page: np.ndarray) -> np.ndarray:
    """Returns the weights of the least loss, with a little of their squares."""

    def objective(weights):
        value, change = loss(weights, pairs, page)
        return value + 1e-3 * weights @ weights, change + 2e-3 * weights

    return minimize(
        objective, np.zeros(len(pairs)), jac=True, method='L-BFGS-B', options=dict(maxiter=100)
    ).x


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--root', type=pathlib.Path, required=True, help='a folder of pages')
    parser.add_argument('--embeddings', type=pathlib.Path, help='what --mode=embed has written')
    told = parser.parse_args()
    root = told.root
    train, val = panels(root, 'train'), panels(root, 'val')
    known, scored = cues(train, train), cues(val, train)
    if told.embeddings:
        z, pages = embedded(told.embeddings, 'val')
        if not np.array_equal(pages, val['id']):
            parser.error(f'{told.embeddings} holds other validation panels than {root}')
        scored['model'] = [(z @ z.T - (z @ z.T).mean()) / (z @ z.T).std()]
    collapse, floor = bounds(val['page'])
    unseen = ~np.isin(val['book'], train['book'])
    print(
        f'{len(val["page"])} panels of {len(set(val["page"]))} pages, {unseen.mean():.2f} of '
        f'books that training lacks; collapse {collapse:.3f}, floor {floor:.3f}'
    )
    print(f'{"fall, weights fitted on":32} training  validation')
    found = {}
    for names in (*SETS, *(MODEL if told.embeddings else ())):
        stack = lambda groups, names=names: np.stack([c for name in names for c in groups[name]])
        own, falls = stack(scored), {}
        if 'model' not in names:
            falls['training'] = fall(fitted(stack(known), train['page']), own, val['page'])
        falls['validation'] = fall(fitted(own, val['page']), own, val['page'])
        found[' '.join(names)] = falls
        first = f'{falls["training"]:8.3f}' if 'training' in falls else ' ' * 8
        print(f'{" ".join(names):32} {first}  {falls["validation"]:8.3f}', flush=True)
    results = {
        'panels': len(val['page']),
        'unseen_book': float(unseen.mean()),
        'collapse': collapse,
        'floor': floor,
        'fall': found,
    }
    path = pathlib.Path(__file__).resolve().parent / 'results' / 'comic_cues.json'
    path.write_text(json.dumps(results, indent=1) + '\n')


if __name__ == '__main__':
    main()
