"""What each --mode does with a built run: train, evaluate, predict, prepare, embed, export."""

import atexit
import dataclasses
import importlib.metadata
import json
import math
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import logging as absl_logging
from etils import epath
from safetensors.numpy import save

import mmjax
from mmjax import sections
from mmjax.engine import build, evaluate, logs, optim, parallel, report, step
from mmjax.engine.checkpoint import run_of
from mmjax.engine.config import Config
from mmjax.engine.preemption import EXIT_CODE, Preempted
from mmjax.engine.task import Task, Variables
from mmjax.engine.train import StepLimit, train, weights_from
from mmjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Command:
    """A command as the flags give it; see `mmjax.main`."""

    mode: str
    workdir: epath.Path
    argv: Sequence[str] = ('main',)
    existing: bool = False  # whether `workdir` holds a run of this config
    overwrite: bool = False
    input: str | None = None
    question: str | None = None
    output: str | None = None
    init_from: str | None = None
    allow_data_change: bool = False
    max_steps: int | None = None
    dry_run: bool = False
    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None


def run(config: Config, command: Command) -> int:
    """Builds the run and carries out the command; returns the exit code."""
    before = jax.config.read('jax_disable_most_optimizations')
    jax.config.update('jax_disable_most_optimizations', config.quick_compile or before)
    try:
        return _run(config, command)
    finally:
        jax.config.update('jax_disable_most_optimizations', before)


def _run(config: Config, command: Command) -> int:
    absl_logging.set_verbosity(absl_logging.WARNING)
    cache = os.environ.get('MMJAX_COMPILATION_CACHE')
    if cache:
        jax.config.update('jax_compilation_cache_dir', cache)
    parallel.start(command.coordinator, command.processes, command.process)
    mode = command.mode
    workdir = command.workdir
    # A run killed before its first checkpoint has nothing to continue: its workdir starts anew.
    fresh = not command.existing or command.overwrite or not (workdir / 'checkpoints').exists()
    if command.overwrite and command.init_from:
        source = run_of(command.init_from)
        if source is not None and source.resolve() == workdir.resolve():
            raise UserError(f'--overwrite would delete {source}, which --init_from reads')
    needs = config.needs_init_from
    if needs and mode == 'train' and fresh and not (command.init_from or command.dry_run):
        raise UserError(f'this config continues another run: give --init_from={needs}')
    built = build.run(
        config,
        assets=None if fresh else workdir,
        init_from=command.init_from,
        data_only=mode == 'prepare',
    )
    if mode == 'prepare':
        return _prepare(built, epath.Path(command.output or workdir / mode))
    build.check(built)
    if command.dry_run:
        if parallel.is_first():
            print(dry_run(built))
        return 0
    if mode == 'train':
        if parallel.is_first() and fresh:  # a run that continues keeps its first config.json
            anew = command.existing and command.overwrite
            claim_workdir(workdir, built, command.argv, anew=anew)
        parallel.barrier('workdir')
        return _train(built, command)
    return _read(built, command)


def _prepare(built: build.Run, output: epath.Path) -> int:
    if parallel.is_first():
        text = built.task.prepare(output)
        print(f'{text}\nprepared {len(built.data)} records: {built.fingerprint}'.strip())
    return 0


def _read(built: build.Run, command: Command) -> int:
    """Carries out a mode that reads the weights of a run."""
    mode = command.mode
    output = epath.Path(command.output or command.workdir / mode)
    if not parallel.is_first() and mode in ('predict', 'embed'):  # every host computes, one writes
        output = epath.Path(tempfile.mkdtemp(prefix=f'mmjax-{mode}-'))
        atexit.register(shutil.rmtree, output, ignore_errors=True)
    with jax.set_mesh(built.mesh):  # the best weights of the run, the newest if none is best
        variables, _ = weights_from(built, command.init_from or str(command.workdir))
        predictor = evaluate.Predictor(
            built.task, variables, built.mesh, threads=built.config.data.threads
        )
        if mode == 'evaluate':
            stage = built.stages[-1]
            weights = evaluate.LossWeights.of(stage, stage.steps, built.final_weights)
            scores = evaluate.run(built.evaluators, predictor, built.task, weights, final=True)
            text = json.dumps({name: s.metrics for name, s in scores.items()}, indent=1)
        elif mode == 'embed':
            text = built.task.embed(predictor, output)
        elif mode == 'export':
            text = export(built.task, variables, output, built.config)
        else:
            text = _predict(built.task, predictor, command, output)
    if parallel.is_first():
        print(text)
    return 0


def _predict(
    task: Task, predictor: evaluate.Predictor, command: Command, output: epath.Path
) -> str:
    if not command.input:
        raise UserError('--mode=predict needs --input')
    if command.question is None:
        return task.predict(predictor, command.input, output)
    if not task.takes_question:
        raise UserError(f'{type(task).__name__} takes no --question')
    return task.predict(predictor, command.input, output, question=command.question)


def plain(config: Config) -> dict[str, Any]:
    """Returns a config as nested dicts of JSON's types."""
    return json.loads(json.dumps(sections.to_dict(config)))


