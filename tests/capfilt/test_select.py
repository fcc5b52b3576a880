import numpy as np
import pytest

from jaxmm.capfilt.selection import REASONS, Rule, cutoff, select_texts
from jaxmm.capfilt.tables import SCORED, Texts
from jaxmm.validation import ConfigError


def texts(seed=0, images=23):
    """Return up to four texts per image, some of them the same, some without a score."""
    rng = np.random.default_rng(seed)
    record = np.sort(rng.integers(0, images, 61))
    columns = {name: [None] * len(record) for name in SCORED}
    columns |= {"record": record.tolist(), "key": [f"k{i}" for i in record],
                "text": [f"t{i}" for i in rng.integers(0, 3, len(record))],
                "origin": rng.choice(["web", "synthetic", "human"], len(record)).tolist(),
                "itm": rng.integers(0, 9, len(record)).astype(np.float32) / 8,
                "itc": np.where(rng.random(len(record)) < 0.2, np.nan, rng.random(len(record))).astype(np.float32)}
    return Texts(columns, images, {"empty": 2}, [("k9", "empty")])


def plain(table, rule, least):
    """Return the reasons of `select_texts`, one text after the other."""
    rows = [dict(zip(table.columns, row, strict=True)) for row in zip(*table.columns.values(), strict=True)]
    for i, row in enumerate(rows):
        score = row[rule.score]
        if row["origin"] == "human":
            row["why"] = "human"
        elif row["origin"] not in rule.origins:
            row["why"] = "origin"
        elif least is not None and not score >= least:
            row["why"] = "low"
        elif any(r["why"] == "good" and (r["record"], r["text"]) == (row["record"], row["text"]) for r in rows[:i]):
            row["why"] = "repeated"
        else:
            row["why"] = "good"
    if rule.best is not None:
        for record in {row["record"] for row in rows}:
            left = [row for row in rows if row["record"] == record and row["why"] == "good"]
            left.sort(key=lambda row: -row[rule.score] if row[rule.score] == row[rule.score] else np.inf)
            for row in left[rule.best:]:
                row["why"] = "not best"
    return [row["why"] for row in rows]


@pytest.mark.parametrize("rule", [
    Rule(), Rule(threshold=None), Rule(score="itc", threshold=0.3), Rule(best=1), Rule(best=2, threshold=None),
    Rule(origins=("synthetic",)), Rule(origins=("web",), best=1), Rule(score="itc", threshold=None, best=1)], ids=repr)
def test_it_is_what_the_rule_says(rule):
    reasons = set()
    for seed in range(5):
        table = texts(seed)
        selected = select_texts(table, rule, rule.threshold)
        assert selected.columns["why"] == plain(table, rule, rule.threshold)
        assert selected.columns["kept"].tolist() == [why in ("good", "human") for why in selected.columns["why"]]
        assert (selected.images, selected.bad, selected.examples) == (table.images, table.bad, table.examples)
        reasons |= set(selected.columns["why"])
    assert {"good", "human"} <= reasons <= set(REASONS)


def test_a_quantile_counts_the_texts_that_may_stay():
    shards = [texts(seed) for seed in range(3)]
    rule = Rule(quantile=0.25, origins=("web",))
    scores = [score for shard in shards for score, origin in zip(
        shard.columns["itm"], shard.columns["origin"], strict=True) if origin == "web"]
    assert cutoff(rule, shards) == np.quantile(scores, 0.25)
    assert cutoff(Rule(threshold=0.7), shards) == 0.7
    assert cutoff(Rule(score="itc", quantile=0.5), []) is None


@pytest.mark.parametrize("fields, message", [
    ({"quantile": 1.0}, "rule.quantile is 1.0; expected 0 or more, below 1"),
    ({"best": 0}, "rule.best is 0; expected a positive number"), ({"origins": ()}, "rule.origins")])
def test_rules_that_cannot_be(fields, message):
    with pytest.raises(ConfigError, match=message):
        Rule(**fields)
