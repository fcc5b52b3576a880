"""Zero-shot classification: classes are described by their names only (CLIP, arXiv:2103.00020, section 3.1)."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float

from jaxmm.config import Evaluator
from jaxmm.data.base import Source
from jaxmm.evals.accuracy import ranks, score
from jaxmm.evals.average_precision import score_tags
from jaxmm.evals.context import EvalContext, check_labels, embed_texts
from jaxmm.inference.class_prompts import TEMPLATES, class_means, class_prompts, unit
from jaxmm.validation import require


@dataclass(frozen=True, kw_only=True)
class ZeroShot(Evaluator):
    """Measures `zero_shot_top1` and, with more than five classes, `zero_shot_top5`.

    If an image may have several classes: `zero_shot_map`, the mean average precision (see `average_precisions`).
    """

    templates: tuple[str, ...] | None = None
    """Prompts, with `{}` in the place of the class name; None: those of the source, else OpenAI's seven."""
    classes: tuple[str, ...] | None = None
    """Class names in the order of the labels; None: the source's own, underscores as spaces if it has no templates."""
    scale: float = 100.0
    """Factor on the cosines for the report's probabilities; the accuracy does not depend on it."""
    examples: int = 12
    """Images added to the report."""
    needs: ClassVar = ("embeds images", "embeds texts")
    reads_text: ClassVar = True

    def __post_init__(self):
        """Check the templates."""
        super().__post_init__()
        require(self.templates is None or len(self.templates) > 0, "evals.templates", self.templates,
                "one template or more")
        for template in self.templates or ():
            require(template.count("{}") == 1, "evals.templates", template, "one {} in each template")

    def validate(self, context: EvalContext, source: Source) -> None:
        """Raise `ConfigError` if the source has no labels, or not as many classes as there are names."""
        if source.tags is None:
            check_labels(self, source)
        count = len(_names(source))
        require(self.classes is None or len(self.classes) == count, "ZeroShot.classes", self.classes,
                f"{count} names, as {source.name!r} has")

    def names(self, source: Source) -> tuple[str, ...]:
        """Return the names of the metrics."""
        return tuple(f"zero_shot_top{k}" for k in ranks(source)) if source.tags is None else ("zero_shot_map",)

    def measure(self, context: EvalContext, source: Source) -> tuple[float, ...]:
        """Return the accuracies, or the mean average precision."""
        own, names = source.templates if self.templates is None else None, _names(source)
        classes = self.classes or (names if own else tuple(name.replace("_", " ") for name in names))
        weights = class_embeddings(self, context, classes, own)
        images = context.predictions(self, ("image",), context.batches(self, source))
        logits = ((self.scale * unit(result["image"]) @ weights.T, batch) for result, batch in images)
        if source.tags is not None:
            return (score_tags(logits, source, classes, context),)
        return score(logits, source, classes, context, self.examples, self.names(source))[:-1]


def _names(source: Source) -> tuple[str, ...]:
    """Return the names of the classes, of which a record has one or several."""
    return source.classes if source.tags is None else source.tags


def class_embeddings(evaluator: ZeroShot, context: EvalContext, classes: tuple[str, ...],
                     templates: tuple[str, ...] | None = None) -> Float[np.ndarray, "classes e"]:
    """Return for each class the normalised mean of its prompts' normalised embeddings.

    `templates` are those that belong to the names as they are written; None: those of `evaluator`.
    """
    prompts = (class_prompts(classes, evaluator.templates or TEMPLATES) if templates is None else
               [template.replace("{}", name) for name in classes for template in templates])
    return class_means(unit(embed_texts(evaluator, context, prompts)), len(classes))
