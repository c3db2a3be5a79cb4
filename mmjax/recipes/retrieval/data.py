"""Pictures of items as examples: a picture, the prompt of its item, and the item's identity."""

import copy
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from PIL import Image

from mmjax.data import augment, prepare, processes
from mmjax.data import images as pictures
from mmjax.data.dataset import Dataset
from mmjax.data.faults import Ledger, Progress
from mmjax.data.tokenizers import Tokenizer
from mmjax.errors import RecordError, UserError
from mmjax.recipes.retrieval import folder as retrieval_folder

VERSION = '1.0.0'  # of the prepared records; raise it when their content changes
_CHUNK = 64  # built-in pictures that a process draws at a time
SPLITS = ('train', 'val', 'query', 'gallery')


@dataclasses.dataclass(frozen=True)
class PreparedItems:
    """Prepared splits; `items` are the ids, an item's place its identity.

    root: where pictures lie (None: inside the records); descriptions: of the built-in items.
    """

    prepared: prepare.Prepared
    root: pathlib.Path | None
    items: tuple[str, ...]
    max_pixels: int
    descriptions: tuple[Mapping[str, Any], ...] = ()


def prepare_items(
    root: str | os.PathLike | None,
    cache_dir: str | os.PathLike,
    *,
    splits: tuple[str, ...] = SPLITS,
    seed: int = 0,
    synthetic_sizes: Mapping[str, int] | None = None,
    max_fault_share: float = 0.01,
    max_pixels: int = pictures.MAX_PIXELS,
    wait: bool = False,
    progress: Progress | None = None,
) -> PreparedItems:
    """Checks every picture once and writes the records of the splits under `cache_dir`.

    A folder's pictures stay where they are. Built-in items carry theirs.

    Args:
      root: folder in the format of `retrieval_folder`; None photographs the built-in items.
      seed, synthetic_sizes: of the built-in items, as `retrieval_synthetic.catalogue` has them.
      max_fault_share: share of a split's entries that may be faulty; these are skipped and listed.
      wait: leave the preparation to another host, and poll until it is done.

    Raises:
      UserError: a fault of the folder's structure, or too many faults of entries.
    """
    settings = [VERSION, list(splits), max_pixels, max_fault_share]
    if root is None:
        from mmjax.recipes.retrieval.synthetic import items as retrieval_synthetic

        sizes = dict(synthetic_sizes or {})
        plan = retrieval_synthetic.catalogue(seed, sizes)
        names = sorted({identity for rows in plan.values() for identity, _ in rows})
        described = [retrieval_synthetic.item(seed, identity) for identity in names]
        items = tuple(entry['item'] for entry in described)
        made_by = prepare.source_digest('data/drawing.py', 'recipes/retrieval/synthetic/*.py')
        settings += ['synthetic', seed, sorted(sizes.items()), made_by]
        sources = {s: functools.partial(_drawn, s, seed, plan[s]) for s in splits}
        where, blobs = None, ('image',)
    else:
        folder = retrieval_folder.open_folder(root, splits)
        items, described, blobs = tuple(folder.items()), (), ()
        settings += ['folder', folder.digest]
        sources = {s: functools.partial(folder.records, s, max_pixels=max_pixels) for s in splits}
        where = folder.root.absolute()
    identity = {item: place for place, item in enumerate(items)}
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
    kind = 'synthetic' if root is None else 'folder'
    prepared = prepare.prepare(
        pathlib.Path(cache_dir) / f'retrieval-{kind}-{digest}',
        name=f'retrieval_{kind}',
        version=VERSION,
        splits=sources,
        blobs=blobs,
        index=lambda record: {'identity': np.int32(identity[record['item']])},
        max_fault_share=max_fault_share,
        progress=progress,
        wait=wait,
    )
    return PreparedItems(prepared, where, items, max_pixels, tuple(described))


def _drawn(split: str, seed: int, rows: list[tuple[int, int]], ledger: Ledger) -> Iterator[dict]:
    from mmjax.recipes.retrieval.synthetic import items as retrieval_synthetic

    ledger.rows = len(rows)
    names = {}
    images = processes.ordered(functools.partial(_photograph, seed, split), rows, chunk=_CHUNK)
    for line, ((identity, shot), image) in enumerate(zip(rows, images, strict=True)):
        if identity not in names:
            names[identity] = retrieval_synthetic.item(seed, identity)['item']
        path = f'{names[identity]}/{split}_{shot:03d}.jpg'
        yield {'item': names[identity], 'image_path': path, 'line': line, 'image': image}
        ledger.tick()


def _photograph(seed: int, split: str, row: tuple[int, int]) -> bytes:
    from mmjax.recipes.retrieval.synthetic import items as retrieval_synthetic

    return retrieval_synthetic.photograph(seed, split, *row)


