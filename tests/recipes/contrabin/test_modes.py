"""The ContraBin recipe without a run: what its options reach, its batches, and every mode."""

import functools
import json
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from mmjax.data import pipeline
from mmjax.engine import build, evaluate, modes, optim, step
from mmjax.engine import config as config_lib
from mmjax.engine.task import gather
from mmjax.errors import UserError
from tests import runs
from tests.recipes.contrabin.test_data import LEVELS, row, write


def tiny(cache, **changes):
    config = runs.recipe('contrabin', 'smoke')
    config.log.tensorboard = False
    config.data.cache = str(cache)
    config.checkpoint.keep = 9
    return runs.change(config, **changes)


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp('cache')


def write_functions(root):
    """Functions at four levels: some without comment, some that share one; no test split."""
    for split, start, count in (('train', 0, 20), ('val', 50, 12)):
        rows = []
        for n in range(start, start + count):
            comment = {0: '', 1: 'Adds a number.'}.get(n % 4, f'Adds {n}.')
            label = {'label': ['even', 'odd'][n % 2]}
            made = [row(n, level, comment=comment) for level in LEVELS]
            rows += [{**one, 'metadata': one['metadata'] | label} for one in made]
        write(root / f'{split}.jsonl', rows)
    return str(root)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return write_functions(tmp_path_factory.mktemp('rows'))


@pytest.fixture(scope='module')
def bare(cache, folder):
    """Returns the run of `folder`, not trained."""
    return build.run(tiny(cache, data__root=folder))


@pytest.fixture(scope='module')
def fresh(bare):
    """Applies the run of `folder` with the weights that it starts from."""
    with jax.set_mesh(bare.mesh):
        yield evaluate.Predictor(bare.task, bare.init_variables(), bare.mesh)


def first_batch(built, stage):
    options = dict(seed=0, stage=stage.index, stop=1, train=True, threads=0)
    return next(iter(pipeline.batches(built.data, built.sampler(stage), **options)))


def program(built, stage):
    call = functools.partial(
        step.train_step,
        task=built.task,
        stage=stage.compile_key,
        groups=built.groups,
        settings=built.settings,
    )
    rates = optim.rates(stage, built.groups.names, 2)
    return jax.jit(call), rates, {name: np.float32(1) for name in stage.losses}


def forward(built, variables, batch, stage, key):
    """Runs the forward pass of a stage; of evaluation where `key` is None."""
    train = step.towers_training(built.task.towers, dict(built.groups.items), stage)
    if key is None:
        train = dict.fromkeys(train, False)
    run = functools.partial(built.task.forward, stage=stage.compile_key, train=train)
    return jax.jit(lambda *inputs: run(*inputs[:2], key=inputs[2])[0])(variables, batch, key)


def cached_batch(built, predictor, stage):
    """Returns the first batch of a stage with the cached outputs of the anchor."""
    spec = built.cached(stage)
    arrays, _ = gather(predictor, spec.method, spec.dataset, 7)
    batch = first_batch(built, stage)
    rows = spec.rows[batch['row']]
    return batch | {f'cached_{name}': x[rows] for name, x in arrays.items()}


def test_a_cached_anchor_changes_no_output(bare, fresh):
    anchor, naive = bare.stages[:2]
    assert bare.cached(anchor) is None
    spec = bare.cached(naive)
    train = bare.task.splits['train']
    assert len(train) == 80 and len(spec.dataset) == 20  # four binaries of one text
    for at, cached_row in enumerate(spec.rows):
        own = train.record(at)
        other = spec.dataset.record(int(cached_row))
        assert (own['source'], own['comment']) == (other['source'], other['comment'])
    batch = first_batch(bare, naive)
    cached = cached_batch(bare, fresh, naive)
    key = jax.random.key(1)
    with jax.set_mesh(bare.mesh):
        outputs = [forward(bare, fresh.variables, one, naive, key) for one in (batch, cached)]
    assert set(outputs[0]) == {'source', 'comment', 'binary'}
    chex.assert_trees_all_close(*outputs, rtol=1e-5, atol=1e-6)


def test_nothing_is_cached_where_rules_of_the_user_thaw_the_anchor(cache, folder):
    """The group `anchor` is frozen, but another one has its blocks."""
    rules = (('blocks', 'anchor/block_0/.*'),)
    built = build.run(tiny(cache, data__root=folder, rules=rules))
    assert all(built.cached(stage) is None for stage in built.stages)


