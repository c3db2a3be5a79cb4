"""benchmarks/seeds.py: means over seeds, what it skips and what it refuses."""

import importlib.util
import json
import math

import pytest

from tests.runs import ROOT

spec = importlib.util.spec_from_file_location('seeds', ROOT / 'benchmarks/seeds.py')
seeds = importlib.util.module_from_spec(spec)
spec.loader.exec_module(seeds)


def test_means_and_errors_are_over_the_seeds():
    scores = [
        {'val': {'r1': r1, 'verdict': 'healthy', 'map': m}}
        for r1, m in ((0.1, 1.0), (0.3, math.nan))
    ]
    out = seeds.summary([{'scores': one} for one in scores])
    assert out['val/r1'] == {'mean': 0.2, 'standard_error': 0.1, 'values': [0.1, 0.3]}
    assert out['val/verdict'] == {'values': ['healthy', 'healthy']}
    assert out['val/map'] == {'values': [1.0, None]}
    json.dumps(out, allow_nan=False)


def test_a_finished_seed_is_read_and_one_of_other_arguments_is_refused(tmp_path, monkeypatch):
    def run(command, **_):
        (tmp_path / 'results.json').write_text(json.dumps({'final': {'val': {'r1': 1.0}}}))
        return type('Done', (), {'returncode': 0, 'stdout': 'abc'})

    monkeypatch.setattr(seeds.subprocess, 'run', run)
    made = seeds.train('stage3', tmp_path, '--config.seed=0')
    assert made['scores'] == {'val': {'r1': 1.0}}
    monkeypatch.setattr(seeds.subprocess, 'run', None)
    assert seeds.train('stage3', tmp_path, '--config.seed=0')['scores'] == made['scores']
    with pytest.raises(SystemExit, match='is of other arguments'):
        seeds.train('stage3', tmp_path, '--config.seed=0', '--config.batch_size=2')


def test_a_run_that_fails_is_one_sentence(tmp_path, monkeypatch):
    done = type('Done', (), {'returncode': 75, 'stdout': ''})
    monkeypatch.setattr(seeds.subprocess, 'run', lambda *_, **__: done)
    with pytest.raises(SystemExit, match='ended with code 75'):
        seeds.train('stage3', tmp_path)
