"""Generation token by token: greedy, sampling and beam search, over any model given as a function.

The model is `step(state, tokens, index) → (logits, state)`: it reads int tokens [batch, beams],
the generated ones at position `index`, and returns the logits [batch, beams, vocab] of the next
ones. `state` is a pytree whose leaves all lead with [batch, beams]; beam search reorders it. What
the beams of a row share (parameters, the cache of the prompt) belongs to the function, not to the
state. The last token is never read: a cache of max_tokens − 1 positions is enough.

Everything here is pure and has static shapes, to be called under `jax.jit`. The loops end as soon
as every row of the batch has ended.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int, PyTree

from mmjax import cpu
from mmjax.typing import Array, Keys

Step = Callable[
    [PyTree, Int[Array, 'batch beams'], Int[Array, '']],
    tuple[Float[Array, 'batch beams vocab'], PyTree],
]


class Generated(NamedTuple):
    """One text per row."""

    tokens: Int[jax.Array, 'batch max_tokens']  # int32, `pad` after the end
    lengths: Int[jax.Array, ' batch']  # int32, the end-of-text token included, if any
    scores: Float[jax.Array, ' batch']  # float32


def generate(
    step: Step,
    state: PyTree,
    logits: Float[Array, 'batch vocab'],
    *,
    max_tokens: int,
    eos: int,
    pad: int,
    method: str,
    beams: int = 1,
    length_penalty: float = 1.0,
    keys: Keys | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Generated:
    """Generates by `method`: 'greedy', 'sample' or 'beam', which are the functions below.

    >>> import jax.numpy as jnp
    >>> step = lambda state, tokens, index: (jax.nn.one_hot(tokens + 1, 5), state)  # counts up
    >>> options = dict(max_tokens=4, eos=4, pad=0, method='beam', beams=2)
    >>> generate(step, (), jax.nn.one_hot(jnp.array([2]), 5), **options).tokens.tolist()
    [[2, 3, 4, 0]]

    Raises:
      ValueError: another method, or arguments that do not fit.
    """
    shared = {'max_tokens': max_tokens, 'eos': eos, 'pad': pad}
    if method == 'greedy':
        return greedy(step, state, logits, **shared)
    if method == 'sample':
        return sample(
            step,
            state,
            logits,
            **shared,
            keys=keys,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
        )
    if method == 'beam':
        return beam_search(
            step, state, logits, **shared, beams=beams, length_penalty=length_penalty
        )
    raise ValueError(f"method '{method}' is not one of greedy, sample, beam")


def greedy(
    step: Step,
    state: PyTree,
    logits: Float[Array, 'batch vocab'],
    *,
    max_tokens: int,
    eos: int,
    pad: int,
) -> Generated:
    """Takes the most probable token each time; of equal ones the one with the lower id.

    >>> import jax.numpy as jnp
    >>> step = lambda state, tokens, index: (jax.nn.one_hot(tokens + 1, 5), state)  # counts up
    >>> texts = greedy(step, (), jax.nn.one_hot(jnp.array([2]), 5), max_tokens=4, eos=4, pad=0)
    >>> texts.tokens.tolist(), texts.lengths.tolist()
    ([[2, 3, 4, 0]], [3])

    Args:
      step, state: the model, for one beam.
      logits: of the first token.
      max_tokens: how many are generated at most, the end-of-text token included.
      eos: token that ends a text; a negative one never does.
      pad: token that fills a row after its end, in the vocabulary.

    Returns:
      Generated; a score is Σ log p of the row's tokens.

    Raises:
      ValueError: `max_tokens` or `pad` that do not fit.
    """
    choose = lambda logits, index: cpu.argmax(logits)
    return _generate(step, state, logits, choose, max_tokens, eos, pad)


def sample(
    step: Step,
    state: PyTree,
    logits: Float[Array, 'batch vocab'],
    *,
    max_tokens: int,
    eos: int,
    pad: int,
    keys: Keys | None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Generated:
    """Draws each token from softmax(logits / temperature), cut off by top_k, then by top_p.

    Args:
      step, state, logits, max_tokens, eos, pad: as in `greedy`.
      keys: PRNG keys [batch]: what a row draws depends on its own key only, not on its batch.
      temperature: positive.
      top_k: how many of the most probable tokens may be drawn; 0: all.
      top_p: in (0, 1]; of these, the fewest most probable that together hold at least this
        fraction of their probability (Holtzman 2020).

    Returns:
      Generated; a score is Σ log p under the model itself, without temperature and cuts.

    Raises:
      ValueError: an argument out of its range, or keys that do not fit.
    """
    if not temperature > 0:
        raise ValueError(f'temperature is {temperature}, not positive')
    if not 0 < top_p <= 1:
        raise ValueError(f'top_p is {top_p}, not in (0, 1]')
    if keys is None or keys.shape != logits.shape[:1]:
        raise ValueError(f'keys are not [batch], {logits.shape[0]} of them')
    fold = jax.vmap(jax.random.fold_in, (0, None))
    draw = lambda logits, index: jax.vmap(jax.random.categorical)(fold(keys, index), logits)

    def choose(logits, index):
        logits = logits / temperature
        vocabulary = logits.shape[-1]
        if not top_k and top_p == 1:
            return draw(logits, index)
        logits, ids = jax.lax.top_k(logits, min(top_k or vocabulary, vocabulary))
        if top_p < 1:
            probs = jax.nn.softmax(logits)
            before = jnp.cumsum(probs, -1) - probs
            logits = jnp.where(before < top_p, logits, -jnp.inf)
        return _pick(ids, draw(logits, index))

    return _generate(step, state, logits, choose, max_tokens, eos, pad)


def _generate(step, state, logits, choose, max_tokens: int, eos: int, pad: int) -> Generated:
    """Runs `choose(logits [batch, vocab], index) → tokens [batch]` until all rows end."""

    def emit(index, logits, texts, active):
        logits = logits.astype(jnp.float32)
        token = jnp.where(active, choose(logits, index), pad).astype(jnp.int32)
        log_probs = _pick(logits, token) - jax.nn.logsumexp(logits, -1)
        texts = Generated(
            texts.tokens.at[:, index].set(token),
            texts.lengths + active,
            texts.scores + jnp.where(active, log_probs, 0.0),
        )
        return texts, active & (token != eos)

    def body(carry):
        index, state, texts, active = carry
        logits, state = step(state, texts.tokens[:, index - 1, None], index - 1)
        texts, active = emit(index, logits[:, 0], texts, active)
        return index + 1, state, texts, active

    batch = _check(logits, max_tokens, pad)
    tokens = jnp.full((batch, max_tokens), pad, jnp.int32)
    empty = Generated(tokens, jnp.zeros(batch, jnp.int32), jnp.zeros(batch, jnp.float32))
    texts, active = emit(0, logits, empty, jnp.ones(batch, bool))
    cond = lambda carry: (carry[0] < max_tokens) & carry[3].any()
    return jax.lax.while_loop(cond, body, (jnp.int32(1), state, texts, active))[2]


class _Beams(NamedTuple):
    """The beams that go on, best first; `sums` of −∞ where there are fewer than `beams`."""

    tokens: Int[jax.Array, 'batch beams max_tokens']
    sums: Float[jax.Array, 'batch beams']  # Σ log p


def beam_search(
    step: Step,
    state: PyTree,
    logits: Float[Array, 'batch vocab'],
    *,
    max_tokens: int,
    eos: int,
    pad: int,
    beams: int,
    length_penalty: float = 1.0,
) -> Generated:
    """Keeps the `beams` most probable beginnings of a row; returns the best ended one.

    Of the 2 · beams most probable continuations, those among the first `beams` that end, by the
    end-of-text token or at `max_tokens`, are scored Σ log p / length^length_penalty, the end
    included; the first `beams` that do not end go on. These are Hugging Face's rules. A row stops
    when no beam that goes on can beat its best ended one any more, even if all its further tokens
    were certain, so stopping early changes no result (theirs: early_stopping='never').

    Args:
      step, state: the model, for `beams` beams.
      logits, max_tokens, eos, pad: as in `greedy`.
      beams: how many beginnings are kept; 1 is greedy.
      length_penalty: ≥ 0; 0 prefers short texts, as every token lowers the sum.

    Returns:
      Generated, with the score above.

    Raises:
      ValueError: `beams`, `max_tokens` or `pad` that do not fit.
    """
    if beams < 1:
        raise ValueError(f'beams is {beams}, not positive')
    batch = _check(logits, max_tokens, pad)
    vocabulary = logits.shape[-1]
    per_beam = min(2 * beams, vocabulary)
    penalise = lambda sums, length: sums / length**length_penalty
    can_win = lambda live, best: penalise(live.sums[:, 0], max_tokens) > best.scores

    def expand(index, logits, live, best):
        """Returns (beams that go on, their parents [batch, beams], best ended ones)."""
        logits = logits.astype(jnp.float32)
        # The best of each beam first: one sort over beams · vocab is slower, with the same result.
        log_probs, ids = jax.lax.top_k(logits, per_beam)
        log_probs -= jax.nn.logsumexp(logits, -1, keepdims=True)
        sums = (live.sums[..., None] + log_probs).reshape(batch, -1)
        sums, candidates = jax.lax.top_k(sums, 2 * beams)
        parents = candidates // per_beam
        next_tokens = _pick(ids.reshape(batch, -1), candidates)
        tokens = _reorder(live.tokens, parents).at[:, :, index].set(next_tokens)

        ended = (next_tokens == eos) | (index + 1 == max_tokens)
        counts = ended & (jnp.arange(2 * beams) < beams)
        scores = jnp.where(counts, penalise(sums, jnp.float32(index + 1)), -jnp.inf)
        first = scores.argmax(1)
        better = (_pick(scores, first) > best.scores) & can_win(live, best)
        best = Generated(
            jnp.where(better[:, None], _reorder(tokens, first[:, None])[:, 0], best.tokens),
            jnp.where(better, index + 1, best.lengths),
            jnp.where(better, _pick(scores, first), best.scores),
        )
        sums, order = jax.lax.top_k(jnp.where(ended, -jnp.inf, sums), beams)
        return _Beams(_reorder(tokens, order), sums), _pick(parents, order), best

    def body(carry):
        index, state, live, best = carry
        logits, state = step(state, live.tokens[:, :, index - 1], index - 1)
        live, parents, best = expand(index, logits, live, best)
        state = jax.tree.map(lambda x: _reorder(x, parents), state)
        return index + 1, state, live, best

    tokens = jnp.full((batch, beams, max_tokens), pad, jnp.int32)
    # The beams start equal: all but one of them have to be impossible.
    live = _Beams(tokens, jnp.full((batch, beams), -jnp.inf).at[:, 0].set(0.0))
    best = Generated(tokens[:, 0], jnp.zeros(batch, jnp.int32), jnp.full(batch, -jnp.inf))
    first = jnp.broadcast_to(logits[:, None], (batch, beams, vocabulary))
    live, _, best = expand(0, first, live, best)
    cond = lambda carry: (carry[0] < max_tokens) & can_win(*carry[2:]).any()
    return jax.lax.while_loop(cond, body, (jnp.int32(1), state, live, best))[3]


def _check(logits: Array, max_tokens: int, pad: int) -> int:
    if max_tokens < 1:
        raise ValueError(f'max_tokens is {max_tokens}, not positive')
    if not 0 <= pad < logits.shape[-1]:
        raise ValueError(f'pad {pad} is not in the vocabulary of {logits.shape[-1]}')
    return logits.shape[0]


def _pick(x: Array, indices: Array) -> jax.Array:
    """Returns x [batch, n] at indices [batch] or [batch, m]."""
    if indices.ndim == 1:
        return jnp.take_along_axis(x, indices[:, None], 1)[:, 0]
    return jnp.take_along_axis(x, indices, 1)


def _reorder(x: Array, beams: Array) -> jax.Array:
    """Returns x [batch, beams, …] with beam beams[b, k] in place of beam k."""
    return jax.vmap(lambda row, order: row[order])(x, beams)
