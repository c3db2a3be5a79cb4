"""The ContraBin config: its words build, alone and together, and hold what was published."""

import json

import pytest

from mmjax.engine import build, optim
from mmjax.recipes.contrabin.config import StageOptions
from tests import runs
from tests.recipes.contrabin.test_modes import write_functions
from tests.test_main import refuse

WORDS = ['', 'smoke', 'published', 'smoke,published']


@pytest.mark.parametrize('words', WORDS)
def test_all_words_build_on_the_built_in_functions(tmp_path_factory, words):
    config = runs.recipe('contrabin', words)
    cache = str(tmp_path_factory.getbasetemp() / 'built-in')
    config.data.update(cache=cache, built_in=dict(train=96, val=32, test=32), vocabulary=400)
    config.evaluate_pool = min(config.evaluate_pool, 32)
    built = build.run(config)
    smoke, published = 'smoke' in words, 'published' in words
    names = [] if published else ['anchor'] if smoke else ['anchor', 'near']
    assert [stage.name for stage in built.stages] == [*names, 'naive', 'linear', 'nonlinear']
    assert [stage.options for stage in built.stages[-2:]] == [
        StageOptions(interpolation=kind, cache_anchor=True) for kind in ('linear', 'nonlinear')
    ]
    assert built.config.batch_size == (16 if smoke else 32 if published else 64)
    width = 16 if smoke else 768 if published else 128
    assert built.abstract['params']['anchor']['words']['embedding'].shape[1] == width
    told = "no stage trains group 'anchor': it stays as it is made or loaded"
    assert (told in built.warnings) == published
    if smoke:
        assert [stage.steps for stage in built.stages] == [4] * len(built.stages)
    if words != 'published':
        return
    # An epoch of the sampler pk shows every binary once, so 96 functions at four levels are 12
    # batches of 32.
    assert [stage.steps for stage in built.stages] == [120, 60, 60]
    assert built.task.config.losses.softness == 1 and not built.task.config.losses.normalize
    assert 'the run warms up for 500 updates and makes 240 of them' in ' '.join(built.warnings)
    stage, spec = built.stages[1], built.stages[1].optimizer
    assert (spec.warmup_steps, spec.span, spec.clip, spec.b2) == (500, 'run', 1.0, 0.999)
    rates = optim.rates(stage, built.groups.names, 30)
    assert rates['binary_head'] == pytest.approx(1e-3 * 150 / 500)
    assert rates['encoder'] == pytest.approx(1e-5 * 150 / 500)


@pytest.mark.slow
def test_bad_folders_end_the_command_with_one_sentence(tmp_path):
    """Exit code 1 and nothing in the workdir, as `refuse` asserts."""

    def rows(root, change):
        path = root / 'train.jsonl'
        lines = [change(json.loads(line)) for line in path.read_text().splitlines()]
        path.write_text('\n'.join(map(json.dumps, lines)))

    lacking = lambda row: {key: value for key, value in row.items() if key != 'source'}
    for name, change, expected in (
        ('column', lambda root: rows(root, lacking), "has no 'source'"),
        ('type', lambda root: rows(root, lambda row: row | {'binary': 3}), "'binary' is 3"),
        ('empty', lambda root: (root / 'val.jsonl').write_text(''), 'val.jsonl has no rows'),
        ('missing', lambda root: (root / 'val.jsonl').unlink(), 'val.jsonl'),
        ('bytes', lambda root: (root / 'train.jsonl').write_bytes(b'\x1f\x8b\0'), 'train.jsonl'),
    ):
        (tmp_path / name / 'rows').mkdir(parents=True)
        root = tmp_path / name / 'rows'
        write_functions(root)
        change(root)
        smoke = '--config=configs/contrabin.py:smoke'
        told = refuse(tmp_path / name, f'--config.data.root={root}', config=smoke)
        assert expected in told, told
