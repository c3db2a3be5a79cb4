"""The step: frozen leaves, exact accumulation, precision, the not-finite guard, traces, FLOPs."""

import functools
import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.engine import optim, step
from mmjax.engine.config import Optimizer
from mmjax.engine.stages import Stage
from mmjax.engine.task import tower_output
from mmjax.losses.term import Term

B, D = 8, 16


class Towers:
    """Two towers and a contrastive term over the whole batch; no dropout, no batch statistics."""

    def __init__(self, dtype=jnp.float32, depth=4):
        self.dtype, self.depth = dtype, depth

    def init(self, key):
        names = [(t, i) for t in ('image', 'text') for i in range(self.depth)]
        out = {'image': {}, 'text': {}, 'head': {}}
        for (tower, i), k in zip(names, jax.random.split(key, len(names)), strict=True):
            out[tower][f'layer_{i}'] = {'kernel': jax.random.normal(k, (D, D)) / 4}
        for name, k in zip(('image', 'text'), jax.random.split(key), strict=True):
            out['head'][name] = {'kernel': jax.random.normal(k, (D, D)) / 4}
        return {'params': out}

    def tower(self, params, x, learns):
        for i in range(self.depth):
            kernel = params[f'layer_{i}']['kernel'].astype(self.dtype)
            x = nn.tanh(x.astype(self.dtype) @ kernel)
        return tower_output(x, learns)

    towers = {'towers': '(image|text)/.*', 'head': 'head/.*'}

    def forward(self, variables, batch, stage, *, train, key):
        p = variables['params']
        learns = train['towers']
        out = {
            n: self.tower(p[n], batch[n], learns) @ p['head'][n]['kernel'].astype(self.dtype)
            for n in ('image', 'text')
        }
        noise = jax.vmap(lambda k: jax.random.normal(k, ()))(batch['key'])
        return out | {'noise': noise}, {}

    def terms(self, variables, outputs, batch, stage):
        unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)
        x, y = (unit(outputs[n].astype(jnp.float32)) for n in ('image', 'text'))
        logits = x @ y.T / 0.1 + 1e-3 * outputs['noise'][:, None]
        loss = -jnp.diagonal(nn.log_softmax(logits))
        return {'infonce': Term(loss.sum(), jnp.float32(len(loss))), 'cosine': jnp.sum(x * y) / B}


RULES = (('head', 'head/.*'), ('towers', '.*'))


def stage(**rates):
    return Stage(
        's',
        tuple(sorted(rates.items())),
        (('infonce', 1.0),),
        Optimizer(learning_rate=1e-2, weight_decay=0.1),
        steps=10,
        run_steps=10,
    )


def batch(seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda: rng.normal(size=(B, D)).astype(np.float32)
    return {
        'image': draw(),
        'text': draw(),
        'row': np.arange(B, dtype=np.int32),
        'mask': np.ones(B, bool),
    }


def setup(this, task=None, **settings):
    task = task or Towers()
    variables = task.init(jax.random.key(0))
    groups = optim.resolve(variables['params'], {}, (), RULES)
    settings = step.Settings(seed=1, **settings)
    state = step.create(variables, this, groups, settings)
    call = functools.partial(
        step.train_step, task=task, stage=this, groups=groups, settings=settings
    )
    rates = optim.rates(this, groups.names, 0)
    return state, call, rates, {'infonce': np.float32(1)}, groups, settings


@pytest.mark.parametrize('count', [2, 4, 8])
def test_accumulation_is_exact_for_a_contrastive_term(count):
    this = stage()
    whole, call, rates, weights, *_ = setup(this)
    parts, micro, *_ = setup(this, accumulation=count)
    for seed in range(3):
        whole, a = jax.jit(call)(whole, batch(seed), rates, weights)
        parts, b = jax.jit(micro)(parts, batch(seed), rates, weights)
        np.testing.assert_allclose(a['loss'], b['loss'], rtol=1e-5)
        np.testing.assert_allclose(a['grad_norm'], b['grad_norm'], rtol=1e-5)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6),
        whole['trainable'],
        parts['trainable'],
    )


