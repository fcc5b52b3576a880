"""Features of a frozen model, for the evaluators that fit a classifier on them."""

import numpy as np

from jaxmm.config import Evaluator, require
from jaxmm.data.base import Source
from jaxmm.evals.context import EvalContext, check_labels, concatenate

Labelled = tuple[np.ndarray, np.ndarray]
"""Features [n, d] and labels [n]."""


def check_train(evaluator: Evaluator, train: str | None, context: EvalContext, source: Source) -> None:
    """Raise `ConfigError` if `train`, or else `data.train`, and `source` do not have the same labels."""
    fitted, name = context.open(train, context.train), type(evaluator).__name__
    require(fitted is not None, f"{name}.train", train, "a source, or a run with data.train")
    for labelled in (fitted, source):
        check_labels(evaluator, labelled)
    require(fitted.classes == source.classes, f"{name}.train", fitted.name,
            f"a source with the classes of {source.name!r}")


def train_and_test(evaluator: Evaluator, train: str | None, context: EvalContext, source: Source
                   ) -> tuple[Labelled, Labelled]:
    """Return the features to fit on, of `train` or else `data.train`, and those to measure on, of `source`."""
    return tuple(_features(evaluator, context, part) for part in (context.open(train, context.train), source))


def _features(evaluator: Evaluator, context: EvalContext, source: Source) -> Labelled:
    result, batch = concatenate(context.predictions(evaluator, ("features",), context.batches(evaluator, source)))
    return result["features"], batch["label"]
