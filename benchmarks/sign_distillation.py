"""Does a teacher help? The same student with and without one, on built-in signing, over seeds.

    python benchmarks/sign_distillation.py [--seeds=0,1,2] [--epochs=4] [--teacher=RUN]
        [--workdir=…] [--config.…=…]

The teacher is a run of `configs/sign_ctc.py` at its full length, made first unless named. Each seed
trains the same model thrice for a few epochs: as `configs/sign_ctc.py:distill` does, following that
teacher; likewise, but with all frames alike, as published; and alone. All share data, sizes and
rates; scores are those of the last weights on the test split. Further arguments go to every run. A
run that is done is not made again. Writes benchmarks/results/sign_distillation.json once all seeds
asked for are done.
"""

import argparse
import json
import pathlib

import numpy as np
from code_curriculum import train

ROOT = pathlib.Path(__file__).resolve().parent.parent
LAST = '--config.best.metric=', '--config.evaluate.every_epochs=0.'
SCORES = ('wer', 'wer_beam', 'ctc_per_label')


def _scores(results: dict) -> dict[str, list[float]]:
    return {score: [results['final']['test'][score]] for score in SCORES}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--seeds', default='0,1,2')
    parser.add_argument('--epochs', type=float, default=4.0)
    parser.add_argument('--teacher', type=pathlib.Path)
    parser.add_argument('--workdir', type=pathlib.Path, default=ROOT / 'runs' / 'distillation')
    told, others = parser.parse_known_args()
    folder, config = told.workdir.absolute(), 'configs/sign_ctc.py'
    teacher = told.teacher.absolute() if told.teacher else folder / 'teacher'
    if told.teacher:
        results = json.loads((teacher / 'results.json').read_text())
    else:
        results = train(config, teacher, *others)
    found = {'the teacher': _scores(results)}
    taught = (
        f'--init_from={teacher}:student→teacher',
        "--config.init.allow_fresh=('.*student/.*',)",
        "--config.stages=('student',)",
        '--config.model.teacher.lstm_layers=1',
        f'--config.stage.student.epochs={told.epochs}',
    )
    for seed in map(int, told.seeds.split(',')):
        shared = (f'--config.seed={seed}', *LAST, *others)
        alone = f'--config.stage.train.epochs={told.epochs}'
        alike = '--config.losses.distillation_blank_weight=1.0'
        following = lambda name, *more: train(f'{config}:distill', name, *shared, *taught, *more)
        runs = {
            'with a teacher': following(folder / f'taught-{seed}'),
            'with a teacher, frames alike': following(folder / f'alike-{seed}', alike),
            'alone': train(config, folder / f'alone-{seed}', *shared, alone),
        }
        for name, results in runs.items():
            for score, values in _scores(results).items():
                found.setdefault(name, {}).setdefault(score, []).extend(values)
        told_wer = {name: round(scores['wer'][-1], 3) for name, scores in found.items()}
        print(seed, told_wer, flush=True)
    for name, scores in found.items():
        means = (
            f'{s} {np.mean(x):.3f} ± {np.std(x, ddof=min(1, len(x) - 1)):.3f}'
            for s, x in scores.items()
        )
        print(f'{name:28s}', ', '.join(means))
    path = ROOT / 'benchmarks' / 'results' / 'sign_distillation.json'
    told = {'epochs': told.epochs, 'seeds': told.seeds, 'arguments': others, 'scores': found}
    path.write_text(json.dumps(told, indent=1) + '\n')


if __name__ == '__main__':
    main()
