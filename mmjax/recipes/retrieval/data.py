"""Images of items as examples: an image, the prompt of its item, and the item's identity."""

import copy
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any, Unpack

import numpy as np
from PIL import Image

from mmjax.data import augment, images, prepare
from mmjax.data.tokenizers import Tokenizer
from mmjax.errors import UserError
from mmjax.recipes.retrieval import folder as retrieval_folder

GENERATOR = ('data/drawing.py', 'recipes/retrieval/synthetic/*.py')
VERSION = '1.0.0'  # of the prepared records; raise it when their content changes
SPLITS = ('train', 'val', 'query', 'gallery')


@dataclasses.dataclass(frozen=True)
class PreparedItems(prepare.Prepared):
    """Prepared splits; `items` are the ids, an item's position its identity.

    root: the folder of the images, None if the records hold them; descriptions: of the built-in
    items.
    """

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
    max_pixels: int = images.MAX_PIXELS,
    **options: Unpack[prepare.Options],
) -> PreparedItems:
    """Checks every image once and writes the records of the splits under `cache_dir`.

    A folder's images stay in place. The records of built-in items hold theirs.

    Args:
      root: folder in the format of `retrieval_folder`; None photographs the built-in items.
      seed, synthetic_sizes: arguments of the built-in items' `catalogue`.
      options: of `prepare.prepare`.

    Raises:
      UserError: a fault of the folder's structure, or too many faults of entries.
    """
    if root is None:
        from mmjax.recipes.retrieval.synthetic import items as synthetic

        sizes = dict(synthetic_sizes or {})
        plan = synthetic.catalogue(seed, sizes)
        identities = sorted({identity for rows in plan.values() for identity, _ in rows})
        descriptions = tuple(synthetic.item(seed, identity) for identity in identities)
        items = tuple(entry['item'] for entry in descriptions)
        settings = [seed, sorted(sizes.items()), prepare.source_digest(*GENERATOR)]
        records = functools.partial(synthetic.records, seed=seed, plan=plan)
    else:
        folder = retrieval_folder.open_folder(root, splits)
        items = tuple(folder.items())
        descriptions = ()
        settings = [folder.digest]
        root = folder.root.absolute()
        records = functools.partial(folder.records, max_pixels=max_pixels)
    identity = {item: position for position, item in enumerate(items)}
    prepared = prepare.prepare_cached(
        cache_dir,
        f'retrieval_{"folder" if root else "synthetic"}',
        [*settings, max_pixels],
        version=VERSION,
        splits={split: functools.partial(records, split) for split in splits},
        blobs=() if root else ('image',),
        index=lambda record: {'identity': np.int32(identity[record['item']])},
        **options,
    )
    return PreparedItems(prepared.directory, root, items, max_pixels, descriptions)


class ItemImages(prepare.PreparedDataset):
    """One prepared split; a row is an image.

    index: identity, the position of its item in `items`.
    """

    prepared: PreparedItems

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
          image_size: S, side of an image in pixels.
          augmentation: applied when training; None for none.
          cache_bytes: memory, in each process, for decoded images; 0 for none.
        """
        super().__init__(prepared, split)
        self.items = prepared.items
        self.image_size = image_size
        self.augmentation = augmentation
        self._cache = images.ImageCache(cache_bytes)
        self._tokens: np.ndarray | None = None
        self._mask: np.ndarray | None = None
        self._prompts = ''

    def with_prompts(self, prompts: Mapping[str, str], tokenizer: Tokenizer, length: int):
        """Returns the same split with the prompt of every item, in `length` tokens.

        Raises:
          UserError: an item of this split has no prompt, or a blank one.
        """
        used = np.unique(self.index['identity'])
        names = [self.items[identity] for identity in used]
        missing = [name for name in names if not prompts.get(name, '').strip()]
        if missing:
            raise UserError(
                f'{len(missing)} items of split {self.split} have no prompt, {missing[0]!r} first'
            )
        texts = [''] * len(self.items)
        for identity, name in zip(used, names, strict=True):
            texts[identity] = prompts[name]
        tokens, mask = tokenizer.encode(texts, length)
        return self.replace(
            skipped=dict(self.skipped),
            _tokens=tokens,
            _mask=mask,
            _prompts=hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16],
        )

    def subset(self, rows: np.ndarray, split: str | None = None) -> 'ItemImages':
        return super().subset(rows, split).replace(_cache=copy.copy(self._cache))

    def hold_out(self, fraction: float, seed: int) -> dict[str, 'ItemImages']:
        """Returns {'train', 'val'}: a fraction of the items goes to val, with all their images.

        They are drawn from those with two images or more: only these can be query and match.

        Raises:
          UserError: the fraction of the items is none, or all, or more than have two images.
        """
        identity, count = np.unique(self.index['identity'], return_counts=True)
        several = identity[count > 1]
        number = round(fraction * len(identity))
        if not 0 < number < len(identity) or number > len(several):
            raise UserError(
                f'data.val_items={fraction} of the {len(identity)} items of split {self.split}, '
                f'{len(several)} of them with two images or more, is {number}'
            )
        held_out = np.random.default_rng([seed, 0x7A1]).choice(several, number, replace=False)
        is_val = np.isin(self.index['identity'], held_out)
        return {
            'train': self.subset(np.flatnonzero(~is_val), 'train'),
            'val': self.subset(np.flatnonzero(is_val), 'val'),
        }

    def image(self, row: int) -> Image.Image:
        """Returns the image in RGB, not much larger than training needs it."""

        def make() -> Image.Image:
            record = self.record(row)
            source = record.get('image') or self.prepared.root / record['image_path']
            return self.open(source, record['image_path'])

        return self._cache.get(int(self._rows[row]), make)

    def open(self, source: bytes | str | os.PathLike, name: str) -> Image.Image:
        """Decodes an image, of this split or not, and reduces it to what training needs."""
        needed = round(1.5 * self.image_size)
        image = images.open_image(
            source, name, max_pixels=self.prepared.max_pixels, at_least=(needed, needed)
        )
        scale = needed / min(image.size)
        if scale < 1:
            sides = tuple(max(round(side * scale), 1) for side in image.size)
            image = image.resize(sides, Image.Resampling.BILINEAR, reducing_gap=2.0)
        return image

    def example(self, row: int, rng: np.random.Generator, train: bool) -> dict[str, np.ndarray]:
        """Returns one image and the prompt of its item.

        Returns:
          images: uint8 [S, S, 3]; tokens: int32 [L] and token_mask: bool [L]; identity: int32.

        Raises:
          UserError: an image that has become unreadable since it was prepared.
        """
        if self._tokens is None:
            raise ValueError('ItemImages has no prompts yet: see with_prompts')
        image = self.image(row)
        if train and self.augmentation:
            pixels = self.augmentation(image, self.image_size, rng)
        else:
            pixels = augment.centre_crop(image, self.image_size)
        identity = self.index['identity'][row]
        return {
            'images': pixels,
            'tokens': self._tokens[identity],
            'token_mask': self._mask[identity],
            'identity': np.int32(identity),
        }

    def fingerprint(self) -> dict[str, str | int]:
        return super().fingerprint() | {'prompts': self._prompts}
