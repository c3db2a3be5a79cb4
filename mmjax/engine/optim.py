"""Parameter groups, learning-rate schedules, and an optimizer that can enter a new stage."""

import collections
import dataclasses
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from flax import traverse_util
from jaxtyping import PyTree

from mmjax import cpu
from mmjax.engine.config import Optimizer
from mmjax.engine.stages import Stage
from mmjax.errors import UserError

Tree = Mapping[str, Any]  # nested dicts of arrays
Transformation: TypeAlias = optax.GradientTransformationExtraArgs


def flatten(tree: Tree) -> dict[str, Any]:
    """Returns {'a/b/kernel': leaf}; empty sub-trees vanish."""
    return traverse_util.flatten_dict(dict(tree), sep='/')


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    return traverse_util.unflatten_dict(dict(flat), sep='/')


# Rules → groups ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Groups:
    """The group of every parameter and batch statistic, by path. Hashable."""

    items: tuple[tuple[str, str], ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted({group for _, group in self.items}))

    def of(self, tree: Tree) -> dict[str, str]:
        """Returns {path: group} for the leaves of `tree`."""
        known = dict(self.items)
        return {path: known[path] for path in flatten(tree)}

    def split(self, tree: Tree, stage: Stage) -> tuple[dict, dict]:
        """Splits a tree of parameters to (trainable, frozen) in `stage`; either may be {}."""
        flat, group = flatten(tree), dict(self.items)
        trains = {path: stage.trains(group[path]) for path in flat}
        part = lambda which: unflatten({p: v for p, v in flat.items() if trains[p] == which})
        return part(True), part(False)


def join(*trees: Tree) -> dict:
    """Puts split trees together again."""
    flat = {}
    for tree in trees:
        flat.update(flatten(tree))
    return unflatten(flat)


def resolve(
    params: Tree,
    batch_stats: Tree,
    rules: Sequence[tuple[str, str]],
    defaults: Sequence[tuple[str, str]],
) -> Groups:
    """Assigns each leaf the group of the first (group, regex) rule that fully matches its path.

    `rules` come from the config and stand before the task's `defaults`. A leaf that no rule
    matches, a rule that matches no leaf, and a config rule whose leaves were all taken by
    earlier ones are errors.
    """
    compiled = []
    for group, regex in (*rules, *defaults):
        try:
            compiled.append((group, re.compile(regex)))
        except re.error as error:
            raise UserError(f"config.rules: '{regex}' is no regular expression: {error}") from None
    stats = flatten(batch_stats)
    hits = {
        path: [i for i, (_, regex) in enumerate(compiled) if regex.fullmatch(path)]
        for path in dict.fromkeys((*flatten(params), *stats))
    }
    matched = set(itertools.chain(*hits.values()))
    first = {found[0] for found in hits.values() if found}
    for i, (group, pattern) in enumerate(compiled):
        if i not in matched or (i < len(rules) and i not in first):
            why = 'comes after rules that took all' if i in matched else 'matches no parameter'
            raise UserError(f"rule ('{group}', '{pattern.pattern}') {why}")
    missing = [path for path, found in hits.items() if not found]
    if missing:
        more = f' and {len(missing) - 5} more' if len(missing) > 5 else ''
        raise UserError(f'no rule gives a group to {", ".join(missing[:5])}{more}')
    label = {path: compiled[found[0]][0] for path, found in hits.items()}
    module = lambda path: path.rpartition('/')[0]
    of_module = {module(path): label[path] for path in label if path not in stats}
    # Batch statistics belong to the group of their module's parameters.
    label |= {path: of_module.get(module(path), label[path]) for path in stats}
    return Groups(tuple(label.items()))


def check_groups(groups: Groups, stages: Sequence[Stage]) -> None:
    """Raises where a stage names a group that no rule makes, or trains nothing."""
    for stage in stages:
        for group, _ in stage.learning_rates:
            if group not in groups.names:
                raise UserError(
                    f"stage.{stage.name}.learning_rates names group '{group}'; "
                    f'the rules make {", ".join(groups.names)}'
                )
        if not any(stage.trains(group) for group in groups.names):
            raise UserError(f'stage.{stage.name} freezes every group: nothing would learn')


