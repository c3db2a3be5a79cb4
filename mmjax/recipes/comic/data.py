"""Comic pages as examples: one page padded to N panels, with picture, text and place of each."""

import copy
import dataclasses
import functools
import hashlib
import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from mmjax.data import images as pictures
from mmjax.data import prepare, processes, tables
from mmjax.data.dataset import Dataset
from mmjax.data.faults import Ledger, Progress
from mmjax.data.tokenizers import Tokenizer
from mmjax.errors import RecordError, UserError
from mmjax.recipes.comic import folder as comic_folder

GENERATOR = ('data/drawing.py', 'recipes/comic/synthetic/*.py')
VERSION = '1.0.0'  # of the prepared records; raise it when their content changes
_CHUNK = 32  # built-in pages that a process draws at a time
MAX_PANELS = 16
PAGE_TYPES = ('narrative', 'story')
COMPOSITION = (
    7  # w/h, area, characters or reading position, mean shot, max shot, centre x, centre y
)
MODALITIES = ('vision', 'text', 'composition')
_AUGMENTATION = pictures.Augmentation()


@dataclasses.dataclass(frozen=True)
class PreparedPages:
    """Prepared splits, and where their pictures lie (None: inside the records)."""

    prepared: prepare.Prepared
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
    max_fault_share: float = 0.01,
    max_pixels: int = pictures.MAX_PIXELS,
    wait: bool = False,
    progress: Progress | None = None,
) -> PreparedPages:
    """Checks every page once and writes the records of the splits under `cache_dir`.

    A folder's pictures stay where they are. Its preparation is found again as long as the tables
    and the sizes and times of the pages' files are the same. Built-in pages carry their pictures.

    Args:
      root: folder in the format of `comic_folder`; None draws the built-in pages.
      seed, synthetic_sizes: of the built-in pages; split → pages drawn, covers and credits too.
      page_types: the others are skipped and counted as `page_type:<name>`.
      max_fault_share: share of a split's rows that may be faulty (unreadable or truncated
        picture, malformed JSON …); these are skipped, and listed in `skipped.jsonl`.
      wait: leave the preparation to another host, and poll until it is done.

    Raises:
      UserError: a fault of the folder's structure, before anything is written, or too many faults
        of pages, after which nothing of it is left on disk.
    """
    settings = [VERSION, sorted(splits), list(page_types), max_panels, max_pixels, max_fault_share]
    if root is None:
        if not synthetic_sizes or not all(synthetic_sizes.get(split, 0) > 0 for split in splits):
            raise UserError(f'the built-in pages need a size for each of the splits {splits}')
        sizes = {split: int(synthetic_sizes[split]) for split in splits}
        settings += [
            'synthetic',
            seed,
            sorted(sizes.items()),
            prepare.source_digest(*GENERATOR),
        ]
        source = functools.partial(
            _drawn, seed=seed, sizes=sizes, page_types=page_types, max_panels=max_panels
        )
        folder, blobs = None, ('image',)
    else:
        folder = comic_folder.open_folder(root, splits)
        settings += ['folder', folder.digest]
        source = functools.partial(
            folder.pages, page_types=page_types, max_panels=max_panels, max_pixels=max_pixels
        )
        blobs = ()
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
    kind = 'synthetic' if folder is None else 'folder'
    prepared = prepare.prepare(
        pathlib.Path(cache_dir) / f'comic-{kind}-{digest}',
        name=f'comic_{kind}',
        version=VERSION,
        splits={split: functools.partial(source, split) for split in splits},
        blobs=blobs,
        index=functools.partial(_index, page_types=tuple(page_types)),
        max_fault_share=max_fault_share,
        progress=progress,
        wait=wait,
    )
    where = None if folder is None else folder.root.absolute()
    return PreparedPages(prepared, where, tuple(page_types), max_panels, max_pixels)


def _index(record: Mapping[str, Any], page_types: tuple[str, ...]) -> dict[str, Any]:
    return {
        'n_panels': np.int32(len(record['boxes'])),
        'n_text': np.int32(sum(bool(text) for text in record['texts'])),
        'page_type': np.int8(page_types.index(record['page_type'])),
    }


