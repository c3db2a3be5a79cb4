"""Sections of a config: what is accepted, what is refused, and the sentence that says so."""

import dataclasses
import re
import subprocess
import sys
from collections.abc import Mapping
from typing import Literal

import ml_collections
import numpy as np
import pytest

from mmjax import sections
from mmjax.errors import UserError
from mmjax.sections import field


@dataclasses.dataclass(frozen=True)
class Adam:
    b1: float = field(0.9, 'decay of the mean', least=0, below=1)
    b2: float = field(0.999, least=0, below=1)


@dataclasses.dataclass(frozen=True)
class Optimizer:
    name: str = field('adamw', 'update rule', choices=('adamw', 'lion', 'sgd'))
    rate: float = field(1e-3, 'of a group with multiple 1', above=0)
    clip: float | None = field(None, 'global norm', least=0.5, most=10)
    adam: Adam = field(Adam(b1=0.8))

    def check(self, where: str) -> None:
        if self.name == 'sgd' and self.clip is None:
            raise UserError(f"{where}.clip=None does not go with {where}.name='sgd'")


@dataclasses.dataclass(frozen=True)
class Stage:
    steps: 'int' = field(help='updates', least=1)
    rates: Mapping[str, float] = field({}, 'group → multiple', least=0)


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int = field(0, least=0)
    quick: bool = False
    chunk: int | Literal['auto'] = field('auto', least=1)
    root: str | None = None
    buckets: tuple[int, ...] = field((), least=1)
    stretch: tuple[float, float] = (1.0, 1.0)
    rules: tuple[tuple[str, str], ...] = ()
    mode: Literal['min', 'max'] = 'min'
    kinds: tuple[str, ...] = field(('a',), choices=('a', 'b'))
    weights: Mapping[str, float | None] = field({'total': 1.0}, least=0)
    extra: Mapping[str, object] = field({})
    optimizer: Optimizer = field(Optimizer())
    teacher: Optimizer | None = None
    stage: Mapping[str, Stage] = field({})


def parse(**values):
    return sections.parse(Config, values)


def test_defaults_are_the_declared_ones():
    assert parse() == Config()
    assert parse().optimizer.adam.b1 == 0.8


def test_defaults_are_not_shared():
    assert parse().weights is not parse().weights


@pytest.mark.parametrize(
    'values, key, expected',
    [
        (dict(seed=3), 'seed', 3),
        (dict(seed=np.int64(3)), 'seed', 3),
        (dict(quick=True), 'quick', True),
        (dict(chunk=8), 'chunk', 8),
        (dict(chunk='auto'), 'chunk', 'auto'),
        (dict(root='x'), 'root', 'x'),
        (dict(root=None), 'root', None),
        (dict(buckets=[8, 16]), 'buckets', (8, 16)),
        (dict(stretch=(1, 2)), 'stretch', (1.0, 2.0)),
        (dict(rules=[['a', 'b']]), 'rules', (('a', 'b'),)),
        (dict(kinds=('a', 'b')), 'kinds', ('a', 'b')),
        (dict(weights=dict(a=1)), 'weights', {'a': 1.0}),
        (dict(weights=dict(a=None)), 'weights', {'a': None}),
        (dict(extra=dict(a=[1], b=dict(c=2))), 'extra', {'a': [1], 'b': {'c': 2}}),
        (dict(teacher=dict(name='lion')), 'teacher', Optimizer(name='lion')),
        (dict(optimizer=Optimizer(rate=2.0)), 'optimizer', Optimizer(rate=2.0)),
        (dict(stage=dict(x=dict(steps=5))), 'stage', {'x': Stage(5)}),
    ],
)
def test_what_is_accepted(values, key, expected):
    given = ml_collections.ConfigDict(values) if key != 'optimizer' else values
    for one in (values, given):
        result = getattr(sections.parse(Config, one), key)
        assert result == expected and type(result) is type(expected)
        assert repr(result) == repr(expected)  # 1.0 is not 1


def test_an_int_becomes_a_float():
    assert type(sections.parse(Adam, {'b1': 0}).b1) is float


