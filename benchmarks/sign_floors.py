"""How far a nearest neighbour gets with signs cut out for it: floors of the sign-language recipe.

    python benchmarks/sign_floors.py [--seed=0]
    python benchmarks/sign_floors.py --root=FOLDER [--streams=DICT]

The built-in sentences as configs/sign_ctc.py draws them, each sign cut out by its true span and
taken at ten times; the nearest training sign by squared distance names a test sign, whose signer is
in no training sentence. A recogniser of sentences has no spans. Landmarks are told as they come, or
around the middle of the shoulders in units of their distance; then every number is brought to mean
0 and deviation 1 of training, missing ones to 0. Writes benchmarks/results/sign_floors.json.

--root: of whole sentences of a folder; --streams as config.data.streams. The floor copies the
glosses of the nearest training sentence, by squared distance of the normalised numbers and their
changes, at forty times.
"""

import argparse
import ast
import json
import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from configs import sign_ctc
from mmjax.engine import build
from mmjax.evals import alignment
from mmjax.recipes.sign.augment import resampled
from mmjax.recipes.sign.synthetic import sentences, skeleton

SIZES = sign_ctc.get_config().data.built_in.to_dict()
TIMES = 10  # of a sign
FRAMES = 40  # of a sentence
SHOULDERS = (0, 1)  # the first two points of the pose


def signs(split: str, plan, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the signs [signs, TIMES, points, 2] of a split, NaN where missing, and glosses."""
    cut, names = [], []
    for signer, index in plan[split]:
        made = sentences.sentence(seed, split, signer, index)
        features = made.features.astype(np.float32)
        for start, end, *_ in skeleton.STREAMS.values():
            features[(features[:, start:end] == 0).all(1), start:end] = np.nan
        for gloss, (start, end) in zip(made.glosses, made.spans, strict=True):
            at = np.round(np.linspace(start, end - 1, TIMES)).astype(int)
            cut.append(features[at].reshape(TIMES, -1, 2))
            names.append(sentences.GLOSSES.index(gloss))
    return np.array(cut), np.array(names)


def around_shoulders(points: np.ndarray) -> np.ndarray:
    one, two = (points[..., [place], :] for place in SHOULDERS)
    return (points - (one + two) / 2) / np.linalg.norm(one - two, axis=-1, keepdims=True)


def error(train, names, test, wanted) -> float:
    """Returns the share of test signs that their nearest training sign names wrongly."""
    columns = train.reshape(-1, train.shape[-2] * train.shape[-1])
    mean, deviation = np.nanmean(columns, 0), np.nanstd(columns, 0)
    deviation = np.where(deviation < 1e-4, 1, deviation)
    flat = lambda x: x.reshape(len(x), TIMES, -1)
    one, two = (
        np.nan_to_num((flat(x) - mean) / deviation).reshape(len(x), -1) for x in (train, test)
    )
    nearest = ((one**2).sum(1) - 2 * two @ one.T).argmin(1)
    return float(np.mean(names[nearest] != wanted))


def copied(root: str, streams: dict) -> dict:
    """Returns what copying training sentences gives on the sentences of dev."""
    config = sign_ctc.get_config().unlock()
    config.data.root, config.data.streams = root, streams
    splits = build.run(config, data_only=True).task.splits

    def read(split):
        rows = range(len(split))
        features = [split.example(row, np.random.default_rng(0), False)['features'] for row in rows]
        flat = [resampled(x, FRAMES).ravel() for x in features]
        return np.array(flat), [split.words(row) for row in rows]

    (known, texts), (asked, wanted) = read(splits['train']), read(splits['dev'])
    wer = lambda told: alignment.errors(wanted, told).wer
    nearest = ((known**2).sum(1) - 2 * asked @ known.T).argmin(1)
    commonest = max(texts, key=texts.count)
    return {
        'sentences': len(wanted),
        'words': sum(map(len, wanted)),
        'verbatim in training': sum(words in texts for words in wanted),
        'WER of the nearest copied': wer([texts[place] for place in nearest]),
        'WER of the most common': wer([commonest] * len(wanted)),
    }


def built_in(seed: int) -> dict:
    """Returns the share of built-in test signs that the nearest training sign names wrongly."""
    plan = sentences.catalogue(seed, SIZES)
    (train, names), (test, wanted) = (signs(split, plan, seed) for split in ('train', 'test'))
    return {
        'training signs': len(train),
        'test signs': len(test),
        'chance': 1 - 1 / len(sentences.GLOSSES),
        'error as they come': error(train, names, test, wanted),
        'error around shoulders': error(
            around_shoulders(train), names, around_shoulders(test), wanted
        ),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--root')
    parser.add_argument('--streams', type=ast.literal_eval, default={})
    given = parser.parse_args()
    path = pathlib.Path(__file__).parent / 'results' / 'sign_floors.json'
    known = json.loads(path.read_text()) if path.is_file() else {}
    if given.root:
        name, found = pathlib.Path(given.root).name, copied(given.root, given.streams)
    else:
        name, found = 'built-in', built_in(given.seed)
    print('\n'.join(f'{name:24s} {value:.4g}' for name, value in found.items()))
    path.write_text(json.dumps(known | {name: found}, indent=1) + '\n')


if __name__ == '__main__':
    main()
