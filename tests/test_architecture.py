"""The arrows of the house, and what must never be imported."""

import ast
import subprocess
import sys

import pytest

# package or module → what of mmjax it may import. The engine knows tasks by their interface only.
ENGINE = {'config', 'stages', 'optim', 'parallel', 'checkpoint', 'logs', 'step', 'evaluate', 'task',
          'preemption', 'build', 'report'}  # fmt: skip
ALLOWED = {
    'losses': {'losses'},
    'models': {'models'},
    'decode': {'decode'},
    'pretrained': {'pretrained', 'data.dataset'},
    'evals': {'evals', 'decode'},
    'data': {'data'},
    'tasks': {'tasks', 'models', 'losses', 'data', 'decode', 'evals', 'pretrained', 'task'},
    'config': {'data.dataset'},
    'stages': {'config', 'data.dataset'},
    'optim': {'stages', 'data.dataset'},
    'parallel': {'data.dataset'},
    'task': {'stages', 'losses.term', 'data.dataset'},
    'step': {'optim', 'stages', 'losses.term'},
    'checkpoint': {'checkpoint', 'data.dataset', 'parallel'},
    'logs': {'data.dataset'},
    'report': {'logs', 'data.dataset', 'report'},
    'preemption': set(),
    'evaluate': {'parallel', 'data', 'task'},
    'build': ENGINE | {'data'},
    'train': ENGINE | {'data'},
    'modes': ENGINE | {'data', 'train'},
    'main': {'config', 'data.dataset', 'hugepages', 'modes'},
    'hugepages': set(),
}


def modules(root):
    for path in sorted((root / 'mmjax').rglob('*.py')):
        name = '.'.join(path.relative_to(root / 'mmjax').with_suffix('').parts)
        if name not in ('__init__',):
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


def test_arrows_go_one_way(root):
    wrong = []
    for name, tree in modules(root):
        part = name.split('.')[0]
        for found, _ in imports(tree):
            if not found.startswith('mmjax.') or found == 'mmjax.__version__':
                continue
            target = found.removeprefix('mmjax.')
            fits = any(target == ok or target.startswith(f'{ok}.') for ok in ALLOWED[part])
            if not fits and target.split('.')[0] != part:
                wrong.append(f'mmjax.{name} imports {found}')
    assert not wrong


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


def test_train_stays_under_400_lines(root):
    for name in ('train', 'step'):
        assert len((root / f'mmjax/{name}.py').read_text().splitlines()) <= 400
