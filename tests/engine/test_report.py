"""The page of a run: complete, self-contained, escaped, and honest about what is missing."""

import html.parser
import io
import json
import math
import pathlib
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from matplotlib.figure import Figure

from mmjax.engine import logs, report
from mmjax.engine.report import chart, curves
from mmjax.errors import UserError

HOSTILE = '<script>alert("x")</script>&\'" $\\frac$'
STAGES = (('anchor', 400, {'alignment': 1.0}), ('pages', 900, None), ('polish', 100, None))
WEIGHTS = {'contrastive': 1.0, 'reconstruction': 0.5, 'alignment': 0.3}


def fake_run(workdir, *, every=5, finished=True, word='', broken=()):
    """Leaves what a three-stage run on comic pages would; `word` goes into every name."""
    workdir = pathlib.Path(workdir)
    rng, step = np.random.default_rng(0), 0
    groups = {'vision': 1_204_000, 'text': 812_416, 'fusion': 2_365_123, 'other': 1}
    multiple = lambda i, g: 0.0 if (g == 'text' and i < 2) else 0.1 if g == 'vision' else 1.0
    plan = [
        {
            'name': name + word,
            'steps': steps,
            'epochs': steps / 48,
            'groups': [
                {'group': g + word, 'parameters': n, 'tensors': 12, 'rate': 1e-3 * multiple(i, g)}
                for g, n in groups.items()
            ],
            'loss_weights': weights or WEIGHTS,
        }
        for i, (name, steps, weights) in enumerate(STAGES)
    ]
    config = {
        'task': 'comic' + word,
        'batch_size': 32,
        'data': {'image_size': 64, 'root': None},
        'stages': [s['name'] for s in plan],
        'loss_weights': WEIGHTS,
    }
    logs.write_json(
        workdir / 'config.json',
        {
            'config': config,
            'command': f"python -m mmjax.main --config=configs/stage3.py --config.seed='1{word}'",
            'versions': {'mmjax': '0.1.0', 'python': '3.11.9', 'jax': '0.10.2', 'flax': '0.12.1'},
            'device': '1 × cpu, 1 process(es)',
            'plan': plan,
            'data': {
                'train': {
                    'name': 'comic_pages',
                    'version': '1.0.0',
                    'split': 'train',
                    'size': 1536,
                    'seed': 0,
                    'digest': '9f2c' * 8 + word,
                }
            },
            'verdicts': {'healthy': ('good', 'Panels differ.')},
        },
    )
    log = logs.Logs(workdir, enabled=True, tensorboard=False, stream=io.StringIO())
    best, kept = {'value': -1.0}, {}
    for i, (name, steps, weights) in enumerate(STAGES):
        for at in range(1, steps + 1):
            step += 1
            if at % every and at != steps and step != 1:
                continue
            fade = lambda start, end, rate: end + (start - end) * math.exp(-step / rate)
            terms = {
                'contrastive': fade(8, 1.9, 500),
                'reconstruction': fade(0.4, 0.05, 300),
                'alignment': fade(4.6, 0.6, 250),
            }
            terms = {k: v * (1 + 0.08 * rng.normal()) for k, v in terms.items()}
            if step in broken:
                terms['alignment'] = math.nan
            active = weights or WEIGHTS
            warm = min(at / (0.05 * steps), 1) * (0.5 + 0.5 * math.cos(math.pi * at / steps))
            values = {'loss': sum(terms[k] * w for k, w in active.items())}
            values |= {'grad_norm': fade(9, 0.8, 200) * math.exp(0.3 * rng.normal())}
            values |= {f'grad_norm/{g}{word}': 0.5 + rng.random() for g in groups if multiple(i, g)}
            values |= {f'loss/{k}{word}': v for k, v in terms.items()}
            values |= {'count/contrastive': 150 + rng.integers(30), 'count/alignment': 128}
            values |= {'image_text_cosine': 1 - math.exp(-step / 400)}
            values |= {f'lr/{g}{word}': 1e-3 * multiple(i, g) * warm for g in groups}
            values |= {f'weight/{k}': w for k, w in active.items()}
            values |= {'step_seconds': 0.31, 'examples_per_second': 100 + 4 * rng.normal()}
            log.write(step, name + word, at / 48, values)
            if at % 100 == 0 or at == steps:
                recall = 0.95 - 0.8 * math.exp(-step / 300) - (step > 1200) * 0.03
                scores = {
                    'loss': fade(7, 2.3, 400),
                    f'contrastive{word}': fade(8, 2.1, 450),
                    'alignment': fade(4.6, 0.8, 260),
                    'image_to_text_r1': recall,
                    'image_to_text_r5': min(recall + 0.04, 1.0),
                    'image_to_text_r10': 1.0,
                    'intra_page_cosine': fade(0.1, 0.7, 400),
                    'inter_page_cosine': 0.06,
                    'pages': 128,
                    'collapse_verdict': 'healthy' if step > 300 else 'weak_alignment',
                }
                evaluation = {f'eval/val/{k}': v for k, v in scores.items()}
                log.write(step, name + word, at / 48, evaluation)
                if recall > best['value']:
                    best = {'step': step, 'metric': 'val/image_to_text_r1', 'value': recall}
                    kept = scores
    figure = Figure(figsize=(9, 3), layout='constrained')
    for axis in figure.subplots(1, 3):
        axis.imshow(rng.random((12, 16)), cmap='magma')
    figure.set_label(f'Panels with the text the model finds for them{word}')
    log.figures(step, {'val-pages': figure})
    log.close()
    if finished:
        logs.write_results(
            workdir,
            best=best,
            final={'val': kept, 'query_gallery': {'rank1': 0.5}},
            stages={name + word: {'loss': 1.0} for name, _, _ in STAGES},
            skipped={f'image cannot be read{word}': 3},
            weights='best',
        )
    return workdir


