"""The sign-language recipe by command line: a smoke run, a prediction, faults in one sentence."""

import json

import numpy as np
import pytest

from tests.recipes.sign.test_task import write
from tests.runs import command

SMOKE = '--config=configs/sign_ctc.py:smoke'
pytestmark = pytest.mark.slow  # a process a test, and programs to compile


@pytest.fixture(scope='module')
def done(tmp_path_factory):
    """Returns (workdir, options) of a run."""
    place = tmp_path_factory.mktemp('smoke')
    options = (f'--workdir={place / "run"}', f'--config.data.cache={place / "cache"}')
    run = command(SMOKE, *options)
    assert run.returncode == 0, run.stderr
    return place / 'run', options


def test_a_smoke_run_leaves_its_scores(done):
    workdir, _ = done
    results = json.loads((workdir / 'results.json').read_text())
    scores = results['final']['test']
    wanted = {'wer', 'ser', 'substitutions', 'deletions', 'insertions', 'wer_beam', 'ctc'}
    assert {*wanted, 'ctc_per_label', 'temporal_variance'} <= set(scores)
    assert all(np.isfinite(scores[name]) for name in wanted)
    assert set(results['stages']) == {'train', 'finetune'} and 'infeasible' in results['skipped']
    for name in ('vocabulary.txt', 'normalization.npz', 'report.html'):
        assert (workdir / name).is_file()


def test_a_file_is_read(done, tmp_path):
    _, options = done
    np.savez(tmp_path / 'a.npz', features=np.random.default_rng(0).random((50, 92), np.float32))
    asked = f'--input={tmp_path / "a.npz"}', f'--output={tmp_path}'
    read = command(SMOKE, *options, '--mode=predict', *asked)
    assert read.returncode == 0, read.stderr
    assert 'beam search:' in read.stdout and (tmp_path / 'glosses.json').is_file()


def test_a_run_may_be_read_with_another_decoder_but_no_other_data(done):
    workdir, options = done
    other = ('--config.decode.beam=2', '--config.decode.language_model=0.5')
    read = command(SMOKE, *options, '--mode=evaluate', *other)
    assert read.returncode == 0, read.stderr
    assert '"wer_beam"' in read.stdout
    for mode, change, message in (
        ('evaluate', '--config.data.buckets=2', f'another --workdir with --init_from={workdir}'),
        ('evaluate', '--overwrite', '--overwrite starts a run anew, --mode=evaluate does not'),
        ('train', other[0], 'decode.beam was 4, is 2 (--overwrite, or another --workdir)'),
    ):
        refused = command(SMOKE, *options, f'--mode={mode}', change)
        assert refused.returncode == 1 and message in refused.stderr, refused.stderr


def without(name, column):
    def spoil(root):
        path = root / f'annotations/{name}.corpus.csv'
        path.write_text(path.read_text().replace(column, ''))

    return spoil


@pytest.mark.parametrize(
    ('spoil', 'options', 'message'),
    [
        (
            without('train', 'signer|'),
            (),
            "train.corpus.csv has no column 'signer' (columns: id, annotation)",
        ),
        (
            lambda r: np.savez(r / 'features/train/train1.npz', features=np.ones((9, 6), int)),
            (),
            'features/train/train1.npz: features are int64 (9, 6), not float16, float32',
        ),
        (
            lambda r: (r / 'annotations/dev.corpus.csv').write_text('id|signer|annotation'),
            (),
            'dev.corpus.csv has no sentence',
        ),
        (
            lambda r: (r / 'features/train/train1.npz').write_bytes(b'PK'),
            (),
            'features/train/train1.npz cannot be read',
        ),
        (lambda r: None, ('--config.data.streams.hands=0',), 'data.streams.hands='),
        (lambda r: None, ('--config.data.buckets=0',), 'data.buckets=0 is not an integer at least'),
    ],
)
def test_a_fault_is_one_sentence_and_exit_code_1(tmp_path, spoil, options, message):
    root = write(tmp_path / 'root')
    spoil(root)
    told = (f'--config.data.root={root}', f'--config.data.cache={tmp_path / "cache"}')
    failed = command(SMOKE, f'--workdir={tmp_path / "run"}', *told, *options)
    assert failed.returncode == 1 and 'Traceback' not in failed.stderr
    assert message in failed.stderr and not (tmp_path / 'run').exists()
