"""What becomes of sequences and words: normalisation, augmentation, vocabulary."""

import math

import numpy as np
import pytest

from mmjax import sections
from mmjax.errors import UserError
from mmjax.recipes.sign.augment import Augmentation, Normalization, missing, resampled
from mmjax.recipes.sign.folder import Vocabulary

STREAMS = {'pose': (0, 3), 'left': (3, 5), 'right': (6, 8)}  # column 5 is in none
COMPACT = {'pose': (0, 3), 'left': (3, 5), 'right': (5, 7)}
OFF = dict(stretch=(1.0, 1.0), noise=0.0, stream_dropout=0.0, feature_dropout=0.0, time_masks=0)


def sequences(count=5):
    """Sequences [T, 8] with hands undetected in spans, and values that are not finite."""
    rng = np.random.default_rng(3)
    for place in range(count):
        features = rng.normal(5, 1, (9 + place, 8)) * np.arange(1, 9) + 1e3
        features[2:5, 3:5] = 0
        features[place, 6:8] = 0
        features[3, place % 3] = (np.nan, np.inf, -np.inf)[place % 3]
        features[:, 2] = 7.1  # constant
        features[0, 4] = 0  # one zero is a value
        yield features


def by_hand(differences=False):
    """Returns all frames [N, F'], NaN where missing, a value at a time."""
    parts = []
    for features in sequences():
        features = features.copy()
        for frame in features:
            for start, end in STREAMS.values():
                if all(frame[c] == 0 for c in range(start, end)):
                    frame[start:end] = np.nan
        features[~np.isfinite(features)] = np.nan
        columns = []
        for start, end in STREAMS.values():
            columns.append(features[:, start:end])
            if differences:
                first = features[:1, start:end] * 0
                columns.append(np.concatenate([first, np.diff(features[:, start:end], axis=0)]))
        parts.append(np.concatenate(columns, 1))
    return parts


