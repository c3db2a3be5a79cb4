"""Does a teacher help? The same student with and without one, on built-in signing, over seeds.

    python benchmarks/sign_distillation.py [--seeds=0,1,2] [--epochs=6] [--workdir=…] [--config.…=…]

A seed has three trainings: `configs/sign_ctc.py:distill`, a teacher and then its student, and the
default config for as many epochs as that student had, and for as many as both had together. They
share data, sizes, rates and, for a seed, the order of examples within a stage. Further arguments go
to every run. A run that is done is not made again. Writes benchmarks/results/sign_distillation.json
once all seeds asked for are done.
"""

import argparse
import json
import pathlib
import subprocess
import sys

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
SCORES = ('wer', 'wer_beam', 'ctc_per_label')


def train(config: str, workdir: pathlib.Path, *arguments: str) -> dict:
    """Trains a run in another process unless it is done; returns the scores of its test split."""
    done = workdir / 'results.json'
    if not done.is_file():
        command = [sys.executable, '-m', 'mmjax.main', f'--config={config}',
                   f'--workdir={workdir}', '--config.log.tensorboard=False',
                   '--config.best.metric=', '--config.evaluate.every_epochs=0.']  # fmt: skip
        subprocess.run([*command, *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return json.loads(done.read_text())['final']['test']


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--seeds', default='0,1,2')
    parser.add_argument('--epochs', type=float, default=6.0)
    parser.add_argument('--workdir', type=pathlib.Path, default=ROOT / 'runs' / 'distillation')
    told, others = parser.parse_known_args()
    folder, config = told.workdir.absolute(), 'configs/sign_ctc.py'
    found = {}
    for seed in map(int, told.seeds.split(',')):
        shared = (f'--config.seed={seed}', *others)
        both = (f'--config.stage.{name}.epochs={told.epochs}' for name in ('teacher', 'student'))
        runs = {
            'with a teacher': train(f'{config}:distill', folder / f'taught-{seed}', *shared, *both)
        }
        for times, name in ((1, 'alone'), (2, 'alone, twice as long')):
            epochs = f'--config.stage.train.epochs={times * told.epochs}'
            runs[name] = train(config, folder / f'alone-{times}-{seed}', *shared, epochs)
        for name, scores in runs.items():
            for score in SCORES:
                found.setdefault(name, {}).setdefault(score, []).append(scores[score])
        teacher = runs['with a teacher']['teacher_wer']
        found.setdefault('the teacher', {}).setdefault('wer', []).append(teacher)
        print(
            seed, {name: round(scores['wer'][-1], 3) for name, scores in found.items()}, flush=True
        )
    for name, scores in found.items():
        means = (f'{s} {np.mean(x):.3f} ± {np.std(x, ddof=1):.3f}' for s, x in scores.items())
        print(f'{name:22s}', ', '.join(means))
    path = ROOT / 'benchmarks' / 'results' / 'sign_distillation.json'
    told = {'epochs': told.epochs, 'seeds': told.seeds, 'arguments': others, 'scores': found}
    path.write_text(json.dumps(told, indent=1) + '\n')


if __name__ == '__main__':
    main()