def test_the_anchor_is_cached_where_the_option_says_so(cache, folder):
    built = build.run(tiny(cache, data__root=folder, stage__naive__options__cache_anchor=False))
    assert [built.cached(stage) is None for stage in built.stages] == [True, True, False, False]


def test_packing_changes_no_output(cache, folder, bare, fresh):
    plain = build.run(tiny(cache, data__root=folder, model__pack=False))
    assert bare.task.packed_lengths and not plain.task.packed_lengths
    stage = bare.stages[-1]
    batch = first_batch(bare, stage)
    with jax.set_mesh(bare.mesh):
        outputs = [forward(built, fresh.variables, batch, stage, None) for built in (bare, plain)]
    chex.assert_trees_all_close(*outputs, rtol=1e-5, atol=1e-5)


def test_the_model_is_that_of_the_config(cache, folder):
    config = tiny(cache, data__root=folder)
    config.model.update(features=12, head='nonlinear', dropout=0.25, pooling='first')
    config.model.anchor.update(width=8, depth=2, heads=4, mlp_width=24, types=2, epsilon=1e-6)
    config.model.binary.update(dropout=0.5, position_offset=3)
    model = build.run(config).task.model
    options = {name: getattr(model, name) for name in ('features', 'head', 'dropout', 'pooling')}
    assert options == dict(features=12, head='nonlinear', dropout=0.25, pooling='first')
    anchor, binary = model.anchor, model.binary
    assert (anchor.width, anchor.depth, anchor.heads, anchor.mlp_width) == (8, 2, 4, 24)
    assert (anchor.types, anchor.epsilon, anchor.max_length, anchor.dropout) == (2, 1e-6, 64, 0.0)
    assert (binary.dropout, binary.position_offset, binary.max_length) == (0.5, 3, 48 + 3)


def test_variables_stay_the_same_object_where_no_folder_is_named(bare, fresh):
    assert bare.task.pretrained(fresh.variables) is fresh.variables


# Frozen parts ----------------------------------------------------------------------------------

SOURCE = {'anchor', 'source_head'}
COMMENT = {'anchor', 'comment_head'}
MIXED = {*SOURCE, *COMMENT, 'interpolation_linear'}
TOWERS_OF = {  # output → the towers that it comes from
    'anchor_encoder': {'anchor'},
    'binary_encoder': {'binary'},
    'source': SOURCE,
    'comment': COMMENT,
    'binary': {'binary', 'binary_head'},
    'lambda': MIXED,
    'interpolated': MIXED,
}
FROZEN = [
    (('anchor',), (), {'anchor'}),
    (('anchor', 'heads'), (), SOURCE | COMMENT),
    (('anchor', 'heads', 'linear'), (), MIXED),
    (('encoder', 'nonlinear'), (), {'binary', 'interpolation_nonlinear'}),
    (('encoder', 'binary_head'), (), {'binary', 'binary_head'}),
    (('backbones',), (('backbones', '(anchor|binary)/.*'),), {'anchor', 'binary'}),
    (('text',), (('text', '(anchor|comment_head)/.*'),), COMMENT),
]


@pytest.mark.parametrize(('groups', 'rules', 'frozen'), FROZEN)
def test_frozen_parts_run_as_in_evaluation(cache, folder, groups, rules, frozen):
    """With dropout .5 in every part; those that train give other outputs with another key."""
    config = tiny(cache, data__root=folder, rules=rules, stages=('only',), model__dropout=0.5)
    config.model.update(pack=False)
    config.model.anchor.dropout = 0.5
    config.model.binary.dropout = 0.5
    rates = dict.fromkeys(groups, 0.0)
    config.stage = {}
    config.stage.only = dict(steps=2, learning_rates=rates, options=dict(interpolation='linear'))
    built = build.run(config)
    (stage,) = built.stages
    task = built.task
    trains = step.towers_training(task.towers, dict(built.groups.items), stage)
    assert {name for name, value in trains.items() if not value} == frozen
    batch = first_batch(built, stage)

    def run(variables, key):
        train = dict.fromkeys(trains, False) if key is None else trains
        outputs, _ = task.forward(variables, batch, stage.compile_key, train=train, key=key)
        for text, tower in (('source', 'anchor'), ('binary', 'binary')):
            hidden = task._encode(variables, batch, train[tower], key, text)
            outputs[f'{tower}_encoder'] = hidden
        return outputs

    with jax.set_mesh(built.mesh):
        variables = built.init_variables()
        first, second, evaluation = (
            jax.jit(run)(variables, key) for key in (jax.random.key(1), jax.random.key(2), None)
        )
    for name, towers in TOWERS_OF.items():
        assert np.array_equal(first[name], second[name]) == (towers <= frozen), name
        if towers <= frozen:
            np.testing.assert_allclose(first[name], evaluation[name], rtol=1e-5, atol=1e-5)


