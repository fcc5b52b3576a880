"""Contrastive learning of images and text: CLIP (softmax) and SigLIP (sigmoid)."""

import math
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import jax.numpy as jnp

from jaxmm.losses import contrastive as losses
from jaxmm.losses.blockwise import Sigmoid, Softmax, blockwise_contrastive
from jaxmm.models.clip import CLIP, CLIPConfig, TextConfig
from jaxmm.nn.pixels import CLIP_PIXELS, Pixels
from jaxmm.sharding import constrain_batch
from jaxmm.task import Embedder, Task, check_pairs, flat_ids
from jaxmm.tasks.tower_task import TowerTask
from jaxmm.validation import POSITIVE, check_types, require


@dataclass(frozen=True, kw_only=True)
class ContrastiveLearning(TowerTask, Task):
    """An image tower and a text tower, trained so that matching pairs have similar embeddings."""

    model: CLIPConfig
    pixels: Pixels = CLIP_PIXELS
    """Mean and std normalisation of images."""
    kind: Literal["softmax", "sigmoid"] = "softmax"
    """Loss: softmax (CLIP) or sigmoid (SigLIP)."""
    duplicates: bool = True
    """True if pairs with the same image or the same text are positives; False: only the diagonal is."""
    tile: Annotated[int | None, POSITIVE] = None
    """Block size of the blockwise loss over a ring of devices: at most `tile` x `tile` logits at a time (1024 is good),
    for batches of any size. None: each device has the logits of its images with all texts."""
    reads: ClassVar = ("image", "text")
    several_captions: ClassVar = True
    text_positions: ClassVar = "text/positions"

    def __post_init__(self):
        """Check that the sigmoid loss has an initial bias."""
        check_types(self, "task")
        require(self.kind == "softmax" or self.model.logit_bias is not None, "task.model.logit_bias",
                self.model.logit_bias, "a number such as -10, for the sigmoid loss")

    @property
    def clamps(self):
        """CLIP's temperature stays within [1/100, 1] (section 2.5); SigLIP's is free."""
        return ((r"^logit_scale$", 0.0, math.log(100)),) if self.kind == "softmax" else ()

    def bind(self, *, image_size, classes, tokenizer):
        """Take the vocabulary size from the tokenizer if the recipe has none."""
        model, text = self.model, self.model.text
        check_pairs(image_size, model.vision, tokenizer)
        require(tokenizer.context_length == text.context_length, "data.tokenizer.context_length",
                tokenizer.context_length, f"the model's task.model.text.context_length = {text.context_length}")
        require(text.vocab_size is None or text.vocab_size >= tokenizer.vocab_size, "task.model.text.vocab_size",
                text.vocab_size, f"None, or at least the tokenizer's {tokenizer.vocab_size}")
        require(text.pool != "argmax" or tokenizer.eos_id == tokenizer.vocab_size - 1, "task.model.text.pool",
                text.pool, f"eos: this tokenizer's end token is {tokenizer.eos_id}, not the largest of its "
                f"{tokenizer.vocab_size} ids")
        require(text.pad_id in (None, tokenizer.pad_id), "task.model.text.pad_id", text.pad_id,
                f"None, or the tokenizer's {tokenizer.pad_id}")
        text = replace(text, vocab_size=text.vocab_size or tokenizer.vocab_size)
        if text.pool == "eos" and text.eos_id is None:
            text = replace(text, eos_id=tokenizer.eos_id)
        return replace(self, model=replace(model, text=text))

    def with_blockwise_loss(self, size):
        """Return this task with `tile` = `size`; None if it has a tile."""
        return replace(self, tile=size) if self.tile is None else None

    def init(self, rng):
        """Initialise the parameters."""
        size = self.model.vision.image_size
        image, tokens = jnp.zeros((1, size, size, 3)), jnp.zeros((1, self.model.text.context_length), jnp.int32)
        return CLIP(self.model).init(rng, image, tokens, train=False)["params"]

    def encode(self, params, batch, rng):
        """Return the normalised embeddings of images [b e] and of texts [b e], or [b n e] if `tokens` are [b n t]."""
        tokens = batch["tokens"]
        out = CLIP(self.model).apply({"params": params}, self.pixels(batch["image"]),
                                     tokens.reshape(-1, tokens.shape[-1]), train=True, rngs={"dropout": rng})
        return {"image": out.image, "text": out.text.reshape(*tokens.shape[:-1], -1)}

    def objective(self, params, outputs, batch):
        """Compute the loss over the global batch, and the share of images whose nearest text is a positive."""
        image, text = outputs["image"], outputs["text"].reshape(-1, outputs["text"].shape[-1])
        ids = (batch.get("image_id"), flat_ids(batch)) if self.duplicates else (None, None)
        scale, bias = jnp.exp(params["logit_scale"]), params.get("logit_bias", jnp.zeros(()))
        metrics = {"logit_scale": scale, "logit_bias": bias}
        if self.tile is not None:
            block_loss = {"softmax": Softmax, "sigmoid": Sigmoid}[self.kind]
            loss, accuracy = blockwise_contrastive(block_loss, image, text, ids, scale, bias, tile=self.tile)
            return loss, metrics | accuracy
        positive = constrain_batch(losses.positive_mask(*ids, size=len(image), captions=len(text) // len(image)))
        logits = losses.contrastive_logits(image, text, scale, bias)
        loss = {"softmax": losses.softmax_contrastive, "sigmoid": losses.sigmoid_contrastive}[self.kind]
        nearest = jnp.take_along_axis(positive, logits.argmax(axis=1)[:, None], axis=1)
        return loss(logits, positive), metrics | {"accuracy": nearest.mean()}

    @property
    def module(self) -> CLIP:
        """The Flax module."""
        return CLIP(self.model)

    @property
    def text_config(self) -> TextConfig:
        """Configuration of the text tower."""
        return self.model.text

    @property
    def context_length(self) -> int:
        """Tokens that every text is padded to."""
        return self.model.text.context_length

    @property
    def embedder(self) -> Embedder:
        """Embeddings of both towers; features of the image tower before the projection."""
        module = self.module

        def image(params, batch):
            return module.apply({"params": params}, self.pixels(batch["image"]), train=False, method=CLIP.embed_image)

        def text(params, batch):
            return module.apply({"params": params}, batch["tokens"], train=False, method=CLIP.embed_text)

        def features(params, batch):
            return module.apply({"params": params}, self.pixels(batch["image"]), train=False,
                                method=CLIP.image_features)

        return Embedder(image=image, text=text, features=features, text_length=self.model.text.needed_length,
                        scale=lambda params: jnp.exp(params["logit_scale"]),
                        bias=lambda params: params.get("logit_bias", jnp.zeros(())))
