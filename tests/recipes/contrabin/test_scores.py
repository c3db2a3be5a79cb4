"""Terms, scores and figures of the ContraBin recipe against loops in NumPy."""

import dataclasses
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.engine import build
from mmjax.recipes.contrabin import figures as contrabin_figures
from mmjax.recipes.contrabin import scores
from mmjax.recipes.contrabin import task as contrabin
from mmjax.recipes.contrabin.scores import CodeScores
from tests.losses.test_interpolation import labelled_oracle, unit
from tests.recipes.contrabin.test_modes import LEVELS, first_batch, tiny, write_functions

KINDS = ('linear', 'nonlinear')


@pytest.fixture(scope='module')
def bare(tmp_path_factory):
    """Returns a run on functions at four levels, not trained."""
    root = write_functions(tmp_path_factory.mktemp('rows'))
    return build.run(tiny(tmp_path_factory.mktemp('cache'), data__root=root))


def infonce(a, b, told):
    """Symmetric InfoNCE in float64; rows of one comment are no wrong answers."""
    a, b = unit(np.float64(a)), unit(np.float64(b))
    losses = []
    for logits in (a @ b.T / 0.07, b @ a.T / 0.07):
        for i, line in enumerate(logits):
            others = [j for j in range(len(a)) if j == i or told[j] != told[i]]
            losses.append(np.log(np.exp(line[others] - line[i]).sum()))
    return np.mean(losses)


def primary(a, b, told):
    """The mean primary loss in float64; rows of one comment share the one-hot part."""
    everyone = np.ones(len(a), bool)
    total, count = labelled_oracle(
        unit(np.float64(a)), unit(np.float64(b)), told, everyone, 0.07, 0.1
    )
    return total / count


def drawn(rng, n, features=8):
    """Returns outputs of `forward` for n rows, and λ [n, features]."""
    names = ('source', 'comment', 'binary', 'interpolated')
    out = {name: rng.normal(size=(n, features)).astype(np.float32) for name in names}
    weight = rng.uniform(size=(n, features)).astype(np.float32)
    return out | {'lambda': weight.mean(1), 'lambda_variance': weight.var(1)}, weight


# Terms --------------------------------------------------------------------------------------


def test_rows_without_comment_count_where_none_is_needed(bare):
    stage = dataclasses.replace(
        bare.stages[-1],
        loss_weights=tuple((n, 1.0) for n in sorted(contrabin.LOSSES)),
    )
    batch = {k: jnp.asarray(v) for k, v in first_batch(bare, stage).items()}
    has = np.asarray(batch['has_comment'])
    assert 0 < has.sum() < 16
    outputs, weight = drawn(np.random.default_rng(0), 16)
    late = set(contrabin.LOSSES) - {'source_binary'}
    terms = jax.jit(lambda x: bare.task.terms({}, x, batch, stage))(outputs)
    counts = {n: int(t.count) for n, t in terms.items() if not n.startswith('lambda')}
    assert counts == {'source_binary': 16, **dict.fromkeys(late, int(has.sum()))}
    told = np.asarray(batch['comment_id'])[has]
    assert len(set(told)) < len(told)  # a comment that two functions share
    commented = {name: x[has] for name, x in outputs.items()}
    expected = infonce(commented['source'], commented['comment'], told)
    assert float(terms['anchor'].mean()) == pytest.approx(expected, rel=1e-5)
    assert expected < infonce(commented['source'], commented['comment'], np.arange(len(told)))
    expected = primary(commented['comment'], commented['binary'], told)
    assert float(terms['comment_binary'].mean()) == pytest.approx(expected, rel=1e-5)
    expected = primary(outputs['source'], outputs['binary'], np.arange(16))
    assert float(terms['source_binary'].mean()) == pytest.approx(expected, rel=1e-5)
    assert float(terms['lambda_mean']) == pytest.approx(weight[has].mean(), rel=1e-5)
    assert float(terms['lambda_spread']) == pytest.approx(weight[has].std(), rel=1e-5)

    none = {**batch, 'has_comment': jnp.zeros(16, bool)}

    def empty(outputs):
        found = bare.task.terms({}, outputs, none, stage)
        return sum(found[n].mean() for n in late)

    value, gradients = jax.jit(jax.value_and_grad(empty))(outputs)
    assert float(value) == 0 and not any(np.asarray(g).any() for g in gradients.values())


def test_the_spread_of_lambda_is_over_rows_and_coordinates(bare):
    """A nonlinear interpolation may weigh coordinates apart and every row alike."""
    stage, model = bare.stages[-1], bare.task.model
    batch = first_batch(bare, stage)
    has = batch['has_comment']

    @jax.jit
    def run(variables, batch):
        options = dict(train=False, key=jax.random.key(0))
        outputs, _ = bare.task.forward(variables, batch, stage, **options)
        pair = outputs['source'], outputs['comment']
        _, weight = model.apply(variables, *pair, 'nonlinear', False, method='interpolated')
        return bare.task.terms(variables, outputs, batch, stage), weight

    with jax.set_mesh(bare.mesh):
        terms, weight = run(bare.init_variables(), batch)
    weight = np.asarray(weight, np.float64)[has]
    assert weight.shape[1] == 16 and weight.mean(1).std() < 0.5 * weight.std()
    assert float(terms['lambda_mean']) == pytest.approx(weight.mean(), rel=1e-5)
    assert float(terms['lambda_spread']) == pytest.approx(weight.std(), rel=1e-4)