@pytest.mark.parametrize('count', [1, 4])
def test_micro_batches_run_one_after_the_other(count):
    """Forward and backward scan over them; equal losses alone would not tell a batch kept whole."""
    state, call, rates, weights, *_ = setup(stage(), accumulation=count)
    program = str(jax.make_jaxpr(call)(state, batch(), rates, weights))
    scanned = [int(length) for length in re.findall(r'\blength=(\d+)', program)]
    assert scanned == ([count] * 2 if count > 1 else [])
    assert f'f32[{B // count},{D}] = dot_general' in program


def test_rows_come_back_in_order_and_keep_their_key():
    x = jnp.arange(12).reshape(12, 1)
    micro = step._to_micro(x, 3)
    np.testing.assert_array_equal(micro[1][:, 0], [1, 4, 7, 10])  # row r in micro-batch r mod M
    np.testing.assert_array_equal(step._from_micro(micro), x)
    _, eight = step.keys(0, 0, 5, 8)
    _, four = step.keys(0, 0, 5, 4)
    np.testing.assert_array_equal(jax.random.key_data(eight)[:4], jax.random.key_data(four))


def test_frozen_leaves_are_bit_identical_and_have_no_moments():
    state, call, rates, weights, *_ = setup(stage(towers=0.0))
    before = jax.tree.map(np.asarray, state['frozen'])
    assert set(state['opt_state']) == {'head'} == set(state['trainable'])
    for seed in range(5):
        state, _ = jax.jit(call)(state, batch(seed), rates, weights)
    jax.tree.map(np.testing.assert_array_equal, before, state['frozen'])
    leaves = {'head/image/kernel', 'head/text/kernel'}
    assert set(optim.flatten(state['opt_state']['head']['mu'])) == leaves


def flops(this, **settings):
    state, call, rates, weights, *_ = setup(this, **settings)
    compiled = jax.jit(call).lower(state, batch(), rates, weights).compile()
    return compiled.cost_analysis()['flops']


def test_a_frozen_tower_costs_no_backward_pass():
    """2·B·D² a layer forward, twice that backward; norms and heads come on top of either."""
    layer = 2 * B * D * D
    saved = flops(stage()) - flops(stage(towers=0.0))
    backward = 2 * 4 * 2 * layer - 2 * layer  # the first layer's input needs no gradient
    assert saved >= backward


def test_a_frozen_tower_is_not_recomputed_under_accumulation():
    def dots(this):
        state, call, rates, weights, *_ = setup(this, accumulation=2)
        text = str(jax.make_jaxpr(call)(state, batch(), rates, weights))
        return text.count('dot_general')

    # Thawed: 8 tower products forward, 8 again for the recomputation. Frozen: 8 forward alone.
    frozen, thawed = dots(stage(towers=0.0)), dots(stage())
    heads_and_loss = frozen - 8
    assert thawed >= 16 + heads_and_loss and frozen < 16


@pytest.mark.parametrize('fault', ['loss', 'gradient'])
def test_an_update_that_is_not_finite_is_never_accepted(fault):
    state, call, rates, weights, *_ = setup(stage())
    bad = batch()
    if fault == 'loss':
        bad['image'][0, 0] = np.nan
    else:
        weights = {'infonce': np.float32(np.inf)}
    for _ in range(3):
        before = jax.tree.map(np.asarray, state)
        state, metrics = jax.jit(call)(state, bad, rates, weights)
        assert not metrics['ok']
        for name in ('trainable', 'opt_state'):
            jax.tree.map(np.testing.assert_array_equal, before[name], state[name])
    assert int(state['step']) == 3  # the position moves on, the weights do not


def test_weights_must_name_losses_of_the_task():
    state, call, rates, _, *_ = setup(stage())
    with pytest.raises(ValueError, match=r"names 'cosine'; this task's losses are infonce"):
        call(state, batch(), rates, {'cosine': np.float32(1)})


def test_bfloat16_computes_near_float32_with_float32_parameters():
    a, call, rates, weights, *_ = setup(stage())
    b, low, *_ = setup(stage(), task=Towers(jnp.bfloat16), precision='bfloat16')
    _, want = jax.jit(call)(a, batch(), rates, weights)
    out, got = jax.jit(low)(b, batch(), rates, weights)
    np.testing.assert_allclose(got['loss'], want['loss'], rtol=0.05)
    chex.assert_tree_all_finite(out['trainable'])
    assert {str(x.dtype) for x in jax.tree.leaves(out['trainable'])} == {'float32'}


