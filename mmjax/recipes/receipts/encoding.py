"""Questions and answers in tokens, made once and kept beside the prepared records."""

import contextlib
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterable

import numpy as np

from mmjax.data.tokenizers import Tokenizer
from mmjax.recipes.receipts import text as receipts_text

VERSION = 1  # raise it when what `encode` returns changes


def encode(
    texts: Iterable[str], tokenizer: Tokenizer, longest: int, closing: int | None
) -> dict[str, np.ndarray]:
    """Encodes each different text once.

    Args:
      texts: n of them, read in order.
      longest: L, tokens of a text that are kept.
      closing: as in `receipts_text.own_tokens`.

    Returns:
      ids: int32 [different texts, L], the texts' own tokens, then padding; lengths: int32
      [different texts], whole, or L + 1 of longer ones; rows: int32 [n], the place of each text;
      closing: int32, the token that closes texts.

    Raises:
      UserError: the closing token is text.
    """
    places: dict[str, int] = {}
    rows = np.array([places.setdefault(text, len(places)) for text in texts], np.int32)
    plain, closing = receipts_text.own_tokens(tokenizer, list(places), longest + 1, closing)
    ids = np.full((len(plain), longest), tokenizer.pad_id, np.int32)
    for place, tokens in enumerate(plain):
        ids[place, : min(len(tokens), longest)] = tokens[:longest]
    lengths = np.array([len(tokens) for tokens in plain], np.int32)
    return {'ids': ids, 'rows': rows, 'lengths': lengths, 'closing': np.int32(closing)}


def encoded(
    folder: pathlib.Path,
    split: str,
    texts: Callable[[], Iterable[str]],
    tokenizer: Tokenizer,
    longest: int,
    closing: int | None,
) -> dict[str, np.ndarray]:
    """Returns what `encode` does, from `folder` where the same tokenizer has encoded the split."""
    settings = json.dumps([VERSION, longest, closing, tokenizer.__getstate__()])
    digest = hashlib.sha256(settings.encode()).hexdigest()[:16]
    path = folder / f'tokens-{split}-{digest}.npz'
    if path.is_file():
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    found = encode(texts(), tokenizer, longest, closing)
    with contextlib.suppress(OSError):  # a cache that may be read only is as good
        partial = path.with_name(f'.{os.getpid()}-{path.name}')
        np.savez(partial, **found)
        os.replace(partial, path)
    return found
