"""Typed sections of a config: frozen dataclasses whose fields declare type, range and meaning.

From one declaration come the checks of what a user wrote, one-line errors, and the lines of --help.

    @dataclasses.dataclass(frozen=True)
    class Optimizer:
        name: str = field('adamw', 'update rule', choices=('adamw', 'lion'))
        learning_rate: float = field(1e-3, 'rate of a group with multiple 1', least=0)

    parse(Optimizer, {'name': 'lion'}, 'optimizer')

Annotations may be int, float, bool, str, None, object, Literal[...], tuple[X, ...], tuple[X, Y],
Mapping[str, X], another such dataclass, and unions of these.
"""

import ast
import contextlib
import dataclasses
import difflib
import math
import numbers
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING
from typing import Any, Literal, TypeVar, Union

from mmjax.errors import UserError

T = TypeVar('T')
# What an error calls a type: one value, several values.
_WORDS = {
    int: ('an integer', 'integers'),
    float: ('a number', 'numbers'),
    str: ('a string', 'strings'),
    bool: ('True or False', 'booleans'),
}
_BOUNDS = {
    'least': ('at least', lambda value, bound: value >= bound),
    'above': ('above', lambda value, bound: value > bound),
    'most': ('at most', lambda value, bound: value <= bound),
    'below': ('below', lambda value, bound: value < bound),
}
_NO_DEFAULT: Any = MISSING
_BOOLEANS = {'true': True, '1': True, 'false': False, '0': False}


class _Mismatch(Exception):
    """A value that is not of the declared type or not in the declared range."""


