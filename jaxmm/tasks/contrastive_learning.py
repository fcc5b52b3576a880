"""Aligning pictures and texts: CLIP (softmax) and SigLIP (sigmoid)."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import jax.numpy as jnp

from jaxmm.config import check_types, require
from jaxmm.losses import contrastive as losses
from jaxmm.losses.blockwise import Sigmoid, Softmax, blockwise_contrastive
from jaxmm.models.clip import CLIP, CLIPConfig, TextConfig
from jaxmm.nn.pixels import CLIP_PIXELS, Pixels
from jaxmm.sharding import constrain_batch
from jaxmm.task import Embedder, Task, check_pairs
from jaxmm.tasks import adopting


@dataclass(frozen=True, kw_only=True)
class ContrastiveLearning(Task):
    """Two towers drawn together where picture and text belong together, and apart elsewhere."""

    model: CLIPConfig
    pixels: Pixels = CLIP_PIXELS
    """How bytes become the model's input."""
    kind: Literal["softmax", "sigmoid"] = "softmax"
    duplicates: bool = True
    """Whether pairs of the same picture or the same words are positives; False: only the diagonal is."""
    tile: int | None = None
    """Compute the loss in blocks that rotate around the mesh, `tile` x `tile` logits at a time at most (1024 is good):
    the batch may then be any size. None: each device has its pictures' logits with all texts."""
    reads: ClassVar = ("image", "text")
    adopt, trained_path, position_grid = adopting.adopt, adopting.trained_path, adopting.position_grid

    def __post_init__(self):
        """The sigmoid loss needs a bias to start from."""
        check_types(self, "task")
        require(self.kind == "softmax" or self.model.logit_bias is not None, "task.model.logit_bias",
                self.model.logit_bias, "a number such as -10, for the sigmoid loss")
        require(self.tile is None or self.tile > 0, "task.tile", self.tile, "a positive number, or None")

    @property
    def clamps(self):
        """CLIP's temperature stays within [1/100, 1] (section 2.5); SigLIP's is free."""
        return ((r"^logit_scale$", 0.0, math.log(100)),) if self.kind == "softmax" else ()

    def bind(self, *, image_size, classes, tokenizer):
        """The vocabulary comes from the tokenizer where the recipe leaves it open."""
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

    def init(self, rng):
        """Fresh parameters."""
        size = self.model.vision.image_size
        image, tokens = jnp.zeros((1, size, size, 3)), jnp.zeros((1, self.model.text.context_length), jnp.int32)
        return CLIP(self.model).init(rng, image, tokens, train=False)["params"]

    def encode(self, params, batch, rng):
        """Normalised embeddings of both."""
        out = CLIP(self.model).apply({"params": params}, self.pixels(batch["image"]), batch["tokens"], train=True,
                                     rngs={"dropout": rng})
        return {"image": out.image, "text": out.text}

    def objective(self, params, outputs, batch):
        """The loss over all pairs of the global batch; how often the nearest text is a right one."""
        ids = (batch.get("image_id"), batch.get("text_id")) if self.duplicates else (None, None)
        scale, bias = jnp.exp(params["logit_scale"]), params.get("logit_bias", jnp.zeros(()))
        metrics = {"logit_scale": scale, "logit_bias": bias}
        if self.tile is not None:
            kind = {"softmax": Softmax, "sigmoid": Sigmoid}[self.kind]
            loss, told = blockwise_contrastive(kind, outputs["image"], outputs["text"], ids, scale, bias,
                                               tile=self.tile)
            return loss, metrics | told
        positive = constrain_batch(losses.positive_mask(*ids, size=len(outputs["image"])))
        logits = losses.contrastive_logits(outputs["image"], outputs["text"], scale, bias)
        loss = {"softmax": losses.softmax_contrastive, "sigmoid": losses.sigmoid_contrastive}[self.kind]
        nearest = jnp.take_along_axis(positive, logits.argmax(axis=1)[:, None], axis=1)
        return loss(logits, positive), metrics | {"accuracy": nearest.mean()}

    @property
    def module(self) -> CLIP:
        """The Flax module."""
        return CLIP(self.model)

    @property
    def image_size(self) -> int:
        """Side in pixels of the images that the model reads."""
        return self.model.vision.image_size

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
