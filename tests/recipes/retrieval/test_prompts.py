"""Prompts: read, written, compared with images, and short enough for the tokenizer in use."""

import json
import os
import random

import pytest

from mmjax.data.clip_tokenizer import CUTS, sentences, shorten, token_counter, train_clip_tokenizer
from mmjax.data.tokenizers import train_tokenizer
from mmjax.errors import UserError
from mmjax.recipes.retrieval import prompts

CORPUS = ['A clothing item in red. A soft cotton shirt with a round neck. Machine wash at 30.'] * 4
ITEMS = [
    {'item': 'a', 'color': 'Red', 'description': ['Soft {cotton}.', '  ', ' A shirt. ']},
    {'item': 'b', 'color': None, 'description': 'One sentence'},
    {'item': 'c', 'color': ' ', 'description': []},
    {'item': 'd', 'color': 'Navy', 'description': []},
]
TEMPLATES = ('A {noun} in {color}. {description}', 'clothing item', 'A {noun}. {description}')
ADVERSARIAL = [
    'x' * 10_000,
    'é' * 10_000,
    '日本' * 2000,
    '日本語です。' * 300,
    '。' * 1000,
    '.' * 10_000,
    '. ' * 1000,
    '... ' * 1000 + 'end',
    'a. ' * 1000,
    'a b ' * 1000,
    '😀' * 1000,
    '😀 ' * 1000,
    '👩‍👩‍👧‍👦 family. ' * 300,
    '',
    ' \n\t',
    '\0',
    '\0\x1c\x1f' * 2000,
    '\n' * 2000 + 'b',
    '\u200b' * 1000,
    'line\n' * 500,
    'no stop at all ' * 300,
    'мир، سلام 日本 नमस्ते। ' * 300,
    'x' * 10_000 + '. Short one. ' + 'y' * 10_000,
    'Short one. ' + 'y' * 10_000,
    'y' * 10_000 + '. ' + 'word ' * 400,
    '"' * 10_000,
    'e\u0301' * 2000,
    'U+FDFA \ufdfa' * 300,
    '<|endoftext|> ' * 300,
    ' ' * 10_000 + 'a',
    "'s" * 1000,
]


def words_and_two(text):
    return len(text.split()) + 2


def save(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding='utf-8')
    return path


