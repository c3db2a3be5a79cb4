"""Published weights on disk: safetensors folders, and tables from their names to our trees.

A family's table says for each published tensor its shape, which of our leaves it fills and how it
is laid out. Reading and writing both follow the table, so one cannot drift from the other. Pickled
weights are never opened.
"""

import itertools
import json
import math
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors
from flax import traverse_util

from mmjax.errors import UserError

SINGLE, INDEX, CONFIG = 'model.safetensors', 'model.safetensors.index.json', 'config.json'
OPEN_CLIP = 'open_clip_model.safetensors'  # what open_clip calls SINGLE


class Layout(NamedTuple):
    """How a published array becomes one of ours, and back."""

    load: Callable[[np.ndarray], np.ndarray]
    save: Callable[[np.ndarray], np.ndarray]


SAME = Layout(lambda x: x, lambda x: x)
LINEAR = Layout(lambda x: x.T, lambda x: x.T)  # [out, in] → [in, out]
PATCHES = Layout(  # [width, 3, patch, patch] → [patch · patch · 3, width]
    lambda x: x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0]),
    lambda x: x.reshape(math.isqrt(len(x) // 3), -1, 3, x.shape[1]).transpose(3, 2, 0, 1),
)
CONV = Layout(  # [out, in, height, width] → [height, width, in, out]
    lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1)
)


class Entry(NamedTuple):
    """One published tensor; several `paths` share it in equal parts along its first axis."""

    name: str
    shape: tuple[int, ...]
    paths: tuple[str, ...]  # 'params/norm/scale', 'batch_stats/stem_norm/mean'
    layout: Layout = SAME


def linear(name: str, path: str, inputs: int, outputs: int) -> list[Entry]:
    """Entries of a PyTorch linear layer with bias."""
    return [
        Entry(f'{name}.weight', (outputs, inputs), (f'{path}/kernel',), LINEAR),
        Entry(f'{name}.bias', (outputs,), (f'{path}/bias',)),
    ]


def norm(name: str, path: str, features: int) -> list[Entry]:
    """Entries of a PyTorch LayerNorm."""
    return [
        Entry(f'{name}.weight', (features,), (f'{path}/scale',)),
        Entry(f'{name}.bias', (features,), (f'{path}/bias',)),
    ]


def fused_attention(name: str, path: str, width: int) -> list[Entry]:
    """Entries of a PyTorch MultiheadAttention, whose queries, keys and values are one tensor."""
    inward = [f'{path}/{part}' for part in ('query', 'key', 'value')]
    kernels = tuple(f'{part}/kernel' for part in inward)
    biases = tuple(f'{part}/bias' for part in inward)
    return [
        Entry(f'{name}.in_proj_weight', (3 * width, width), kernels, LINEAR),
        Entry(f'{name}.in_proj_bias', (3 * width,), biases),
        *linear(f'{name}.out_proj', f'{path}/out', width, width),
    ]


def blocks(
    name: str, path: str, depth: int, parts: Mapping[str, str], width: int, mlp_width: int
) -> list[Entry]:
    """Entries of all blocks of a transformer: `name`.0 is `path`/block_0, …

    `parts` maps the submodules of our block to those of the published one.
    """
    shapes = {'up': (width, mlp_width), 'down': (mlp_width, width)}
    table = []
    for index, (ours, theirs) in itertools.product(range(depth), parts.items()):
        names = f'{name}.{index}.{theirs}', f'{path}/block_{index}/{ours}'
        if ours.startswith('norm'):
            table += norm(*names, width)
        else:
            table += linear(*names, *shapes.get(ours.rpartition('/')[2], (width, width)))
    return table


