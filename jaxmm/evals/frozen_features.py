"""Features of a frozen model, for the evaluators that fit a classifier on them."""

import contextlib
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from jaxmm.compiling import compile_prediction
from jaxmm.config import Evaluator
from jaxmm.data.bad_records import BadRecord, read_record
from jaxmm.data.base import Source
from jaxmm.evals.by_image import ByImage
from jaxmm.evals.context import EvalContext, Outcomes, check_labels, concatenate
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
                   layer: int | None = None, shots: int | None = None, seed: int = 0
                   ) -> tuple[Labelled, Labelled, np.ndarray]:
    """Return the features to fit on, of `train` or else `data.train`, those to measure on, of `source`, and the records
    that the latter are of.

    They are those of `layer`, counted from 0; None: the task's own choice. With `shots` only that many images per class
    are fitted on (see `few_shots`).
    """
    def features(part: Source) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        name = "features" if layer is None else "layers"
        result, batch = concatenate(context.predictions(evaluator, (name,), context.batches(evaluator, part)))
        if layer is None:
            return result[name], batch["label"], batch["index"]
        depth = result[name].shape[1]
        require(0 <= layer < depth, f"{type(evaluator).__name__}.layer", layer, f"0 to {depth - 1}")
        return result[name][:, layer], batch["label"], batch["index"]

    fitted = context.open(train, context.train)
    if shots is not None:
        fitted = few_shots(fitted, shots, seed)
    *test, records = features(source)
    return features(fitted)[:2], tuple(test), records


def few_shots(source: Source, shots: int, seed: int) -> Source:
    """Return `shots` records of each class of `source`, drawn at random, or all if there are fewer."""
    left = dict.fromkeys(range(len(source.classes)), shots)
    chosen = []
    for index in np.random.default_rng(seed).permutation(len(source)).tolist():
        with contextlib.suppress(BadRecord):
            label = read_record(source, index).get("label")
            if left.get(label):
                chosen.append(index)
                left[label] -= 1
        if not any(left.values()):
            break
    return ByImage(source, tuple((index,) for index in sorted(chosen)))


def add_predictions(context: EvalContext, source: Source, name: str, records: np.ndarray, labels: np.ndarray,
                    predicted: np.ndarray) -> None:
    """Add the `predicted` labels of the examples to `context`; `name` is that of their accuracy."""
    classes = source.classes
    context.outcomes.append(Outcomes(values={name: predicted == labels}, index=records, labels=labels,
                                     describe=lambda row: (classes[labels[row]], classes[predicted[row]])))


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
