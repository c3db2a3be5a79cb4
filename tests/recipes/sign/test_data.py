"""Signed sentences: folders, every fault by name, what examples hold, and batches."""

import json
import os
import pickle

import numpy as np
import pytest

from mmjax.data import pipeline, records, samplers
from mmjax.errors import UserError
from mmjax.recipes.sign import augment
from mmjax.recipes.sign import data as sign
from mmjax.recipes.sign import folder as sign_folder

STREAMS = {'pose': [0, 2], 'left': [2, 5], 'right': [6, 9]}  # column 5 is in none
F, USED = 9, [0, 1, 2, 3, 4, 6, 7, 8]
SENTENCES = {
    'train': ['JOHN CAN GO', 'MARY SEE SEE JOHN', 'GO', 'BOOK MARY GIVE JOHN NOW', 'CAN NOW'],
    'dev': ['MARY GO', 'PETER SEE <unknown> NOW', 'JOHN'],
}
RNG = np.random.default_rng(0)


def frames_of(split, place):
    """Frames of a sentence: its length and its first column tell which it is."""
    rng = np.random.default_rng([place, len(split)])
    features = rng.normal(3, 2, (10 + 3 * place, F)).astype(np.float32)
    features[:, 0] = place + 100 * (split == 'dev')
    return features


class Folder:
    """A folder of sentences to be spoilt; ids sort in another order than the table has them."""

    def __init__(self, root, sentences=None, phoenix=False):
        self.root = root
        (root / 'annotations').mkdir(parents=True)
        (root / 'streams.json').write_text(json.dumps(STREAMS))
        for split, texts in (sentences or SENTENCES).items():
            (root / 'features' / split).mkdir(parents=True)
            lines = ['id|folder|signer|annotation' if phoenix else 'id|signer|annotation']
            for place, text in enumerate(texts):
                name = self.name(place)
                folder = f'|{name}/1/*.png' if phoenix else ''
                lines.append(f'{name}{folder}|signer{int(place % 3 == 1)}|{text}')
                self.write(split, place, features=frames_of(split, place))
            self.table(split).write_text('\n'.join(lines) + '\n')

    def name(self, place):
        return f'{"zebra" if place % 2 else "Äpfel-"}{place}'

    def table(self, split):
        return self.root / 'annotations' / f'{split}.corpus.csv'

    def file(self, split, place):
        return self.root / 'features' / split / f'{self.name(place)}.npz'

    def write(self, split, place, **arrays):
        np.savez(self.file(split, place), **arrays)

    def prepare(self, cache, **options):
        return sign.prepare_sequences(self.root, cache, **options)


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path / 'root')


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
    """Not to spoil."""
    place = tmp_path_factory.mktemp('sign')
    return Folder(place / 'root').prepare(place / 'cache')


def split_of(prepared, split='train', **options):
    given = {'vocabulary': prepared.vocabulary(), 'normalization': prepared.normalization()}
    return sign.SignSequences(prepared, split, **given | options)


def test_features_belong_to_the_annotation_of_their_row(prepared):
    vocabulary, normalization = prepared.vocabulary(), prepared.normalization()
    for split, texts in SENTENCES.items():
        data = split_of(prepared, split)
        assert len(data) == len(texts)
        for row, text in enumerate(texts):
            example, record = data.example(row, RNG, False), data.record(row)
            features = frames_of(split, row)
            np.testing.assert_array_equal(records.unpack(record['features']), features)
            wanted = (features[:, USED] - normalization.mean) / normalization.std
            np.testing.assert_allclose(example['features'], wanted, atol=1e-5)
            assert data.words(row) == tuple(text.split()) == tuple(record['words'])
            known = [w if w in vocabulary.words else sign_folder.UNKNOWN for w in text.split()]
            assert list(vocabulary.decode(example['labels'])) == known
            assert data.index['length'][row] == example['length'] == 10 + 3 * row
        assert data.index['n_labels'].tolist() == [len(text.split()) for text in texts]
        signers = [data.record(row)['signer'] for row in range(len(texts))]
        assert signers == [f'signer{n}' for n in (0, 1, 0, 0, 1)][: len(texts)]
    assert split_of(prepared).index['needed'].tolist() == [3, 5, 1, 5, 2]


