"""Comic pages as examples: one page padded to N panels, each with image, text and layout."""

import dataclasses
import functools
import math
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Unpack

import numpy as np
from PIL import Image

from mmjax.data import images, prepare, tables
from mmjax.data.tokenizers import Tokenizer
from mmjax.errors import RecordError, UserError
from mmjax.recipes.comic import folder as comic_folder

GENERATOR = ('data/drawing.py', 'recipes/comic/folder.py', 'recipes/comic/synthetic/*.py')
VERSION = '1.0.0'  # of the prepared records; raise it when their content changes
MAX_PANELS = 16
PAGE_TYPES = ('narrative', 'story')
# w/h, area, characters or reading position, mean shot, max shot, centre x, centre y
COMPOSITION = 7
MODALITIES = ('vision', 'text', 'composition')
_AUGMENTATION = images.Augmentation()


@dataclasses.dataclass(frozen=True)
class PreparedPages(prepare.Prepared):
    """Prepared splits of pages; root: the folder of the images, None if the records hold them."""

    root: pathlib.Path | None
    page_types: tuple[str, ...]
    max_panels: int
    max_pixels: int


def prepare_pages(
    root: str | os.PathLike | None,
    cache_dir: str | os.PathLike,
    *,
    splits: Sequence[str] = ('train', 'val'),
    seed: int = 0,
    synthetic_sizes: Mapping[str, int] | None = None,
    page_types: Sequence[str] = PAGE_TYPES,
    max_panels: int = MAX_PANELS,
    max_pixels: int = images.MAX_PIXELS,
    **options: Unpack[prepare.Options],
) -> PreparedPages:
    """Checks every page once and writes the records of the splits under `cache_dir`.

    A folder's images stay in place. Its preparation is reused as long as the tables and the sizes
    and times of the pages' files are the same. The records of built-in pages hold their images.

    Args:
      root: folder in the format of `comic_folder`; None draws the built-in pages.
      seed, synthetic_sizes: of the built-in pages; split → pages drawn, covers and credits too.
      page_types: the others are skipped and counted as `page_type:<name>`.
      options: of `prepare.prepare`.

    Raises:
      UserError: a fault of the folder's structure, before anything is written, or too many faults
        of pages, after which nothing of it is left on disk.
    """
    shared: dict[str, Any] = {'page_types': tuple(page_types), 'max_panels': max_panels}
    if root is None:
        from mmjax.recipes.comic.synthetic import pages

        sizes = {split: int((synthetic_sizes or {}).get(split, 0)) for split in splits}
        if min(sizes.values()) < 1:
            raise UserError(f'the built-in pages need a size for each of the splits {splits}')
        kind = 'synthetic'
        settings = [seed, sorted(sizes.items()), prepare.source_digest(*GENERATOR)]
        records = functools.partial(pages.records, seed=seed, sizes=sizes, **shared)
    else:
        folder = comic_folder.open_folder(root, splits)
        kind = 'folder'
        settings = [folder.digest]
        root = folder.root.absolute()
        records = functools.partial(folder.records, max_pixels=max_pixels, **shared)
    prepared = prepare.prepare_cached(
        cache_dir,
        f'comic_{kind}',
        [*settings, *shared.values(), max_pixels],
        version=VERSION,
        splits={split: functools.partial(records, split) for split in splits},
        blobs=() if root else ('image',),
        index=functools.partial(_index, page_types=shared['page_types']),
        **options,
    )
    return PreparedPages(prepared.directory, root, max_pixels=max_pixels, **shared)


def _index(record: Mapping[str, Any], page_types: tuple[str, ...]) -> dict[str, Any]:
    return {
        'n_panels': np.int32(len(record['boxes'])),
        'n_text': np.int32(sum(bool(text) for text in record['texts'])),
        'page_type': np.int8(page_types.index(record['page_type'])),
    }


