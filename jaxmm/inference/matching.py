"""Which pictures and texts belong together: the compiled functions that see and match, and pairs cut for them.

A picture is encoded once for all of its texts, and the keys and values of its tokens are computed once for `TEXTS` of
them. Texts of like length go together, cut behind their last token.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from jaxmm.compiling import compile_prediction
from jaxmm.inference.batching import outputs, padded_batch_size
from jaxmm.models.blip import BLIP
from jaxmm.task import Task

TEXTS = 8
"""g, texts that look at a picture in one call, at most."""
PICTURES = 8
"""Pictures in one call, at most; over several devices, rounded up to a multiple of them."""
ROUNDED = 8
"""Tokens: texts are cut to multiples of it, so that there are few lengths and few compiled programs."""


@lru_cache(maxsize=4)
def seer(task: Task, mesh: Mesh | None) -> Callable[[Any, Mapping], dict]:
    """(parameters, batch of `image`) to `seen` [b n c], the pictures' tokens, and `image` [b e], compiled; of a batch
    with `tokens` also `text` [b e]."""
    model = BLIP(task.model)

    def see(params, batch):
        seen = model.apply({"params": params}, task.pixels(batch["image"]), train=False, method=BLIP.see)
        found = {"seen": seen}
        if task.model.embed_dim:
            found["image"] = model.apply({"params": params}, seen, method=BLIP.embed_image)
        return found | ({"text": task.predict["text"](params, batch)} if "tokens" in batch else {})

    return compile_prediction(see, mesh)


@lru_cache(maxsize=4)
def matcher(task: Task, mesh: Mesh | None) -> Callable[[Any, Mapping], dict]:
    """(parameters, batch of `seen` [b n c] and `tokens` [b g t]) to `match` [b g 2], the logits of "do not belong
    together" and "belong together", compiled."""
    model = BLIP(task.model)

    def match(params, batch):
        tokens = batch["tokens"]
        logits = model.apply({"params": params}, tokens.reshape(-1, tokens.shape[2]), batch["seen"], train=False,
                             method=BLIP.match)
        return {"match": logits.reshape(*tokens.shape[:2], 2)}

    return compile_prediction(match, mesh)


def pair_batches(
    seen: Float[np.ndarray, "n s c"], tokens: Int[np.ndarray, "m t"], picture: Int[np.ndarray, "p"],
    text: Int[np.ndarray, "p"], *, pad_id: int, size: int,
) -> Iterator[dict[str, np.ndarray]]:
    """Batches for `matcher` that hold every pair (`picture`, `text`) once; `size` pictures each.

    `pair` [b g] is the pair's number, -1 where a row has fewer than g texts; `mask` bool [b] is False for the rows that
    fill up a batch.
    """
    length = tokens.shape[1] - (tokens[:, ::-1] != pad_id).argmax(axis=1)
    width = np.minimum(-(-length // ROUNDED) * ROUNDED, tokens.shape[1])[text]
    order = np.lexsort((width, picture))
    place = np.arange(len(order)) - np.searchsorted(picture[order], picture[order])
    texts = min(TEXTS, power_of_two(int(place.max(initial=0)) + 1))
    first = place % texts == 0
    pair = np.full((first.sum(), texts), -1)
    pair[first.cumsum() - 1, place % texts] = order
    widest = width[pair].max(axis=1, where=pair >= 0, initial=0)
    for each in np.unique(widest):
        rows = pair[widest == each]
        for start in range(0, len(rows), size):
            batch = rows[np.minimum(np.arange(start, start + size), len(rows) - 1)]
            filled = np.where(batch < 0, batch[:, :1], batch)
            yield {"seen": seen[picture[batch[:, 0]]], "tokens": tokens[text[filled], :each], "pair": batch,
                   "mask": np.arange(start, start + size) < len(rows)}


def power_of_two(count: int) -> int:
    """The next one, from `count` on: batches of any length then meet a handful of compiled programs."""
    return 1 << (count - 1).bit_length()


def match_pairs(
    task: Task, params: Any, seen: Float[np.ndarray, "n s c"], tokens: Int[np.ndarray, "m t"],
    picture: Int[np.ndarray, "p"], text: Int[np.ndarray, "p"], mesh: Mesh | None,
) -> Float[np.ndarray, "p 2"]:
    """The logits of "do not belong together" and "belong together" of each pair (`picture`, `text`).

    `seen` are the tokens of pictures that `jaxmm.inference.matching.seer` makes.
    """
    found = np.zeros((len(picture), 2), np.float32)
    size = padded_batch_size(min(PICTURES, power_of_two(len(np.unique(picture)))), mesh)
    batches = pair_batches(seen, tokens, picture, text, pad_id=task.model.text.pad_id, size=size)
    for result, batch in outputs(matcher(task, mesh), params, batches, mesh):
        there = batch["pair"] >= 0
        found[batch["pair"][there]] = result["match"][there]
    return found
