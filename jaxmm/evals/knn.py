"""k-nearest-neighbour classification on frozen features, votes weighted as in DINO (arXiv:2104.14294)."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from jaxmm.config import Evaluator
from jaxmm.data.base import Source
from jaxmm.evals.context import EvalContext
from jaxmm.evals.frozen_features import add_predictions, check_layer, check_train, train_and_test
from jaxmm.optional import require_extra
from jaxmm.validation import require


@dataclass(frozen=True, kw_only=True)
class KNN(Evaluator):
    """Measures `knn_top1`; NaN if the features are not finite."""

    train: str | None = None
    """Source of the neighbours; None: `data.train`."""
    k: int = 20
    """Neighbours that vote, by cosine similarity."""
    temperature: float = 0.07
    """A neighbour of similarity s votes with weight exp(s / temperature)."""
    layer: int | None = None
    """Layer whose features are used, counted from 0; None: the task's own choice."""
    metric_names: ClassVar = ("knn_top1",)
    needs: ClassVar = ("embeds images",)

    def __post_init__(self):
        """Check ranges."""
        super().__post_init__()
        require(self.k > 0, "evals.k", self.k, "a positive number")
        require(self.temperature > 0, "evals.temperature", self.temperature, "a positive number")

    def validate(self, context: EvalContext, source: Source) -> None:
        """Raise `ConfigError` if the two sources do not have the same labels."""
        check_train(self, self.train, context, source)
        check_layer(self, self.layer, context)

    def measure(self, context: EvalContext, source: Source) -> tuple[float, ...]:
        """Return the accuracy."""
        train, (x, y), records = train_and_test(self, self.train, context, source, self.layer)
        predicted = knn_labels(*train, x, k=self.k, temperature=self.temperature)
        if predicted is None:
            return (float("nan"),)
        add_predictions(context, source, *self.metric_names, records, y, predicted)
        return (float(np.mean(predicted == y)),)


def knn(train_x: np.ndarray, train_y: np.ndarray, x: np.ndarray, y: np.ndarray, *, k: int, temperature: float
        ) -> float:
    """Return the accuracy of `knn_labels` on features `x` [n, d] with labels `y` [n]."""
    predicted = knn_labels(train_x, train_y, x, k=k, temperature=temperature)
    return float("nan") if predicted is None else float(np.mean(predicted == y))


def knn_labels(train_x: np.ndarray, train_y: np.ndarray, x: np.ndarray, *, k: int, temperature: float
               ) -> np.ndarray | None:
    """Return the labels of features `x` [n, d], by votes of the k nearest of `train_x`; None: they are not finite."""
    require_extra("train", "the evaluator KNN")
    from sklearn.neighbors import KNeighborsClassifier  # takes a second, which only this evaluator needs

    if not (np.isfinite(train_x).all() and np.isfinite(x).all()):
        return None
    voters = KNeighborsClassifier(min(k, len(train_x)), metric="cosine", algorithm="brute",
                                  weights=lambda distance: np.exp(-distance / temperature))
    return voters.fit(train_x, train_y).predict(x)
