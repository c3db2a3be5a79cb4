"""--init_from brings along what the weights were learnt with, unless that is declined."""

import dataclasses

import jax
import pytest
from etils import epath

from mmjax.engine import build, modes
from mmjax.engine import config as config_lib
from mmjax.engine.checkpoint import run_of
from mmjax.sections import field
from tests import runs, toy_tasks
from tests.toy_tasks import Model, Thaw


@dataclasses.dataclass(frozen=True)
class WordsModel(Model):
    word: str = field('')


@dataclasses.dataclass(frozen=True)
class WordsConfig(toy_tasks.Config):
    model: WordsModel = WordsModel()


class Words(Thaw):
    """Keeps a word beside its weights."""

    Config = WordsConfig

    def __init__(self, config, assets=None):
        super().__init__(config)
        word = config.model.word
        self.word = (assets / 'word.txt').read_text() if assets else word

    def save_assets(self, workdir):
        (epath.Path(workdir) / 'word.txt').write_text(self.word)


def config(word, **changes):
    out = runs.toy('Thaw', 2)
    out.task = 'tests.engine.test_init_assets:Words'
    out.model.word = word
    return runs.change(out, **changes)


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    workdir = tmp_path_factory.mktemp('source') / 'run'
    runs.run(config('old'), workdir)
    return workdir


@pytest.mark.parametrize('inside', ['', 'best', 'checkpoints', 'checkpoints/2', ':tower→tower'])
def test_weights_bring_their_words(source, inside):
    spec = f'{source}{inside}' if inside.startswith(':') else str(source / inside)
    built = build.run(config('new'), init_from=spec)
    assert built.task.word == 'old'
    assert built.warnings == [f'tokenizer and the like are those of {source}']


def test_words_of_another_run_may_be_declined(source):
    built = build.run(config('new', init__assets=False), init_from=str(source))
    assert built.task.word == 'new' and not built.warnings


def test_a_run_that_goes_on_has_its_own_words(source, tmp_path):
    (tmp_path / 'word.txt').write_text('own')
    built = build.run(config('new'), assets=epath.Path(tmp_path), init_from=str(source))
    assert built.task.word == 'own'


def test_bare_weights_have_none(source, tmp_path):
    assert run_of(str(tmp_path)) is None
    assert run_of(f'{source}/checkpoints/2:a→b') == epath.Path(source)
    built = build.run(config('new'), init_from=str(tmp_path))
    assert built.task.word == 'new' and not built.warnings


def test_training_from_a_run_saves_and_says_so(source, tmp_path, capfd):
    workdir = epath.Path(tmp_path / 'run')
    command = modes.Command('train', workdir, init_from=str(source))
    modes.run(config_lib.resolve(config('new')), command)
    jax.clear_caches()
    assert (workdir / 'word.txt').read_text() == 'old'
    assert f'those of {source}' in capfd.readouterr().out
