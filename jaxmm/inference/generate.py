"""Generate sequences with a decoder, token by token: greedy, beam search, sampling; one compiled loop over a cache.

The sequence of a row does not depend on the other rows of its batch: prompts of different lengths are not padded in
front (a row that is still inside its prompt takes the next token from there), every row samples with its own key, and
finished rows are padded until all are done.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxmm.task import Decoder
from jaxmm.validation import POSITIVE, UP_TO_ONE, at_least, check_types, require

NEVER = -1e9
"""A score that loses to any other."""
NO_TOKEN = -1
"""An id that no token has."""
SEGMENT = 256
"""Number of positions by which the cache of a long sequence grows."""


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """Decoding options. The defaults are greedy; BLIP's captions take 3 beams, `min_length` 5, `max_length` 20."""

    beams: Annotated[int, POSITIVE] = 1
    """k, number of beams; 1: greedy, or sampling."""
    sample: bool = False
    """Sample each token instead of taking the most probable one."""
    top_p: Annotated[float, UP_TO_ONE] = 1.0
    """Nucleus sampling (Holtzman et al. 2020): sample from the smallest set of tokens with this total probability."""
    top_k: Annotated[int, at_least(0)] = 0
    """Sample from the k most probable tokens; 0: from all."""
    temperature: Annotated[float, POSITIVE] = 1.0
    """Divisor of the logits before sampling."""
    repetition_penalty: Annotated[float, POSITIVE] = 1.0
    """Factor above 1 that makes repeated tokens less probable (Keskar et al. 2019, section 4.1)."""
    length_penalty: float = 1.0
    """Exponent of the length that divides the sum of log-probabilities when beams are compared."""
    min_length: int = 0
    """Minimum number of tokens, including the prompt."""
    max_length: Annotated[int, POSITIVE] = 20
    """L, maximum number of tokens, including prompt and end."""

    def __post_init__(self):
        """Check that the options of sampling and beam search fit each other."""
        check_types(self, "decoding")
        require(not (self.sample and self.beams > 1), "decoding.sample", self.sample, "False with beams")
        drawn = self.top_p < 1 or self.top_k or self.temperature != 1
        require(self.sample or not drawn, "decoding.sample", self.sample, "True, for top_p, top_k or temperature")


class Generated(NamedTuple):
    """Sequences, the best first."""

    tokens: Int[Array, "b k L"]
    """Prompt, generated tokens and end token, then padding."""
    score: Float[Array, "b k"]
    """Sum of the log-probabilities of the generated tokens, over their number to the power `length_penalty`."""


Step = Callable[[Int[Array, "r"], Int[Array, ""], Any, Bool[Array, "r L"]], tuple[Float[Array, "r v"], Any]]
"""(tokens, their position, the cache, the mask of filled positions) to logits of the next token, and the cache with
these."""


def generate(
    decoder: Decoder, params: Any, context: Any, prompt: Int[Array, "r p"], lengths: Int[Array, "r"],
    keys: Key[Array, "r"], decoding: Decoding, context_mask: Bool[Array, "b n"] | None = None,
    kept: Bool[Array, "r p"] | None = None,
) -> Generated:
    """Continue each prompt's first `lengths` tokens with `decoder`, given what its `context` returned (or None).

    The first token of a prompt is replaced by `decoder.start_id`. There may be several prompts per context: those of
    the first context, then those of the next. What the decoder prepares from a context is computed once for all of its
    prompts and beams. Behind the first `lengths`, tokens of the prompt where `kept` is True are kept too.
    """
    prepared = decoder.prepare(params, context)

    def step(tokens, position, cache, cache_mask):
        return decoder.decode_step(params, tokens, position, cache, prepared, cache_mask, context_mask)

    return search(step, lambda length: decoder.cache(len(prompt) * decoding.beams, length),
                  prompt.at[:, 0].set(decoder.start_id), lengths, keys, decoding, end_id=decoder.end_id,
                  pad_id=decoder.pad_id, kept=kept)


