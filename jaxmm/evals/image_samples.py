"""Images that a model generates, and completions of held-out images, which scenes can grade."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar

import numpy as np

from jaxmm.config import Evaluator
from jaxmm.data.base import Source
from jaxmm.data.eval_pipeline import read_images
from jaxmm.evals.context import EvalContext, ImageGrid, evenly_spaced
from jaxmm.inference.generate import Decoding
from jaxmm.inference.image_generation import (
    complete_images,
    generate_images,
    image_decoding,
    kept_tokens,
    make_token_fn,
    without_rest,
)
from jaxmm.validation import ConfigError, require


@dataclass(frozen=True, kw_only=True)
class ImageSamples(Evaluator):
    """Adds generated images, and completions of held-out images, to the report.

    If the source grades images (scenes), it measures completions of images whose largest object is partly kept:
    `completion_color` and `completion_shape` are the shares that continue it in its colour and in its shape. With the
    suffix `_limit` they are those of the images themselves, through the model's tokens: the most that can be reached.
    """

    count: int = 16
    """Generated images in the report."""
    keep: str = "top"
    """Part of an image that is completed: `top`, `left`, or the share of it that comes first."""
    graded: int = 200
    """Number of images that are completed to be graded, the first ones that allow it."""
    examples: int = 6
    """Completed images in the report; 0: none, and no generated ones either."""
    samples: int = 4
    """Completions of each image."""
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    needs: ClassVar = ("generates images",)

    def __post_init__(self):
        """Check ranges."""
        super().__post_init__()
        for name in ("count", "graded", "samples"):
            require(getattr(self, name) > 0, f"evals.{name}", getattr(self, name), "a positive number")
        require(self.examples >= 0, "evals.examples", self.examples, "0 or more")

    def validate(self, context: EvalContext, source: Source) -> None:
        """Raise `ConfigError` for values out of range."""
        image_decoding(context.task.decoder, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)
        try:
            kept_tokens(context.task.decoder, self.keep)
        except ValueError as error:
            raise ConfigError(f"evals.{error}") from None

    def names(self, source: Source) -> tuple[str, ...]:
        """Return the names of the metrics."""
        return ("completion_color", "completion_shape", "completion_color_limit",
                "completion_shape_limit") if source.grades_images else ()

    def measure(self, context: EvalContext, source: Source) -> Iterator[float]:
        """Yield the shares."""
        decoding = image_decoding(context.task.decoder, temperature=self.temperature, top_k=self.top_k,
                                  top_p=self.top_p)
        if self.examples:
            self._show(context, source, decoding)
        if source.grades_images:
            yield from self._grades(context, source, decoding)

    def _show(self, context: EvalContext, source: Source, decoding: Decoding) -> None:
        """Add generated images and completions to the report."""
        task, decoder, params = context.task, context.task.decoder, context.weights_of(self)
        options = {"seed": 0, "mesh": context.mesh}
        drawn = generate_images(task, params, self.count, decoding, **options)
        context.examples.append(ImageGrid(title="Generated images", text="Samples of the model, without any input.",
                                          rows=tuple(map(tuple, np.split(drawn, range(8, len(drawn), 8))))))
        _, images = read_images(source, context.data.image, evenly_spaced(len(source), self.examples).tolist())
        completed = complete_images(task, params, images, self.keep, self.samples, decoding, **options)
        context.examples.append(ImageGrid(
            title="Completions", text="Held-out images, what the model is given of them, and what it makes of that.",
            columns=("image", "given", *["completed"] * self.samples),
            rows=tuple(zip(images, without_rest(decoder, images, self.keep), *completed.swapaxes(0, 1), strict=True))))

    def _grades(self, context: EvalContext, source: Source, decoding: Decoding) -> Iterator[float]:
        """Yield the shares of completions, then of the images through the model's tokens, in colour and in shape."""
        decoder, side = context.task.decoder, context.data.image.size
        none = np.zeros((0, side, side, 3), np.uint8)
        part = (without_rest(decoder, np.zeros((side, side, 3), np.uint8), self.keep) > 0).any(axis=-1)
        gradable = (i for i in range(len(source)) if source.shows_largest(i, none, part) is not None)
        chosen = list(islice(gradable, self.graded))
        if not chosen:
            yield from [float("nan")] * 4
            return
        chosen, images = read_images(source, context.data.image, chosen)
        limit = np.asarray(decoder.to_images(make_token_fn(context.task)(images)))
        completed = complete_images(context.task, context.weights_of(self), images, self.keep, 1, decoding, seed=1,
                                    mesh=context.mesh)[:, 0]
        grades = [source.shows_largest(i, np.stack(pair), part)
                  for i, *pair in zip(chosen, completed, limit, strict=True)]
        yield from np.mean(grades, axis=0).T.reshape(-1)
