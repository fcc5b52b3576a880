"""Top-1 and top-5 accuracy and cross-entropy of a classifier."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from jaxmm.config import Evaluator, require
from jaxmm.data.base import Source
from jaxmm.evals.context import (
    EvalContext,
    PredictionExample,
    accuracy,
    check,
    check_labels,
    chosen_weights,
    picture_batches,
    spread,
    thumbnail,
)
from jaxmm.inference.batching import outputs, padded_batch_size, predict_fn


@dataclass(frozen=True, kw_only=True)
class TopKAccuracy(Evaluator):
    """Yields `top1`, `loss` (mean cross-entropy, nats) and, with more than five classes, `top5`."""

    examples: int = 12
    """Pictures added to the report."""

    def check(self, context: EvalContext) -> Source:
        """The source measured on; raises `ConfigError` where this cannot run."""
        source = check(self, context, "logits")
        check_labels(self, source)
        known = context.train.classes if context.train is not None else None
        require(known in (None, source.classes), "Classification.source", source.name,
                f"a source with the classes of data.train: {known}")
        return source

    def metrics(self, context: EvalContext) -> tuple[str, ...]:
        """The names that `run` yields."""
        return tuple(f"{self.prefix}/{name}" for name in score_names(len(self.check(context).classes)))

    def run(self, context: EvalContext) -> Iterator[tuple[str, float]]:
        """Yields metric names and values."""
        source, params = self.check(context), chosen_weights(self, context)
        tokenizer = context.tokenizer if "text" in context.task.reads else None
        batches = picture_batches(source, context, padded_batch_size(self.batch_size, context.mesh), tokenizer)
        fn = predict_fn(context.task, ("logits",), context.mesh)
        logits = ((result["logits"], batch) for result, batch in outputs(fn, params, batches, context.mesh))
        for name, value in score(logits, source, source.classes, context, self.examples):
            yield f"{self.prefix}/{name}", value


def score_names(classes: int) -> tuple[str, ...]:
    """What `score` yields for this many classes."""
    return ("top1", "top5", "loss") if classes > 5 else ("top1", "loss")


def score(logits: Iterable[tuple[np.ndarray, dict]], source: Source, classes: tuple[str, ...],
          context: EvalContext, examples: int) -> Iterator[tuple[str, float]]:
    """`top1`, `top5` and `loss` over pairs of logits [b, classes] and their batch."""
    shown = set(spread(len(source), examples).tolist()) if examples else set()
    count, loss, right = 0, 0.0, {1: 0.0, 5: 0.0}
    width = 0
    for values, batch in logits:
        labels, width, n = batch["label"], values.shape[1], len(values)
        if not n:
            continue
        require(labels.max() < width, "label", int(labels.max()),
                f"0 to {width - 1}: the model tells {width} classes apart ({source.name})")
        values = values.astype(np.float64)
        log_p = _log_softmax(values)
        loss -= np.take_along_axis(log_p, labels[:, None], axis=1).sum()
        for k, share in accuracy(values, labels, (1, 5)).items():
            right[k] += share * n
        count += n
        for row, index in enumerate(batch["index"].tolist()):
            if index in shown:
                context.examples.append(_example(source, index, log_p[row], int(labels[row]), classes))
    yield "top1", right[1] / count
    if width > 5:
        yield "top5", right[5] / count
    yield "loss", float(loss / count)


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