def search(
    step: Step, cache: Callable[[int], Any], prompt: Int[Array, "b p"], lengths: Int[Array, "b"],
    keys: Key[Array, "b"], decoding: Decoding, *, end_id: int | None, pad_id: int | None,
    kept: Bool[Array, "b p"] | None = None,
) -> Generated:
    """Continue the first `lengths` (at least 1) tokens of each prompt, as `decoding` says.

    `cache` returns an empty one with room for b x k rows and a number of positions: leaves [r ...], row r being
    sequence r % k of prompt r // k. It grows with the sequences.
    Without `end_id` every sequence has `decoding.max_length` tokens. Tokens of the prompt where `kept` is True are
    those of the sequence at any position.
    """
    end_id, pad_id = NO_TOKEN if end_id is None else end_id, 0 if pad_id is None else pad_id
    b, p = prompt.shape
    k, total = decoding.beams, decoding.max_length
    prompt = jnp.pad(prompt, ((0, 0), (0, max(0, total - p))), constant_values=pad_id)[:, :total]
    given = jnp.arange(total)[None] < jnp.minimum(lengths, total)[:, None]
    if kept is not None:
        given = given | jnp.pad(kept, ((0, 0), (0, max(0, total - p))))[:, :total]
    written = jnp.maximum(jnp.cumsum(~given, axis=1), 1).astype(jnp.float32)  # at least 1, because it is a divisor
    first = jnp.full((b, k, total), pad_id, prompt.dtype).at[:, :, 0].set(prompt[:, :1])
    score = jnp.full((b, k), NEVER).at[:, 0].set(0.0)
    state = State(
        at=jnp.zeros((), jnp.int32), tokens=first, score=score, cache=None, done=first,
        done_score=jnp.full((b, k), NEVER) if total > 1 else score, ended=jnp.zeros(b, bool))

    def unfinished(length: int, state: State) -> Bool[Array, ""]:
        return (state.at < min(length, total - 1)) & ~state.ended.all()

    def body(length: int, state: State) -> State:
        at = state.at
        cache_mask = jnp.broadcast_to(jnp.arange(length) <= at, (b * k, length))
        logits, new = step(state.tokens[:, :, at].reshape(-1), at, state.cache, cache_mask)
        scores = _scores(logits.reshape(b, k, -1), state.tokens, at, decoding, end_id)
        forced = prompt[:, at + 1]
        in_prompt, count = given[:, at + 1], written[:, at + 1][:, None]
        if k == 1:
            chosen = scores[:, 0].argmax(axis=-1)
            if decoding.sample:
                chosen = jax.vmap(lambda key, row: jax.random.categorical(jax.random.fold_in(key, at), row))(
                    keys, _narrowed(scores[:, 0], decoding))
            drawn = jax.nn.log_softmax(scores[:, 0])[jnp.arange(b), chosen]
            return _one(state, new, jnp.where(in_prompt, forced, chosen), jnp.where(in_prompt, 0.0, drawn), in_prompt,
                        count, decoding, end_id, pad_id)
        return _beams(state, new, scores, in_prompt, forced, count, decoding, end_id)

    for length in cache_lengths(total):
        room = cache(length)
        state = state._replace(cache=room if state.cache is None else jax.tree.map(_grow, state.cache, room))
        state = jax.lax.while_loop(partial(unfinished, length), partial(body, length), state)
    return Generated(state.done, state.done_score)


def cache_lengths(total: int) -> list[int]:
    """Return the lengths of the cache while a sequence of `total` tokens is written: every step reads all of it."""
    return [*range(SEGMENT, total - 1, SEGMENT), total]


def _grow(old: Array, room: Array) -> Array:
    """Return `room` with `old` at the start of each axis."""
    return jax.lax.dynamic_update_slice(room, old, (0,) * room.ndim)


class State(NamedTuple):
    """State of the loop: unfinished sequences, and the best finished ones."""

    at: Int[Array, ""]
    """Position of the newest token."""
    tokens: Int[Array, "b k L"]
    score: Float[Array, "b k"]
    """Sums of log-probabilities."""
    cache: Any
    done: Int[Array, "b k L"]
    done_score: Float[Array, "b k"]
    """Scores of `done`, as in `Generated`."""
    ended: Bool[Array, "b"]
    """Rows whose unfinished sequences cannot become better than the finished ones."""


