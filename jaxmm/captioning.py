"""From pictures to words: the compiled functions that write captions and that match."""

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxmm.data.tokenizers import Tokenizer
from jaxmm.generate import Decoding
from jaxmm.models.blip import BLIP, write_texts
from jaxmm.tasks.base import Task
from jaxmm.tasks.caption import prompt_ids
from jaxmm.training.step import compile_prediction

CAPTIONS = Decoding(beams=3, min_length=5, max_length=20)
"""As the authors write captions of COCO."""


@lru_cache(maxsize=16)
def writer(task: Task, decoding: Decoding, seed: int, mesh: Mesh | None) -> Callable[[Any, Mapping], dict]:
    """(parameters, batch of `image`, `prompt` [b p] and `row` [b]) to `tokens` [b k L] and `score` [b k], compiled.

    What is drawn for a picture depends on `seed` and its `row` only.
    """
    model = task.model

    def run(params, batch):
        seen = BLIP(model).apply({"params": params}, task.pixels(batch["image"]), train=False, method=BLIP.see)
        lengths = (batch["prompt"] != model.text.pad_id).sum(axis=1)
        keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.key(seed), row))(batch["row"])
        return write_texts(model, params, seen, batch["prompt"], lengths, keys, decoding)._asdict()

    return compile_prediction(run, mesh)


@lru_cache(maxsize=4)
def matcher(task: Task, mesh: Mesh | None) -> Callable[[Any, np.ndarray, np.ndarray], np.ndarray]:
    """(parameters, pictures [b h w 3], texts [c t]) to the probabilities [b c] that they belong together."""
    model = BLIP(task.model)

    @jax.jit
    def see(params, image):
        return model.apply({"params": params}, task.pixels(image), train=False, method=BLIP.see)

    @jax.jit
    def match(params, seen, tokens):
        tokens = jnp.broadcast_to(tokens, (len(seen), *tokens.shape))
        return jax.nn.softmax(model.apply({"params": params}, tokens, seen, train=False, method=BLIP.match))[:, 1]

    def run(params, image, tokens):
        where = None if mesh is None else NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
        seen = see(params, jax.device_put(image, where))
        return np.stack([np.asarray(match(params, seen, row)) for row in tokens], axis=1)

    return run


def prompt_tokens(tokenizer: Tokenizer, prompt: str, decode_id: int) -> np.ndarray:
    """[1 p]: the token that begins what is written, and those of `prompt`."""
    return np.asarray([[decode_id, *prompt_ids(tokenizer, prompt)]], np.int32)
