"""The command line as a user meets it: one clear sentence, exit code 1, nothing on disk."""

import json
import shutil

import pytest
from etils import epath

from mmjax import testing
from mmjax.engine import config as config_lib
from mmjax.engine import modes, train
from mmjax.errors import UserError
from tests import runs
from tests.runs import command

SMOKE = '--config=configs/stage3.py:smoke'


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A small folder of pages in the format of the comic recipe."""
    from mmjax.recipes.comic.synthetic import pages

    root = tmp_path_factory.mktemp('pages')
    pages.write_folder(root, {'train': 110, 'val': 12}, seed=5)
    return root


def refuse(tmp_path, *arguments, cache=None, config=SMOKE):
    """Runs a command that must fail and leave nothing; returns its one sentence."""
    before = sorted(tmp_path.rglob('*'))
    env = {'MMJAX_CACHE': str(cache or tmp_path / 'cache')}
    done = command(config, f'--workdir={tmp_path / "run"}', *arguments, env=env)
    assert done.returncode == 1, done.stdout + done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith('mmjax: ')]
    assert len(errors) == 1 and 'Traceback' not in done.stderr, done.stderr
    assert sorted(tmp_path.rglob('*')) == before
    return errors[0]


@pytest.mark.parametrize(
    ('argument', 'message'),
    [
        ('--config.modle=3', "the config has no key 'modle'"),
        (
            '--config.losses.temprature=0.1',
            "no key 'losses.temprature'; did you mean 'temperature'?",
        ),
        ('--config.batch_size=x', 'batch_size'),
        ('--config.data.root=/nowhere/pages', '/nowhere/pages'),
        ('--unknown=1', 'unrecognized arguments: --unknown=1'),
        ('--config.batch_size', 'batch_size needs a value'),
        ("--config.rules=(('x','nothing/.*'),)", "rule ('x', 'nothing/.*') matches no parameter"),
        ('--mode=predict', 'needs a trained run'),
    ],
)
def test_bad_arguments(tmp_path, tmp_path_factory, argument, message):
    cache = tmp_path_factory.getbasetemp() / 'prepared'  # built-in pages are no part of the run
    assert message in refuse(tmp_path, argument, cache=cache)


def test_unknown_words_and_missing_config_files():
    done = command('--config=configs/stage3.py:smok')
    assert done.returncode == 1 and "unknown config word 'smok'; known: smoke" in done.stderr
    done = command('--config=configs/nope.py')
    assert done.returncode == 1 and "no config file 'configs/nope.py'" in done.stderr


# Overrides from the command line: (config, [keys], what is said or, for a dict, what is set).
OVERRIDES = [
    ('stage3', {'stage.align.steps': '5'}, {'steps': 5, 'epochs': None}),
    ('stage3', {'stage.align.learning_rates.vision': '0'}, {'learning_rates': {'vision': 0.0}}),
    (
        'stage3',
        {'stage.align.loss_weights.reconstruction': '.5'},
        {'loss_weights': {'contrastive': 0.0, 'reconstruction': 0.5}},
    ),
    (
        'stage3',
        {'stage.align.optimizer.learning_rate': '1e-4'},
        {'optimizer': {'learning_rate': 1e-4}},
    ),
    ('stage3', {'stage.align.sampler.name': 'shuffle'}, {'sampler': {'name': 'shuffle'}}),
    ('stage3', {'stage.new.steps': '3', 'stages': 'pages,new'}, None),
    ('stage3', {'optimizer': "{'learning_rate': .5}"}, {'optimizer': {}}),
    ('stage3', {'stage..steps': '1'}, "'stage..steps' is not a key"),
    ('clip_retrieval:v3', {'optimizer': "{'learning_rate': 3.0}"}, 'optimizer.learning_rate has'),
    ('stage3', {'stage.align.stepz': '5'}, "no key 'stage.align.stepz'; did you mean 'steps'?"),
    ('stage3', {'stage.align.steps': 'five'}, "stage.align.steps='five' is not an integer"),
    ('stage3', {'stage.align.optimizer.lr': '1'}, "no key 'stage.align.optimizer.lr'"),
    ('stage3', {'stage.align.options.x': '1'}, "no key 'stage.align.options.x'"),
    (
        'stage3',
        {'loss_weights.contrastive': '2'},
        'set --config.stage.align.loss_weights.contrastive',
    ),
    ('stage3', {'data.root': 'None', 'best.mode': 'up'}, "best.mode='up' is not one of"),
]


@pytest.mark.parametrize(('name', 'changes', 'expected'), OVERRIDES)
def test_the_command_line_wins_or_says_why_not(name, changes, expected):
    config = config_lib.load(name)
    act = lambda: (config_lib.override(config, list(changes.items())), config_lib.resolve(config))
    if isinstance(expected, str):
        with pytest.raises(UserError) as error:
            act()
        assert expected in str(error.value) and '\n' not in str(error.value)
        return
    _, resolved = act()
    if expected is None:
        assert resolved.stages == ('pages', 'new') and resolved.stage['new'].steps == 3
    for key, value in (expected or {}).items():
        assert getattr(resolved.stage['align'], key) == value


def test_a_shadowed_key_may_be_set_together_with_the_stages_that_shadow_it():
    config = config_lib.load('stage3')
    changes = {'loss_weights.contrastive': '2', 'stage.align.loss_weights.contrastive': '1'}
    config_lib.override(config, list(changes.items()))
    resolved = config_lib.resolve(config)
    assert resolved.loss_weights['contrastive'] == 2
    assert resolved.stage['align'].loss_weights['contrastive'] == 1


def test_another_sampler_takes_none_of_the_options_of_the_old_one():
    config = config_lib.load('stage3')
    config_lib.override(config, [('sampler.name', 'pk'), ('sampler.k', '2')])
    assert dict(config_lib.resolve(config).sampler) == {'name': 'pk', 'k': 2}
    config_lib.override(config, [('sampler', "{'name': 'shuffle'}")])
    assert dict(config_lib.resolve(config).sampler) == {'name': 'shuffle'}


def test_a_run_is_not_overwritten_by_itself(tmp_path):
    config = runs.toy('Thaw', 4)
    testing.train(config, tmp_path)
    command = modes.Command(
        'train', epath.Path(tmp_path), existing=True, overwrite=True, init_from=str(tmp_path)
    )
    with pytest.raises(UserError, match='--overwrite would delete'):
        modes.run(config_lib.resolve(config), command)
    assert (tmp_path / 'checkpoints/4').is_dir()


def test_a_key_that_an_old_workdir_lacks_counts_as_its_default(tmp_path):
    defaults = {'a': {'b': 1, 'c': 2}, 'd': 3}
    assert config_lib.with_defaults({'a': {'b': 5}}, defaults) == {'a': {'b': 5, 'c': 2}, 'd': 3}


def test_a_fault_in_a_config_file_names_its_line(tmp_path):
    path = tmp_path / 'mine.py'
    path.write_text('def get_config(words):\n    return 1 / 0\n')
    with pytest.raises(UserError, match=r'mine.py line 2: ZeroDivisionError'):
        config_lib.load(str(path))
    path.write_text('def get_config(words):\n    return (\n')
    with pytest.raises(UserError, match=r'mine.py line 2: '):
        config_lib.load(str(path))


def test_configs_are_found_by_name_and_printed(tmp_path):
    printed = json.loads(command('--config=stage3:smoke', '--print_config').stdout)
    assert printed['task'] == 'comic' and printed['data']['image_size'] == 32
    done = command('--config=stage4')
    assert done.returncode == 1 and 'installed configs: clip_retrieval, contrabin' in done.stderr
    keys = command('--config=stage3', '--help').stdout
    assert '--config.losses.temperature=0.07' in keys and '(a number above 0)' in keys


def test_a_dry_run_trains_nothing(tmp_path):
    done = command(SMOKE, f'--workdir={tmp_path / "run"}', '--dry_run')
    assert done.returncode == 0, done.stderr
    assert (
        'stage align: 8 updates' in done.stdout
        and 'text: 34,400 parameters, rate frozen' in done.stdout
    )
    assert 'activations and temporaries' in done.stdout
    assert not (tmp_path / 'run').exists()


def test_max_steps_stops_saved_and_the_same_command_continues(tmp_path):
    whole = runs.toy('Thaw', 12)
    unbroken = testing.train(whole, tmp_path / 'whole')
    with pytest.raises(train.StepLimit):
        testing.train(whole, tmp_path / 'run', max_steps=5)
    assert not (tmp_path / 'run/results.json').exists()
    with pytest.raises(train.StepLimit):  # nothing is left to do below the limit
        testing.train(whole, tmp_path / 'run', max_steps=5)
    assert testing.metrics(tmp_path / 'run')[-1]['step'] == 5
    assert testing.train(whole, tmp_path / 'run') == unbroken
    assert testing.metrics(tmp_path / 'run') == testing.metrics(tmp_path / 'whole')


def broken(folder, tmp_path, change):
    root = tmp_path / 'pages'
    shutil.copytree(folder, root)
    change(root)
    return refuse(tmp_path, f'--config.data.root={root}')


def test_bad_folders(folder, tmp_path):
    def without_column(root):
        text = (root / 'pages.csv').read_text()
        (root / 'pages.csv').write_text(text.replace('image_path', 'picture', 1))

    def outside(root):
        lines = (root / 'pages.csv').read_text().splitlines()
        cells = lines[1].split(',')
        lines[1] = ','.join([cells[0], '../../etc/passwd', cells[2]])
        (root / 'pages.csv').write_text('\n'.join(lines) + '\n')

    def malformed(root):
        for path in sorted((root / 'json').iterdir())[:4]:
            path.write_text(path.read_text()[:60])

    def truncated(root):
        for path in sorted((root / 'images').iterdir())[:4]:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    for name, change, expected in (
        ('labels', lambda root: (root / 'labels.json').unlink(), 'labels.json'),
        ('column', without_column, 'image_path'),
        ('outside', outside, 'outside'),
        ('json', malformed, 'json'),
        ('jpeg', truncated, 'images'),
    ):
        (tmp_path / name).mkdir()
        message = broken(folder, tmp_path / name, change)
        assert expected in message, message


def test_a_few_bad_pages_are_skipped_and_counted(folder, tmp_path):
    root = tmp_path / 'pages'
    shutil.copytree(folder, root)
    row = next(l for l in (root / 'pages.csv').read_text().splitlines() if l.endswith('train'))
    picture = root / row.split(',')[1]
    picture.write_bytes(picture.read_bytes()[:500])
    done = command(
        SMOKE,
        f'--workdir={tmp_path / "run"}',
        f'--config.data.root={root}',
        env={'MMJAX_CACHE': str(tmp_path / 'cache')},
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / 'run/results.json').read_text())
    assert 1 in results['skipped'].values(), results['skipped']


def test_help_is_quick():
    import time

    start = time.monotonic()
    done = command('--help')
    assert done.returncode in (0, 1) and '--workdir' in done.stdout + done.stderr
    assert time.monotonic() - start < 5
