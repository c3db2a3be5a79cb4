"""Built-in signing: the same everywhere, drawn as a body is, and not to be told by neighbours."""

import hashlib
import itertools
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from mmjax.errors import UserError
from mmjax.recipes.sign import data as sign
from mmjax.recipes.sign.augment import Normalization
from mmjax.recipes.sign.synthetic import sentences as synthetic
from mmjax.recipes.sign.synthetic import skeleton
from mmjax.recipes.sign.synthetic.skeleton import STREAMS

SIZES = dict(train=6, dev=4, test=4, signers=3, held_out_signers=2)
RNG = np.random.default_rng(0)


def opened(prepared, split):
    given = {'vocabulary': prepared.vocabulary(), 'normalization': prepared.normalization()}
    return sign.SignSequences(prepared, split, **given)


@pytest.fixture(scope='module')
def drawn():
    """Sentences of six signers of train and two others of test."""
    sizes = dict(train=160, dev=1, test=30, signers=6, held_out_signers=2)
    rows = synthetic.catalogue(0, sizes)
    return {split: [synthetic.sentence(0, split, *row) for row in rows[split]] for split in rows}


def test_everything_is_the_same_in_another_process():
    code = (
        'import hashlib, json, sys\n'
        'from mmjax.recipes.sign.synthetic import sentences as synthetic\n'
        'found = [synthetic.sentence(3, "dev", 1, i) for i in range(4)]\n'
        'assert not {"jax", "tensorflow", "torch"} & set(sys.modules)\n'
        'print(json.dumps([[hashlib.sha256(s.features).hexdigest(), s.glosses, s.spans]\n'
        '                  for s in found]))'
    )
    environment = {'PYTHONHASHSEED': '12345', 'PYTHONPATH': ':'.join(filter(None, sys.path))}
    fresh = subprocess.run(
        [sys.executable, '-c', code], env=environment, capture_output=True, text=True, check=True
    )
    for i, found in reversed(list(enumerate(json.loads(fresh.stdout)))):  # in another order, too
        here = synthetic.sentence(3, 'dev', 1, i)
        digest = hashlib.sha256(here.features).hexdigest()
        assert found == [digest, list(here.glosses), [list(span) for span in here.spans]]
    other = [(4, 'dev', 1, 0), (3, 'test', 1, 0), (3, 'dev', 2, 0), (3, 'dev', 1, 1)]
    digests = {synthetic.sentence(*key).features.tobytes() for key in [(3, 'dev', 1, 0), *other]}
    assert len(digests) == 5


def test_sentences_have_3_to_8_glosses_and_are_in_one_split_only():
    found = {
        split: {synthetic.gloss_sequence(0, split, i) for i in range(300)}
        for split in ('train', 'dev', 'test')
    }
    for one, two in itertools.combinations(found.values(), 2):
        assert not one & two
    for sentences in found.values():
        assert {len(sentence) for sentence in sentences} >= {3, 4, 5, 6, 7}
        assert all(3 <= len(sentence) <= 8 for sentence in sentences)
        assert {word for sentence in sentences for word in sentence} == set(synthetic.GLOSSES)
        repeated = [any(a == b for a, b in itertools.pairwise(s)) for s in sentences]
        assert 0.03 < np.mean(repeated) < 0.2
    assert len(set(synthetic.GLOSSES)) == 48 and len(found['train']) > 250


@pytest.mark.parametrize('seed', range(6))
def test_pairs_differ_in_one_property_and_all_others_in_two(seed):
    signs, pairs = (
        synthetic.signs(seed),
        {frozenset((a, b)) for a, (b, _) in synthetic.PAIRS.items()},
    )
    assert tuple(signs) == synthetic.GLOSSES
    for one, two in itertools.combinations(signs, 2):
        differing = synthetic.differences(signs[one], signs[two])
        if {one, two} not in pairs:
            assert len(differing) > 1
    for one, (two, what) in synthetic.PAIRS.items():
        assert synthetic.differences(signs[one], signs[two]) == {what}
        if what == 'direction':
            assert signs[one].path == 'line' and signs[one].repeats == 1
            assert abs(signs[one].direction - signs[two].direction) == 4
    assert synthetic.signs(seed) != synthetic.signs(seed + 1)


