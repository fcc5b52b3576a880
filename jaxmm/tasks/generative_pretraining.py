"""Generative pre-training from pixels (iGPT, Chen et al. 2020, section 2.2)."""

from dataclasses import dataclass
from typing import ClassVar

from jaxmm.models.igpt import IGPT, IGPTConfig
from jaxmm.nn.palette import Palette
from jaxmm.task import Decoder, Embedder, Task
from jaxmm.tasks import igpt_common
from jaxmm.validation import check_types, require


@dataclass(frozen=True, kw_only=True)
class GenerativePretraining(Task):
    """Predict the colour of every pixel from those before it, or of hidden pixels from the others."""

    model: IGPTConfig
    kind: igpt_common.Kind = "autoregressive"
    """Objective. autoregressive: the next pixel, row by row; bert: hidden pixels. Only the first writes images."""
    hide: float = 0.15
    """Probability that BERT's objective hides a pixel."""
    feature_layer: int | None = None
    """Layer whose features embed an image, counted from 0; None: the one in the middle."""
    palette: Palette | None = None
    """Colours that are the tokens; None: `model.colors` ones by k-means of the training images."""
    decomposes: ClassVar[bool] = True
    fit, adopt, trained_path = igpt_common.fit, igpt_common.adopt, igpt_common.trained_path

    def __post_init__(self):
        """Check ranges."""
        check_types(self, "task")
        require(self.model.classes is None, "task.model.classes", self.model.classes, "None: there are no labels")
        require(0 < self.hide < 1, "task.hide", self.hide, "above 0, below 1")
        depth = self.model.transformer.depth
        require(self.feature_layer is None or 0 <= self.feature_layer < depth, "task.feature_layer",
                self.feature_layer, f"0 to {depth - 1}, or None")

    def bind(self, *, image_size, classes, tokenizer):
        """Check that the images have the model's size."""
        igpt_common.check_images(self.model, image_size, self.palette)
        return self

    def init(self, rng):
        """Initialise the parameters."""
        return igpt_common.init_igpt(self.model, rng)

    def encode(self, params, batch, rng):
        """Compute the loss of each image."""
        tokens = igpt_common.to_tokens(self.palette, batch["image"])
        return igpt_common.pixel_loss(self.model, params, tokens, self.kind, self.hide, rng)[0]

    def objective(self, params, outputs, batch):
        """Return the mean over the images."""
        return outputs.mean(), {}

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
        return igpt_common.igpt_embedder(self.model, self.palette, self.kind, self.feature_layer)

    @property
    def decoder(self) -> Decoder | None:
        """The decoder of images."""
        return igpt_common.igpt_decoder(self.model, self.palette, self.kind)
