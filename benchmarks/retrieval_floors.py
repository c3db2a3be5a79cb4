"""How far query → gallery retrieval of products gets with nothing learnt: chance and floors.

    python benchmarks/retrieval_floors.py [--root=FOLDER] [--seed=0] [--side=128]
        [--embeddings=RUN/embed]

Each floor ranks the whole gallery by the distance to a query picture and scores by the item alone;
of several distances the best Rank-1 counts.

  grey, colour  32 × 32 pixels less their mean, of length 1: L2
  histogram     8 × 8 × 8 bins of RGB: L1 (intersection), L2, χ², Hellinger
  gradients     9 directions in 8 × 8 cells of 64 × 64 grey pixels, each block of 2 × 2 cells of
                length 1: L2

Built-in products, or with --root a folder: image_paths.json {path: {item_id, split}} with the
splits query and gallery. --embeddings names what `--mode=embed` of a run on the same data wrote:
its scores are set beside the floors, with the 95 % bootstrap interval (over queries) of the
difference in mAP from the best histogram. Writes benchmarks/results/retrieval_floors.json.
"""

import argparse
import io
import json
import pathlib
import sys
import time

import numpy as np
from PIL import Image

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from mmjax.recipes.retrieval.synthetic import items as retrieval_synthetic

SIZES = {
    'train_items': 480,
    'val_items': 40,
    'test_items': 60,
    'shots': 6,
    'query_shots': 2,
    'gallery_shots': 4,
}


def picture(encoded: bytes, size: int = 64) -> np.ndarray:
    """Decodes and shrinks a picture to [size, size, 3] uint8."""
    whole = Image.open(io.BytesIO(encoded)).convert('RGB')
    return np.asarray(whole.resize((size, size), Image.Resampling.BOX))