class Weights:
    """The tensors of a folder: `model.safetensors`, or the shards that its index names.

    Without either, `open_clip_model.safetensors` is taken. Opening reads headers only. `names` maps
    each tensor to its file.

    Raises:
      UserError: a file is missing, unreadable or not what the index says, or two files hold the
        same tensor.
    """

    def __init__(self, folder):
        self.folder = pathlib.Path(folder)
        if not self.folder.is_dir():
            raise UserError(f'{folder}: no such folder of pretrained weights')
        if (self.folder / INDEX).is_file():
            index = read_json(self.folder / INDEX)
            listed = index.get('weight_map')
            if not isinstance(listed, dict) or not listed:
                raise UserError(f"{self.folder / INDEX}: key 'weight_map' is missing or empty")
            files = sorted(set(listed.values()))
        else:
            listed = {}
            files = [name for name in (SINGLE, OPEN_CLIP) if (self.folder / name).is_file()][:1]
        if not files:
            raise UserError(
                f'{self.folder}: found neither {SINGLE} nor {INDEX}; other formats, such as '
                'pytorch_model.bin, can run code when read and have to be converted first'
            )
        self.names: dict[str, pathlib.Path] = {}
        for file in files:
            path = self.folder / file
            for name in self._open(path, lambda reader: list(reader.keys())):
                if name in self.names:
                    raise UserError(f"{path}: tensor '{name}' is in {self.names[name].name} too")
                self.names[name] = path
        for name, file in listed.items():
            if self.names.get(name) != self.folder / file:
                raise UserError(f"{self.folder / file}: {INDEX} puts tensor '{name}' here")

    def count(self, pattern: str, first: int = 0) -> int:
        """Returns how many numbers from `first` on the group of `pattern` takes in the names."""
        matches = (re.match(pattern, name) for name in self.names)
        return max((int(match[1]) + 1 - first for match in matches if match), default=0)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor from its file's header."""
        return tuple(
            self._open(self._file(name), lambda reader: reader.get_slice(name).get_shape())
        )

    def read(self, names: Iterable[str]) -> dict[str, np.ndarray]:
        """Reads tensors as float32, each file opened once."""
        by_file: dict[pathlib.Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self._file(name), []).append(name)
        tensors = {}
        for path, keys in by_file.items():
            get = lambda reader, keys=keys: {key: reader.get_tensor(key) for key in keys}
            tensors |= self._open(path, get)
        return {name: np.asarray(x, np.float32) for name, x in tensors.items()}

    def _file(self, name: str) -> pathlib.Path:
        if name not in self.names:
            raise UserError(f"{self.folder}: tensor '{name}' is missing")
        return self.names[name]

    @staticmethod
    def _open(path: pathlib.Path, action: Callable) -> Any:
        try:
            with safetensors.safe_open(path, framework='numpy') as reader:
                return action(reader)
        except FileNotFoundError:
            raise UserError(f'{path}: no such file') from None
        except (OSError, safetensors.SafetensorError) as error:
            raise UserError(f'{path}: not a readable safetensors file ({error})') from None


def read_json(path) -> dict:
    """Reads a JSON object; UserError names the file, and the line where it is malformed."""
    try:
        content = json.loads(pathlib.Path(path).read_text('utf-8'))
    except FileNotFoundError:
        raise UserError(f'{path}: no such file') from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'{path}: cannot be read ({error})') from None
    except json.JSONDecodeError as error:
        raise UserError(f'{path}, line {error.lineno}: malformed JSON ({error.msg})') from None
    if not isinstance(content, dict):
        raise UserError(f'{path}: expected a JSON object, found a {type(content).__name__}')
    return content


def check_config(path, config: Mapping[str, Any], key: str, allowed: Sequence[Any]) -> None:
    """Raises UserError where `config` sets `key` to something this code does not compute."""
    if key in config and config[key] not in allowed:
        known = ' or '.join(repr(value) for value in allowed)
        raise UserError(f"{path}: key '{key}' is {config[key]!r}; expected {known}")


def sizes(path, config: Mapping[str, Any], keys: Mapping[str, tuple[str, Any]]) -> dict[str, Any]:
    """Reads module fields from a config: `keys` maps field → (its key, the published default).

    A published config leaves out what equals its family's default. A value has to be a positive
    number of the default's type.
    """
    fields = {}
    for field, (key, default) in keys.items():
        value = config.get(key, default)
        if isinstance(value, bool) or not isinstance(value, type(default)) or value <= 0:
            kind = 'a positive whole number' if isinstance(default, int) else 'a positive number'
            raise UserError(f"{path}: key '{key}' is {value!r}, not {kind}")
        fields[field] = value
    return fields


