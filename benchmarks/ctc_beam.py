"""Times CTC decoding: greedy, and prefix beam search with and without a language model.

    python benchmarks/ctc_beam.py [--frames=256] [--size=1200] [--beam=16] [--repeats=5]

Prints milliseconds an utterance, the median of the repeats after one call to compile, for one
utterance at a time and for 8 together, and writes benchmarks/results/ctc_beam.json. The inputs are
as peaked as a trained model's: a symbol about every 16 frames, the rest blank. Processor
milliseconds hardly feel other programs on the machine.
"""

import argparse
import functools
import json
import os
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.decode import ctc

ROOT = pathlib.Path(__file__).resolve().parent.parent


def inputs(rows: int, frames: int, size: int):
    """Returns log_probs [rows, frames, size], a mask, and a bigram table [size, size]."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(rows, frames, size)).astype(np.float32) * 2
    path = np.where(rng.random((rows, frames)) < 1 / 16, rng.integers(1, size, (rows, frames)), 0)
    picked = np.take_along_axis(logits, path[..., None], axis=2)
    np.put_along_axis(logits, path[..., None], picked + 8, axis=2)
    table = rng.normal(size=(size, size)).astype(np.float32) * 2
    softmax = functools.partial(jax.nn.log_softmax, axis=-1)
    return softmax(jnp.asarray(logits)), jnp.ones((rows, frames), bool), softmax(jnp.asarray(table))


def medians(function, repeats, *arguments) -> tuple[float, float]:
    """Returns the median seconds and processor seconds of a call."""
    jax.block_until_ready(function(*arguments))
    seconds, cpu = [], []
    for _ in range(repeats):
        start, cpu_start = time.perf_counter(), time.process_time()
        jax.block_until_ready(function(*arguments))
        seconds.append(time.perf_counter() - start)
        cpu.append(time.process_time() - cpu_start)
    return statistics.median(seconds), statistics.median(cpu)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--frames', type=int, default=256)
    parser.add_argument('--size', type=int, default=1200)
    parser.add_argument('--beam', type=int, default=16)
    parser.add_argument('--repeats', type=int, default=5)
    flags = parser.parse_args()

    def fused(symbols):
        def search(log_probs, mask, table):
            return ctc.beam_search(
                log_probs, mask, beam=flags.beam, symbols=symbols, language_model=table, weight=0.5
            )

        return search

    forms = {
        'greedy': lambda log_probs, mask, table: ctc.greedy(log_probs, mask),
        'beam': lambda log_probs, mask, table: ctc.beam_search(log_probs, mask, beam=flags.beam),
        'beam, bigram, 40 symbols': fused(40),
        'beam, bigram, all symbols': fused(None),
    }
    print(f'{flags.frames} frames, {flags.size} symbols, beam {flags.beam}: ms and processor ms')
    results = []
    for rows in (1, 8):
        arguments = inputs(rows, flags.frames, flags.size)
        for name, form in forms.items():
            wall, cpu = (1e3 * t / rows for t in medians(jax.jit(form), flags.repeats, *arguments))
            results.append({'rows': rows, 'form': name, 'ms': wall, 'cpu_ms': cpu})
            print(f'{rows:3} rows  {name:26} {wall:8.2f} {cpu:8.2f}', flush=True)
    path = ROOT / 'benchmarks/results/ctc_beam.json'
    path.parent.mkdir(exist_ok=True)
    setting = {k: getattr(flags, k) for k in ('frames', 'size', 'beam')}
    machine = {'device': jax.devices()[0].device_kind, 'cpus': os.cpu_count()}
    path.write_text(json.dumps({**setting, **machine, 'results': results}, indent=1) + '\n')
    print(f'written to {path.relative_to(ROOT)}')


if __name__ == '__main__':
    main()
