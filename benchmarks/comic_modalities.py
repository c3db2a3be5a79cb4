"""What the fused embedding of finished comic runs keeps of each modality, on built-in pages.

    python benchmarks/comic_modalities.py runs/stage3 [runs/stage3-seed1 …]

For each run: the scores of its validation pages, the gain of fused page retrieval over the better
single modality, paired by query, with its standard error over pages; and linear probes, fitted on
embeddings of training pages, for attributes that only the text tells (how it is said), only the
image tells (the scene's place, where the text is silent about it; the item's colour likewise), and
both tell (the action). Writes benchmarks/results/comic_modalities.json.
"""

import argparse
import json
import pathlib
import subprocess
import sys

import jax
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from mmjax.engine import build, config, evaluate, train
from mmjax.evals import gallery, probe, retrieval
from mmjax.recipes.comic.scores import PageScores
from mmjax.recipes.comic.synthetic import pages, words

ROOT = pathlib.Path(__file__).resolve().parent.parent
TRAIN_PAGES = 600


def embeddings(built, predictor, weights, split: str, limit: int):
    """Returns ({name: [n, D]} of panels with every modality, their page [n], their attributes)."""
    data = built.task.dataset(split)
    data = data.subset(np.arange(min(limit, len(data)))) if hasattr(data, 'subset') else data
    scores = PageScores(data, built.task.batch_size, built.task.fuse)
    results = evaluate.losses(predictor, built.task, scores, weights)
    has = results.batch['modality'].astype(bool) & results.batch['panels'][..., None].astype(bool)
    complete = has.all(-1)
    page, panel = np.nonzero(complete)
    out = {name: results.outputs[name][complete] for name in ('fused', 'vision', 'text')}
    alone = results.outputs['alone'][complete]
    out |= {
        f'{name} alone': alone[:, index] for index, name in enumerate(('vision', 'text', 'place'))
    }
    labels = {'how it is said': [], 'action': [], 'place': [], 'item colour': []}
    told = {'place': [], 'item colour': []}
    for row, at in zip(page, panel, strict=True):
        record = data.record(int(results.batch['row'][row]))
        *_, name, number = record['canonical_id'].split('__')
        scene, happenings = pages.story(
            built.config.data.seed, name, int(number), len(record['boxes'])
        )
        seen, text = happenings[at], record['texts'][at].lower()
        labels['how it is said'].append(words.kind(text))
        labels['action'].append(seen.action)
        labels['place'].append(scene.place)
        labels['item colour'].append(seen.item_colour)
        told['item colour'].append(seen.item_colour in text)
        told['place'].append(any(form in text for form in words.PLACE[scene.place]))
    return out, page, {k: np.array(v) for k, v in labels.items()}, told


def measure(folder: pathlib.Path) -> dict:
    """Returns the scores, gains and probes of one run."""
    built = build.run(config.resolve(json.loads((folder / 'config.json').read_text())['config']))
    with jax.set_mesh(built.mesh):
        variables, _ = train.weights_from(built, str(folder))
        predictor = evaluate.Predictor(built.task, variables, built.mesh)
        weights = evaluate.Weights.of(built.stages[-1], 0, built.final_weights)
        fitted, _, known, told_in_training = embeddings(
            built, predictor, weights, 'train', TRAIN_PAGES
        )
        x, page, labels, told = embeddings(built, predictor, weights, 'val', 10**9)
    rows = np.arange(len(page))
    rank = lambda name: gallery.rank(
        x[name], x[name], page, page, query_rows=rows, gallery_rows=rows
    )
    ap = {name: rank(name) for name in x}
    single = {name: scores.map for name, scores in ap.items() if name != 'fused'}
    best = max(single, key=single.__getitem__)
    gain = ap['fused'].ap - ap[best].ap
    error = retrieval.bootstrap_by_group(gain, page[ap['fused'].scored])
    probes = {}
    for name in labels:
        train_rows = ~np.array(told_in_training.get(name, np.zeros(len(fitted['fused']), bool)))
        rows = ~np.array(told.get(name, np.zeros(len(page), bool)))
        probes[name] = {
            of: round(
                probe.linear_probe(
                    fitted[of][train_rows],
                    np.unique(np.append(known[name], labels[name]), return_inverse=True)[1][
                        : len(known[name])
                    ][train_rows],
                    x[of][rows],
                    np.unique(np.append(known[name], labels[name]), return_inverse=True)[1][
                        len(known[name]) :
                    ][rows],
                    decay=10.0,
                ).accuracy,
                3,
            )
            for of in ('fused', 'vision', 'text')
        }
        counts = np.unique(labels[name][rows], return_counts=True)[1]
        probes[name]['majority'] = round(float(counts.max() / counts.sum()), 3)
    final = json.loads((folder / 'results.json').read_text())['final']['val']
    return {
        'seed': built.config.seed,
        'page_map': {name: round(scores.map, 4) for name, scores in ap.items()},
        'best_single': best,
        'gain': round(float(gain.mean()), 4),
        'gain_standard_error': round(error, 4),
        'probes': probes,
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
    commit = subprocess.run(
        ['git', 'rev-parse', '--short', 'HEAD'], cwd=ROOT, capture_output=True, text=True
    )
    result = {'commit': commit.stdout.strip(), 'runs': runs, 'mean_gain': float(np.mean(gains))}
    if len(gains) > 1:
        result['gain_standard_error'] = float(np.std(gains, ddof=1) / len(gains) ** 0.5)
    pathlib.Path(options.output).write_text(json.dumps(result, indent=1) + '\n')


if __name__ == '__main__':
    main()