def test_an_unknown_word_keeps_its_place_and_is_never_the_blank(prepared):
    data = split_of(prepared, 'dev')
    labels = data.example(1, RNG, False)['labels'].tolist()
    assert labels == [-1, 5, -1, 8]
    assert ' '.join(data.vocabulary.words) == '<blank> JOHN CAN GO MARY SEE BOOK GIVE NOW'
    assert data.counts['unknown_words'] == 2
    assert data.vocabulary.decode(labels) == ('<unknown>', 'SEE', '<unknown>', 'NOW')
    assert data.vocabulary.encode(['<blank>', '<unknown>', '']).tolist() == [-1, -1, -1]
    train = split_of(prepared).counts
    # CTC can align no row with a word that has no number.
    assert (data.index['length'] >= data.index['needed']).all()
    assert data.counts['unalignable_rows'] == 1
    assert train['unknown_words'] == 0 and train['unalignable_rows'] == 0


@pytest.mark.parametrize('phoenix', [False, True])
def test_both_layouts_marks_line_ends_and_quotes_are_read(tmp_path, phoenix):
    folder = Folder(tmp_path / 'root', phoenix=phoenix)
    for split in SENTENCES:
        text = folder.table(split).read_text().replace('GO', '"GO').replace('\n', '\r\n\r\n')
        folder.table(split).write_bytes(b'\xef\xbb\xbf' + text.encode())
    prepared = folder.prepare(tmp_path / 'cache')
    assert prepared.sentences('train')[:3] == [
        ('JOHN', 'CAN', '"GO'),
        ('MARY', 'SEE', 'SEE', 'JOHN'),
        ('"GO',),
    ]
    record = split_of(prepared).record(1)
    assert (record['line'], record['signer']) == (5, 'signer1')


def test_the_second_split_is_called_as_the_folder_does_and_test_may_be_there(tmp_path):
    for number, (second, third) in enumerate([('dev', []), ('val', ['test'])]):
        sentences = {'train': ['A B'], second: ['B']} | {name: ['A'] for name in third}
        prepared = Folder(tmp_path / str(number), sentences).prepare(tmp_path / 'cache')
        assert prepared.splits == ('train', second, *third)
        assert split_of(prepared, second).split == second
    data = split_of(prepared, 'test')
    assert data.example(0, RNG, False)['labels'].tolist() == [1] and data.lengths == (16,)


def rewritten(name, change):
    def spoil(folder):
        path = folder.root / name
        path.write_text(change(path.read_text()))

    return spoil


TRAIN, DEV = 'annotations/train.corpus.csv', 'annotations/dev.corpus.csv'


@pytest.mark.parametrize(
    ('spoil', 'message'),
    [
        (lambda f: setattr(f, 'root', f.root / 'nowhere'), r'root.nowhere is not a folder'),
        (lambda f: f.table('train').unlink(), r'train\.corpus\.csv does not exist'),
        (lambda f: f.table('dev').unlink(), r'dev\.corpus\.csv does not exist'),
        (lambda f: f.table('val').write_text(f.table('dev').read_text()), r'has both dev\.'),
        (rewritten(TRAIN, lambda t: ''), r"train\.corpus\.csv has no column 'id' \(columns: \)"),
        (
            rewritten(TRAIN, lambda t: t.replace('signer|', '')),
            r"no column 'signer' \(columns: id, ann",
        ),
        (
            rewritten(TRAIN, lambda t: t.replace('|', ',')),
            r"no column 'id' \(columns: id,signer,annota",
        ),
        (
            rewritten(DEV, lambda t: t.replace('id|', 'name|')),
            r"dev\.corpus\.csv has no column 'id'",
        ),
        (rewritten(DEV, lambda t: t.split('\n')[0]), r'dev\.corpus\.csv has no sentence'),
        (rewritten(TRAIN, lambda t: t + 'zebra1|x|A\n'), r"lines 3 and 7 have the id 'zebra1'"),
        (rewritten(TRAIN, lambda t: t + '../x|x|A\n'), r"line 7: the path '\.\./x' leads out"),
        (rewritten(TRAIN, lambda t: t + '..|x|A\n'), r"line 7: the path '\.\.' leads outside"),
        (rewritten(TRAIN, lambda t: t + '/etc/x|x|A\n'), r"line 7: the path '/etc/x' leads out"),
        (rewritten(TRAIN, lambda t: t + 'a\0b|x|A\n'), r"line 7: the path 'a\\x00b' leads o"),
        (rewritten(TRAIN, lambda t: t + 'x|x|A <blank>\n'), r"7: the gloss '<blank>' is taken"),
        (
            lambda f: f.table('dev').write_bytes(b'id|signer|annotation\nx|\xff|A'),
            r'dev\.corpus\.csv is not a',
        ),
        (lambda f: (f.root / 'features').rename(f.root / 'f'), r'none can be read: .*not exist'),
    ],
)
def test_faults_of_structure_end_at_once(folder, tmp_path, spoil, message):
    spoil(folder)
    with pytest.raises(UserError, match=message) as caught:
        folder.prepare(tmp_path / 'cache', max_fault_share=1.0)
    assert '\n' not in str(caught.value) and not (tmp_path / 'cache').exists()