def test_no_part_has_batch_statistics(bare):
    assert set(bare.abstract) == {'params'}


def test_padding_rows_and_neighbours_change_no_loss(bare, fresh):
    stage = bare.stages[-1]
    batch = {**first_batch(bare, stage)}
    short = {name: x[:12] for name, x in batch.items()}
    batch['mask'] = np.arange(16) < 12
    with jax.set_mesh(bare.mesh):
        found = []
        for one in (batch, short):
            outputs = forward(bare, fresh.variables, one, stage, None)
            terms = bare.task.terms(fresh.variables, outputs, one, stage.compile_key)
            found.append({n: float(t.mean()) for n, t in terms.items() if hasattr(t, 'mean')})
    assert set(found[0]) >= {'anchor', 'source_binary', 'comment_binary', 'intermediate'}
    assert found[0] == pytest.approx(found[1], rel=1e-5)


# Options ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_precision_accumulation_and_clip_reach_the_step(cache, folder, fresh):
    def first(**changes):
        shared = dict(data__root=folder, model__dropout=0.0, optimizer__clip=1e-3)
        built = build.run(tiny(cache, **shared, **changes))
        stage = built.stages[-1]
        with jax.set_mesh(built.mesh):
            state = step.create(fresh.variables, stage, built.groups, built.settings)
            call, *rest = program(built, stage)
            state, metrics = call(state, first_batch(built, stage), *rest)
        assert metrics['ok'] and all(np.isfinite(value) for value in metrics.values())
        first_moments = jax.tree.leaves([m['mu'] for m in state['opt_state'].values()])
        mu = np.sqrt(sum(np.square(x).sum() for x in first_moments))
        return {name: float(value) for name, value in metrics.items()}, mu

    whole, mu = first()
    assert whole['grad_norm'] > 0.01 and mu == pytest.approx(0.1 * 1e-3, rel=1e-4)
    micro, _ = first(accumulation=2)
    for name, value in whole.items():
        if name.split('/')[0] in ('loss', 'count', 'lambda_mean'):
            assert micro[name] == pytest.approx(value, rel=1e-5), name
    assert micro['grad_norm'] == pytest.approx(whole['grad_norm'], rel=1e-4)
    half, _ = first(precision='bfloat16')
    assert half['loss'] != whole['loss'] and half['loss'] == pytest.approx(whole['loss'], 0.05)
    # XLA has no such products on CPU: traced, not run.
    built = build.run(tiny(cache, data__root=folder, precision='float16'))
    call, *rest = program(built, built.stages[-1])
    _, traced = call.eval_shape(built.abstract_state(built.stages[-1]), built.batch, *rest)
    assert 'loss_scale' in traced and 'loss_scale' not in half
    assert built.task.model.binary.dtype == built.task.model.dtype == jnp.float16


def test_no_function_is_twice_in_a_batch(bare):
    identity = bare.data.index['identity']
    for stage in bare.stages:
        sampler, shown = bare.sampler(stage), set()
        for epoch in range(60):
            rows = sampler.plan(epoch).rows
            assert all(len(set(identity[batch])) == 16 for batch in rows)
            shown |= set(rows.ravel())
        assert shown == set(range(len(bare.data)))  # every level, in time


# Modes --------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def embedded(bare, fresh, tmp_path_factory):
    output = tmp_path_factory.mktemp('embed')
    bare.task.embed(fresh, output)
    index = [json.loads(line) for line in (output / 'index.jsonl').read_text().splitlines()]
    return np.load(output / 'embeddings.npz'), np.load(output / 'embeddings.npy'), index


def test_embed_writes_what_encode_returns(bare, fresh, embedded):
    arrays, binaries, index = embedded
    sizes = [len(bare.task.dataset(s)) for s in ('train', 'val')]
    assert [entry['row'] for entry in index] == list(range(sum(sizes)))
    assert [entry['split'] for entry in index] == ['train'] * sizes[0] + ['val'] * sizes[1]
    np.testing.assert_array_equal(arrays['binary'], binaries)
    val = bare.task.dataset('val')
    for outputs, _ in fresh('encode', val.subset(np.array([9, 2])), 2):
        for place, r in enumerate((9, 2)):
            assert index[sizes[0] + r]['name'] == val.record(r)['name']
            for text in arrays.files:
                np.testing.assert_allclose(
                    arrays[text][sizes[0] + r], outputs[text][place], atol=1e-5
                )
    np.testing.assert_allclose(np.linalg.norm(binaries, axis=1), 1, atol=1e-5)