def test_descriptions_are_read_in_one_form(tmp_path):
    path = save(tmp_path / 'd.json', '\ufeff' + json.dumps(ITEMS))
    read = prompts.read_descriptions(path)
    assert read[0] == ITEMS[0]
    assert read[1] == {'item': 'b', 'color': '', 'description': ['One sentence']}
    assert read[2]['color'] == ''


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        ('[\n{"item": "a",\n]', r'd\.json line 3: '),
        ('{}', r'd\.json is not a list'),
        ([ITEMS[0], {'item': 'b'}], r"d\.json: description 2 has no 'description'"),
        ([{'description': []}], r"description 1 has no 'item'"),
        (['a'], r"description 1 has no 'item'"),
        ([{'item': 3, 'description': []}], r'description 1 \(3\): 3 is not a string'),
        ([{'item': 'a', 'description': 3}], r"\('a'\): the description is no list"),
        ([{'item': 'a', 'description': ['x', None]}], r"\('a'\): None is not a string"),
        ([{'item': 'a', 'color': 0, 'description': []}], r"\('a'\): 0 is not a string"),
        ([ITEMS[0], ITEMS[0]], r"description 2: the item 'a' is blank or stands twice"),
        ([{'item': ' ', 'description': []}], 'is blank or stands twice'),
        ('[{"item": "a", "item": "b", "description": []}]', r"json: 'item' stands twice"),
        ('[{"item": "a", "description": "\\ud800"}]', 'half a surrogate'),
        ('[' * 100_000, 'cannot be read'),
    ],
)
def test_faults_of_descriptions_are_named(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        prompts.read_descriptions(save(tmp_path / 'd.json', content))


def test_faults_of_prompts_are_named(tmp_path):
    path = tmp_path / 'p.json'
    for content, message in (
        ([], r'p\.json is not an object'),
        ({'a': ['x']}, r"p\.json: the prompt of 'a': \['x'\] is not a string"),
        ('{"a": "x",\n\n "a": "y"}', r"p\.json: 'a' stands twice"),
        ('{"a": "x"\n"b": "y"}', r'p\.json line 2: '),
    ):
        with pytest.raises(UserError, match=message):
            prompts.read_prompts(save(path, content))
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(UserError, match=r'p\.json line 1: not UTF-8'):
        prompts.read_prompts(path)
    with pytest.raises(UserError, match=r'none does not exist'):
        prompts.read_prompts(tmp_path / 'none')


def test_prompts_are_written_sorted_whole_and_read_back(tmp_path, monkeypatch):
    path = tmp_path / 'new' / 'p.json'
    prompts.write(path, {'b': 'zwei “ü” 日本', 'a': 'one'})
    assert list(prompts.read_prompts(path)) == ['a', 'b']
    first = path.read_bytes()
    assert '日本'.encode() in first
    prompts.write(path, {'a': 'one', 'b': 'zwei “ü” 日本'})
    assert path.read_bytes() == first

    def full(*_):
        raise OSError('no space')

    monkeypatch.setattr(os, 'replace', full)
    with pytest.raises(OSError, match='no space'):
        prompts.write(path, {})
    assert path.read_bytes() == first and os.listdir(path.parent) == ['p.json']


def test_templates_are_filled_and_dropped_without_color():
    assert prompts.generate(ITEMS, *TEMPLATES) == {
        'a': 'A clothing item in Red. Soft {cotton}. A shirt.',
        'b': 'A clothing item. One sentence',
        'c': 'A clothing item.',
        'd': 'A clothing item in Navy.',
    }
    made = prompts.generate(ITEMS[:2], '{color} {noun}', 'bag', 'some {noun}: {description}')
    assert made == {'a': 'Red bag', 'b': 'some bag: One sentence'}
    assert prompts.noun_alone('bag', TEMPLATES[2]) == 'A bag.'


@pytest.mark.parametrize(
    'template',
    ['{size}', '{}', '{0}', '{noun.x}', '{noun!r}', '{noun:>9}', '{noun', 'a } b', '{noun[0]}'],
)
def test_faulty_templates_are_refused(template):
    for arguments in ((template, *TEMPLATES[1:]), (*TEMPLATES[:2], template)):
        with pytest.raises(UserError, match=r'the template .* (has|is malformed)'):
            prompts.generate(ITEMS, *arguments)
    with pytest.raises(UserError, match="has 'color'"):
        prompts.generate(ITEMS, TEMPLATES[0], 'x', TEMPLATES[0])
    with pytest.raises(UserError, match="'a' is blank or stands twice"):
        prompts.generate([ITEMS[0], ITEMS[0]], *TEMPLATES)


@pytest.fixture
def shop(tmp_path):
    root = tmp_path / 'root'
    (root / 'images').mkdir(parents=True)
    for name in ('a1', 'a2', 'b1', 'c1', 'c2'):
        (root / 'images' / name).touch()
    (tmp_path / 'secret').touch()
    (root / 'images' / 'link').symlink_to(tmp_path / 'secret')
    (root / 'images' / 'alias').symlink_to('a1')
    (root / 'images' / 'loop').symlink_to('loop')
    (tmp_path / 'root2').mkdir()
    (tmp_path / 'root2' / 'x').touch()
    of = lambda item, split='train': {'item_id': item, 'split': split}
    return root, {
        'images/a1': of('a'),
        'images/a2': of('a', 'val'),
        'images/b1': of('b'),
        'images/c1': of('c'),
        'images/c2': of('c'),
        'images/alias': of('c', ''),
        'images/link': of('c', None),
        '../secret': {'item_id': 'c'},
        '/etc/hostname': of('c'),
        '../root2/x': of('c'),
        'images/../images/a1': of('c', 'val'),
        'images': of('c', 'val'),
        'images/gone': of('d'),
        'images/loop': of('d'),
        'nul\0': of('d'),
    }


def test_the_report_lists_what_does_not_fit_together(shop):
    root, metadata = shop
    report = prompts.consistency({'a': 'x', 'c': 'x', 'd': ' ', 'e': 'z', 'f': ''}, metadata, root)
    assert (report['identities'], report['images']) == (4, 15)
    assert report['few_images'] == ['b']
    assert report['few_in_split'] == {'train': 2, 'val': 1}  # a and b; a
    assert report['several_prompts'] == []
    assert report['no_prompt'] == ['b', 'd']
    assert report['no_images'] == ['e']
    assert report['missing_files'] == ['images', 'images/gone', 'images/loop', 'nul\0']
    assert report['outside_root'] == ['../root2/x', '../secret', '/etc/hostname', 'images/link']
    assert report['no_split'] == ['../secret', 'images/alias', 'images/link']
    table = prompts.table(report)
    assert "outside root      4  '../root2/x', '../secret', '/etc/hostname', …" in table
    assert 'few in split      train 2, val 1' in table
    assert json.loads(json.dumps(report)) == report
    assert report['no_prompt'] == ['b', 'd']


def test_the_report_counts_descriptions_and_refuses_faulty_metadata(shop):
    root, metadata = shop
    report = prompts.consistency([*ITEMS, ITEMS[0]], metadata, root)
    assert report['several_prompts'] == ['a'] and report['no_prompt'] == []
    pair = {path: metadata[path] for path in ('images/c1', 'images/c2')}
    assert prompts.consistency({}, pair, root)['few_in_split'] == {'train': 0}
    for entry in ({'split': 'train'}, {'item_id': 3}, {'item_id': 'a', 'split': 3}, 'a'):
        with pytest.raises(UserError, match="metadata of 'bad'"):
            prompts.consistency({}, {**metadata, 'bad': entry}, root)


def test_pairs_are_counted_within_a_split():
    rows = {
        '1': 'a train',
        '2': 'a train',
        '3': 'b train',
        '4': 'b val',
        '5': 'c val',
        '6': 'c val',
    }
    split = {
        path: dict(zip(('item_id', 'split'), row.split(), strict=True))
        for path, row in rows.items()
    }
    kept = prompts.keep_pairs(split, 'train')
    assert list(kept) == ['1', '2', '4', '5', '6'] and kept['1'] is split['1']
    assert list(prompts.keep_pairs(split, 'val')) == ['1', '2', '3', '5', '6']
    with pytest.raises(UserError, match=r"of split 'test' \(splits: train, val\)"):
        prompts.keep_pairs(split, 'test')


@pytest.mark.parametrize(
    ('text', 'parts'),
    [
        ('One. Two! Three?', ['One.', 'Two!', 'Three?']),
        ('No stop at all', ['No stop at all']),
        ('Costs 3.50 in v1.2 now. Buy.', ['Costs 3.50 in v1.2 now.', 'Buy.']),
        ('Soft... and warm. Nice… Very', ['Soft... and warm.', 'Nice…', 'Very']),
        ('He said "Stop." Then (ok.) Go', ['He said "Stop."', 'Then (ok.)', 'Go']),
        ('你好。世界！「走。」好', ['你好。', '世界！', '「走。」', '好']),
        ('First line\n\n second line\r\n', ['First line', 'second line']),
        ('Wow!!! 😀 Great. 👍 !!!', ['Wow!!!', '😀 Great. 👍 !!!']),
        ('!!! ... Start. End', ['!!! ... Start.', 'End']),
        (' ... ', ['...']),
        ('', []),
    ],
)
def test_sentences(text, parts):
    assert sentences(text) == parts


@pytest.mark.parametrize(
    ('text', 'kind', 'short'),
    [
        (' one two three ', 'kept', ' one two three '),
        ('A bag. Two two. Three is three.', 'front', 'Three is three.'),
        ('A. B. C d. E.', 'front', 'B. C d. E.'[3:]),
        ('A. B. C d e f g.', 'end', 'A. B.'),
        ('a b c d. One. Two. e f g h. i j k l', 'end', 'One. Two.'),
        ('a b c d e f. one two three four', 'words', 'one two three'),
        ('a b c d e f g', 'words', 'a b c'),
        ('  ', 'unfit', ''),
    ],
)
def test_cuts_come_in_their_order(text, kind, short):
    assert shorten(text, words_and_two, 5) == (kind, short)


def test_front_and_end_lose_as_few_sentences_as_brute_force_finds():
    rng = random.Random(0)
    for _ in range(300):
        lengths = [rng.randint(1, 6) for _ in range(rng.randint(2, 9))]
        parts = [' '.join(['w'] * n) + '.' for n in lengths]
        limit = rng.randint(3, 14)
        kind, short = shorten(' '.join(parts), words_and_two, limit)
        n = len(parts)
        runs = [(start, n) for start in range(n)]
        runs += [(start, stop) for start in range(n) for stop in range(n, start, -1)]
        fits = [run for run in runs if sum(lengths[slice(*run)]) + 2 <= limit]
        if fits:
            first, last = fits[0]
            assert short == ' '.join(parts[first:last])
            assert kind == ('kept' if (first, last) == (0, n) else 'front' if last == n else 'end')
        else:
            assert kind == ('words' if limit > 2 else 'unfit')


@pytest.mark.parametrize(
    ('train', 'limit'),
    [(train_clip_tokenizer, 77), (train_clip_tokenizer, 12), (train_tokenizer, 20)],
)
def test_every_prompt_fits_whatever_stands_in_it(train, limit):
    tokenizer = train(CORPUS, 560)
    rng = random.Random(limit)
    pieces = [
        'word',
        '. ',
        ' ',
        '...',
        '日',
        '。',
        '😀',
        '\n',
        '3.5',
        'Long' * 30,
        '\0',
        '़',
        '"',
        '!',
    ]
    texts = ADVERSARIAL + [''.join(rng.choices(pieces, k=rng.randint(1, 300))) for _ in range(60)]
    raw = {f'{place:03}': text for place, text in enumerate(texts)}
    count = token_counter(tokenizer)
    safe, report = prompts.token_safe(raw, count, limit, fallback='A bag.')
    _, mask = tokenizer.encode(list(safe.values()), limit)
    assert tokenizer.truncated == 0
    assert mask.any(axis=1).all() and all(text.strip() for text in safe.values())
    assert report['after']['max'] == mask.sum(axis=1).max() <= limit
    assert report['over_limit'] == sum(count(text) > limit for text in raw.values())
    for kind in CUTS:
        for item in report[kind]:
            check_cut(kind, raw[item], safe[item], lambda text: count(text) <= limit)
    assert sorted(item for kind in CUTS for item in report[kind]) == list(safe) == list(raw)
    assert all(report[kind] for kind in ('kept', 'front', 'end', 'words', 'unfit'))


def check_cut(kind, raw, safe, fits):
    """No cut parts two letters or digits, and none is made without need."""
    if kind == 'unfit':
        assert safe == 'A bag.'
        words = [sentence.split()[0] for sentence in sentences(raw)]
        assert not any(fits(word) for word in words)
        return
    places = [at for at in range(len(raw)) if raw.startswith(safe, at)]
    joined = lambda at: 0 < at < len(raw) and raw[at - 1].isalnum() and raw[at].isalnum()
    assert any(not joined(at) and not joined(at + len(safe)) for at in places)
    assert fits(raw) == (kind == 'kept') == (raw == safe)


def test_the_report_counts_and_the_fallback_must_fit():
    raw = {'b': 'one two three', 'a': 'A bag. Two two. Three is three.', 'c': '', 'd': 'a b c d e'}
    safe, report = prompts.token_safe(raw, words_and_two, 5, fallback='A bag.')
    assert safe == {'a': 'Three is three.', 'b': 'one two three', 'c': 'A bag.', 'd': 'a b c'}
    assert {kind: len(report[kind]) for kind in CUTS} == {
        'kept': 1,
        'front': 1,
        'end': 0,
        'words': 1,
        'unfit': 1,
    }
    assert report['before'] == {'min': 2, 'median': 6, 'max': 9}
    assert report['after'] == {'min': 4, 'median': 5, 'max': 5}
    assert report['over_limit'] == 2 and report['front'] == ['a'] and report['unfit'] == ['c']
    assert "front             1  'a'" in prompts.table(report)
    assert report['before']['median'] == 6
    assert prompts.token_safe({}, words_and_two, fallback='x')[1]['after'] == {}
    for fallback in ('', ' ', 'far too many words here'):
        with pytest.raises(UserError, match=r'the fallback .* is blank or of more than 5 tokens'):
            prompts.token_safe(raw, words_and_two, 5, fallback=fallback)