def test_float16_halves_its_scale_on_overflow_and_grows_it_after_a_streak(monkeypatch):
    monkeypatch.setattr(step, 'GROWTH_INTERVAL', 3)
    state, call, rates, weights, *_ = setup(stage(), task=Towers(jnp.float16), precision='float16')
    state['scale']['value'] = jnp.float32(2.0**40)  # certain to overflow
    before = jax.tree.map(np.asarray, state['trainable'])
    call = jax.jit(call)
    state, metrics = call(state, batch(), rates, weights)
    assert (
        metrics['ok'] and float(state['scale']['value']) == 2.0**39
    )  # no fault, part of the method
    jax.tree.map(np.testing.assert_array_equal, before, state['trainable'])
    state['scale']['value'] = jnp.float32(2.0**8)
    for _ in range(3):
        state, metrics = call(state, batch(), rates, weights)
    assert float(state['scale']['value']) == 2.0**9
    assert float(metrics['grad_norm']) < 100  # unscaled


def test_the_average_follows_the_weights():
    state, call, rates, weights, *_ = setup(stage(), ema=0.9)
    average = np.asarray(state['trainable']['head']['image']['kernel'], np.float64)
    for seed in range(4):
        state, _ = jax.jit(call)(state, batch(seed), rates, weights)
        weight = np.asarray(state['trainable']['head']['image']['kernel'], np.float64)
        average = 0.9 * average + 0.1 * weight
    np.testing.assert_allclose(state['ema']['head']['image']['kernel'], average, rtol=1e-5)
    evaluated = step.variables(state, averaged=True)['params']['head']['image']['kernel']
    np.testing.assert_array_equal(evaluated, state['ema']['head']['image']['kernel'])


def test_entering_a_stage_keeps_weights_and_moments_and_restarts_its_position():
    state, call, rates, weights, groups, settings = setup(stage(towers=0.0), ema=0.9)
    for seed in range(3):
        state, _ = jax.jit(call)(state, batch(seed), rates, weights)
    second = stage(towers=0.1)
    entered = step.enter_stage(state, second, groups, settings)
    jax.tree.map(
        np.testing.assert_array_equal,
        step.variables(state)['params'],
        step.variables(entered)['params'],
    )
    assert int(entered['step']) == 3 and int(entered['stage_step']) == 0
    np.testing.assert_array_equal(
        entered['opt_state']['head']['nu']['head']['text']['kernel'],
        state['opt_state']['head']['nu']['head']['text']['kernel'],
    )
    assert int(entered['opt_state']['towers']['count']) == 0


def test_steps_of_one_stage_trace_once():
    state, call, _, _, groups, _ = setup(stage())
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def traced(*arguments):
        return call(*arguments)

    for at in range(4):
        rates = optim.rates(stage(), groups.names, at)
        state, _ = traced(state, batch(at), rates, {'infonce': np.float32(at)})


def test_a_term_without_active_items_is_zero_with_a_zero_gradient():
    mean = lambda x: Term(x * 0.0, jnp.float32(0)).mean()
    assert float(mean(3.0)) == 0.0 and float(jax.grad(mean)(3.0)) == 0.0


class Noisy(Towers):
    """Puts the draws of dropout into the outputs, and their values by row into a diagnostic."""

    def forward(self, variables, batch, stage, *, train, key):
        out, stats = super().forward(variables, batch, stage, train=train, key=key)
        return out | {'dropout': jax.random.normal(key, (len(batch['row']),))}, stats

    def terms(self, variables, outputs, batch, stage):
        return super().terms(variables, outputs, batch, stage) | {'dropout': outputs['dropout']}


def test_each_device_of_a_mapped_step_draws_its_own_dropout():
    this = stage()
    state, call, rates, weights, *_ = setup(this, Noisy())
    local = {name: x.reshape(2, B // 2, *x.shape[1:]) for name, x in batch().items()}
    mapped = jax.vmap(
        functools.partial(call, axis_name='devices'), (None, 0, None, None), axis_name='devices'
    )
    _, metrics = mapped(state, local, rates, weights)
    first, second = np.split(np.asarray(metrics['dropout'][0]), 2)  # gathered from both devices
    assert not set(first) & set(second)
