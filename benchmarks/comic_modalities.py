"""What the fused embedding of finished comic runs keeps of each modality, on built-in pages.

    python benchmarks/comic_modalities.py runs/stage3 [runs/stage3-seed1 …]

For each run: the scores of its validation pages, the gain of fused page retrieval over the better
single modality, paired by query, with its standard error over pages; and linear probes, fitted on
embeddings of training pages, for attributes that only the text tells (how it is said), only the
image tells (the scene's place, where the text is silent about it; the item's colour likewise), and
both tell (the action). Writes benchmarks/results/comic_modalities.json.
"""

import argparse
import dataclasses
import json
import pathlib
import sys

import jax
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from benchmarks.seeds import commit
from mmjax.engine import build, config, evaluate, train
from mmjax.evals import gallery, retrieval
from mmjax.evals.probe import linear_probe
from mmjax.recipes.comic.data import MODALITIES
from mmjax.recipes.comic.scores import PageScores
from mmjax.recipes.comic.synthetic import pages, words

ROOT = pathlib.Path(__file__).resolve().parent.parent
TRAIN_PAGES = 600
ATTRIBUTES = ('how it is said', 'action', 'place', 'item colour')


@dataclasses.dataclass(frozen=True)
class Panels:
    """The panels of a split that have every modality.

    embeddings: name → [n, D]; page: [n]; labels: attribute → [n]; probed: attribute → bool [n],
    False where the text tells what only the image should.
    """

    embeddings: dict[str, np.ndarray]
    page: np.ndarray
    labels: dict[str, np.ndarray]
    probed: dict[str, np.ndarray]


def collect(built, predictor, weights, split: str, limit: int | None = None) -> Panels:
    """Embeds the first pages of a split, and recalls what was drawn and said in their panels."""
    data = built.task.dataset(split)
    data = data.subset(np.arange(min(limit or len(data), len(data))))
    evaluator = PageScores(data, built.task.batch_size, built.task.fuse)
    results = evaluate.losses(predictor, built.task, evaluator, weights)
    panels = results.batch['panels'].astype(bool)
    complete = panels & results.batch['modality'].astype(bool).all(-1)
    outputs = {name: x[complete] for name, x in results.outputs.items() if x.ndim > 2}
    embeddings = {name: outputs[name] for name in ('fused', 'vision', 'text')}
    embeddings |= {f'{m} alone': outputs['alone'][:, i] for i, m in enumerate(MODALITIES)}
    rows = []
    for page, panel in zip(*np.nonzero(complete), strict=True):
        record = data.record(int(results.batch['row'][page]))
        *_, name, number = record['canonical_id'].split('__')
        seed = built.config.data.seed
        scene, happenings = pages.story(seed, name, int(number), len(record['boxes']))
        seen = happenings[panel]
        text = record['texts'][panel].lower()
        place = any(form in text for form in words.PLACE[scene.place])
        labels = (words.kind(text), seen.action, scene.place, seen.item_colour)
        rows.append((*labels, True, True, not place, seen.item_colour not in text))
    columns = [np.array(column) for column in zip(*rows, strict=True)]
    return Panels(
        embeddings,
        np.nonzero(complete)[0],
        dict(zip(ATTRIBUTES, columns[:4], strict=True)),
        dict(zip(ATTRIBUTES, columns[4:], strict=True)),
    )


def probes(train: Panels, val: Panels) -> dict[str, dict[str, float]]:
    """Returns attribute → accuracy of a linear probe on each embedding, and by the majority."""
    out = {}
    for name in ATTRIBUTES:
        both = np.concatenate([train.labels[name], val.labels[name]])
        _, numbers = np.unique(both, return_inverse=True)
        fitted, scored = np.split(numbers, [len(train.page)])
        a, b = train.probed[name], val.probed[name]
        out[name] = {}
        for of in ('fused', 'vision', 'text'):
            x, y = train.embeddings[of][a], val.embeddings[of][b]
            accuracy, majority = linear_probe(x, fitted[a], y, scored[b], decay=10.0)
            out[name][of] = round(accuracy, 3)
        out[name]['majority'] = round(majority, 3)
    return out


def measure(folder: pathlib.Path) -> dict:
    """Returns the scores, gains and probes of one run."""
    built = build.run(config.resolve(json.loads((folder / 'config.json').read_text())['config']))
    if built.config.data.root:
        sys.exit(f'{folder} is a run on your own pages: only built-in ones say what they show')
    with jax.set_mesh(built.mesh):
        variables, _ = train.weights_from(built, str(folder))
        predictor = evaluate.Predictor(built.task, variables, built.mesh)
        weights = evaluate.LossWeights.of(built.stages[-1], 0, built.final_weights)
        fitted = collect(built, predictor, weights, 'train', TRAIN_PAGES)
        val = collect(built, predictor, weights, 'val')
    rows = np.arange(len(val.page))
    ranked = {
        name: gallery.rank(x, x, val.page, val.page, query_rows=rows, gallery_rows=rows)
        for name, x in val.embeddings.items()
    }
    best = max((name for name in ranked if name != 'fused'), key=lambda name: ranked[name].map)
    gain = ranked['fused'].ap - ranked[best].ap
    final = json.loads((folder / 'results.json').read_text())['final']['val']
    return {
        'seed': built.config.seed,
        'page_map': {name: round(scores.map, 4) for name, scores in ranked.items()},
        'best_single': best,
        'gain': round(float(gain.mean()), 4),
        'gain_standard_error': round(
            retrieval.bootstrap_by_group(gain, val.page[ranked['fused'].scored]), 4
        ),
        'probes': probes(fitted, val),
        'scores': {k: round(v, 4) if isinstance(v, float) else v for k, v in final.items()},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('runs', nargs='+', type=pathlib.Path)
    parser.add_argument('--output', default=str(ROOT / 'benchmarks/results/comic_modalities.json'))
    options = parser.parse_args()
    runs = []
    for folder in options.runs:
        runs.append(measure(folder))
        print(
            json.dumps({k: v for k, v in runs[-1].items() if k != 'scores'}, indent=1), flush=True
        )
    gains = [run['gain'] for run in runs]
    result = {'commit': commit(), 'runs': runs, 'mean_gain': float(np.mean(gains))}
    if len(gains) > 1:
        result['gain_standard_error'] = float(np.std(gains, ddof=1) / len(gains) ** 0.5)
    pathlib.Path(options.output).write_text(json.dumps(result, indent=1) + '\n')


if __name__ == '__main__':
    main()