def histogram(encoded: bytes) -> np.ndarray:
    """Shares of 8 × 8 × 8 cells of RGB over the whole picture: [512]."""
    whole = np.asarray(Image.open(io.BytesIO(encoded)).convert('RGB')).reshape(-1, 3)
    cell = (whole.astype(np.int64) // 32) @ np.array([64, 8, 1])
    return np.bincount(cell, minlength=512) / len(whole)


def built_in(seed: int, side: int):
    """Returns {split: [(item, JPEG)]} of the built-in products."""
    rows = retrieval_synthetic.catalogue(seed, SIZES)
    return {
        split: [
            (identity, retrieval_synthetic.photograph(seed, split, identity, shot, side=side))
            for identity, shot in rows[split]
        ]
        for split in ('query', 'gallery')
    }


def folder(root: pathlib.Path):
    """Returns {split: [(item, file)]} of a user's folder."""
    listed = json.loads((root / 'image_paths.json').read_text())
    return {
        split: [
            (about['item_id'], (root / path).read_bytes())
            for path, about in sorted(listed.items())
            if about['split'] == split
        ]
        for split in ('query', 'gallery')
    }


def rows_of_length_one(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-9)


def pixels(pictures: np.ndarray) -> np.ndarray:
    """[n, 64, 64] or [n, 64, 64, 3] → [n, 32 · 32 (· 3)]: no mean, length 1."""
    n = len(pictures)
    small = pictures.reshape(n, 32, 2, 32, 2, -1).mean((2, 4))
    return rows_of_length_one((small - small.mean((1, 2), keepdims=True)).reshape(n, -1))


def gradients(grey: np.ndarray) -> np.ndarray:
    """[n, 64, 64] → [n, 7 · 7 · 36]: histograms of oriented gradients."""
    down, across = np.gradient(grey, axis=(1, 2))
    size = np.hypot(down, across)
    direction = (np.arctan2(down, across) % np.pi / np.pi * 9).astype(int) % 9
    votes = size[..., None] * (direction[..., None] == np.arange(9))
    cells = votes.reshape(len(grey), 8, 8, 8, 8, 9).sum((2, 4))
    quarters = (cells[:, :-1, :-1], cells[:, 1:, :-1], cells[:, :-1, 1:], cells[:, 1:, 1:])
    blocks = np.concatenate(quarters, -1)
    return rows_of_length_one(
        blocks / (np.linalg.norm(blocks, axis=-1, keepdims=True) + 1.0)
    ).reshape(len(grey), -1)


def distances(a: np.ndarray, b: np.ndarray, kind: str) -> np.ndarray:
    """Distances of [q, d] from [g, d] → [q, g]."""
    match kind:
        case 'l2':
            return (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
        case 'l1':
            return np.stack([np.abs(row - b).sum(1) for row in a])
        case 'chi2':
            return np.stack([((row - b) ** 2 / (row + b + 1e-9)).sum(1) for row in a])
        case 'hellinger':
            return -np.sqrt(a) @ np.sqrt(b).T
    raise ValueError(kind)


def scores(distance: np.ndarray, queries: np.ndarray, gallery: np.ndarray) -> dict[str, float]:
    """Rank-1, Rank-5 and mAP of distances [q, g]; mAP is the mean over queries of AP.

    AP is the mean, over a query's right gallery pictures, of the share of right ones among those
    at least as near. Every query has a right one.
    """
    right = gallery[np.argsort(distance, axis=1, kind='stable')] == queries[:, None]
    return {
        'rank1': float(right[:, 0].mean()),
        'rank5': float(right[:, :5].any(1).mean()),
        'mAP': float(average_precision(distance, queries, gallery).mean()),
    }


def average_precision(distance: np.ndarray, queries: np.ndarray, gallery: np.ndarray) -> np.ndarray:
    """AP of every query: [q]."""
    right = gallery[np.argsort(distance, axis=1, kind='stable')] == queries[:, None]
    precision = np.cumsum(right, 1) / np.arange(1, right.shape[1] + 1)
    return (precision * right).sum(1) / right.sum(1)


def compare(run: pathlib.Path, sets, by_path: bool, samples: int = 5000) -> dict:
    """Scores of a run's embeddings, and their gain in mAP over the best histogram."""
    rows = np.load(run / 'embeddings.npy')
    index = [json.loads(line) for line in (run / 'index.jsonl').read_text().splitlines()]
    if by_path:  # the order that `folder` has
        index.sort(key=lambda entry: entry['path'])
    of = lambda split: [entry['row'] for entry in index if entry['split'] == split]
    names = [np.array([item for item, _ in sets[split]]) for split in ('query', 'gallery')]
    if [len(of('query')), len(of('gallery'))] != [len(ids) for ids in names]:
        raise SystemExit(f'{run} holds other pictures than the data')
    mine = -rows[of('query')] @ rows[of('gallery')].T
    cells = [np.stack([histogram(file) for _, file in sets[s]]) for s in ('query', 'gallery')]
    kinds = {k: distances(*cells, k) for k in ('l1', 'l2', 'chi2', 'hellinger')}
    floor = max((average_precision(d, *names) for d in kinds.values()), key=np.mean)
    gain = average_precision(mine, *names) - floor
    rng = np.random.default_rng(0)
    drawn = gain[rng.integers(len(gain), size=(samples, len(gain)))].mean(1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    found = scores(mine, *names)
    return found | {'histogram_mAP': floor.mean(), 'gain': gain.mean(), 'low': low, 'high': high}


def measure(sets) -> dict[str, dict[str, float]]:
    """Chance (Rank-1) and the scores of each floor and distance."""
    queries, gallery = (np.array([item for item, _ in sets[s]]) for s in ('query', 'gallery'))
    small = [np.stack([picture(file) for _, file in sets[s]]) for s in ('query', 'gallery')]
    small = [pictures.astype(np.float32) for pictures in small]
    grey = [pictures.mean(-1) for pictures in small]
    cells = [np.stack([histogram(file) for _, file in sets[s]]) for s in ('query', 'gallery')]
    found = {'chance': {'rank1': float((queries[:, None] == gallery).mean())}}
    found['grey'] = scores(distances(*map(pixels, grey), 'l2'), queries, gallery)
    found['colour'] = scores(distances(*map(pixels, small), 'l2'), queries, gallery)
    for kind in ('l1', 'l2', 'chi2', 'hellinger'):
        found[f'histogram, {kind}'] = scores(distances(*cells, kind), queries, gallery)
    found['gradients'] = scores(distances(*map(gradients, grey), 'l2'), queries, gallery)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--root', type=pathlib.Path, help='a folder of pictures; else built-in')
    parser.add_argument('--seed', type=int, default=0, help='of the built-in products')
    parser.add_argument('--side', type=int, default=128, help='of built-in photographs, pixels')
    parser.add_argument('--embeddings', type=pathlib.Path, help='what --mode=embed of a run wrote')
    parser.add_argument('--out', type=pathlib.Path, help='where the JSON goes')
    arguments = parser.parse_args()
    start = time.perf_counter()
    sets = folder(arguments.root) if arguments.root else built_in(arguments.seed, arguments.side)
    drawn = time.perf_counter() - start
    found = measure(sets)
    highest = max(v['rank1'] for v in found.values())
    if arguments.embeddings:
        found['run'] = compare(arguments.embeddings, sets, bool(arguments.root))
    result = {
        'data': arguments.root.name if arguments.root else 'built-in',
        'pictures': {split: len(rows) for split, rows in sets.items()},
        'items': {split: len({item for item, _ in rows}) for split, rows in sets.items()},
        'floors': {k: {m: round(float(x), 4) for m, x in v.items()} for k, v in found.items()},
        'highest_rank1': round(highest, 4),
        'seconds': {
            'pictures': round(drawn, 1),
            'all': round(time.perf_counter() - start, 1),
        },
    }
    print(json.dumps(result, indent=1))
    here = pathlib.Path(__file__).resolve().parent
    out = arguments.out or here / 'results' / 'retrieval_floors.json'
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + '\n')


if __name__ == '__main__':
    main()
