"""Changes a recipe's task or scores at random places, and counts the changes its tests notice.

    python campaigns/mutants.py --count=30 --seed=0

A mutant has one operator, comparison, boolean, number or condition changed in one function of
`mmjax/recipes/*/{task,scores}.py`. It is caught if the tests of its recipe fail. The result, with
every mutant that survives, is written to campaigns/results/mutants.json.
"""

import argparse
import ast
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
SWAPS = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.Lt: ast.GtE,
    ast.Gt: ast.LtE,
    ast.LtE: ast.Gt,
    ast.GtE: ast.Lt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}


def sites(tree: ast.Module) -> list[tuple[ast.AST, str]]:
    """Returns (node, kind) of what may be changed.

    Strings, docstrings, figures and the `flush` of a print, which changes no output, are left out.
    """
    out = []
    flushes = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.keyword) and node.arg == 'flush'
    }
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef) or 'figure' in ast.unparse(function).lower():
            continue
        for node in ast.walk(function):
            if isinstance(node, ast.BinOp | ast.BoolOp) and type(node.op) in SWAPS:
                out.append((node, 'operator'))
            elif isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
                out.append((node, 'comparison'))
            elif id(node) in flushes:
                continue
            elif isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float):
                out.append((node, 'constant'))
            elif isinstance(node, ast.If | ast.IfExp):
                out.append((node, 'condition'))
    return out


def mutate(node: ast.AST, kind: str) -> None:
    """Changes one node in place."""
    if kind == 'operator':
        node.op = SWAPS[type(node.op)]()
    elif kind == 'comparison':
        node.ops[0] = SWAPS[type(node.ops[0])]()
    elif kind == 'constant':
        value = node.value
        node.value = not value if isinstance(value, bool) else value + 1
    else:
        node.test = ast.UnaryOp(ast.Not(), node.test)


def sites_of_all(seed: int) -> list[tuple[pathlib.Path, int]]:
    """Returns (path, number of a site in it), all of them, in random order."""
    out = []
    for path in sorted(ROOT.glob('mmjax/recipes/*/[ts]*.py')):
        if path.stem in ('task', 'scores'):
            out += [(path, at) for at in range(len(sites(ast.parse(path.read_text()))))]
    random.Random(seed).shuffle(out)
    return out


def mutant(path: pathlib.Path, at: int) -> tuple[str, str]:
    """Returns (source of the mutant, what was changed)."""
    tree = ast.parse(path.read_text())
    node, kind = sites(tree)[at]
    before = ast.unparse(node).splitlines()[0]
    mutate(node, kind)
    after = ast.unparse(node).splitlines()[0]
    return ast.unparse(tree), f'{path.relative_to(ROOT)}:{node.lineno} {before} → {after}'


def caught(path: pathlib.Path, source: str, timeout: float, only: str = 'test_') -> bool:
    """Runs the tests of the recipe on a copy of the repository with the mutant in it.

    only: what the names of the test files that run begin with.
    """
    recipe = path.parent.name
    with tempfile.TemporaryDirectory() as folder:
        copied = pathlib.Path(folder) / 'repository'
        shutil.copytree(
            ROOT, copied, ignore=shutil.ignore_patterns('.git', '.venv*', 'runs', '__pycache__')
        )
        (copied / path.relative_to(ROOT)).write_text(source)
        tests = sorted(str(p) for p in (copied / 'tests/recipes' / recipe).glob(f'{only}*.py'))
        skip = ('test_data', 'test_folder', 'test_synthetic', 'test_augment', 'test_streams')
        skip += ('test_encoding', 'test_prompts', 'test_c_projects', 'test_text')
        tests = [test for test in tests if not pathlib.Path(test).name.startswith(skip)]
        command = [sys.executable, '-m', 'pytest', '-q', '-x', '-p', 'no:cacheprovider', *tests]
        env = {**os.environ, 'PYTHONDONTWRITEBYTECODE': '1'}
        try:
            done = subprocess.run(
                command, cwd=copied, env=env, capture_output=True, timeout=timeout
            )
        except subprocess.TimeoutExpired:
            return True
    return done.returncode == 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--count', type=int, default=30)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--recipe', default='', help='of one recipe only')
    parser.add_argument('--timeout', type=float, default=600.0, help='seconds per mutant')
    parser.add_argument('--output', default=str(ROOT / 'campaigns/results/mutants.json'))
    options = parser.parse_args()
    chosen = [site for site in sites_of_all(options.seed) if options.recipe in site[0].parent.name]
    start = time.monotonic()
    survivors = []
    for path in {path.parent.name: path for path, _ in chosen[: options.count]}.values():
        if caught(path, path.read_text(), options.timeout):
            sys.exit(f'the tests of {path.parent.name} fail as they are: they can catch nothing')
    commit = subprocess.run(
        ['git', 'rev-parse', '--short', 'HEAD'], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    for total, (path, at) in enumerate(chosen[: options.count], start=1):
        source, text = mutant(path, at)
        found = caught(path, source, options.timeout)
        print(f'{total}/{options.count} {"caught" if found else "SURVIVED"} {text}', flush=True)
        if not found:
            survivors.append(text)
        result = {
            'commit': commit,
            'seed': options.seed,
            'mutants': total,
            'caught': total - len(survivors),
            'survived': survivors,
            'minutes': round((time.monotonic() - start) / 60, 1),
        }
        text = json.dumps(result, indent=1, ensure_ascii=False) + '\n'
        pathlib.Path(options.output).write_text(text)
    print(text)


if __name__ == '__main__':
    main()
