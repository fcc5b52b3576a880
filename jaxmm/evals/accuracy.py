"""Top-1 and top-5 accuracy and cross-entropy of a classifier."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from jaxmm.config import Evaluator
from jaxmm.data.base import Source
from jaxmm.evals.context import (
    Arrays,
    EvalContext,
    Outcomes,
    PredictionExample,
    check_labels,
    evenly_spaced,
    thumbnail,
)
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
        if context.labels is not None or context.task.classes is not None:
            count = len(context.labels or ()) or context.task.classes
            require(len(source.classes) == count, "TopKAccuracy.source", source.name,
                    f"a source with the {count} classes of the model, not {len(source.classes)}")
            names = context.labels or source.classes
            require(names == source.classes or set(names) != set(source.classes), "TopKAccuracy.source", source.name,
                    f"the classes in the model's order: {', '.join(names[:5])}, ...")
        known = context.train.classes if context.train is not None and context.labels is None else None
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
        return score(logits, source, source.classes, context, self.examples, self.names(source))


def ranks(source: Source) -> tuple[int, ...]:
    """Return the ranks k of the top-k accuracies that make sense for the classes of `source`."""
    return (1, 5) if len(source.classes) > 5 else (1,)


def score(logits: Iterable[tuple[np.ndarray, Arrays]], source: Source, classes: tuple[str, ...],
          context: EvalContext, examples: int, names: tuple[str, ...]) -> tuple[float, ...]:
    """Return the top-k accuracy for each of `ranks`, then the mean cross-entropy.

    `logits` are pairs of logits [b, classes] and their batch. Examples for the report, and under `names` the values of
    every example, are added to `context`.
    """
    shown = set(evenly_spaced(len(source), examples).tolist()) if examples else set()
    ks = ranks(source)
    count, loss, correct = 0, 0.0, dict.fromkeys(ks, 0.0)
    parts = []
    for values, batch in logits:
        labels, width, n = batch["label"], values.shape[1], len(values)
        if not n:
            continue
        require(labels.max() < width, "label", int(labels.max()),
                f"0 to {width - 1}: the model has {width} classes ({source.name})")
        values = values.astype(np.float64)
        log_p = _log_softmax(values)
        own = np.take_along_axis(log_p, labels[:, None], axis=1)
        loss -= own.sum()
        parts.append((batch["index"], labels, label_ranks(values, labels), values.argmax(axis=1), -own[:, 0]))
        for k, share in accuracy(values, labels, ks).items():
            correct[k] += share * n
        count += n
        for row, index in enumerate(batch["index"].tolist()):
            if index in shown:
                context.examples.append(_example(source, index, log_p[row], int(labels[row]), classes))
    index, labels, rank, best, losses = map(np.concatenate, zip(*parts, strict=True))
    values = dict(zip(names, (*(rank < k for k in ks), losses), strict=False))
    context.outcomes.append(Outcomes(values=values, index=index, labels=labels, describe=lambda row: (
        _name(classes, int(labels[row])), _name(classes, int(best[row])))))
    return (*(correct[k] / count for k in ks), loss / count)


def accuracy(scores: np.ndarray, labels: np.ndarray, ks: tuple[int, ...]) -> dict[int, float]:
    """Return for each k the share of rows of `scores` [n, classes] whose label is among the k highest.

    See `label_ranks`.
    """
    above = label_ranks(scores, labels)
    return {k: float(np.mean(above < k)) for k in ks}


def label_ranks(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return how many classes score at least as high as the label, for each row of `scores` [n, classes].

    A tie counts against the label. A label whose score is not finite ranks behind all classes.
    """
    own = np.take_along_axis(scores, labels[:, None], axis=1)
    above = (~(scores < own)).sum(axis=1) - 1
    return np.where(np.isfinite(own[:, 0]), above, scores.shape[1])


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


def _example(source: Source, index: int, log_p: np.ndarray, label: int, classes: tuple[str, ...]
             ) -> PredictionExample:
    best = np.argsort(-log_p, kind="stable")[:3]
    return PredictionExample(image=thumbnail(source, index), truth=_name(classes, label),
                             predictions=tuple((_name(classes, int(i)), float(np.exp(log_p[i]))) for i in best))


def _name(classes: tuple[str, ...], label: int) -> str:
    return classes[label] if label < len(classes) else f"class {label}"