def half_empty(more):
    features = frames_of('train', 2)
    features.reshape(-1)[: features.size // 2 + more] = np.nan
    return lambda f: f.write('train', 2, features=features)


@pytest.mark.parametrize(
    ('spoil', 'reason', 'message'),
    [
        (lambda f: f.file('train', 2).unlink(), 'missing_features', r'Äpfel-2\.npz does not exist'),
        (lambda f: f.file('train', 2).write_bytes(b'PK'), 'unreadable_features', 'cannot be read'),
        (lambda f: os.truncate(f.file('train', 2), 300), 'unreadable_features', 'cannot be read'),
        (
            lambda f: f.write('train', 2, features=np.array([{}, 1])),
            'unreadable_features',
            r'features/train/Äpfel-2\.npz cannot be read: Object arrays',
        ),
        (
            lambda f: f.write('train', 2, x=np.ones(3)),
            'unreadable_features',
            "no 'features', but",
        ),
        (lambda f: f.write('train', 2, features=np.ones((4, F), int)), 'malformed_features', 'int'),
        (
            lambda f: f.write('train', 2, features=np.ones((0, F))),
            'malformed_features',
            r'features are float64 \(0, 9\), not float16, .* \[frames, 9\]',
        ),
        (
            lambda f: f.write('train', 2, features=np.ones((4, 8))),
            'malformed_features',
            r'features are float64 \(4, 8\), not float16, .* \[frames, 9\]',
        ),
        (half_empty(1), 'not_finite', '5.% of the values are not finite'),
        (
            rewritten(TRAIN, lambda t: t.replace('|GO\n', '|\n')),
            'malformed_row',
            '4 has an empty anno',
        ),
        (rewritten(TRAIN, lambda t: t.replace('|GO', '|G|')), 'malformed_row', '4 has 4 fields'),
        (
            rewritten(TRAIN, lambda t: t.replace('Äpfel-2', '')),
            'malformed_row',
            'line 4 has an empty id',
        ),
    ],
)
def test_faults_of_rows_are_named_or_left_out_and_counted(folder, tmp_path, spoil, reason, message):
    spoil(folder)
    with pytest.raises(UserError, match=message + r'.*\(row 4\): 1 of the 5 rows of split train'):
        folder.prepare(tmp_path / 'cache')
    assert not (tmp_path / 'cache').exists()
    data = split_of(folder.prepare(tmp_path / 'cache', max_fault_share=0.2))
    assert len(data) == 4 and data.skipped == {reason: 1}
    assert [data.example(row, RNG, False)['length'] for row in range(4)] == [10, 13, 19, 22]


def test_a_sentence_may_have_no_signer(folder, tmp_path):
    rewritten(TRAIN, lambda t: t.replace('signer0', '').replace('signer1', ' '))(folder)
    data = split_of(folder.prepare(tmp_path / 'cache'))
    assert len(data) == 5 and [data.record(row)['signer'] for row in range(5)] == [''] * 5


def test_values_not_finite_are_counted_missing_and_zero(folder, tmp_path):
    half_empty(0)(folder)
    huge = frames_of('train', 1).astype(np.float64)
    huge[3, 4] = 1e300
    folder.write('train', 1, features=huge)
    prepared = folder.prepare(tmp_path / 'cache')
    data = split_of(prepared)
    assert data.counts['values_not_finite'] == 16 * F // 2 + 1
    assert data.example(1, RNG, False)['features'][3, 4] == 0
    assert (data.example(2, RNG, False)['features'][:8] == 0).all()
    kept = [np.delete(frames_of('train', 1), 3, 0), *(frames_of('train', i) for i in (0, 3, 4))]
    kept += [frames_of('train', 2)[8:]]
    column = np.concatenate(kept)[:, 4].astype(np.float64)
    np.testing.assert_allclose(prepared.normalization().mean[4], column.mean(), rtol=1e-12)


@pytest.mark.parametrize('dtype', ['float16', 'float32', 'float64', '>f4'])
def test_features_are_kept_as_they_are_up_to_float32(folder, tmp_path, dtype):
    for split, texts in SENTENCES.items():
        for place in range(len(texts)):
            folder.write(split, place, features=frames_of(split, place).astype(dtype))
    data = split_of(folder.prepare(tmp_path / 'cache'))
    stored = records.unpack(data.record(1)['features'])
    assert stored.dtype == np.dtype('float16' if dtype == 'float16' else 'float32')
    np.testing.assert_array_equal(stored, frames_of('train', 1).astype(stored.dtype))
    assert data.example(1, RNG, False)['features'].dtype == np.float32


def test_statistics_are_of_training_alone_and_travel_with_the_model(prepared, tmp_path):
    normalization = prepared.normalization()
    train = np.concatenate([frames_of('train', i) for i in range(5)]).astype(np.float64)[:, USED]
    np.testing.assert_allclose(normalization.mean, train.mean(0), rtol=1e-12)
    np.testing.assert_allclose(normalization.std, train.std(0), rtol=1e-10)
    cached = prepared.normalization()  # read back from beside the records
    normalization.save(tmp_path / 'normalization.npz')
    loaded = augment.Normalization.load(tmp_path / 'normalization.npz')
    a, b, c = (split_of(prepared, 'dev', normalization=n) for n in (normalization, cached, loaded))
    assert a.fingerprint() == b.fingerprint() == c.fingerprint()
    assert a.streams == c.streams == {'pose': (0, 2), 'left': (2, 5), 'right': (5, 8)}
    wide = split_of(prepared, normalization=prepared.normalization(differences=True))
    assert wide.streams == {'pose': (0, 4), 'left': (4, 10), 'right': (10, 16)}
    assert wide.example(0, RNG, False)['features'].shape == (10, 16)


def test_a_batch_pads_frames_and_labels_and_says_where(prepared):
    data = split_of(prepared)
    examples = [data.example(row, RNG, False) for row in (1, 4)]
    batch = data.collate(examples, 24)
    assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
        'features': ((2, 24, 8), 'float32'),
        'frames': ((2, 24), 'bool'),
        'labels': ((2, 8), 'int32'),
        'label_mask': ((2, 8), 'bool'),
        'length': ((2,), 'int32'),
    }
    assert batch['length'].tolist() == [13, 22] == batch['frames'].sum(1).tolist()
    assert batch['labels'][0].tolist() == [4, 5, 5, 1, 0, 0, 0, 0]
    assert batch['label_mask'].sum(1).tolist() == [4, 2] and batch['label_mask'][0, 3]
    for row, example in enumerate(examples):
        real = batch['features'][row][batch['frames'][row]]
        np.testing.assert_array_equal(real, example['features'])
        assert (batch['features'][row][~batch['frames'][row]] == 0).all()
        assert not batch['frames'][row, example['length'] :].any()
    assert data.collate(examples, 0)['features'].shape[1] == data.lengths[-1] == 24
    with pytest.raises(UserError, match='a sequence of 22 frames in a bucket of 16'):
        data.collate(examples, 16)


