"""What a step of each stage costs: time, memory and FLOPs, as a recipe's stages freeze and thaw.

    python benchmarks/stage_cost.py --config=configs/receipts.py [--steps=8] [--config.…=…]

Steps are made on one batch of the training data, rounds of all stages in turn; the median counts.
Memory is what the compiled step needs beside its arguments. Writes
benchmarks/results/stage_cost_<recipe>.json.
"""

import functools
import json
import pathlib
import sys
import time

import jax
import numpy as np
from absl import app, flags
from ml_collections import config_flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from mmjax.data import pipeline
from mmjax.engine import build, optim, parallel, step

_CONFIG = config_flags.DEFINE_config_file('config')
_STEPS = flags.DEFINE_integer('steps', 8, 'timed steps of a stage')


def prepared(run, stage, variables):
    """Returns (what makes a step, its costs): a call without arguments, ready to be timed."""
    call = functools.partial(
        step.train_step, task=run.task, stage=stage, groups=run.groups, settings=run.settings
    )
    host = pipeline.batches(
        run.data, run.sampler(stage), seed=0, stage=stage.index, stop=1, train=True
    )
    batch, _ = next(pipeline.to_device(host, parallel.rows(run.mesh)))
    host.close()
    state = step.create(variables, stage, run.groups, run.settings)
    rates = optim.rates(stage, run.groups.names, 1)
    weights = {name: np.float32(value) for name, value in stage.weights(1).items()}
    compiled = jax.jit(call).lower(state, batch, rates, weights).compile()
    costs = {
        'gflops': compiled.cost_analysis()['flops'] / 1e9,
        'mebibytes': compiled.memory_analysis().temp_size_in_bytes / 2**20,
    }
    return (lambda: jax.block_until_ready(compiled(state, batch, rates, weights))), costs


def main(_):
    run = build.run(_CONFIG.value)
    found, calls, times = {}, {}, {}
    with jax.set_mesh(run.mesh):
        variables = run.init_variables()
        for stage in run.stages:
            calls[stage.name], found[stage.name] = prepared(run, stage, variables)
            calls[stage.name]()
            times[stage.name] = []
        for _ in range(_STEPS.value):
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - start)
    for name, costs in found.items():
        costs['milliseconds'] = float(np.median(times[name])) * 1e3
        print(name, ', '.join(f'{value:.0f} {key}' for key, value in costs.items()))
    recipe = pathlib.Path(flags.FLAGS['config'].config_filename).stem
    path = pathlib.Path(__file__).parent / 'results' / f'stage_cost_{recipe}.json'
    path.write_text(json.dumps(found, indent=1) + '\n')


if __name__ == '__main__':
    app.run(main)