# Scores -------------------------------------------------------------------------------------


def reciprocal_ranks(queries, gallery):
    cosines = unit(np.float64(queries)) @ unit(np.float64(gallery)).T
    return [1 / (1 + sum(line > line[i])) for i, line in enumerate(cosines)]


@pytest.fixture(scope='module')
def encoded():
    """Returns (outputs of `encode` for the 12 functions of val, λ by kind, 48 and 20 binaries)."""
    rng = np.random.default_rng(3)
    outputs, weights = {}, {}
    for kind in KINDS:
        found, weights[kind] = drawn(rng, 12)
        outputs |= {n: found.pop(n) for n in ('source', 'comment', 'binary')}
        outputs |= {f'{name}_{kind}': value for name, value in found.items()}
    return outputs, weights, {rows: rng.normal(size=(rows, 8)) for rows in (48, 20)}


@pytest.fixture
def apply(encoded):
    """Stands in for a model; notes the datasets whose binaries are asked, by split."""
    outputs, _, binaries = encoded
    rng = np.random.default_rng(0)

    def run(method, dataset, batch_size):
        rows = [dataset.example(r, rng, False) for r in range(len(dataset))]
        batch = {key: np.stack([r[key] for r in rows]) for key in rows[0]}
        if method == 'encode':
            yield outputs, batch
            return
        run.asked[dataset.split] = dataset
        names = [dataset.record(r)['name'] for r in range(len(dataset))]
        numbers = np.array([int(name[4:]) for name in names])
        if dataset.split == 'train':
            yield binaries[20][numbers], batch
            return
        levels = np.array([dataset.record(r)['opt_level'] for r in range(len(dataset))])
        yield binaries[48][(numbers - 50) * 4 + [LEVELS.index(level) for level in levels]], batch

    run.asked = {}
    return run


@pytest.fixture
def scorer(bare):
    functions, train = (bare.task.dataset(split) for split in ('val', 'train'))
    return CodeScores(bare.task, functions, train, batch_size=16, pool=5)


POOLS = np.random.default_rng(0).permutation(12)[:10].reshape(2, 5)
HAS = np.array([n % 4 != 0 for n in range(50, 62)])


def test_scores_of_pools_agree_with_loops(encoded, apply, scorer):
    outputs, _, binaries = encoded
    found = scorer.run(apply, final=False).metrics
    assert (found['functions'], found['pool'], found['left_out']) == (12, 5, 2)
    assert found['r1_chance'] == 0.2 and len(apply.asked['val']) == 40
    left = [HAS[pool].sum() for pool in POOLS]
    assert min(left) < max(left) <= 5 and found['comment_pool'] == min(left)
    assert found['comment_r1_chance'] == 1 / min(left) and found['comment_r10_chance'] == 1
    for a, b in (('source', 'binary'), ('comment', 'binary'), ('binary', 'comment')):
        ranks = []
        for pool in POOLS:
            kept = pool[HAS[pool]] if 'comment' in (a, b) else pool
            ranks.append(np.array(reciprocal_ranks(outputs[a][kept], outputs[b][kept])))
        assert any(len(r) < 5 for r in ranks) == ('comment' in (a, b))
        for name, credit in (
            ('mrr', lambda r: r),
            ('r1', lambda r: r == 1),
            ('r5', lambda r: r >= 0.2),
        ):
            expected = np.mean([credit(r).mean() for r in ranks])
            assert found[f'{a}_{b}_{name}'] == pytest.approx(expected, abs=1e-6), (a, b, name)
    every = []
    for a, first in enumerate(LEVELS):
        for b, second in enumerate(LEVELS):
            if a != b:
                between = [
                    reciprocal_ranks(binaries[48][pool * 4 + a], binaries[48][pool * 4 + b])
                    for pool in POOLS
                ]
                every.append(np.mean(between))
                name = f'binary_{first.lower()}_{second.lower()}_map'
                assert found[name] == pytest.approx(every[-1], abs=1e-6)
    assert found['binary_levels_map'] == pytest.approx(np.mean(every), abs=1e-6)
    assert found['comment_full'] == 0 and found['probe_majority'] == 0.5


