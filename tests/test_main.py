"""The command line as a user meets it: one clear sentence, exit code 1, nothing on disk."""

import json
import shutil

import pytest

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
        ('--config.losses.temprature=0.1', "no key 'temprature' (--config.losses.temprature"),
        ('--config.batch_size=x', 'batch_size'),
        ('--config.data.root=/nowhere/pages', '/nowhere/pages'),
        ('--unknown=1', "'unknown'"),
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
