"""Linear probe: logistic regression by L-BFGS on frozen features (CLIP, arXiv:2103.00020, appendix A.3)."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from jaxmm.config import Evaluator, require
from jaxmm.data.base import Source
from jaxmm.evals.context import EvalContext, check_features, frozen_features


@dataclass(frozen=True, kw_only=True)
class LinearProbe(Evaluator):
    """Yields `probe_top1`; NaN where the features are not finite."""

    train: str | None = None
    """What the probe is fitted on; None: `data.train`."""
    c: tuple[float, ...] = (0.316,)
    """Inverse strength of the L2 penalty; of several, the best on a fifth of the training features."""
    max_iter: int = 1000
    """L-BFGS iterations at most."""

    def __post_init__(self):
        """Checks ranges."""
        super().__post_init__()
        require(len(self.c) > 0 and min(self.c) > 0, "evals.c", self.c, "one positive number or more")
        require(self.max_iter > 0, "evals.max_iter", self.max_iter, "a positive number")

    def check(self, context: EvalContext) -> tuple[Source, Source]:
        """The sources fitted and measured on; raises `ConfigError` where this cannot run."""
        return check_features(self, self.train, context)

    def metrics(self, context: EvalContext) -> tuple[str, ...]:
        """The names that `run` yields."""
        return (f"{self.prefix}/probe_top1",)

    def run(self, context: EvalContext) -> Iterator[tuple[str, float]]:
        """Yields metric names and values."""
        train, held_out = (frozen_features(self, source, context) for source in self.check(context))
        yield f"{self.prefix}/probe_top1", probe(*train, *held_out, c=self.c, max_iter=self.max_iter)


def probe(train_x: np.ndarray, train_y: np.ndarray, x: np.ndarray, y: np.ndarray, *, c: tuple[float, ...],
          max_iter: int) -> float:
    """Accuracy on features `x` [n, d] with labels `y` [n] of a regression fitted on `train_x`, `train_y`."""
    from sklearn.linear_model import LogisticRegression  # a second of import that the other evaluations do without
    from sklearn.model_selection import train_test_split

    if not (np.isfinite(train_x).all() and np.isfinite(x).all()):
        return float("nan")

    def fit(strength, features, labels):
        return LogisticRegression(C=strength, max_iter=max_iter).fit(features, labels)

    best = c[0]
    if len(c) > 1:
        fit_x, tune_x, fit_y, tune_y = train_test_split(train_x, train_y, test_size=0.2, random_state=0)
        best = max(c, key=lambda strength: fit(strength, fit_x, fit_y).score(tune_x, tune_y))
    return float(fit(best, train_x, train_y).score(x, y))
