"""Shared by BLIP's tasks: a mixin, the vocabulary of a run's tokenizer, and the capabilities of the model."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxmm.data.tokenizers import Tokenizer
from jaxmm.models.blip import BLIP, BLIPConfig
from jaxmm.models.med import Med
from jaxmm.models.med_config import MedConfig
from jaxmm.nn.pixels import Pixels
from jaxmm.nn.transformer import empty_cache
from jaxmm.task import Batch, Decoder, Embedder, Matcher, Params, Task, check_pairs
from jaxmm.validation import require


def check_tokenizer(text: MedConfig, tokenizer: Tokenizer, prompt: tuple[int, ...] = ()) -> None:
    """Raise `ConfigError` if texts do not begin with a token, or do not fit behind the tokens of a `prompt`."""
    require(tokenizer.bos_id is not None, "data.tokenizer.kind", tokenizer, "one that begins texts with a token")
    less = f", less the prompt's {len(prompt)}" if prompt else ""
    require(tokenizer.context_length + len(prompt) <= text.positions, "data.tokenizer.context_length",
            tokenizer.context_length, f"at most task.model.text.positions = {text.positions}{less}")


def with_vocabulary(text: MedConfig, tokenizer: Tokenizer, name: str = "task.model.text") -> MedConfig:
    """Return the text transformer for a tokenizer, with two more tokens: [DEC] and [ENC].

    Raise `ConfigError` if the recipe's vocabulary has no room for them.
    """
    size, ends = tokenizer.vocab_size, {"end_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id}
    if text.vocab_size is None:
        return replace(text, vocab_size=size + 2, decode_id=size, encode_id=size + 1, **ends)
    first = min(text.decode_id, text.encode_id)
    require(size <= first and max(text.decode_id, text.encode_id) < text.vocab_size, f"{name}.vocab_size",
            text.vocab_size, f"None: the tokenizer has {size} tokens, and those that begin texts are "
            f"{text.decode_id} and {text.encode_id}")
    return replace(text, **ends)


def blip_features(config: BLIPConfig, pixels: Pixels) -> Embedder:
    """Return an embedder of images alone: the first image token, fp32; of pairs, those of both side by side."""
    def features(params: Params, batch: Batch) -> Float[Array, "b d"]:
        image = pixels(batch["image"])
        image_tokens = BLIP(config).apply({"params": params}, image.reshape(-1, *image.shape[-3:]), train=False,
                                          method=BLIP.encode_image)
        return image_tokens[:, 0].reshape(len(image), -1).astype(jnp.float32)

    return Embedder(image=features, features=features)


def blip_embedder(config: BLIPConfig, pixels: Pixels) -> Embedder:
    """Return the embedder of images and texts."""
    module = BLIP(config)

    def image(params: Params, batch: Batch) -> Float[Array, "b e"]:
        return module.apply({"params": params}, pixels(batch["image"]), train=False, method=BLIP.embed_image)

    def text(params: Params, batch: Batch) -> Float[Array, "b e"]:
        return module.apply({"params": params}, batch["tokens"], train=False, method=BLIP.embed_text)

    return Embedder(image=image, text=text, features=blip_features(config, pixels).features)


def blip_matcher(config: BLIPConfig, pixels: Pixels) -> Matcher | None:
    """Return the matching head; None if the model has none."""
    if not config.matching:
        return None
    module = BLIP(config)

    def encode(params: Params, batch: Batch) -> Float[Array, "b n c"]:
        return module.apply({"params": params}, pixels(batch["image"]), train=False, method=BLIP.encode_image)

    def embed(params: Params, image_tokens: Float[Array, "b n c"]) -> Float[Array, "b e"]:
        return module.apply({"params": params}, image_tokens, method=BLIP.project_image)

    def logits(params: Params, image_tokens: Float[Array, "b n c"], tokens: Array) -> Float[Array, "b g 2"]:
        flat = module.apply({"params": params}, tokens.reshape(-1, tokens.shape[2]), image_tokens, train=False,
                            method=BLIP.match)
        return flat.reshape(*tokens.shape[:2], 2)

    return Matcher(encode=encode, embed=embed if config.embed_dim else None, logits=logits, pad_id=config.text.pad_id)


def blip_decoder(config: BLIPConfig, pixels: Pixels, prompt: str = "") -> Decoder | None:
    """Return the decoder of captions, or of answers if the model reads questions; None if the model writes nothing."""
    text, name = config.decoder, config.decoder_name
    if text is None:
        return None
    module, med = BLIP(config), Med(text)

    def run(params: Params, method: Callable, *args: Any) -> Any:
        return med.apply({"params": params[name]}, *args, method=method)

    def encode(params: Params, batch: Batch) -> Float[Array, "b n c"]:
        return module.apply({"params": params}, pixels(batch["image"]), train=False, method=BLIP.encode_image)

    def read(params: Params, batch: Batch) -> tuple[Array, Array]:
        mask = batch["tokens"] != config.text.pad_id
        return module.apply({"params": params}, batch["tokens"], encode(params, batch), train=False, mask=mask,
                            method=BLIP.encode_text_with_image), mask

    def decode_step(params, tokens, position, cache, prepared, cache_mask, context_mask=None):
        return run(params, Med.decode_step, tokens, position, cache, prepared, cache_mask, context_mask)

    def attention(params: Params, batch: Batch, tokens: Array) -> Float[Array, "b t g g"]:
        image_tokens = encode(params, batch)
        weights = med.apply({"params": params[name]}, tokens.at[:, 0].set(text.decode_id), image_tokens, causal=True,
                            method=Med.cross_attention_weights)
        rows, columns = config.vision.grid
        # A token is written where the one before it is read.
        weights = weights.mean(axis=(0, 2))[:, :-1, -rows * columns:]
        return jnp.pad(weights, ((0, 0), (1, 0), (0, 0))).reshape(*tokens.shape, rows, columns)

    return Decoder(
        context=read if config.reads_questions else lambda params, batch: (encode(params, batch), None),
        prepare=lambda params, context: run(params, Med.cross_attention_cache, context),
        cache=lambda rows, length: empty_cache(text.transformer, rows, length),
        decode_step=decode_step,
        logits=lambda params, tokens, prepared, context_mask=None: run(params, Med.decode_cached, tokens, prepared,
                                                                       context_mask),
        attention=None if config.reads_questions else attention,
        start_id=text.decode_id, end_id=text.end_id, pad_id=text.pad_id, longest=text.positions,
        vocab_size=text.vocab_size, prompt=prompt, reads_text=config.reads_questions)


class BLIPTask:
    """Methods of a task that is a dataclass with `model`, the configuration of a BLIP, and `pixels`."""

    def bind(self, *, image_size: int, classes: int | None, tokenizer: Tokenizer | None) -> Task:
        """Set the vocabulary size to the tokenizer's plus [DEC] and [ENC], if the recipe has none."""
        check_pairs(image_size, self.model.vision, tokenizer)
        check_tokenizer(self.model.text, tokenizer)
        return replace(self, model=replace(self.model, text=with_vocabulary(self.model.text, tokenizer)))

    def init(self, rng: Key[Array, ""]) -> Params:
        """Return new parameters."""
        size, images = self.model.vision.image_size, (2,) if self.model.pair else ()
        image, tokens = jnp.zeros((1, *images, size, size, 3)), jnp.ones((1, 2), jnp.int32)
        return self.module.init(rng, image, tokens, train=False)["params"]

    @property
    def module(self) -> BLIP:
        """The Flax module."""
        return BLIP(self.model)

    @property
    def text_config(self) -> MedConfig:
        """Configuration of the text transformer."""
        return self.model.text

    @property
    def embedder(self) -> Embedder:
        """Features of images: the first token of an image, or of both of a pair [b 2d]."""
        return blip_features(self.model, self.pixels)

    @property
    def matcher(self) -> Matcher | None:
        """The matching head, if the model has one."""
        return blip_matcher(self.model, self.pixels)
