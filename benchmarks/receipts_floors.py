"""How far counting and answering get blind: floors of the receipts recipe.

    python benchmarks/receipts_floors.py [--root=FOLDER] [--seed=0]

The built-in receipts as configs/receipts.py draws them, or the folder of --root, scored on test
where there is one, else on val:

  question   sees no picture: the most frequent class and answer of training for this question, or,
             where training never asked it, for its kind; classes are learnt, as they are scored,
             from the first question of each picture
  picture    sees no question: ridge regression from 16 × 16 pixels to the classes (the penalty that
             is best on a tenth of training), and the most frequent answer of training for its class

Writes benchmarks/results/receipts_floors.json.
"""

import argparse
import collections
import dataclasses
import json
import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from mmjax.data import prepare as builders
from mmjax.evals import classification, generation
from mmjax.recipes.receipts import data as receipts
from mmjax.recipes.receipts import folder, text
from mmjax.recipes.receipts.config import Data
from mmjax.recipes.receipts.scores import contents

DATA = Data()
CLASSES = DATA.classes
PENALTIES = (1e0, 1e1, 1e2, 1e3)


def most(pairs) -> dict:
    """Returns {key: its most frequent value}, of pairs (key, value)."""
    found = collections.defaultdict(collections.Counter)
    for key, value in pairs:
        found[key][value] += 1
    return {key: counts.most_common(1)[0][0] for key, counts in found.items()}


def pixels(split, rows) -> np.ndarray:
    small = [receipts.whole_square(split.image(int(row)), 16) for row in rows]
    x = np.stack([np.asarray(image, np.float32).ravel() / 255 for image in small])
    return np.concatenate([x, np.ones((len(x), 1), np.float32)], 1)


def ridge(x, labels, asked) -> dict[float, np.ndarray]:
    """Returns the classes [asked] for each penalty."""
    mean = x.mean(0)
    mean[-1] = 0
    x, asked = x - mean, asked - mean
    gram, cross = x.T @ x, x.T @ (np.eye(CLASSES)[labels] - 1 / CLASSES)
    solve = lambda p: np.linalg.solve(gram + p * np.eye(len(gram)), cross)
    return {p: (asked @ solve(p)).argmax(1) for p in PENALTIES}


def first_of_picture(split) -> np.ndarray:
    return np.unique(split.index['picture'], return_index=True)[1]


def scores(split, classes, answers) -> dict[str, float]:
    """Scores as the recipe does: classes [rows] once a picture, answers [rows] once a question."""
    first = first_of_picture(split)
    counted, _ = classification.score(split.index['label'][first], classes[first], CLASSES)
    records = [split.record(row) for row in range(len(split))]
    out = {name: counted[name] for name in ('accuracy', 'majority', 'f1')}
    told = generation.score([record['answer'].strip() for record in records], answers)
    out |= {name: told[name] for name in ('bleu4', 'rougeL', 'exact_match')}
    return out | contents(records, answers)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--root')
    parser.add_argument('--seed', type=int, default=0)
    told = parser.parse_args()
    names = folder.named_splits(told.root) if told.root else receipts.SPLITS
    prepared = receipts.prepare_receipts(
        told.root,
        builders.cache_dir(None),
        splits=names,
        seed=told.seed,
        synthetic_sizes=dataclasses.asdict(DATA.built_in),
        synthetic_side=DATA.built_in_side,
    )
    asked = 'test' if 'test' in names else 'val'
    train, test = (
        receipts.ReceiptQuestions(
            prepared, name, image_size=DATA.image_size, buckets=(64,), classes=CLASSES
        )
        for name in ('train', asked)
    )
    records = [train.record(row) for row in range(len(train))]
    labels = train.index['label'].tolist()
    wanted = [test.record(row)['question'] for row in range(len(test))]
    kinds = [text.kind(question) for question in wanted]

    def by_question(rows, value_of):
        asked = [records[row]['question'] for row in rows]
        values = [value_of(row) for row in rows]
        exact = most(zip(asked, values, strict=True))
        kind = most(zip(map(text.kind, asked), values, strict=True))
        usual = most((None, value) for value in values)[None]
        return [exact.get(q, kind.get(k, usual)) for q, k in zip(wanted, kinds, strict=True)]

    out = {'split': asked, 'pictures': len(first_of_picture(test)), 'questions': len(test)}
    first = first_of_picture(train)
    answers = by_question(range(len(train)), lambda row: records[row]['answer'].strip())
    out['question'] = scores(test, np.array(by_question(first, labels.__getitem__)), answers)

    x, y = pixels(train, first), train.index['label'][first]
    held = np.arange(len(x)) % 10 == 0
    tried = ridge(x[~held], y[~held], x[held])
    best = max(PENALTIES, key=lambda p: np.mean(tried[p] == y[held]))
    shown = first_of_picture(test)
    found = ridge(x, y, pixels(test, shown))[best]
    places = np.searchsorted(test.index['picture'][shown], test.index['picture'])
    classes = found[places]
    usual = most(
        (label, record['answer'].strip()) for label, record in zip(labels, records, strict=True)
    )
    out['picture'] = scores(test, classes, [usual[int(c)] for c in classes])

    for name in ('question', 'picture'):
        print(name, ' '.join(f'{key} {value:.3f}' for key, value in out[name].items()))
    path = pathlib.Path(__file__).parent / 'results' / 'receipts_floors.json'
    known = json.loads(path.read_text()) if path.is_file() else {}
    known['folder' if told.root else 'built-in'] = out
    path.write_text(json.dumps(known, indent=1) + '\n')


if __name__ == '__main__':
    main()
