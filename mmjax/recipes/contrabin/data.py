"""Functions as source, comment and binary: prepared records, and tokens of all three."""

import copy
import functools
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mmjax.data import prepare, processes, samplers
from mmjax.data.dataset import Dataset
from mmjax.data.faults import Ledger, Progress
from mmjax.data.tables import file_stamp
from mmjax.data.tokenizers import Tokenizer
from mmjax.errors import UserError
from mmjax.recipes.contrabin import folder

VERSION = '1.3.0'  # of the prepared records; raise it when their content changes
SPLITS = ('train', 'val', 'test')
LEVELS = ('O0', 'O1', 'O2', 'O3')
TEXTS = ('source', 'comment', 'binary')
_CHUNK = 64  # functions that a process makes at a time
_REGISTER = re.compile(r'\bq\d+\b')  # of the toy machine


def prepare_code(
    root: str | os.PathLike | None,
    cache_dir: str | os.PathLike,
    *,
    splits: Sequence[str] = SPLITS,
    seed: int = 0,
    synthetic_sizes: Mapping[str, int] | None = None,
    registers: str = 'keep',
    max_fault_share: float = 0.01,
    wait: bool = False,
    progress: Progress | None = None,
) -> prepare.Prepared:
    """Checks the rows of every split once and writes them as records under `cache_dir`.

    A record is one binary of one function: source, comment, binary, name, label, path, level.

    Args:
      root: folder of <split>.jsonl or <split>.jsonl.gz, see `code_jsonl`; None generates
        functions and compiles each at four levels with `code_compiler`.
      seed, synthetic_sizes: of the generated functions, as `code_catalogue.catalogue` has them.
      registers: of the generated listings: 'keep' their names, or tell only their 'class'.
      max_fault_share: share of a split's rows that may be faulty; these are skipped and listed.
      wait: leave the preparation to another host, and poll until it is done.

    Raises:
      UserError: a split without a file, too many faults of rows, or other `registers`.
    """
    if registers not in ('keep', 'class'):
        raise UserError(f"data.compile.registers '{registers}' is not keep or class")
    settings = [VERSION, list(splits), max_fault_share]
    if root is None:
        from mmjax.recipes.contrabin.synthetic import catalogue as code_catalogue

        kind, sizes = 'synthetic', dict(synthetic_sizes or {})
        plan = functools.cache(lambda: code_catalogue.catalogue(seed, sizes))  # takes its time
        made_by = prepare.source_digest('recipes/contrabin/synthetic/*.py')
        settings += [kind, seed, registers, sorted(sizes.items()), made_by]
        made = lambda name, ledger: _generated(seed, registers, plan()[name], ledger)
        sources = {name: functools.partial(made, name) for name in splits}
    else:
        kind, paths = 'folder', split_files(root)
        for name in splits:
            if name not in paths:
                raise UserError(f'{root} has no {name}.jsonl and no {name}.jsonl.gz')
        settings += [kind, *([name, *file_stamp(paths[name])] for name in splits)]
        settings.append(str(pathlib.Path(root).expanduser().absolute()))
        sources = {name: functools.partial(folder.read, paths[name]) for name in splits}
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
    return prepare.prepare(
        pathlib.Path(cache_dir) / f'code-{kind}-{digest}',
        name=f'code_{kind}',
        version=VERSION,
        splits=sources,
        index=_entry,
        max_fault_share=max_fault_share,
        progress=progress,
        wait=wait,
    )


def split_files(root: str | os.PathLike) -> dict[str, pathlib.Path]:
    """Returns {split: its file} of a folder; raises UserError where a split has two."""
    root = pathlib.Path(root).expanduser()
    if not root.is_dir():
        raise UserError(f'the data root {root} is not a folder')
    out = {}
    for split in SPLITS:
        found = [root / f'{split}.jsonl{end}' for end in ('', '.gz')]
        found = [path for path in found if path.is_file()]
        if len(found) > 1:
            raise UserError(f'{root} has both {found[0].name} and {found[1].name}: remove one')
        if found:
            out[split] = found[0]
    return out


def _number(*parts: str) -> np.int64:
    """A number that stands for texts, the same on every machine."""
    digest = hashlib.sha256('\0'.join(parts).encode('utf-8', 'replace')).digest()
    return np.int64(int.from_bytes(digest[:8], 'little', signed=True))


def _entry(record: Mapping[str, Any]) -> dict[str, np.generic]:
    level = record['opt_level'].removeprefix('-').upper()
    told = as_read('comment', record['comment'])
    return {
        # One function compiled several times keeps one identity; so do copies of it elsewhere.
        'identity': _number(as_read('source', record['source'])),
        'level': np.int8(LEVELS.index(level) if level in LEVELS else -1),
        'label': _number(record['label']) if record['label'] else np.int64(0),
        'told': _number(told) if told else np.int64(0),
        'path': _number(record['path'] or as_read('source', record['source'])),
    }


def _generated(
    seed: int, registers: str, identities: Sequence[int], ledger: Ledger
) -> Iterator[dict]:
    ledger.rows = len(identities) * len(LEVELS)
    make = functools.partial(_compiled, seed, registers)
    for records in processes.ordered(make, identities, chunk=_CHUNK):
        for record in records:
            yield record
            ledger.tick()


