"""Streams of landmarks: told and read, around their mean, and as changes when time is bent."""

import json
import time

import numpy as np
import pytest

from mmjax.errors import UserError
from mmjax.recipes.sign import data as sign
from mmjax.recipes.sign import (
    folder as sign_folder,
)
from mmjax.recipes.sign.augment import Augmentation, Normalization, resampled
from tests.recipes.sign.test_augment import COMPACT, OFF, STREAMS, sequences
from tests.recipes.sign.test_data import RNG, Folder, frames_of, rewritten, split_of


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path / 'root')


def streams(content):
    return rewritten('streams.json', lambda text: json.dumps(content))


@pytest.mark.parametrize(
    ('spoil', 'message'),
    [
        (lambda f: (f.root / 'streams.json').unlink(), r'streams\.json does not exist'),
        (rewritten('streams.json', lambda t: '{\n"a": [0,'), r'streams\.json line 2: '),
        (streams([[0, 9]]), r'streams\.json is not an object of streams'),
        (streams({}), r'streams\.json is not an object of streams'),
        (streams({'a': [0, 4], 'b': [3, 9]}), r"'a' \[0, 4\] and 'b' \[3, 9\] overlap"),
        (streams({'a': [4, 4]}), r"stream 'a' is \[4, 4\], not \[start, end\]"),
        (streams({'a': [-1, 4]}), r"stream 'a' is \[-1, 4\], not"),
        (streams({'a': [0, 4.0]}), r"stream 'a' is \[0, 4\.0\], not"),
        (streams({'a': [0, 4, 2, 2]}), r"stream 'a' is \[0, 4, 2, 2\], not"),
        (streams({'a': [0, 4, -2]}), r"stream 'a' is \[0, 4, -2\], not"),
        (streams({'a': [0, 4, 3]}), r"'a' has 4 columns, which landmarks of 3 coordinates do not"),
        (streams({'a': [0, 10]}), r"'a' ends at 10, but features/train/Äpfel-0\.npz has 9"),
    ],
)
def test_faults_of_streams_end_at_once(folder, tmp_path, spoil, message):
    spoil(folder)
    with pytest.raises(UserError, match=message) as caught:
        folder.prepare(tmp_path / 'cache', max_fault_share=1.0)
    assert '\n' not in str(caught.value) and not (tmp_path / 'cache').exists()


def test_streams_of_the_config_replace_those_of_the_folder(folder, tmp_path):
    own = folder.prepare(tmp_path / 'cache')
    (folder.root / 'streams.json').unlink()
    given = folder.prepare(tmp_path / 'cache', streams={'b': (6, 9, 3), 'a': (0, 6, 2)})
    assert list(given.streams.items()) == [('a', (0, 6, 2)), ('b', (6, 9, 3))]
    # The records hold all columns: they are those of any streams.
    assert given.directory == own.directory
    around, plain = (given.normalization(around=around) for around in (True, False))
    assert around.output_streams == {'a': (0, 8), 'b': (8, 11)}
    assert plain.output_streams == {'a': (0, 6), 'b': (6, 9)}
    assert own.normalization().output_streams == {'pose': (0, 2), 'left': (2, 5), 'right': (5, 8)}
    for prepared, expected in ((given, around), (own, own.normalization())):  # from the caches
        np.testing.assert_array_equal(prepared.normalization().mean, expected.mean)
        assert prepared.normalization().coordinates == expected.coordinates
    moved = folder.prepare(tmp_path / 'cache', streams={'a': (0, 4, 2), 'b': (6, 9, 3)})
    assert moved.normalization().output_streams == {'a': (0, 6), 'b': (6, 9)}
    for wrong in ({'a': (0, 4), 'b': (3, 9)}, {'a': (4, 4)}):
        with pytest.raises(UserError, match=r'data\.streams: stream'):
            folder.prepare(tmp_path / 'cache', streams=wrong)
    with pytest.raises(UserError, match=r"data\.streams: 'a' ends at 93, the built-in has 92"):
        sign.prepare_sequences(None, tmp_path / 'cache', streams={'a': (0, 93)})


