"""One, eight and two times one devices give the same losses; pmap gives those of the mesh."""

import json
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.engine import parallel
from mmjax.errors import UserError
from tests.runs import ROOT, command, environment, lines

SMOKE = '--config=configs/stage3.py:smoke'


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
    return {'MMJAX_CACHE': str(tmp_path_factory.getbasetemp() / 'mmjax')}


@pytest.fixture(scope='module')
def single(tmp_path_factory, cache):
    """The losses of the smoke run on one device."""
    workdir = tmp_path_factory.mktemp('single')
    done = command(SMOKE, f'--workdir={workdir / "run"}', env=cache)
    assert done.returncode == 0, done.stderr
    return lines(workdir / 'run')


def same(actual, expected):
    assert [line['step'] for line in actual] == [line['step'] for line in expected]
    for a, b in zip(actual, expected, strict=True):
        assert a.keys() == b.keys()
        for key, value in b.items():
            if key not in ('step', 'stage'):
                np.testing.assert_allclose(a[key], value, rtol=1e-5, err_msg=f'{key} {b["step"]}')


@pytest.mark.slow
@pytest.mark.parametrize('fsdp', [1, 2])
def test_eight_devices_give_the_losses_of_one(tmp_path, cache, single, fsdp):
    workdir = tmp_path / 'run'
    env = {'XLA_FLAGS': '--xla_force_host_platform_device_count=8', **cache}
    done = command(SMOKE, f'--workdir={workdir}', f'--config.mesh.fsdp={fsdp}', env=env)
    assert done.returncode == 0, done.stderr
    same(lines(workdir), single)


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(tmp_path, cache, single):
    workdir = tmp_path / 'run'
    env = {'JAX_NUM_CPU_DEVICES': '1', 'PYTHON': sys.executable, **cache}
    done = subprocess.run(
        ['bash', 'launch/local.sh', '2', SMOKE, f'--workdir={workdir}'],
        cwd=ROOT,
        env=environment(env),
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    same(lines(workdir), single)
    assert json.loads((workdir / 'results.json').read_text())['final']['val']


PMAP = """
import functools, sys
import jax, numpy as np
from mmjax.data import pipeline
from mmjax.engine import build, optim, parallel, step
from tests import runs

name, cache = sys.argv[1:]
config = runs.recipe(name, 'smoke')
config.data.cache = cache
config.batch_size = 16
if name == 'stage3':
    config.data.built_in = dict(train=48, val=8)
    for part in (config.model.bert, config.model.siglip, config.model.heads):
        part.dropout = 0.0
else:
    config.model.student.dropout = 0.0
built = build.run(config)
stage = built.stages[-1]
call = functools.partial(
    step.train_step, task=built.task, stage=stage.compile_key, groups=built.groups,
    settings=built.settings,
)
variables = jax.tree.map(np.asarray, built.init_variables())
state = step.create(variables, stage, built.groups, built.settings)
weights = {n: np.float32(w) for n, w in stage.weights(0).items()}
sampler = built.sampler(stage)
options = dict(seed=0, stage=0, stop=3, train=False, threads=0)
batches = [batch for batch in pipeline.batches(built.data, sampler, **options)]
assert jax.device_count() == 8

mapped = jax.pmap(functools.partial(call, axis_name='devices'), axis_name='devices',
                  in_axes=(0, 0, None, None))
copies = jax.tree.map(lambda x: np.broadcast_to(np.asarray(x), (8, *np.shape(x))), state)
losses = []
for at, batch in enumerate(batches):
    local = {n: x.reshape(8, -1, *x.shape[1:]) for n, x in batch.items()}
    rates = optim.rates(stage, built.groups.names, at + 60)
    copies, metrics = mapped(copies, local, rates, weights)
    losses.append(jax.tree.map(lambda x: np.asarray(x)[0], metrics))

meshed = jax.jit(call)
with jax.set_mesh(built.mesh):
    for at, batch in enumerate(batches):
        batch = {n: jax.device_put(x, parallel.rows(built.mesh)) for n, x in batch.items()}
        rates = optim.rates(stage, built.groups.names, at + 60)
        state, metrics = meshed(state, batch, rates, weights)
        for n, value in metrics.items():
            if n == 'loss' or n.startswith(('loss/', 'count/')):
                np.testing.assert_allclose(losses[at][n], value, rtol=1e-5, err_msg=n)
for part in ('trainable', 'batch_stats'):
    ours, theirs = optim.flatten(copies[part]), optim.flatten(state[part])
    for path, x in theirs.items():
        np.testing.assert_allclose(np.asarray(ours[path])[0], x, rtol=1e-5, atol=1e-5, err_msg=path)
        np.testing.assert_array_equal(np.asarray(ours[path])[0], np.asarray(ours[path])[7])
"""


@pytest.mark.parametrize('name', ['stage3', pytest.param('sign_ctc', marks=pytest.mark.slow)])
def test_the_step_under_pmap_gives_losses_and_weights_of_the_mesh(tmp_path, name):
    """Three updates on eight devices: contrastive rows, CTC, batch statistics of all rows."""
    env = environment({'XLA_FLAGS': '--xla_force_host_platform_device_count=8'})
    command = [sys.executable, '-c', PMAP, name, str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_mesh_that_does_not_fit_the_devices_is_an_error():
    with pytest.raises(UserError, match='data=3 × fsdp=1 does not make the 1 devices'):
        parallel.mesh(3, 1)
    mesh = parallel.mesh(-1, 1)
    with pytest.raises(UserError, match='not a multiple of accumulation=3'):
        parallel.check_batch(8, 3, mesh)


def test_large_leaves_are_sharded_along_their_longest_axis(monkeypatch):
    mesh = types.SimpleNamespace(shape={'fsdp': 4})
    monkeypatch.setattr(parallel, 'NamedSharding', lambda mesh, spec: tuple(spec))
    leaf = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    tree = {'wide': leaf(64, 1024), 'tall': leaf(1024, 64), 'odd': leaf(333, 333)}
    actual = parallel.weights({**tree, 'small': leaf(4, 4)}, mesh)
    assert actual == {'wide': (None, 'fsdp'), 'tall': ('fsdp',), 'odd': (), 'small': ()}


def test_half_of_the_distributed_flags_is_an_error():
    with pytest.raises(UserError, match='--coordinator, --processes and --process together'):
        parallel.start('localhost:1', None, 0)
