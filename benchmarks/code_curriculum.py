"""Does interpolation help? ContraBin's naive stage alone, then linear, then nonlinear, over seeds.

    python benchmarks/code_curriculum.py [--seeds=0,1,2] [--workdir=runs/curriculum] [--config.…=…]

For every seed the anchor is trained once; three runs start from it. All have the stages naive,
linear and nonlinear of configs/contrabin.py with the same updates, batches and rates, and differ in
what acts in the last two: nothing, the linear interpolation in both, or each its own. Further
arguments go to every run. A run that is done is not made again. Writes
benchmarks/results/code_curriculum.json.
"""

import argparse
import json
import pathlib
import shlex
import subprocess
import sys

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
CONFIG = 'configs/contrabin.py'
VARIANTS = {
    'naive': (
        '--config.stage.linear.options.interpolation=naive',
        '--config.stage.nonlinear.options.interpolation=naive',
    ),
    'linear': (
        '--config.stage.nonlinear.options.interpolation=linear',
        '--config.stage.nonlinear.learning_rates.linear=1.0',
    ),
    'nonlinear': (),
}
SCORES = ('source_binary_r1', 'source_binary_r10', 'comment_binary_r1', 'binary_o0_o2_map')


def train(config: str, workdir: pathlib.Path, *arguments: str) -> dict:
    """Trains a run in another process unless it is done; returns its results."""
    done = workdir / 'results.json'
    command = [
        '-m',
        'mmjax.main',
        f'--config={config}',
        f'--workdir={workdir}',
        '--config.log.tensorboard=False',
        *arguments,
    ]
    if not done.is_file():
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    made_by = json.loads((workdir / 'config.json').read_text())['command']
    if shlex.split(made_by)[1:] != command:
        sys.exit(f'{workdir} is of other arguments: {made_by}')
    return json.loads(done.read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--seeds', default='0,1,2')
    parser.add_argument('--workdir', type=pathlib.Path, default=ROOT / 'runs' / 'curriculum')
    told, others = parser.parse_known_args()
    found = {name: {score: [] for score in SCORES} for name in VARIANTS}
    for seed in map(int, told.seeds.split(',')):
        shared = (f'--config.seed={seed}', *others)
        anchor = told.workdir.absolute() / f'anchor-{seed}'
        train(
            CONFIG, anchor, *shared, "--config.stages=('anchor', 'near')", '--config.best.metric='
        )
        for name, options in VARIANTS.items():
            results = train(
                CONFIG,
                told.workdir.absolute() / f'{name}-{seed}',
                *shared,
                *options,
                f'--init_from={anchor}',
                "--config.stages=('naive', 'linear', 'nonlinear')",
            )
            for score in SCORES:
                found[name][score].append(results['final']['test'][score])
            print(seed, name, {s: round(found[name][s][-1], 3) for s in SCORES}, flush=True)
    for name, scores in found.items():
        told_mean = (f'{s} {np.mean(x):.3f} ± {np.std(x, ddof=1):.3f}' for s, x in scores.items())
        print(f'{name:10s}', ', '.join(told_mean))
    path = ROOT / 'benchmarks' / 'results' / 'code_curriculum.json'
    out = {'seeds': told.seeds, 'arguments': others, 'scores': found}
    path.write_text(json.dumps(out, indent=1) + '\n')


if __name__ == '__main__':
    main()