def warnings(groups: Groups, stages: Sequence[Stage]) -> list[str]:
    """Returns sentences on groups that no stage trains and warm-ups that never end."""
    out = [
        f"no stage trains group '{name}': it stays as it is made or loaded"
        for name in groups.names
        if not any(stage.trains(name) for stage in stages)
    ]
    last = max((s.start + s.steps for s in stages if s.optimizer.span == 'run'), default=0)
    late = {}
    for stage in stages:
        run = stage.optimizer.span == 'run'
        total, reached = (stage.run_steps, last) if run else (stage.steps, stage.steps)
        warmup = _steps(stage.optimizer, 'warmup', total, stage.steps_per_epoch)
        if warmup and warmup >= reached:
            name = 'the run' if run else f'stage.{stage.name}'
            late[name] = (
                f'{name} warms up for {warmup:g} updates and makes {reached} of them: '
                'the full rate is never reached'
            )
    return out + list(late.values())


def summary(params: Tree, groups: Groups, stage: Stage) -> list[dict[str, Any]]:
    """Returns a row per group: group, parameters, tensors, rate (absolute, 0 when frozen)."""
    label = groups.of(params)
    rows: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
    for path, leaf in flatten(params).items():
        rows[label[path]][0] += math.prod(leaf.shape)
        rows[label[path]][1] += 1
    return [
        dict(
            group=group,
            parameters=count,
            tensors=tensors,
            rate=stage.rate(group) * stage.optimizer.learning_rate,
        )
        for group, (count, tensors) in sorted(rows.items())
    ]


def table(params: Tree, groups: Groups, stage: Stage) -> str:
    """Returns the resolved table as text: path, shape, count, group, rate.

    Leaves that differ only in a number in their path (the blocks of a tower) share a line.
    """
    label = groups.of(params)
    lines: dict[tuple, list[str]] = collections.defaultdict(list)
    for path, leaf in flatten(params).items():
        lines[re.sub(r'_\d+', '_#', path), tuple(leaf.shape), label[path]].append(path)
    rows = [('parameter', 'shape', 'count', 'group', 'rate')]
    for (pattern, shape, group), paths in lines.items():
        name = paths[0] if len(paths) == 1 else f'{pattern} ×{len(paths)}'
        rate = stage.rate(group) * stage.optimizer.learning_rate
        count = len(paths) * math.prod(shape)
        rows.append((name, str(shape), f'{count:,}', group, f'{rate:g}' if rate else 'frozen'))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    return '\n'.join(
        '  '.join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows
    )


# Schedules -----------------------------------------------------------------------------------


def _steps(spec: Optimizer, name: str, total: int, per_epoch: int) -> float:
    steps = getattr(spec, f'{name}_steps')
    epochs = getattr(spec, f'{name}_epochs')
    fraction = getattr(spec, f'{name}_fraction', 0.0)
    return steps or epochs * per_epoch or fraction * total


def schedule(spec: Optimizer, step: int, total: int, per_epoch: int = 1) -> float:
    """Returns the multiple of the base rate for the update made after `step` of `total` updates.

    The warm-up rises linearly from `warmup_init` to 1; the schedule follows over what remains
    and is at `end` exactly when step = total (`linear`, `cosine`). Computed in float64 on the
    host and handed to the step as an argument, so that no counter is kept or rebuilt.
    """
    warmup = _steps(spec, 'warmup', total, per_epoch)
    if step < warmup:
        return spec.warmup_init + (1 - spec.warmup_init) * step / warmup
    t, length = step - warmup, max(total - warmup, 1e-9)
    x = min(t / length, 1.0)
    if spec.schedule == 'constant':
        return 1.0
    if spec.schedule == 'linear':
        return 1 - (1 - spec.end) * x
    if spec.schedule == 'cosine':
        return spec.end + (1 - spec.end) * _half_cosine(x)
    period = max(_steps(spec, 'period', total, per_epoch), 1.0)
    while t >= period:  # cosine with restarts (Loshchilov & Hutter 2017)
        t, period = t - period, period * spec.period_factor
    return spec.end + (1 - spec.end) * _half_cosine(t / period)


