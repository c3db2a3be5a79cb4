"""Trains one config with several seeds: every score with its mean and standard error.

    python benchmarks/seeds.py stage3 --seeds=3 [--workdir=runs/seeds] [--config.KEY=VALUE …]

CONFIG is what `--config` takes (`sign_ctc:distill`); other arguments go to every run. Seed n sets
`--config.seed=n`; built-in data stay the same, unless `--data` draws them by the seed too. An
interrupted run resumes; finished seeds are skipped. Each seed leaves
WORKDIR/NAME-n/seed.json with its scores, commit and CPU; the summary is written to
benchmarks/results/seeds_NAME.json.
"""

import argparse
import json
import pathlib
import platform
import re
import subprocess
import sys

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent


def cpu() -> str:
    """Returns the name of the processor."""
    info = pathlib.Path('/proc/cpuinfo')
    names = re.findall(r'model name\s*:\s*(.+)', info.read_text()) if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str:
    """Returns the commit of the working tree, with '+' if files differ from it."""
    git = lambda *args: subprocess.run(
        ['git', *args], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    return git('rev-parse', '--short', 'HEAD') + ('+' if git('status', '--porcelain') else '')


def train(config: str, folder: pathlib.Path, *arguments: str) -> dict:
    """Trains in another process, or goes on, unless it is done; returns the result of a seed."""
    result = folder / 'seed.json'
    if result.is_file():
        out = json.loads(result.read_text())
        if out['arguments'] != list(arguments):
            raise SystemExit(
                f'{result} is of other arguments, {out["arguments"]}: give another --workdir'
            )
        return out
    command = [sys.executable, '-m', 'mmjax.main', f'--config={config}', f'--workdir={folder}']
    started = commit()
    code = subprocess.run([*command, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL).returncode
    if code or not (folder / 'results.json').is_file():
        raise SystemExit(f'the run in {folder} ended with code {code} and has no results')
    done = json.loads((folder / 'results.json').read_text())
    out = {'commit': started, 'cpu': cpu(), 'arguments': arguments, 'scores': done['final']}
    result.write_text(json.dumps(out, indent=1) + '\n')
    return out


def summary(results: list[dict]) -> dict[str, dict]:
    """Returns {'evaluator/metric': {mean, standard_error, values}}; of words the values alone.

    A value that is missing or not finite is None, and there is no mean then.
    """
    flat = [
        {f'{e}/{m}': v for e, scores in result['scores'].items() for m, v in scores.items()}
        for result in results
    ]
    out = {}
    for name in sorted({name for scores in flat for name in scores}):
        values = [scores.get(name) for scores in flat]
        values = [None if x is None or x != x else x for x in values]
        if all(isinstance(value, int | float) for value in values):
            error = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else None
            out[name] = {
                'mean': round(float(np.mean(values)), 5),
                'standard_error': None if error is None else round(float(error), 5),
                'values': [round(float(value), 5) for value in values],
            }
        else:
            out[name] = {'values': values}
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config')
    parser.add_argument('--seeds', type=int, default=3, help='how many, from 0')
    parser.add_argument('--workdir', type=pathlib.Path, default=ROOT / 'runs/seeds')
    parser.add_argument('--data', action='store_true', help='draw built-in data by the seed too')
    parser.add_argument('--output', type=pathlib.Path)
    options, others = parser.parse_known_args()
    stem = pathlib.Path(options.config.split(':')[0]).stem
    name = '-'.join([stem, *options.config.split(':')[1:]]).replace(',', '-')
    for argument in others:
        if argument.startswith(('--config.seed', '--config.data.seed', '--workdir')):
            parser.error(f'{argument} is set by this script')
    results = []
    for seed in range(options.seeds):
        seeds = [f'--config.seed={seed}']
        if options.data:
            seeds.append(f'--config.data.seed={seed}')
        folder = options.workdir.absolute() / f'{name}-{seed}'
        results.append(train(options.config, folder, *seeds, *others))
        print(f'seed {seed}: {folder / "seed.json"}', flush=True)
    out = {
        'config': options.config,
        'arguments': others,
        'commits': sorted({result['commit'] for result in results}),
        'cpus': sorted({result['cpu'] for result in results}),
        'scores': summary(results),
    }
    path = options.output or ROOT / f'benchmarks/results/seeds_{name}.json'
    path.write_text(json.dumps(out, indent=1, ensure_ascii=False) + '\n')
    for metric, score in out['scores'].items():
        if 'mean' in score:
            error = score['standard_error']
            print(f'{metric} {score["mean"]:.4g}' + ('' if error is None else f' ± {error:.2g}'))
    print(path)


if __name__ == '__main__':
    main()
