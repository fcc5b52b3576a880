"""Rank given texts by their likelihood under a decoder: answers to a question about an image, or captions."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from jaxmm.compiling import compile_prediction
from jaxmm.data.tokenizers import Tokenizer
from jaxmm.inference.batching import outputs, pad_to_power_of_two
from jaxmm.inference.captioning import prompt_tokens
from jaxmm.inference.generate import Decoding
from jaxmm.losses.language_modeling import token_losses
from jaxmm.task import Decoder, Task
from jaxmm.validation import require

ANSWERS = Decoding(beams=3, min_length=1, max_length=10)
"""Settings of BLIP's authors for answers without a list to choose from."""
SHORTLIST = 128
"""Candidates that BLIP's authors score in full."""
LOGITS_AT_ONCE = 2**26
"""Logits in memory at a time, about."""


class Ranked(NamedTuple):
    """The likeliest candidates, the best first."""

    index: Int[Array, "b k"]
    score: Float[Array, "b k"]
    """Sums of the log-probabilities of a candidate's tokens and its end."""


def rank(
    decoder: Decoder, params: Any, context: Any, candidates: Int[Array, "m t"],
    context_mask: Bool[Array, "b n"] | None = None, *, given: int = 1, top: int = 1, shortlist: int = SHORTLIST,
    smoothing: float = 0.0,
) -> Ranked:
    """Return the `top` candidates per context, by the summed log-probability of the tokens behind the first `given`.

    The given tokens are the same in all candidates; the first is replaced by the decoder's start token. Only the
    `shortlist` candidates whose first token of their own is likeliest are scored in full (BLIP's code: 128 of 3,128).
    If that is all of them, the ranking is exact. Among equals the first comes first. With `smoothing`, scores are the
    label-smoothed loss instead (BLIP's authors rank by 0.1).
    """
    prepared = decoder.prepare(params, context)
    candidates = candidates.at[:, 0].set(decoder.start_id)
    (count, t), b = candidates.shape, len(jax.tree.leaves(context)[0])
    chosen = jnp.broadcast_to(jnp.arange(count), (b, count))
    if shortlist < count:
        start = jnp.broadcast_to(candidates[:1, :given], (b, given))
        logits = decoder.logits(params, start, prepared, context_mask)[:, -1]
        chosen = jax.lax.top_k(logits[:, candidates[:, given]], shortlist)[1]

    def score(chosen):
        tokens = candidates[chosen].reshape(-1, t)
        logits = decoder.logits(params, tokens, prepared, context_mask)
        counts = (tokens != decoder.pad_id) & (jnp.arange(t) >= given)[None]
        return -token_losses(logits, tokens, counts, smoothing).sum(axis=1).reshape(b, -1)

    size = chosen.shape[1]
    parts = -(-size // max(1, LOGITS_AT_ONCE // (b * t * decoder.vocab_size)))
    width = -(-size // parts)
    padded = jnp.pad(chosen, ((0, 0), (0, parts * width - size)))
    scores = jax.lax.map(score, padded.reshape(b, parts, width).swapaxes(0, 1))
    best, where = jax.lax.top_k(scores.swapaxes(0, 1).reshape(b, -1)[:, :size], min(top, size))
    return Ranked(jnp.take_along_axis(chosen, where, axis=1), best)


@lru_cache(maxsize=16)
def make_rank_fn(task: Task, given: int, top: int, shortlist: int, smoothing: float, mesh: Mesh | None
                 ) -> Callable[[Any, Mapping, Int[Array, "m t"]], dict]:
    """Return a compiled function from (parameters, batch as for `make_caption_fn`, candidates [m t]) to the fields of
    `Ranked`."""
    decoder = task.decoder

    def run(params, batch, candidates):
        context, mask = decoder.context(params, batch)
        return rank(decoder, params, context, candidates, mask, given=given, top=top, shortlist=shortlist,
                    smoothing=smoothing)._asdict()

    return compile_prediction(run, mesh)


def candidate_tokens(tokenizer: Tokenizer, choices: Sequence[str], decoder: Decoder, prompt: str = ""
                     ) -> tuple[Int[np.ndarray, "m t"], int]:
    """Return the tokens of all choices behind `prompt`, as long as the longest, and the number of tokens given.

    Raise `ConfigError` if there is nothing to choose from.
    """
    require(len(choices) > 0 and not isinstance(choices, str), "choices", choices, "a list of one text or more")
    start = prompt_tokens(tokenizer, prompt, decoder, room=2)  # for a choice and its end
    tokens = tokenizer.at_length(decoder.longest - start.shape[1] + 1)(choices)[:, 1:]
    tokens = tokens[:, :1 + np.flatnonzero((tokens != tokenizer.pad_id).any(axis=0)).max()]
    return np.concatenate([np.repeat(start, len(tokens), axis=0), tokens], axis=1), start.shape[1]


def choose_texts(
    task: Task, params: Any, batches: Iterable[Mapping], tokenizer: Tokenizer, choices: Sequence[str], *, prompt: str,
    top: int, shortlist: int, mesh: Mesh | None,
) -> list[list[tuple[str, float]]]:
    """Return the `top` likeliest (choice, log-probability) for each row of the batches (see `rank`), best first.

    Raise `ValueError` for numbers that are not positive, or choices that are none.
    """
    if top < 1 or shortlist < 1:
        raise ValueError(f"top is {top} and shortlist {shortlist}; expected positive numbers")
    candidates, given = candidate_tokens(tokenizer, choices, task.decoder, prompt)
    ranked = partial(make_rank_fn(task, given, top, shortlist, 0.0, mesh), candidates=candidates)
    padded = (pad_to_power_of_two(batch, mesh) for batch in batches)
    return [[(choices[i], float(score)) for i, score in zip(*row, strict=True)]
            for result, _ in outputs(ranked, params, padded, mesh)
            for row in zip(result["index"], result["score"], strict=True)]
