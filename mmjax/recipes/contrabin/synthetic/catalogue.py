"""Which built-in functions a set has: no two that mean the same, in whatever split."""

import contextlib
import functools
import hashlib
import itertools
import operator
import re
from collections.abc import Callable, Iterator, Mapping

from mmjax.data import processes
from mmjax.data.faults import FaultReport
from mmjax.errors import UserError
from mmjax.recipes.contrabin.data import LEVELS
from mmjax.recipes.contrabin.synthetic import compiler, programs
from mmjax.recipes.contrabin.synthetic.compiler import stream
from mmjax.recipes.contrabin.synthetic.optimizer import interpreter

TRIALS = 3  # sets of inputs; two functions of a catalogue differ on every one
_FEW = 500  # functions that one process lists sooner than several begin
_CHUNK = 128  # functions that a process runs at a time
_COMPILED = 64  # functions that a process compiles at a time
_REGISTER = re.compile(r'\bq\d+\b')  # of the toy machine


@functools.lru_cache(maxsize=1024)
def inputs(parameters: tuple, trial: int, count: int = 16) -> list[list]:
    """Draws arguments, see `interpreter`: short and long, small numbers and some of all 32 bits."""
    rng = stream('inputs', parameters, trial)

    def number(sizes=(12, 40, 200, 1 << 30)):
        size = sizes[int(rng.integers(len(sizes)))]
        return int(rng.integers(-size, size + 1))

    def argument(kind, length):
        if kind == 'text':
            return [*(int(x) for x in rng.choice(programs.LETTERS, rng.integers(12))), 0]
        if kind == 'array':  # some with equal elements
            sizes = ((2,), (12,), (12, 40, 200, 1 << 30))[int(rng.integers(3))]
            return [number(sizes) for _ in range(length)]
        return length if kind == 'count' else number()

    lengths = [0, 1, 2, *rng.integers(3, 13, count).tolist()][:count]
    return [[argument(kind, length) for _, kind in parameters] for length in lengths]


def behaviour(syntax: programs.Syntax, trial: int) -> tuple[bytes, int]:
    """A digest of what a function returns and leaves in memory; how many values it returns."""
    run, outcomes = interpreter(syntax), []
    for arguments in inputs(syntax.parameters, trial):
        arguments = [x.copy() if isinstance(x, list) else x for x in arguments]
        outcomes.append((run(*arguments), [x for x in arguments if isinstance(x, list)]))
    digest = hashlib.sha256(repr((syntax.parameters, outcomes)).encode()).digest()
    return digest, len({result for result, _ in outcomes})


def catalogue(seed: int, sizes: Mapping[str, int]) -> dict[str, list[int]]:
    """Lists the functions of each split.

    Args:
      seed: of the set.
      sizes: how many functions `train`, `val` and `test` have, each at least 1.

    Returns:
      {'test', 'val', 'train': identities}. No two functions, of all splits, mean the same: they
      differ on each of `TRIALS` sets of inputs. A larger train leaves the other splits as they are.

    Raises:
      UserError: a size is missing or below 1.
    """
    splits = {'test': [], 'val': [], 'train': []}
    for split in splits:
        if sizes.get(split, 0) < 1:
            raise UserError(f'data.built_in.{split} must say how many functions, at least 1')
    seen = [set() for _ in range(TRIALS)]
    behave = functools.partial(_behaviours, seed)
    workers = 1 if sum(sizes.values()) < _FEW else None
    with contextlib.closing(
        processes.ordered(behave, itertools.count(), chunk=_CHUNK, workers=workers)
    ) as behaviours:
        drawn = enumerate(behaviours)
        for split, chosen in splits.items():
            while len(chosen) < sizes[split]:
                identity, digests = next(drawn)
                if digests and not any(map(operator.contains, seen, digests)):
                    chosen.append(identity)
                    for known, digest in zip(seen, digests, strict=True):
                        known.add(digest)
    return splits


def _behaviours(seed: int, identity: int) -> list[bytes]:
    """Digests a function's behaviour on each set of inputs; [] where it returns too few values."""
    digests = []
    for trial in range(TRIALS):
        digest, values = behaviour(programs.syntax(seed, identity), trial)
        if values < 4:
            return []
        digests.append(digest)
    return digests


def records(
    split: str,
    report: FaultReport,
    *,
    seed: int,
    plan: Callable[[], Mapping[str, list[int]]],
    registers: str,
) -> Iterator[dict]:
    """Yields the records of a split of `catalogue`: each function at every level."""
    identities = plan()[split]
    report.rows = len(identities) * len(LEVELS)
    compile_one = functools.partial(_records, seed, registers)
    for compiled in processes.ordered(compile_one, identities, chunk=_COMPILED):
        yield from compiled


def _records(seed: int, registers: str, identity: int) -> list[dict]:
    function = programs.function(seed, identity)
    shared = {
        'source': function.source,
        'comment': function.comment,
        'name': function.name,
        'label': function.label,
        'path': f'plan_{identity // programs.SIBLINGS}.c',
        'compiler': 'toy',
        'language': 'c',
    }
    records = []
    for level, name in enumerate(LEVELS):
        binary = compiler.compile_function(function.syntax, level, seed=identity)
        binary = _REGISTER.sub('q', binary) if registers == 'class' else binary
        records.append({**shared, 'binary': binary, 'opt_level': name})
    return records
