"""Samples of the campaigns, so that their commands keep working."""

import ast
import sys

import pytest


@pytest.fixture
def mutants(root, monkeypatch):
    monkeypatch.syspath_prepend(str(root / 'campaigns'))
    import mutants

    yield mutants
    sys.modules.pop('mutants')


def test_mutants_are_programs_that_differ_in_one_place(mutants):
    sites = mutants.sites_of_all(seed=1)
    assert len(sites) > 300 and {path.parent.name for path, _ in sites} >= {'comic', 'sign'}
    for path, at in sites[:20]:
        source, text = mutants.mutant(path, at)
        assert ast.unparse(ast.parse(source)) != ast.unparse(ast.parse(path.read_text())), text


@pytest.mark.slow
def test_a_mutant_is_caught_and_the_program_itself_is_not(mutants, root):
    path = root / 'mmjax/recipes/sign/scores.py'
    source = path.read_text()
    wrong = source.replace("figures['lengths'] = ", "figures['length'] = ")
    assert wrong != source
    assert not mutants.caught(path, source, 120, only='test_scores')
    assert mutants.caught(path, wrong, 120, only='test_scores')
