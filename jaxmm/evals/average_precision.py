"""Average precision of classes of which an image may have several, as CLIP_benchmark measures it on VOC2007."""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Bool, Float

from jaxmm.data.base import Source
from jaxmm.evals.context import Arrays, EvalContext, Outcomes


def average_precisions(scores: Float[np.ndarray, "n c"], truth: Bool[np.ndarray, "n c"]) -> Float[np.ndarray, " c"]:
    """Return for each class the mean, over its images, of the precision among all that score as high or higher.

    An image without the class that scores the same ranks before it. A class without images has 0.
    """
    order = np.lexsort((truth, -scores), axis=0)
    hits = np.take_along_axis(truth, order, axis=0)
    precision = hits.cumsum(axis=0) / np.arange(1, len(hits) + 1)[:, None]
    return (precision * hits).sum(axis=0) / np.maximum(hits.sum(axis=0), 1)


def score_tags(logits: Iterable[tuple[np.ndarray, Arrays]], source: Source, names: tuple[str, ...],
               context: EvalContext) -> float:
    """Return the mean over the classes of their average precision; `logits` are pairs of logits [b c] and batch.

    The average precision of every class that occurs is added to `context`.
    """
    parts = [(values, batch["index"]) for values, batch in logits]
    scores, index = (np.concatenate(part) for part in zip(*parts, strict=True))
    truth = np.zeros(scores.shape, bool)
    for row, record in enumerate(index.tolist()):
        truth[row, list(source.tags_of(record))] = True
    precisions = average_precisions(scores, truth)
    context.outcomes.append(Outcomes(
        values={}, index=index, describe=lambda row: (
            ", ".join(names[i] for i in np.flatnonzero(truth[row])), names[int(scores[row].argmax())]),
        per_class={names[i]: float(precisions[i]) for i in np.flatnonzero(truth.any(axis=0))}))
    return float(precisions.mean())
