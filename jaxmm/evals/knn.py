"""k-nearest-neighbour classification on frozen features, votes weighted as in DINO (arXiv:2104.14294)."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from jaxmm.config import Evaluator, require
from jaxmm.data.base import Source
from jaxmm.evals.context import EvalContext, check_features, frozen_features


@dataclass(frozen=True, kw_only=True)
class KNN(Evaluator):
    """Yields `knn_top1`; NaN where the features are not finite."""

    train: str | None = None
    """Where the neighbours come from; None: `data.train`."""
    k: int = 20
    """Neighbours that vote, by cosine similarity."""
    temperature: float = 0.07
    """A neighbour of similarity s votes with weight exp(s / temperature)."""

    def __post_init__(self):
        """Checks ranges."""
        super().__post_init__()
        require(self.k > 0, "evals.k", self.k, "a positive number")
        require(self.temperature > 0, "evals.temperature", self.temperature, "a positive number")

    def check(self, context: EvalContext) -> tuple[Source, Source]:
        """The sources of the neighbours and of the queries; raises `ConfigError` where this cannot run."""
        return check_features(self, self.train, context)

    def metrics(self, context: EvalContext) -> tuple[str, ...]:
        """The names that `run` yields."""
        return (f"{self.prefix}/knn_top1",)

    def run(self, context: EvalContext) -> Iterator[tuple[str, float]]:
        """Yields metric names and values."""
        train, held_out = (frozen_features(self, source, context) for source in self.check(context))
        yield f"{self.prefix}/knn_top1", knn(*train, *held_out, k=self.k, temperature=self.temperature)


def knn(train_x: np.ndarray, train_y: np.ndarray, x: np.ndarray, y: np.ndarray, *, k: int, temperature: float
        ) -> float:
    """Accuracy on features `x` [n, d] with labels `y` [n], by votes of the k nearest of `train_x`."""
    from sklearn.neighbors import KNeighborsClassifier  # a second of import that the other evaluations do without

    if not (np.isfinite(train_x).all() and np.isfinite(x).all()):
        return float("nan")
    voters = KNeighborsClassifier(min(k, len(train_x)), metric="cosine", algorithm="brute",
                                  weights=lambda distance: np.exp(-distance / temperature))
    return float(voters.fit(train_x, train_y).score(x, y))
