"""Terms, scores and figures of the ContraBin recipe against loops in NumPy."""

import dataclasses
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.engine import build, evaluate
from mmjax.engine.task import SplitResults
from mmjax.recipes.contrabin import scores
from mmjax.recipes.contrabin.scores import CodeScores
from tests.losses.test_interpolation import labelled_oracle, unit
from tests.recipes.contrabin.test_modes import LEVELS, first_batch, tiny, write_functions

LOSSES = ('anchor', 'source_binary', 'comment_binary', 'intermediate')


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
        loss_weights=tuple((n, 1.0) for n in sorted(LOSSES)),
    )
    batch = {k: jnp.asarray(v) for k, v in first_batch(bare, stage).items()}
    has = np.asarray(batch['has_comment'])
    assert 0 < has.sum() < 16
    outputs, weight = drawn(np.random.default_rng(0), 16)
    late = set(LOSSES) - {'source_binary'}
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
        train = dict.fromkeys(bare.task.towers, False)
        outputs, _ = bare.task.forward(variables, batch, stage, train=train, key=None)
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


class Predictor:
    """Stands in for a model: draws its outputs, and notes the datasets whose binaries it embeds."""

    def __init__(self):
        rng = np.random.default_rng(3)
        self.outputs, self.weights = drawn(rng, 12)  # of `forward`, for the 12 functions of val
        self.binaries = {rows: rng.normal(size=(rows, 8)) for rows in (48, 20)}
        self.variables = {}
        self.datasets = {}

    def forward(self, stage, dataset, batch_size):
        yield self.outputs, arrays(dataset)

    def __call__(self, method, dataset, batch_size):
        assert method == 'embed_binary'
        self.datasets[dataset.split] = dataset
        records = [dataset.record(row) for row in range(len(dataset))]
        numbers = np.array([int(record['name'][4:]) for record in records])
        if dataset.split == 'train':
            yield self.binaries[20][numbers], arrays(dataset)
            return
        levels = [LEVELS.index(record['opt_level']) for record in records]
        yield self.binaries[48][(numbers - 50) * 4 + levels], arrays(dataset)


def arrays(dataset):
    """Returns a split as one batch."""
    rng = np.random.default_rng(0)
    rows = [dataset.example(row, rng, False) for row in range(len(dataset))]
    batch = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
    return batch | {'row': np.arange(len(rows)), 'mask': np.ones(len(rows), bool)}


@pytest.fixture
def predictor():
    return Predictor()


@pytest.fixture
def scorer(bare):
    functions, train = (bare.task.dataset(split) for split in ('val', 'train'))
    return CodeScores(functions, train, {'source_binary': 1.0, 'comment_binary': 0.5}, 16, 5, True)


def scored(scorer, predictor, final=False):
    """Runs the scores on the drawn outputs, with losses of 1 and 2."""
    losses = {'source_binary': 1.0, 'comment_binary': 2.0, 'loss': 9.0, 'final_loss': 9.0}
    results = SplitResults(predictor.outputs, arrays(scorer.dataset), losses)
    return scorer.run(predictor, final=final, results=results)


POOLS = np.random.default_rng(0).permutation(12)[:10].reshape(2, 5)
HAS = np.array([n % 4 != 0 for n in range(50, 62)])


def test_scores_of_pools_agree_with_loops(predictor, scorer):
    outputs = predictor.outputs
    binaries = predictor.binaries
    found = scored(scorer, predictor).metrics
    assert (found['functions'], found['pool'], found['left_out']) == (12, 5, 2)
    assert found['r1_chance'] == 0.2 and len(predictor.datasets['val']) == 40
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
    full = arrays(scorer.dataset)['binary_mask'][:, -1]
    assert found['binary_full'] == full.mean()
    assert found['final_loss'] == 1.0 + 0.5 * 2.0  # of the primary losses