def test_nested_sections_merge_with_the_default_of_the_field_that_holds_them():
    result = parse(optimizer=dict(adam=dict(b2=0.5)))
    assert result.optimizer == Optimizer(adam=Adam(b1=0.8, b2=0.5))
    assert sections.parse(Optimizer, {'adam': {}}).adam == Adam(b1=0.8)


def test_a_mapping_with_open_keys_replaces_its_default():
    assert parse(weights=dict(contrastive=2.0)).weights == {'contrastive': 2.0}


@pytest.mark.parametrize(
    'values, message',
    [
        (dict(seed='x'), "seed='x' is not an integer at least 0"),
        (dict(seed=1.0), 'seed=1.0 is not an integer at least 0'),
        (dict(seed=True), 'seed=True is not an integer at least 0'),
        (dict(seed=None), 'seed=None is not an integer at least 0'),
        (dict(seed=-1), 'seed=-1 is not an integer at least 0'),
        (dict(quick=1), 'quick=1 is not True or False'),
        (dict(quick='yes'), "quick='yes' is not True or False"),
        (dict(chunk=0), "chunk=0 is not an integer at least 1 or 'auto'"),
        (
            dict(chunk='atuo'),
            "chunk='atuo' is not an integer at least 1 or 'auto'; did you mean 'auto'?",
        ),
        (dict(root=3), 'root=3 is not a string or None'),
        (dict(buckets=8), 'buckets=8 is not a tuple of integers at least 1'),
        (dict(buckets=(8, 0)), 'buckets=(8, 0) is not a tuple of integers at least 1'),
        (dict(buckets='8'), "buckets='8' is not a tuple of integers at least 1"),
        (dict(stretch=(1, 2, 3)), 'stretch=(1, 2, 3) is not a tuple of 2 numbers'),
        (dict(stretch=(1, 'x')), "stretch=(1, 'x') is not a tuple of 2 numbers"),
        (dict(rules=('a', 'b')), "rules=('a', 'b') is not a tuple of tuples of 2 strings"),
        (dict(mode='mni'), "mode='mni' is not 'min' or 'max'; did you mean 'min'?"),
        (dict(kinds=('a', 'c')), "kinds=('a', 'c') is not a tuple of strings out of 'a', 'b'"),
        (dict(weights=3), 'weights=3 is not a mapping from names to values that are each a number'),
        (dict(weights=dict(a=-1)), 'weights.a=-1 is not a number at least 0 or None'),
        (dict(weights={3: 1}), 'weights has the key 3, which is not a string'),
        (dict(optimizer=3), 'optimizer=3 is not a section with the keys name, rate, clip, adam'),
        (dict(optimizer=None), 'optimizer=None is not a section with the keys name, rate, clip'),
        (
            dict(optimizer=dict(name='lino')),
            "optimizer.name='lino' is not one of 'adamw', 'lion', 'sgd'; did you mean 'lion'?",
        ),
        (dict(optimizer=dict(name=['lion'])), "optimizer.name=['lion'] is not one of 'adamw', "),
        (dict(optimizer=dict(rate=0)), 'optimizer.rate=0 is not a number above 0'),
        (dict(optimizer=dict(rate=float('nan'))), 'optimizer.rate=nan is not a number above 0'),
        (dict(optimizer=dict(rate=float('inf'))), 'optimizer.rate=inf is not a number above 0'),
        (dict(optimizer=dict(rate=np.float32('inf'))), 'optimizer.rate='),
        (dict(optimizer=dict(rate=10**400)), 'optimizer.rate=1000'),
        (
            dict(optimizer=dict(clip=0)),
            'optimizer.clip=0 is not a number at least 0.5 and at most 10 or None',
        ),
        (
            dict(optimizer=dict(adam=dict(b1=1))),
            'optimizer.adam.b1=1 is not a number at least 0 and below 1',
        ),
        (dict(teacher=dict(rate='x')), "teacher.rate='x' is not a number above 0"),
        (dict(optimizer=dict(name='sgd')), "optimizer.clip=None does not go with optimizer.name='"),
        (
            dict(optimizer=dict(adam=dict(b11=1))),
            'unknown key optimizer.adam.b11=1; known keys of optimizer.adam: b1, b2; did you ',
        ),
        (dict(sede=1), 'unknown key sede=1; known keys: seed, quick, '),
        (dict(zzz={'a': 1}), "unknown key zzz={'a': 1}; known keys: seed, quick, "),
        (dict(stage=dict(x={})), 'stage.x.steps is missing: it needs an integer at least 1 (upda'),
        (dict(stage=dict(x=3)), 'stage.x=3 is not a section with the keys steps, rates'),
        (dict(stage=dict(x=dict(steps=0))), 'stage.x.steps=0 is not an integer at least 1'),
        (
            dict(stage=dict(x=dict(steps=1, rates=dict(head=-1)))),
            'stage.x.rates.head=-1 is not a number at least 0',
        ),
    ],
)
def test_what_is_refused_is_one_sentence(values, message):
    forms = [values]
    if values.get('weights') != {3: 1}:  # a ConfigDict refuses such a key itself
        forms.append(ml_collections.ConfigDict(values))
    for given in forms:
        with pytest.raises(UserError, match='^' + re.escape(message)) as error:
            sections.parse(Config, given)
        assert '\n' not in str(error.value)