def describe(built: build.Run, command: Sequence[str]) -> dict[str, Any]:
    """Returns the content of config.json."""
    packages = ('jax', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'tensorflow-datasets')
    versions = {name: importlib.metadata.version(name) for name in packages}
    params = built.abstract['params']
    plan = [
        {
            'name': stage.name,
            'steps': stage.steps,
            'epochs': stage.steps / stage.steps_per_epoch,
            'groups': optim.summary(params, built.groups, stage),
            'loss_weights': stage.weights(0),
        }
        for stage in built.stages
    ]
    return {
        'config': plain(built.config),
        'command': shlex.join(['python', '-m', 'mmjax.main', *command[1:]]),
        'versions': {'mmjax': mmjax.__version__, 'python': sys.version.split()[0], **versions},
        'device': f'{jax.device_count()} × {jax.devices()[0].device_kind}, '
        f'{jax.process_count()} process(es)',
        'plan': plan,
        'data': {'train': built.fingerprint},
        'verdicts': built.task.verdicts,
    }


def claim_workdir(
    workdir: epath.Path, built: build.Run, argv: Sequence[str], *, anew: bool
) -> None:
    """Makes the workdir of a run: config.json, and what the model needs beside its weights."""
    if anew:
        for name in ('checkpoints', 'best', 'tensorboard', 'figures', 'not_finite', 'corrupt'):
            if (workdir / name).exists():
                (workdir / name).rmtree()
        for name in ('metrics.jsonl', 'results.json', 'report.html'):
            (workdir / name).unlink(missing_ok=True)
    workdir.mkdir(parents=True, exist_ok=True)
    logs.write_json(workdir / 'config.json', describe(built, argv))
    built.task.save_assets(workdir)


def _train(built: build.Run, command: Command) -> int:
    workdir = command.workdir
    tensorboard = built.config.log.tensorboard
    log = logs.Logs(workdir, enabled=parallel.is_first(), tensorboard=tensorboard)
    try:
        for text in built.warnings:
            log.message(f'warning: {text}')
        results = train(
            built,
            workdir,
            log,
            init_from=command.init_from,
            allow_data_change=command.allow_data_change,
            max_steps=command.max_steps,
        )
    except Preempted:
        log.message(f'stopped by a signal after saving; the same command continues {workdir}')
        return EXIT_CODE
    except StepLimit:
        log.message(
            f'stopped at --max_steps={command.max_steps} and saved; without --max_steps '
            f'the same command continues {workdir}'
        )
        return 0
    finally:
        log.close()
        if parallel.is_first():
            report.write(workdir)
    if parallel.is_first():
        print(json.dumps(results, indent=1))
        print(f'report: {workdir / "report.html"}')
    return 0


def dry_run(built: build.Run) -> str:
    """Returns the plan of a run, its groups and parameters, and the memory of each step.

    Compiles the step of every distinct stage; trains nothing.
    """
    lines = [json.dumps(plain(built.config), indent=1)]
    lines += [f'warning: {text}' for text in built.warnings]
    sizes = [math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(built.abstract)]
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(built.abstract['params']))
    lines.append(f'{count:,} parameters; weights and batch statistics {_mib(sum(sizes))}')
    for stage in built.stages:
        epochs = stage.steps / stage.steps_per_epoch
        lines.append(f'stage {stage.name}: {stage.steps} updates, {epochs:.3g} epochs')
        for row in optim.summary(built.abstract['params'], built.groups, stage):
            rate = f'{row["rate"]:g}' if row['rate'] else 'frozen'
            lines.append(f'  {row["group"]}: {row["parameters"]:,} parameters, rate {rate}')
        state = built.abstract_state(stage)
        size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state['opt_state']))
        lines.append(f'  optimizer state {_mib(size)}, {_activations(built, stage, state)}')
    return '\n'.join(lines)


def _activations(built: build.Run, stage: Any, state: step.State) -> str:
    rates = optim.rates(stage, built.groups.names, 0)
    weights = {name: np.float32(1) for name in stage.losses}
    batch = built.abstract_batch(stage)
    with jax.set_mesh(built.mesh):
        lowered = built.compiled_step(stage).lower(state, batch, rates, weights)
    compiled = lowered.compile()
    memory = compiled.memory_analysis()
    if memory is None:
        return 'activations unknown on this backend'
    return f'activations and temporaries {_mib(memory.temp_size_in_bytes)} per device'


def _mib(size: float) -> str:
    return f'{size / 2**20:,.1f} MiB'


def export(task: Task, variables: Variables, output: epath.Path, config: Config) -> str:
    """Writes the weights as safetensors, names 'params/a/b/kernel', and the config beside.

    The task may add published forms.
    """
    variables = parallel.fetch(variables)
    flat = {key: np.ascontiguousarray(x) for key, x in optim.flatten(variables).items()}
    more = ''
    if parallel.is_first():
        output.mkdir(parents=True, exist_ok=True)
        (output / 'model.safetensors').write_bytes(save(flat))
        logs.write_json(output / 'config.json', plain(config))
        more = task.export(variables, output)
    return f'{len(flat)} tensors: {output / "model.safetensors"}\n{more}'.strip()
