"""Compares the versions of the retrieval recipe on built-in items, at equal numbers of pictures.

    python benchmarks/retrieval_versions.py [--steps=600] [--seeds=0,1,2] [--versions=v1,v2,v4]

Every version makes the same number of updates with batches of the same size; a seed draws its own
items, so differences are paired by seed. Scores are those of the last weights, query against
gallery. Writes benchmarks/results/retrieval_versions.json.
"""

import argparse
import itertools
import json
import pathlib
import sys
import tempfile
import time

import jax
import numpy as np
from etils import epath

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from mmjax.engine import build, logs, modes, train
from mmjax.engine import config as config_lib

ROOT = pathlib.Path(__file__).resolve().parent.parent


def scores(version: str, seed: int, steps: int) -> dict[str, float]:
    """Trains one version; returns its scores of query against gallery."""
    config = config_lib.load(f'{ROOT}/configs/clip_retrieval.py:{version}')
    config.seed = seed
    config.data.seed = seed
    config.best.metric = ''
    config.evaluate.every_epochs = 0.0
    config.stage.tune.update(epochs=None, steps=steps)
    with tempfile.TemporaryDirectory() as folder:
        workdir = epath.Path(folder)
        built = build.run(config)
        modes.claim_workdir(workdir, built, ['benchmark'], anew=False)
        log = logs.Logs(workdir, enabled=True, tensorboard=False)
        try:
            metrics = train.train(built, workdir, log)['final']['query_gallery']
        finally:
            log.close()
            jax.clear_caches()
    return {name: round(metrics[name], 4) for name in ('rank1', 'map', 'text_to_image_r1')}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--steps', type=int, default=600)
    parser.add_argument('--seeds', default='0,1,2')
    parser.add_argument('--versions', default='v1,v2,v4')
    arguments = parser.parse_args()
    seeds, versions = map(int, arguments.seeds.split(',')), arguments.versions.split(',')
    start, runs = time.perf_counter(), {version: [] for version in versions}
    for seed in seeds:
        for version in versions:
            runs[version].append(scores(version, seed, arguments.steps))
            print(f'seed {seed} {version}: {runs[version][-1]}', flush=True)
    gains = {}
    for a, b in itertools.combinations(versions, 2):
        gain = np.array([y['map'] - x['map'] for x, y in zip(runs[a], runs[b], strict=True)])
        error = float(gain.std(ddof=1) / len(gain) ** 0.5) if len(gain) > 1 else None
        gains[f'{b} − {a}'] = {
            'map': [round(float(x), 4) for x in gain],
            'mean': round(float(gain.mean()), 4),
            'standard_error': error and round(error, 4),
        }
    result = {
        'steps': arguments.steps,
        'pictures': 64 * arguments.steps,
        'seeds': arguments.seeds,
        'runs': runs,
        'differences': gains,
        'seconds': round(time.perf_counter() - start),
    }
    text = json.dumps(result, indent=1, ensure_ascii=False)
    print(text)
    (ROOT / 'benchmarks/results/retrieval_versions.json').write_text(text + '\n')


if __name__ == '__main__':
    main()
