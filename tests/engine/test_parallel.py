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


@pytest.mark.parametrize('fsdp', [pytest.param(1, marks=pytest.mark.slow), 2])
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


def test_pmap_gives_the_losses_of_jit_over_the_mesh():
    """`jax.pmap` sums (total, count) over devices; the mesh does so by itself."""
    code = """
import functools, jax, jax.numpy as jnp, numpy as np
from mmjax.engine import parallel
from mmjax.losses.term import Term
x = np.random.default_rng(0).normal(size=(16, 5)).astype(np.float32)
mask = np.arange(16) % 3 > 0
w = np.ones(5, np.float32)
def term(w, x, mask):
    return Term(jnp.sum(jnp.tanh(x @ w) ** 2 * mask), mask.sum().astype(jnp.float32))
@functools.partial(jax.pmap, axis_name='d', in_axes=(None, 0, 0))
def device_step(w, x, mask):
    total, count = jax.lax.psum(term(w, x, mask), 'd')
    grad = jax.grad(lambda w: term(w, x, mask).total)(w)
    return total / count, jax.lax.psum(grad, 'd') / count
mesh = parallel.mesh({'data': -1, 'fsdp': 1})
loss, grad = device_step(w, x.reshape(8, 2, 5), mask.reshape(8, 2))
with jax.set_mesh(mesh):
    put = lambda a: jax.device_put(a, parallel.rows(mesh))
    mean = lambda w, x, m: term(w, x, m).mean()
    want, dw = jax.jit(jax.value_and_grad(mean))(w, put(x), put(mask))
np.testing.assert_allclose(loss[0], want, rtol=1e-6)
np.testing.assert_allclose(grad[0], dw, rtol=1e-5)
assert jax.device_count() == 8
"""
    env = environment({'XLA_FLAGS': '--xla_force_host_platform_device_count=8'})
    done = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_mesh_that_does_not_fit_the_devices_is_an_error():
    with pytest.raises(UserError, match='data=3 × fsdp=1 does not make the 1 devices'):
        parallel.mesh({'data': 3, 'fsdp': 1})
    mesh = parallel.mesh({'data': -1, 'fsdp': 1})
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
