"""Writes, checks, filters and shortens the prompts of image-text retrieval. Free of jax.

Descriptions are [{item, color, description: [sentence, …]}], prompts {item_id: text}, metadata
{relative path: {item_id, split}}: plain values, as in the JSON files.
"""

import dataclasses
import json
import os
import pathlib
import re
import statistics
import string
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from mmjax.data.clip_tokenizer import CUTS, shorten
from mmjax.data.tables import read_json
from mmjax.errors import UserError

NOUN = 'clothing item'
TEMPLATE = 'A {noun} in {color}. {description}'
TEMPLATE_PLAIN = 'A {noun}. {description}'


def read_descriptions(path: str | os.PathLike, unique: bool = True) -> list[dict[str, Any]]:
    """Reads descriptions: entries {item: str, color: str or '', description: [str, …]}.

    A description that is a string is one sentence; a color may be missing, null or empty. Raises
    UserError: malformed JSON, a missing key, a wrong type and, if `unique`, an item twice.
    """
    entries = read_json(pathlib.Path(path), str(path))
    if not isinstance(entries, list):
        raise UserError(f'{path} is not a list of descriptions')
    return list(_checked(entries, f'{path}: ', unique))


def read_prompts(path: str | os.PathLike) -> dict[str, str]:
    """Reads prompts, {item_id: text}; raises UserError as `read_descriptions` does."""
    prompts = read_json(pathlib.Path(path), str(path))
    if not isinstance(prompts, dict):
        raise UserError(f'{path} is not an object of prompts by item_id')
    for item, text in prompts.items():
        _check_text(item, f'{path}: the item_id {item!r}')
        _check_text(text, f'{path}: the prompt of {item!r}')
    return prompts


def write(path: str | os.PathLike, prompts: Mapping[str, str]) -> None:
    """Writes prompts as JSON in UTF-8, sorted; a reader or a kill meets the old file or the new."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    text = json.dumps(dict(prompts), ensure_ascii=False, indent=1, sort_keys=True)
    try:
        temporary.write_text(text + '\n', encoding='utf-8')
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def generate(
    descriptions: Iterable[Mapping[str, Any]],
    template: str = TEMPLATE,
    noun: str = NOUN,
    template_plain: str = TEMPLATE_PLAIN,
) -> dict[str, str]:
    """Writes one prompt per item: the template, its fields noun, color and description filled in.

    Sentences are joined by spaces. An item without color takes `template_plain`, which has no such
    field. Raises UserError: an unknown field, a malformed description, an item twice.
    """
    _check_template(template, ('noun', 'color', 'description'))
    _check_template(template_plain, ('noun', 'description'))
    prompts = {}
    for entry in _checked(descriptions, '', unique=True):
        chosen = template if entry['color'] else template_plain
        text = ' '.join(filter(None, map(str.strip, entry['description'])))
        filled = chosen.format(noun=noun, color=entry['color'], description=text)
        prompts[entry['item']] = filled.strip()
    return prompts


def noun_alone(noun: str = NOUN, template_plain: str = TEMPLATE_PLAIN) -> str:
    """Returns the plain template without description: the fallback of `token_safe`."""
    empty = {'item': 'noun', 'description': []}
    return generate([empty], template_plain, noun, template_plain)['noun']


class _Report:
    def table(self) -> str:
        """Returns lines for a terminal: numbers, and length and first names of each list."""
        lines = []
        for label, value in self.to_json().items():
            cell = value
            if isinstance(value, dict):
                cell = ', '.join(f'{key} {number:g}' for key, number in value.items())
            elif isinstance(value, list):
                names = ', '.join(map(repr, value[:3])) + ', …' * (len(value) > 3)
                cell = f'{len(value):,}  {names}'.rstrip()
            lines.append(f'{label.replace("_", " "):<18}{cell}')
        return '\n'.join(lines)

    def to_json(self) -> dict[str, Any]:
        """Returns the whole report as JSON values."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


@dataclasses.dataclass(frozen=True)
class Consistency(_Report):
    """The result of `consistency`; names are sorted.

    few_images: identities with fewer than 2 images in all; few_in_split: split → how many have
    fewer than 2 there. outside_root: paths that leave the root by '..', '/' or a symbolic link.
    """

    identities: int
    images: int
    few_images: tuple[str, ...]
    few_in_split: dict[str, int]
    several_prompts: tuple[str, ...]
    no_prompt: tuple[str, ...]
    no_images: tuple[str, ...]  # items with a prompt
    missing_files: tuple[str, ...]
    outside_root: tuple[str, ...]
    no_split: tuple[str, ...]


def consistency(
    prompts: Mapping[str, str | Sequence[str]] | Iterable[Mapping[str, Any]],
    metadata: Mapping[str, Any],
    root: str | os.PathLike,
) -> Consistency:
    """Compares prompts (or several per item, or descriptions), metadata and the files in `root`.

    Nothing is changed. A blank prompt counts as none. Raises UserError for malformed entries.
    """
    texts: Counter[str] = Counter()
    if isinstance(prompts, Mapping):
        for item, value in prompts.items():
            several = [value] if isinstance(value, str) else value
            texts[item] = sum(bool(text.strip()) for text in several)
    else:
        texts.update(entry['item'] for entry in _checked(prompts, '', unique=False))
    base = os.path.realpath(root)
    missing, outside = [], []
    for path, _, _ in _images(metadata):
        real = '' if '\0' in path else os.path.realpath(os.path.join(base, path))
        if real and os.path.commonpath([base, real]) != base:
            outside.append(path)
        elif not os.path.isfile(real):
            missing.append(path)
    images = Counter(item for _, item, _ in _images(metadata))
    in_split = Counter((split, item) for _, item, split in _images(metadata) if split)
    few_in_split = Counter({split: 0 for split, _ in sorted(in_split)})
    few_in_split.update(split for (split, _), n in in_split.items() if n < 2)
    return Consistency(
        identities=len(images),
        images=images.total(),
        few_images=tuple(sorted(item for item, n in images.items() if n < 2)),
        few_in_split=dict(few_in_split),
        several_prompts=tuple(sorted(item for item, n in texts.items() if n > 1)),
        no_prompt=tuple(sorted(item for item in images if not texts[item])),
        no_images=tuple(sorted(item for item, n in texts.items() if n and item not in images)),
        missing_files=tuple(sorted(missing)),
        outside_root=tuple(sorted(outside)),
        no_split=tuple(sorted(path for path, _, split in _images(metadata) if not split)),
    )


