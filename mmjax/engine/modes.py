"""What each --mode does with a built run: train, evaluate, predict, prepare, embed, export."""

import atexit
import importlib.metadata
import inspect
import json
import os
import shlex
import shutil
import sys
import tempfile

import jax
import numpy as np
from absl import logging as absl_logging
from etils import epath

import mmjax
from mmjax.engine import build, evaluate, logs, optim, parallel, report
from mmjax.engine.preemption import EXIT_CODE, Preempted
from mmjax.engine.train import train, weights_from
from mmjax.errors import UserError


def run(mode: str, config, plain: dict, workdir: epath.Path, **options) -> int:
    """Builds the run and carries out `mode`; returns the exit code.

    options: as `mmjax.main` has them from its flags.
    """
    before = jax.config.read('jax_disable_most_optimizations')
    jax.config.update('jax_disable_most_optimizations', config.quick_compile or before)
    try:
        return _run(mode, config, plain, workdir, **options)
    finally:
        jax.config.update('jax_disable_most_optimizations', before)


def _run(
    mode,
    config,
    plain,
    workdir,
    *,
    argv,
    existing,
    overwrite,
    input,
    question,
    output,
    init_from,
    allow_data_change,
    processes,
) -> int:
    absl_logging.set_verbosity(absl_logging.WARNING)
    cache = os.environ.get('MMJAX_COMPILATION_CACHE')
    if cache:
        jax.config.update('jax_compilation_cache_dir', cache)
    parallel.start(*processes)
    # A run killed before its first checkpoint has nothing to keep: its workdir is claimed again.
    fresh = not existing or overwrite or not (workdir / 'checkpoints').exists()
    built = build.run(
        config, assets=None if fresh else workdir, init_from=init_from, data_only=mode == 'prepare'
    )
    first = parallel.is_first()
    target = epath.Path(output) if output else workdir / mode
    if not first and mode in ('predict', 'embed'):  # every host computes, one writes
        target = epath.Path(tempfile.mkdtemp(prefix=f'mmjax-{mode}-'))
        atexit.register(shutil.rmtree, target, ignore_errors=True)
    if mode == 'prepare':
        if first:
            told = built.task.prepare(target)
            print(f'{told}\nprepared {len(built.data)} records: {built.fingerprint}'.strip())
        return 0
    build.check_terms(built)
    if mode == 'train':
        if first and fresh:  # a run that goes on keeps what it said at its start
            claim_workdir(workdir, built, plain, argv, anew=existing and overwrite)
        parallel.barrier('workdir')
        return _train(built, workdir, init_from, allow_data_change)
    with jax.set_mesh(built.mesh):  # the best weights of the run, the newest where none is best
        variables, _ = weights_from(built, init_from or str(workdir))
        apply = evaluate.Apply(built.task, variables, built.mesh, threads=built.loader['threads'])
        if mode == 'evaluate':
            scores = evaluate.run(built.evaluators, apply, final=True)
            text = json.dumps({name: s.metrics for name, s in scores.items()}, indent=1)
        elif mode == 'embed':
            text = built.task.embed(apply, target)
        elif mode == 'export':
            text = export(built.task, variables, target, plain)
        else:
            if not input:
                raise UserError('--mode=predict needs --input')
            asked = {} if question is None else {'question': question}
            if asked and 'question' not in inspect.signature(built.task.predict).parameters:
                raise UserError(f"config.task '{config.task}' takes no --question")
            text = built.task.predict(apply, input, target, **asked)
    if first:
        print(text)
    return 0


def describe(run, config: dict, command: list[str]) -> dict:
    """Returns the content of config.json."""
    packages = ('jax', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'tensorflow-datasets')
    versions = {name: importlib.metadata.version(name) for name in packages}
    params = run.abstract['params']
    plan = [
        {
            'name': stage.name,
            'steps': stage.steps,
            'epochs': stage.steps / stage.steps_per_epoch,
            'groups': optim.summary(params, run.groups, stage),
            'loss_weights': stage.weights(0),
        }
        for stage in run.stages
    ]
    return {
        'config': config,
        'command': shlex.join(['python', '-m', 'mmjax.main', *command[1:]]),
        'versions': {'mmjax': mmjax.__version__, 'python': sys.version.split()[0], **versions},
        'device': f'{jax.device_count()} × {jax.devices()[0].device_kind}, '
        f'{jax.process_count()} process(es)',
        'plan': plan,
        'data': {'train': run.fingerprint},
    }


def claim_workdir(workdir: epath.Path, built, plain: dict, argv, *, anew: bool) -> None:
    """Makes the workdir of a run: config.json, and what the model needs beside its weights."""
    if anew:
        for name in ('checkpoints', 'best', 'tensorboard', 'figures', 'not_finite', 'corrupt'):
            if (workdir / name).exists():
                (workdir / name).rmtree()
        for name in ('metrics.jsonl', 'results.json', 'report.html'):
            (workdir / name).unlink(missing_ok=True)
    workdir.mkdir(parents=True, exist_ok=True)
    logs.write_json(workdir / 'config.json', describe(built, plain, argv))
    built.task.save_assets(workdir)


def _train(built, workdir, init_from, allow_data_change) -> int:
    log = logs.Logs(workdir, enabled=parallel.is_first(), tensorboard=built.cadence.tensorboard)
    try:
        for note in built.notes:
            log.message(f'note: {note}')
        results = train(
            built, workdir, log, init_from=init_from, allow_data_change=allow_data_change
        )
    except Preempted:
        log.message(f'stopped by a signal after saving; the same command continues {workdir}')
        return EXIT_CODE
    finally:
        log.close()
        if parallel.is_first():
            report.write(workdir)
    if parallel.is_first():
        print(json.dumps(results, indent=1))
        print(f'report: {workdir / "report.html"}')
    return 0


def export(task, variables, target: epath.Path, plain: dict) -> str:
    """Writes the weights as safetensors, names 'params/a/b/kernel', and the config beside.

    The task may add published forms.
    """
    from safetensors.numpy import save

    variables = parallel.fetch(variables)
    flat = {key: np.ascontiguousarray(x) for key, x in optim.flatten(variables).items()}
    more = ''
    if parallel.is_first():
        target.mkdir(parents=True, exist_ok=True)
        (target / 'model.safetensors').write_bytes(save(flat))
        logs.write_json(target / 'config.json', plain)
        more = task.export(variables, target)
    return f'{len(flat)} tensors: {target / "model.safetensors"}\n{more}'.strip()