def _compiled(seed: int, registers: str, identity: int) -> list[dict]:
    """Returns the records of one built-in function, one a level."""
    from mmjax.recipes.contrabin.synthetic import compiler, programs

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


def sample(count: int, most: int, seed: int = 0) -> np.ndarray:
    """Returns int [min(count, most)], some of 0, …, count − 1, drawn by the seed, in order."""
    return np.sort(np.random.default_rng(seed).permutation(count)[:most])


def as_read(text: str, content: str) -> str:
    """Returns what a tokenizer is given of one of TEXTS: in source and comment a run of blanks is
    one, as indentation says nothing and costs tokens; listings stay lines."""
    return content if text == 'binary' else ' '.join(content.split())


class CodeFunctions(Dataset):
    """One prepared split; a row is one binary of one function, with its source and comment.

    index: identity (int64, equal where the source is), level (int8, place in LEVELS or −1), label
    and told (int64, stand for the label and the comment; 0 for none), path (int64, stands for the
    file; where none is told a function has its own). skipped: reason → rows.
    """

    def __init__(self, prepared: prepare.Prepared, split: str):
        self.split = split
        summary = prepared.summary
        self._name, self._books = summary['name'], summary['splits'][split]
        self.index = prepared.index(split)
        self.skipped, self._digest = dict(self._books['skipped']), self._books['digest']
        self._records = prepared.open(split)
        self._rows = np.arange(len(self._records))
        # Places instead of digests: a device has no int64.
        self._places = {
            key: np.unique(self.index[key], return_inverse=True)[1].astype(np.int32)
            for key in ('identity', 'told')
        }
        self._tokenizers: dict[str, Tokenizer] = {}
        self._lengths: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def record(self, row: int) -> dict[str, Any]:
        """Returns what was prepared: source, comment, binary, name, label, path, opt_level, …"""
        return self._records[int(self._rows[row])]

    def with_tokens(
        self, tokenizers: Mapping[str, Tokenizer], lengths: Mapping[str, int]
    ) -> 'CodeFunctions':
        """Returns the same split, tokenized; both mappings have the keys of TEXTS."""
        other = copy.copy(self)
        other._tokenizers, other._lengths = dict(tokenizers), dict(lengths)
        return other

    def subset(self, rows: np.ndarray) -> 'CodeFunctions':
        """Returns some of the rows, in the order given."""
        other = copy.copy(self)
        other._rows = self._rows[rows]
        other._digest = hashlib.sha256(f'{self._digest} {rows.tolist()}'.encode()).hexdigest()
        other.index = {key: value[rows] for key, value in self.index.items()}
        other._places = {key: value[rows] for key, value in self._places.items()}
        return other

    def one_each(self) -> np.ndarray:
        """Returns one row of every function, in order; levels take turns."""
        _, first, inverse = np.unique(
            self.index['identity'], return_index=True, return_inverse=True
        )
        members = np.split(np.argsort(inverse, kind='stable'), np.cumsum(np.bincount(inverse))[:-1])
        order = np.argsort(first, kind='stable')
        return np.array([members[i][turn % len(members[i])] for turn, i in enumerate(order)])

    def pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns one row of every pair of source and comment, and which pair each row has."""
        both = np.stack([self.index['identity'], self.index['told']], 1)
        _, first, place = np.unique(both, axis=0, return_index=True, return_inverse=True)
        return first, place.reshape(-1)

    def rooms(self, rows: int) -> dict[str, float]:
        """Returns tokens a row that nearly all batches of `rows` rows need, by text; see `Bert`.

        Measured on up to 1,000 rows by `samplers.packed_length`; a text for which that is None has
        no entry.
        """
        chosen = sample(len(self), 1000)
        examples = [self.example(row, np.random.default_rng(0), False) for row in chosen]
        out = {}
        for text in TEXTS:
            counts = np.array([example[f'{text}_mask'].sum() for example in examples])
            room = samplers.packed_length(counts.mean(), counts.var(), rows, self._lengths[text])
            out |= {text: room} if room else {}
        return out

    def example(self, row: int, rng: np.random.Generator, train: bool) -> dict[str, np.ndarray]:
        """Tokenizes one row.

        Returns:
          `<text>` int32 [length] and `<text>_mask` bool [length] for each text of TEXTS;
          has_comment bool; identity and told int32, equal where those of the index are.
        """
        if not self._tokenizers:
            raise ValueError('CodeFunctions has no tokenizers yet: see with_tokens')
        record, out = self.record(row), {}
        for text in TEXTS:
            told = [as_read(text, record[text])]
            ids, mask = self._tokenizers[text].encode(told, self._lengths[text])
            out[text], out[f'{text}_mask'] = ids[0], mask[0]
        entry = {key: places[row] for key, places in self._places.items()}
        return {**out, **entry, 'has_comment': out['comment_mask'].any()}

    def fingerprint(self) -> dict[str, str | int]:
        return {
            'name': self._name,
            'version': VERSION,
            'split': self.split,
            'size': len(self),
            'digest': self._digest,
        }