def test_no_signer_is_in_two_splits_and_more_training_leaves_the_others():
    rows = synthetic.catalogue(0, SIZES)
    assert [len(rows[split]) for split in ('train', 'dev', 'test')] == [6, 4, 4]
    people = [{signer for signer, _ in rows[split]} for split in rows]
    assert [len(p) for p in people] == [3, 2, 2] and len(set.union(*people)) == 7
    more = synthetic.catalogue(0, SIZES | {'train': 60, 'signers': 20})
    assert more['dev'] == rows['dev'] and more['test'] == rows['test']
    for key in SIZES:
        with pytest.raises(UserError, match=rf'data\.built_in\.{key} is missing'):
            synthetic.catalogue(0, {k: v for k, v in SIZES.items() if k != key})
        with pytest.raises(UserError, match=rf'data\.built_in\.{key} must be at least 1, got 0'):
            synthetic.catalogue(0, SIZES | {key: 0})


def test_arms_reach_their_wrists_and_keep_their_lengths():
    body = skeleton.Body()
    rng = np.random.default_rng(0)
    wrists = rng.uniform((-1, -1.2), (1.5, 1.6), (300, 2))
    elbows, reached = skeleton.elbow(wrists, body)
    shoulder = np.array([body.shoulders, 0])
    upper, lower = (
        np.linalg.norm(a - b, axis=1) for a, b in ((elbows, shoulder), (reached, elbows))
    )
    assert (upper < body.upper_arm + 1e-9).all() and (lower < body.forearm + 1e-9).all()
    near = np.linalg.norm(wrists - shoulder, axis=1) < body.upper_arm + body.forearm
    np.testing.assert_allclose(reached[near], wrists[near], atol=1e-12)
    across = wrists[near] - shoulder  # at right angles to out and down the elbow bends fully
    straight = abs(across @ (0.66, 0.75)) < 0.05 * np.linalg.norm(across, axis=1)
    np.testing.assert_allclose(upper[near][straight], body.upper_arm, atol=0.02)
    far = np.linalg.norm(reached[~near] - shoulder, axis=1)
    np.testing.assert_allclose(far, body.upper_arm + body.forearm)


def arm(shape='flat', direction=0.0, turn=0.0):
    fingers = skeleton.SHAPES[shape]
    return np.array([[0.3, 0.2, direction, 0.0, turn, *fingers]])


def test_a_hand_points_where_it_should_and_closes():
    length = 0.5
    tips = lambda points: points[0, 3::3]  # thumb … little
    flat = skeleton.hand(arm(), length)
    np.testing.assert_array_equal(flat[0, 0], [0.3, 0.2])
    middle = flat[0, 9] - flat[0, 0]
    assert np.linalg.norm(middle) == pytest.approx(length, rel=0.01) and middle[1] < -0.49  # up
    assert tips(flat)[0, 0] < 0.3 < tips(flat)[4, 0]  # the thumb on the inside
    turned = skeleton.hand(arm(turn=np.pi), length)
    np.testing.assert_allclose(turned[0, :, 0] - 0.3, 0.3 - flat[0, :, 0], atol=1e-12)
    outwards = skeleton.hand(arm(direction=np.pi / 2), length)[0, 9] - [0.3, 0.2]
    np.testing.assert_allclose(outwards, [-middle[1], middle[0]], atol=1e-12)
    index = skeleton.hand(arm('index'), length)
    reach = np.linalg.norm(tips(index) - [0.3, 0.2], axis=1)
    assert reach[1] > 0.43 and (reach[2:] < 0.3).all()
    spread = skeleton.hand(arm('five'), length)
    assert np.ptp(tips(spread)[1:, 0]) > 1.6 * np.ptp(tips(flat)[1:, 0])


