"""Image classification."""

import math
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from jaxmm.losses import classification as losses
from jaxmm.models.attention_conv import AttentionConvConfig
from jaxmm.models.vit import ViTConfig
from jaxmm.nn.pixels import INCEPTION, Pixels
from jaxmm.task import Classifier, Embedder, PatchAttention, Task, check_image_size, with_classes
from jaxmm.tasks.tower_task import TowerTask
from jaxmm.validation import BELOW_ONE, at_least, check_types


@dataclass(frozen=True, kw_only=True)
class Classification(TowerTask, Task):
    """A vision transformer, or self-attention as convolution, with a classification head."""

    model: ViTConfig | AttentionConvConfig
    pixels: Pixels = INCEPTION
    """Mean and std normalisation of images."""
    kind: Literal["softmax", "sigmoid"] = "softmax"
    """Loss. softmax: one class per image; sigmoid: every class separately."""
    label_smoothing: Annotated[float, BELOW_ONE] = 0.0
    mixup: Annotated[float, at_least(0)] = 0.0
    """Alpha of mixup's Beta distribution; 0: no mixup."""
    cutmix: Annotated[float, at_least(0)] = 0.0
    """Alpha of CutMix's Beta distribution; with both, each batch gets one of them at random."""
    reads: ClassVar = ("image", "label")
    decomposes: ClassVar[bool] = True

    def __post_init__(self):
        check_types(self, "task")

    def bind(self, *, image_size, classes, tokenizer):
        """Take the number of classes from the data if the recipe has none."""
        check_image_size(image_size, self.model)
        return replace(self, model=with_classes(self.model, classes))

    def init(self, rng):
        """Initialise the parameters."""
        size = self.model.image_size
        return self.module.init(rng, jnp.zeros((1, size, size, 3)), train=False)["params"]

    def prepare(self, batch, rng):
        """Soft targets; mixup or CutMix over the global batch."""
        image = batch["image"]
        targets = losses.soft_targets(batch["label"], self.model.classes, self.label_smoothing)
        coin, drawing = jax.random.split(rng)
        if self.mixup and self.cutmix:
            mixes = [lambda: losses.mixup(image, targets, self.mixup, drawing),
                     lambda: losses.cutmix(image, targets, self.cutmix, drawing)]
            image, targets = jax.lax.cond(jax.random.bernoulli(coin), *mixes)
        elif self.mixup:
            image, targets = losses.mixup(image, targets, self.mixup, drawing)
        elif self.cutmix:
            image, targets = losses.cutmix(image, targets, self.cutmix, drawing)
        return batch | {"image": image, "target": targets}

    def encode(self, params, batch, rng):
        """Logits."""
        return self.module.apply({"params": params}, self.pixels(batch["image"]), train=True,
                                 rngs={"dropout": rng}).logits

    def objective(self, params, outputs, batch):
        """Cross-entropy with the soft targets; accuracy on the labels."""
        loss = {"softmax": losses.cross_entropy, "sigmoid": losses.sigmoid_cross_entropy}[self.kind]
        accuracy = (outputs.argmax(axis=-1) == batch["label"]).mean()
        return loss(outputs, batch["target"]), {"accuracy": accuracy}

    @property
    def module(self) -> Any:
        """The Flax module."""
        return self.model.module

    @property
    def image_size(self) -> int:
        """Side in pixels of the images that the model reads."""
        return self.model.image_size

    @property
    def classes(self) -> int | None:
        """Number of classes; None: that of the data."""
        return self.model.classes

    @property
    def embedder(self) -> Embedder:
        """Pooled features of images, fp32."""
        def features(params, batch):
            return self._predict(params, batch).pooled.astype(jnp.float32)

        return Embedder(image=features, features=features)

    @property
    def classifier(self) -> Classifier | None:
        """Logits of the classes; None if the model has no head."""
        if self.model.classes is None:
            return None
        return Classifier(logits=lambda params, batch: self._predict(params, batch).logits)

    @property
    def patch_attention(self) -> PatchAttention:
        """Self-attention between patches."""
        patches = math.prod(self.model.grid)

        def weights(params, batch):
            between = self._predict(params, batch, attention=True).attention[..., -patches:, -patches:]
            return jnp.moveaxis(between / between.sum(axis=-1, keepdims=True), 1, 0)

        return PatchAttention(weights=weights, grid=self.model.grid)

    def _predict(self, params, batch, **outputs):
        return self.module.apply({"params": params}, self.pixels(batch["image"]), train=False, **outputs)