def test_predict_finds_as_the_scores_do(cache, folder, bare, fresh, embedded, tmp_path):
    arrays, _, index = embedded
    val = bare.task.dataset('val')  # there is no test split
    start, each = next(e['row'] for e in index if e['split'] == 'val'), val.one_each()
    published = build.run(tiny(cache, data__root=folder, losses__normalize=False))
    plain = evaluate.Predictor(published.task, fresh.variables, published.mesh)
    record = val.record(17)
    (tmp_path / 'f.s').write_text(record['binary'])
    (tmp_path / 'f.c').write_text(record['source'].replace(' ', '\n\t  '))
    (tmp_path / 'f.txt').write_text(record['comment'])
    for name, kind, other in (
        ('f.s', 'binary', 'source'),
        ('f.c', 'source', 'binary'),
        ('f.txt', 'comment', 'binary'),
    ):
        cosines = arrays[other][start:][each] @ arrays[kind][start + 17]
        for run, weights in ((bare, fresh), (published, plain))[: 1 + (kind == 'binary')]:
            told = run.task.predict(weights, str(tmp_path / name), tmp_path / 'out')
            found = json.loads((tmp_path / 'out/nearest.json').read_text())['nearest']
            np.testing.assert_allclose(
                [hit['cosine'] for hit in found], np.sort(cosines)[::-1][:10], atol=1e-5
            )
            assert len(told.splitlines()) == 11 and f'this {kind}, by {other}' in told
            assert found[0]['name'] == val.record(each[cosines.argmax()])['name']


def test_predict_takes_a_long_sentence_and_names_a_missing_file(bare, fresh, tmp_path):
    told = bare.task.predict(fresh, 'Sorts the numbers given. ' * 20, tmp_path / 'out')
    assert told.startswith('nearest to this comment, by binary, in split val:')
    with pytest.raises(UserError, match=r'no/such\.c does not exist'):
        bare.task.predict(fresh, 'no/such.c', tmp_path / 'out')
    told = bare.task.predict(fresh, 'Like strtok in lib.c', tmp_path / 'out')
    assert told.startswith('nearest to this comment')
    with pytest.raises(UserError, match=r'absent\.txt does not exist'):
        bare.task.predict(fresh, 'absent.txt', tmp_path / 'out')
    (tmp_path / 'empty.s').write_text('\n')
    with pytest.raises(UserError, match=r'empty\.s.* holds no text'):
        bare.task.predict(fresh, str(tmp_path / 'empty.s'), tmp_path / 'out')


@pytest.mark.skipif(
    not (shutil.which('gcc') and shutil.which('objdump')), reason='gcc and objdump are needed'
)
def test_prepare_compiles_c_files(cache, tmp_path, capsys):
    pytest.importorskip('tree_sitter_c')
    (tmp_path / 'c').mkdir()
    one = '/* Scales it by {0} or so. */\nint scale_{0}(int n) {{ return n * {0} + n / 7; }}\n'
    for name, numbers in (('a', (3, 5, 9)), ('b', (11, 13, 17))):
        (tmp_path / f'c/{name}.c').write_text(''.join(map(one.format, numbers)))
    config = tiny(cache, data__c_files=str(tmp_path / 'c'), batch_size=2)
    for key, value in dict(compiler='gcc', split_by='file', val=0.5, test=0.0, workers=1).items():
        config.data.compile[key] = value
    command = modes.Command('prepare', epath.Path(tmp_path / 'run'), output=str(tmp_path / 'out'))
    run = lambda: modes.run(config_lib.resolve(config), command)
    assert run() == 0
    told = capsys.readouterr().out
    assert 'split by file' in told and 'prepared 12 records' in told and 'written:' in told
    report = json.loads((tmp_path / 'out/report.json').read_text())
    assert report['rows'] == {'train': 12, 'val': 12}
    assert (tmp_path / 'out/train.jsonl.gz').stat().st_size > 0
    config.data.compile.val = 0.0
    with pytest.raises(UserError, match='split val has no row'):
        run()
    config.data.compile.val = 0.5
    config.batch_size = 64  # more than there are functions
    assert run() == 0