def test_the_whole_config_must_be_a_mapping():
    with pytest.raises(UserError, match=r'^the config=3 is not a section with the keys seed, '):
        sections.parse(Config, 3)


def test_where_stands_before_every_key():
    with pytest.raises(UserError, match=r'^a\.b\.b1=2 is not'):
        sections.parse(Adam, {'b1': 2}, 'a.b')


def test_a_declaration_that_cannot_be_checked_is_a_fault_of_the_code():
    @dataclasses.dataclass(frozen=True)
    class Wrong:
        value: set[int] = frozenset()

    with pytest.raises(TypeError, match='value: a section cannot declare'):
        sections.parse(Wrong, {'value': 1})


@pytest.mark.parametrize(
    'annotation, text, expected',
    [
        (int, '3', 3),
        (int, '007', 7),
        (float, '007.5', 7.5),
        (float, '3', 3.0),
        (float, '1e-3', 1e-3),
        (bool, 'true', True),
        (bool, 'False', False),
        (bool, '1', True),
        (bool, '0', False),
        (str, '3', '3'),
        (str, 'a,b', 'a,b'),
        (str | None, 'None', None),
        (str | None, 'x', 'x'),
        (int | None, 'None', None),
        (int | Literal['auto'], 'auto', 'auto'),
        (int | Literal['auto'], '8', 8),
        (int | float, '8', 8),
        (str | int, '8', 8),
        (Literal[1, 2], '2', 2),
        (Literal['a', None], 'None', None),
        (tuple[str, ...], 'a,b', ('a', 'b')),
        (tuple[str, ...], 'a', ('a',)),
        (tuple[str, ...], "('a','b')", ('a', 'b')),
        (tuple[str, ...], "('a',)", ('a',)),
        (tuple[str, ...], "'a','b'", ('a', 'b')),
        (tuple[str, ...], '(a, b)', ('a', 'b')),
        (tuple[str, ...], '["a"]', ('a',)),
        (tuple[str, ...], '5', ('5',)),
        (tuple[str, ...], '', ()),
        (tuple[str, ...], '()', ()),
        (tuple[int, ...], '(1, 2)', (1, 2)),
        (tuple[int, ...], '1,2', (1, 2)),
        (tuple[int, ...], '(3)', (3,)),
        (tuple[int, ...], '3,', (3,)),
        (tuple[float, float], '(0.8,1.25)', (0.8, 1.25)),
        (tuple[float, float], '1,2', (1.0, 2.0)),
        (tuple[tuple[str, str], ...], "(('a', 'b'),)", (('a', 'b'),)),
        (tuple[tuple[str, str], ...], "('a','b'),('c','d')", (('a', 'b'), ('c', 'd'))),
        (tuple[str, ...] | None, 'None', None),
        (Mapping[str, float], "{'a': 1}", {'a': 1.0}),
        (Mapping[str, object], "{'a': (1, 2)}", {'a': (1, 2)}),
        (Adam, "{'b1': 0.5}", {'b1': 0.5}),
        (Adam | None, 'None', None),
        (object, '3', 3),
        (object, 'x y', 'x y'),
    ],
)
def test_text_of_the_command_line(annotation, text, expected):
    result = sections.coerce(annotation, text, 'key')
    assert result == expected and repr(result) == repr(expected)


