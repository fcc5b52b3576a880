"""What BLIP's tasks share: fresh parameters, the words of a run's tokenizer, a picture's features."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxmm.config import require
from jaxmm.data.tokenizers import Tokenizer
from jaxmm.models.blip import BLIP, BLIPConfig
from jaxmm.models.med import MedConfig
from jaxmm.nn.pixels import Pixels
from jaxmm.task import Params


def init_blip(model: BLIPConfig, rng: Key[Array, ""]) -> Params:
    """Fresh parameters."""
    size, pictures = model.vision.image_size, (2,) if model.pair else ()
    image, tokens = jnp.zeros((1, *pictures, size, size, 3)), jnp.ones((1, 2), jnp.int32)
    return BLIP(model).init(rng, image, tokens, train=False)["params"]


def check_words(text: MedConfig, tokenizer: Tokenizer, prompt: tuple[int, ...] = ()) -> None:
    """Raises `ConfigError` where texts do not begin with a token, or do not fit behind the tokens of a `prompt`."""
    require(tokenizer.bos_id is not None, "data.tokenizer.kind", tokenizer, "one that begins texts with a token")
    less = f", less the prompt's {len(prompt)}" if prompt else ""
    require(tokenizer.context_length + len(prompt) <= text.positions, "data.tokenizer.context_length",
            tokenizer.context_length, f"at most task.model.text.positions = {text.positions}{less}")


def with_vocabulary(text: MedConfig, tokenizer: Tokenizer, name: str = "task.model.text") -> MedConfig:
    """The text transformer for a tokenizer: two tokens that it does not have begin what is written, and what is
    matched. Raises `ConfigError` where the recipe's vocabulary has no room for them."""
    size, ends = tokenizer.vocab_size, {"end_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id}
    if text.vocab_size is None:
        return replace(text, vocab_size=size + 2, decode_id=size, encode_id=size + 1, **ends)
    first = min(text.decode_id, text.encode_id)
    require(size <= first and max(text.decode_id, text.encode_id) < text.vocab_size, f"{name}.vocab_size",
            text.vocab_size, f"None: the tokenizer has {size} tokens, and those that begin texts are "
            f"{text.decode_id} and {text.encode_id}")
    return replace(text, **ends)


def picture_features(model: BLIPConfig, pixels: Pixels) -> Callable[[Params, Mapping[str, Any]], Float[Array, "b d"]]:
    """The first token of a batch's pictures, fp32; of pairs, those of both."""
    def features(params, batch):
        image = pixels(batch["image"])
        seen = BLIP(model).apply({"params": params}, image.reshape(-1, *image.shape[-3:]), train=False,
                                 method=BLIP.see)
        return seen[:, 0].reshape(len(image), -1).astype(jnp.float32)

    return features
