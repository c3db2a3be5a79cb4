"""ContraBin's heads, interpolations and model: formulas, identities, padding, what learns."""

import functools
import math

import chex
import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.models.bert import Bert
from mmjax.recipes.contrabin import model as contrabin
from tests.models.test_models import _random

B, D, W = 4, 6, 16  # batch, features, width of the binary encoder
erf = np.vectorize(math.erf)


def _model(**fields):
    sizes = {'depth': 1, 'heads': 2, 'mlp_width': 20, 'dropout': 0.5}
    return contrabin.ContraBin(
        **{
            'anchor': Bert(vocabulary=40, width=12, max_length=8, **sizes),
            'binary': Bert(vocabulary=25, width=W, max_length=16, position_offset=2, **sizes),
            'features': D,
            'dropout': 0.5,
            **fields,
        }
    )


def _inputs(seed=0):
    """Source, comment and binary, each tokens and mask, of three lengths and two vocabularies."""
    rng, inputs = np.random.default_rng(seed), []
    for length, vocabulary in ((8, 40), (5, 40), (14, 25)):
        mask = np.arange(length) < rng.integers(2, length + 1, (B, 1))
        inputs += [rng.integers(1, vocabulary, (B, length)), mask]
    return inputs


@functools.cache
def _variables(model):
    """Every leaf random and small, so that no zero or one at the start hides a term."""
    variables = _random(model.init, *_inputs())
    return jax.tree.map(lambda x: (x - 0.35) * 2, variables)


@functools.cache
def _jitted():
    return jax.jit(lambda variables, inputs: _model().apply(variables, *inputs))


def _apply(inputs):
    return jax.tree.map(np.asarray, _jitted()(_variables(_model()), inputs))


# ---------------------------------------------------------------- formulas


def _dense(params, x):
    return x @ np.float64(params['kernel']) + np.float64(params['bias'])


def _project(params, x, layers):
    y = projected = _dense(params['project'], x)
    for index in range(layers):
        y = _dense(params[f'hidden_{index}'], 0.5 * y * (1 + erf(y / math.sqrt(2))))
    y = y + projected
    y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-5)
    return y * np.float64(params['norm']['scale']) + np.float64(params['norm']['bias'])


@pytest.mark.parametrize(('kind', 'layers'), [('linear', 1), ('nonlinear', 2)])
@pytest.mark.parametrize('wrap', [jax.jit, lambda function: function], ids=['jit', 'eager'])
def test_projection_and_weight_match_their_formulas(kind, layers, wrap):
    rng = np.random.default_rng(0)
    x, a, b = rng.normal(size=(B, 9)), *rng.normal(size=(2, B, D))
    head = contrabin.Projection(D, kind)
    variables = _random(head.init, x, train=False)
    assert len(variables['params']) == layers + 2
    found = wrap(functools.partial(head.apply, train=False))(variables, jnp.float32(x))
    chex.assert_shape(found, (B, D))
    np.testing.assert_allclose(found, _project(variables['params'], x, layers), atol=2e-5)

    simplex = contrabin.Simplex(kind)
    variables = _random(simplex.init, a, b, train=False)
    apply = wrap(functools.partial(simplex.apply, train=False))
    weight = apply(variables, jnp.float32(a), jnp.float32(b))
    chex.assert_shape(weight, (B, 1) if kind == 'linear' else (B, D))
    params = variables['params']
    logits = _dense(params['gate'], _project(params['head'], a + b, layers))
    np.testing.assert_allclose(weight, 1 / (1 + np.exp(-logits)), rtol=2e-5)


@pytest.mark.parametrize('wrap', [jax.jit, lambda function: function], ids=['jit', 'eager'])
@pytest.mark.parametrize('columns', [1, D])
def test_interpolation_begins_and_ends_exactly_at_its_sides(columns, wrap):
    a, b = np.random.default_rng(0).normal(size=(2, B, D)).astype(np.float32)
    b *= 1e6  # a + λ(b − a) would miss a by the digits of b
    gamma, full = wrap(contrabin.interpolate), np.ones((B, columns), np.float32)
    np.testing.assert_array_equal(gamma(a, b, full), a)
    np.testing.assert_array_equal(gamma(a, b, 0 * full), b)
    np.testing.assert_allclose(gamma(a, b, 0.25 * full), a / 4 + 3 * b / 4, rtol=1e-6)