@pytest.mark.parametrize(
    'annotation, text, message',
    [
        (int, 'x', "key='x' is not an integer"),
        (int, '1.5', "key='1.5' is not an integer"),
        (float, 'nan', "key='nan' is not a number"),
        (Literal['a', None], 'b', "key='b' is not 'a' or None"),
        (float, '', "key='' is not a number"),
        (bool, 'maybe', "key='maybe' is not True or False"),
        (bool, '2', "key='2' is not True or False"),
        (int | None, 'x', "key='x' is not an integer or None"),
        (
            int | Literal['auto'],
            'aut',
            "key='aut' is not an integer or 'auto'; did you mean 'auto'?",
        ),
        (tuple[int, ...], '1,x', "key='1,x' is not a tuple of integers"),
        (tuple[float, float], '1', "key='1' is not a tuple of 2 numbers"),
        (tuple[float, float], '(1,2,3)', "key='(1,2,3)' is not a tuple of 2 numbers"),
        (Mapping[str, float], 'x', "key='x' is not a mapping from names to numbers"),
        (Mapping[str, float], "{'a': 'x'}", "key.a='x' is not a number"),
        (Adam, '3', "key='3' is not a section with the keys b1, b2"),
        (Adam, '(', "key='(' is not a section with the keys b1, b2"),
    ],
)
def test_text_of_another_type_is_one_sentence(annotation, text, message):
    with pytest.raises(UserError, match='^' + re.escape(message) + '$'):
        sections.coerce(annotation, text, 'key')


def test_describe_lists_every_leaf_in_order():
    lines = sections.describe(Config, 'config')
    keys = [key.removeprefix('config.') for key, *_ in lines]
    assert keys == [
        *('seed', 'quick', 'chunk', 'root', 'buckets', 'stretch', 'rules', 'mode', 'kinds'),
        *('weights', 'extra', 'optimizer.name', 'optimizer.rate', 'optimizer.clip'),
        *('optimizer.adam.b1', 'optimizer.adam.b2', 'teacher', 'teacher.name', 'teacher.rate'),
        *('teacher.clip', 'teacher.adam.b1', 'teacher.adam.b2', 'stage', 'stage.<name>.steps'),
        'stage.<name>.rates',
    ]
    by_key = {key.removeprefix('config.'): rest for key, *rest in lines}
    assert by_key['seed'] == ['an integer at least 0', '0', '']
    assert by_key['chunk'] == ["an integer at least 1 or 'auto'", "'auto'", '']
    assert by_key['root'] == ['a string or None', 'None', '']
    assert by_key['stretch'] == ['a tuple of 2 numbers', '(1.0, 1.0)', '']
    assert by_key['kinds'] == ["a tuple of strings out of 'a', 'b'", "('a',)", '']
    weights = 'a mapping from names to values that are each a number at least 0 or None'
    assert by_key['weights'] == [weights, "{'total': 1.0}", '']
    assert by_key['optimizer.name'] == ["one of 'adamw', 'lion', 'sgd'", "'adamw'", 'update rule']
    assert by_key['optimizer.adam.b1'] == [
        'a number at least 0 and below 1',
        '0.8',
        'decay of the mean',
    ]
    assert by_key['stage.<name>.steps'] == ['an integer at least 1', 'required', 'updates']


def test_to_dict_and_back():
    section = parse(stretch=(1, 2), stage=dict(x=dict(steps=5)), optimizer=dict(clip=1))
    plain = sections.to_dict(section)
    assert type(plain['optimizer']) is dict and type(plain['stage']['x']) is dict
    assert plain['stretch'] == (1.0, 2.0) and plain['optimizer']['clip'] == 1.0
    assert sections.parse(Config, plain) == section


def test_sections_import_no_jax():
    code = 'import sys; from mmjax import sections; assert "jax" not in sys.modules'
    subprocess.run([sys.executable, '-c', code], check=True)
