"""Writes, checks, filters and shortens the prompts of image-text retrieval.

Descriptions are [{item, color, description: [sentence, …]}], prompts {item_id: text}, metadata
{relative path: {item_id, split}}: plain values, as in the JSON files.
"""

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
from mmjax.engine import logs
from mmjax.errors import UserError


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
    logs.write_json(path, dict(sorted(prompts.items())))


def generate(
    descriptions: Iterable[Mapping[str, Any]],
    template: str,
    noun: str,
    template_plain: str,
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


def noun_alone(noun: str, template_plain: str) -> str:
    """Returns the plain template without description: the fallback of `token_safe`."""
    empty = {'item': 'noun', 'description': []}
    return generate([empty], template_plain, noun, template_plain)['noun']


def table(report: Mapping[str, Any]) -> str:
    """Returns lines for a terminal: numbers, and length and first names of each list."""
    lines = []
    for label, value in report.items():
        cell = value
        if isinstance(value, dict):
            cell = ', '.join(f'{key} {number:g}' for key, number in value.items())
        elif isinstance(value, list):
            names = ', '.join(map(repr, value[:3])) + ', …' * (len(value) > 3)
            cell = f'{len(value):,}  {names}'.rstrip()
        lines.append(f'{label.replace("_", " "):<18}{cell}')
    return '\n'.join(lines)


def consistency(
    prompts: Mapping[str, str] | Iterable[Mapping[str, Any]],
    metadata: Mapping[str, Any],
    root: str | os.PathLike,
) -> dict[str, Any]:
    """Compares prompts (or descriptions), metadata and the files in `root`; nothing is changed.

    A blank prompt counts as none.

    Returns:
      JSON values, names sorted. identities and images, how many; few_images: identities with fewer
      than 2 images in all; few_in_split: split → how many have fewer than 2 there;
      several_prompts, no_prompt; no_images: items with a prompt; missing_files; outside_root: paths
      that leave the root by '..', '/' or a symbolic link; no_split.

    Raises:
      UserError: a malformed entry.
    """
    texts: Counter[str] = Counter()
    if isinstance(prompts, Mapping):
        texts.update(item for item, text in prompts.items() if text.strip())
    else:
        texts.update(entry['item'] for entry in _checked(prompts, '', unique=False))
    base = os.path.realpath(root)
    missing = []
    outside = []
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
    return {
        'identities': len(images),
        'images': images.total(),
        'few_images': sorted(item for item, n in images.items() if n < 2),
        'few_in_split': dict(few_in_split),
        'several_prompts': sorted(item for item, n in texts.items() if n > 1),
        'no_prompt': sorted(item for item in images if not texts[item]),
        'no_images': sorted(item for item, n in texts.items() if n and item not in images),
        'missing_files': sorted(missing),
        'outside_root': sorted(outside),
        'no_split': sorted(path for path, _, split in _images(metadata) if not split),
    }


def keep_pairs(metadata: Mapping[str, Any], split: str) -> dict[str, Any]:
    """Returns the metadata, in order, less identities with one image in `split`, as samplers want.

    Images of other splits are not counted, and stay. Raises UserError for a split without images.
    """
    counts = Counter(item for _, item, its in _images(metadata) if its == split)
    if not counts:
        splits = ', '.join(sorted({its for _, _, its in _images(metadata)}))
        raise UserError(f'no image is of split {split!r} (splits: {splits})')
    few = {(split, item) for item, n in counts.items() if n < 2}
    return {path: metadata[path] for path, item, its in _images(metadata) if (its, item) not in few}


def token_safe(
    prompts: Mapping[str, str], count: Callable[[str], int], limit: int = 77, *, fallback: str
) -> tuple[dict[str, str], dict[str, Any]]:
    """Shortens prompts until `count` finds at most `limit` tokens in each; none is empty.

    Args:
      count: the tokenizer's `clip_tokenizer.token_counter`.
      fallback: stands in for what `clip_tokenizer.shorten` cannot fit, and for blank prompts; see
        `noun_alone`.

    Returns:
      (prompts, a report in JSON values): limit; over_limit: how many were longer; before and after:
      tokens {min, median, max}; and of each kind in `clip_tokenizer.CUTS` the items that met it.

    Raises:
      UserError: the fallback is blank or too long itself.
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
    over = sum(tokens > limit for tokens in before)
    after = _spread([count(text) for text in safe.values()])
    report = {'limit': limit, 'over_limit': over, 'before': _spread(before), 'after': after}
    return safe, report | items


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
