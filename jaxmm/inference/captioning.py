"""Compiled functions that write captions and answers, and the attention maps of what was written."""

from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxmm.compiling import compile_prediction
from jaxmm.data.tokenizers import Tokenizer
from jaxmm.inference.batching import outputs, pad_to_power_of_two
from jaxmm.inference.generate import Decoding, generate
from jaxmm.task import Decoder, Task
from jaxmm.tasks.image_captioning import prompt_ids
from jaxmm.validation import require

CAPTIONS = Decoding(beams=3, min_length=5, max_length=20)
"""Settings of BLIP's authors for captions of COCO."""
SAMPLES = 2**24
"""Distance between the random numbers of the first sample of an image and its second one."""


@lru_cache(maxsize=16)
def make_caption_fn(task: Task, decoding: Decoding, seed: int, mesh: Mesh | None) -> Callable[[Any, Mapping], dict]:
    """Return a compiled function from (parameters, batch) to `tokens` [r k L] and `score` [r k].

    The batch has `prompt` [r p], `row` [r], and what the decoder's context is made of: `image` [b ...], and `tokens`
    (questions) if the decoder reads text. r is b, or a multiple of it for several texts per image. What is sampled for
    a row depends on `seed` and the number in `row` only. A text whose score is NaN, because the model's logits were, is
    empty. Raise `ConfigError` if the model has fewer positions than `decoding.max_length`.
    """
    decoder = task.decoder
    check_length(decoding, decoder)

    def run(params, context, batch):
        context, mask = context
        prompt = batch["prompt"]
        lengths = (jnp.full(len(prompt), prompt.shape[1]) if decoder.pad_id is None
                   else (prompt != decoder.pad_id).sum(axis=1))
        keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.key(seed), row))(batch["row"])
        tokens, score = generate(decoder, params, context, prompt, lengths, keys, decoding, mask)
        return {"tokens": jnp.where(jnp.isnan(score)[..., None], decoder.pad_id or 0, tokens), "score": score}

    compiled = compile_prediction(run, mesh, small_matmuls=True)
    encode = decoder.context and compile_prediction(decoder.context, mesh, replicate_outputs=False)

    def caption(params, batch):
        context = (None, None) if encode is None else encode(params, batch)
        return compiled(params, context, {name: batch[name] for name in ("prompt", "row")})

    return caption


@lru_cache(maxsize=4)
def make_attention_map_fn(task: Task, mesh: Mesh | None) -> Callable[[Any, Mapping], dict]:
    """Return a compiled function from (parameters, batch of `image` and `tokens` [b t]) to `attention` [b t g g]."""
    attention = task.decoder.attention

    def run(params, batch):
        return {"attention": attention(params, batch, batch["tokens"])}

    return compile_prediction(run, mesh)


def word_attention_maps(tokenizer: Tokenizer, tokens: np.ndarray, attention: np.ndarray
                        ) -> list[tuple[str, np.ndarray]]:
    """Return the words that `tokens` [t] spell, each with the mean attention map [g g] of its tokens."""
    words, maps = [], []
    for i in range(1, len(tokens) + 1):
        spelled = tokenizer.decode(tokens[:i]).split()
        if len(spelled) > len(words):
            maps.append([])
        words = spelled
        if maps and tokens[i - 1] not in (tokenizer.eos_id, tokenizer.pad_id):
            maps[-1].append(attention[i - 1])
    return [(word, np.mean(parts, axis=0)) for word, parts in zip(words, maps, strict=True)]


def check_length(decoding: Decoding, decoder: Decoder) -> None:
    """Raise `ConfigError` if `decoding` asks for more tokens than the model has positions for."""
    require(decoding.max_length <= decoder.longest, "decoding.max_length", decoding.max_length,
            f"at most {decoder.longest}, the positions of the model")


def prompt_tokens(tokenizer: Tokenizer, prompt: str, decoder: Decoder, room: int = 1) -> np.ndarray:
    """Return [1 p]: the decoder's start token, then the tokens of `prompt`.

    Raise `ConfigError` if fewer than `room` tokens fit behind it.
    """
    tokens = [decoder.start_id, *prompt_ids(tokenizer, prompt)]
    require(len(tokens) + room <= decoder.longest, "prompt", prompt,
            f"at most {decoder.longest - 1 - room} tokens, not {len(tokens) - 1}: the model has {decoder.longest} "
            "positions")
    return np.asarray([tokens], np.int32)


def write_texts(
    task: Task, params: Any, batches: Iterable[Mapping], tokenizer: Tokenizer, *, prompt: str, decoding: Decoding,
    top: int, seed: int, mesh: Mesh | None,
) -> list[list[tuple[str, float]]]:
    """Return the `top` best (text without `prompt`, score) for each row of the batches, best first.

    With sampling these are `top` samples. Raise `ValueError` if there are fewer beams, or no room for a text behind the
    prompt.
    """
    samples = top if decoding.sample else 1
    if not 0 < top <= max(samples, decoding.beams):
        raise ValueError(f"top is {top}; expected 1 to decoding.beams = {decoding.beams}, or decoding.sample")
    start = prompt_tokens(tokenizer, prompt, task.decoder)
    given = start.shape[1]
    if given >= decoding.max_length:
        raise ValueError(f"the prompt has {given} tokens; decoding.max_length = {decoding.max_length} leaves no room "
                         "behind it")
    write = make_caption_fn(task, decoding, seed, mesh)

    def padded():
        row = 0
        for batch in batches:
            count = len(batch["image"])
            rows = np.arange(row, row + count, dtype=np.int32)[:, None] + SAMPLES * np.arange(samples, dtype=np.int32)
            yield pad_to_power_of_two(batch | {"prompt": np.tile(start, (count, samples, 1)), "row": rows}, mesh)
            row += count

    def write_samples(params, batch):
        flat = {name: batch[name].reshape(-1, *batch[name].shape[2:]) for name in ("prompt", "row")}
        return {name: value.reshape(-1, samples * value.shape[1], *value.shape[2:])
                for name, value in write(params, batch | flat).items()}

    def texts(tokens, scores):
        best = np.argsort(-scores, kind="stable")[:top]
        return [(tokenizer.decode(tokens[i][given:]), float(scores[i])) for i in best]

    return [texts(tokens, scores) for result, _ in outputs(write_samples, params, padded(), mesh)
            for tokens, scores in zip(result["tokens"], result["score"], strict=True)]