class ComicPages(prepare.PreparedDataset):
    """One prepared split; a row is a page.

    index: n_panels, n_text (panels with text) and page_type (its position in `page_types`).
    counts: boxes_clipped, boxes_empty, panels_over_limit.
    """

    prepared: PreparedPages
    length_key = 'n_panels'

    def __init__(
        self,
        prepared: PreparedPages,
        split: str,
        *,
        image_size: int,
        max_tokens: int = 128,
        tokenizer: Tokenizer | None = None,
        buckets: Sequence[int] = (),
        use_composition: bool = True,
        augmentation: images.Augmentation | None = _AUGMENTATION,
        hidden_tokens: float = 0.0,
        hidden_texts: float = 0.0,
        hidden_compositions: float = 0.0,
        cache_bytes: int = 256 << 20,
    ):
        """Opens a split.

        Args:
          image_size: S, side of a panel's image in pixels.
          max_tokens: L, tokens per panel.
          tokenizer: `example` needs it; it may come later, by `with_tokenizer`.
          buckets: panels a batch may be padded to, for the samplers; none: max_panels.
          use_composition: False leaves the composition out (zeros, modality absent): an ablation.
          augmentation: applied when training; None for none.
          hidden_tokens, hidden_texts, hidden_compositions: fraction of the tokens, of the panels'
            whole texts and of their compositions that are hidden at random in training.
          cache_bytes: memory, in each process, for decoded pages, so that a small set is decoded
            only in the first epoch; 0 for none.
        """
        super().__init__(prepared, split)
        self.image_size = image_size
        self.max_tokens = max_tokens
        self.tokenizer = tokenizer
        self.lengths = tuple(sorted(buckets)) or (prepared.max_panels,)
        if self.lengths[-1] > prepared.max_panels:
            raise UserError(f'buckets {self.lengths} pass max_panels={prepared.max_panels}')
        self.use_composition = use_composition
        self.augmentation = augmentation
        self.hidden_tokens = hidden_tokens
        self.hidden_texts = hidden_texts
        self.hidden_compositions = hidden_compositions
        self._cache = images.ImageCache(cache_bytes)

    def with_tokenizer(self, tokenizer: Tokenizer) -> 'ComicPages':
        """Returns the same split with another tokenizer."""
        return self.replace(tokenizer=tokenizer)

    def with_page(self, path: str | os.PathLike) -> 'ComicPages':
        """Returns a split of one page: an image, and its JSON of the same name beside it.

        Raises:
          UserError: a file that is missing, unreadable or malformed.
        """
        path = pathlib.Path(path)
        page = path.with_suffix('.json')
        for file in (path, page):
            if not file.is_file():
                raise UserError(f'{file} does not exist (a page is an image with JSON beside it)')
        image = path.read_bytes()
        size = images.check_image(image, str(path), max_pixels=self.prepared.max_pixels)
        content = tables.read_json(page, str(page))
        record, _ = comic_folder.page_record(content, str(page), size, self.prepared.max_panels)
        if not record['boxes']:
            raise UserError(f'{page} has no panels')
        page_types = self.prepared.page_types
        record |= {'canonical_id': path.stem, 'image_path': '', 'page_type': page_types[0]}
        return self.with_record(
            {**record, 'image': image},
            _index(record, page_types),
            prepared=dataclasses.replace(self.prepared, root=None),
            _cache=images.ImageCache(0),
        )

    def image(self, row: int) -> Image.Image:
        """Returns the whole page, a PIL image in RGB."""
        return self._open(row, self.record(row), None)

    def texts(self) -> Iterator[str]:
        """Yields the texts of all panels, in order, to train a tokenizer on."""
        for row in range(len(self)):
            yield from filter(None, self.record(row)['texts'])

    def example(self, row: int, rng: np.random.Generator, train: bool) -> dict[str, np.ndarray]:
        """Returns one page, N = max_panels, its panels first and in reading order.

        Returns:
          images: uint8 [N, S, S, 3]; tokens: int32 [N, L] and token_mask: bool [N, L], all False
          for an empty text; composition: float32 [N, 7] = w/h, area/page area, reading position
          (VLM form, else 0), 0, 0, centre x/W, centre y/H; modality: bool [N, 3] over vision,
          text, composition; panels: bool [N]; boxes: float32 [N, 4] = x0, y0, x1, y1 as fractions
          of the page. Where `panels` is False all else is 0. texts_cut: int32 [], texts of
          more than L tokens.

        Raises:
          UserError: an image that has become unreadable since it was prepared.
        """
        if self.tokenizer is None:
            raise ValueError('ComicPages has no tokenizer yet: see with_tokenizer')
        record = self.record(row)
        n = len(record['boxes'])
        limit = self.prepared.max_panels
        size = self.image_size
        pixels = np.zeros((limit, size, size, 3), np.uint8)
        boxes = np.zeros((limit, 4), np.float32)
        boxes[:n] = record['boxes']
        composition = np.zeros((limit, COMPOSITION), np.float32)
        composition[:n] = _composition(record, boxes[:n])
        page = self._reduced(row, record)
        augmentation = self.augmentation if train else None
        for panel in range(n):
            if augmentation:
                boxes[panel] = augmentation.box(record['boxes'][panel], rng)
            pixels[panel] = images.crop_resize(page, boxes[panel], size)
            if augmentation:
                pixels[panel] = augmentation.tone(pixels[panel], rng)
        texts = [*record['texts'], *[''] * (limit - n)]
        tokens, token_mask, cut = self.tokenizer.encode_and_count(texts, self.max_tokens)
        if train:  # rare words identify a page: the model must not depend on them
            token_mask &= rng.random(token_mask.shape) >= self.hidden_tokens
            token_mask &= rng.random((limit, 1)) >= self.hidden_texts
        panels = np.arange(limit) < n
        has_composition = panels & self.use_composition
        if train:
            has_composition &= rng.random(limit) >= self.hidden_compositions
        composition *= has_composition[:, None]
        return {
            'images': pixels,
            'tokens': tokens * token_mask,
            'token_mask': token_mask,
            'composition': composition,
            'modality': np.stack([panels, token_mask.any(1), has_composition], axis=1),
            'panels': panels,
            'boxes': boxes,
            'texts_cut': np.int32(cut),
        }

    def collate(self, examples: Sequence[dict], bucket: int) -> dict[str, np.ndarray]:
        """Stacks pages to a batch of `bucket` panels each, or of max_panels with bucket 0."""
        batch = super().collate(examples, bucket)
        if not bucket:
            return batch
        return {key: x[:, :bucket] if x.ndim > 1 else x for key, x in batch.items()}

    def _reduced(self, row: int, record: Mapping[str, Any]) -> Image.Image:
        """Returns the page in the size that its panels need, cached as far as memory allows."""

        def make() -> Image.Image:
            width, height = record['width'], record['height']
            sides = ((x1 - x0, y1 - y0) for x0, y0, x1, y1 in record['boxes'])
            smallest = min(min(w * width, h * height) for w, h in sides)
            scale = min(1.0, 1.15 * self.image_size / smallest)  # augmented boxes may be smaller
            return self._open(row, record, (math.ceil(width * scale), math.ceil(height * scale)))

        return self._cache.get(row, make)

    def _open(
        self, row: int, record: Mapping[str, Any], at_least: tuple[int, int] | None
    ) -> Image.Image:
        name = record['image_path'] or record['canonical_id']
        root = self.prepared.root
        source = record['image'] if root is None else root / name
        try:
            return images.open_image(
                source, str(name), max_pixels=self.prepared.max_pixels, at_least=at_least
            )
        except RecordError as error:
            raise UserError(
                f'row {row} of split {self.split} ({record["canonical_id"]}) was readable when it '
                f'was prepared and is not now: {error}'
            ) from error


def _composition(record: Mapping[str, Any], boxes: np.ndarray) -> np.ndarray:
    """Returns float32 [panels, 7]; slots 3 and 4 (shots) are not annotated by either form."""
    x0, y0, x1, y1 = np.asarray(boxes, np.float64).T
    values = np.zeros((len(x0), COMPOSITION), np.float32)
    values[:, 0] = (x1 - x0) * record['width'] / ((y1 - y0) * record['height'])
    values[:, 1] = (x1 - x0) * (y1 - y0)
    if record['reading']:
        values[:, 2] = record['reading']
    values[:, 5] = (x0 + x1) / 2
    values[:, 6] = (y0 + y1) / 2
    return values
