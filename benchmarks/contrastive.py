"""Times the contrastive losses, forward and backward, with the whole matrix and in tiles.

    python benchmarks/contrastive.py [--rows=16384] [--features=512] [--repeats=5]

Every form runs in a process of its own, so that the peak memory of one is not another's. Writes
`benchmarks/results/contrastive.json` beside this file.

Columns: seconds and processor seconds (medians over the repeats, after one call to warm up; the
second hardly feels other programs on the machine), MB of temporary buffers in the compiled program,
and MB by which the calls raised the peak of the process.
"""

import argparse
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
LOSSES = ('supcon', 'infonce', 'sigmoid')
FORMS = ('plain', 'tiled')


def measure(loss: str, form: str, rows: int, features: int, repeats: int) -> dict:
    """Runs one loss in one form in this process."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from mmjax.losses import contrastive

    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, rows, features), np.float32)
    chunk = None if form == 'plain' else 'auto'

    def mean(a, b, scale, labels, mask):
        if loss == 'supcon':
            term, _ = contrastive.supcon(a, labels, mask, temperature=1 / scale, chunk=chunk)
        elif loss == 'infonce':
            term = contrastive.infonce(a, b, mask, temperature=1 / scale, chunk=chunk)
        else:
            term = contrastive.sigmoid(a, b, mask, scale=scale, bias=-10.0, chunk=chunk)
        return term.mean()

    labels, mask = jnp.arange(rows) // 8, jnp.ones(rows, bool)
    arguments = jnp.asarray(a), jnp.asarray(b), jnp.float32(1 / 0.07), labels, mask
    jax.block_until_ready(arguments)
    compiled = jax.jit(jax.value_and_grad(mean, (0, 1, 2))).lower(*arguments).compile()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds, cpu = [], []
    for _ in range(repeats + 1):
        start, cpu_start = time.perf_counter(), time.process_time()
        value, gradients = jax.block_until_ready(compiled(*arguments))
        seconds.append(time.perf_counter() - start)
        cpu.append(time.process_time() - cpu_start)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    kilobyte = 1 if sys.platform == 'darwin' else 1024  # the unit of ru_maxrss
    return {
        'loss': loss,
        'form': form,
        'seconds': statistics.median(seconds[1:]),
        'cpu_seconds': statistics.median(cpu[1:]),
        'temporary_mb': compiled.memory_analysis().temp_size_in_bytes / 1e6,
        'peak_mb': (after - before) * kilobyte / 1e6,
        'value': float(value),
        'gradient_norm': float(jnp.linalg.norm(gradients[0])),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--rows', type=int, default=16384)
    parser.add_argument('--features', type=int, default=512)
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--only', help='LOSS,FORM: measure it here and print JSON')
    flags = parser.parse_args()
    size = flags.rows, flags.features, flags.repeats
    if flags.only:
        print(json.dumps(measure(*flags.only.split(','), *size)))
        return

    environment = {'JAX_PLATFORMS': 'cpu', **os.environ}
    environment['PYTHONPATH'] = os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')])
    results = []
    print(f'{flags.rows} × {flags.features}, float32, forward and backward')
    print(f'{"loss":8} {"form":6} {"seconds":>8} {"cpu s":>8} {"temp MB":>8} {"peak MB":>8}  value')
    for loss in LOSSES:
        for form in FORMS:
            command = [sys.executable, __file__, *sys.argv[1:], f'--only={loss},{form}']
            output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE)
            result = json.loads(output.stdout.splitlines()[-1])
            results.append(result)
            print(
                f'{loss:8} {form:6} {result["seconds"]:8.2f} {result["cpu_seconds"]:8.2f} '
                f'{result["temporary_mb"]:8.0f} {result["peak_mb"]:8.0f}  {result["value"]:.6f}'
            )
        plain, tiled = results[-2:]
        columns = ('seconds', 'cpu_seconds', 'temporary_mb', 'peak_mb')
        ratios = (tiled[key] / plain[key] for key in columns)
        print(f'{"":8} {"ratio":6} ' + ' '.join(f'{ratio:8.3f}' for ratio in ratios))
    path = ROOT / 'benchmarks/results/contrastive.json'
    path.parent.mkdir(exist_ok=True)
    setting = dict(rows=flags.rows, features=flags.features, repeats=flags.repeats)
    path.write_text(json.dumps({**setting, 'cpus': os.cpu_count(), 'results': results}, indent=1))
    print(f'written to {path.relative_to(ROOT)}')


if __name__ == '__main__':
    main()
