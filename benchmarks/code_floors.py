"""How far source ↔ binary retrieval gets with bags of tokens and lengths: floors of ContraBin.

    python benchmarks/code_floors.py [--root=FOLDER] [--registers=class] [--seed=0] [--pool=256]

Built-in functions as configs/contrabin.py draws them, registers told by name (keep) or by kind
(class), or the JSONL rows of --root. Floors are asked in pools of test functions. Two learn nothing
or little of what stands for what:

  length     a line from tokens of the query to tokens of the answer: nearest prediction
  bag        cosine of the tokens that both sides have (numbers, however written, and names), by
             their logarithmic counts and how rare they are in training

Three are linear models of whole bags, fitted on the training functions, one binary each:

  linear     ridge regression from logarithmic token counts of the query to those of the answer;
             cosine to the prediction
  scaled     the same, each count divided by its deviation
  whitened   the same, each count divided by the deviation that the regression leaves

Of three penalties the best R@1 counts. Writes benchmarks/results/code_floors.json.
"""

import argparse
import collections
import json
import pathlib
import re
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from mmjax.data import prepare
from mmjax.recipes.contrabin import data as code
from mmjax.recipes.contrabin.synthetic.programs import WORDS

SIZES = {'train': 12000, 'val': 256, 'test': 256}
PAIRS = (('source', 'binary'), ('comment', 'binary'), ('comment', 'source'))


def tokens(text: str) -> list[str]:
    return re.findall(r'0x[0-9a-f]+|\w+|\S', text)


def bags(texts: list[str], known: dict[str, int]) -> np.ndarray:
    """Returns log(1 + count) of the known tokens and a 1: [texts, known + 1]."""
    out = np.zeros((len(texts), len(known) + 1), np.float32)
    for row, text in enumerate(texts):
        for token in tokens(text):
            if token in known:
                out[row, known[token]] += 1
    out = np.log1p(out)
    out[:, -1] = 1
    return out


def vocabulary(texts: list[str], least: int = 5, most: int = 4000) -> dict[str, int]:
    """Returns {token: column} of tokens in `least` texts or more, the most frequent ones."""
    seen = collections.Counter(token for text in texts for token in set(tokens(text)))
    kept = [token for token, count in seen.most_common(most) if count >= least]
    return {token: column for column, token in enumerate(sorted(kept))}


def recall(queries: np.ndarray, answers: np.ndarray, pool: int) -> float:
    """Returns R@1 by cosine, averaged over whole pools; ties count as wrong."""
    unit = lambda x: x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9)
    queries, answers = unit(queries), unit(answers)
    found = []
    for start in range(0, len(queries) - pool + 1, pool):
        scores = queries[start : start + pool] @ answers[start : start + pool].T
        own = np.diag(scores).copy()
        np.fill_diagonal(scores, -np.inf)
        found.append(np.mean(own > scores.max(1)))
    return float(np.mean(found))


def alike(text: str) -> str:
    """Writes the numbers of a text in decimals, hexadecimal ones and words."""
    text = re.sub(r'\b0x[0-9a-f]+\b', lambda found: str(int(found[0], 16)), text)
    words = rf'\b({"|".join(WORDS)})\b'
    return re.sub(words, lambda found: str(WORDS.index(found[0].lower())), text, flags=re.I)


def shared(train: tuple[list, list], test: tuple[list, list]) -> list[np.ndarray]:
    """Returns both sides of test as bags of the tokens that both sides of train have."""
    train, test = ([[alike(text) for text in texts] for texts in side] for side in (train, test))
    seen = [vocabulary(texts) for texts in train]
    known = {token: place for place, token in enumerate(sorted(set(seen[0]) & set(seen[1])))}
    rare = 0
    for texts in train:
        rare = rare + np.log(len(texts) / ((bags(texts, known)[:, :-1] > 0).sum(0) + 1)) / 2
    return [bags(texts, known)[:, :-1] * rare for texts in test]


def floors(train: tuple[list, list], test: tuple[list, list], pool: int) -> dict[str, float]:
    known = [vocabulary(texts) for texts in train]
    (a, b), (c, d) = (
        [bags(t, k) for t, k in zip(side, known, strict=True)] for side in (train, test)
    )
    mean, deviation = b.mean(0), b.std(0) + 1e-6
    gram, cross = a.T @ a, a.T @ (b - mean)
    out = {'linear': 0.0, 'scaled': 0.0, 'whitened': 0.0}
    for penalty in (1, 10, 100):
        weights = np.linalg.solve(gram + penalty * np.eye(len(gram)), cross)
        left = (b - mean - a @ weights).std(0) + 1e-3
        predicted, truth = c @ weights, d - mean
        for name, scale in (('linear', 1), ('scaled', deviation), ('whitened', left)):
            out[name] = max(out[name], recall(predicted / scale, truth / scale, pool))
    counts = [np.array([len(tokens(text)) for text in side], float) for side in (*train, *test)]
    slope, start = np.polyfit(counts[0], counts[1], 1)
    hits = []
    for at in range(0, len(counts[2]) - pool + 1, pool):
        guess = slope * counts[2][at : at + pool] + start
        apart = np.abs(guess[:, None] - counts[3][at : at + pool])
        own = np.diag(apart)[:, None]
        # A tie is broken at random.
        hits.append(np.mean((apart >= own).all(1) / (apart == own).sum(1)))
    bag = recall(*shared(train, test), pool)
    return {'length': float(np.mean(hits)), 'bag': bag, **out}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--root')
    parser.add_argument('--registers', choices=('keep', 'class'), default='class')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--pool', type=int, default=256)
    given = parser.parse_args()
    prepared = code.prepare_code(
        given.root,
        prepare.cache_dir(None),
        splits=('train', 'val', 'test'),
        seed=given.seed,
        synthetic_sizes=SIZES,
        registers=given.registers,
        max_fault_share=0.01,
    )
    texts = {}
    for name in ('train', 'test'):
        split = code.CodeFunctions(prepared, name)
        rows = split.one_each()
        if name == 'test':  # the pools of the recipe's evaluation
            rows = rows[np.random.default_rng(0).permutation(len(rows))]
        records = [split.record(row) for row in rows]
        texts[name] = {key: [record[key] for record in records] for key in code.TEXTS}
    pool = min(given.pool, len(texts['test']['source']))
    found = {'pool': pool, 'chance': 1 / pool}
    for a, b in PAIRS:
        pairs = [(texts[name][a], texts[name][b]) for name in ('train', 'test')]
        found[f'{a}_{b}_r1'] = floors(*pairs, pool)
        print(f'{a} → {b}', {k: round(v, 3) for k, v in found[f'{a}_{b}_r1'].items()}, flush=True)
    path = pathlib.Path(__file__).parent / 'results' / 'code_floors.json'
    known = json.loads(path.read_text()) if path.is_file() else {}
    known['folder' if given.root else f'built-in, registers {given.registers}'] = found
    path.write_text(json.dumps(known, indent=1) + '\n')


if __name__ == '__main__':
    main()
