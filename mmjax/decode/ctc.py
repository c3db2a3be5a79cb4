"""Decodes CTC outputs, greedily or by prefix beam search; everything has static shapes under jit.

Symbol 0 is the blank. A path of one symbol per frame spells the sequence that is left when repeats
are collapsed and blanks dropped, in this order: 'aa' needs a blank between. The most probable path
(greedy) need not spell the most probable sequence, whose probability sums over all its paths.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from mmjax.typing import Array, Scalar


class Decoded(NamedTuple):
    """Greedy output, int32. Symbol n of row b was read at frames starts[b, n] … ends[b, n] − 1.

    `ids`, `starts` and `ends` are 0 from `lengths` on.
    """

    ids: Int[jax.Array, 'batch frames']
    lengths: Int[jax.Array, ' batch']
    starts: Int[jax.Array, 'batch frames']
    ends: Int[jax.Array, 'batch frames']


class Beams(NamedTuple):
    """Beam search output, best first.

    `ids` are 0 from `lengths` on; `scores` are −∞ where fewer than `beam` sequences are possible.
    """

    ids: Int[jax.Array, 'batch beam length']
    lengths: Int[jax.Array, 'batch beam']
    scores: Float[jax.Array, 'batch beam']


def greedy(
    log_probs: Float[Array, 'batch frames vocab'], mask: Bool[Array, 'batch frames']
) -> Decoded:
    """Takes the most probable symbol of each frame, collapses repeats and drops blanks.

    >>> import jax, jax.numpy as jnp
    >>> path = jnp.array([[1, 1, 0, 1, 2]])
    >>> decoded = greedy(jax.nn.one_hot(path, 3), jnp.ones((1, 5), bool))
    >>> decoded.ids[0, : decoded.lengths[0]].tolist()
    [1, 1, 2]

    Args:
      log_probs: or logits.
      mask: True for the first frames of a row; padding may hold anything.

    Raises:
      ValueError: shapes or a mask that do not fit.
    """
    _check(log_probs, mask)
    path = jnp.where(mask, jnp.argmax(log_probs, axis=2), 0).astype(jnp.int32)
    first = (path != 0) & (path != jnp.pad(path, ((0, 0), (1, 0)))[:, :-1])
    # Frames count from 1, so that slots without a symbol stay 0; a run ends at its largest.
    frame = jnp.broadcast_to(jnp.arange(1, path.shape[1] + 1, dtype=jnp.int32), path.shape)
    ids, lengths = _compact(path, first)
    starts, _ = _compact(frame, first)
    last = (path != 0) & (path != jnp.pad(path, ((0, 0), (0, 1)))[:, 1:])
    ends, _ = _compact(frame, last)
    return Decoded(ids, lengths, jnp.maximum(starts - 1, 0), ends)


def beam_search(
    log_probs: Float[Array, 'batch frames vocab'],
    mask: Bool[Array, 'batch frames'],
    *,
    beam: int,
    max_length: int | None = None,
    symbols: int | None = None,
    language_model: Float[Array, 'vocab vocab'] | None = None,
    weight: Scalar = 0.0,
    length_bonus: Scalar = 0.0,
) -> Beams:
    """Finds sequences of high probability, summed over their paths.

      score(y) = ln p_ctc(y) + weight · ln p_lm(y, end) + length_bonus · |y|
    Each prefix in the beam keeps the sum of its paths that end in a blank apart from that of those
    that end in its last symbol: only the first may repeat the symbol as a new one. A prefix grown
    into one that is in the beam too adds to it. The score lacks paths through prefixes that had
    left the beam; with a beam larger than the number of prefixes it is exact.

    Source: Hannun et al. 2014, First-Pass Large Vocabulary Continuous Speech Recognition using
    Bi-Directional Recurrent DNNs, https://arxiv.org/abs/1408.2873; equal prefixes are found by a
    64-bit hash.

    >>> import jax.numpy as jnp
    >>> log_probs = jnp.log(jnp.array([[[0.6, 0.4], [0.6, 0.4]]]))
    >>> beams = beam_search(log_probs, jnp.ones((1, 2), bool), beam=2)
    >>> beams.ids[0, 0].tolist(), round(float(jnp.exp(beams.scores[0, 0])), 2)  # greedy: blanks
    ([1, 0], 0.64)

    Args:
      log_probs: normalised, −∞ allowed.
      mask: True for the first frames of a row; padding may hold anything.
      beam: prefixes kept, 1 or more.
      max_length: the longest sequence searched for; that of all frames by default.
      symbols: how many symbols of a frame may grow a prefix, the most probable ones. By default
        beam + 1, which loses nothing without a language model, and all of them with one.
      language_model: ln p(next | last) as `ngram.bigrams` makes it; index 0 is the start as `last`
        and the end as `next`.
      weight, length_bonus: see the score. The length bonus acts without a language model too.

    Raises:
      ValueError: shapes, a mask or options that do not fit.
    """
    _check(log_probs, mask)
    frames, size = log_probs.shape[1:]
    if beam < 1 or size < 2:
        raise ValueError(f'beam must be 1 or more and V 2 or more, got {beam} and {size}')
    if language_model is not None and language_model.shape != (size, size):
        raise ValueError(
            f'language_model must be [{size}, {size}], got {list(language_model.shape)}'
        )
    if symbols is None:
        # A symbol behind beam + 1 others stands behind `beam` that are not the prefix's last one,
        # and each of these makes a prefix as good or better, by growth or in the beam already.
        symbols = beam + 1 if language_model is None else size
    if language_model is not None:
        language_model = jnp.asarray(language_model)  # NumPy's cannot be indexed by a traced symbol
    search = functools.partial(
        _search,
        beam=beam,
        max_length=frames if max_length is None else max_length,
        symbols=min(symbols, size - 1),
        language_model=language_model,
        weight=weight,
        length_bonus=length_bonus,
    )
    return Beams(*jax.vmap(search)(jnp.asarray(log_probs, jnp.float32), mask))


class _Prefixes(NamedTuple):
    """The beam of one row: float32 [K] scores, int32 [K], and uint32 [K, 2] hashes.

    `blank` and `symbol` are the log sums of paths that end in a blank and in the last symbol,
    `fusion` is what language model and length add. A slot with −∞ in both sums is empty.
    """

    blank: jax.Array
    symbol: jax.Array
    fusion: jax.Array
    last: jax.Array
    length: jax.Array
    key: jax.Array
    parent: jax.Array


def _search(log_probs, mask, *, beam, max_length, symbols, language_model, weight, length_bonus):
    """Returns int32 [K, L], int32 [K] and float32 [K] of one row, log_probs [T, V], mask [T]."""
    size = log_probs.shape[1]
    if symbols < size - 1:
        values, ids = jax.lax.top_k(log_probs[:, 1:], symbols)
        ids = ids + 1
    else:
        values = log_probs[:, 1:]
        ids = jnp.broadcast_to(jnp.arange(1, size), values.shape)

    def gain(last, ids):
        """Returns float32 [K, S], or a scalar: what a new symbol adds to `fusion`."""
        if language_model is None:
            return jnp.float32(length_bonus)
        rows = language_model[last]
        rows = rows[:, 1:] if symbols == size - 1 else rows[:, ids]
        return weight * rows + length_bonus

    def step(old, frame):
        log_prob, values, ids, valid = frame
        total = jnp.logaddexp(old.blank, old.symbol)
        live = total > -jnp.inf
        # Row k of a [K, K] array is a prefix, column q one that may be k grown by q's last symbol;
        # an empty slot may hold the hash of any prefix.
        child = jnp.all(old.key[:, None] == old.parent, axis=-1)
        child &= live[:, None] & live & (old.length[:, None] + 1 == old.length)
        grown = jnp.where(old.last[:, None] == old.last, old.blank[:, None], total[:, None])
        grown = jnp.max(jnp.where(child, grown, -jnp.inf), axis=0)  # it has one parent at most
        blank = total + log_prob[0]
        symbol = jnp.logaddexp(old.symbol, grown) + log_prob[old.last]

        repeated = old.last[:, None] == ids  # [K, S]
        merged = child.astype(jnp.float32) @ repeated.astype(jnp.float32) > 0
        new = jnp.where(repeated, old.blank[:, None], total[:, None]) + values
        new = jnp.where(merged | (old.length >= max_length)[:, None], -jnp.inf, new)
        fusion = old.fusion[:, None] + gain(old.last, ids)  # [K, S] or [K, 1]

        stay = jnp.logaddexp(blank, symbol) + old.fusion
        _, best = jax.lax.top_k(jnp.concatenate([stay, (new + fusion).ravel()]), beam)
        stays = best < beam
        cell = jnp.maximum(best - beam, 0)
        source = jnp.where(stays, best, cell // symbols)
        added = jnp.where(stays, 0, ids[cell % symbols])
        fusion = jnp.broadcast_to(fusion, new.shape)
        key = old.key[source]
        new_beam = _Prefixes(
            blank=jnp.where(stays, blank[source], -jnp.inf),
            symbol=jnp.where(stays, symbol[source], new.ravel()[cell]),
            fusion=jnp.where(stays, old.fusion[source], fusion.ravel()[cell]),
            last=jnp.where(stays, old.last[source], added),
            length=old.length[source] + ~stays,
            key=jnp.where(stays[:, None], key, _grow(key, added)),
            parent=jnp.where(stays[:, None], old.parent[source], key),
        )
        new_beam = jax.tree.map(lambda a, b: jnp.where(valid, a, b), new_beam, old)
        trace = jnp.where(valid, source, jnp.arange(beam)), jnp.where(valid, added, 0)
        return new_beam, trace

    zeros = jnp.zeros(beam, jnp.int32)
    start = _Prefixes(
        blank=jnp.where(jnp.arange(beam) == 0, 0.0, -jnp.inf),
        symbol=jnp.full(beam, -jnp.inf),
        fusion=jnp.zeros(beam),
        last=zeros,
        length=zeros,
        key=jnp.tile(_ROOT, (beam, 1)),
        parent=jnp.tile(_ROOT, (beam, 1)),
    )
    final, (sources, added) = jax.lax.scan(step, start, (log_probs, values, ids, mask))
    scores = jnp.logaddexp(final.blank, final.symbol) + final.fusion
    if language_model is not None:
        scores = scores + weight * language_model[final.last, 0]
    scores, order = jax.lax.top_k(scores, beam)

    def trace_back(slot, frame):
        source, added = frame
        return source[slot], added[slot]

    _, symbols = jax.lax.scan(trace_back, order, (sources, added), reverse=True)
    symbols = jnp.where(scores > -jnp.inf, symbols, 0).T
    ids, lengths = _compact(symbols, symbols != 0)
    return ids[:, :max_length], lengths, scores


_ROOT = np.array([0x9E3779B9, 0x7F4A7C15], np.uint32)


def _grow(key, symbol):
    """Returns the hashes uint32 [..., 2] of prefixes grown by a symbol, int32 [...].

    The halves use other constants, so that both collide with a probability of 2⁻⁶⁴. For one symbol
    a half is a bijection: prefixes that differ stay different when they grow alike.
    """
    mixed = key ^ (symbol.astype(jnp.uint32)[..., None] * np.uint32([0x85EBCA6B, 0xC2B2AE35]))
    mixed = (mixed ^ (mixed >> 16)) * np.uint32([0x7FEB352D, 0x846CA68B])
    return mixed ^ (mixed >> 15)


def _compact(values, flags):
    """Moves the flagged values of each row to its start: int32 [n, T], 0 behind, and how many."""
    width = values.shape[1]
    index = jnp.where(flags, jnp.cumsum(flags, axis=1) - 1, width)
    rows = jnp.arange(len(values))[:, None]
    compact = jnp.zeros(values.shape, jnp.int32).at[rows, index].set(values, mode='drop')
    return compact, jnp.sum(flags, axis=1, dtype=jnp.int32)


def _check(log_probs, mask):
    if log_probs.ndim != 3 or mask.shape != log_probs.shape[:2] or mask.dtype != bool:
        raise ValueError(
            f'log_probs must be [B, T, V] with a bool mask [B, T], got {log_probs.shape} and '
            f'{mask.dtype} {mask.shape}'
        )
