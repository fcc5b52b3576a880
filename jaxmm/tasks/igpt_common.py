"""A mixin of iGPT's tasks: the two objectives over pixels, the palette, and the capabilities of the model."""

from dataclasses import replace
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, UInt8

from jaxmm.models.igpt import IGPT, IGPTConfig, IGPTOutput
from jaxmm.nn.palette import fit_palette
from jaxmm.nn.transformer import empty_cache
from jaxmm.task import Batch, Decoder, Embedder, Params, Task, check_image_size
from jaxmm.validation import ConfigError, Limit, require

Kind = Literal["autoregressive", "bert"]
HIDE = Limit("above 0, below 1", lambda value: 0 < value < 1)
FITTED = 1000
"""Most images that a palette is fitted to."""


class IGPTTask:
    """Methods of a task that is a dataclass with `model`, the configuration of an iGPT, `kind`, `hide` and `palette`.
    """

    feature_layer: ClassVar[int | None] = None
    """Layer whose features embed an image, counted from 0; None: the one in the middle."""

    def fit(self, images: Any) -> Task:
        """Return the task with a palette of the training images, unless it has one."""
        if self.palette is not None:
            return self
        return replace(self, palette=fit_palette(images(FITTED), self.model.colors))

    def adopt(self, trained: Task, image_size: int) -> Task | None:
        """Return this task with the architecture and the palette of `trained`; None if that is no iGPT."""
        if not isinstance(getattr(trained, "model", None), IGPTConfig):
            return None
        return replace(self, model=self.model.adopt(trained.model, image_size), palette=trained.palette)

    def trained_path(self, path: str, trained: Task) -> str | None:
        """Return the path in `trained` of the parameter at `path`; None for the head of classes."""
        return None if path.startswith("class_head/") else path

    def bind(self, *, image_size: int, classes: int | None, tokenizer: Any | None) -> Task:
        """Check that the images and the palette fit the model."""
        check_image_size(image_size, self.model)
        count = self.model.colors if self.palette is None else len(self.palette.colors)
        require(count == self.model.colors, "task.palette", f"{count} colours",
                f"task.model.colors = {self.model.colors}")
        return self

    def init(self, rng: Key[Array, ""]) -> Params:
        """Return new parameters."""
        return self.module.init(rng, jnp.zeros((1, self.model.pixels), jnp.int32))["params"]

    def tokens(self, images: UInt8[Array, "b s s 3"]) -> Int[Array, "b n"]:
        """Return the tokens of images. Raise `ConfigError` if there is no palette."""
        if self.palette is None:
            raise ConfigError("task.palette is None; expected the colours of a checkpoint, or of a run's training "
                              "images")
        return self.palette.to_tokens(images)

    def run(self, params: Params, tokens: Int[Array, "b n"], hidden: Array | None = None) -> IGPTOutput:
        """Run the model on images: behind the start token and without the last pixel, or as they are for BERT's
        objective."""
        if self.kind == "bert":
            return self.module.apply({"params": params}, tokens, hidden, causal=False)
        start = jnp.full((len(tokens), 1), self.model.colors, tokens.dtype)
        return self.module.apply({"params": params}, jnp.concatenate([start, tokens[:, :-1]], axis=1))

    def pixel_loss(self, params: Params, batch: Batch, rng: Key[Array, ""]) -> tuple[Float[Array, "b"], IGPTOutput]:
        """Return the loss of each image, in nats per pixel, and the model's output.

        It is the mean negative log-likelihood of the pixels given those before (section 2.2, L_AR), or of the hidden
        ones, each with probability `hide`, given the others (L_BERT).
        """
        import optax  # a tenth of a second of import that using a trained model does without

        tokens, hidden = self.tokens(batch["image"]), None
        if self.kind == "bert":
            hidden = jax.random.bernoulli(rng, self.hide, tokens.shape)
        out = self.run(params, tokens, hidden)
        losses = optax.softmax_cross_entropy_with_integer_labels(out.logits, tokens)
        if hidden is None:
            return losses.mean(axis=1), out
        count = jnp.maximum(hidden.sum(axis=1), 1).astype(losses.dtype)
        return jnp.where(hidden, losses, 0.0).sum(axis=1) / count, out

    @property
    def module(self) -> IGPT:
        """The Flax module."""
        return IGPT(self.model)

    @property
    def image_size(self) -> int:
        """Side in pixels of the images that the model reads."""
        return self.model.image_size

    @property
    def embedder(self) -> Embedder:
        """Features of images, of every layer too."""
        layer = self.model.transformer.depth // 2 if self.feature_layer is None else self.feature_layer

        def layers(params: Params, batch: Batch) -> Float[Array, "b l d"]:
            return self.run(params, self.tokens(batch["image"])).layers

        def features(params: Params, batch: Batch) -> Float[Array, "b d"]:
            return layers(params, batch)[:, layer]

        return Embedder(image=features, features=features, layers=layers)

    @property
    def decoder(self) -> Decoder | None:
        """The decoder of images; None if the model was not trained to write them."""
        if self.kind != "autoregressive":
            return None
        config, module = self.model, self.module

        def decode_step(params, tokens, position, cache, layers, cache_mask, context_mask):
            return module.apply({"params": params}, tokens, position, cache, layers, cache_mask,
                                method=IGPT.decode_step)

        return Decoder(
            context=None,
            prepare=lambda params, context: module.apply({"params": params}, method=IGPT.separate_layers),
            cache=lambda rows, length: empty_cache(config.transformer, rows, length), decode_step=decode_step,
            logits=lambda params, tokens, prepared, context_mask: module.apply({"params": params}, tokens).logits,
            start_id=config.colors, end_id=None, pad_id=None, longest=config.pixels + 1, vocab_size=config.colors,
            to_tokens=self.tokens, to_images=lambda tokens: self.palette.to_images(tokens, config.image_size),
            grid=(config.image_size, config.image_size))