def test_few_bucket_lengths_hold_every_row_however_long_it_gets(prepared, tmp_path):
    augmentation = augment.Augmentation(stretch=(0.9, 1.5))
    data = split_of(prepared, augmentation=augmentation)  # 10 13 16 19 22, times 1.5
    assert data.lengths == (16, 24, 32, 40)
    assert split_of(prepared, buckets=1).lengths == (24,)
    assert split_of(prepared, buckets=(30, 22)).lengths == (22, 30)
    spec = {'name': 'bucketed', 'by': data.length_key, 'stretch': 1.5}
    sampler = samplers.make(spec, data.index, 5, 2, seed=0, stage=0, lengths=data.lengths)
    batches = pipeline.batches(data, sampler, seed=0, stage=0, stop=30, train=True, threads=0)
    shapes, seen = set(), set()
    for batch in batches:
        shapes, seen = shapes | {batch['features'].shape}, seen | set(batch['length'].tolist())
    assert shapes == {(2, length, 8) for length in data.lengths} and len(seen) > 12
    long = Folder(tmp_path / 'long', {'train': ['A', 'A'], 'dev': ['A B'] * 14})
    data = split_of(long.prepare(tmp_path / 'cache'), 'dev')  # up to 49 frames
    assert data.lengths == (16, 56) and split_of(prepared, 'dev').lengths == (16, 24)


