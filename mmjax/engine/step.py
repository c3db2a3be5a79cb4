"""The training step: forward by example, losses over the whole batch, a guarded update. Pure."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from mmjax import axis, cpu
from mmjax.engine import optim
from mmjax.engine.stages import Stage, unknown_loss
from mmjax.engine.task import Task, towers_training
from mmjax.losses.term import Term

State = dict[str, Any]
MIN_SCALE, GROWTH_INTERVAL = 1.0, 2000  # of float16's dynamic loss scale (Micikevicius 2018)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the step needs from the config beside its stage. Hashable, static under jit."""

    seed: int
    accumulation: int = 1
    precision: str = 'float32'
    ema: float = 0.0


def create(variables: Mapping, stage: Stage, groups: optim.Groups, settings: Settings) -> State:
    """Makes the state at the start of a run, in the shape that `stage` gives it.

    {step, stage, stage_step: int32; trainable, frozen, batch_stats, opt_state: trees; ema: averages
    of the trainable tree, {} when off; scale: {value, streak} of float16's loss scale, or {}}.
    """
    trainable, frozen = groups.split(variables['params'], stage)
    zero = lambda: jnp.zeros((), jnp.int32)
    scaled = settings.precision == 'float16'
    return {
        'step': zero(),
        'stage': zero(),
        'stage_step': zero(),
        'trainable': trainable,
        'frozen': frozen,
        'batch_stats': dict(variables.get('batch_stats', {})),
        'opt_state': optim.init(trainable, groups, stage.optimizer),
        'ema': jax.tree.map(jnp.copy, trainable) if settings.ema else {},
        'scale': {'value': jnp.float32(2.0**15), 'streak': zero()} if scaled else {},
    }


def enter_stage(state: State, stage: Stage, groups: optim.Groups, settings: Settings) -> State:
    """Splits the state anew for `stage`; groups that go on learning keep moments and averages."""
    new = create(variables(state), stage, groups, settings)
    new['opt_state'] = optim.carry(state['opt_state'], new['opt_state'])
    if settings.ema:
        before = optim.flatten(state['ema'])
        fresh = optim.flatten(new['ema'])
        new['ema'] = optim.unflatten({path: before.get(path, x) for path, x in fresh.items()})
    index = jnp.full((), stage.index, jnp.int32)
    return {**new, 'step': state['step'], 'stage': index, 'scale': state['scale']}


def variables(state: State, *, averaged: bool = False) -> dict[str, Any]:
    """Returns Linen variables of a state; with `averaged`, the EMA in place of the weights."""
    trainable = state['ema'] if averaged and state['ema'] else state['trainable']
    params = optim.join(trainable, state['frozen'])
    stats = state['batch_stats']
    return {'params': params, 'batch_stats': stats} if stats else {'params': params}


def keys(
    seed: int, stage: jax.Array, stage_step: jax.Array, batch_size: int, first: jax.Array | int = 0
) -> tuple[jax.Array, jax.Array]:
    """Returns (a key for dropout, a key per row) of one step; both follow from the position.

    first: the place of the first row in the global batch.
    """
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), stage), stage_step)
    dropout, examples = jax.random.split(key)
    by_row = jax.vmap(functools.partial(jax.random.fold_in, examples))(
        first + jnp.arange(batch_size)
    )
    return dropout, by_row


def _to_micro(x: jax.Array, count: int) -> jax.Array:
    # Row r goes to micro-batch r mod M, so that none of them sits on a single device.
    return jnp.swapaxes(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 0, 1)


def _from_micro(x: jax.Array) -> jax.Array:
    x = jnp.swapaxes(x, 0, 1)
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def forward(
    task: Task,
    params: Mapping,
    batch_stats: Mapping,
    batch: Mapping,
    stage: Stage,
    train: Mapping[str, bool],
    key: jax.Array,
    count: int,
) -> tuple[PyTree, PyTree]:
    """Runs the forward pass in `count` micro-batches; returns (outputs in order, new statistics).

    With more than one, activations are recomputed in the backward pass, except what went through
    `tower_output`: the outputs of frozen towers are stored.
    """

    def apply(
        params: Mapping, stats: Mapping, rows: Mapping, key: jax.Array
    ) -> tuple[PyTree, PyTree]:
        values = {'params': params, 'batch_stats': stats} if stats else {'params': params}
        return task.forward(values, rows, stage, train=train, key=key)

    if count == 1:
        return apply(params, batch_stats, batch, key)
    saved = jax.checkpoint_policies.save_only_these_names('frozen')
    apply = jax.checkpoint(apply, policy=saved, prevent_cse=False)

    def body(stats: PyTree, item: PyTree) -> tuple[PyTree, PyTree]:
        rows, index = item
        outputs, stats = apply(params, stats, rows, jax.random.fold_in(key, index))
        return stats, outputs

    micro = jax.tree.map(functools.partial(_to_micro, count=count), dict(batch))
    stats, outputs = jax.lax.scan(body, batch_stats, (micro, jnp.arange(count)))
    return jax.tree.map(_from_micro, outputs), stats


def total(terms: Mapping[str, Any], weights: Mapping[str, Any]) -> jax.Array:
    """Returns Σ weight · (Σ total / Σ count) over the weighted terms; float32 scalar."""
    missing = [name for name in weights if not isinstance(terms.get(name), Term)]
    if missing:
        known = [name for name, term in terms.items() if isinstance(term, Term)]
        raise ValueError(unknown_loss('loss_weights', missing[0], known))
    return sum(weight * terms[name].mean() for name, weight in weights.items())


