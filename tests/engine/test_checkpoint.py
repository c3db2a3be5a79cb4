"""Checkpoints: round trips, strictness, flipped bits, kills, keeping, loading and merging."""

import json
import logging
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.engine.checkpoint import Checkpoints, checksums, load_weights, merge
from mmjax.engine.checkpoint.weights import _parse
from mmjax.errors import UserError


def _state(step: int = 1, frozen: bool = True):
    rng = np.random.default_rng(step)
    array = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    return {
        'step': jnp.int32(step),
        'trainable': {'head': {'kernel': array(3, 4), 'bias': array(4).astype(jnp.bfloat16)}},
        'frozen': {'tower': {'kernel': array(2, 2)}} if frozen else {},
        'batch_stats': {'norm': {'mean': array(4)}},
        'opt_state': {'mu': {'head/kernel': array(3, 4)}, 'nu': {}},
        'ema': {},
        'seen': jnp.asarray([True, False]),
    }


def _abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def _fill(root, steps, keep=5):
    with Checkpoints(root, keep=keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, _state(step), {'at': step})


def _all_files(path: pathlib.Path) -> list[pathlib.Path]:
    return sorted(p for p in path.rglob('*') if p.is_file())


@pytest.fixture(scope='module')
def filled(tmp_path_factory):
    """A workdir with steps 10, 20 and 30, never written to."""
    root = tmp_path_factory.mktemp('filled')
    _fill(root, (10, 20, 30))
    return root


@pytest.fixture
def workdir(filled, tmp_path):
    shutil.copytree(filled, tmp_path / 'run')
    return tmp_path / 'run'