class Page(html.parser.HTMLParser):
    """What a browser would see: tags, what they load, and the text."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.loads, self.words, self.open, self.attributes = [], [], [], [], set()
        self.alternatives = []
        self.feed(source)
        self.text = ' '.join(self.words)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes |= {key for key, _ in attrs}
        self.loads += [v for k, v in attrs if k in ('src', 'href', 'srcset', 'data', 'action')]
        self.alternatives += [v for k, v in attrs if k == 'alt']
        if tag not in ('meta', 'img'):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f'</{tag}> closes nothing'

    def handle_data(self, data):
        if self.open[-1:] != ['style']:
            self.words.append(data)


def page_of(workdir):
    path = report.write(workdir)
    assert path.name == 'report.html'
    page = Page(path.read_text())
    assert page.open == []
    return page


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    workdir = fake_run(tmp_path_factory.mktemp('run') / 'stage3', broken=(300, 305))
    return workdir, page_of(workdir)


def test_page_tells_the_run(finished):
    _, page = finished
    for words in (
        'stage3',
        'finished',
        'python -m mmjax.main',
        'What was trained',
        'anchor',
        'polish',
        'reconstruction × 0.5',
        'frozen',
        '2,365,123',
        'Scores',
        'the best weights',
        'val',
        'query_gallery',
        'rank1',
        'healthy',
        'Panels differ.',
        'image cannot be read',
        'comic_pages',
        'Panels with the text',
        'jax',
        '0.10.2',
        '1 × cpu',
        'loss/contrastive',
        'learning rate',
        'gradient norm',
        'count/contrastive',
        'examples_per_second',
        '2 values not finite',
        'image_to_text_r{1, 5, 10}',
        'data.image_size',
        'count/alignment',
    ):
        assert words in page.text, words
    assert 'could not be' not in page.text


def test_the_page_colours_the_verdicts_that_the_task_declares_and_no_other_word(finished):
    workdir, _ = finished
    source = (workdir / 'report.html').read_text()
    assert '<span class="badge good">healthy</span>' in source
    assert '<td class="n">weak_alignment</td>' in source  # as text: this run declares it not


def test_page_is_self_contained_and_runs_no_script(finished):
    workdir, page = finished
    assert page.loads and all(source.startswith('data:image/') for source in page.loads)
    assert not {'script', 'link', 'iframe', 'object', 'embed', 'base', 'form'} & set(page.tags)
    source = (workdir / 'report.html').read_text()
    assert not re.search(r'https?://|@import|url\(', source)
    assert len(source) < 2_000_000


def test_names_are_escaped_everywhere(tmp_path):
    page = page_of(fake_run(tmp_path / '<i>&', every=50, word=HOSTILE))
    assert page.text.count(HOSTILE) > 10 and 'could not be' not in page.text
    assert not {'script', 'i'} & set(page.tags)
    assert '<title>&lt;i&gt;&amp; · mmjax<' in (tmp_path / '<i>&' / 'report.html').read_text()
    assert page.attributes == {
        'lang',
        'charset',
        'name',
        'content',
        'http-equiv',
        'class',
        'style',
        'title',
        'alt',
        'src',
    }
    assert f'loss/contrastive{HOSTILE}' in page.alternatives


def test_charts_are_valid_svg_and_show_stages_and_series(finished):
    workdir, _ = finished
    lines, _ = logs.read(workdir / 'metrics.jsonl')
    sections, still = curves.draw(lines, json.loads((workdir / 'results.json').read_text())['best'])
    assert list(sections) == ['Losses', 'Scores', 'Schedules', 'Health', 'Diagnostics']
    for charts in sections.values():
        for drawn in charts:
            ElementTree.fromstring(drawn.svg)
            assert b'script' not in drawn.svg
    loss = sections['Losses'][0]
    words = ' '.join(ElementTree.fromstring(loss.svg).itertext())
    assert loss.wide and all(word in words for word in ('anchor', 'pages', 'train', 'val'))
    recall = next(c for c in sections['Scores'] if c.title.startswith('image_to_text'))
    assert 'best 0.9' in ' '.join(ElementTree.fromstring(recall.svg).itertext())
    assert 'log scale' in sections['Schedules'][0].caption  # 0 while frozen: gaps
    assert still['count/alignment'] == 128 and still['pages (val)'] == 128


def test_curves_that_would_not_be_seen_are_in_the_legend_and_the_caption():
    steps = list(range(4))
    make = lambda label, value: chart.Series(label, label, '#000', steps, value, [0] * 4)
    curve = [1.0, 0.5, 0.1, 0.001]
    series = [make('a', curve), make('b', curve), make('c', [0.0] * 4), make('d', [math.nan] * 4)]
    drawn = chart.chart('rates', series, [('s', 0, 3)], log=True, gaps=True)
    words = ' '.join(ElementTree.fromstring(drawn.svg).itertext())
    assert all(f' {label} ' in f' {words} ' for label in ('a, b', 'c', 'd'))
    assert 'frozen throughout: c; never finite: d' in drawn.caption
    equal = chart.chart('rates', series[:2], [('s', 0, 3)])
    assert 'a, b' in ' '.join(ElementTree.fromstring(equal.svg).itertext())


def test_bins_average_within_a_stage_only():
    rng = np.random.default_rng(1)
    n = 1000
    value = rng.normal(size=n)
    value[[10, 700]] = np.nan, np.inf
    stage = [0] * 333 + [1] * (n - 333)
    series = chart.Series('x', 'x', '', list(range(n)), value.tolist(), stage)
    parts, width = chart.bins(series)
    assert width == math.ceil(998 / chart.BINS)
    for index, (step, mean, low, high) in enumerate(parts):
        finite = [i for i in range(n) if stage[i] == index and math.isfinite(value[i])]
        groups = [finite[i : i + width] for i in range(0, len(finite), width)]
        np.testing.assert_allclose(step, [np.mean(g) for g in groups])
        np.testing.assert_allclose(mean, [value[g].mean() for g in groups])
        np.testing.assert_allclose(low, [value[g].min() for g in groups])
        np.testing.assert_allclose(high, [value[g].max() for g in groups])
    assert sum(len(part[0]) for part in parts) <= chart.BINS + 2


def test_evaluations_are_never_averaged():
    series = chart.Series('eval/v/x', 'x', '', list(range(900)), [0.0, 1.0] * 450, [0] * 900)
    parts, width = chart.bins(series)
    assert width == 1 and len(parts[0][0]) == 900


def test_stage_spans_follow_the_log_not_the_plan():
    lines = [{'step': s, 'stage': name} for s, name in ((1, 'a'), (10, 'a'), (17, 'b'), (20, 'b'))]
    assert curves.spans(lines) == [('a', 0, 10), ('b', 10, 20)]


@pytest.mark.parametrize('missing', ['config.json', 'metrics.jsonl', 'results.json', 'figures'])
def test_a_missing_piece_is_said_on_the_page(tmp_path, missing):
    workdir = fake_run(tmp_path / 'run', every=100)
    if missing == 'figures':
        (workdir / 'figures' / 'val-pages.png').unlink()
        (workdir / 'figures').rmdir()
    else:
        (workdir / missing).unlink()
    page = page_of(workdir)
    words = {
        'config.json': 'command unknown',
        'metrics.jsonl': 'Nothing has been logged',
        'results.json': 'not finished',
        'figures': 'saved no image',
    }
    assert words[missing] in page.text
    assert 'could not be made' not in page.text


def test_a_run_that_just_started_has_a_page(tmp_path):
    page = page_of(tmp_path)
    assert 'nothing logged yet' in page.text and 'could not be made' not in page.text
    with pytest.raises(UserError, match='is not the folder of a run'):
        report.write(tmp_path / 'absent')


def test_faulty_files_are_named_and_the_rest_stands(tmp_path):
    workdir = fake_run(tmp_path / 'run', every=100)
    (workdir / 'config.json').write_text('{"plan": [')
    (workdir / 'results.json').write_text('[1]')
    (workdir / 'figures' / 'torn.png').write_bytes(b'\x89PNG\r\n')
    with open(workdir / 'metrics.jsonl', 'ab') as file:
        file.write(b'{"step": 1401, "stage": "pol')
    page = page_of(workdir)
    for words in (
        'config.json could not be read',
        'results.json could not be read: it holds a list',
        'torn.png could not be read',
        '1 unreadable line',
        'loss/contrastive',
    ):
        assert words in page.text, words


def test_wrong_types_cost_one_part_only(tmp_path):
    workdir = fake_run(tmp_path / 'run', every=100)
    described = json.loads((workdir / 'config.json').read_text())
    described |= {'plan': [3, {'name': 'pages', 'groups': 1}], 'data': [1], 'config': 'x'}
    logs.write_json(workdir / 'config.json', described)
    page = page_of(workdir)
    for words in ('The part “data” could not be made', 'python -m mmjax.main', 'loss/contrastive'):
        assert words in page.text, words


def test_large_images_are_reduced_and_said_so(tmp_path):
    from PIL import Image

    (tmp_path / 'figures').mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (1100, 1900, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / 'figures' / 'big.png')
    page = page_of(tmp_path)
    assert 'figures/big.png has the full size' in page.text


def test_module_runs_from_the_command_line(tmp_path, root):
    call = [sys.executable, '-m', 'mmjax.engine.report']
    done = subprocess.run([*call, tmp_path], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / 'report.html').exists(), done.stderr
    failed = subprocess.run([*call, tmp_path / 'no'], cwd=root, capture_output=True, text=True)
    assert failed.returncode == 1 and 'Traceback' not in failed.stderr


if __name__ == '__main__':  # python tests/engine/test_report.py DIR: leaves a run to look at
    print(report.write(fake_run(sys.argv[1], broken=(300, 305))))
