"""The training step: forward by example, losses over the whole batch, a guarded update. Pure."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mmjax.engine import optim
from mmjax.engine.stages import Stage
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

    {step, stage, stage_step: int32; trainable, frozen, batch_stats: trees; moments; ema: averages
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
        'moments': optim.moments(trainable, groups),
        'ema': jax.tree.map(jnp.copy, trainable) if settings.ema else {},
        'scale': {'value': jnp.float32(2.0**15), 'streak': zero()} if scaled else {},
    }


def enter(state: State, stage: Stage, groups: optim.Groups, settings: Settings) -> State:
    """Re-splits the state for the next stage; moments and averages carry where learning goes on."""
    params = optim.join(state['trainable'], state['frozen'])
    trainable, frozen = groups.split(params, stage)
    moments, _ = optim.enter(state['moments'], optim.moments(trainable, groups), groups)
    ema = {}
    if settings.ema:
        before = optim.flatten(state['ema'])
        fresh = optim.flatten(trainable)
        ema = optim.unflatten({path: before.get(path, leaf) for path, leaf in fresh.items()})
    index = jnp.full((), stage.index, jnp.int32)
    return {
        **state,
        'stage': index,
        'stage_step': jnp.zeros((), jnp.int32),
        'trainable': trainable,
        'frozen': frozen,
        'moments': moments,
        'ema': ema,
    }


def variables(state: State, *, averaged: bool = False) -> dict[str, Any]:
    """Returns Linen variables of a state; with `averaged`, the EMA in place of the weights."""
    trainable = state['ema'] if averaged and state['ema'] else state['trainable']
    params = optim.join(trainable, state['frozen'])
    stats = state['batch_stats']
    return {'params': params, 'batch_stats': stats} if stats else {'params': params}


def keys(seed: int, stage: jax.Array, stage_step: jax.Array, batch_size: int):
    """Returns (a key for dropout, a key a row) of one step; both follow from the position."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), stage), stage_step)
    dropout, examples = jax.random.split(key)
    by_row = jax.vmap(functools.partial(jax.random.fold_in, examples))(jnp.arange(batch_size))
    return dropout, by_row


def _to_micro(x: jax.Array, count: int) -> jax.Array:
    # Row r goes to micro-batch r mod M, so that none of them sits on a single device.
    return jnp.swapaxes(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 0, 1)


def _from_micro(x: jax.Array) -> jax.Array:
    x = jnp.swapaxes(x, 0, 1)
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def forward(task, params, batch_stats, batch, stage: Stage, key, count: int):
    """Runs the forward pass in `count` micro-batches; returns (outputs in order, new statistics).

    With more than one, activations are recomputed in the backward pass, except what a task named
    'frozen' by `checkpoint_name`: outputs of towers that do not learn are kept.
    """

    def apply(params, stats, rows, key):
        values = {'params': params, 'batch_stats': stats} if stats else {'params': params}
        return task.forward(values, rows, stage, train=True, key=key)

    if count == 1:
        return apply(params, batch_stats, batch, key)
    saved = jax.checkpoint_policies.save_only_these_names('frozen')
    apply = jax.checkpoint(apply, policy=saved, prevent_cse=False)

    def body(stats, item):
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
        known = ', '.join(name for name, term in terms.items() if isinstance(term, Term))
        raise ValueError(f"loss_weights names '{missing[0]}'; this task's losses are {known}")
    return sum(weight * terms[name].mean() for name, weight in weights.items())


def gradients(task, state: State, batch, weights, *, stage: Stage, settings: Settings):
    """Returns (gradients of the trainable tree, loss, terms, new batch statistics)."""
    dropout, by_row = keys(
        settings.seed, state['stage'], state['stage_step'], batch['row'].shape[0]
    )
    batch = {**batch, 'key': by_row}
    scale = state['scale'].get('value', jnp.float32(1.0))

    def objective(trainable):
        params = optim.join(trainable, state['frozen'])
        outputs, stats = forward(
            task, params, state['batch_stats'], batch, stage, dropout, settings.accumulation
        )
        values = {'params': params, 'batch_stats': stats} if stats else {'params': params}
        terms = task.terms(values, outputs, batch, stage)
        loss = total(terms, weights)
        return loss * scale, (loss, terms, stats)

    grads, (loss, terms, stats) = jax.grad(objective, has_aux=True)(state['trainable'])
    grads = jax.tree.map(lambda g: g.astype(jnp.float32) / scale, grads)
    return grads, loss, terms, stats


def _finite(tree) -> jax.Array:
    leaves = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]
    return functools.reduce(jnp.logical_and, leaves, jnp.bool_(True))


def train_step(
    state: State,
    batch: Mapping,
    rates: Mapping,
    weights: Mapping,
    *,
    task,
    stage: Stage,
    groups: optim.Groups,
    settings: Settings,
) -> tuple[State, dict[str, jax.Array]]:
    """Makes one update and returns (new state, scalars to log).

    A loss, gradient, weight or batch statistic that is not finite is never accepted: everything
    but the position stays as it was and `ok` is False. The position always moves, so that the
    order of examples stays a function of it. New weights are not looked at but bounded from what
    they are made of (`optim.reach`): so they need not wait for a verdict on themselves, and are
    written once.
    """
    grads, loss, terms, stats = gradients(
        task, state, batch, weights, stage=stage, settings=settings
    )
    label = groups.of(state['trainable'])
    norms = {
        name: optim.norm([g for p, g in optim.flatten(grads).items() if label[p] == name])
        for name in sorted(set(label.values()))
    }
    norm = optim.norm(norms)
    reach = optim.reach(optim.norm(state['trainable']), rates, stage)
    frozen_stats = {p: g for p, g in groups.of(stats).items() if not stage.trains(g)}
    flat, before = optim.flatten(stats), optim.flatten(state['batch_stats'])
    stats = optim.unflatten({p: before[p] if p in frozen_stats else x for p, x in flat.items()})
    ok = jnp.isfinite(loss) & jnp.isfinite(norm) & jnp.isfinite(reach) & _finite(stats)
    updates, moments = optim.update(
        grads, state['moments'], state['trainable'], rates, stage, groups, norm, ok
    )
    keep = lambda new, old: optim.stored(jnp.where(ok, new, old))
    trained = optax.apply_updates(state['trainable'], updates)
    trained = jax.tree.map(keep, trained, state['trainable'])
    new = {'batch_stats': stats, 'ema': {}}
    if settings.ema:
        mix = lambda average, weight: settings.ema * average + (1 - settings.ema) * weight
        new['ema'] = jax.tree.map(mix, state['ema'], trained)
    new = jax.tree.map(keep, new, {name: state[name] for name in new})
    new |= {'trainable': trained, 'moments': moments}
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