@pytest.fixture
def warned(caplog):
    """Returns what was warned of so far."""
    caplog.set_level(logging.WARNING, logger='absl')
    return lambda: [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


# Round trips -----------------------------------------------------------------------------------


def test_state_and_meta_come_back_exactly(tmp_path, warned):
    meta = {'stage': 1, 'data': {'name': 'x', 'size': 3}, 'best': None, 'patience': [1, 2.5]}
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.newest() is None and checkpoints.best_meta() is None
        assert not list(tmp_path.iterdir()), 'looking must not write'
        for step, frozen in ((1, True), (2, False)):  # another stage, another tree
            checkpoints.save(step, _state(step, frozen), meta)
            meta['stage'] += 1
            assert checkpoints.newest() == (step, meta | {'stage': step})
            restored = checkpoints.restore(step, _abstract(_state(step, frozen)))
            chex.assert_trees_all_equal(restored, _state(step, frozen))
            chex.assert_trees_all_equal_dtypes(restored, _state(step, frozen))
    assert warned() == []


def test_what_was_saved_survives_donation_and_changes_of_meta(tmp_path):
    update = jax.jit(lambda x: x * 0, donate_argnums=0)
    big = jnp.arange(1 << 20, dtype=jnp.float32)
    expected, meta, host = np.array(big), {'list': [1]}, np.ones(1 << 18, np.float32)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(5, {'x': big, 'host': host}, meta)
        for _ in range(5):
            big = update(big)
        host[:] = 0
        meta['list'].append(2)
        assert checkpoints.newest() == (5, {'list': [1]})
        template = {'x': _abstract(big), 'host': jax.ShapeDtypeStruct(host.shape, host.dtype)}
        restored = checkpoints.restore(5, template)
    np.testing.assert_array_equal(restored['x'], expected)
    np.testing.assert_array_equal(restored['host'], np.ones(1 << 18))


def test_orbax_alone_reads_what_we_wrote(filled):
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager(filled / 'checkpoints', item_names=('state', 'meta')) as manager:
        assert manager.all_steps() == [10, 20, 30]
        state = manager.restore(20, args=ocp.args.Composite(state=ocp.args.StandardRestore())).state
    np.testing.assert_array_equal(
        state['trainable']['head']['kernel'], _state(20)['trainable']['head']['kernel']
    )


def test_a_step_saved_again_is_replaced(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for value in (1, 2):
            checkpoints.save(7, _state(value), {'value': value})
        assert checkpoints.newest() == (7, {'value': 2})
        chex.assert_trees_all_equal(checkpoints.restore(7, _state(2)), _state(2))


def test_the_last_k_are_kept_and_one_best(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 3, 4):
            checkpoints.save(step, _state(step), {})
            checkpoints.save_best(step, {'params': _state(step)['trainable']}, {'value': step})
        checkpoints.wait()
        assert sorted(p.name for p in (tmp_path / 'checkpoints').iterdir()) == ['3', '4']
        assert [p.name for p in (tmp_path / 'best').iterdir()] == ['4']
        assert checkpoints.best_meta() == {'value': 4}
        best = checkpoints.restore_best({'params': _abstract(_state()['trainable'])})
        chex.assert_trees_all_equal(best, {'params': _state(4)['trainable']})
        checkpoints.discard_after(4)
        assert checkpoints.best_meta() is not None
        checkpoints.discard_after(3)
        assert checkpoints.best_meta() is None
        with pytest.raises(UserError, match='holds no weights'):
            checkpoints.restore_best({})


def test_the_old_one_stays_until_the_new_one_has_its_checksums(tmp_path, monkeypatch):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, _state(1), {})
        checkpoints.wait()

        def fail(directory):
            raise OSError('no space left')

        monkeypatch.setattr(checksums, 'write', fail)
        checkpoints.save(2, _state(2), {})
        with pytest.raises(UserError, match='checkpoints/2 could not be saved: no space left'):
            checkpoints.wait()
        checkpoints.wait()  # raised once
        assert checkpoints.newest() == (1, {})


def test_leaves_that_cannot_be_saved_are_named(tmp_path):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        for leaf in (1.5, jnp.zeros((0, 3)), jax.random.key(0)):
            with pytest.raises(ValueError, match='a/b'):
                checkpoints.save(1, {'a': {'b': leaf}}, {})


# Strictness ------------------------------------------------------------------------------------


def _without(tree):
    del tree['batch_stats']['norm']


def _with(tree):
    tree['ema'] = {'head': {'kernel': jnp.zeros((3, 4))}}


def _reshaped(tree):
    tree['trainable']['head']['kernel'] = jnp.zeros((4, 3))


def _retyped(tree):
    tree['trainable']['head']['bias'] = jnp.zeros(4, jnp.float32)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (_without, 'batch_stats/norm/mean is unknown to the run'),
        (_with, 'ema/head/kernel is missing'),
        (_reshaped, r'trainable/head/kernel has shape \(3, 4\) instead of \(4, 3\)'),
        (_retyped, 'trainable/head/bias is bfloat16 instead of float32'),
    ],
)
def test_a_template_that_differs_is_refused(filled, change, message):
    template = _state()
    change(template)
    with pytest.raises(UserError, match=message):
        Checkpoints(filled, keep=1).restore(30, _abstract(template))


# Damage ----------------------------------------------------------------------------------------


def test_a_flipped_bit_in_any_file_is_detected(workdir, warned, caplog):
    newest = workdir / 'checkpoints' / '30'
    rng = random.Random(0)
    files = _all_files(newest)
    assert len(files) > 8 and newest / checksums.CHECKSUMS in files
    for file in files:
        good = file.read_bytes()
        bad = bytearray(good)
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        file.write_bytes(bad)
        caplog.clear()
        checkpoints = Checkpoints(workdir, keep=5)
        assert checkpoints.newest() == (20, {'at': 20}), file
        chex.assert_trees_all_equal(checkpoints.restore(20, _abstract(_state())), _state(20))
        assert len(warned()) == 1
        assert file.relative_to(newest).as_posix() in warned()[0] and 'step 30' in warned()[0]
        with pytest.raises(UserError, match='checkpoints/30 is not good'):
            checkpoints.restore(30, _abstract(_state()))
        file.write_bytes(good)
    caplog.clear()
    assert Checkpoints(workdir, keep=5).newest() == (30, {'at': 30}) and not warned()