def test_losses_of_pools_are_those_of_both_interpolations_whatever_the_stage(
    bare, encoded, apply, scorer
):
    outputs, weights, _ = encoded
    found = scorer.run(apply, final=False).metrics
    functions = bare.task.dataset('val')
    told = functions.index['comment_id'][functions.one_each()]
    commented = [pool[HAS[pool]] for pool in POOLS]
    assert any(len(set(told[pool])) < len(pool) for pool in commented)
    expected = {
        'source_binary': [primary(outputs['source'][p], outputs['binary'][p], p) for p in POOLS],
        'comment_binary': [
            primary(outputs['comment'][p], outputs['binary'][p], told[p]) for p in commented
        ],
        'anchor': [
            infonce(outputs['source'][p], outputs['comment'][p], told[p]) for p in commented
        ],
    }
    for kind in KINDS:
        mixed = outputs[f'interpolated_{kind}']
        expected[f'intermediate_{kind}'] = [
            infonce(mixed[p], outputs['binary'][p], p) for p in commented
        ]
        expected[f'lambda_mean_{kind}'] = [weights[kind][p].mean() for p in commented]
        expected[f'lambda_spread_{kind}'] = [weights[kind][p].std() for p in commented]
    for name, values in expected.items():
        assert found[name] == pytest.approx(np.mean(values), rel=1e-5), name
    assert found['intermediate_linear'] != pytest.approx(found['intermediate_nonlinear'], rel=0.01)
    assert found['loss'] == pytest.approx(found['source_binary'] + found['comment_binary'])


def test_a_pool_in_which_all_have_comments_is_told_once():
    pools = np.arange(6).reshape(2, 3)
    assert scores._commented(np.ones(6, bool), pools) == {}
    some = np.array([1, 1, 1, 0, 0, 1], bool)  # of the second pool one is left: it is not scored
    assert scores._commented(some, pools) == {}
    some = np.array([1, 0, 1, 1, 1, 1], bool)
    found = scores._commented(some, pools)
    assert found == {'comment_pool': 2, 'comment_r1_chance': 0.5, 'comment_r10_chance': 1.0}


def test_the_probe_learns_from_a_sample_of_all_functions(apply, scorer, monkeypatch):
    monkeypatch.setattr(scores, 'PROBED', 7)
    scorer.run(apply, final=False)
    learnt = apply.asked['train']
    names = [int(learnt.record(row)['name'][4:]) for row in range(len(learnt))]
    assert len(set(names)) == 7 and max(names) > 10


# Figures ------------------------------------------------------------------------------------


def test_figures_show_what_they_say(encoded, apply, scorer):
    outputs = encoded[0]
    found = scorer.run(apply, final=True).figures
    assert set(found) == {'similarity', 'projection', 'interpolation'}
    for figure in found.values():
        assert figure.get_label()
        figure.savefig(io.BytesIO(), format='png', dpi=40)

    source, comment, _ = found['similarity'].axes
    for axis, rows in ((source, POOLS[0]), (comment, POOLS[0][HAS[POOLS[0]]])):
        (image,) = axis.images
        cosines = unit(outputs['binary'][rows]) @ unit(outputs[axis.get_xlabel()][rows]).T
        np.testing.assert_allclose(image.get_array(), cosines, atol=1e-5)

    left, right = found['projection'].axes
    sizes = {part.get_label(): len(part.get_offsets()) for part in left.collections}
    assert sizes == {'source': 12, 'comment': HAS.sum(), 'binary': 12}
    binary = next(part for part in left.collections if part.get_label() == 'binary')
    by_label = {part.get_label(): part for part in right.collections}
    for label, odd in (('even', 0), ('odd', 1)):
        np.testing.assert_array_equal(by_label[label].get_offsets(), binary.get_offsets()[odd::2])
    colours = {tuple(part.get_facecolor()[0]) for part in right.collections}
    legend = right.get_legend()
    assert len(colours) == 2 and [text.get_text() for text in legend.texts] == ['even', 'odd']
    shown = [tuple(handle.get_facecolor()[0]) for handle in legend.legend_handles]
    assert shown == [tuple(by_label[name].get_facecolor()[0]) for name in ('even', 'odd')]

    (axis,) = found['interpolation'].axes
    heights = [sum(bar.get_height() for bar in bars) for bars in axis.containers]
    assert heights == [HAS.sum()] * 2


def test_figures_without_comments_or_labels_can_be_drawn(encoded):
    outputs, none = encoded[0], np.zeros(12, bool)
    labels = [f'label {n}' for n in range(22)] + [''] * 3
    many = {name: np.tile(rows, (3, 1))[:25] for name, rows in outputs.items() if rows.ndim > 1}
    right = contrabin_figures.projection(many, np.ones(25, bool), labels).axes[1]
    sizes = {part.get_label(): len(part.get_offsets()) for part in right.collections}
    assert sizes.pop('none or others') == 5 and len(sizes) == 20 and set(sizes.values()) == {1}
    for figure in (
        contrabin_figures.projection(outputs, none, [''] * 12),
        contrabin_figures.similarity(outputs, np.arange(12), none),
        contrabin_figures.weights(outputs, none),
    ):
        figure.savefig(io.BytesIO(), format='png', dpi=40)
