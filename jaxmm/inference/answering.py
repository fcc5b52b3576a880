"""Which of given texts a decoder finds likeliest: answers to a question about a picture, or captions of it."""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from jaxmm.compiling import compile_prediction
from jaxmm.data.tokenizers import Tokenizer
from jaxmm.inference.captioning import ground, prompt_tokens
from jaxmm.inference.generate import Decoding
from jaxmm.losses.language_modeling import token_losses
from jaxmm.models.blip import BLIPConfig
from jaxmm.models.med import Med
from jaxmm.task import Task
from jaxmm.validation import require

ANSWERS = Decoding(beams=3, min_length=1, max_length=10)
"""As the authors write answers without a list to choose from."""
SHORTLIST = 128
"""Candidates that the authors score in full."""
AT_ONCE = 2**26
"""Logits that are in memory at a time, about."""


class Ranked(NamedTuple):
    """The likeliest candidates, the best first."""

    index: Int[Array, "b k"]
    score: Float[Array, "b k"]
    """Sums of the log-probabilities of a candidate's tokens and its end."""


def rank(
    config: BLIPConfig, params: Any, context: Float[Array, "b n c"], candidates: Int[Array, "m t"],
    context_mask: Bool[Array, "b n"] | None = None, *, given: int = 1, top: int = 1, shortlist: int = SHORTLIST,
    smoothing: float = 0.0,
) -> Ranked:
    """The `top` of the candidates for every context, by the summed log-probability of what is behind their first
    `given` tokens, which are the same in all. The first one stands for [DEC], whatever is there.

    Only the `shortlist` candidates whose first token of their own is likeliest are scored in full; where that is all of
    them, the ranking is exact (BLIP's code: 128 of 3,128). Among equals the first comes first. `smoothing` takes the
    smoothed loss in place of the plain one; with 0.1 the scores are those that the authors rank by.
    """
    text = config.text if config.answer is None else config.answer
    module, variables = Med(text), {"params": params["text" if config.answer is None else "answer"]}
    sights = module.apply(variables, context, method=Med.look)
    candidates = candidates.at[:, 0].set(text.decode_id)
    (count, t), b = candidates.shape, len(context)
    chosen = jnp.broadcast_to(jnp.arange(count), (b, count))
    if shortlist < count:
        begun = jnp.broadcast_to(candidates[:1, :given], (b, given))
        logits = module.apply(variables, begun, sights, context_mask, method=Med.follow)[:, -1]
        chosen = jax.lax.top_k(logits[:, candidates[:, given]], shortlist)[1]

    def score(chosen):
        tokens = candidates[chosen].reshape(-1, t)
        logits = module.apply(variables, tokens, sights, context_mask, method=Med.follow)
        counts = (tokens != text.pad_id) & (jnp.arange(t) >= given)
        return -token_losses(logits, tokens, counts, smoothing).sum(axis=1).reshape(b, -1)

    size = chosen.shape[1]
    parts = -(-size // max(1, AT_ONCE // (b * t * text.vocab_size)))
    width = -(-size // parts)
    padded = jnp.pad(chosen, ((0, 0), (0, parts * width - size)))
    scores = jax.lax.map(score, padded.reshape(b, parts, width).swapaxes(0, 1))
    best, where = jax.lax.top_k(scores.swapaxes(0, 1).reshape(b, -1)[:, :size], min(top, size))
    return Ranked(jnp.take_along_axis(chosen, where, axis=1), best)


@lru_cache(maxsize=16)
def ranker(task: Task, given: int, top: int, shortlist: int, smoothing: float, mesh: Mesh | None
           ) -> Callable[[Any, Mapping, Int[Array, "m t"]], dict]:
    """(parameters, batch of `image` and, of a model that answers, `tokens`; candidates [m t]) to `Ranked`'s fields,
    compiled."""

    def run(params, batch, candidates):
        context, there = ground(task, params, batch)
        return rank(task.model, params, context, candidates, there, given=given, top=top, shortlist=shortlist,
                    smoothing=smoothing)._asdict()

    return compile_prediction(run, mesh)


def candidate_tokens(tokenizer: Tokenizer, choices: Sequence[str], config: BLIPConfig, prompt: str = ""
                     ) -> tuple[Int[np.ndarray, "m t"], int]:
    """What `rank` takes: the tokens of all choices behind `prompt`, no longer than the longest; and how many are given.

    Raises `ConfigError` where there is nothing to choose from.
    """
    require(len(choices) > 0 and not isinstance(choices, str), "choices", choices, "a list of one text or more")
    text = config.text if config.answer is None else config.answer
    start = prompt_tokens(tokenizer, prompt, text.decode_id)
    room = text.positions - start.shape[1]
    require(room > 1, "prompt", prompt, f"at most {text.positions - 3} tokens, for a choice and its end")
    own = tokenizer.at_length(room + 1)(choices)[:, 1:]
    own = own[:, :1 + np.flatnonzero((own != tokenizer.pad_id).any(axis=0)).max()]
    return np.concatenate([np.repeat(start, len(own), axis=0), own], axis=1), start.shape[1]
