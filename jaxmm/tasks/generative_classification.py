"""Image classification by fine-tuning iGPT, with its generative loss beside (Chen et al. 2020, section 2.3)."""

from dataclasses import dataclass, replace
from typing import ClassVar

from jaxmm.models.igpt import IGPT, IGPTConfig
from jaxmm.nn.palette import Palette
from jaxmm.task import Classifier, Decoder, Embedder, Task
from jaxmm.tasks import igpt_common
from jaxmm.validation import ConfigError, check_types, require


@dataclass(frozen=True, kw_only=True)
class GenerativeClassification(Task):
    """A linear head on the mean of the last tokens, trained together with the generative loss."""

    model: IGPTConfig
    kind: igpt_common.Kind = "autoregressive"
    """Objective of the pre-training; bert: training hides pixels from the classifier too."""
    hide: float = 0.15
    """Probability that BERT's objective hides a pixel."""
    generative_weight: float = 1.0
    """Factor of the generative loss; 0: classification alone."""
    palette: Palette | None = None
    """Colours that are the tokens; None: `model.colors` ones by k-means of the training images."""
    reads: ClassVar = ("image", "label")
    decomposes: ClassVar[bool] = True
    fit, adopt, trained_path = igpt_common.fit, igpt_common.adopt, igpt_common.trained_path

    def __post_init__(self):
        """Check ranges."""
        check_types(self, "task")
        require(0 < self.hide < 1, "task.hide", self.hide, "above 0, below 1")
        require(self.generative_weight >= 0, "task.generative_weight", self.generative_weight, "0 or more")

    def bind(self, *, image_size, classes, tokenizer):
        """Take the number of classes from the data if the recipe has none."""
        igpt_common.check_images(self.model, image_size, self.palette)
        if classes is None:
            raise ConfigError("data.train has no labels; expected a source with classes, such as folder:DIR")
        require(self.model.classes in (None, classes), "task.model.classes", self.model.classes,
                f"None, or the source's {classes}")
        return replace(self, model=replace(self.model, classes=classes))

    def init(self, rng):
        """Initialise the parameters."""
        return igpt_common.init_igpt(self.model, rng)

    def encode(self, params, batch, rng):
        """Compute the generative loss and the logits of each image."""
        tokens = igpt_common.to_tokens(self.palette, batch["image"])
        loss, out = igpt_common.pixel_loss(self.model, params, tokens, self.kind, self.hide, rng)
        return {"loss": loss, "logits": out.class_logits}

    def objective(self, params, outputs, batch):
        """Return the sum of both losses; accuracy on the labels."""
        import optax  # a tenth of a second of import that using a trained model does without

        generative, logits = outputs["loss"].mean(), outputs["logits"]
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()
        accuracy = (logits.argmax(axis=-1) == batch["label"]).mean()
        return loss + self.generative_weight * generative, {"accuracy": accuracy, "generative_loss": generative}

    @property
    def module(self) -> IGPT:
        """The Flax module."""
        return IGPT(self.model)

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
        """Features of images, of every layer too."""
        return igpt_common.igpt_embedder(self.model, self.palette, self.kind, None)

    @property
    def classifier(self) -> Classifier | None:
        """Logits of the classes, with no pixel hidden; None if the model has no head."""
        if self.model.classes is None:
            return None
        return Classifier(logits=lambda params, batch: igpt_common.run(
            self.model, params, igpt_common.to_tokens(self.palette, batch["image"]), self.kind).class_logits)

    @property
    def decoder(self) -> Decoder | None:
        """The decoder of images."""
        return igpt_common.igpt_decoder(self.model, self.palette, self.kind)