def test_landmarks_of_the_built_in_signers_have_two_numbers(tmp_path):
    sizes = dict(train=2, dev=1, test=1, signers=1, held_out_signers=1)
    prepared = sign.prepare_sequences(None, tmp_path, synthetic_sizes=sizes)
    spans = {'pose': (0, 14), 'left': (14, 48), 'right': (48, 82), 'face': (82, 100)}
    assert prepared.normalization().output_streams == spans


def test_records_are_shared_by_shares_of_faults_and_checked_for_each(folder, tmp_path):
    folder.file('train', 2).unlink()
    many = folder.prepare(tmp_path / 'cache', max_fault_share=0.5)
    assert folder.prepare(tmp_path / 'cache', max_fault_share=0.2).directory == many.directory
    with pytest.raises(UserError, match=r'1 of the 5 rows of split train .* share of 0\.1: see'):
        folder.prepare(tmp_path / 'cache', max_fault_share=0.1)


def test_landmarks_are_told_around_their_mean_point():
    rng = np.random.default_rng(0)
    spans = {'hand': (0, 6), 'nose': (6, 8), 'deep': (8, 14), 'odd': (14, 17)}
    coordinates = {'hand': 2, 'nose': 2, 'deep': 3, 'odd': 0}  # 3 points; 1; 2 of three; none
    features = rng.normal(3, 2, (30, 17))
    features[4, :6] = 0  # an undetected hand
    features[7, 2:4] = np.nan  # one of its landmarks
    measure = lambda *more: Normalization.measure([features], spans, 'zero', False, *more)
    found = measure(coordinates)
    widths = {'hand': (0, 8), 'nose': (8, 10), 'deep': (10, 19), 'odd': (19, 22)}
    assert found.output_streams == widths
    for start, end, n, out in ((0, 6, 2, 0), (8, 14, 3, 10)):
        own = features[:, start:end].copy()
        own[(own == 0).all(1)] = np.nan
        points = own.reshape(30, -1, n)
        centre = np.full((30, n), np.nan)
        for frame in range(30):
            for k in range(n):
                known = points[frame, np.isfinite(points[frame, :, k]), k]
                centre[frame, k] = known.mean() if len(known) else np.nan
        around = np.concatenate([centre, (points - centre[:, None]).reshape(30, -1)], 1)
        wanted = np.nan_to_num((around - np.nanmean(around, 0)) / np.nanstd(around, 0))
        np.testing.assert_allclose(
            found(features)[:, out : out + len(wanted[0])], wanted, atol=1e-5
        )
    plain = measure()(features)
    np.testing.assert_array_equal(
        found(features)[:, [8, 9, 19, 20, 21]], plain[:, [6, 7, 14, 15, 16]]
    )
    # Where the whole hand is moved, only its mean point is.
    moved = features.copy()
    moved[:, :6] += np.tile([0.5, -1.0], 3) * (features[:, :6] != 0)
    change = found(moved)[:, :8] - found(features)[:, :8]
    np.testing.assert_allclose(change[np.arange(30) != 4, 2:], 0, atol=1e-5)
    assert (abs(change[np.arange(30) != 4, :2]) > 0.1).all()


def test_landmarks_around_a_mean_have_differences_and_are_saved(tmp_path):
    coordinates = {'pose': 1, 'left': 1, 'right': 2}
    made = Normalization.measure(sequences(), STREAMS, 'zero', True, coordinates)
    assert made.output_streams == {'pose': (0, 8), 'left': (8, 14), 'right': (14, 18)}
    made.save(tmp_path / 'n.npz')
    loaded = Normalization.load(tmp_path / 'n.npz')
    assert loaded.coordinates == coordinates
    for features in sequences():
        np.testing.assert_array_equal(loaded(features), made(features))
    with np.load(tmp_path / 'n.npz') as arrays:
        old = {**arrays, 'coordinates': np.array(2)}  # one number for all streams, as it once was
    np.savez(tmp_path / 'n.npz', **old)
    with pytest.raises(UserError, match='is not a readable'):
        Normalization.load(tmp_path / 'n.npz')


