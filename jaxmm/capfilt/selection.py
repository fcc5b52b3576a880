"""The third stage: select the texts that stay, by their scores (Li et al. 2022, section 3.3). No model is needed."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
from jaxtyping import Bool

from jaxmm.capfilt.formulas import Formula, Quantile, parse
from jaxmm.capfilt.tables import Texts
from jaxmm.validation import BELOW_ONE, POSITIVE, UP_TO_ONE, check_types, require

REASONS = {
    "human": "human texts are not filtered",
    "good": "its score is high enough",
    "low": "its score is too low",
    "not best": "others of its image score higher",
    "repeated": "its image has it already",
    "frequent": "it scores higher at as many other images as may have it",
    "near duplicate": "its image is nearly the same as another one",
    "origin": "texts of its origin are not wanted",
}
"""Reasons why a text stays or goes."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Rule of which texts stay. Human captions always do; an image that keeps no text is dropped."""

    score: str = "itm"
    """Score that `threshold`, `quantile`, `best` and `repeats` read. itm: the probability that text and image belong
    together; itc: their cosine; or the name of another filter's score."""
    threshold: float | None = 0.5
    """Lowest score that stays; the authors' is 0.5. None: any."""
    quantile: Annotated[float | None, BELOW_ONE] = None
    """Share of all texts that goes, those with the lowest scores; takes the place of `threshold`."""
    formula: str | None = None
    """Condition over scores for a text to stay, such as `itm > 0.5 or clip > quantile(clip, 0.7)`; takes the place of
    `threshold` and `quantile`. It may have comparisons, and, or, arithmetic, and quantiles over all texts."""
    best: Annotated[int | None, POSITIVE] = None
    """Most texts per image, those with the highest scores; None: all."""
    repeats: Annotated[int | None, POSITIVE] = None
    """Most images that keep the same text, those where it scores highest; None: any number."""
    near_duplicates: Annotated[float | None, UP_TO_ONE] = None
    """Cosine of the embeddings of two images from which on they are near-duplicates, such as 0.96; None: none are."""
    group: bool = False
    """True: near-duplicates keep their texts and count as the same image. False: the first one does, or one with human
    captions, and the others are dropped."""
    origins: tuple[Literal["web", "synthetic"], ...] = ("web", "synthetic")
    """Origins of texts that may stay."""

    def __post_init__(self):
        """Check the origins."""
        check_types(self, "rule")
        require(len(set(self.origins)) == len(self.origins) > 0, "rule.origins", self.origins,
                "web, synthetic, or both")

    @property
    def reads_score(self) -> bool:
        """True if the score called `score` matters."""
        filters = self.formula is None and (self.quantile is not None or self.threshold is not None)
        return filters or self.best is not None or self.repeats is not None

    def check(self, scores: Sequence[str]) -> None:
        """Raise `ConfigError` if the rule reads a score that is not among `scores`."""
        require(not self.reads_score or self.score in scores, "rule.score", self.score, f"one of {', '.join(scores)}")
        if self.formula is not None:
            parse(self.formula, scores, "rule.formula")


@dataclass(frozen=True)
class Limits:
    """Values of a rule that come from the texts of all shards."""

    least: float | None
    """Lowest score that stays; None: any."""
    formula: Formula | None = None
    quantiles: Mapping[Quantile, float] = field(default_factory=dict)
    """Values of the quantiles that the formula reads."""


def limits(rule: Rule, shards: Sequence[Texts], scores: Sequence[str]) -> Limits:
    """Return the limits of `rule` for texts with `scores`, from the texts of all shards."""
    formula = None if rule.formula is None else parse(rule.formula, scores, "rule.formula")
    if formula is None:
        return Limits(rule.threshold if rule.quantile is None else _quantile(rule, shards, rule.score, rule.quantile))
    values = {(name, share): _quantile(rule, shards, name, share) for name, share in sorted(formula.quantiles)}
    return Limits(None, formula, {key: np.nan if value is None else value for key, value in values.items()})


def _quantile(rule: Rule, shards: Sequence[Texts], name: str, share: float) -> float | None:
    """Return the value of the score `name` that a share of the texts that may stay is below; None without texts."""
    scores = [texts[name][_is_wanted(rule, texts)] for texts in shards]
    scores = np.concatenate(scores) if scores else np.zeros(0)
    scores = scores[np.isfinite(scores)]
    return float(np.quantile(scores, share)) if len(scores) else None


def select_texts(
    texts: Texts, rule: Rule, limits: Limits, near_duplicate: Bool[np.ndarray, " n"] | None = None,
    frequent: Sequence[int] = (),
) -> Texts:
    """Return `texts` with two more columns: `kept`, and `why`, a key of `REASONS`.

    A text without a score stays only if there is no limit. Among equal scores the first stays. `near_duplicate` is True
    for texts of images that are dropped as such, and `frequent` has the rows that `frequent_rows` returned.
    """
    origin = texts["origin"]
    why = np.full(len(texts), "good", object)
    if limits.formula is not None:
        scores = {name: texts[name] for name in texts.columns if name in limits.formula.names}
        why[~limits.formula(scores, limits.quantiles)] = "low"
    elif limits.least is not None:
        why[~(texts[rule.score] >= limits.least)] = "low"
    if near_duplicate is not None:
        why[near_duplicate] = "near duplicate"
    why[~_is_wanted(rule, texts)] = "origin"
    kept_texts: set[tuple[int, str]] = set()
    for i, text in enumerate(zip(texts.columns["record"], texts.columns["text"], strict=True)):
        if why[i] == "good" and text in kept_texts:
            why[i] = "repeated"
        elif why[i] == "good":
            kept_texts.add(text)
    if rule.best is not None:
        order = np.lexsort((-_ranked(texts, rule), texts["record"]))
        order = order[why[order] == "good"]
        record = texts["record"][order]
        place = np.arange(len(order)) - np.searchsorted(record, record)
        why[order[place >= rule.best]] = "not best"
    why[np.asarray(frequent, int)] = "frequent"
    why[origin == "human"] = "human"
    kept = (why == "good") | (why == "human")
    return Texts({**texts.columns, "kept": kept, "why": why.tolist()}, texts.images, texts.bad, texts.examples)


def frequent_rows(selected: Sequence[Texts], rule: Rule) -> list[list[int]]:
    """Return the rows of each shard whose text stays at `rule.repeats` images, of all shards, where it scores higher.

    Texts are the same whatever their case. Among equal scores the first stays.
    """
    places: dict[str, list[tuple[float, int, int]]] = defaultdict(list)
    for shard, texts in enumerate(selected):
        scores = _ranked(texts, rule)
        for row in np.flatnonzero(np.asarray(texts.columns["why"], object) == "good").tolist():
            places[texts.columns["text"][row].lower()].append((-float(scores[row]), shard, row))
    rows: list[list[int]] = [[] for _ in selected]
    for ranked in places.values():
        for _, shard, row in sorted(ranked)[rule.repeats:]:
            rows[shard].append(row)
    return [sorted(numbers) for numbers in rows]


def _ranked(texts: Texts, rule: Rule) -> np.ndarray:
    return np.nan_to_num(texts[rule.score], nan=-np.inf)


def _is_wanted(rule: Rule, texts: Texts) -> Any:
    return np.isin(texts["origin"], rule.origins)
