"""Classify whether a text about two images is true: BLIP on NLVR2 (Li et al. 2022, section 4.5)."""

from dataclasses import dataclass, replace
from typing import ClassVar

import jax

from jaxmm.config import check_types, require
from jaxmm.losses.classification import cross_entropy
from jaxmm.models.blip import BLIP, BLIPConfig
from jaxmm.models.med_config import MedConfig
from jaxmm.nn.pixels import CLIP_PIXELS, Pixels
from jaxmm.task import Classifier, Embedder, Task, check_pairs
from jaxmm.tasks import adopting
from jaxmm.tasks.blip_common import blip_features, check_tokenizer, init_blip, with_vocabulary


@dataclass(frozen=True, kw_only=True)
class PairClassification(Task):
    """An image encoder, and a text encoder with cross-attention to two images; class 0 is false, 1 is true."""

    model: BLIPConfig
    pixels: Pixels = CLIP_PIXELS
    """Mean and std normalisation of images."""
    reads: ClassVar = ("image", "text", "label")
    images_per_record: ClassVar[int] = 2
    classes: ClassVar[int] = 2
    decomposes: ClassVar[bool] = True
    adopt, trained_path, position_grid = adopting.adopt, adopting.trained_path, adopting.position_grid

    def __post_init__(self):
        """Check that the model reads two images."""
        check_types(self, "task")
        require(self.model.pair, "task.model.text.merge_from", None, "the number of a layer, to read two images")

    def bind(self, *, image_size, classes, tokenizer):
        """Set the vocabulary size to the tokenizer's plus [DEC] and [ENC], if the recipe has none."""
        check_pairs(image_size, self.model.vision, tokenizer)
        require(classes == 2, "data.train", f"a source with {classes or 'no'} classes", "one with two: false and true")
        check_tokenizer(self.model.text, tokenizer)
        return replace(self, model=replace(self.model, text=with_vocabulary(self.model.text, tokenizer)))

    def init(self, rng):
        """Initialise the parameters."""
        return init_blip(self.model, rng)

    def encode(self, params, batch, rng):
        """Return the logits."""
        return BLIP(self.model).apply({"params": params}, self.pixels(batch["image"]), batch["tokens"], train=True,
                                      rngs={"dropout": rng}).pair_logits

    def objective(self, params, outputs, batch):
        """Return cross-entropy and accuracy."""
        accuracy = (outputs.argmax(axis=-1) == batch["label"]).mean()
        return cross_entropy(outputs, jax.nn.one_hot(batch["label"], 2)), {"accuracy": accuracy}

    @property
    def module(self) -> BLIP:
        """The Flax module."""
        return BLIP(self.model)

    @property
    def image_size(self) -> int:
        """Side in pixels of the images that the model reads."""
        return self.model.vision.image_size

    @property
    def text_config(self) -> MedConfig:
        """Configuration of the text transformer."""
        return self.model.text

    @property
    def embedder(self) -> Embedder:
        """Features of images: the first token of an image, or of both of a pair [b 2d]."""
        return blip_features(self.model, self.pixels)

    @property
    def classifier(self) -> Classifier:
        """Logits of false and true."""
        def logits(params, batch):
            return self.module.apply({"params": params}, self.pixels(batch["image"]), batch["tokens"],
                                     train=False).pair_logits

        return Classifier(logits=logits, reads_text=True)
