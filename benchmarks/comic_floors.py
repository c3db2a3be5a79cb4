"""How far image→text retrieval within a page gets without understanding panels: chance and floors.

    python benchmarks/comic_floors.py [--root=FOLDER] [--train=1000] [--val=120]

Each floor predicts a weighted bag of words for a validation panel and takes the text of its page
nearest to it; R@1 is the share of right texts over panels with a text on pages with at least two,
ties counted as a random pick among them.

  pixels       words of the nearest training panel in pixels (and the mean of the 20 nearest)
  bag of words ridge regression from colours alone (mean, spread and histogram) to words
  layout       ridge regression from the composition (squares and products included) to words
  linear       ridge regression from 16 × 16 pixels to words; not a named floor, shown beside them

Writes benchmarks/results/comic_floors.json.
"""

import argparse
import csv
import dataclasses
import io
import json
import pathlib
import re
import sys
import time

import numpy as np
from PIL import Image

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from mmjax.recipes.comic.synthetic import pages as comic_synthetic

NAMED = ('pixels', 'bag of words', 'layout')


@dataclasses.dataclass(frozen=True)
class Panels:
    """Panels with a text: pixels [n, S, S, 3] uint8, texts, page ids [n], composition [n, 7]."""

    pixels: np.ndarray
    texts: list[str]
    pages: np.ndarray
    composition: np.ndarray


def collect(records, size: int = 64) -> Panels:
    """Cuts records of the on-disk format (image: bytes, page: {...}) into panels with text."""
    pixels, texts, pages, composition = [], [], [], []
    for number, record in enumerate(records):
        picture = Image.open(io.BytesIO(record['image'])).convert('RGB')
        page = record['page']
        width, height = page['image_width'], page['image_height']
        for position, panel in enumerate(page['panels']):
            x, y, w, h = panel['bbox']
            if not panel['text'].strip():
                continue
            cut = picture.crop((x, y, x + w, y + h)).resize((size, size), Image.Resampling.BOX)
            pixels.append(np.asarray(cut))
            texts.append(panel['text'])
            pages.append(number)
            area = w * h / (width * height)
            centre = ((x + w / 2) / width, (y + h / 2) / height)
            composition.append((w / h, area, position / 16, 0.0, 0.0, *centre))
    return Panels(np.stack(pixels), texts, np.array(pages), np.array(composition, np.float32))


def synthetic(split: str, count: int, seed: int = 0):
    """Yields the built-in narrative pages among the first `count` of a split."""
    for index in range(count):
        record = comic_synthetic.page(seed, split, index)
        if record['page_type'] in comic_synthetic.NARRATIVE:
            yield record


def folder(root: pathlib.Path, split: str):
    """Yields the narrative pages of a split of a user's folder, with their ids."""
    labels = json.loads((root / 'labels.json').read_text())
    with (root / 'pages.csv').open(newline='') as file:
        rows = [row for row in csv.DictReader(file) if row['split'] == split]
    for row in rows:
        name = row['canonical_id']
        if labels[name] in comic_synthetic.NARRATIVE:
            page = json.loads((root / 'json' / f'{name}.json').read_text())
            yield {'id': name, 'image': (root / row['image_path']).read_bytes(), 'page': page}


def words(text: str) -> list[str]:
    return re.findall(r'\w+', text.lower())


