"""Shared by iGPT's tasks: the two objectives over pixels, the palette, and the capabilities of the model."""

from dataclasses import replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, UInt8

from jaxmm.models.igpt import IGPT, IGPTConfig, IGPTOutput, empty_cache
from jaxmm.nn.palette import Palette, fit_palette
from jaxmm.task import Batch, Decoder, Embedder, Params, Task
from jaxmm.validation import ConfigError, require

Kind = Literal["autoregressive", "bert"]
FITTED = 1000
"""Most images that a palette is fitted to."""


def fit(self: Any, images: Any) -> Any:
    """Return the task with a palette of the training images, unless it has one."""
    if self.palette is not None:
        return self
    return replace(self, palette=fit_palette(images(FITTED), self.model.colors))


def adopt(self: Any, trained: Task, image_size: int) -> Any:
    """Return this task with the architecture and the palette of `trained`; None if that is no iGPT."""
    if not isinstance(getattr(trained, "model", None), IGPTConfig):
        return None
    return replace(self, model=self.model.adopt(trained.model, image_size), palette=trained.palette)


def trained_path(self: Any, path: str, trained: Task) -> str | None:
    """Return the path in `trained` of the parameter at `path`; None for the head of classes."""
    return None if path.startswith("class_head/") else path


def check_images(model: IGPTConfig, image_size: int, palette: Palette | None) -> None:
    """Raise `ConfigError` if images or the palette do not fit the model."""
    require(image_size == model.image_size, "data.image.size", image_size,
            f"the model's task.model.image_size = {model.image_size}")
    count = model.colors if palette is None else len(palette.colors)
    require(count == model.colors, "task.palette", f"{count} colours", f"task.model.colors = {model.colors}")


def init_igpt(config: IGPTConfig, rng: Key[Array, ""]) -> Params:
    """Return new parameters."""
    return IGPT(config).init(rng, jnp.zeros((1, config.pixels), jnp.int32))["params"]


def to_tokens(palette: Palette | None, images: UInt8[Array, "b s s 3"]) -> Int[Array, "b n"]:
    """Return the tokens of images. Raise `ConfigError` if there is no palette."""
    if palette is None:
        raise ConfigError("task.palette is None; expected the colours of a checkpoint, or of a run's training images")
    return palette.to_tokens(images)


def run(
    config: IGPTConfig, params: Params, tokens: Int[Array, "b n"], kind: Kind,
    hidden: Array | None = None,
) -> IGPTOutput:
    """Run the model on images: behind the start token and without the last pixel, or as they are for BERT's objective.
    """
    if kind == "bert":
        return IGPT(config).apply({"params": params}, tokens, hidden, causal=False)
    start = jnp.full((len(tokens), 1), config.colors, tokens.dtype)
    return IGPT(config).apply({"params": params}, jnp.concatenate([start, tokens[:, :-1]], axis=1))


def pixel_loss(
    config: IGPTConfig, params: Params, tokens: Int[Array, "b n"], kind: Kind, hide: float,
    rng: Key[Array, ""],
) -> tuple[Float[Array, "b"], IGPTOutput]:
    """Return the loss of each image, in nats per pixel, and the model's output.

    It is the mean negative log-likelihood of the pixels given those before (section 2.2, L_AR), or of the hidden ones,
    each with probability `hide`, given the others (L_BERT).
    """
    import optax  # a tenth of a second of import that using a trained model does without

    hidden = None
    if kind == "bert":
        hidden = jax.random.bernoulli(rng, hide, tokens.shape)
    out = run(config, params, tokens, kind, hidden)
    losses = optax.softmax_cross_entropy_with_integer_labels(out.logits, tokens)
    if hidden is None:
        return losses.mean(axis=1), out
    return jnp.where(hidden, losses, 0.0).sum(axis=1) / jnp.maximum(hidden.sum(axis=1), 1).astype(losses.dtype), out


def igpt_embedder(config: IGPTConfig, palette: Palette | None, kind: Kind, layer: int | None) -> Embedder:
    """Return the embedder of images: features of `layer`, None: the one in the middle."""
    def layers(params: Params, batch: Batch) -> Float[Array, "b l d"]:
        return run(config, params, to_tokens(palette, batch["image"]), kind).layers

    def features(params: Params, batch: Batch) -> Float[Array, "b d"]:
        return layers(params, batch)[:, config.transformer.depth // 2 if layer is None else layer]

    return Embedder(image=features, features=features, layers=layers)


def igpt_decoder(config: IGPTConfig, palette: Palette | None, kind: Kind) -> Decoder | None:
    """Return the decoder of images; None if the model was not trained to write them."""
    if kind != "autoregressive":
        return None
    module = IGPT(config)

    def decode_step(params, tokens, position, cache, layers, cache_mask, context_mask):
        return module.apply({"params": params}, tokens, position, cache, layers, cache_mask, method=IGPT.decode_step)

    return Decoder(
        context=None,
        prepare=lambda params, context: module.apply({"params": params}, method=IGPT.separate_layers),
        cache=lambda rows, length: empty_cache(config, rows, length), decode_step=decode_step,
        logits=lambda params, tokens, prepared, context_mask: module.apply({"params": params}, tokens).logits,
        start_id=config.colors, end_id=None, pad_id=None, longest=config.pixels + 1, vocab_size=config.colors,
        to_tokens=lambda images: to_tokens(palette, images),
        to_images=lambda tokens: palette.to_images(tokens, config.image_size),
        grid=(config.image_size, config.image_size))
