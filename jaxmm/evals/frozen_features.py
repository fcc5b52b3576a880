"""Features of a frozen model, for the evaluators that fit a classifier on them."""

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from jaxmm.compiling import compile_prediction
from jaxmm.config import Evaluator
from jaxmm.data.base import Source
from jaxmm.evals.context import EvalContext, check_labels, concatenate
from jaxmm.task import Task
from jaxmm.validation import require

Labelled = tuple[np.ndarray, np.ndarray]
"""Features [n, d] and labels [n]."""


class LabelledLayers(NamedTuple):
    """Features in every layer [n, l, d], the pixels [n, p] from 0 to 1, and labels [n]."""

    layers: np.ndarray
    pixels: np.ndarray
    labels: np.ndarray


def check_train(evaluator: Evaluator, train: str | None, context: EvalContext, source: Source) -> None:
    """Raise `ConfigError` if `train`, or else `data.train`, and `source` do not have the same labels."""
    fitted, name = context.open(train, context.train), type(evaluator).__name__
    require(fitted is not None, f"{name}.train", train, "a source, or a run with data.train")
    for labelled in (fitted, source):
        check_labels(evaluator, labelled)
    require(fitted.classes == source.classes, f"{name}.train", fitted.name,
            f"a source with the classes of {source.name!r}")


def check_layer(evaluator: Evaluator, layer: int | None, context: EvalContext) -> None:
    """Raise `ConfigError` if the task does not offer the features of `layer`."""
    require(layer is None or context.task.embedder.layers is not None, f"{type(evaluator).__name__}.layer", layer,
            f"None: {type(context.task).__name__} offers no features of every layer")


def train_and_test(evaluator: Evaluator, train: str | None, context: EvalContext, source: Source,
                   layer: int | None = None) -> tuple[Labelled, Labelled]:
    """Return the features to fit on, of `train` or else `data.train`, and those to measure on, of `source`.

    They are those of `layer`, counted from 0; None: the task's own choice.
    """
    def features(part: Source) -> Labelled:
        name = "features" if layer is None else "layers"
        result, batch = concatenate(context.predictions(evaluator, (name,), context.batches(evaluator, part)))
        if layer is None:
            return result[name], batch["label"]
        depth = result[name].shape[1]
        require(0 <= layer < depth, f"{type(evaluator).__name__}.layer", layer, f"0 to {depth - 1}")
        return result[name][:, layer], batch["label"]

    return tuple(map(features, (context.open(train, context.train), source)))


def layers_and_pixels(
    evaluator: Evaluator, train: str | None, context: EvalContext, source: Source
) -> tuple[LabelledLayers, LabelledLayers]:
    """Return the features of every layer and the pixels, of `train` or else `data.train`, and of `source`."""
    fn = _layers_fn(context.task, context.mesh)

    def features(part: Source) -> LabelledLayers:
        result, batch = concatenate(context.outputs(evaluator, fn, context.batches(evaluator, part)))
        return LabelledLayers(result["layers"], result["pixels"].astype(np.float32) / 255, batch["label"])

    return features(context.open(train, context.train)), features(source)


@lru_cache(maxsize=4)
def _layers_fn(task: Task, mesh: Mesh | None) -> Callable[[Any, Mapping], dict]:
    layers = task.embedder.layers

    def run(params, batch):
        return {"layers": layers(params, batch), "pixels": batch["image"].reshape(len(batch["image"]), -1)}

    return compile_prediction(run, mesh)
