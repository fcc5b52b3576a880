"""Image classification by fine-tuning iGPT, with its generative loss beside (Chen et al. 2020, section 2.3)."""

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

from jaxmm.models.igpt import IGPTConfig
from jaxmm.nn.palette import Palette
from jaxmm.task import Classifier, Task, with_classes
from jaxmm.tasks.igpt_common import HIDE, IGPTTask, Kind
from jaxmm.validation import at_least, check_types


@dataclass(frozen=True, kw_only=True)
class GenerativeClassification(IGPTTask, Task):
    """A linear head on the mean of the last tokens, trained together with the generative loss."""

    model: IGPTConfig
    kind: Kind = "autoregressive"
    """Objective of the pre-training; bert: training hides pixels from the classifier too."""
    hide: Annotated[float, HIDE] = 0.15
    """Probability that BERT's objective hides a pixel."""
    generative_weight: Annotated[float, at_least(0)] = 1.0
    """Factor of the generative loss; 0: classification alone."""
    palette: Palette | None = None
    """Colours that are the tokens; None: `model.colors` ones by k-means of the training images."""
    reads: ClassVar = ("image", "label")
    decomposes: ClassVar[bool] = True

    def __post_init__(self):
        check_types(self, "task")

    def bind(self, *, image_size, classes, tokenizer):
        """Take the number of classes from the data if the recipe has none."""
        task = super().bind(image_size=image_size, classes=classes, tokenizer=tokenizer)
        return replace(task, model=with_classes(self.model, classes))

    def encode(self, params, batch, rng):
        """Compute the generative loss and the logits of each image."""
        loss, out = self.pixel_loss(params, batch, rng)
        return {"loss": loss, "logits": out.class_logits}

    def objective(self, params, outputs, batch):
        """Return the sum of both losses; accuracy on the labels."""
        import optax  # a tenth of a second of import that using a trained model does without

        generative, logits = outputs["loss"].mean(), outputs["logits"]
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()
        accuracy = (logits.argmax(axis=-1) == batch["label"]).mean()
        return loss + self.generative_weight * generative, {"accuracy": accuracy, "generative_loss": generative}

    @property
    def classes(self) -> int | None:
        """Number of classes; None: that of the data."""
        return self.model.classes

    @property
    def classifier(self) -> Classifier | None:
        """Logits of the classes, with no pixel hidden; None if the model has no head."""
        if self.model.classes is None:
            return None
        return Classifier(logits=lambda params, batch: self.run(params, self.tokens(batch["image"])).class_logits)
