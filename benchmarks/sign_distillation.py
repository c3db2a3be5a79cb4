"""Does a teacher help? The same student with and without one, on built-in signing, over seeds.

    python benchmarks/sign_distillation.py [--seeds=0,1,2] [--epochs=6] [--workdir=…] [--config.…=…]

A seed has three trainings: `configs/sign_ctc.py:distill`, a teacher and then its student, and the
default config for as many epochs as that student had, and for as many as both had together. They
share data, sizes and rates; scores are those of the last weights on the test split. Further
arguments go to every run. A run that is done is not made again. Writes
benchmarks/results/sign_distillation.json once all seeds asked for are done.
"""

import argparse
import json
import pathlib

import numpy as np
from code_curriculum import train

ROOT = pathlib.Path(__file__).resolve().parent.parent
LAST = '--config.best.metric=', '--config.evaluate.every_epochs=0.'
SCORES = ('wer', 'wer_beam', 'ctc_per_label')


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--seeds', default='0,1,2')
    parser.add_argument('--epochs', type=float, default=6.0)
    parser.add_argument('--workdir', type=pathlib.Path, default=ROOT / 'runs' / 'distillation')
    told, others = parser.parse_known_args()
    folder, config = told.workdir.absolute(), 'configs/sign_ctc.py'
    found = {}
    for seed in map(int, told.seeds.split(',')):
        shared = (f'--config.seed={seed}', *LAST, *others)
        both = (f'--config.stage.{name}.epochs={told.epochs}' for name in ('teacher', 'student'))
        taught = train(f'{config}:distill', folder / f'taught-{seed}', *shared, *both)
        runs = {'with a teacher': taught['final']['test']}
        for times, name in ((1, 'alone'), (2, 'alone, twice as long')):
            epochs = f'--config.stage.train.epochs={times * told.epochs}'
            alone = train(config, folder / f'alone-{times}-{seed}', *shared, epochs)
            runs[name] = alone['final']['test']
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
