"""Linear probe: logistic regression by L-BFGS on frozen features (CLIP, arXiv:2103.00020, appendix A.3)."""

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
class LinearProbe(Evaluator):
    """Measures `probe_top1`; NaN if the features are not finite."""

    train: str | None = None
    """Source that the probe is fitted on; None: `data.train`."""
    c: tuple[float, ...] = (0.316,)
    """Inverse strength of the L2 penalty; of several, the best on a fifth of the training data."""
    max_iter: int = 1000
    """Most L-BFGS iterations."""
    layer: int | None = None
    """Layer whose features are used, counted from 0; None: the task's own choice."""
    shots: int | None = None
    """Images per class that the probe is fitted on, drawn at random; None: all."""
    seed: int = 0
    """Seed of that draw."""
    metric_names: ClassVar = ("probe_top1",)
    needs: ClassVar = ("embeds images",)

    def __post_init__(self):
        """Check ranges."""
        super().__post_init__()
        require(len(self.c) > 0 and min(self.c) > 0, "evals.c", self.c, "one positive number or more")
        require(self.shots is None or self.shots > 0, "evals.shots", self.shots, "a positive number, or None")
        require(self.max_iter > 0, "evals.max_iter", self.max_iter, "a positive number")

    def validate(self, context: EvalContext, source: Source) -> None:
        """Raise `ConfigError` if the two sources do not have the same labels."""
        check_train(self, self.train, context, source)
        check_layer(self, self.layer, context)

    def measure(self, context: EvalContext, source: Source) -> tuple[float, ...]:
        """Return the accuracy."""
        train, (x, y), records = train_and_test(self, self.train, context, source, self.layer, self.shots, self.seed)
        predicted = probe_labels(*train, x, c=self.c, max_iter=self.max_iter)
        if predicted is None:
            return (float("nan"),)
        add_predictions(context, source, *self.metric_names, records, y, predicted)
        return (float(np.mean(predicted == y)),)


def probe(train_x: np.ndarray, train_y: np.ndarray, x: np.ndarray, y: np.ndarray, *, c: tuple[float, ...],
          max_iter: int) -> float:
    """Return the accuracy of `probe_labels` on features `x` [n, d] with labels `y` [n]."""
    predicted = probe_labels(train_x, train_y, x, c=c, max_iter=max_iter)
    return float("nan") if predicted is None else float(np.mean(predicted == y))


def probe_labels(train_x: np.ndarray, train_y: np.ndarray, x: np.ndarray, *, c: tuple[float, ...], max_iter: int
                 ) -> np.ndarray | None:
    """Return the labels of features `x` [n, d] by a regression fitted on the training data.

    None: the features are not finite.
    """
    require_extra("train", "the evaluator LinearProbe")
    from sklearn.linear_model import LogisticRegression  # takes a second, which only this evaluator needs
    from sklearn.model_selection import train_test_split

    if not (np.isfinite(train_x).all() and np.isfinite(x).all()):
        return None

    def fit(strength, features, labels):
        return LogisticRegression(C=strength, max_iter=max_iter).fit(features, labels)

    best = c[0]
    if len(c) > 1:
        fit_x, tune_x, fit_y, tune_y = train_test_split(train_x, train_y, test_size=0.2, random_state=0)
        best = max(c, key=lambda strength: fit(strength, fit_x, fit_y).score(tune_x, tune_y))
    return fit(best, train_x, train_y).predict(x)
