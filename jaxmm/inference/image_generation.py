"""Generate and complete images with a decoder that writes them, token by token."""

from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Int, UInt8

from jaxmm.compiling import compile_prediction
from jaxmm.inference.batching import outputs, pad_to_power_of_two
from jaxmm.inference.generate import Decoding, generate
from jaxmm.task import Decoder, Task

AT_ONCE = 16
"""Most images that are generated at once: the cache of a long image takes memory."""
Keep = str | float
"""The part of an image that a completion keeps: `top`, `left`, or the share of the tokens that come first."""


def kept_tokens(decoder: Decoder, keep: Keep) -> Bool[np.ndarray, " t"]:
    """Return which tokens behind the first one `keep` keeps. Raise `ValueError` for what is none of `Keep`."""
    rows, columns = decoder.grid
    if keep in ("top", "left"):
        row, column = np.divmod(np.arange(rows * columns), columns)
        return row < rows // 2 if keep == "top" else column < columns // 2
    try:
        share = float(keep)
    except ValueError:
        share = float("nan")
    if not 0 <= share < 1:
        raise ValueError(f"keep is {keep!r}; expected top, left, or a share of the image such as 0.5")
    return np.arange(rows * columns) < round(share * rows * columns)


@lru_cache(maxsize=16)
def make_image_fn(task: Task, decoding: Decoding, seed: int, mesh: Mesh | None) -> Callable[[Any, Mapping], dict]:
    """Return a compiled function from (parameters, batch) to `image` uint8 [r s s 3].

    The batch has `tokens` [r t] behind the first one, `kept` [r t], True for those that stay, and `row` [r]: what is
    sampled for a row depends on `seed` and that number only.
    """
    decoder = task.decoder

    def run(params, batch):
        tokens, kept = (jnp.pad(batch[name], ((0, 0), (1, 0))) for name in ("tokens", "kept"))
        keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.key(seed), row))(batch["row"])
        written = generate(decoder, params, None, tokens, jnp.ones(len(tokens), jnp.int32), keys, decoding, kept=kept)
        return {"image": decoder.to_images(written.tokens[:, 0, 1:])}

    return compile_prediction(run, mesh, small_matmuls=True)


@lru_cache(maxsize=16)
def make_token_fn(task: Task) -> Callable[[UInt8[Any, "b s s 3"]], Int[Any, "b t"]]:
    """Return the compiled function from images to their tokens."""
    return jax.jit(task.decoder.to_tokens)


def image_decoding(decoder: Decoder, *, temperature: float, top_k: int, top_p: float) -> Decoding:
    """Return settings that sample whole images. Raise `ConfigError` for values out of range."""
    return Decoding(sample=True, temperature=temperature, top_k=top_k, top_p=top_p, max_length=decoder.longest)


def write_images(
    task: Task, params: Any, tokens: Int[np.ndarray, "r t"], kept: Bool[np.ndarray, " t"], decoding: Decoding, *,
    seed: int, mesh: Mesh | None,
) -> UInt8[np.ndarray, "r s s 3"]:
    """Return the images of `tokens` whose tokens outside `kept` are written by the decoder."""
    def batches() -> Iterable[Mapping]:
        for start in range(0, len(tokens), AT_ONCE):
            rows = np.arange(start, min(start + AT_ONCE, len(tokens)), dtype=np.int32)
            yield pad_to_power_of_two({"tokens": tokens[rows], "row": rows, "kept": np.tile(kept, (len(rows), 1))},
                                      mesh)

    fn = make_image_fn(task, decoding, seed, mesh)
    return np.concatenate([result["image"] for result, _ in outputs(fn, params, batches(), mesh)])


def generate_images(
    task: Task, params: Any, count: int, decoding: Decoding, *, seed: int, mesh: Mesh | None
) -> UInt8[np.ndarray, "n s s 3"]:
    """Return `count` sampled images. Raise `ValueError` if that is none."""
    if count < 1:
        raise ValueError(f"count is {count}; expected a positive number")
    length = task.decoder.longest - 1
    return write_images(task, params, np.zeros((count, length), np.int32), np.zeros(length, bool), decoding, seed=seed,
                        mesh=mesh)


def complete_images(
    task: Task, params: Any, images: UInt8[np.ndarray, "b s s 3"], keep: Keep, samples: int, decoding: Decoding, *,
    seed: int, mesh: Mesh | None,
) -> UInt8[np.ndarray, "b n s s 3"]:
    """Return `samples` completions of what `keep` keeps of each image. Raise `ValueError` if there are none."""
    if samples < 1:
        raise ValueError(f"samples is {samples}; expected a positive number")
    kept = kept_tokens(task.decoder, keep)
    tokens = np.repeat(np.asarray(make_token_fn(task)(images)), samples, axis=0)
    written = write_images(task, params, tokens, kept, decoding, seed=seed, mesh=mesh)
    return written.reshape(len(images), samples, *written.shape[1:])


def without_rest(decoder: Decoder, images: UInt8[np.ndarray, "*b s s 3"], keep: Keep
                 ) -> UInt8[np.ndarray, "*b s s 3"]:
    """Return images whose part outside `keep` is grey."""
    rows, columns = decoder.grid
    kept = kept_tokens(decoder, keep).reshape(rows, columns)
    kept = kept.repeat(images.shape[-3] // rows, axis=0).repeat(images.shape[-2] // columns, axis=1)
    return np.where(kept[..., None], images, np.uint8(128))