# ---------------------------------------------------------------- the model


@pytest.mark.parametrize('kind', contrabin.KINDS)
def test_interpolated_is_between_source_and_comment(kind):
    model, inputs = _model(), _inputs()
    outputs = _apply(inputs)
    mixed, weight = jax.jit(
        lambda variables, source, comment: model.apply(
            variables, source, comment, kind, False, method='interpolated'
        )
    )(_variables(model), outputs['source'], outputs['comment'])
    chex.assert_shape(mixed, (B, D))
    chex.assert_shape(weight, (B, 1) if kind == 'linear' else (B, D))
    assert (weight > 0).all() and (weight < 1).all() and np.ptp(weight) > 0
    expected = weight * outputs['source'] + (1 - weight) * outputs['comment']
    np.testing.assert_allclose(mixed, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(outputs[kind], expected, rtol=1e-5, atol=1e-6)
    low = np.minimum(outputs['source'], outputs['comment'])
    high = np.maximum(outputs['source'], outputs['comment'])
    assert (mixed >= low - 1e-6).all() and (mixed <= high + 1e-6).all()


def test_each_modality_has_its_encoder_and_its_head():
    model, inputs = _model(), _inputs()
    params = _variables(model)['params']
    outputs = _apply(inputs)
    for at, (name, tower) in enumerate(
        (('source', 'anchor'), ('comment', 'anchor'), ('binary', 'binary'))
    ):
        states = _states(tower)(params[tower], *inputs[2 * at : 2 * at + 2])
        expected = _project(params[f'{name}_head'], np.float64(states[:, 0]), 1)
        np.testing.assert_allclose(outputs[name], expected, atol=5e-5, err_msg=name)
        chex.assert_shape(outputs[name], (B, D))


@functools.cache
def _states(tower):
    encoder = getattr(_model(), tower)
    return jax.jit(lambda p, *inputs: encoder.apply({'params': p}, *inputs, train=False))


def test_padding_influences_nothing():
    inputs, other = _inputs(), _inputs(1)
    padded = list(inputs)
    for i in (0, 2, 4):
        padded[i] = np.where(inputs[i + 1], inputs[i], other[i])
        assert not np.array_equal(padded[i], inputs[i])
    chex.assert_trees_all_equal(_apply(inputs), _apply(padded))


@pytest.mark.parametrize('pooling', contrabin.POOLINGS)
def test_pooling_is_as_named(pooling):
    model, (tokens, mask) = _model(pooling=pooling), _inputs()[4:]
    variables = _variables(model)
    hidden = jax.jit(
        lambda tokens: model.apply(variables, tokens, mask, 'binary', False, method='encode')
    )(tokens)
    chex.assert_shape(hidden, (B, W))
    states = np.asarray(_states('binary')(variables['params']['binary'], tokens, mask))
    mean = np.stack([row[keep].mean(0) for row, keep in zip(states, mask, strict=True)])
    expected = states[:, 0] if pooling == 'first' else mean
    np.testing.assert_allclose(hidden, expected, rtol=1e-4, atol=1e-5)


def _split(params):
    rest = {name: tree for name, tree in params.items() if name != 'anchor'}
    return rest, {'anchor': params['anchor']}


def _count(jaxpr, primitive):
    """Counts the operations of that name, those of functions called inside too."""
    inside = [x.jaxpr for op in jaxpr.eqns for x in op.params.values() if hasattr(x, 'jaxpr')]
    own = sum(op.primitive.name == primitive for op in jaxpr.eqns)
    return own + sum(_count(x, primitive) for x in inside)


def test_what_learns_needs_no_gradient_of_the_anchor():
    model, inputs = _model(), _inputs()
    rest, anchor = _split(_variables(model)['params'])

    def loss(rest, anchor, weight):
        outputs = model.apply({'params': {**rest, **anchor}}, *inputs)
        part = lambda *names: sum(jnp.sum(jnp.sin(3 * outputs[name])) for name in names)
        return part('source', 'comment', 'binary') + weight * part('linear', 'nonlinear')

    gradient = jax.jit(jax.grad(loss))
    learnt, naive = gradient(rest, anchor, 1.0), gradient(rest, anchor, 0.0)
    for path, leaf in flax.traverse_util.flatten_dict(learnt, sep='/').items():
        # A key's bias shifts all logits of a query alike.
        assert np.abs(leaf).max() > 0 or path.endswith('key/bias'), path
    for kind in contrabin.KINDS:
        assert not any(np.any(x) for x in jax.tree.leaves(naive[f'interpolation_{kind}']))

    def products(argument):
        traced = jax.make_jaxpr(jax.grad(loss, argument))(rest, anchor, 1.0)
        return _count(traced.jaxpr, 'dot_general')

    # A layer has 6 linear maps and 2 products of attention; each takes two more backward, and the
    # head that reads the anchor takes one for it. Source and comment both pass through.
    assert products((0, 1)) - products(0) == 2 * (2 * 8 + 1)


def test_dropout_acts_in_training_only_and_in_every_part():
    model, inputs = _model(), _inputs()
    variables = _variables(model)

    def draws(train):
        apply = lambda key: model.apply(variables, *inputs, train=train, rngs={'dropout': key})
        return _count(jax.make_jaxpr(apply)(jax.random.key(0)).jaxpr, 'random_bits')

    # Three a passage through an encoder of one layer, one a head and one an interpolation.
    assert draws(False) == 0 and draws(True) == 3 * 3 + 3 + 2


def test_parameters_live_under_the_names_that_rules_use_and_have_the_published_count():
    base = {
        'vocabulary': 50265,
        'width': 768,
        'depth': 1,
        'heads': 12,
        'mlp_width': 3072,
        'max_length': 514,
        'types': 1,
        'position_offset': 2,
    }
    model = contrabin.ContraBin(Bert(**base), Bert(**base))
    tokens = [jax.ShapeDtypeStruct((1, 512), jnp.int32)] * 6
    params = jax.eval_shape(model.init, jax.random.key(0), *tokens)['params']
    counts = {name: sum(x.size for x in jax.tree.leaves(tree)) for name, tree in params.items()}
    encoder = (50265 + 514 + 1 + 2) * 768 + 7_087_872  # embeddings, their norm, a layer
    square = 256 * 256 + 256
    head = 768 * 256 + 256 + square + 512
    assert counts == {
        'anchor': encoder,
        'binary': encoder,
        'source_head': head,
        'comment_head': head,
        'binary_head': head,
        'interpolation_linear': 2 * square + 512 + 256 + 1,
        'interpolation_nonlinear': 4 * square + 512,
    }


def test_bfloat16_computes_in_half_and_keeps_parameters_and_outputs_in_float32():
    half = _model(dtype=jnp.bfloat16)
    towers = {name: getattr(half, name).clone(dtype=jnp.bfloat16) for name in ('anchor', 'binary')}
    variables, outputs = jax.eval_shape(
        lambda: half.clone(**towers).init_with_output(jax.random.key(0), *_inputs())[::-1]
    )
    for tree in (variables, outputs):
        assert {x.dtype for x in jax.tree.leaves(tree)} == {jnp.dtype('float32')}
    x = np.random.default_rng(0).normal(size=(B, 9)).astype(np.float32)
    head = contrabin.Projection(D, dtype=jnp.bfloat16)
    params = _random(head.init, x, train=False)
    error = np.abs(head.apply(params, x, train=False) - _project(params['params'], x, 1)).max()
    assert 1e-4 < error < 0.05


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'pooling': 'last'}, "'last'"),
        ({'head': 'deep'}, "'deep'"),
    ],
)
def test_a_model_that_cannot_be_built_is_refused(fields, message):
    model = _model()
    with pytest.raises((KeyError, ValueError), match=message):
        jax.eval_shape(model.clone(**fields).init, jax.random.key(0), *_inputs())


def test_unknown_names_are_refused():
    model, hidden = _model(), jnp.zeros((B, W))
    apply = functools.partial(model.apply, _variables(model), hidden)
    with pytest.raises(AttributeError, match='code_head'):
        apply('code', False, method='project')
    with pytest.raises(KeyError, match='naive'):
        apply(hidden, 'naive', False, method='interpolated')