class ItemPictures(Dataset):
    """One prepared split; a row is a picture.

    index: identity, the place of its item in `items`. skipped: reason → pictures left out.
    """

    def __init__(
        self,
        prepared: PreparedItems,
        split: str,
        *,
        image_size: int,
        augmentation: augment.Augmentation | None = None,
        cache_bytes: int = 1 << 30,
    ):
        """Opens a split.

        Args:
          image_size: S, side of a picture in pixels.
          augmentation: applied when training; None for none.
          cache_bytes: memory, in each process, for decoded pictures; 0 for none.
        """
        self.split, self.items, self.image_size = split, prepared.items, image_size
        self.augmentation, self.prepared = augmentation, prepared
        self._kept = pictures.ImageCache(cache_bytes)
        summary = prepared.prepared.summary
        self._name, self._books = summary['name'], summary['splits'][split]
        self.index = prepared.prepared.index(split)
        self.skipped, self._digest = dict(self._books['skipped']), self._books['digest']
        self._records = prepared.prepared.open(split)
        self._rows = np.arange(len(self._records))
        self._tokens = self._mask = None
        self._prompts = ''

    def __len__(self) -> int:
        return len(self._rows)

    def with_prompts(self, prompts: Mapping[str, str], tokenizer: Tokenizer, length: int):
        """Returns the same split with the prompt of every item, in `length` tokens.

        Raises:
          UserError: an item of this split has no prompt, or a blank one.
        """
        other = copy.copy(self)
        other.skipped = dict(self.skipped)
        used = np.unique(self.index['identity'])
        names = [self.items[place] for place in used]
        missing = [name for name in names if not prompts.get(name, '').strip()]
        if missing:
            raise UserError(
                f'{len(missing)} items of split {self.split} have no prompt, {missing[0]!r} first'
            )
        texts = [''] * len(self.items)
        for place, name in zip(used, names, strict=True):
            texts[place] = prompts[name]
        other._tokens, other._mask = tokenizer.encode(texts, length)
        other._prompts = hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]
        return other

    def subset(self, rows: np.ndarray, split: str) -> 'ItemPictures':
        """Returns some of the rows as a split of its own name."""
        other = copy.copy(self)
        other.split, other._rows = split, self._rows[rows]
        other._kept, other.skipped = copy.copy(self._kept), dict(self.skipped)
        chosen = f'{self._digest} {rows.tolist()}'
        other._digest = hashlib.sha256(chosen.encode()).hexdigest()
        other.index = {key: value[rows] for key, value in self.index.items()}
        return other

    def hold_out(self, share: float, seed: int) -> dict[str, 'ItemPictures']:
        """Returns {'train', 'val'}: as many as `share` of the items go to val, whole.

        They are drawn from those with two pictures or more, which alone can ask and be found.

        Raises:
          UserError: `share` of the items is none, or all, or more than have two pictures.
        """
        identity, count = np.unique(self.index['identity'], return_counts=True)
        several = identity[count > 1]
        wanted = round(share * len(identity))
        if not 0 < wanted < len(identity) or wanted > len(several):
            raise UserError(
                f'data.val_items={share} of the {len(identity)} items of split {self.split}, '
                f'{len(several)} of them with two pictures or more, is {wanted}'
            )
        held = np.random.default_rng([seed, 0x7A1]).choice(several, wanted, replace=False)
        out = np.isin(self.index['identity'], held)
        return {
            'train': self.subset(np.flatnonzero(~out), 'train'),
            'val': self.subset(np.flatnonzero(out), 'val'),
        }

    def record(self, row: int) -> dict[str, Any]:
        """Returns what was prepared of a picture: item, image_path, line."""
        return self._records[int(self._rows[row])]

    def picture(self, row: int) -> Image.Image:
        """Returns the picture in RGB, not much larger than training needs it."""

        def make() -> Image.Image:
            record = self.record(row)
            source = record.get('image') or self.prepared.root / record['image_path']
            return self.open(source, record['image_path'])

        return self._kept.get(int(self._rows[row]), make)

    def open(self, source: bytes | str | os.PathLike, name: str) -> Image.Image:
        """Decodes a picture, of this split or not, and reduces it to what training needs."""
        needed = round(1.5 * self.image_size)
        limits = {'max_pixels': self.prepared.max_pixels, 'at_least': (needed, needed)}
        try:
            picture = pictures.open_image(source, name, **limits)
        except RecordError as error:
            raise UserError(str(error)) from error
        share = needed / min(picture.size)
        if share < 1:
            sides = tuple(max(round(side * share), 1) for side in picture.size)
            picture = picture.resize(sides, Image.Resampling.BILINEAR, reducing_gap=2.0)
        return picture

    def example(self, row: int, rng: np.random.Generator, train: bool) -> dict[str, np.ndarray]:
        """Returns one picture and the prompt of its item.

        Returns:
          images: uint8 [S, S, 3]; tokens: int32 [L] and token_mask: bool [L]; identity: int32.

        Raises:
          UserError: a picture that has become unreadable since it was prepared.
        """
        if self._tokens is None:
            raise ValueError('ItemPictures has no prompts yet: see with_prompts')
        picture = self.picture(row)
        if train and self.augmentation:
            image = self.augmentation(picture, self.image_size, rng)
        else:
            image = augment.centre_crop(picture, self.image_size)
        identity = self.index['identity'][row]
        return {
            'images': image,
            'tokens': self._tokens[identity],
            'token_mask': self._mask[identity],
            'identity': np.int32(identity),
        }

    def fingerprint(self) -> dict[str, str | int]:
        return {
            'name': self._name,
            'version': VERSION,
            'split': self.split,
            'size': len(self),
            'digest': self._digest,
            'prompts': self._prompts,
        }
