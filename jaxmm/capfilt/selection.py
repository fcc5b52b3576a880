"""The third stage: which texts stay (Li et al. 2022, section 3.3). No model is needed: scores are there."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from jaxmm.capfilt.tables import Texts
from jaxmm.validation import check_types, require

REASONS = {
    "human": "human texts are not filtered",
    "good": "its score is high enough",
    "low": "its score is too low",
    "not best": "others of its picture score higher",
    "repeated": "its picture has it already",
    "origin": "texts of its origin are not wanted",
}
"""Why a text stays or goes."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Which texts stay. Of a picture all, some or none may; a picture without texts goes. Human texts always stay."""

    score: Literal["itm", "itc"] = "itm"
    """itm: the probability that text and picture belong together; itc: their cosine."""
    threshold: float | None = 0.5
    """Least score of what stays; the authors' is 0.5. None: any."""
    quantile: float | None = None
    """In place of `threshold`: this share of all texts goes, those with the lowest scores."""
    best: int | None = None
    """Of each picture so many of those that are left, the highest scores first; None: all."""
    origins: tuple[Literal["web", "synthetic"], ...] = ("web", "synthetic")
    """Texts that may stay."""

    def __post_init__(self):
        """Checks ranges."""
        check_types(self, "rule")
        require(self.quantile is None or 0 <= self.quantile < 1, "rule.quantile", self.quantile,
                "0 or more, below 1, or None")
        require(self.best is None or self.best > 0, "rule.best", self.best, "a positive number or None")
        require(len(set(self.origins)) == len(self.origins) > 0, "rule.origins", self.origins,
                "web, synthetic, or both")


def cutoff(rule: Rule, shards: Sequence[Texts]) -> float | None:
    """The least score of what stays, from the texts of all shards."""
    if rule.quantile is None:
        return rule.threshold
    scores = [each[rule.score][_wanted(rule, each)] for each in shards]
    scores = np.concatenate(scores) if scores else np.zeros(0)
    scores = scores[np.isfinite(scores)]
    return float(np.quantile(scores, rule.quantile)) if len(scores) else None


def select_texts(texts: Texts, rule: Rule, least: float | None) -> Texts:
    """`texts` with two columns more: `kept`, and `why`, a key of `REASONS`.

    A text that the filter did not score stays only where no score is asked for. Among equal scores the first stays.
    """
    origin, score = texts["origin"], texts[rule.score]
    why = np.full(len(texts), "good", object)
    if least is not None:
        why[~(score >= least)] = "low"
    why[~_wanted(rule, texts)] = "origin"
    seen: set[tuple[int, str]] = set()
    for i, each in enumerate(zip(texts.columns["record"], texts.columns["text"], strict=True)):
        if why[i] == "good" and each in seen:
            why[i] = "repeated"
        elif why[i] == "good":
            seen.add(each)
    if rule.best is not None:
        order = np.lexsort((-np.nan_to_num(score, nan=-np.inf), texts["record"]))
        order = order[why[order] == "good"]
        record = texts["record"][order]
        place = np.arange(len(order)) - np.searchsorted(record, record)
        why[order[place >= rule.best]] = "not best"
    why[origin == "human"] = "human"
    kept = (why == "good") | (why == "human")
    return Texts({**texts.columns, "kept": kept, "why": why.tolist()}, texts.pictures, texts.bad, texts.examples)


def _wanted(rule: Rule, texts: Texts) -> np.ndarray:
    return np.isin(texts["origin"], rule.origins)