def test_any_flipped_bit_of_the_checksums_is_detected(filled):
    data = (filled / 'checkpoints' / '30' / checksums.CHECKSUMS).read_bytes()
    assert checksums._read(data) is not None
    for at in range(len(data)):
        for bit in range(8) if at % 5 == 0 or at < 200 else (at % 8,):
            bad = bytearray(data)
            bad[at] ^= 1 << bit
            assert checksums._read(bytes(bad)) is None, (at, bit)


def test_missing_truncated_and_cut_steps_are_passed_over_and_put_aside(workdir, warned):
    _fill(workdir, (40,))
    folder = workdir / 'checkpoints'
    (folder / '40' / checksums.CHECKSUMS).unlink()  # killed before they were written
    (folder / '30' / 'state' / '_METADATA').unlink()
    data = max(_all_files(folder / '20' / 'state'), key=lambda p: p.stat().st_size)
    data.write_bytes(data.read_bytes()[:-1])
    (folder / '50.orbax-checkpoint-tmp' / 'state').mkdir(parents=True)
    with Checkpoints(workdir, keep=5) as checkpoints:
        assert checkpoints.newest() == (10, {'at': 10})
        (text,) = warned()
        assert 'step 40: has no checksums.json: its save was cut short' in text
        assert 'step 30: state/_METADATA is missing' in text
        assert 'step 20: ' in text and f'{data.name} has' in text and 'from step 10' in text
        assert checksums.steps(folder) == [40, 30, 20, 10], 'reading must not move anything'
        for step in (20, 50):
            checkpoints.save(step, _state(step), {'at': step})
            checkpoints.wait()
        assert checkpoints.newest() == (50, {'at': 50})
    assert sorted(p.name for p in folder.iterdir()) == ['10', '20', '50']
    aside = sorted(p.name for p in (workdir / 'corrupt').iterdir())
    assert aside == ['checkpoints-20', 'checkpoints-30', 'checkpoints-unfinished']
    assert len(warned()) == 1


def test_a_first_save_cut_counts_as_none_and_no_good_one_is_an_error(tmp_path, warned):
    _fill(tmp_path, (10,))
    (tmp_path / 'checkpoints' / '10' / checksums.CHECKSUMS).unlink()
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.newest() is None and len(warned()) == 1
        checkpoints.save(10, _state(3), {})
        chex.assert_trees_all_equal(checkpoints.restore(10, _abstract(_state())), _state(3))
        (tmp_path / 'checkpoints' / '10' / 'meta' / checksums.META).write_text('{"x": 1}')
        with pytest.raises(UserError, match=r'no checkpoint in .* is good .*meta/meta.json has'):
            checkpoints.newest()


_SAVE_FOR_EVER = """
    import itertools, sys
    import jax.numpy as jnp
    from mmjax.engine.checkpoint import Checkpoints
    with Checkpoints(sys.argv[1], keep=2) as checkpoints:
        newest = checkpoints.newest()
        first = 1 if newest is None else newest[0] + 1
        checkpoints.discard_after(first - 1)
        for step in itertools.count(first):
            state = {'step': jnp.int32(step), 'x': jnp.full((300_000,), step, jnp.float32)}
            if step % 3 == 0:
                checkpoints.save_best(step, {'params': {'x': state['x']}}, {'step': step})
            checkpoints.save(step, state, {'step': step})
            print(step, flush=True)
"""


def _run(code: str, *args, **kwargs):
    command = [sys.executable, '-c', textwrap.dedent(code), *map(str, args)]
    root = pathlib.Path(__file__).parents[2]
    return subprocess.Popen(
        command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs
    )


