"""The third stage: select the texts that stay, by their scores (Li et al. 2022, section 3.3). No model is needed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np

from jaxmm.capfilt.tables import Texts
from jaxmm.validation import BELOW_ONE, POSITIVE, check_types, require

REASONS = {
    "human": "human texts are not filtered",
    "good": "its score is high enough",
    "low": "its score is too low",
    "not best": "others of its image score higher",
    "repeated": "its image has it already",
    "origin": "texts of its origin are not wanted",
}
"""Reasons why a text stays or goes."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Rule of which texts stay. Human captions always do; an image that keeps no text is dropped."""

    score: Literal["itm", "itc"] = "itm"
    """itm: the probability that text and image belong together; itc: their cosine."""
    threshold: float | None = 0.5
    """Lowest score that stays; the authors' is 0.5. None: any."""
    quantile: Annotated[float | None, BELOW_ONE] = None
    """Share of all texts that goes, those with the lowest scores; takes the place of `threshold`."""
    best: Annotated[int | None, POSITIVE] = None
    """Most texts per image, those with the highest scores; None: all."""
    origins: tuple[Literal["web", "synthetic"], ...] = ("web", "synthetic")
    """Origins of texts that may stay."""

    def __post_init__(self):
        """Check the origins."""
        check_types(self, "rule")
        require(len(set(self.origins)) == len(self.origins) > 0, "rule.origins", self.origins,
                "web, synthetic, or both")


def cutoff(rule: Rule, shards: Sequence[Texts]) -> float | None:
    """Return the lowest score that stays, from the texts of all shards."""
    if rule.quantile is None:
        return rule.threshold
    scores = [texts[rule.score][_is_wanted(rule, texts)] for texts in shards]
    scores = np.concatenate(scores) if scores else np.zeros(0)
    scores = scores[np.isfinite(scores)]
    return float(np.quantile(scores, rule.quantile)) if len(scores) else None


def select_texts(texts: Texts, rule: Rule, least: float | None) -> Texts:
    """Return `texts` with two more columns: `kept`, and `why`, a key of `REASONS`.

    A text without a score stays only if `least` is None. Among equal scores the first stays.
    """
    origin, score = texts["origin"], texts[rule.score]
    why = np.full(len(texts), "good", object)
    if least is not None:
        why[~(score >= least)] = "low"
    why[~_is_wanted(rule, texts)] = "origin"
    kept_texts: set[tuple[int, str]] = set()
    for i, text in enumerate(zip(texts.columns["record"], texts.columns["text"], strict=True)):
        if why[i] == "good" and text in kept_texts:
            why[i] = "repeated"
        elif why[i] == "good":
            kept_texts.add(text)
    if rule.best is not None:
        order = np.lexsort((-np.nan_to_num(score, nan=-np.inf), texts["record"]))
        order = order[why[order] == "good"]
        record = texts["record"][order]
        place = np.arange(len(order)) - np.searchsorted(record, record)
        why[order[place >= rule.best]] = "not best"
    why[origin == "human"] = "human"
    kept = (why == "good") | (why == "human")
    return Texts({**texts.columns, "kept": kept, "why": why.tolist()}, texts.images, texts.bad, texts.examples)


def _is_wanted(rule: Rule, texts: Texts) -> np.ndarray:
    return np.isin(texts["origin"], rule.origins)