def _half_cosine(x: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * x)) if x < 1 else 0.0


def rates(stage: Stage, groups: Sequence[str], step: int) -> dict[str, np.float32]:
    """Returns the learning rate of every trained group at `step` updates into the stage."""
    spec = stage.optimizer
    at = step
    total = stage.steps
    if spec.span == 'run':
        at = stage.start + step
        total = stage.run_steps
    base = spec.learning_rate * schedule(spec, at, total, stage.steps_per_epoch)
    return {group: np.float32(base * stage.rate(group)) for group in groups if stage.trains(group)}


# Updates -------------------------------------------------------------------------------------


def _adam(spec: Optimizer) -> Transformation:
    """Adam (Kingma & Ba 2015), as `optax.scale_by_adam`, with moments that are written once."""

    def init(params: Tree) -> Tree:
        zeros = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), dict(params))
        return {'count': jnp.zeros((), jnp.int32), 'mu': zeros(), 'nu': zeros()}

    def update(gradients: Tree, state: Tree, params: Tree, *, ok: jax.Array) -> tuple[Tree, Tree]:
        del params
        new = {
            'count': state['count'] + 1,
            'mu': optax.tree.update_moment(gradients, state['mu'], spec.b1, 1),
            'nu': optax.tree.update_moment(gradients, state['nu'], spec.b2, 2),
        }
        state = jax.tree.map(lambda new, old: cpu.materialize(jnp.where(ok, new, old)), new, state)
        count = state['count'].astype(jnp.float32)
        first = 1 - spec.b1**count
        second = 1 - spec.b2**count
        direction = jax.tree.map(
            lambda m, v: (m / first) / (jnp.sqrt(v / second) + spec.eps), state['mu'], state['nu']
        )
        return direction, state

    return Transformation(init, update)


def _from_optax(transformation: optax.GradientTransformation) -> Transformation:
    """Wraps a transformation of optax; the new state has its leaves, by number."""

    def numbered(state: PyTree) -> Tree:
        return {f'{i:04d}': jnp.asarray(x) for i, x in enumerate(jax.tree.leaves(state))}

    def init(params: Tree) -> Tree:
        return numbered(transformation.init(params))

    def update(gradients: Tree, state: Tree, params: Tree, *, ok: jax.Array) -> tuple[Tree, Tree]:
        structure = jax.tree.structure(jax.eval_shape(transformation.init, params))
        before = jax.tree.unflatten(structure, [state[name] for name in sorted(state)])
        direction, after = transformation.update(gradients, before, params)
        keep = lambda new, old: jnp.where(ok, new, old)
        return direction, jax.tree.map(keep, numbered(after), dict(state))

    return Transformation(init, update)


def _muon(spec: Optimizer) -> Transformation:
    """Muon (Jordan 2024) on matrices, Adam on everything else."""
    plain = lambda tree: jax.tree.map(lambda x: optax.contrib.MuonDimensionNumbers(), tree)
    muon = optax.contrib.scale_by_muon(beta=spec.b1, weight_dimension_numbers=plain)
    matrices = _from_optax(muon)
    others = _adam(spec)

    part = lambda tree, rank_2: unflatten(
        {path: x for path, x in flatten(tree).items() if (x.ndim == 2) == rank_2}
    )

    def init(params: Tree) -> Tree:
        return {'muon': matrices.init(part(params, True)), 'adam': others.init(part(params, False))}

    def update(gradients: Tree, state: Tree, params: Tree, *, ok: jax.Array) -> tuple[Tree, Tree]:
        one, muon = matrices.update(part(gradients, True), state['muon'], part(params, True), ok=ok)
        two, adam = others.update(part(gradients, False), state['adam'], part(params, False), ok=ok)
        return join(one, two), {'muon': muon, 'adam': adam}

    return Transformation(init, update)


def transformation(spec: Optimizer) -> Transformation:
    """Returns the update rule that `optimizer.name` names, over the leaves of one group.

    It has no learning rate and no weight decay. Its `update(gradients, state, params, ok=ok)`
    returns the old state where `ok` is False.
    """
    if spec.name == 'adamw':
        return _adam(spec)
    if spec.name == 'lion':  # Chen et al. 2023
        return _from_optax(optax.scale_by_lion(spec.b1, spec.b2))
    if spec.name == 'sgd':
        return _from_optax(optax.trace(spec.b1))
    if spec.name == 'adafactor':  # Shazeer & Stern 2018
        parts = optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)
        return _from_optax(optax.chain(*parts))
    return _muon(spec)


