"""Questions and answers in tokens, made once and kept beside the prepared records."""

from collections.abc import Callable, Iterable

import numpy as np

from mmjax.data.prepare import Prepared
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
      closing: as in `receipts_text.plain_tokens`.

    Returns:
      ids: int32 [different texts, L], without special tokens, then padding; lengths: int32
      [different texts], L + 1 for longer ones; rows: int32 [n], the position of each text among the
      different ones; closing: int32, the token that closes texts.

    Raises:
      UserError: the closing token is text.
    """
    positions: dict[str, int] = {}
    rows = np.array([positions.setdefault(text, len(positions)) for text in texts], np.int32)
    tokens, closing = receipts_text.plain_tokens(tokenizer, list(positions), longest + 1, closing)
    ids = np.full((len(tokens), longest), tokenizer.pad_id, np.int32)
    for row, text in zip(ids, tokens, strict=True):
        row[: min(len(text), longest)] = text[:longest]
    lengths = np.array([len(text) for text in tokens], np.int32)
    return {'ids': ids, 'rows': rows, 'lengths': lengths, 'closing': np.int32(closing)}


def encoded(
    prepared: Prepared,
    split: str,
    texts: Callable[[], Iterable[str]],
    tokenizer: Tokenizer,
    longest: int,
    closing: int | None,
) -> dict[str, np.ndarray]:
    """Returns what `encode` does, made once for a split, a tokenizer and a length."""
    settings = [VERSION, longest, closing, tokenizer.__getstate__()]
    make = lambda: encode(texts(), tokenizer, longest, closing)
    return prepared.cached_arrays(f'tokens-{split}', settings, make)
