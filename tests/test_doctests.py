"""The examples in the docstrings of the losses and decoders."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

import mmjax.decode
import mmjax.losses

MODULES = [
    f'{package.__name__}.{module.name}'
    for package in (mmjax.losses, mmjax.decode)
    for module in pkgutil.iter_modules(package.__path__)
]


def functions(module):
    """Returns the public functions that the module itself defines, without their wrappers."""
    members = {name: inspect.unwrap(value) for name, value in vars(module).items()}
    return {
        name: value
        for name, value in members.items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and name[0] != '_'
    }


@pytest.mark.parametrize('name', MODULES)
def test_examples_print_what_they_say(name):
    module = importlib.import_module(name)
    finder = doctest.DocTestFinder(recurse=False)
    examples = finder.find(module)
    for function, value in functions(module).items():
        examples += finder.find(value, f'{name}.{function}', module, vars(module))
    runner = doctest.DocTestRunner()
    for example in examples:
        runner.run(example)
    assert runner.failures == 0


def test_every_loss_has_an_example():
    for name in MODULES:
        if name.startswith('mmjax.losses.') and not name.endswith(('pairs', 'term')):
            for function, value in functions(importlib.import_module(name)).items():
                assert '>>> ' in value.__doc__, f'{name}.{function}'