def test_packed_lengths_are_what_nearly_all_batches_need(tmp_path):
    lengths = np.random.default_rng(3).integers(10, 61, 300)
    folder = Folder(tmp_path / 'root', {'train': ['GO'] * 300, 'dev': ['GO']})
    for place, length in enumerate(lengths):
        folder.write('train', place, features=np.ones((length, F), np.float32))
    prepared, stretch = folder.prepare(tmp_path / 'cache'), (0.8, 1.25)
    data = split_of(prepared, augmentation=augment.Augmentation(stretch), buckets=2)
    assert len(data.lengths) == 2
    rng, longest = np.random.default_rng(0), np.ceil(lengths * 1.25 - 1e-6)
    for rows in (4, 16):
        packed = data.packed_lengths(rows)
        assert set(packed) == set(data.lengths)
        for below, length in zip((0, *data.lengths), data.lengths, strict=False):
            own = lengths[(longest > below) & (longest <= length)]
            drawn = [
                rng.choice(own, rows, False) @ rng.uniform(*stretch, rows) for _ in range(2000)
            ]
            needed = np.array(drawn) / rows
            assert 0.95 < (needed <= packed[length]).mean() < 1
            errors = (packed[length] - needed.mean()) / needed.std()
            assert 1.75 < errors < 2.25 and packed[length] < 0.9 * length
    assert all(data.packed_lengths(4)[n] > data.packed_lengths(16)[n] for n in data.lengths)
    # Where a batch is all there is, nothing is drawn but the tempo.
    plain = split_of(prepared, augmentation=augment.Augmentation((1.0, 1.0)), buckets=1)
    assert plain.packed_lengths(300) == {plain.lengths[0]: pytest.approx(lengths.mean())}


def test_lengths_that_are_nearly_full_have_no_room():
    assert samplers.packed_length(80.0, 0.0, 4, 100) == 80.0
    assert samplers.packed_length(80.0, 36.0, 4, 100) is None  # 80 + 4 · 6 / 2 = 92
    assert samplers.packed_length(80.0, 36.0, 16, 100) == 86.0
    assert samplers.packed_length(80.0, 36.0, 4, 100, standard_errors=2.0) == 86.0
    assert samplers.packed_length(0.0, 0.0, 4, 100) is None


def test_in_evaluation_every_row_is_seen_once_in_order(prepared):
    data = split_of(prepared)
    spec = {'name': 'sequential', 'by': data.length_key}
    sampler = samplers.make(spec, data.index, 5, 2, seed=0, stage=0, lengths=data.lengths)
    batches = list(pipeline.batches(data, sampler, seed=0, stage=0, stop=3, train=False, threads=0))
    assert [batch['features'].shape[1] for batch in batches] == [16, 24, 24]
    seen = [int(n) for batch in batches for n in batch['length'][batch['mask']]]
    assert seen == [10, 13, 16, 19, 22]


def test_rows_that_cannot_be_aligned_are_counted(tmp_path):
    folder = Folder(tmp_path / 'root', {'train': ['A ' * 6, 'A ' * 7], 'dev': ['A']})
    data = split_of(folder.prepare(tmp_path / 'cache'))
    assert data.index['needed'].tolist() == [11, 13] and data.counts['unalignable_rows'] == 1


def test_prepared_sentences_are_found_again_until_a_file_changes(folder, tmp_path, monkeypatch):
    first = split_of(folder.prepare(tmp_path / 'cache'))
    with monkeypatch.context() as patch:
        patch.setattr(records, 'pack', None)
        again = split_of(folder.prepare(tmp_path / 'cache'))
    assert again.fingerprint() == first.fingerprint()
    folder.write('dev', 0, features=frames_of('dev', 0)[:7])
    changed = folder.prepare(tmp_path / 'cache')
    assert split_of(changed, 'dev').index['length'].tolist() == [7, 13, 16]
    assert split_of(changed).fingerprint() == first.fingerprint()
    folder.write('train', 0, features=frames_of('train', 0)[:7])
    new, old = split_of(folder.prepare(tmp_path / 'cache')).fingerprint(), first.fingerprint()
    assert {k for k in old if old[k] != new[k]} == {'digest', 'normalization'}


def test_pickled_it_gives_the_same_examples(prepared):
    data = split_of(prepared, augmentation=augment.Augmentation())
    copy = pickle.loads(pickle.dumps(data))
    for train in (False, True):
        one, two = (d.example(3, np.random.default_rng(5), train) for d in (data, copy))
        for key in one:
            np.testing.assert_array_equal(one[key], two[key])
    three = data.example(3, np.random.default_rng(6), True)['features']
    assert three.shape != two['features'].shape or (three != two['features']).any()
    plain = split_of(prepared).example(3, np.random.default_rng(5), True)['features']
    np.testing.assert_array_equal(plain, data.example(3, RNG, False)['features'])