def init(trainable: Tree, groups: Groups, spec: Optimizer) -> dict[str, Any]:
    """Returns a fresh optimizer state, {group: its moments and count}.

    The state belongs to the group, not to the run: one that thaws late starts at 0, so
    that its bias correction is right and its first update equals its rate.
    """
    make = transformation(spec)
    return {name: make.init(tree) for name, tree in by_group(trainable, groups).items()}


def by_group(tree: Tree, groups: Groups) -> dict[str, dict]:
    """Returns {group: its part of the tree}, for the groups that the tree has leaves of."""
    parts: dict[str, dict[str, Any]] = collections.defaultdict(dict)
    label = groups.of(tree)
    for path, leaf in flatten(tree).items():
        parts[label[path]][path] = leaf
    return {name: unflatten(parts[name]) for name in sorted(parts)}


def carry(old: Tree, fresh: Tree) -> dict:
    """Carries the optimizer state of the groups that keep learning into the next stage.

    Args:
      old: the optimizer state at the end of a stage.
      fresh: a new one for the next stage.

    Returns:
      `fresh`, with the old state of the groups that have one of the same update rule.
    """
    shapes = lambda tree: jax.tree.map(jnp.shape, dict(tree))
    same = lambda name: name in old and shapes(old[name]) == shapes(fresh[name])
    return {name: old[name] if same(name) else fresh[name] for name in fresh}


def norm(tree: PyTree) -> jax.Array:
    """Returns the Euclidean norm of all leaves together; float32 scalar, 0 of none.

    Summed row by row first: left to itself XLA:CPU may sum the squares of a large matrix in windows
    on one core. Where the last axis is sharded, a number per row crosses devices instead of one.
    """
    squares = [jnp.square(jnp.asarray(x, jnp.float32)) for x in jax.tree.leaves(tree)]
    rows = [x.sum(-1) if x.ndim else x for x in squares]
    rows = jax.lax.optimization_barrier(rows)
    return jnp.sqrt(sum((x.sum() for x in rows), jnp.float32(0)))


def decays(params: Tree) -> dict:
    """Returns a tree of bools: True where weight decay acts (not on biases, norms, scalars)."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x.ndim > 1 and path[-1].key not in ('bias', 'scale'), params
    )


def update(
    gradients: Tree,
    opt_state: Tree,
    trainable: Tree,
    rates: Mapping[str, Any],
    spec: Optimizer,
    groups: Groups,
    grad_norm: jax.Array,
    ok: jax.Array,
) -> tuple[Tree, Tree]:
    """Clips by the global norm, applies the update rule, then decay and rate of each group.

    Args:
      gradients, trainable: trees of the parameters that learn.
      opt_state: see `init`.
      rates: group → learning rate.
      grad_norm: the `norm` of the gradients.
      ok: bool scalar; where False, `opt_state` stays, and the updates are not to be used: they may
        be NaN.

    Returns:
      (updates to add to `trainable`, new optimizer state).
    """
    if spec.clip > 0:
        factor = jnp.where(grad_norm < spec.clip, 1.0, spec.clip / grad_norm)
        gradients = jax.tree.map(lambda g: g * factor, gradients)
    make = transformation(spec)
    grads, params = by_group(gradients, groups), by_group(trainable, groups)
    pairs = {name: make.update(grads[name], opt_state[name], params[name], ok=ok) for name in grads}
    direction = join(*(pair[0] for pair in pairs.values()))
    scale = optax.multi_transform(
        {
            name: optax.chain(
                optax.add_decayed_weights(spec.weight_decay, mask=decays),
                optax.scale_by_learning_rate(rates[name]),
            )
            for name in pairs
        },
        unflatten(groups.of(trainable)),
    )
    updates, _ = scale.update(direction, scale.init(trainable), trainable)
    return updates, {name: pair[1] for name, pair in pairs.items()}