@pytest.mark.parametrize('kills', [3, pytest.param(20, marks=pytest.mark.slow)])
def test_kill_9_while_saving_leaves_a_good_checkpoint(tmp_path, kills):
    template = {
        'step': jax.ShapeDtypeStruct((), jnp.int32),
        'x': jax.ShapeDtypeStruct((300_000,), jnp.float32),
    }
    rng = random.Random(kills)
    for _ in range(kills):
        process = _run(_SAVE_FOR_EVER, tmp_path)
        begun = [process.stdout.readline() for _ in range(3)]
        assert begun[-1], process.communicate()
        time.sleep(rng.random() * 0.2)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        checkpoints = Checkpoints(tmp_path, keep=2)
        step, meta = checkpoints.newest()
        assert step >= int(begun[1]) and meta == {'step': step}  # a save begins when one is whole
        state = checkpoints.restore(step, template)
        assert int(state['step']) == step and bool((state['x'] == step).all())
        best = checkpoints.best_meta()
        if best is not None:  # none while a best that was discarded is being redone
            weights = checkpoints.restore_best({'params': {'x': template['x']}})
            assert bool((weights['params']['x'] == best['step']).all())


# More devices and processes --------------------------------------------------------------------

_RESTORE_SHARDED = """
    import sys, jax, numpy as np
    import jax.numpy as jnp
    from jax.sharding import AxisType, NamedSharding, PartitionSpec
    from mmjax.engine.checkpoint import Checkpoints, load_weights, merge
    assert jax.device_count() == 8
    mesh = jax.make_mesh((2, 4), ('data', 'fsdp'), axis_types=(AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, PartitionSpec(None, 'fsdp'))
    x = np.arange(64.0, dtype=np.float32).reshape(8, 8)
    with Checkpoints(sys.argv[1], keep=2) as checkpoints:
        step, _ = checkpoints.newest()
        leaf = jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=sharding)
        state = checkpoints.restore(step, {'trainable': {'x': leaf}})
        assert state['trainable']['x'].sharding == sharding
        np.testing.assert_array_equal(state['trainable']['x'], x)
        checkpoints.save(step + 1, jax.tree.map(lambda a: a + 1, state), {})
    params, _, _ = load_weights(sys.argv[1])
    np.testing.assert_array_equal(params['x'], x + 1)
    merged, _ = merge({'x': jax.device_put(jnp.zeros((8, 8), jnp.bfloat16), sharding)}, params)
    assert merged['x'].sharding == sharding and merged['x'].dtype == jnp.bfloat16
"""


def test_a_one_device_save_restores_onto_eight_and_back(tmp_path):
    x = jnp.arange(64.0).reshape(8, 8)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(1, {'trainable': {'x': x}}, {})
    flags = '--xla_force_host_platform_device_count=8'
    env = os.environ | {'XLA_FLAGS': flags, 'JAX_PLATFORMS': 'cpu'}
    process = _run(_RESTORE_SHARDED, tmp_path, env=env)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    restored = Checkpoints(tmp_path, keep=2).restore(2, {'trainable': {'x': _abstract(x)}})
    np.testing.assert_array_equal(restored['trainable']['x'], x + 1)


