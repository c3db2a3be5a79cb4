"""The layers of the package, and what must never be imported."""

import ast
import subprocess
import sys

import pytest

RECIPES = ('comic', 'contrabin', 'receipts', 'retrieval', 'sign')
# layer → the layers it may import, besides itself and BASE.
BASE = {'errors', 'sections', 'typing', 'axis', 'cpu'}
PURE = {'losses', 'models', 'decode', 'evals', 'pretrained'}
ALLOWED = {
    **{layer: set() for layer in BASE | PURE | {'data'}},
    'evals': {'decode'},
    'engine': {'data', 'losses.term'},
    'recipes': {'engine', 'data', *PURE},
    'testing': {'engine', 'data', 'losses.term'},
    'main': {'engine'},
}


def modules(root):
    for path in sorted((root / 'mmjax').rglob('*.py')):
        name = '.'.join(path.relative_to(root / 'mmjax').with_suffix('').parts)
        if name != '__init__':
            yield name.removesuffix('.__init__'), ast.parse(path.read_text())


def imports(tree):
    """Yields (full name, whether at module level) of everything a module imports."""
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in top
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield f'{node.module}.{alias.name}', id(node) in top


def within(target, layer):
    return target == layer or target.startswith(f'{layer}.')


def test_imports_go_down_the_layers(root):
    wrong = []
    for name, tree in modules(root):
        layer = name.split('.')[0]
        for found, _ in imports(tree):
            target = found.removeprefix('mmjax.')
            if not found.startswith('mmjax.') or target == '__version__':
                continue
            if not any(within(target, ok) for ok in {layer, *BASE, *ALLOWED[layer]}):
                wrong.append(f'mmjax.{name} imports {found}')
    assert not wrong


def test_a_recipe_imports_no_other_recipe(root):
    names = {path.parent.name for path in (root / 'mmjax/recipes').glob('*/task.py')}
    assert names == set(RECIPES)
    for name, tree in modules(root):
        parts = name.split('.')
        if parts[0] != 'recipes' or len(parts) == 1:
            continue
        for found, _ in imports(tree):
            if found.startswith('mmjax.recipes.'):
                assert found.split('.')[2] == parts[1], f'mmjax.{name} imports {found}'


def test_the_engine_names_no_recipe(root):
    for path in (root / 'mmjax/engine').rglob('*.py'):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert node.value not in RECIPES, path


def test_data_imports_no_jax_at_module_level(root):
    for name, tree in modules(root):
        if name.split('.')[0] == 'data':
            heavy = [f for f, top in imports(tree) if top and f.split('.')[0] in ('jax', 'flax')]
            assert not heavy, f'mmjax.{name}'


@pytest.mark.parametrize('name', ['tensorflow', 'torch', 'jax._src', 'pickle'])
def test_nothing_imports(root, name):
    for module, tree in modules(root):
        for found, _ in imports(tree):
            assert not (found == name or found.startswith(f'{name}.')), f'mmjax.{module}'


def test_help_answers_without_jax():
    code = 'import sys; from mmjax import main; assert "jax" not in sys.modules, "jax"'
    subprocess.run([sys.executable, '-c', code], check=True)