def keep_pairs(
    metadata: Mapping[str, Any], minimum: int = 2, split: str | None = None
) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Keeps identities with at least `minimum` images, counted within a split, as samplers do.

    Given a `split`, only its images are counted and filtered; without, those of every split are,
    single query images too. Returns the metadata kept, in order, and the (split, item_id) left out,
    sorted. Raises UserError for a split without images.
    """
    counts = Counter((its, item) for _, item, its in _images(metadata))
    splits = sorted({its for its, _ in counts})
    if split is not None and split not in splits:
        raise UserError(f'no image is of split {split!r} (splits: {", ".join(splits)})')
    few = {key for key, n in counts.items() if n < minimum and split in (None, key[0])}
    kept = {path: metadata[path] for path, item, its in _images(metadata) if (its, item) not in few}
    return kept, sorted(few)


@dataclasses.dataclass(frozen=True)
class Shortening(_Report):
    """What `token_safe` did: tokens of the prompts, and which items met which kind of cut."""

    limit: int
    over_limit: int  # of the prompts before
    before: dict[str, float]  # min, median, max
    after: dict[str, float]
    kept: tuple[str, ...]
    front: tuple[str, ...]
    end: tuple[str, ...]
    words: tuple[str, ...]
    unfit: tuple[str, ...]

    @property
    def counts(self) -> dict[str, int]:
        """Returns kind → number of prompts."""
        return {kind: len(getattr(self, kind)) for kind in CUTS}


def token_safe(
    prompts: Mapping[str, str], count: Callable[[str], int], limit: int = 77, *, fallback: str
) -> tuple[dict[str, str], Shortening]:
    """Shortens prompts until `count` finds at most `limit` tokens in each; none is empty.

    `count` is the tokenizer's `clip_tokenizer.token_counter`; `fallback` (see `noun_alone`) stands
    in for what `clip_tokenizer.shorten` cannot fit, and for blank prompts. Raises UserError: the
    fallback is blank or too long itself.
    """
    if not fallback.strip() or count(fallback) > limit:
        raise UserError(f'the fallback {fallback!r} is blank or of more than {limit} tokens')
    safe: dict[str, str] = {}
    items: dict[str, list[str]] = {kind: [] for kind in CUTS}
    for item, text in sorted(prompts.items()):
        kind, shortened = shorten(text, count, limit)
        safe[item] = shortened or fallback
        items[kind].append(item)
    before = [count(text) for text in prompts.values()]
    after = [count(text) for text in safe.values()]
    return safe, Shortening(
        limit=limit,
        over_limit=sum(tokens > limit for tokens in before),
        before=_spread(before),
        after=_spread(after),
        **{kind: tuple(names) for kind, names in items.items()},
    )


def _spread(n: list[int]) -> dict[str, float]:
    return {'min': min(n), 'median': statistics.median(n), 'max': max(n)} if n else {}


def _images(metadata: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yields (path, item_id, split or '')."""
    for path, entry in metadata.items():
        if not isinstance(entry, Mapping) or 'item_id' not in entry:
            raise UserError(f'the metadata of {path!r} have no item_id')
        item, split = entry['item_id'], entry.get('split')
        for text in (path, item, split or ''):
            _check_text(text, f'the metadata of {path!r}')
        yield path, item, split or ''


def _checked(entries: Iterable[Any], where: str, unique: bool) -> Iterator[dict[str, Any]]:
    seen = set()
    for number, entry in enumerate(entries, 1):
        name = f'{where}description {number}'
        for key in ('item', 'description'):
            if not isinstance(entry, Mapping) or key not in entry:
                raise UserError(f'{name} has no {key!r}')
        item, color, parts = entry['item'], entry.get('color'), entry['description']
        parts = [parts] if isinstance(parts, str) else parts
        if not isinstance(parts, list | tuple):
            raise UserError(f'{name} ({item!r}): the description is no list of sentences')
        color = '' if color is None else color
        for text in (item, color, *parts):
            _check_text(text, f'{name} ({item!r})')
        if not item.strip() or (unique and item in seen):
            raise UserError(f'{name}: the item {item!r} is blank or stands twice')
        seen.add(item)
        yield {'item': item, 'color': color.strip(), 'description': list(parts)}


def _check_text(value: Any, where: str) -> None:
    if not isinstance(value, str):
        raise UserError(f'{where}: {value!r:.60} is not a string')
    if re.search('[\ud800-\udfff]', value):
        raise UserError(f'{where}: half a surrogate pair stands in {value!r:.60}')


def _check_template(template: str, allowed: Sequence[str]) -> None:
    try:
        for _, name, form, conversion in string.Formatter().parse(template):
            if name is not None and (name not in allowed or form or conversion):
                raise UserError(f'the template {template!r} has {name!r}, not one of {allowed}')
    except ValueError as error:
        raise UserError(f'the template {template!r} is malformed: {error}') from error