_TWO_PROCESSES = """
    import pathlib, sys, jax, numpy as np
    import jax.numpy as jnp
    from jax.sharding import AxisType, NamedSharding, PartitionSpec
    directory, port, process = sys.argv[1], sys.argv[2], int(sys.argv[3])
    jax.config.update('jax_cpu_collectives_implementation', 'gloo')
    jax.distributed.initialize(f'localhost:{port}', 2, process)
    from mmjax.engine.checkpoint import Checkpoints, load_weights, merge
    from mmjax.errors import UserError
    mesh = jax.make_mesh((jax.device_count(),), ('fsdp',), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec('fsdp'))
    def state(step):
        whole = np.arange(8.0, dtype=np.float32) + step
        x = jax.make_array_from_callback((8,), sharding, lambda i: whole[i])
        return {'trainable': {'x': x}, 'frozen': {}}
    template = {'trainable': {'x': jax.ShapeDtypeStruct((8,), jnp.float32, sharding=sharding)},
                'frozen': {}}
    with Checkpoints(directory, keep=2) as checkpoints:
        assert checkpoints.newest() is None
        for step in (1, 2, 3):
            checkpoints.save(step, state(step), {'at': step})
            checkpoints.save_best(step, {'params': state(step)['trainable']}, {})
        assert checkpoints.newest() == (3, {'at': 3})
        if process == 0:
            (pathlib.Path(directory) / 'checkpoints/3/state/_METADATA').write_text('{}')
        assert checkpoints.newest() == (2, {'at': 2})
        restored = checkpoints.restore(2, template)['trainable']['x']
        for shard in restored.addressable_shards:
            np.testing.assert_array_equal(shard.data, np.arange(8.0)[shard.index] + 2)
        try:
            checkpoints.restore(3, template)
            raise AssertionError
        except UserError as error:
            assert 'state/_METADATA' in str(error)
        checkpoints.save(3, state(5), {'at': 5})
        checkpoints.discard_after(2)
        assert checkpoints.newest() == (3, {'at': 5}) and checkpoints.best_meta() is None
    params, _, _ = load_weights(directory)
    np.testing.assert_array_equal(params['x'], np.arange(8.0) + 5)
    merged, _ = merge({'x': state(0)['trainable']['x']}, params)
    for shard in merged['x'].addressable_shards:
        np.testing.assert_array_equal(shard.data, np.arange(8.0)[shard.index] + 5)
    print('fine')
"""


def test_two_processes_agree_on_what_is_good(tmp_path):
    with socket.socket() as sock:
        sock.bind(('localhost', 0))
        port = sock.getsockname()[1]
    flags = '--xla_force_host_platform_device_count=2'
    env = os.environ | {'XLA_FLAGS': flags, 'JAX_PLATFORMS': 'cpu'}
    both = [_run(_TWO_PROCESSES, tmp_path, port, process, env=env) for process in (0, 1)]
    try:
        for process in both:
            out, errors = process.communicate(timeout=120)
            assert process.returncode == 0 and out.endswith('fine\n'), errors
    finally:
        for process in both:
            process.kill()


# Loading and merging ---------------------------------------------------------------------------


@pytest.fixture(scope='module')
def run_dir(tmp_path_factory):
    """Checkpoints 1 and 2 (2 with ema), best 1."""
    root = tmp_path_factory.mktemp('run')
    with Checkpoints(root, keep=5) as checkpoints:
        checkpoints.save(1, _state(1), {})
        ema = {'head': jax.tree.map(lambda x: x + 1, _state(2)['trainable']['head'])}
        checkpoints.save(2, _state(2) | {'ema': ema}, {})
        params = {'model': {'head': {'kernel': jnp.ones((3, 4))}}, 'scale': jnp.ones(())}
        checkpoints.save_best(1, {'params': params}, {})
    return root


def test_init_from_takes_the_best_the_newest_or_the_one_named(run_dir, tmp_path):
    params, stats, text = load_weights(str(run_dir))
    assert list(params) == ['model', 'scale'] and stats == {} and f'{run_dir}/best/1' in text
    params, stats, text = load_weights(f'{run_dir}/checkpoints')
    assert 'checkpoints/2 (ema' in text
    np.testing.assert_array_equal(
        params['head']['kernel'], np.asarray(_state(2)['trainable']['head']['kernel']) + 1
    )
    np.testing.assert_array_equal(params['tower']['kernel'], _state(2)['frozen']['tower']['kernel'])
    np.testing.assert_array_equal(stats['norm']['mean'], _state(2)['batch_stats']['norm']['mean'])
    params, _, text = load_weights(f'{run_dir}/checkpoints/1/')
    chex.assert_trees_all_equal(params, _state(1)['trainable'] | _state(1)['frozen'])
    assert params['head']['bias'].dtype == jnp.bfloat16
    shutil.copytree(run_dir / 'checkpoints', tmp_path / 'checkpoints')
    assert 'checkpoints/2' in load_weights(str(tmp_path))[2]
    meta = tmp_path / 'checkpoints' / '2' / 'meta' / checksums.META
    meta.write_text(json.dumps({'a': 1}))
    assert 'checkpoints/1' in load_weights(str(tmp_path))[2]
    with pytest.raises(UserError, match=r'checkpoints/2 is not good: meta/meta.json'):
        load_weights(f'{tmp_path}/checkpoints/2')
    for missing in ('nowhere', 'checkpoints/9', 'best'):
        with pytest.raises(UserError, match='there is no checkpoint'):
            load_weights(f'{tmp_path}/{missing}')


