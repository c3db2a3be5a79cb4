"""Groups, schedules against optax, Adam against optax, frozen leaves, entering a stage."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mmjax.engine import optim
from mmjax.engine.config import OPTIMIZERS, Optimizer
from mmjax.engine.stages import Stage
from mmjax.errors import UserError


def stage(rates=(), steps=100, **spec):
    spec = {'learning_rate': 1e-2, 'schedule': 'constant', **spec}
    return Stage(
        's',
        tuple(rates),
        (('l', 1.0),),
        Optimizer(**spec),
        steps=steps,
        run_steps=steps,
        steps_per_epoch=10,
    )


def params(seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    return {
        'tower': {
            'block_0': {'kernel': draw(4, 3), 'bias': draw(3)},
            'block_1': {'kernel': draw(3, 3), 'bias': draw(3)},
            'norm': {'scale': draw(3)},
        },
        'head': {'kernel': draw(3, 2), 'bias': draw(2)},
    }


RULES = (('last', 'tower/block_1/.*'), ('tower', 'tower/.*'), ('head', 'head/.*'))


def groups():
    return optim.resolve(params(), {}, (), RULES)


def update(this, grads, moments, weights, ok=True):
    rates = optim.rates(this, groups().names, 0)
    norm = optim.norm(grads)
    spec = this.optimizer
    return optim.update(grads, moments, weights, rates, spec, groups(), norm, jnp.bool_(ok))


def test_first_matching_rule_wins_and_config_rules_come_first():
    found = dict(groups().items)
    assert found['tower/block_1/kernel'] == 'last' and found['tower/block_0/kernel'] == 'tower'
    mine = optim.resolve(params(), {}, (('norms', r'.*/scale'),), RULES)
    assert dict(mine.items)['tower/norm/scale'] == 'norms'


@pytest.mark.parametrize(
    ('rules', 'defaults', 'message'),
    [
        ((), RULES[:2], 'no rule gives a group to head/kernel, head/bias'),
        ((('x', 'nothing/.*'),), RULES, r"rule \('x', 'nothing/.\*'\) matches no parameter"),
        ((('a', 'head/.*'), ('x', 'head/bias')), RULES, "'head/bias'.*comes after rules that took"),
        ((('x', '('),), RULES, 'is no regular expression'),
        ((('x', 'tower'),), RULES, 'matches no parameter'),  # a full match, not a prefix
    ],
)
def test_dead_rules_and_leaves_without_a_rule_are_errors(rules, defaults, message):
    with pytest.raises(UserError, match=message):
        optim.resolve(params(), {}, rules, defaults)


def test_rules_cover_batch_statistics():
    found = optim.resolve(params(), {'tower': {'bn': {'mean': jnp.zeros(3)}}}, (), RULES)
    assert dict(found.items)['tower/bn/mean'] == 'tower'


def test_stage_that_names_an_unknown_group_or_freezes_all_is_an_error():
    with pytest.raises(UserError, match="names group 'towr'"):
        optim.check_groups(groups(), [stage([('towr', 0.0)])])
    with pytest.raises(UserError, match='freezes every group'):
        optim.check_groups(groups(), [stage([('tower', 0.0), ('head', 0.0), ('last', 0.0)])])


def test_split_and_join_are_inverse():
    first = stage([('tower', 0.0), ('last', 0.0)])
    trainable, frozen = groups().split(params(), first)
    assert set(optim.flatten(trainable)) == {'head/kernel', 'head/bias'}
    jax.tree.map(np.testing.assert_array_equal, optim.join(trainable, frozen), params())


def test_table_names_path_shape_count_group_and_rate():
    text = optim.table(params(), groups(), stage([('tower', 0.0), ('last', 0.01)]))
    assert 'tower/block_0/kernel' in text and '(4, 3)' in text and 'frozen' in text
    assert '0.0001' in next(line for line in text.splitlines() if 'block_1/kernel' in line)


N, W = 200, 20
ORACLES = {
    'constant': (dict(schedule='constant'), optax.constant_schedule(1.0)),
    'linear': (dict(schedule='linear', end=0.1), optax.linear_schedule(1.0, 0.1, N)),
    'cosine': (dict(schedule='cosine', end=0.1), optax.cosine_decay_schedule(1.0, N, 0.1)),
    'warm-up and cosine': (
        dict(schedule='cosine', warmup_steps=W, warmup_init=0.1),
        optax.warmup_cosine_decay_schedule(0.1, 1.0, W, N, 0.0),
    ),
    'warm-up and linear, in epochs': (
        dict(schedule='linear', warmup_epochs=2.0),
        optax.join_schedules(
            [optax.linear_schedule(0.0, 1.0, W), optax.linear_schedule(1.0, 0.0, N - W)], [W]
        ),
    ),
    'warm-up and constant, a fraction': (
        dict(schedule='constant', warmup_fraction=0.1),
        optax.linear_schedule(0.0, 1.0, W),
    ),
    'cosine with restarts': (
        dict(schedule='cosine_restarts', period_steps=30, period_factor=2.0),
        optax.join_schedules(
            [optax.cosine_decay_schedule(1.0, 30 * 2**i) for i in range(3)], [30, 90]
        ),
    ),
}


@pytest.mark.parametrize('name', ORACLES)
def test_schedules_equal_optax(name):
    spec, oracle = ORACLES[name]
    spec = Optimizer(learning_rate=1.0, **spec)
    ours = [optim.schedule(spec, t, N, 10) for t in range(N)]
    np.testing.assert_allclose(ours, [float(oracle(t)) for t in range(N)], atol=2e-6)


@pytest.mark.parametrize('schedule', ['linear', 'cosine'])
def test_decay_ends_exactly_on_its_end(schedule):
    assert (
        optim.schedule(Optimizer(learning_rate=1.0, schedule=schedule, warmup_steps=W), N, N) == 0.0
    )


def test_a_schedule_over_the_run_reads_the_planned_start():
    spec = Optimizer(learning_rate=1.0, schedule='linear', span='run')
    late = Stage('b', (), (('l', 1.0),), spec, (), start=60, steps=40, run_steps=100)
    assert optim.rates(late, ('g',), 10)['g'] == np.float32(1 - 0.7)


def test_groups_that_never_learn_and_warm_ups_that_never_end_are_told():
    def made(name, start, steps, rates=(), **options):
        spec = Optimizer(learning_rate=1e-3, **options)
        return Stage(name, rates, (), spec, start=start, steps=steps, run_steps=40)

    known = groups()
    frozen = tuple((name, 0.0) for name in known.names)
    some = [made('one', 0, 10, frozen, warmup_steps=9), made('two', 10, 10, frozen[1:])]
    assert optim.warnings(known, some) == [
        f"no stage trains group '{name}': it stays as it is made or loaded"
        for name in known.names[1:]
    ]
    late = [
        made('two', 10, 20, warmup_fraction=1.0),
        made('three', 0, 10, warmup_steps=10, span='run'),
        made('four', 30, 5, warmup_steps=50, span='run'),
    ]
    stage, run = optim.warnings(known, late)
    assert stage.startswith('stage.two warms up for 20 updates and makes 20 of them')
    assert run.startswith('the run warms up for 50 updates and makes 35 of them')
    assert optim.warnings(known, [*late[1:2], made('five', 10, 20, span='run')]) == []


def test_updates_equal_optax_adamw_with_a_rate_and_decay_a_group():
    rates, wd = {'tower': 1e-3, 'last': 1e-4, 'head': 1e-2}, 0.1
    ours = theirs = params()
    this = stage([('tower', 0.1), ('last', 0.01)], weight_decay=wd, clip=0.5)
    label = optim.unflatten(groups().of(ours))
    mask = lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree)
    oracle = optax.chain(
        optax.clip_by_global_norm(0.5),
        optax.multi_transform(
            {k: optax.adamw(v, weight_decay=wd, mask=mask) for k, v in rates.items()}, label
        ),
    )
    state = oracle.init(theirs)
    moments = optim.init(ours, groups(), this.optimizer)
    for seed in range(5):
        grads = params(seed + 1)
        updates, state = oracle.update(grads, state, theirs)
        theirs = optax.apply_updates(theirs, updates)
        updates, moments = update(this, grads, moments, ours)
        ours = optax.apply_updates(ours, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5), ours, theirs)


def test_norm_is_that_of_all_leaves_together():
    tree = {**params(), 'scale': jnp.float32(3.0), 'cube': jnp.ones((2, 3, 4))}
    numbers = np.concatenate([np.float64(x).ravel() for x in jax.tree.leaves(tree)])
    np.testing.assert_allclose(jax.jit(optim.norm)(tree), np.linalg.norm(numbers), rtol=1e-6)
    assert optim.norm({}) == 0
    assert not np.isfinite(optim.norm({**tree, 'bad': jnp.array([[jnp.nan]])}))


@pytest.mark.parametrize('name', OPTIMIZERS)
@pytest.mark.parametrize(('key', 'value'), [('b1', 0.9999), ('b2', 0.5), ('eps', 1e-3)])
def test_a_key_that_changes_no_update_is_refused(name, key, value):
    """Updates tell which keys an optimizer uses; of the others only the default is accepted."""

    def updates(**spec):
        this = stage(name=name, **spec)
        weights = params()
        state = optim.init(weights, groups(), this.optimizer)
        for seed in (1, 2):
            out, state = update(this, params(seed), state, weights)
        return jax.tree.leaves(out)

    used = any((a != b).any() for a, b in zip(updates(), updates(**{key: value}), strict=True))
    spec = Optimizer(name=name, **{key: value})
    if used:
        spec.check('optimizer')
    else:
        default = getattr(Optimizer, key)
        message = (
            rf"^optimizer\.{key}={value} has no effect with optimizer\.name='{name}': only adam"
            rf'.*; set it to {default}$'
        )
        with pytest.raises(UserError, match=message):
            spec.check('optimizer')
    Optimizer(name=name).check('optimizer')


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_every_rule_follows_optax_group_by_group(name):
    """With clip and decay off; muon on matrices, Adam elsewhere."""
    this = stage([('tower', 0.5)], name=name, clip=0.0)
    dimensions = lambda tree: jax.tree.map(
        lambda x: None if x is None else optax.contrib.MuonDimensionNumbers(),
        tree,
    )
    muon = optax.contrib.scale_by_muon(beta=0.9, weight_dimension_numbers=dimensions)
    oracles = {
        'adamw': lambda: optax.scale_by_adam(),
        'lion': lambda: optax.scale_by_lion(0.9, 0.999),
        'sgd': lambda: optax.trace(0.9),
        'adafactor': lambda: optax.chain(
            optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)
        ),
        'muon': lambda: optax.multi_transform(
            {'muon': muon, 'adam': optax.scale_by_adam()},
            lambda tree: jax.tree.map(lambda x: 'muon' if x.ndim == 2 else 'adam', tree),
        ),
    }
    rates = {'tower': 5e-3, 'last': 1e-2, 'head': 1e-2}
    label = optim.unflatten(groups().of(params()))
    oracle = optax.multi_transform(
        {
            group: optax.chain(oracles[name](), optax.scale_by_learning_rate(rate))
            for group, rate in rates.items()
        },
        label,
    )
    ours = theirs = params()
    state = oracle.init(theirs)
    moments = optim.init(ours, groups(), this.optimizer)
    for seed in range(4):
        grads = params(seed + 1)
        updates, state = oracle.update(grads, state, theirs)
        theirs = optax.apply_updates(theirs, updates)
        updates, moments = update(this, grads, moments, ours)
        ours = optax.apply_updates(ours, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), ours, theirs)


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_moments_of_every_rule_are_carried_for_groups_that_keep_learning(name):
    first = stage([('tower', 0.0), ('last', 0.0)], name=name)
    trainable, _ = groups().split(params(), first)
    moments = optim.init(trainable, groups(), first.optimizer)
    grads, _ = groups().split(params(1), first)
    _, moments = update(first, grads, moments, trainable)
    fresh = optim.init(params(), groups(), first.optimizer)
    entered = optim.carry(moments, fresh)
    assert set(entered) == {'tower', 'last', 'head'}
    jax.tree.map(np.testing.assert_array_equal, entered['head'], moments['head'])
    jax.tree.map(np.testing.assert_array_equal, entered['tower'], fresh['tower'])
    assert any(x.any() for x in jax.tree.leaves(entered['head']))
    other = optim.init(params(), groups(), Optimizer(name='sgd' if name != 'sgd' else 'lion'))
    jax.tree.map(np.testing.assert_array_equal, optim.carry(moments, other), other)


def test_moments_stay_where_a_step_is_not_ok():
    this = stage([('tower', 0.1), ('last', 0.01)])
    moments = optim.init(params(), groups(), this.optimizer)
    run = jax.jit(lambda grads, moments, ok: update(this, grads, moments, params(), ok)[1])
    first = run(params(1), moments, True)
    head = first['head']
    assert int(head['count']) == 1 and np.abs(head['mu']['head']['kernel']).max() > 0
    bad = jax.tree.map(lambda x: x * jnp.nan, params(2))
    jax.tree.map(np.testing.assert_array_equal, run(bad, first, False), first)


def test_batch_statistics_belong_to_the_group_of_their_module():
    params = {'tower': {'norm': {'scale': jnp.zeros(3)}}, 'head': {'kernel': jnp.zeros((3, 2))}}
    stats = {'tower': {'norm': {'mean': jnp.zeros(3)}}}
    rules = (('frozen', 'tower/.*scale'),)
    made = optim.resolve(params, stats, rules, (('all', '.*'),))
    assert dict(made.items)['tower/norm/mean'] == 'frozen'


def test_decay_skips_biases_norms_and_scalars():
    found = optim.flatten(optim.decays(params()))
    assert {path for path, yes in found.items() if not yes} == {
        'tower/block_0/bias',
        'tower/block_1/bias',
        'tower/norm/scale',
        'head/bias',
    }


def test_moments_are_carried_and_a_group_that_enters_starts_at_count_zero():
    """The original lost the moments when the optimizer was rebuilt at a stage."""
    first = stage([('tower', 0.0), ('last', 0.0)])
    second = stage([('tower', 1.0), ('last', 0.0)], clip=0.0)
    trainable, _ = groups().split(params(), first)
    moments = optim.init(trainable, groups(), first.optimizer)
    for seed in range(50):
        grads, _ = groups().split(params(seed), first)
        _, moments = update(first, grads, moments, trainable)
    trainable, _ = groups().split(params(), second)
    entered = optim.carry(moments, optim.init(trainable, groups(), second.optimizer))
    assert int(entered['head']['count']) == 50
    jax.tree.map(np.testing.assert_array_equal, entered['head'], moments['head'])
    assert int(entered['tower']['count']) == 0 and 'last' not in entered
    grads, _ = groups().split(params(9), second)
    updates, _ = update(second, grads, entered, trainable)
    np.testing.assert_allclose(np.abs(updates['tower']['block_0']['kernel']), 1e-2, rtol=1e-4)
