"""From pictures to words: the compiled functions that write captions (and answers), and where each word looked."""

from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key

from jaxmm.compiling import compile_prediction
from jaxmm.data.tokenizers import Tokenizer
from jaxmm.inference.generate import Decoding, Written, write
from jaxmm.models.blip import BLIP, BLIPConfig
from jaxmm.models.med import Med, empty_cache
from jaxmm.task import Task
from jaxmm.tasks.image_captioning import prompt_ids

CAPTIONS = Decoding(beams=3, min_length=5, max_length=20)
"""As the authors write captions of COCO."""


def ground(task: Task, params: Any, batch: Mapping) -> tuple[Float[Array, "b n c"], Bool[Array, "b n"] | None]:
    """What is written in view of, and which of it is there: pictures, or questions that were read with them."""
    model, variables = BLIP(task.model), {"params": params}
    seen = model.apply(variables, task.pixels(batch["image"]), train=False, method=BLIP.see)
    if task.model.answer is None:
        return seen, None
    there = batch["tokens"] != task.model.text.pad_id
    return model.apply(variables, batch["tokens"], seen, train=False, mask=there, method=BLIP.read), there


@lru_cache(maxsize=16)
def writer(task: Task, decoding: Decoding, seed: int, mesh: Mesh | None) -> Callable[[Any, Mapping], dict]:
    """(parameters, batch of `image` [b ...], `prompt` [r p] and `row` [r]) to `tokens` [r k L] and `score` [r k],
    compiled; r is b, or a multiple of it: as many texts of each picture.

    Of a model that answers, the batch has `tokens` besides: the questions.
    What is drawn for a picture depends on `seed` and its `row` only.
    """
    model = task.model

    def write(params, grounds, batch):
        context, there = grounds
        lengths = (batch["prompt"] != model.text.pad_id).sum(axis=1)
        keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.key(seed), row))(batch["row"])
        return write_texts(model, params, context, batch["prompt"], lengths, keys, decoding, there)._asdict()

    grounded = compile_prediction(partial(ground, task), mesh, whole=False)
    written = compile_prediction(write, mesh, few=True)

    def run(params, batch):
        return written(params, grounded(params, batch), {name: batch[name] for name in ("prompt", "row")})

    return run


@lru_cache(maxsize=4)
def looker(task: Task, mesh: Mesh | None) -> Callable[[Any, Mapping], dict]:
    """(parameters, batch of `image` and of `tokens` [b t], as written) to `look` [b t g g], compiled.

    Where in the picture's grid of patches the decoder looked when it wrote each token: its cross-attention, the mean
    over layers and heads. Of the first token, which was given, zeros.
    """
    model = task.model

    def run(params, batch):
        seen, _ = ground(task, params, batch)
        tokens = batch["tokens"].at[:, 0].set(model.text.decode_id)
        weights = Med(model.text).apply({"params": params["text"]}, tokens, seen, causal=True,
                                        method=Med.cross_attention)
        side = model.vision.image_size // model.vision.patch
        told = weights.mean(axis=(0, 2))[:, :-1, -side * side:]  # a token is written where the one before it is read
        return {"look": jnp.pad(told, ((0, 0), (1, 0), (0, 0))).reshape(*tokens.shape, side, side)}

    return compile_prediction(run, mesh)


def words_looked(tokenizer: Tokenizer, tokens: np.ndarray, look: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """The words that `tokens` [t] spell, and where each looked [g g]: the mean of `look` [t g g] over its tokens."""
    words, maps = [], []
    for i in range(1, len(tokens) + 1):
        told = tokenizer.decode(tokens[:i]).split()
        if len(told) > len(words):
            maps.append([])
        words = told
        if maps and tokens[i - 1] not in (tokenizer.eos_id, tokenizer.pad_id):
            maps[-1].append(look[i - 1])
    return [(word, np.mean(each, axis=0)) for word, each in zip(words, maps, strict=True)]


def prompt_tokens(tokenizer: Tokenizer, prompt: str, decode_id: int) -> np.ndarray:
    """[1 p]: the token that begins what is written, and those of `prompt`."""
    return np.asarray([[decode_id, *prompt_ids(tokenizer, prompt)]], np.int32)


def write_texts(
    config: BLIPConfig, params: Any, context: Float[Array, "b n c"], prompt: Int[Array, "r p"],
    lengths: Int[Array, "r"], keys: Key[Array, "r"], decoding: Decoding,
    context_mask: Bool[Array, "b n"] | None = None,
) -> Written:
    """Texts in view of pictures (or of what was made of questions), each going on from its prompt.

    A prompt begins with [DEC], whatever token stands there. There may be several prompts for each picture: its first,
    its second and so on, then those of the next. The context's keys and values are computed once, and all texts and
    beams of a picture look at the same ones.
    """
    text = config.text if config.answer is None else config.answer
    module, variables = Med(text), {"params": params["text" if config.answer is None else "answer"]}
    sights = module.apply(variables, context, method=Med.look)

    def step(tokens, at, cache, held):
        return module.apply(variables, tokens, at, cache, sights, held, context_mask, method=Med.step)

    rows = len(prompt) * decoding.beams
    return write(step, empty_cache(text, rows, decoding.max_length), prompt.at[:, 0].set(text.decode_id), lengths, keys,
                 decoding, end_id=text.end_id, pad_id=text.pad_id)