def gradients(
    task: Task,
    state: State,
    batch: Mapping,
    weights: Mapping,
    *,
    stage: Stage,
    groups: optim.Groups,
    settings: Settings,
    axis_name: str | None = None,
) -> tuple[PyTree, jax.Array, dict[str, Term | jax.Array], PyTree]:
    """Returns (gradients of the trainable tree, loss, terms, new batch statistics)."""
    rows = batch['row'].shape[0]
    device = jax.lax.axis_index(axis_name) if axis_name else 0
    position = state['stage'], state['stage_step']
    dropout, by_row = keys(settings.seed, *position, rows, device * rows)
    if axis_name:
        dropout = jax.random.fold_in(dropout, device)
    batch = {**batch, 'key': by_row}
    scale = state['scale'].get('value', jnp.float32(1.0))
    params = optim.join(state['trainable'], state['frozen'])
    train = towers_training(task.towers, groups.of(params), stage)
    collect = lambda tree: jax.tree.map(
        lambda x: jax.lax.all_gather(x, axis_name, tiled=True), tree
    )

    def objective(trainable: PyTree) -> tuple[jax.Array, tuple]:
        params = optim.join(trainable, state['frozen'])
        outputs, stats = forward(
            task, params, state['batch_stats'], batch, stage, train, dropout, settings.accumulation
        )
        every = batch
        if axis_name:
            every = collect({name: x for name, x in batch.items() if name != 'key'})
            outputs = collect(outputs)
        values = {'params': params, 'batch_stats': stats} if stats else {'params': params}
        terms = task.terms(values, outputs, every, stage)
        loss = total(terms, weights)
        return loss * scale, (loss, terms, stats)

    with axis.bound(axis_name):
        grads, (loss, terms, stats) = jax.grad(objective, has_aux=True)(state['trainable'])
    if axis_name:
        # Every device has computed the loss of the whole batch, with the gradient of its own rows
        # times the number of devices: their mean is the gradient.
        grads = jax.lax.pmean(grads, axis_name)
    grads = jax.tree.map(lambda g: g.astype(jnp.float32) / scale, grads)
    return grads, loss, terms, stats


def _finite(tree: PyTree) -> jax.Array:
    leaves = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]
    return functools.reduce(jnp.logical_and, leaves, jnp.bool_(True))


def train_step(
    state: State,
    batch: Mapping,
    rates: Mapping,
    weights: Mapping,
    *,
    task: Task,
    stage: Stage,
    groups: optim.Groups,
    settings: Settings,
    axis_name: str | None = None,
) -> tuple[State, dict[str, jax.Array]]:
    """Makes one update and returns (new state, scalars to log).

    An update by a loss, a gradient or a batch statistic that is not finite is never made:
    everything but the position stays as it was and `ok` is False. The position always moves, so
    that the order of examples stays a function of it.

    Args:
      axis_name: the mapped axis under `jax.pmap`, where each device has its rows of the batch and
        its own key for dropout; None under `jax.jit`, where arrays are global.
    """
    grads, loss, terms, stats = gradients(
        task,
        state,
        batch,
        weights,
        stage=stage,
        groups=groups,
        settings=settings,
        axis_name=axis_name,
    )
    label = groups.of(state['trainable'])
    norms = {
        name: optim.norm([g for p, g in optim.flatten(grads).items() if label[p] == name])
        for name in sorted(set(label.values()))
    }
    norm = optim.norm(norms)
    frozen_stats = {p: g for p, g in groups.of(stats).items() if not stage.trains(g)}
    flat = optim.flatten(stats)
    before = optim.flatten(state['batch_stats'])
    stats = optim.unflatten({p: before[p] if p in frozen_stats else x for p, x in flat.items()})
    ok = jnp.isfinite(loss) & jnp.isfinite(norm) & _finite(stats)
    updates, opt_state = optim.update(
        grads, state['opt_state'], state['trainable'], rates, stage.optimizer, groups, norm, ok
    )
    keep = lambda new, old: cpu.materialize(jnp.where(ok, new, old))
    trained = optax.apply_updates(state['trainable'], updates)
    trained = jax.tree.map(keep, trained, state['trainable'])
    new = {'batch_stats': stats, 'ema': {}}
    if settings.ema:
        mix = lambda average, weight: settings.ema * average + (1 - settings.ema) * weight
        new['ema'] = jax.tree.map(mix, state['ema'], trained)
    new = jax.tree.map(keep, new, {name: state[name] for name in new})
    new |= {'trainable': trained, 'opt_state': opt_state}
    scale, overflow = _rescale(state['scale'], ok)
    fault = ~ok & ~overflow
    out = {
        **state,
        **new,
        'scale': scale,
        'step': state['step'] + 1,
        'stage_step': state['stage_step'] + 1,
    }
    metrics = {'loss': loss, 'grad_norm': norm, 'ok': ~fault}
    metrics |= {f'grad_norm/{name}': value for name, value in norms.items()}
    metrics |= {'loss_scale': scale['value']} if scale else {}
    for name, term in terms.items():
        if isinstance(term, Term):
            metrics |= {f'loss/{name}': term.mean(), f'count/{name}': term.count}
        else:
            metrics[name] = term
    return out, metrics


def _rescale(scale: Mapping, ok: jax.Array) -> tuple[dict, jax.Array]:
    """Halves float16's loss scale on overflow, doubles it after a streak of good steps.

    Returns (scale, whether the step overflowed): an overflow is part of the method and no fault
    until the scale has fallen to its least value.
    """
    if not scale:
        return {}, jnp.bool_(False)
    value, streak = scale['value'], scale['streak']
    grown = ok & (streak + 1 >= GROWTH_INTERVAL)
    new = jnp.where(ok, jnp.where(grown, value * 2, value), jnp.maximum(value / 2, MIN_SCALE))
    streak = jnp.where(ok & ~grown, streak + 1, 0)
    return {'value': new, 'streak': streak}, ~ok & (value > MIN_SCALE)
