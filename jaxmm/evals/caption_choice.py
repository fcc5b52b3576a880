"""The choice between captions that differ in little: Winoground (arXiv:2204.03162), SugarCrepe (arXiv:2306.14610)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
from jax.sharding import Mesh

from jaxmm.compiling import compile_prediction
from jaxmm.config import Evaluator
from jaxmm.data.base import Source, record_texts
from jaxmm.evals.context import EvalContext, Outcomes, concatenate, embed_texts
from jaxmm.task import Task
from jaxmm.validation import require


@dataclass(frozen=True, kw_only=True)
class CaptionChoice(Evaluator):
    """Measures `text_score`, the share of records whose images are all nearest to their own caption.

    With two images per record, `image_score` is the share whose captions are both nearest to their own image, and
    `group_score` the share for which both hold. A tie is a miss.
    """

    needs: ClassVar = ("embeds images", "embeds texts")
    reads_text: ClassVar = True
    encodes_single_images: ClassVar = True

    def validate(self, context: EvalContext, source: Source) -> None:
        """Raise `ConfigError` if the source has no foils."""
        require(source.has_foils, "CaptionChoice.source", source.name, "captions with foils (winoground:, sugarcrepe:)")

    def names(self, source: Source) -> tuple[str, ...]:
        """Return the names of the metrics."""
        return ("text_score", "image_score", "group_score") if source.images_per_record > 1 else ("text_score",)

    def measure(self, context: EvalContext, source: Source) -> tuple[float, ...]:
        """Return the scores."""
        embed = _image_fn(context.task, context.mesh)
        result, batch = concatenate(context.outputs(self, embed, context.batches(self, source)))
        images, records = result["image"], batch["index"].tolist()
        captions = [record_texts(source, record) for record in records]
        texts = embed_texts(self, context, [text for both in captions for text in both])
        scores = np.einsum("nie,nte->nit", images, texts.reshape(len(images), 2, -1))
        own = scores.diagonal(axis1=1, axis2=2)
        text = (own > scores[:, :, ::-1].diagonal(axis1=1, axis2=2)).all(axis=1)
        values = {"text_score": text}
        if source.images_per_record > 1:
            image = (own > scores[:, ::-1].diagonal(axis1=1, axis2=2)).all(axis=1)
            values |= {"image_score": image, "group_score": text & image}
        context.outcomes.append(Outcomes(
            values=values, index=batch["index"],
            describe=lambda row: (captions[row][0], captions[row][int(not text[row])])))
        return tuple(float(np.mean(value)) for value in values.values())


@lru_cache(maxsize=4)
def _image_fn(task: Task, mesh: Mesh | None) -> Callable[[Any, Mapping], dict]:
    """Return a compiled function from (parameters, batch) to the embeddings [b i e] of the i images of each record."""
    def run(params, batch):
        image = batch["image"].reshape(len(batch["image"]), -1, *batch["image"].shape[-3:])
        embedded = task.embedder.image(params, {"image": image.reshape(-1, *image.shape[2:])})
        return {"image": embedded.reshape(*image.shape[:2], -1)}

    return compile_prediction(run, mesh)
