"""Top-1 and top-5 accuracy and cross-entropy of a classifier."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from jaxmm.config import Evaluator
from jaxmm.data.base import Source
from jaxmm.evals.context import Arrays, EvalContext, PredictionExample, check_labels, evenly_spaced, thumbnail
from jaxmm.validation import require


@dataclass(frozen=True, kw_only=True)
class TopKAccuracy(Evaluator):
    """Measures `top1`, `loss` (mean cross-entropy, nats) and, with more than five classes, `top5`."""

    examples: int = 12
    """Images added to the report."""
    needs: ClassVar = ("classifies images or judges a text about several images",)

    def validate(self, context: EvalContext, source: Source) -> None:
        """Raise `ConfigError` if the source has no labels, or others than `data.train`."""
        check_labels(self, source)
        known = context.train.classes if context.train is not None else None
        require(known in (None, source.classes), "TopKAccuracy.source", source.name,
                f"a source with the classes of data.train: {known}")

    def names(self, source: Source) -> tuple[str, ...]:
        """Return the names of the metrics."""
        return (*(f"top{k}" for k in ranks(source)), "loss")

    def measure(self, context: EvalContext, source: Source) -> tuple[float, ...]:
        """Return the accuracies and the loss."""
        tokenizer = context.tokenizer if "text" in context.task.reads else None
        results = context.predictions(self, ("logits",), context.batches(self, source, tokenizer))
        logits = ((result["logits"], batch) for result, batch in results)
        return score(logits, source, source.classes, context, self.examples)


def ranks(source: Source) -> tuple[int, ...]:
    """Return the ranks k of the top-k accuracies that make sense for the classes of `source`."""
    return (1, 5) if len(source.classes) > 5 else (1,)


def score(logits: Iterable[tuple[np.ndarray, Arrays]], source: Source, classes: tuple[str, ...],
          context: EvalContext, examples: int) -> tuple[float, ...]:
    """Return the top-k accuracy for each of `ranks`, then the mean cross-entropy.

    `logits` are pairs of logits [b, classes] and their batch. Examples for the report are added to `context`.
    """
    shown = set(evenly_spaced(len(source), examples).tolist()) if examples else set()
    ks = ranks(source)
    count, loss, correct = 0, 0.0, dict.fromkeys(ks, 0.0)
    for values, batch in logits:
        labels, width, n = batch["label"], values.shape[1], len(values)
        if not n:
            continue
        require(labels.max() < width, "label", int(labels.max()),
                f"0 to {width - 1}: the model has {width} classes ({source.name})")
        values = values.astype(np.float64)
        log_p = _log_softmax(values)
        loss -= np.take_along_axis(log_p, labels[:, None], axis=1).sum()
        for k, share in accuracy(values, labels, ks).items():
            correct[k] += share * n
        count += n
        for row, index in enumerate(batch["index"].tolist()):
            if index in shown:
                context.examples.append(_example(source, index, log_p[row], int(labels[row]), classes))
    return (*(correct[k] / count for k in ks), loss / count)


def accuracy(scores: np.ndarray, labels: np.ndarray, ks: tuple[int, ...]) -> dict[int, float]:
    """Return for each k the share of rows of `scores` [n, classes] whose label is among the k highest.

    A tie counts against the label, and so does a label whose score is not finite.
    """
    own = np.take_along_axis(scores, labels[:, None], axis=1)
    above = (~(scores < own)).sum(axis=1) - 1
    above = np.where(np.isfinite(own[:, 0]), above, scores.shape[1])
    return {k: float(np.mean(above < k)) for k in ks}


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


def _example(source: Source, index: int, log_p: np.ndarray, label: int, classes: tuple[str, ...]
             ) -> PredictionExample:
    def name(i):
        return classes[i] if i < len(classes) else f"class {i}"

    best = np.argsort(-log_p, kind="stable")[:3]
    return PredictionExample(image=thumbnail(source, index), truth=name(label),
                             predictions=tuple((name(int(i)), float(np.exp(log_p[i]))) for i in best))