def _scores(
    logits: Float[Array, "b k v"], tokens: Int[Array, "b k L"], at: Int[Array, ""], decoding: Decoding, end_id: int
) -> Float[Array, "b k v"]:
    """Return logits (for beams log-probabilities) after the repetition penalty, without ends before `min_length`."""
    scores = logits if decoding.beams == 1 else jax.nn.log_softmax(logits)
    if decoding.repetition_penalty != 1:
        b, k, v = scores.shape
        filled = jnp.arange(tokens.shape[2]) <= at
        present = jnp.zeros((b, k, v), bool).at[
            jnp.arange(b)[:, None, None], jnp.arange(k)[None, :, None], tokens].max(filled[None, None, :])
        penalty = decoding.repetition_penalty
        scores = jnp.where(present, jnp.where(scores < 0, scores * penalty, scores / penalty), scores)
    early = at + 1 < decoding.min_length
    return jnp.where(early & (jnp.arange(scores.shape[-1]) == end_id)[None, None], NEVER, scores)


def _narrowed(logits: Float[Array, "b v"], decoding: Decoding) -> Float[Array, "b v"]:
    """Return the logits to sample from: temperature, then top-k, then the nucleus."""
    logits = logits / decoding.temperature
    if decoding.top_k:
        least = jax.lax.top_k(logits, min(decoding.top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if decoding.top_p < 1:
        ordered = -jnp.sort(-logits, axis=-1)
        before = jnp.cumsum(jax.nn.softmax(ordered), axis=-1) - jax.nn.softmax(ordered)
        least = jnp.where(before < decoding.top_p, ordered, jnp.inf).min(axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits


def _one(state, cache, token, score, in_prompt, written, decoding, end_id, pad_id) -> State:
    """Append one token to the single sequence of each row, unless it has ended."""
    place = state.at + 1
    token = jnp.where(state.ended, pad_id, token)
    tokens = state.tokens.at[:, 0, place].set(token.astype(state.tokens.dtype))
    total = state.score + jnp.where(state.ended, 0.0, score)[:, None]
    ends = ((token == end_id) & ~in_prompt) | (place == decoding.max_length - 1)
    now = (ends & ~state.ended)[:, None]
    done_score = jnp.where(now, total / written ** decoding.length_penalty, state.done_score)
    return State(place, tokens, total, cache, jnp.where(now[:, :, None], tokens, state.done), done_score,
                 state.ended | ends)


def _beams(state, cache, scores, in_prompt, forced, written, decoding, end_id) -> State:
    """Expand k beams to their 2k best continuations: those that end become finished, the best k others continue."""
    b, k, v = scores.shape
    only = jnp.where(jnp.arange(v)[None] == forced[:, None], 0.0, NEVER)[:, None, :]
    scores = jnp.where(in_prompt[:, None, None], only, scores)
    best, where = jax.lax.top_k((state.score[:, :, None] + scores).reshape(b, k * v), min(2 * k, k * v))
    beam, token, place = where // v, where % v, state.at + 1
    tokens = jnp.take_along_axis(state.tokens, beam[:, :, None], axis=1).at[:, :, place].set(
        token.astype(state.tokens.dtype))
    ends = ((token == end_id) & ~in_prompt[:, None]) | (place == decoding.max_length - 1)

    alive, order = jax.lax.top_k(jnp.where(ends, NEVER, best), k)
    parents = jnp.take_along_axis(beam, order, axis=1)
    rows = (parents + jnp.arange(b)[:, None] * k).reshape(-1)
    cache = jax.tree.map(lambda leaf: jnp.take(leaf, rows, axis=0), cache)

    written = written ** decoding.length_penalty
    counts = ends & ~state.ended[:, None] & (jnp.arange(best.shape[1]) < k)[None]
    finished = jnp.where(counts, best / written, NEVER)
    done_score, chosen = jax.lax.top_k(jnp.concatenate([state.done_score, finished], axis=1), k)
    done = jnp.take_along_axis(jnp.concatenate([state.done, tokens], axis=1), chosen[:, :, None], axis=1)
    ended = (done_score[:, -1] > NEVER) & (done_score[:, -1] >= alive[:, 0] / written[:, 0])
    return State(place, jnp.take_along_axis(tokens, order[:, :, None], axis=1), alive, cache, done, done_score,
                 state.ended | ended)