def _drawn(
    split: str,
    ledger: Ledger,
    *,
    seed: int,
    sizes: Mapping[str, int],
    page_types: Sequence[str],
    max_panels: int,
) -> Iterator[dict[str, Any]]:
    """Yields the built-in pages of a split as records."""
    ledger.rows = sizes[split]
    draw = functools.partial(_page, seed, split)
    pages = processes.ordered(draw, range(sizes[split]), chunk=_CHUNK)
    for place, page in enumerate(pages):
        name = page['canonical_id']
        if page['page_type'] not in page_types:
            ledger.skip(f'page_type:{page["page_type"]}')
        else:
            size = pictures.check_image(page['image'], name)
            record, counts = comic_folder.page_record(page['page'], name, size, max_panels)
            ledger.counts.update(counts)
            if record['boxes']:
                record |= {'canonical_id': name, 'image_path': '', 'line': place}
                yield {**record, 'page_type': page['page_type'], 'image': page['image']}
            else:
                ledger.skip('no_panels')
        ledger.tick()


def _page(seed: int, split: str, place: int) -> dict[str, Any]:
    from mmjax.recipes.comic.synthetic import pages as comic_synthetic

    return comic_synthetic.page(seed, split, place)


class ComicPages(Dataset):
    """One prepared split; a row is a page.

    index: n_panels, n_text (panels with text) and page_type (its place in `page_types`).
    skipped: reason → pages left out; counts: boxes_clipped, boxes_empty, panels_over_limit.
    """

    def __init__(
        self,
        pages: PreparedPages,
        split: str,
        *,
        image_size: int,
        max_tokens: int = 128,
        tokenizer: Tokenizer | None = None,
        buckets: Sequence[int] = (),
        use_composition: bool = True,
        augmentation: pictures.Augmentation | None = _AUGMENTATION,
        hidden_tokens: float = 0.0,
        hidden_texts: float = 0.0,
        hidden_places: float = 0.0,
        cache_bytes: int = 256 << 20,
    ):
        """Opens a split.

        Args:
          image_size: S, side of a panel's cut in pixels.
          max_tokens: L, tokens a panel.
          tokenizer: may come later, by `with_tokenizer`; `example` needs it.
          buckets: panels a batch may be padded to, for the samplers; none: max_panels.
          use_composition: False leaves the composition out (zeros, modality absent): an ablation.
          augmentation: applied when training; None for none.
          hidden_tokens, hidden_texts, hidden_places: share of the tokens, of the panels' whole
            texts and of their compositions that are hidden at random in training.
          cache_bytes: memory, in each process, for decoded pages; filled once and kept, so that a
            small set is decoded only in the first epoch. 0 for none.
        """
        self.split = split
        self.pages = pages
        self.image_size = image_size
        self.max_tokens = max_tokens
        self.tokenizer = tokenizer
        self.lengths = tuple(sorted(buckets)) or (pages.max_panels,)
        if self.lengths[-1] > pages.max_panels:
            raise UserError(f'buckets {self.lengths} pass max_panels={pages.max_panels}')
        self.length_key = 'n_panels'
        self.use_composition = use_composition
        self.augmentation = augmentation
        self.hidden_tokens, self.hidden_texts = hidden_tokens, hidden_texts
        self.hidden_places = hidden_places
        self._kept = pictures.ImageCache(cache_bytes)
        summary = pages.prepared.summary
        if split not in summary['splits']:
            raise UserError(f'{pages.prepared.directory} holds no split {split!r}')
        self._name, self._books = summary['name'], summary['splits'][split]
        self.index = pages.prepared.index(split)
        self.skipped = dict(self._books['skipped'])
        self.counts = dict(self._books['counts'])
        self._records = pages.prepared.open(split)

    def __len__(self) -> int:
        return len(self._records)

    def with_tokenizer(self, tokenizer: Tokenizer) -> 'ComicPages':
        """Returns the same split with another tokenizer."""
        other = copy.copy(self)
        other.tokenizer = tokenizer
        return other

    def with_page(self, picture: str | os.PathLike) -> 'ComicPages':
        """Returns a split of one page: a picture, and its JSON of the same name beside it.

        Raises:
          UserError: a file that is missing, unreadable or malformed.
        """
        picture = pathlib.Path(picture)
        page = picture.with_suffix('.json')
        for path in (picture, page):
            if not path.is_file():
                raise UserError(f'{path} does not exist (a page is a picture and its JSON beside)')
        image = picture.read_bytes()
        limits = {'max_pixels': self.pages.max_pixels}
        size = pictures.check_image(image, str(picture), **limits)
        content = tables.read_json(page, str(page))
        record, _ = comic_folder.page_record(content, str(page), size, self.pages.max_panels)
        if not record['boxes']:
            raise UserError(f'{page} has no panels')
        other = copy.copy(self)
        other.pages = dataclasses.replace(self.pages, root=None)
        other._kept = pictures.ImageCache(0)
        other._records = [
            {
                **record,
                'canonical_id': picture.stem,
                'image_path': '',
                'page_type': self.pages.page_types[0],
                'image': image,
            }
        ]
        other.index = {
            key: np.asarray([value])
            for key, value in _index(other._records[0], self.pages.page_types).items()
        }
        return other

    def record(self, row: int) -> dict[str, Any]:
        """Returns what was prepared of a page: canonical_id, page_type, boxes, texts, width …"""
        return self._records[row]

    def picture(self, row: int) -> Image.Image:
        """Returns the whole page, a PIL picture in RGB."""
        return self._open(row, self._records[row], None)

    def texts(self) -> Iterator[str]:
        """Yields the texts of all panels that have one, in order, to train a tokenizer on."""
        for row in range(len(self)):
            yield from (text for text in self._records[row]['texts'] if text)

    def fingerprint(self) -> dict[str, str | int]:
        return {
            'name': self._name,
            'version': VERSION,
            'split': self.split,
            'size': len(self),
            'digest': self._books['digest'],
        }

    def example(self, row: int, rng: np.random.Generator, train: bool) -> dict[str, np.ndarray]:
        """Returns one page, N = max_panels, its panels first and in reading order.

        Returns:
          images: uint8 [N, S, S, 3]; tokens: int32 [N, L] and token_mask: bool [N, L], all False
          for an empty text; composition: float32 [N, 7] = w/h, area/page area, reading position
          (VLM form, else 0), 0, 0, centre x/W, centre y/H; modality: bool [N, 3] over vision,
          text, composition; panels: bool [N]; boxes: float32 [N, 4] = x0, y0, x1, y1 as fractions
          of the page. Where `panels` is False all else is 0.

        Raises:
          UserError: a picture that has become unreadable since it was prepared.
        """
        if self.tokenizer is None:
            raise ValueError('ComicPages has no tokenizer yet: see with_tokenizer')
        record = self._records[row]
        n, size, limit = len(record['boxes']), self.image_size, self.pages.max_panels
        images = np.zeros((limit, size, size, 3), np.uint8)
        boxes = np.zeros((limit, 4), np.float32)
        boxes[:n] = record['boxes']
        composition = np.zeros((limit, COMPOSITION), np.float32)
        composition[:n] = _composition(record, boxes[:n])
        picture = self._reduced(row, record)
        for place in range(n):
            if train and self.augmentation:
                boxes[place] = self.augmentation.box(record['boxes'][place], rng)
            cut = pictures.crop_resize(picture, boxes[place], size)
            images[place] = self.augmentation.tone(cut, rng) if train and self.augmentation else cut
        tokens, token_mask = self.tokenizer.encode(
            [*record['texts'], *[''] * (limit - n)], self.max_tokens
        )
        if train:  # rare words give a page away: what is left must do without them
            token_mask &= rng.random(token_mask.shape) >= self.hidden_tokens
            token_mask &= rng.random((limit, 1)) >= self.hidden_texts
        panels = np.arange(limit) < n
        placed = panels & self.use_composition
        if train:
            placed &= rng.random(limit) >= self.hidden_places
        composition *= placed[:, None]
        return {
            'images': images,
            'tokens': tokens * token_mask,
            'token_mask': token_mask,
            'composition': composition,
            'modality': np.stack([panels, token_mask.any(1), placed], axis=1),
            'panels': panels,
            'boxes': boxes,
        }

    def _reduced(self, row: int, record: Mapping[str, Any]) -> Image.Image:
        """Returns the page at least as large as its panels' cuts need it, kept where room is."""

        def make() -> Image.Image:
            width, height = record['width'], record['height']
            sides = ((x1 - x0, y1 - y0) for x0, y0, x1, y1 in record['boxes'])
            smallest = min(min(w * width, h * height) for w, h in sides)
            share = min(1.0, 1.15 * self.image_size / smallest)  # augmented boxes may be smaller
            return self._open(row, record, (math.ceil(width * share), math.ceil(height * share)))

        return self._kept.get(row, make)

    def _open(
        self, row: int, record: Mapping[str, Any], at_least: tuple[int, int] | None
    ) -> Image.Image:
        name = record['image_path'] or record['canonical_id']
        source = record['image'] if self.pages.root is None else self.pages.root / name
        try:
            return pictures.open_image(
                source, str(name), max_pixels=self.pages.max_pixels, at_least=at_least
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