def test_prefixes_are_renamed(run_dir):
    params, _, _ = load_weights(f'{run_dir}:model→teacher')
    assert list(params) == ['teacher', 'scale'] and list(params['teacher']) == ['head']
    params, _, _ = load_weights(f'{run_dir}:model/head->a/b,scale->c')
    assert list(params['a']['b']) == ['kernel'] and 'c' in params
    params, _, _ = load_weights(f'{run_dir}:model->,scale->s')
    assert list(params) == ['head', 's']
    params, _, _ = load_weights(f'{run_dir}:->teacher')
    assert list(params) == ['teacher'] and list(params['teacher']) == ['model', 'scale']
    with pytest.raises(UserError, match=r"no leaf of .* is under 'mod'"):
        load_weights(f'{run_dir}:mod->teacher')  # prefixes are whole names
    with pytest.raises(UserError, match='two leaves are called x'):
        load_weights(f'{run_dir}:model/head/kernel->x,scale->x')
    with pytest.raises(UserError, match='not of the form'):
        load_weights(f'{run_dir}:a->b,c')


def test_the_colon_of_a_bucket_does_not_split_the_path():
    assert _parse('gs://b/d') == ('gs://b/d', [])
    assert _parse('gs://b/d:m→t/u,n->') == ('gs://b/d', [(('m',), ('t', 'u')), (('n',), ())])
    assert _parse('gs://b/x->y') == ('gs://b/x->y', [])
    assert _parse('a/b:c') == ('a/b:c', [])


def test_merge_is_strict_and_keeps_the_fresh_dtype():
    fresh = {'a': {'kernel': jnp.zeros((2, 3), jnp.bfloat16)}, 'b': jnp.zeros(2), 'n': jnp.int32(0)}
    loaded = {'a': {'kernel': np.full((2, 3), 0.1, np.float32)}, 'b': np.ones(2), 'n': np.int64(4)}
    merged, report = merge(fresh, loaded)
    chex.assert_trees_all_equal_shapes_and_dtypes(merged, fresh)
    np.testing.assert_array_equal(merged['a']['kernel'], jnp.full((2, 3), 0.1, jnp.bfloat16))
    assert int(merged['n']) == 4 and merged['b'].sharding == fresh['b'].sharding
    assert report == '3 leaves loaded; 0 fresh; 0 unused'

    with pytest.raises(UserError, match=r'a/kernel has shape \(2, 3\) in the model, \(3, 2\)'):
        merge(fresh, loaded | {'a': {'kernel': np.zeros((3, 2))}})
    with pytest.raises(UserError, match='n is int32 in the model, float32 loaded'):
        merge(fresh, loaded | {'n': np.float32(1)})

    less = {'a': loaded['a'], 'n': loaded['n'], 'head': {'old': np.zeros(1)}}
    with pytest.raises(UserError, match=r'^b would stay fresh'):
        merge(fresh, less, allow_unused=['head/.*'])
    with pytest.raises(UserError, match=r'^head/old would stay unused'):
        merge(fresh, less, allow_fresh=['b'], allow_unused=['head'])  # the whole path must match
    merged, report = merge(fresh, less, allow_fresh=['b'], allow_unused=['head/.*'])
    assert report.endswith('; 1 fresh: b; 1 unused: head/old')
    assert str(report) == '2 leaves loaded; 1 fresh: b; 1 unused: head/old'
    assert merged['b'] is fresh['b']
    with pytest.raises(UserError, match='no regular expression'):
        merge(fresh, less, allow_fresh=['('])
