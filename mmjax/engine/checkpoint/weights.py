"""Weights of another run (`--init_from`), and strict merging into a fresh model."""

import dataclasses
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from mmjax.engine.checkpoint import arrays, checksums
from mmjax.engine.checkpoint.arrays import Tree
from mmjax.errors import UserError


def load_weights(spec: str) -> tuple[dict, dict, str]:
    """Loads the weights that `--init_from` names.

    Args:
      spec: 'DIR' is the best of a run, the newest where there is no best; 'DIR/best' and
        'DIR/checkpoints' are the newest of that kind; 'DIR/checkpoints/N' is that one. It may end
        in ':model→teacher,head->' (or '->'): the first prefix of a leaf's path that matches is
        replaced, an empty one standing for the top; other leaves keep their path.

    Returns:
      (params, batch_stats, description): nested dicts of NumPy arrays, whole on every process; ema
      in place of the weights that have one, as in evaluation. The paths that a prefix matches are
      those inside of params and batch_stats.
    """
    where, renames = _parse(spec)
    path = epath.Path(arrays.on_first(lambda: str(_find(spec, where))))
    kinds = {keys[0] for keys in arrays.shapes(path)}
    if 'params' in kinds:
        chosen = ('params',)
    elif kinds & {'trainable', 'frozen'}:
        chosen = ('ema' if 'ema' in kinds else 'trainable', 'frozen')
    else:
        raise UserError(f'--init_from={spec}: {path} holds neither params nor trainable weights')
    flat = arrays.read(path, lambda keys: keys[0] in (*chosen, 'batch_stats'))
    params, stats, used = {}, {}, set()
    for keys, leaf in flat.items():
        target = stats if keys[0] == 'batch_stats' else params
        renamed = _rename(keys[1:], renames, used)
        if renamed in target:
            raise UserError(f'--init_from={spec}: two leaves are called {"/".join(renamed)}')
        target[renamed] = leaf
    dead = ['/'.join(old) for old, _ in renames if old not in used]
    if dead:
        raise UserError(f"--init_from={spec}: no leaf of {path} is under '{dead[0]}'")
    return arrays.nest(params), arrays.nest(stats), f'{path} ({chosen[0]}, {len(flat)} leaves)'


def run_of(spec: str) -> epath.Path | None:
    """Returns the workdir that the weights named as in `load_weights` lie in; None if in none."""
    where = epath.Path(_parse(spec)[0])
    above = (where, *list(where.parents)[:2])
    return next((path for path in above if (path / 'config.json').exists()), None)


@dataclasses.dataclass(frozen=True)
class Report:
    """What `merge` did, as leaf paths 'a/b/kernel'."""

    loaded: tuple[str, ...]
    fresh: tuple[str, ...]
    unused: tuple[str, ...]

    def __str__(self) -> str:
        listed = [f'{len(self.loaded)} leaves loaded']
        for name in ('fresh', 'unused'):
            paths = getattr(self, name)
            listed.append(f'{len(paths)} {name}' + (f': {", ".join(paths)}' if paths else ''))
        return '; '.join(listed)


def merge(
    fresh: Tree,
    loaded: Tree,
    *,
    allow_fresh: Sequence[str] = (),
    allow_unused: Sequence[str] = (),
) -> tuple[Tree, Report]:
    """Puts `loaded` leaves in place of the `fresh` ones of the same path.

    Structure, dtype and sharding are those of `fresh`. A fresh leaf that nothing replaces and a
    loaded one that nobody takes are errors, unless a regex of `allow_fresh` or `allow_unused`
    matches the whole path ('a/b/kernel').

    Raises:
      UserError: on such a leftover, on another shape, or on floats for integers.
    """
    new, treedef = arrays.leaves(fresh)
    old = arrays.leaves(loaded)[0]
    left = [keys for keys in new if keys not in old]
    unused = [keys for keys in old if keys not in new]
    if bad := _not_allowed(left, allow_fresh):
        raise UserError(f'{arrays.names(bad)} would stay fresh: not among the loaded weights')
    if bad := _not_allowed(unused, allow_unused):
        raise UserError(f'{arrays.names(bad)} would stay unused: the model has no such leaf')
    out = {}
    for keys, leaf in new.items():
        if keys not in old:
            out[keys] = leaf
            continue
        name, value = '/'.join(keys), np.asarray(old[keys])
        if value.shape != leaf.shape:
            shapes = arrays.shape(leaf), arrays.shape(value)
            raise UserError(f'{name} has shape {shapes[0]} in the model, {shapes[1]} loaded')
        if jnp.issubdtype(value.dtype, jnp.floating) != jnp.issubdtype(leaf.dtype, jnp.floating):
            raise UserError(f'{name} is {leaf.dtype} in the model, {value.dtype} loaded')
        out[keys] = value = value.astype(leaf.dtype)
        if isinstance(leaf, jax.Array):
            out[keys] = jax.make_array_from_callback(
                value.shape, leaf.sharding, lambda index, value=value: value[index]
            )
    names = lambda found: tuple(sorted('/'.join(keys) for keys in found))
    report = Report(names(new.keys() & old.keys()), names(left), names(unused))
    return jax.tree.unflatten(treedef, out.values()), report


def _not_allowed(paths: Sequence[tuple[str, ...]], patterns: Sequence[str]) -> list:
    try:
        compiled = [re.compile(pattern) for pattern in patterns]
    except re.error as error:
        raise UserError(f"'{error.pattern}' is no regular expression: {error}") from error
    return [keys for keys in paths if not any(p.fullmatch('/'.join(keys)) for p in compiled)]


def _parse(spec: str) -> tuple[str, list[tuple[tuple[str, ...], tuple[str, ...]]]]:
    """Splits 'DIR:a→b,c->d'; the colon of gs:// is none of ours."""
    match = re.fullmatch(r'(.+?)(?::(?!//)([^:]*(?:→|->)[^:]*))?', spec)
    if match is None:
        raise UserError(f"--init_from='{spec}' names no directory")
    renames = []
    for part in filter(None, (match[2] or '').split(',')):
        sides = re.split('→|->', part)
        if len(sides) != 2:
            raise UserError(f"--init_from={spec}: '{part}' is not of the form old→new")
        renames.append(tuple(tuple(k for k in s.strip().split('/') if k) for s in sides))
    return match[1], renames


def _rename(keys, renames, used):
    for old, new in renames:
        if keys[: len(old)] == old:
            used.add(old)
            return new + keys[len(old) :]
    return keys


def _find(spec: str, where: str) -> epath.Path:
    """Returns the verified step directory that `where` means."""
    path = checksums.absolute(where)
    if (path / checksums.CHECKSUMS).exists() or (path.name.isdecimal() and path.exists()):
        checksums.verify(path)
        return path
    names = ('best', 'checkpoints')
    for folder in (path,) if path.name in names else tuple(path / name for name in names):
        found, _ = checksums.walk_back(folder)
        if found is not None:
            return folder / str(found[0])
    raise UserError(f'--init_from={spec}: there is no checkpoint in {path}')