def test_a_left_handed_signer_is_the_mirror_image():
    rng = np.random.default_rng(1)
    arms = [np.tile(arm(shape), (4, 1)) + rng.normal(0, 0.1, (4, 11)) for shape in ('two', 'fist')]
    head, body = np.zeros((4, 5)), skeleton.Body()
    camera = skeleton.Camera(centre=(0.5, 0.4))
    right, left = (skeleton.landmarks(*arms, head, body, camera, l) for l in (False, True))
    for name, other in (('left', 'right'), ('right', 'left')):
        a, b = (slice(*STREAMS[n]) for n in (name, other))
        mirrored = left[:, b].reshape(4, -1, 2) * (-1, 1) + (1, 0)
        np.testing.assert_allclose(right[:, a].reshape(4, -1, 2), mirrored, atol=1e-12)
    shoulders = right[:, :4].reshape(4, 2, 2)[..., 0]
    assert (shoulders[:, 0] > 0.5).all() and (shoulders[:, 1] < 0.5).all()
    assert any(synthetic.signer(0, number).left_handed for number in range(40))
    assert not all(synthetic.signer(0, number).left_handed for number in range(40))


def test_a_missed_hand_is_all_zeros_and_nothing_else_is(drawn):
    features = np.concatenate([s.features for split in drawn.values() for s in split])
    assert features.dtype == np.float16 and np.isfinite(features).all()
    for name, (start, end) in STREAMS.items():
        zeros = features[:, start:end] == 0
        share = zeros.all(1).mean()
        assert zeros.any(1).mean() - share < 0.01  # a single coordinate may be 0 at the border
        assert 0.05 < share < 0.6 if name in ('left', 'right') else share == 0
    lengths = [len(s.features) for s in drawn['train']]
    assert min(lengths) >= 35 and max(lengths) <= 200 and 70 < np.median(lengths) < 110
    for signing in drawn['train']:
        ends = [edge for span in signing.spans for edge in span]
        assert ends == sorted(ends) and ends[0] > 0 and ends[-1] < len(signing.features)
        assert len(signing.spans) == len(signing.glosses)


def test_neighbours_of_known_signers_miss_more_than_three_in_ten_signs(drawn):
    normalization = Normalization.measure((s.features for s in drawn['train']), STREAMS)
    cut = {}
    for split, sentences in drawn.items():
        whole = [normalization(s.features) for s in sentences]
        spans = [(f, *span) for f, s in zip(whole, sentences, strict=True) for span in s.spans]
        cut[split] = np.stack(
            [f[np.linspace(a, b - 1, 10).round().astype(int)].ravel() for f, a, b in spans]
        )
    labels = {split: np.array([g for s in x for g in s.glosses]) for split, x in drawn.items()}
    known, asked = cut['train'], cut['test']
    distance = (known**2).sum(1) - 2 * asked @ known.T
    error = np.mean(labels['train'][distance.argmin(1)] != labels['test'])
    assert 0.3 < error < 0.8  # chance is .98


def test_built_in_sentences_are_found_again_by_seed_size_and_code(tmp_path, monkeypatch):
    prepared = sign.prepare_sequences(None, tmp_path, seed=2, synthetic_sizes=SIZES)
    assert prepared.splits == ('train', 'dev', 'test')
    splits = {name: opened(prepared, name) for name in prepared.splits}
    assert [len(data) for data in splits.values()] == [6, 4, 4]
    people = [{data.record(row)['signer'] for row in range(len(data))} for data in splits.values()]
    assert [len(p) for p in people] == [3, 2, 2] and len(set.union(*people)) == 7
    for data in splits.values():
        example = data.example(0, RNG, False)
        assert example['features'].shape == (data.index['length'][0], 92 + 4 * 2)  # mean points
        assert np.isfinite(example['features']).all() and example['features'].std() > 0.3
    read, seen = pathlib.Path.read_bytes, set()
    monkeypatch.setattr(pathlib.Path, 'read_bytes', lambda p: (seen.add(p.name), read(p))[1])
    again = sign.prepare_sequences(None, tmp_path, seed=2, synthetic_sizes=SIZES)
    assert again == prepared and {'sentences.py', 'skeleton.py'} <= seen
    for seed, change in ((3, {}), (2, {'dev': 3})):
        sign.prepare_sequences(None, tmp_path, seed=seed, synthetic_sizes=SIZES | change)
    assert len(os.listdir(tmp_path)) == 3
    with pytest.raises(UserError, match=r'data\.built_in\.train is missing'):
        sign.prepare_sequences(None, tmp_path)