@pytest.mark.parametrize('differences', [False, True])
def test_statistics_and_sequences_against_numpy(differences):
    normalization = Normalization.measure(sequences(), STREAMS, differences=differences)
    frames = np.concatenate(by_hand(differences))
    constant = [2, 5] if differences else [2]
    changes = [3, 4, 5, 8, 9, 12, 13] if differences else []
    assert np.flatnonzero(normalization.changes).tolist() == changes
    mean, deviation = np.nanmean(frames, axis=0), np.nanstd(frames, axis=0)
    mean[changes], deviation[changes] = 0, np.sqrt(np.nanmean(frames[:, changes] ** 2, axis=0))
    deviation[constant] = 1
    np.testing.assert_allclose(normalization.mean, mean, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(normalization.std, deviation, rtol=1e-9)
    for features, wanted in zip(sequences(), by_hand(differences), strict=True):
        before = features.copy()
        found = normalization(features)
        wanted = np.nan_to_num((wanted - normalization.mean) / deviation)
        assert found.dtype == np.float32 and found.shape == wanted.shape
        np.testing.assert_allclose(found, wanted, atol=2e-3)  # 1000 ± 1 in float32
        assert (found[2:5, 6:8] == 0).all() if differences else (found[2:5, 3:5] == 0).all()
        np.testing.assert_array_equal(features, before)
    joined = np.concatenate([normalization(features) for features in sequences()])
    assert abs(joined.mean(0)[~normalization.changes]).max() < 1e-3
    width = {name: 2 * (b - a) if differences else b - a for name, (a, b) in STREAMS.items()}
    assert {name: b - a for name, (a, b) in normalization.output_streams.items()} == width
    assert list(normalization.output_streams.values())[-1][1] == found.shape[1]


def test_missing_is_a_whole_stream_of_zeros_or_what_is_not_finite():
    features = np.ones((3, 8))
    features[0, 3:5] = 0
    features[1, 3] = 0
    features[2, 5:8] = [0, np.nan, 1]
    rows, columns = np.nonzero(missing(features, STREAMS))
    assert list(zip(rows, columns, strict=True)) == [(0, 3), (0, 4), (2, 6)]
    rows, columns = np.nonzero(missing(features, STREAMS, 'none'))
    assert list(zip(rows, columns, strict=True)) == [(2, 6)]
    plain = Normalization.measure([features], STREAMS, 'none')
    assert plain.mean[3] == pytest.approx(1 / 3) and plain.mean[5] == 1


def test_what_was_never_there_or_is_far_off_stays_finite():
    features = np.ones((4, 8))
    features[:, 3:5] = 0
    features[:, 0] = [1, 1 + 1e-3, 1, 1]
    normalization = Normalization.measure([features], STREAMS)
    assert normalization.mean[3] == 0 and normalization.std[3] == 1
    other = np.full((3, 8), 5.0)
    other[:, 0] = [3e38, -1e25, 1e300]  # the last is missing: it is not finite in float32
    found = normalization(other)
    assert found[:, 0].tolist() == [1e4, -1e4, 0] and (found[:, 3] == 5).all()
    moved = Normalization.measure([features], {'a': (0, 8)}, 'none', True, {'a': 2})
    found = moved(np.where(np.arange(8) < 4, 3e38, -3e38) * [[1], [-1], [0]])
    assert np.isfinite(found).all() and abs(found).max() == np.float32(1e4)
    with pytest.raises(UserError, match='features of 7 columns, but training had 8'):
        normalization(other[:, :7])


def test_a_normalization_is_read_as_it_was_written(tmp_path):
    path = tmp_path / 'normalization.npz'
    written = Normalization.measure(sequences(), STREAMS, 'none', True)
    written.save(path)
    read = Normalization.load(path)
    assert (read.streams, read.width, read.how, read.differences) == (STREAMS, 8, 'none', True)
    assert list(read.streams) == list(STREAMS)
    for features in sequences():
        np.testing.assert_array_equal(read(features), written(features))
    for spoilt in (b'?', path.read_bytes()[:200]):
        path.write_bytes(spoilt)
        with pytest.raises(UserError, match=r'normalization\.npz is not a readable'):
            Normalization.load(path)


@pytest.fixture(scope='module')
def normalised():
    return np.random.default_rng(0).normal(size=(60, 7)).astype(np.float32)


def test_turned_off_it_changes_nothing(normalised):
    found = Augmentation(**OFF)(normalised, COMPACT, 10, np.random.default_rng(0))
    np.testing.assert_array_equal(found, normalised)
    assert found is not normalised


def test_noise_has_its_deviation_in_normalised_units_whatever_a_features_own_was():
    rng = np.random.default_rng(1)
    scale = np.array([1e-3, 1, 1e3, 1, 1, 1, 1, 1e2])
    raw = [rng.normal(size=(4000, 8)) * scale for _ in range(2)]
    normalization = Normalization.measure(raw, STREAMS)
    plain = normalization(raw[0])
    noisy = Augmentation(**OFF | {'noise': 0.25})(plain, COMPACT, 10, rng)
    np.testing.assert_allclose((noisy - plain).std(0), 0.25, rtol=0.05)
    np.testing.assert_allclose((noisy - plain).mean(0), 0, atol=0.02)
    np.testing.assert_allclose(noisy.std(0), math.hypot(1, 0.25), rtol=0.05)


def test_the_length_stays_in_its_range_and_never_falls_below_what_ctc_needs(normalised):
    augmentation, rng = Augmentation(), np.random.default_rng(2)
    for frames in (1, 2, 9, 50, 60, 111):
        found = {augmentation.length(frames, 1, rng) for _ in range(2000)}
        assert max(found) <= math.ceil(round(frames * 1.1, 6)) and min(found) >= frames * 0.9 - 0.5
        assert max(found) >= math.floor(frames * 1.1) and min(found) <= math.ceil(frames * 0.9)
    for needed in (57, 60):
        found = [augmentation.length(60, needed, rng) for _ in range(500)]
        assert min(found) == needed and max(found) == 66
    assert min(augmentation.length(60, 80, rng) for _ in range(500)) == 60
    found = augmentation(normalised, COMPACT, 10, rng)
    assert found.dtype == np.float32 and found.shape[1] == 7


def test_time_is_resampled_linearly_and_the_ends_stay(normalised):
    for length in (1, 2, 54, 60, 66):
        found = resampled(normalised, length)
        at = np.linspace(0, 59, length)
        wanted = [np.interp(at, np.arange(60), normalised[:, c]) for c in range(7)]
        np.testing.assert_allclose(found, np.stack(wanted, 1), atol=1e-5)
    np.testing.assert_array_equal(resampled(normalised[:1], 3), np.tile(normalised[:1], (3, 1)))


def test_gain_and_offset_are_a_feature_s_own_in_all_frames(normalised):
    changes = np.arange(7) >= 5
    of = lambda **wanted: Augmentation(**OFF | wanted)
    rng, known = np.random.default_rng(7), normalised != 0
    one, two = ((known + 0.0).astype(np.float32), np.where(known, 2, 0).astype(np.float32))
    drawn = []
    for _ in range(2000):
        found = of(gain=0.2, offset=0.5)(one, COMPACT, 1, rng, changes)
        values = [np.unique(found[known[:, c], c]) for c in range(7)]
        assert all(len(v) == 1 for v in values) and (found[~known] == 0).all()
        drawn.append([v[0] for v in values])
    both = np.hypot(0.2, 0.5)
    np.testing.assert_allclose(np.mean(drawn, 0), 1, atol=0.05)
    np.testing.assert_allclose(np.std(drawn, 0), np.where(changes, 0.2, both), rtol=0.1)
    found = [of(gain=0.2)(x, COMPACT, 1, np.random.default_rng(1), changes) for x in (one, two)]
    np.testing.assert_allclose(found[1], 2 * found[0], rtol=1e-6)
    found = [of(offset=0.5)(x, COMPACT, 1, np.random.default_rng(1), changes) for x in (one, two)]
    np.testing.assert_allclose(found[1], found[0] + known, rtol=1e-6)


def test_streams_features_and_spans_of_frames_are_dropped_as_often_as_asked(normalised):
    rng, full = np.random.default_rng(4), np.ones((50, 7), np.float32)
    times = 2000
    drop = Augmentation(**OFF | {'stream_dropout': 0.3})
    found = [drop(full, COMPACT, 1, rng) == 0 for _ in range(times)]
    gone = np.array([[f[:, a:b].all() for a, b in COMPACT.values()] for f in found])
    assert (np.array([f.any(0).sum() for f in found]) == gone @ [3, 2, 2]).all()
    assert not gone.all(1).any()
    np.testing.assert_allclose(gone.mean(0), 0.3 - 0.3**3 / 3, atol=0.04)
    drop = Augmentation(**OFF | {'feature_dropout': 0.2})
    gone = [drop(full, COMPACT, 1, rng) == 0 for _ in range(times)]
    assert all((g.all(0) == g.any(0)).all() for g in gone)
    assert np.mean(gone) == pytest.approx(0.2, abs=0.02)
    drop = Augmentation(**OFF | {'time_masks': 2, 'time_mask_share': 0.2})
    gone = [drop(full, COMPACT, 1, rng) == 0 for _ in range(times)]
    assert all((g.all(1) == g.any(1)).all() for g in gone)
    spans = [np.flatnonzero(np.diff(g[:, 0], prepend=False, append=False)) for g in gone]
    assert {len(s) // 2 for s in spans} == {0, 1, 2}
    assert max(g[:, 0].sum() for g in gone) in (19, 20)
    # One mask on average, its span 0 … 10 alike; two overlap now and then.
    assert np.mean(gone) == pytest.approx(0.1, abs=0.01)
    whole = Augmentation(noise=0.0)(full, COMPACT, 1, np.random.default_rng(0))
    again = Augmentation(noise=0.0)(full, COMPACT, 1, np.random.default_rng(0))
    np.testing.assert_array_equal(whole, again)
    assert (full == 1).all()


@pytest.mark.parametrize(
    ('wrong', 'message'),
    [
        ({'stretch': (0.9, 1.1, 1.2)}, r'augmentation\.stretch=\(0\.9, 1\.1, 1\.2\) is not'),
        ({'stretch': (1.1, 1.2)}, r'augmentation\.stretch=\(1\.1, 1\.2\) is not'),
        ({'stretch': (0.0, 1.2)}, r'augmentation\.stretch=\(0\.0, 1\.2\) is not'),
        (
            {'stream_dropout': 1.0},
            r'augmentation\.stream_dropout=1\.0 is not .* and below 1',
        ),
        ({'noise': -0.1}, r'augmentation\.noise=-0\.1 is not a number at least 0'),
        ({'gain': -0.1}, r'augmentation\.gain=-0\.1 is not a number at least 0'),
        ({'time_masks': -1}, r'augmentation\.time_masks=-1 is not an integer at least 0'),
    ],
)
def test_values_out_of_range_are_named(wrong, message):
    with pytest.raises(UserError, match=message):
        sections.parse(Augmentation, wrong, 'augmentation')


def test_the_vocabulary_is_in_first_seen_order_and_both_directions_agree(tmp_path):
    vocabulary = Vocabulary.of([('JOHN', 'ÄPFEL'), (), ('GO', 'JOHN', 'ANN')])
    words = ('<blank>', 'JOHN', 'ÄPFEL', 'GO', 'ANN')
    assert vocabulary.words == words and len(vocabulary) == 5
    assert vocabulary.encode(words[1:]).tolist() == [1, 2, 3, 4]
    assert vocabulary.decode(np.arange(5)) == words
    assert vocabulary.encode(['GO', 'PETER', '<blank>', '']).tolist() == [3, -1, -1, -1]
    assert vocabulary.decode([3, -1]) == ('GO', '<unknown>')
    vocabulary.save(tmp_path / 'vocabulary.txt')
    assert (tmp_path / 'vocabulary.txt').read_text('utf-8').splitlines() == list(words)
    assert Vocabulary.load(tmp_path / 'vocabulary.txt') == vocabulary
    with pytest.raises(IndexError):
        vocabulary.decode([1, 5])


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('JOHN\nMARY\n', r"line 1 is 'JOHN', not '<blank>'"),
        ('', r"line 1 is '', not '<blank>'"),
        ('<blank>\nA\nB\nA\n', r"line 4: 'A' stands twice"),
        ('<blank>\nA\n\nB\n', r"line 3: '' is not one word"),
        ('<blank>\nA B\n', r"line 2: 'A B' is not one word"),
    ],
)
def test_a_spoilt_vocabulary_is_named(tmp_path, text, message):
    path = tmp_path / 'vocabulary.txt'
    path.write_text(text)
    with pytest.raises(UserError, match=r'vocabulary\.txt: ' + message):
        Vocabulary.load(path)
    with pytest.raises(UserError, match='nowhere does not exist'):
        Vocabulary.load(tmp_path / 'nowhere')