def test_losses_of_pools_are_those_of_loops(bare, predictor, scorer):
    """A term is the mean over what is active in all pools; λ the mean over pools."""
    outputs, weights = predictor.outputs, predictor.weights
    with jax.set_mesh(bare.mesh):
        predictor.variables = bare.init_variables()
        weighing = evaluate.LossWeights.of(bare.stages[-1], 0, bare.final_weights)
        found = evaluate.losses(predictor, bare.task, scorer, weighing).losses
    functions = bare.task.dataset('val')
    told = functions.index['comment_id'][functions.one_each()]
    commented = [pool[HAS[pool]] for pool in POOLS]
    assert len(commented[0]) != len(commented[1])
    assert any(len(set(told[pool])) < len(pool) for pool in commented)
    mixed = outputs['interpolated']
    expected = {
        'source_binary': [primary(outputs['source'][p], outputs['binary'][p], p) for p in POOLS],
        'comment_binary': [
            primary(outputs['comment'][p], outputs['binary'][p], told[p]) for p in commented
        ],
        'anchor': [
            infonce(outputs['source'][p], outputs['comment'][p], told[p]) for p in commented
        ],
        'intermediate': [infonce(mixed[p], outputs['binary'][p], p) for p in commented],
    }
    for name, values in expected.items():
        counts = [len(p) for p in (POOLS if name == 'source_binary' else commented)]
        assert found[name] == pytest.approx(np.average(values, weights=counts), rel=1e-5), name
    means = [weights[p].mean() for p in commented]
    assert found['lambda_mean'] == pytest.approx(np.mean(means), rel=1e-5)
    spreads = [weights[p].std() for p in commented]
    assert found['lambda_spread'] == pytest.approx(np.mean(spreads), rel=1e-5)
    total = sum(found[name] for name in ('source_binary', 'comment_binary', 'intermediate'))
    assert found['loss'] == pytest.approx(total)


def test_a_pool_in_which_all_have_comments_is_told_once():
    pools = np.arange(6).reshape(2, 3)
    assert scores._commented(np.ones(6, bool), pools) == {}
    some = np.array([1, 1, 1, 0, 0, 1], bool)  # of the second pool one is left: it is not scored
    assert scores._commented(some, pools) == {}
    some = np.array([1, 0, 1, 1, 1, 1], bool)
    found = scores._commented(some, pools)
    assert found == {'comment_pool': 2, 'comment_r1_chance': 0.5, 'comment_r10_chance': 1.0}


def test_the_probe_learns_from_a_sample_of_all_functions(predictor, scorer, monkeypatch):
    monkeypatch.setattr(scores, 'PROBE_ROWS', 7)
    scored(scorer, predictor)
    learnt = predictor.datasets['train']
    names = [int(learnt.record(row)['name'][4:]) for row in range(len(learnt))]
    assert len(set(names)) == 7 and max(names) > 10


# Figures ------------------------------------------------------------------------------------


def test_figures_show_what_they_say(predictor, scorer):
    outputs = predictor.outputs
    found = scored(scorer, predictor, final=True).figures
    assert set(found) == {'similarity', 'projection'}
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


def test_figures_without_comments_or_labels_can_be_drawn(predictor):
    outputs, none = predictor.outputs, np.zeros(12, bool)
    labels = [f'label {n}' for n in range(22)] + [''] * 3
    many = {name: np.tile(rows, (3, 1))[:25] for name, rows in outputs.items() if rows.ndim > 1}
    right = scores.projection(many, np.ones(25, bool), labels).axes[1]
    sizes = {part.get_label(): len(part.get_offsets()) for part in right.collections}
    assert sizes.pop('none or others') == 5 and len(sizes) == 20 and set(sizes.values()) == {1}
    for figure in (
        scores.projection(outputs, none, [''] * 12),
        scores.similarity(outputs, np.arange(12), none),
    ):
        figure.savefig(io.BytesIO(), format='png', dpi=40)
