"""Generative pre-training from pixels (iGPT, Chen et al. 2020, section 2.2)."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from jaxmm.models.igpt import IGPTConfig
from jaxmm.nn.palette import Palette
from jaxmm.task import Task
from jaxmm.tasks.igpt_common import HIDE, IGPTTask, Kind
from jaxmm.validation import check_types, require


@dataclass(frozen=True, kw_only=True)
class GenerativePretraining(IGPTTask, Task):
    """Predict the colour of every pixel from those before it, or of hidden pixels from the others."""

    model: IGPTConfig
    kind: Kind = "autoregressive"
    """Objective. autoregressive: the next pixel, row by row; bert: hidden pixels. Only the first writes images."""
    hide: Annotated[float, HIDE] = 0.15
    """Probability that BERT's objective hides a pixel."""
    feature_layer: int | None = None
    """Layer whose features embed an image, counted from 0; None: the one in the middle."""
    palette: Palette | None = None
    """Colours that are the tokens; None: `model.colors` ones by k-means of the training images."""
    decomposes: ClassVar[bool] = True

    def __post_init__(self):
        """Check ranges."""
        check_types(self, "task")
        require(self.model.classes is None, "task.model.classes", self.model.classes, "None: there are no labels")
        depth = self.model.transformer.depth
        require(self.feature_layer is None or 0 <= self.feature_layer < depth, "task.feature_layer",
                self.feature_layer, f"0 to {depth - 1}, or None")

    def encode(self, params, batch, rng):
        """Compute the loss of each image."""
        return self.pixel_loss(params, batch, rng)[0]

    def objective(self, params, outputs, batch):
        """Return the mean over the images."""
        return outputs.mean(), {}
