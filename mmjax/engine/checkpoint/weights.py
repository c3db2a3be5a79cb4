"""Loads the weights of another run (`--init_from`) and merges them strictly into a fresh model."""

import re
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax.traverse_util import unflatten_dict
from jaxtyping import PyTree

from mmjax.engine.checkpoint import arrays, checksums
from mmjax.engine.checkpoint.arrays import Path
from mmjax.errors import UserError

Renames = list[tuple[Path, Path]]  # (old prefix, new prefix)


def load_weights(spec: str) -> tuple[dict, dict, str]:
    """Loads the weights that `--init_from` names.

    Args:
      spec: 'DIR' is the best of a run, or its newest if there is no best; 'DIR/best' and
        'DIR/checkpoints' are the newest of that kind; 'DIR/checkpoints/N' is that step. It may
        end in ':model→teacher,head->' (or '->'): the first prefix that matches the path of a
        leaf is replaced; an empty prefix is the root. Other leaves keep their path.

    Returns:
      (params, batch_stats, description): nested dicts of whole NumPy arrays on every process.
      Averaged weights (ema) replace those they average, as in evaluation. Prefixes match paths
      inside params and batch_stats.
    """
    directory, renames = _parse(spec)
    step = epath.Path(arrays.on_first(lambda: str(_find(spec, directory))))
    leaves = arrays.specs(step)
    parts = {path[0] for path in leaves}
    state = ('ema' if 'ema' in parts else 'trainable', 'frozen')  # of a checkpoint
    chosen = ('params',) if 'params' in parts else state
    if parts.isdisjoint(chosen):
        raise UserError(f'--init_from={spec}: {step} holds neither params nor trainable weights')
    parts = {*chosen, 'batch_stats'}
    values = arrays.read(step, {path: x for path, x in leaves.items() if path[0] in parts})
    params: dict[Path, np.ndarray] = {}
    stats: dict[Path, np.ndarray] = {}
    used: set[Path] = set()
    for (part, *keys), value in values.items():
        tree = stats if part == 'batch_stats' else params
        prefixes = ((old, new) for old, new in renames if tuple(keys[: len(old)]) == old)
        old, new = next(prefixes, ((), ()))
        used.add(old)
        path = (*new, *keys[len(old) :])
        if path in tree:
            raise UserError(f'--init_from={spec}: two leaves are called {"/".join(path)}')
        tree[path] = value
    for old, _ in renames:
        if old not in used:
            raise UserError(f"--init_from={spec}: no leaf of {step} is under '{'/'.join(old)}'")
    description = f'{step} ({chosen[0]}, {len(values)} leaves)'
    return unflatten_dict(params), unflatten_dict(stats), description


def run_of(spec: str) -> epath.Path | None:
    """Returns the workdir of the weights that `spec` names, see `load_weights`; None if in none."""
    path = epath.Path(_parse(spec)[0])
    folders = (path, *list(path.parents)[:2])
    return next((folder for folder in folders if (folder / 'config.json').exists()), None)


def merge(
    fresh: PyTree,
    loaded: PyTree,
    *,
    allow_fresh: Sequence[str] = (),
    allow_unused: Sequence[str] = (),
) -> tuple[PyTree, str]:
    """Replaces `fresh` leaves by the `loaded` ones of the same path.

    Structure, dtype and sharding are those of `fresh`. A fresh leaf that is not replaced and a
    loaded leaf that is not used are errors, unless a regex of `allow_fresh` or `allow_unused`
    matches the whole path ('a/b/kernel').

    Returns:
      (the merged tree, what was loaded, left fresh and unused).

    Raises:
      UserError: on such a leaf, on another shape, or on floats for integers.
    """
    new, treedef = arrays.flatten(fresh)
    old = arrays.flatten(loaded)[0]
    remaining = [path for path in new if path not in old]
    unused = [path for path in old if path not in new]
    if bad := _not_allowed(remaining, allow_fresh):
        raise UserError(f'{arrays.join_paths(bad)} would stay fresh: not among the loaded weights')
    if bad := _not_allowed(unused, allow_unused):
        raise UserError(f'{arrays.join_paths(bad)} would stay unused: the model has no such leaf')
    leaves = [_cast(path, old[path], x) if path in old else x for path, x in new.items()]
    texts = [f'{len(new) - len(remaining)} leaves loaded']
    for name, paths in (('fresh', remaining), ('unused', unused)):
        names = ', '.join(sorted('/'.join(path) for path in paths))
        texts.append(f'{len(paths)} {name}' + (f': {names}' if paths else ''))
    return jax.tree.unflatten(treedef, leaves), '; '.join(texts)


def _cast(
    path: Path, loaded: jax.Array | np.ndarray, fresh: jax.Array | np.ndarray
) -> jax.Array | np.ndarray:
    """Returns `loaded` in the dtype and with the sharding of `fresh`."""
    name, value = '/'.join(path), np.asarray(loaded)
    if value.shape != fresh.shape:
        raise UserError(f'{name} has shape {fresh.shape} in the model, {value.shape} loaded')
    if jnp.issubdtype(value.dtype, jnp.floating) != jnp.issubdtype(fresh.dtype, jnp.floating):
        raise UserError(f'{name} is {fresh.dtype} in the model, {value.dtype} loaded')
    value = value.astype(fresh.dtype)
    if not isinstance(fresh, jax.Array):
        return value
    return jax.make_array_from_callback(value.shape, fresh.sharding, lambda index: value[index])


def _not_allowed(paths: Iterable[Path], patterns: Sequence[str]) -> list[Path]:
    try:
        compiled = [re.compile(pattern) for pattern in patterns]
    except re.error as error:
        raise UserError(f"'{error.pattern!s}' is no regular expression: {error}") from error
    return [path for path in paths if not any(p.fullmatch('/'.join(path)) for p in compiled)]


def _parse(spec: str) -> tuple[str, Renames]:
    """Splits 'DIR:a→b,c->d' into DIR and renames; the colon of gs:// belongs to DIR."""
    match = re.fullmatch(r'(.+?)(?::(?!//)([^:]*(?:→|->)[^:]*))?', spec)
    if match is None:
        raise UserError(f"--init_from='{spec}' names no directory")
    renames: Renames = []
    for part in filter(None, (match[2] or '').split(',')):
        sides = [tuple(filter(None, s.strip().split('/'))) for s in re.split('→|->', part)]
        if len(sides) != 2:
            raise UserError(f"--init_from={spec}: '{part}' is not of the form old→new")
        renames.append((sides[0], sides[1]))
    return match[1], renames


def _find(spec: str, directory: str) -> epath.Path:
    """Returns the verified step directory that `directory` means."""
    path = checksums.absolute(directory)
    if (path / checksums.CHECKSUMS).exists() or (path.name.isdecimal() and path.exists()):
        checksums.verify(path)
        return path
    names = ('best', 'checkpoints')
    for folder in [path] if path.name in names else [path / name for name in names]:
        newest, _ = checksums.walk_back(folder)
        if newest is not None:
            return folder / str(newest[0])
    raise UserError(f'--init_from={spec}: there is no checkpoint in {path}')
