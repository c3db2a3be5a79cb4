"""Times generation, greedy and with beams, with the cache and by reading every text anew.

    python -m benchmarks.decoding [--width=256] [--depth=4] [--prefix=64] [--tokens=32] …

No text ends early, so every row has --tokens of them. Writes `benchmarks/results/decoding.json`.

Columns: generated tokens a second and processor seconds a batch (medians over the repeats, after
one call to compile; the second hardly feels other programs on the machine).
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

from mmjax.decode.autoregressive import generate
from mmjax.models.decoder import Decoder

ROOT = pathlib.Path(__file__).resolve().parent.parent


def cached(apply, model: Decoder, embeddings, mask, beams: int, tokens: int):
    """Returns (step, state, first logits) of a model that keeps keys and values."""
    last, prefix = apply(embeddings, mask, method='prefill')

    def step(suffix, tokens, index):
        x = apply(tokens, method='embed')
        hidden, suffix = apply(x, prefix, suffix, index, method='step')
        return apply(hidden, method='logits'), suffix

    return step, model.suffix(len(mask), beams, tokens - 1), apply(last, method='logits')


def uncached(apply, model: Decoder, embeddings, mask, beams: int, tokens: int):
    """The same of one whose state is the texts, all of which it reads anew for each token."""
    (batch, prefix), length = mask.shape, tokens - 1
    given, real = (jnp.repeat(x, beams, 0) for x in (embeddings, mask))

    def step(texts, tokens, index):
        texts = texts.at[:, :, index].set(tokens)
        x = apply(texts.reshape(-1, length), method='embed')
        written = jnp.broadcast_to(jnp.arange(length) <= index, (batch * beams, length))
        joined = jnp.concatenate([given, x], 1), jnp.concatenate([real, written], 1)
        hidden = apply(*joined, train=False)[:, prefix + index]
        return apply(hidden.reshape(batch, beams, -1), method='logits'), texts

    hidden = apply(embeddings, mask, train=False)[:, -1]
    state = jnp.zeros((batch, beams, length), jnp.int32)
    return step, state, apply(hidden, method='logits')


def measure(build, model: Decoder, beams: int, flags) -> dict:
    def run(variables, embeddings, mask):
        apply = functools.partial(model.apply, variables)
        step, state, first = build(apply, model, embeddings, mask, beams, flags.tokens)
        return generate(
            step,
            state,
            first,
            max_tokens=flags.tokens,
            eos=-1,
            pad=0,
            beams=beams,
            method='beam' if beams > 1 else 'greedy',
        )

    embeddings = np.random.default_rng(0).normal(size=(flags.batch, flags.prefix, model.width))
    inputs = jnp.float32(embeddings), jnp.ones((flags.batch, flags.prefix), bool)
    init = functools.partial(model.init, train=False)
    variables = jax.jit(init)(jax.random.key(0), *inputs)
    generator = jax.jit(run)
    found = jax.block_until_ready(generator(variables, *inputs))
    seconds, cpu = [], []
    for _ in range(flags.repeats):
        start, cpu_start = time.perf_counter(), time.process_time()
        jax.block_until_ready(generator(variables, *inputs))
        seconds.append(time.perf_counter() - start)
        cpu.append(time.process_time() - cpu_start)
    return {
        'beams': beams,
        'model': build.__name__,
        'seconds': statistics.median(seconds),
        'tokens_per_second': flags.batch * flags.tokens / statistics.median(seconds),
        'cpu_seconds': statistics.median(cpu),
        'score': float(found.scores.mean()),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = {
        'vocabulary': 8192,
        'width': 256,
        'depth': 4,
        'heads': 8,
        'kv_heads': 2,
        'mlp_width': 704,
    }
    setting = {**sizes, 'batch': 4, 'prefix': 64, 'tokens': 32, 'beams': 4, 'repeats': 3}
    for name, value in setting.items():
        parser.add_argument(f'--{name}', type=int, default=value)
    parser.add_argument('--tied', action='store_true', help='the head is the table of embeddings')
    flags = parser.parse_args()
    model = Decoder(**{name: getattr(flags, name) for name in sizes}, tied=flags.tied)
    print(f'{"beams":>5} {"model":9} {"tokens/s":>9} {"cpu s":>7}  mean score')
    results = []
    for beams in (1, flags.beams):
        for build in (cached, uncached):
            result = measure(build, model, beams, flags)
            results.append(result)
            print(
                f'{beams:5d} {result["model"]:9} {result["tokens_per_second"]:9.1f} '
                f'{result["cpu_seconds"]:7.3f}  {result["score"]:.6f}'
            )
        with_cache, without = results[-2:]
        ratio = without['cpu_seconds'] / with_cache['cpu_seconds']
        print(f'      without the cache: {ratio:.1f} times the processor seconds')
    path = ROOT / 'benchmarks/results/decoding.json'
    path.parent.mkdir(exist_ok=True)
    header = {**vars(flags), 'device': jax.devices()[0].device_kind, 'cpus': os.cpu_count()}
    path.write_text(json.dumps({**header, 'results': results}, indent=1))
    print(f'written to {path.relative_to(ROOT)}')


if __name__ == '__main__':
    main()