def load(
    folder,
    entries: Sequence[Entry],
    unused: Sequence[str] = (),
    rename: Callable[[str], str] = lambda name: name,
) -> dict[str, Any]:
    """Reads a folder along a table.

    Args:
      folder: holds the safetensors.
      entries: the table; all of its tensors must be there, in its shapes.
      unused: regexes (full match) of tensors that are left out on purpose.
      rename: maps a name in the file to the table's.

    Returns:
      {'params': tree, 'batch_stats': tree} of float32 NumPy arrays; either may be empty.

    Raises:
      UserError: a tensor is missing, unknown or has another shape; names tensor and file.
    """
    weights = Weights(folder)
    table = {entry.name: entry for entry in entries}
    published: dict[str, str] = {}
    for name, file in weights.names.items():
        ours = rename(name)
        if ours in published:
            raise UserError(f"{file}: tensors '{published[ours]}' and '{name}' are the same one")
        if ours in table:
            published[ours] = name
        elif not any(re.fullmatch(pattern, ours) for pattern in unused):
            raise UserError(f"{file}: tensor '{name}' has no place in the model")
    for entry in entries:
        if entry.name not in published:
            raise UserError(f"{weights.folder}: tensor '{entry.name}' is missing")
        shape = weights.shape(published[entry.name])
        if shape != entry.shape:
            raise UserError(
                f"{weights.names[published[entry.name]]}: tensor '{published[entry.name]}' has "
                f'shape {list(shape)}, the model needs {list(entry.shape)}'
            )
    tensors = weights.read(published.values())
    leaves = {}
    for entry in entries:
        tensor = tensors[published[entry.name]]
        several = len(entry.paths) > 1  # a scalar cannot be split
        parts = np.split(tensor, len(entry.paths)) if several else [tensor]
        for path, part in zip(entry.paths, parts, strict=True):
            leaves[path] = np.asarray(entry.layout.load(part), order='C')
    tree = traverse_util.unflatten_dict(leaves, sep='/')
    return {'params': tree.get('params', {}), 'batch_stats': tree.get('batch_stats', {})}


def resize_positions(
    positions: np.ndarray, grid: int, method: str, *, antialias: bool
) -> np.ndarray:
    """Resizes positions [old · old, width] of a square grid to [grid · grid, width]."""
    old = math.isqrt(len(positions))
    if grid == old:
        return positions
    square = positions.reshape(old, old, -1)
    shape = (grid, grid, square.shape[-1])
    resized = jax.image.resize(square, shape, method, antialias=antialias)
    return np.asarray(resized).reshape(grid * grid, -1)


def export(variables: Mapping[str, Any], entries: Sequence[Entry]) -> dict[str, np.ndarray]:
    """Writes our leaves under their published names, the inverse of `load`.

    Raises:
      ValueError: the table lacks one of our leaves, or the tree one of the table's.
    """
    leaves = traverse_util.flatten_dict(dict(variables), sep='/')
    tensors = {}
    for entry in entries:
        missing = [path for path in entry.paths if path not in leaves]
        if missing:
            raise ValueError(f"the tree has no leaf '{missing[0]}'")
        parts = [entry.layout.save(np.asarray(leaves.pop(path))) for path in entry.paths]
        joined = np.concatenate(parts) if len(parts) > 1 else parts[0]
        tensors[entry.name] = np.asarray(joined, order='C')
        if tensors[entry.name].shape != entry.shape:
            shape = list(tensors[entry.name].shape)
            raise ValueError(f"'{entry.name}' has shape {shape}, not {list(entry.shape)}")
    if leaves:
        raise ValueError(f"leaf '{min(leaves)}' has no published name")
    return tensors


def graft(fresh: Mapping[str, Any], loaded: Mapping[str, Any], folder) -> dict[str, Any]:
    """Returns `loaded` in place of the `fresh` subtree, after checking that it fits leaf by leaf.

    Raises:
      UserError: the loaded weights lack a leaf, have one too many or one of another shape.
    """
    ours = traverse_util.flatten_dict(dict(fresh), sep='/')
    theirs = traverse_util.flatten_dict(dict(loaded), sep='/')
    for path in sorted(ours.keys() | theirs.keys()):
        if path not in theirs:
            raise UserError(f"{folder}: has no weights for the model's parameter '{path}'")
        if path not in ours:
            raise UserError(f"{folder}: parameter '{path}' is not in the model")
        if tuple(ours[path].shape) != theirs[path].shape:
            raise UserError(
                f"{folder}: parameter '{path}' has shape {list(theirs[path].shape)}, the model "
                f'in the config needs {list(ours[path].shape)}'
            )
    return traverse_util.unflatten_dict(theirs, sep='/')
