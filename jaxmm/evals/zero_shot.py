"""Zero-shot classification: a class is known by its name only (CLIP, arXiv:2103.00020, section 3.1)."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from jaxmm.config import Evaluator, require
from jaxmm.data.base import Source
from jaxmm.evals.accuracy import score, score_names
from jaxmm.evals.context import EvalContext, check, check_labels, chosen_weights, embed, picture_batches
from jaxmm.inference.batching import outputs, padded_batch_size, predict_fn

TEMPLATES = ("itap of a {}.", "a bad photo of the {}.", "a origami {}.", "a photo of the large {}.",
             "a {} in a video game.", "art of the {}.", "a photo of the small {}.")
"""The seven that OpenAI selected; on ImageNet slightly better than their eighty."""


@dataclass(frozen=True, kw_only=True)
class ZeroShot(Evaluator):
    """Yields `zero_shot_top1` and, with more than five classes, `zero_shot_top5`."""

    templates: tuple[str, ...] = TEMPLATES
    """Prompts; `{}` is the class name's place."""
    classes: tuple[str, ...] | None = None
    """Class names in the order of the labels; None: the source's own, underscores as spaces."""
    scale: float = 100.0
    """What cosines are multiplied with for the report's probabilities; the accuracy does not depend on it."""
    examples: int = 12
    """Pictures added to the report."""

    def __post_init__(self):
        """Checks the templates."""
        super().__post_init__()
        require(len(self.templates) > 0, "evals.templates", self.templates, "one template or more")
        for template in self.templates:
            require(template.count("{}") == 1, "evals.templates", template, "one {} in each template")

    def check(self, context: EvalContext) -> Source:
        """The source measured on; raises `ConfigError` where this cannot run."""
        source = check(self, context, "image", "text", tokenizer=True)
        check_labels(self, source)
        require(self.classes is None or len(self.classes) == len(source.classes), "ZeroShot.classes", self.classes,
                f"{len(source.classes)} names, as {source.name!r} has")
        return source

    def metrics(self, context: EvalContext) -> tuple[str, ...]:
        """The names that `run` yields."""
        names = score_names(len(self.check(context).classes))
        return tuple(f"{self.prefix}/zero_shot_{name}" for name in names if name != "loss")

    def run(self, context: EvalContext) -> Iterator[tuple[str, float]]:
        """Yields metric names and values."""
        source, params = self.check(context), chosen_weights(self, context)
        classes = self.classes or tuple(name.replace("_", " ") for name in source.classes)
        weights = class_embeddings(classes, self.templates, params, context, self.batch_size)
        batches = picture_batches(source, context, padded_batch_size(self.batch_size, context.mesh))
        fn = predict_fn(context.task, ("image",), context.mesh)
        logits = ((self.scale * unit(result["image"]) @ weights.T, batch)
                  for result, batch in outputs(fn, params, batches, context.mesh))
        for name, value in score(logits, source, classes, context, self.examples):
            if name != "loss":
                yield f"{self.prefix}/zero_shot_{name}", value


def unit(x: np.ndarray) -> np.ndarray:
    """Rows of `x` at length 1."""
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def class_embeddings(classes: tuple[str, ...], templates: tuple[str, ...], params, context: EvalContext,
                     batch_size: int) -> Float[np.ndarray, "classes e"]:
    """For each class the normalised mean of its prompts' normalised embeddings."""
    size = padded_batch_size(batch_size, context.mesh)
    tokens = np.asarray(context.tokenizer([t.replace("{}", c) for c in classes for t in templates]))
    pad = -len(tokens) % size
    mask = np.arange(len(tokens) + pad) < len(tokens)
    tokens = np.pad(tokens, ((0, pad), (0, 0)), mode="edge")
    batches = ({"tokens": tokens[i:i + size], "mask": mask[i:i + size]} for i in range(0, len(tokens), size))
    text = embed(predict_fn(context.task, ("text",), context.mesh), params, batches, context.mesh)[0]["text"]
    return unit(unit(text).reshape(len(classes), len(templates), -1).mean(axis=1))
