"""Classify whether a text about two images is true: BLIP on NLVR2 (Li et al. 2022, section 4.5)."""

from dataclasses import dataclass
from typing import ClassVar

import jax

from jaxmm.losses.classification import cross_entropy
from jaxmm.models.blip import BLIP, BLIPConfig
from jaxmm.nn.pixels import CLIP_PIXELS, Pixels
from jaxmm.task import Classifier, Task
from jaxmm.tasks.blip_common import BLIPTask
from jaxmm.tasks.tower_task import TowerTask
from jaxmm.validation import check_types, require


@dataclass(frozen=True, kw_only=True)
class PairClassification(BLIPTask, TowerTask, Task):
    """An image encoder, and a text encoder with cross-attention to two images; class 0 is false, 1 is true."""

    model: BLIPConfig
    pixels: Pixels = CLIP_PIXELS
    """Mean and std normalisation of images."""
    reads: ClassVar = ("image", "text", "label")
    images_per_record: ClassVar[int] = 2
    classes: ClassVar[int] = 2
    decomposes: ClassVar[bool] = True

    def __post_init__(self):
        """Check that the model reads two images."""
        check_types(self, "task")
        require(self.model.pair, "task.model.text.merge_from", None, "the number of a layer, to read two images")

    def bind(self, *, image_size, classes, tokenizer):
        """Check that there are two classes, and set the vocabulary size if the recipe has none."""
        bound = super().bind(image_size=image_size, classes=classes, tokenizer=tokenizer)
        require(classes == 2, "data.train", f"a source with {classes or 'no'} classes", "one with two: false and true")
        return bound

    def encode(self, params, batch, rng):
        """Return the logits."""
        return BLIP(self.model).apply({"params": params}, self.pixels(batch["image"]), batch["tokens"], train=True,
                                      rngs={"dropout": rng}).pair_logits

    def objective(self, params, outputs, batch):
        """Return cross-entropy and accuracy."""
        accuracy = (outputs.argmax(axis=-1) == batch["label"]).mean()
        return cross_entropy(outputs, jax.nn.one_hot(batch["label"], 2)), {"accuracy": accuracy}

    @property
    def classifier(self) -> Classifier:
        """Logits of false and true."""
        def logits(params, batch):
            return self.module.apply({"params": params}, self.pixels(batch["image"]), batch["tokens"],
                                     train=False).pair_logits

        return Classifier(logits=logits, reads_text=True)