@pytest.mark.parametrize('length', [41, 61])
def test_a_slower_movement_has_smaller_changes(length):
    rng = np.random.default_rng(0)
    speeds = rng.uniform(1, 3, (9, 1, 7)) * rng.choice([-1, 1], (9, 1, 7))
    drawn = [speed * np.arange(51)[:, None] + rng.normal(size=7) for speed in speeds]
    normalization = Normalization.measure(drawn, COMPACT, 'none', True, {'pose': 1})
    stretch = (length - 1) / 50
    for features in drawn:
        bent = resampled(normalization(features), length, normalization.changes)
        slower = np.stack(
            [np.interp(np.linspace(0, 50, length), np.arange(51), column) for column in features.T],
            1,
        )
        np.testing.assert_allclose(bent[2:], normalization(slower)[2:], rtol=1e-4, atol=1e-4)
        plain = normalization(features)[5][normalization.changes]
        np.testing.assert_allclose(bent[5][normalization.changes], plain / stretch, rtol=1e-4)


@pytest.fixture(scope='module')
def wide(tmp_path_factory):
    """A prepared folder whose columns have deviations of about 1000."""
    place = tmp_path_factory.mktemp('wide')
    folder = Folder(place / 'root', {'train': ['A'] * 40, 'dev': ['A']})
    for at in range(40):
        folder.write('train', at, features=1e3 * frames_of('train', at))
    return folder.prepare(place / 'cache')


def test_augmentation_comes_after_normalisation(wide):
    """Noise of a quarter is a quarter of a deviation, whatever the unit of a column."""
    noisy = split_of(wide, augmentation=Augmentation(**OFF | {'noise': 0.25}))
    apart = []
    for row in range(30, 40):
        plain, changed = (noisy.example(row, RNG, train)['features'] for train in (False, True))
        apart.append(changed - plain)
    np.testing.assert_allclose(np.concatenate(apart).std(0), 0.25, rtol=0.1)
    assert plain.std(0)[1:] == pytest.approx(np.ones(7), rel=0.3)


def test_examples_of_a_slower_movement_have_smaller_changes(wide):
    """The split tells augmentation which columns are changes."""
    normalization = wide.normalization(differences=True)
    slow = Augmentation(**OFF | {'stretch': (1.0, 1.5)})
    data = split_of(wide, augmentation=slow, normalization=normalization)
    plain, bent = (data.example(39, np.random.default_rng(1), t)['features'] for t in (False, True))
    assert len(bent) > 1.2 * len(plain)
    wanted = resampled(plain, len(bent))
    wanted[:, normalization.changes] *= (len(plain) - 1) / (len(bent) - 1)
    np.testing.assert_allclose(bent, wanted, rtol=1e-5, atol=1e-6)


def test_some_rows_and_features_of_a_file_are_splits_of_their_own(wide):
    data = split_of(wide)
    some = data.subset(np.array([7, 3]))
    assert len(some) == 2 and some.index['length'].tolist() == [31, 19]
    for at, row in enumerate((7, 3)):
        assert some.record(at)['id'] == data.record(row)['id'] and some.words(at) == data.words(row)
        for key, value in data.example(row, RNG, False).items():
            np.testing.assert_array_equal(some.example(at, RNG, False)[key], value)
    assert some.fingerprint()['digest'] != data.fingerprint()['digest']
    for frames in (5, 200):
        features = RNG.normal(size=(frames, 9)).astype(np.float32)
        one = data.with_features(features)
        example = one.example(0, RNG, False)
        np.testing.assert_array_equal(example['features'], data.normalization(features))
        assert len(one) == 1 and example['length'] == frames and not len(example['labels'])
        assert max(one.lengths) == (200 if frames == 200 else 128)
        assert one.collate([example], max(one.lengths))['frames'].sum() == frames


def test_vocabularies_are_read_in_time_that_grows_with_their_words(tmp_path):
    """Finding each word among those before it would take half a minute here."""
    words = sign_folder.Vocabulary.of([[f'word{n}' for n in range(60_000)]])
    words.save(tmp_path / 'vocabulary.txt')
    start = time.process_time()
    assert sign_folder.Vocabulary.load(tmp_path / 'vocabulary.txt') == words
    assert time.process_time() - start < 4