def field(
    default: T = _NO_DEFAULT,
    help: str = '',
    *,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: tuple[object, ...] | None = None,
) -> T:
    """Declares a field of a section.

    Args:
      default: its value if the user gives none; without a default the key is required.
      help: what the key means, in one sentence.
      least, most: inclusive bounds of a number, of each number of a tuple or mapping.
      above, below: exclusive bounds.
      choices: the values allowed, also for each item of a tuple or mapping.

    Returns:
      A `dataclasses.Field`; for a type checker, a value of the default's type.
    """
    limits = {'least': least, 'above': above, 'most': most, 'below': below, 'choices': choices}
    metadata = {'help': help} | {key: value for key, value in limits.items() if value is not None}
    if type(default).__hash__ is None:  # a mapping, a list
        return dataclasses.field(default_factory=lambda: to_dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def parse(cls: type[T], values: Mapping[str, object], where: str = '', base: object = MISSING) -> T:
    """Builds a section from what the user wrote.

    Keys that `values` lacks take the defaults, those of nested sections too; a mapping with open
    keys replaces its default. At the end a section's method `check(where)`, if any, may raise
    UserError for what relates two fields.

    Args:
      cls: a dataclass.
      values: nested mappings, `ml_collections.ConfigDict` included; or an instance.
      where: the dotted key of the section, '' for the whole config.
      base: a section with the defaults; without one they are those declared.

    Raises:
      UserError: an unknown or missing key, a wrong type, a value out of range or not a choice; one
        sentence with the dotted key, the value and what is allowed.
    """
    if isinstance(values, cls):
        return values
    if not _is_mapping(values):
        raise _error(cls, values, where, {})
    given = dict(values.items())
    hints = typing.get_type_hints(cls)
    fields = {one.name: one for one in dataclasses.fields(cls) if one.init}
    for name, value in given.items():
        if name not in fields:
            raise UserError(
                f'unknown key {_join(where, name)}={to_dict(value)!r}; known keys'
                f'{" of " + where if where else ""}: {", ".join(fields) or "none"}'
                + did_you_mean(name, list(fields))
            )
    arguments = {}
    for name, one in fields.items():
        key = _join(where, name)
        default = _default(one, base)
        section = section_of(hints[name])
        if name not in given:
            if default is MISSING:
                if section is not hints[name]:
                    raise UserError(
                        f'{key} is missing: it needs {_allowed(hints[name], one.metadata)}'
                        + (f' ({one.metadata["help"]})' if one.metadata.get('help') else '')
                    )
                default = parse(section, {}, key)
            arguments[name] = default
        elif section and _is_mapping(given[name]):
            arguments[name] = parse(section, given[name], key, default)
        else:
            arguments[name] = _entry(hints[name], given[name], key, one.metadata)
    result = cls(**arguments)
    if hasattr(result, 'check'):
        result.check(where)
    return result


def coerce(annotation: object, text: str, where: str) -> object:
    """Converts command-line text to the type of `annotation`.

    'None' stands for None; true, false, 1 and 0 for a bool; 'a,b', "('a', 'b')" and '1,2' for a
    tuple; a dict literal for a mapping. A section's dict literal is returned as a dict, for `parse`
    to merge and check.

    Raises:
      UserError: text that is not of the type, in one sentence that begins with `where`.
    """
    try:
        return _from_text(annotation, text, where)
    except _Mismatch:
        raise _error(annotation, text, where, {}) from None


def describe(cls: Any, prefix: str = '', base: Any = MISSING) -> list[tuple[str, str, str, str]]:
    """Lists the leaves of a section in order of declaration, for --help.

    Args:
      cls: a dataclass.
      prefix: the dotted key of the section.
      base: a section with the defaults; without one they are those declared.

    Returns:
      (dotted key, what its value may be, default, meaning) of each. `<name>` in a key stands for
      any name; a required key has the default 'required'.
    """
    hints = typing.get_type_hints(cls)
    out = []
    for one in dataclasses.fields(cls):
        if not one.init:
            continue
        annotation = hints[one.name]
        key = _join(prefix, one.name)
        default = _default(one, base)
        section = section_of(annotation)
        if section is not annotation:
            text = 'required' if default is MISSING else repr(to_dict(default))
            kind = _allowed(annotation, one.metadata)
            out.append((key, kind, text, one.metadata.get('help', '')))
        if section:
            out += describe(section, key, default)
        elif typing.get_origin(annotation) is Mapping:
            section = section_of(typing.get_args(annotation)[1])
            out += describe(section, f'{key}.<name>') if section else []
    return out


def did_you_mean(word: object, known: Sequence[object]) -> str:
    """Returns "; did you mean 'x'?" for the known word closest to `word`, or ''."""
    close = difflib.get_close_matches(str(word), [str(one) for one in known], 1)
    return f"; did you mean '{close[0]}'?" if close else ''


def _default(one: dataclasses.Field, base: Any) -> Any:
    if dataclasses.is_dataclass(base):
        return getattr(base, one.name)
    if one.default_factory is not MISSING:
        return one.default_factory()
    return one.default


def _convert(annotation: Any, value: Any, where: str, limits: Mapping[str, Any]) -> Any:
    """Returns `value` as the declared type; raises _Mismatch, or UserError for a nested key."""
    if annotation is object:
        return to_dict(value)
    if _is_union(annotation):
        for arm in typing.get_args(annotation):
            with contextlib.suppress(_Mismatch):
                return _convert(arm, value, where, limits)
        raise _Mismatch
    origin = typing.get_origin(annotation)
    arguments = typing.get_args(annotation)
    if origin is Literal:
        for one in arguments:
            if type(one) is type(value) and one == value:
                return one
    elif origin is tuple:
        if isinstance(value, list | tuple):
            items = _item_types(arguments, len(value))
            pairs = zip(items, value, strict=True)
            return tuple(_convert(item, one, where, limits) for item, one in pairs)
    elif dataclasses.is_dataclass(annotation):
        if _is_mapping(value) or type(value) is annotation:
            return parse(annotation, value, where)
    elif origin is Mapping:
        if _is_mapping(value):
            for key in value:
                if not isinstance(key, str):
                    raise UserError(f'{where} has the key {key!r}, which is not a string')
            entry = lambda key: _entry(arguments[1], value[key], _join(where, key), limits)
            return {key: entry(key) for key in value}
    elif annotation is types.NoneType:
        if value is None:
            return None
    elif annotation in _WORDS:
        return _scalar(annotation, value, limits)
    else:
        raise TypeError(f'{where}: a section cannot declare {annotation!r}')
    raise _Mismatch


def _scalar(annotation: Any, value: Any, limits: Mapping[str, Any]) -> Any:
    if annotation in (int, float):
        kind = numbers.Integral if annotation is int else numbers.Real
        if not isinstance(value, kind) or isinstance(value, bool):
            raise _Mismatch
        try:
            value = annotation(value)
        except OverflowError:  # an integer too large for a float
            raise _Mismatch from None
        if annotation is float and not math.isfinite(value):
            raise _Mismatch
        for name, (_, holds) in _BOUNDS.items():
            if name in limits and not holds(value, limits[name]):
                raise _Mismatch
    elif not isinstance(value, annotation):
        raise _Mismatch
    if value not in limits.get('choices', (value,)):
        raise _Mismatch
    return value


def _entry(annotation: Any, value: Any, where: str, limits: Mapping[str, Any]) -> Any:
    """Converts the value of a key; raises UserError for a mismatch."""
    try:
        return _convert(annotation, value, where, limits)
    except _Mismatch:
        raise _error(annotation, value, where, limits) from None


def _item_types(arguments: tuple, count: int) -> list:
    if arguments[-1:] == (...,):
        return [arguments[0]] * count
    if count != len(arguments):
        raise _Mismatch
    return list(arguments)


def _from_text(annotation: Any, text: str, where: str) -> Any:
    if _is_union(annotation):
        # None and fixed words come before tuples; text as it stands always fits, so it is last.
        fixed = lambda arm: arm is types.NoneType or typing.get_origin(arm) is Literal
        arms = sorted(typing.get_args(annotation), key=lambda arm: (arm is str, not fixed(arm)))
        for arm in arms:
            with contextlib.suppress(_Mismatch):
                return _from_text(arm, text, where)
        raise _Mismatch
    if annotation is str:
        return text
    if annotation is bool:
        return _convert(bool, _BOOLEANS.get(text.lower()), where, {})
    origin = typing.get_origin(annotation)
    if origin is Literal:
        words = {str(one): one for one in typing.get_args(annotation)}
        if text not in words:
            raise _Mismatch
        return words[text]
    if annotation in (int, float):
        try:
            return _scalar(annotation, annotation(text), {})
        except ValueError:
            raise _Mismatch from None
    if origin is tuple:
        return _tuple_from_text(annotation, text.strip(), where)
    value = _literal(text)
    if annotation is object:
        return text if value is MISSING else value
    if dataclasses.is_dataclass(annotation) and isinstance(value, dict):
        return value
    return _convert(annotation, value, where, {})


def _tuple_from_text(annotation: Any, text: str, where: str) -> tuple:
    bracketed = text[:1] in ('(', '[')
    value = _literal(text)
    if bracketed and isinstance(value, list | tuple):
        return _convert(annotation, value, where, {})
    if bracketed and text[-1:] == {'(': ')', '[': ']'}[text[0]]:
        text = text[1:-1]
    pieces = [piece.strip() for piece in text.split(',')]
    if not pieces[-1]:
        pieces.pop()
    items = _item_types(typing.get_args(annotation), len(pieces))
    pieces = [p[1:-1] if len(p) > 1 and p[0] == p[-1] and p[0] in '\'"' else p for p in pieces]
    return tuple(_from_text(item, p, where) for item, p in zip(items, pieces, strict=True))


def _literal(text: str) -> Any:
    """Returns the Python value that `text` spells, MISSING if it spells none."""
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return MISSING


def _allowed(annotation: Any, limits: Mapping[str, Any], many: bool = False) -> str:
    """Says what a value may be: 'an integer at least 1', 'a tuple of 2 numbers'."""
    origin = typing.get_origin(annotation)
    arguments = typing.get_args(annotation)
    if _is_union(annotation) or origin is Literal:
        each = [_allowed(arm, limits) if origin is not Literal else repr(arm) for arm in arguments]
        return ('values that are each ' if many else '') + ' or '.join(each)
    if origin is tuple:
        count = '' if arguments[-1:] == (...,) else f'{len(arguments)} '
        items = [item for item in dict.fromkeys(arguments) if item is not ...]
        if len(items) == 1:
            inner = _allowed(items[0], limits, many=True)
        else:
            inner = f'values ({", ".join(_allowed(item, limits) for item in items)})'
        return f'{"tuples" if many else "a tuple"} of {count}{inner}'
    if dataclasses.is_dataclass(annotation):
        names = ', '.join(one.name for one in dataclasses.fields(annotation) if one.init)
        return f'{"sections" if many else "a section"} with the keys {names}'
    if origin is Mapping:
        inner = _allowed(arguments[1], limits, many=True)
        return f'{"mappings" if many else "a mapping"} from names to {inner}'
    if annotation in (types.NoneType, object):
        return 'None' if annotation is types.NoneType else 'values' if many else 'a value'
    words = _WORDS[annotation][many]
    if 'choices' in limits:
        return f'{words + " out of" if many else "one of"} ' + ', '.join(
            map(repr, limits['choices'])
        )
    names = [name for name in _BOUNDS if name in limits and annotation in (int, float)]
    bounds = ' and '.join(f'{_BOUNDS[name][0]} {limits[name]}' for name in names)
    return f'{words} {bounds}'.strip()


def _error(annotation: Any, value: Any, where: str, limits: Mapping[str, Any]) -> UserError:
    known = [*limits.get('choices', ())]
    for arm in typing.get_args(annotation) if _is_union(annotation) else [annotation]:
        known += typing.get_args(arm) if typing.get_origin(arm) is Literal else []
    hint = did_you_mean(value, known) if isinstance(value, str) else ''
    allowed = _allowed(annotation, limits)
    return UserError(f'{where or "the config"}={to_dict(value)!r} is not {allowed}{hint}')


def section_of(annotation: Any) -> Any:
    """Returns the dataclass that an annotation is, or is a union with; None if it is another."""
    arms = typing.get_args(annotation) if _is_union(annotation) else (annotation,)
    return next((arm for arm in arms if dataclasses.is_dataclass(arm)), None)


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (Union, types.UnionType)


def _is_mapping(value: object) -> bool:
    return isinstance(value, Mapping) or hasattr(value, 'items')


def to_dict(value: Any) -> Any:
    """Replaces sections and mappings, also nested ones, by plain dicts; tuples stay tuples."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {one.name: to_dict(getattr(value, one.name)) for one in dataclasses.fields(value)}
    if _is_mapping(value):
        return {key: to_dict(one) for key, one in value.items()}
    if type(value) in (list, tuple):
        return type(value)(to_dict(one) for one in value)
    return value


def _join(where: str, name: object) -> str:
    return f'{where}.{name}' if where else str(name)