def bag_of_words(train: list[str], val: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Unit-norm tf-idf rows over the words in at least 3 training texts: [n, words], [m, words]."""
    split = [[words(text) for text in texts] for texts in (train, val)]
    seen: dict[str, int] = {}
    for text in split[0]:
        for word in set(text):
            seen[word] = seen.get(word, 0) + 1
    column = {word: i for i, word in enumerate(sorted(w for w, n in seen.items() if n >= 3))}
    weight = np.array([np.log(len(train) / seen[word]) for word in column])
    bags = []
    for texts in split:
        bag = np.zeros((len(texts), len(column)), np.float32)
        for row, text in enumerate(texts):
            for word in text:
                if word in column:
                    bag[row, column[word]] = weight[column[word]]
        bags.append(bag / np.maximum(np.linalg.norm(bag, axis=1, keepdims=True), 1e-9))
    return bags[0], bags[1]


def recall_within_page(predicted: np.ndarray, bags: np.ndarray, pages: np.ndarray) -> float:
    """R@1 [0, 1] of each row's own text among the texts of its page, by inner product."""
    hits = []
    for page in np.unique(pages):
        rows = np.flatnonzero(pages == page)
        if len(rows) < 2:
            continue
        scores = predicted[rows] @ bags[rows].T  # [panels, texts]
        own, best = np.diag(scores), scores.max(1)
        ties = np.isclose(scores, best[:, None], atol=1e-7).sum(1)
        hits += list(np.isclose(own, best, atol=1e-7) / ties)
    return float(np.mean(hits))


def nearest(train: np.ndarray, val: np.ndarray, bags: np.ndarray, count: int) -> np.ndarray:
    """Mean bag of the `count` training rows nearest to each validation row (Euclidean)."""
    train, val = (x.reshape(len(x), -1).astype(np.float32) / 255 for x in (train, val))
    distance = (train**2).sum(1)[None] - 2 * val @ train.T  # up to a constant a row
    return np.stack([bags[np.argpartition(row, count)[:count]].mean(0) for row in distance])


def ridge(train, val, bags, pages) -> np.ndarray:
    """Ridge regression to bags; penalty: the best of five on the last fifth of train pages."""
    mean, std = train.mean(0), train.std(0) + 1e-6
    train, val = (train - mean) / std, (val - mean) / std
    held = pages >= np.quantile(pages, 0.8)

    def predict(x, y, queries, penalty):
        centre = y.mean(0)
        weights = np.linalg.solve(
            x.T @ x + penalty * len(x) * np.eye(x.shape[1]), x.T @ (y - centre)
        )
        return queries @ weights

    def score(penalty):
        guess = predict(train[~held], bags[~held], train[held], penalty)
        return recall_within_page(guess, bags[held], pages[held])

    return predict(train, bags, val, max((1e-3, 1e-2, 1e-1, 1.0, 10.0), key=score))


def colours(pixels: np.ndarray) -> np.ndarray:
    """Mean, spread and 6 × 6 × 6 histogram (square roots) of colours: [n, 222]."""
    flat = pixels.reshape(len(pixels), -1, 3)
    cell = (flat.astype(np.int64) * 6 // 256) @ np.array([36, 6, 1])
    histogram = np.stack([np.bincount(row, minlength=216) for row in cell]) / flat.shape[1]
    return np.concatenate([flat.mean(1) / 255, flat.std(1) / 255, np.sqrt(histogram)], 1)


def products(composition: np.ndarray) -> np.ndarray:
    """The composition with all its products of two: [n, 7 + 28]."""
    i, j = np.triu_indices(composition.shape[1])
    return np.concatenate([composition, composition[:, i] * composition[:, j]], 1)


def shrink(pixels: np.ndarray, side: int) -> np.ndarray:
    """Averages [n, S, S, 3] to [n, side, side, 3]."""
    n, size = pixels.shape[:2]
    block = size // side
    return pixels.reshape(n, side, block, side, block, 3).mean((2, 4))


def measure(train: Panels, val: Panels) -> dict[str, float]:
    """Chance and floors of image→text R@1 within a page; `pixels` is the better of 1 and 20."""
    bags, val_bags = bag_of_words(train.texts, val.texts)

    def recall(predicted):
        return recall_within_page(predicted, val_bags, val.pages)

    small, val_small = shrink(train.pixels, 32), shrink(val.pixels, 32)
    coarse, val_coarse = shrink(train.pixels, 16), shrink(val.pixels, 16)
    coarse, val_coarse = coarse.reshape(len(coarse), -1), val_coarse.reshape(len(val_coarse), -1)
    scores = {'chance': recall(np.zeros_like(val_bags))}
    scores['pixels, 1 nearest'] = recall(nearest(small, val_small, bags, 1))
    scores['pixels, 20 nearest'] = recall(nearest(small, val_small, bags, 20))
    scores['pixels'] = max(scores['pixels, 1 nearest'], scores['pixels, 20 nearest'])
    features = colours(train.pixels), colours(val.pixels)
    scores['bag of words'] = recall(ridge(*features, bags, train.pages))
    features = products(train.composition), products(val.composition)
    scores['layout'] = recall(ridge(*features, bags, train.pages))
    scores['linear'] = recall(ridge(coarse, val_coarse, bags, train.pages))
    scores['words themselves'] = recall(val_bags)
    return scores


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--root', type=pathlib.Path, help='a folder of pages; else built-in ones')
    parser.add_argument('--train', type=int, default=1000, help='built-in pages to learn from')
    parser.add_argument('--val', type=int, default=120, help='built-in pages to score')
    parser.add_argument('--out', type=pathlib.Path, help='where the JSON goes')
    arguments = parser.parse_args()
    start = time.perf_counter()
    if arguments.root:
        sets = [collect(folder(arguments.root, split)) for split in ('train', 'val')]
    else:
        counts = {'train': arguments.train, 'val': arguments.val}
        sets = [collect(synthetic(split, count)) for split, count in counts.items()]
    drawn = time.perf_counter() - start
    scores = measure(*sets)
    result = {
        'data': str(arguments.root) if arguments.root else 'built-in',
        'panels': {'train': len(sets[0].texts), 'val': len(sets[1].texts)},
        'pages': {'train': len(set(sets[0].pages)), 'val': len(set(sets[1].pages))},
        'image_to_text_r1': {name: round(score, 4) for name, score in scores.items()},
        'seconds': {'pages': round(drawn, 1), 'all': round(time.perf_counter() - start, 1)},
    }
    print(f'{result["data"]}: {result["panels"]} panels with text, {result["pages"]} pages')
    for name, score in scores.items():
        print(f'  {name:20} {score:.3f}{"  (named floor)" if name in NAMED else ""}')
    here = pathlib.Path(__file__).resolve().parent
    out = arguments.out or here / 'results' / 'comic_floors.json'
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + '\n')


if __name__ == '__main__':
    main()
