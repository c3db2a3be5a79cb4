"""Configs: the engine's defaults, words after the colon, and a view that knows what was read."""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import ml_collections
from ml_collections import config_dict

from mmjax.errors import UserError


def default() -> ml_collections.ConfigDict:
    """Returns the keys that every recipe shares, at the engine's defaults."""
    config = ml_collections.ConfigDict()
    config.task = ''  # a folder of mmjax.recipes, or 'package.module:Class'
    config.seed = 0
    config.precision = 'float32'  # of the computation: float32 | bfloat16 | float16
    config.batch_size = 32  # examples an update, over all devices and hosts
    config.accumulation = 1  # micro-batches an update; contrastive terms stay exact
    config.quick_compile = False  # XLA optimises little: for runs of a few updates
    config.mesh = dict(data=-1, fsdp=1)  # devices along each axis; -1 takes what is left
    config.rules = ()  # (group, regex) pairs put before the task's own
    config.loss_weights = dict()  # term → number or dict(start=, end=, schedule=, fraction=)
    config.optimizer = dict(
        learning_rate=1e-3,  # of a group with multiple 1, per update
        schedule='cosine',  # constant linear cosine cosine_restarts one_cycle step
        span='stage',  # or 'run': whether the schedule spans a stage or all of them
        end=0.0,  # multiple of the rate that the schedule ends on
        warmup_steps=0,  # at most one of the three warm-ups
        warmup_epochs=0.0,
        warmup_fraction=0.0,
        warmup_init=0.0,  # multiple of the rate at the first update
        period_steps=0,  # cosine_restarts and step: length of a period
        period_epochs=0.0,
        period_factor=1.0,  # cosine_restarts: each period is so much longer than the last
        gamma=0.1,  # step: factor at each period's end
        weight_decay=0.0,  # decoupled; skips biases, norms and scalars
        clip=1.0,  # global norm of the trainable gradients; 0 is off
        b1=0.9,  # up to .9999
        b2=0.999,
        eps=1e-8,  # from 1e-12
    )
    config.sampler = dict(name='shuffle')
    config.stages = ()
    config.stage = ml_collections.ConfigDict()
    config.ema = 0.0  # decay of the averaged weights that evaluation uses; 0 is off
    config.not_finite = dict(policy='stop', budget=0)  # or 'skip', at most `budget` updates a run
    config.evaluate = dict(every_steps=0, every_epochs=0.0, at_start=False)  # 0: at stage ends
    config.best = dict(metric='', mode='min')  # 'val/loss': keeps its checkpoint; '' is off
    config.early_stop = dict(metric='', mode='min', patience=0, min_delta=0.0)  # in evaluations
    config.checkpoint = dict(every_steps=500, keep=2)
    config.log = dict(every_steps=10, tensorboard=True)
    config.init = dict(
        allow_fresh=(),  # regexes of leaves that --init_from may miss,
        allow_unused=(),  # or have beyond the model's
        assets=True,  # takes the tokenizer and the like of --init_from's run too
    )
    config.data = dict(
        root=config_dict.placeholder(str),  # the user's folder; none: built-in data
        cache=config_dict.placeholder(str),  # prepared records; none: ~/.cache/mmjax
        workers=0,  # loader processes; 0: threads of this one
        threads=2,
    )
    return config


def words(argument: str | None, known: Iterable[str]) -> frozenset[str]:
    """Splits the text after the colon of `--config=FILE:a,b`; an unknown word is an error."""
    known = tuple(known)
    found = frozenset(word for word in (argument or '').split(',') if word)
    for word in sorted(found):
        if word not in known:
            raise UserError(f"unknown config word '{word}'; known: {', '.join(known)}")
    return found


def one_of(found: Iterable[str], choices: tuple[str, ...], default: str) -> str:
    """Returns which of `choices` is among the words found; two of them are an error."""
    named = [word for word in choices if word in found]
    if len(named) > 1:
        raise UserError(f"the config words '{named[0]}' and '{named[1]}' exclude each other")
    return named[0] if named else default


class View:
    """A read-only view of a ConfigDict that records which leaves were read.

    Attribute access returns a leaf or a nested view. `to_dict` reads everything beneath.
    """

    def __init__(self, config: Mapping, path: str = '', read: set[str] | None = None):
        self._config, self._path = config, path
        self._read = set() if read is None else read

    def _key(self, name: str) -> str:
        return f'{self._path}.{name}' if self._path else name

    def __getattr__(self, name: str) -> Any:
        if name.startswith('__'):
            raise AttributeError(name)
        if name not in self._config:
            raise UserError(f"the config has no key '{self._key(name)}', which this task needs")
        value = self._config[name]
        if isinstance(value, ml_collections.ConfigDict):
            return View(value, self._key(name), self._read)
        self._read.add(self._key(name))
        return value

    __getitem__ = __getattr__

    def __contains__(self, name: str) -> bool:
        return name in self._config

    def __iter__(self):
        return iter(self._config)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain nested dicts; every key beneath counts as read."""
        out = {}
        for name in self._config:
            value = self[name]
            out[name] = value.to_dict() if isinstance(value, View) else value
        return out

    def ignore(self, *names: str) -> None:
        """Counts keys as read that this mode has no use for."""
        for name in names:
            value = self[name]
            if isinstance(value, View):
                value.to_dict()

    def unread(self) -> list[str]:
        """Returns the leaves beneath this view that nobody has read."""
        return [key for key in _leaves(self._config, self._path) if key not in self._read]


def _leaves(config: Mapping, path: str) -> list[str]:
    out = []
    for name in config:
        key = f'{path}.{name}' if path else name
        value = config[name]
        out += _leaves(value, key) if isinstance(value, ml_collections.ConfigDict) else [key]
    return out


def build(cls, values: Mapping[str, Any], where: str):
    """Makes the dataclass `cls` from a dict; an unknown key is an error that names it."""
    known = [field.name for field in dataclasses.fields(cls) if field.init]
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(key, known, 1)
            hint = f"; did you mean '{close[0]}'?" if close else f'; known: {", ".join(known)}'
            raise UserError(f"unknown key '{where}.{key}'{hint}")
    return cls(**values)


def hashable(value: Any) -> Any:
    """Turns nested dicts and lists to sorted tuples of pairs and tuples."""
    if isinstance(value, Mapping):
        return tuple((key, hashable(value[key])) for key in sorted(value))
    if isinstance(value, list | tuple):
        return tuple(hashable(item) for item in value)
    return value


def differences(old: Mapping, new: Mapping, path: str = '') -> list[tuple[str, Any, Any]]:
    """Returns (key, old value, new value) of every leaf that two nested dicts do not share."""
    out = []
    for name in sorted({*old, *new}):
        key = f'{path}.{name}' if path else name
        a, b = old.get(name), new.get(name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            out += differences(a, b, key)
        elif a != b:
            out.append((key, a, b))
    return out


def thaw(value: Any) -> Any:
    """Undoes `hashable`: tuples of (name, value) pairs become dicts again."""
    if isinstance(value, tuple):
        if value and all(
            isinstance(p, tuple) and len(p) == 2 and isinstance(p[0], str) for p in value
        ):
            return {key: thaw(item) for key, item in value}
        return tuple(thaw(item) for item in value)
    return value
