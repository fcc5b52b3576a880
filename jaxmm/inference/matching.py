"""Match images with texts: the compiled functions, and batches of pairs for them.

An image is encoded once for all of its texts, and the keys and values of its tokens are computed once for `TEXTS` of
them. Texts of similar length are batched together, cut behind their last token.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from jaxmm.compiling import compile_prediction
from jaxmm.inference.batching import outputs, pad_to_power_of_two, padded_batch_size, power_of_two
from jaxmm.task import Task

TEXTS = 8
"""g, most texts per image in one call."""
IMAGES = 8
"""Most images in one call; over several devices, rounded up to a multiple of them."""
ROUNDED = 8
"""Tokens: texts are cut to multiples of it, so that there are few lengths and few compiled programs."""


@lru_cache(maxsize=4)
def make_image_encoder(task: Task, mesh: Mesh | None) -> Callable[[Any, Mapping], dict]:
    """Return a compiled function from (parameters, batch of `image`) to `image_tokens` [b n c] and, if the model embeds
    images, `image` [b e]; if the batch has `tokens`, `text` [b e] too."""
    matcher, embedder = task.matcher, task.embedder

    def encode(params, batch):
        image_tokens = matcher.encode(params, batch)
        encoded = {"image_tokens": image_tokens}
        if matcher.embed is not None:
            encoded["image"] = matcher.embed(params, image_tokens)
        return encoded | ({"text": embedder.text(params, batch)} if "tokens" in batch else {})

    return compile_prediction(encode, mesh)


@lru_cache(maxsize=4)
def make_itm_fn(task: Task, mesh: Mesh | None) -> Callable[[Any, Mapping], dict]:
    """Return a compiled function from (parameters, batch of `image_tokens` [b n c] and `tokens` [b g t]) to `match`
    [b g 2], the logits of "do not belong together" and "belong together"."""
    logits = task.matcher.logits

    def match(params, batch):
        return {"match": logits(params, batch["image_tokens"], batch["tokens"])}

    return compile_prediction(match, mesh)


def pair_batches(
    image_tokens: Float[np.ndarray, "n s c"], tokens: Int[np.ndarray, "m t"], image: Int[np.ndarray, "p"],
    text: Int[np.ndarray, "p"], *, pad_id: int, size: int,
) -> Iterator[dict[str, np.ndarray]]:
    """Yield batches of `size` images for `make_itm_fn`, which cover every pair (`image`, `text`) once.

    `pair` [b g] is the number of the pair, -1 if a row has fewer than g texts. `mask` bool [b] is False for rows that
    pad the batch.
    """
    length = tokens.shape[1] - (tokens[:, ::-1] != pad_id).argmax(axis=1)
    width = np.minimum(-(-length // ROUNDED) * ROUNDED, tokens.shape[1])[text]
    order = np.lexsort((width, image))
    place = np.arange(len(order)) - np.searchsorted(image[order], image[order])
    texts = min(TEXTS, power_of_two(int(place.max(initial=0)) + 1))
    first = place % texts == 0
    pair = np.full((first.sum(), texts), -1)
    pair[first.cumsum() - 1, place % texts] = order
    widest = width[pair].max(axis=1, where=pair >= 0, initial=0)
    for length in np.unique(widest):
        rows = pair[widest == length]
        for start in range(0, len(rows), size):
            batch = rows[np.minimum(np.arange(start, start + size), len(rows) - 1)]
            filled = np.where(batch < 0, batch[:, :1], batch)
            yield {"image_tokens": image_tokens[image[batch[:, 0]]], "tokens": tokens[text[filled], :length],
                   "pair": batch,
                   "mask": np.arange(start, start + size) < len(rows)}


def match_pairs(
    task: Task, params: Any, image_tokens: Float[np.ndarray, "n s c"], tokens: Int[np.ndarray, "m t"],
    image: Int[np.ndarray, "p"], text: Int[np.ndarray, "p"], mesh: Mesh | None,
) -> Float[np.ndarray, "p 2"]:
    """Return the logits of "do not belong together" and "belong together" of each pair (`image`, `text`).

    `image_tokens` come from `make_image_encoder`.
    """
    logits = np.zeros((len(image), 2), np.float32)
    size = padded_batch_size(min(IMAGES, power_of_two(len(np.unique(image)))), mesh)
    batches = pair_batches(image_tokens, tokens, image, text, pad_id=task.matcher.pad_id, size=size)
    for result, batch in outputs(make_itm_fn(task, mesh), params, batches, mesh):
        valid = batch["pair"] >= 0
        logits[batch["pair"][valid]] = result["match"][valid]
    return logits


def match_probabilities(task: Task, params: Any, batches: Iterable[Mapping], tokens: Int[np.ndarray, "m t"],
                        mesh: Mesh | None) -> Float[np.ndarray, "n m"]:
    """Return the probability that image and text belong together, of every image in `batches` with every text."""
    from scipy.special import expit  # a third of a second that the other functions do without

    padded, parts = (pad_to_power_of_two(batch, mesh) for batch in batches), [np.zeros((0, len(tokens)), np.float32)]
    for result, _ in outputs(make_image_encoder(task, mesh), params, padded, mesh):
        shape = len(result["image_tokens"]), len(tokens)
        image, text = (index.ravel() for index in np.indices(shape))
        logits = match_pairs(task, params, result["image_tokens"], tokens, image, text, mesh)
        parts.append(expit(logits[:, 1] - logits[:, 0]).reshape(shape))
    return np.concatenate(parts)
