"""Functions as source, comment and binary: prepared records, and tokens of all three."""

import functools
import hashlib
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import numpy as np

from mmjax.data import prepare, samplers
from mmjax.data.tables import data_root, file_stamp
from mmjax.data.tokenizers import Tokenizer
from mmjax.errors import UserError
from mmjax.recipes.contrabin import folder

GENERATOR = ('recipes/contrabin/synthetic/*.py',)
VERSION = '1.4.0'  # of the prepared records; raise it when their content changes
SPLITS = ('train', 'val', 'test')
LEVELS = ('O0', 'O1', 'O2', 'O3')
TEXTS = ('source', 'comment', 'binary')


def prepare_code(
    root: str | os.PathLike | None,
    cache_dir: str | os.PathLike,
    *,
    splits: Sequence[str] = SPLITS,
    seed: int = 0,
    synthetic_sizes: Mapping[str, int] | None = None,
    registers: str = 'keep',
    **options: Unpack[prepare.Options],
) -> prepare.Prepared:
    """Checks the rows of every split once and writes them as records under `cache_dir`.

    A record is one binary of one function: source, comment, binary, name, label, path, level.

    Args:
      root: folder of <split>.jsonl or <split>.jsonl.gz; None generates functions and compiles each
        at four levels.
      seed, synthetic_sizes: arguments of the generated functions' `catalogue`.
      registers: of the generated listings: 'keep' their names, or write only their 'class'.
      options: of `prepare.prepare`.

    Raises:
      UserError: a split without a file, or too many faults of rows.
    """
    if root is None:
        from mmjax.recipes.contrabin.synthetic import catalogue

        kind = 'synthetic'
        sizes = dict(synthetic_sizes or {})
        code = prepare.source_digest(*GENERATOR)
        settings = [seed, registers, sorted(sizes.items()), code]
        plan = functools.cache(lambda: catalogue.catalogue(seed, sizes))  # slow
        read = functools.partial(catalogue.records, seed=seed, plan=plan, registers=registers)
        sources = {split: functools.partial(read, split) for split in splits}
    else:
        kind = 'folder'
        paths = split_files(root)
        for split in splits:
            if split not in paths:
                raise UserError(f'{root} has no {split}.jsonl and no {split}.jsonl.gz')
        settings = [[split, *file_stamp(paths[split])] for split in splits]
        settings.append(str(pathlib.Path(root).expanduser().absolute()))
        sources = {split: functools.partial(folder.read, paths[split]) for split in splits}
    return prepare.prepare_cached(
        cache_dir,
        f'code_{kind}',
        settings,
        version=VERSION,
        splits=sources,
        index=_entry,
        **options,
    )


def split_files(root: str | os.PathLike) -> dict[str, pathlib.Path]:
    """Returns {split: its file} of a folder; raises UserError if a split has two."""
    root = data_root(root)
    files = {}
    for split in SPLITS:
        paths = [root / f'{split}.jsonl{end}' for end in ('', '.gz')]
        paths = [path for path in paths if path.is_file()]
        if len(paths) > 1:
            raise UserError(f'{root} has both {paths[0].name} and {paths[1].name}: remove one')
        if paths:
            files[split] = paths[0]
    return files


def _number(*parts: str) -> np.int64:
    """Returns a hash of texts, the same on every machine."""
    digest = hashlib.sha256('\0'.join(parts).encode('utf-8', 'replace')).digest()
    return np.int64(int.from_bytes(digest[:8], 'little', signed=True))


def _entry(record: Mapping[str, Any]) -> dict[str, np.generic]:
    level = record['opt_level'].removeprefix('-').upper()
    source = as_read('source', record['source'])
    comment = as_read('comment', record['comment'])
    return {
        # One function compiled several times keeps one identity; so do copies of it elsewhere.
        'identity': _number(source),
        'level': np.int8(LEVELS.index(level) if level in LEVELS else -1),
        'label': _number(record['label']) if record['label'] else np.int64(0),
        'comment_id': _number(comment) if comment else np.int64(0),
        'path': _number(record['path'] or source),
    }


def sample(count: int, most: int, seed: int = 0) -> np.ndarray:
    """Returns int [min(count, most)], some of 0, …, count − 1, drawn by the seed, in order."""
    return np.sort(np.random.default_rng(seed).permutation(count)[:most])


def as_read(text: str, content: str) -> str:
    """Returns the input of the tokenizer for one of TEXTS.

    In source and comment a run of white space is one space, as indentation carries no meaning and
    costs tokens; listings stay lines.
    """
    return content if text == 'binary' else ' '.join(content.split())


class CodeFunctions(prepare.PreparedDataset):
    """One prepared split; a row is one binary of one function, with its source and comment.

    `example` and `packed_lengths` need the tokenizers of `with_tokens`.

    index: identity (int64, equal if the source is), level (int8, position in LEVELS or −1), label
    and comment_id (int64, hashes of the label and the comment; 0 for none), path (int64, a hash of
    the file; of the function itself if its file is unknown).
    """

    def __init__(self, prepared: prepare.Prepared, split: str):
        super().__init__(prepared, split)
        # By record. Consecutive numbers instead of hashes: a device has no int64.
        self._ids = {
            key: np.unique(self.index[key], return_inverse=True)[1].astype(np.int32)
            for key in ('identity', 'comment_id')
        }

    def with_tokens(
        self, tokenizers: Mapping[str, Tokenizer], lengths: Mapping[str, int]
    ) -> 'CodeFunctions':
        """Returns the same split, tokenized; both mappings have the keys of TEXTS."""
        return self.replace(_tokenizers=dict(tokenizers), _lengths=dict(lengths))

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
        both = np.stack([self.index['identity'], self.index['comment_id']], 1)
        _, first, pair = np.unique(both, axis=0, return_index=True, return_inverse=True)
        return first, pair.reshape(-1)

    def packed_lengths(self, rows: int) -> dict[str, float]:
        """Returns tokens per row that nearly all batches of `rows` rows need, by text; see `Bert`.

        Measured on up to 1,000 rows. Texts for which packing saves nothing are left out; see
        `samplers.packed_length`.
        """
        chosen = sample(len(self), 1000)
        examples = [self.example(row, np.random.default_rng(0), False) for row in chosen]
        packed = {}
        for text in TEXTS:
            counts = np.array([example[f'{text}_mask'].sum() for example in examples])
            room = samplers.packed_length(counts.mean(), counts.var(), rows, self._lengths[text])
            packed |= {text: room} if room else {}
        return packed

    def example(self, row: int, rng: np.random.Generator, train: bool) -> dict[str, np.ndarray]:
        """Tokenizes one row.

        Returns:
          `<text>` int32 [length] and `<text>_mask` bool [length] for each text of TEXTS;
          has_comment bool; identity and comment_id int32, equal if those of the index are.
        """
        record = self.record(row)
        example = {}
        for text in TEXTS:
            content = as_read(text, record[text])
            ids, mask = self._tokenizers[text].encode([content], self._lengths[text])
            example[text] = ids[0]
            example[f'{text}_mask'] = mask[0]
        example |= {key: ids[self._rows[row]] for key, ids in self._ids.items()}
        return example | {'has_comment': example['comment_mask'].any()}
