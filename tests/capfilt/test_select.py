from collections import Counter

import numpy as np
import pytest

from jaxmm.capfilt import near_duplicates
from jaxmm.capfilt.selection import REASONS, Limits, Rule, frequent_rows, limits, select_texts
from jaxmm.capfilt.tables import SCORED, Texts
from jaxmm.validation import ConfigError

SCORES = ("itm", "itc")


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
        selected = select_texts(table, rule, Limits(rule.threshold))
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
    assert limits(rule, shards, SCORES).least == np.quantile(scores, 0.25)
    assert limits(Rule(threshold=0.7), shards, SCORES).least == 0.7
    assert limits(Rule(score="itc", quantile=0.5), [], SCORES).least is None


@pytest.mark.parametrize("formula, plain", [
    ("itm > 0.5 or itc > 0.7", lambda itm, itc, low: itm > 0.5 or itc > 0.7),
    ("itm >= 0.5 and 0.2 < itc <= 0.8", lambda itm, itc, low: itm >= 0.5 and 0.2 < itc <= 0.8),
    ("(2 * itm - itc / 4 > 0.9) or (itc + -0.1 >= .8)",
     lambda itm, itc, low: 2 * itm - itc / 4 > 0.9 or itc - 0.1 >= .8),
    ("itc < quantile(itc, 0.3)", lambda itm, itc, low: itc < low), ("itm / 0 < 1", lambda itm, itc, low: False)])
def test_a_formula_is_what_it_says(formula, plain):
    """Text by text in Python; a missing score makes a comparison false."""
    shards, rule = [texts(seed) for seed in range(3)], Rule(formula=formula, origins=("synthetic",))
    known = limits(rule, shards, SCORES)
    itc = np.concatenate([shard["itc"][shard["origin"] == "synthetic"] for shard in shards])
    low = np.quantile(itc[np.isfinite(itc)].astype(np.float64), 0.3)
    for shard in shards:
        selected = select_texts(shard, rule, known)
        rows = zip(*(shard[name].astype(np.float64) for name in SCORES), shard["origin"], selected.columns["why"],
                   strict=True)
        for itm, score, origin, why in rows:
            if origin == "synthetic":
                assert (why in ("good", "repeated")) == plain(itm, score, low)


@pytest.mark.parametrize("formula, reason", [
    ("clip > 0.3", "there is no score 'clip'"), ("itm", "'itm' is no comparison"), ("itm > 0.5 or itc", "'itc' is no"),
    ("itm == 0.5", "a comparison is one of"), ("not itm > 0.5", "'not itm > 0.5' is no comparison"),
    ("1 < 2", "it reads no score"), ("itm > 1e31", "a number is too large"), ("itm > True", "'True' is no score"),
    ("itm > '0.5'", "is no score, number"), ("itm ** 9 > 2", "is no score"), ("itm > (lambda: 1)()", "is no score"),
    ("itm.real > 0", "is no score"), ("itm[0] > 0", "is no score"),
    ("__import__('os').system('true') > 0", "is no score"), ("quantile(itm) > 0", "is no score"),
    ("itm > quantile(itm, 2)", "is no score"), ("max(itm, itc) > 0", "is no score"),
    ("itm > quantile(clip, 0.5)", "is no score"), ("itm >", "it cannot be parsed"), ("", "it cannot be parsed"),
    ("itm > 0; import os", "it cannot be parsed"), ("itm := 3 > 2", "it cannot be parsed"),
    ("(" * 400 + "itm > 0" + ")" * 400, "it cannot be parsed"), ("itm > 0 or " * 200 + "itm > 0", "more than 1000"),
    ("itm > 0\0", "it cannot be parsed")])
def test_other_formulas_are_refused_with_the_scores(formula, reason):
    with pytest.raises(ConfigError, match=r"rule\.formula is .*; expected comparisons of the scores itm, itc such as "
                                          r"itm > 0\.5, joined by and, or: ") as error:
        Rule(formula=formula).check(SCORES)
    assert reason in str(error.value)


def test_scores_that_do_not_exist():
    with pytest.raises(ConfigError, match=r"rule\.score is 'itm'; expected one of clip"):
        Rule().check(["clip"])
    for rule in (Rule(formula="clip > 0"), Rule(threshold=None), Rule(score="clip", best=1)):
        rule.check(["clip"])
    with pytest.raises(ConfigError, match=r"rule\.score is 'itm'; expected one of clip"):
        Rule(formula="clip > 0", best=1).check(["clip"])


def test_a_text_stays_at_so_many_images_only():
    """At those where it scores highest, over all shards, after what each image keeps."""
    shards, rule = [texts(seed) for seed in range(3)], Rule(threshold=0.3, best=2, repeats=4)
    before = [select_texts(shard, rule, Limits(0.3)) for shard in shards]
    rows = frequent_rows(before, rule)
    for text in ("t0", "t1", "t2"):
        places = [(-shard.columns["itm"][i], number, i) for number, shard in enumerate(before)
                  for i in range(len(shard)) if shard.columns["why"][i] == "good" and shard.columns["text"][i] == text]
        assert len(places) > 4
        assert sorted(places)[4:] == sorted((-before[n].columns["itm"][i], n, i) for n, numbers in enumerate(rows)
                                            for i in numbers if before[n].columns["text"][i] == text)
    after = [select_texts(shard, rule, Limits(0.3), frequent=numbers)
             for shard, numbers in zip(shards, rows, strict=True)]
    counts = Counter(text for shard in after for text, why in zip(shard.columns["text"], shard.columns["why"],
                                                                  strict=True) if why == "good")
    assert counts == {"t0": 4, "t1": 4, "t2": 4}
    assert {why for shard in after for why in shard.columns["why"]} >= {"frequent", "human"}


def test_near_duplicates_are_groups():
    """Groups of angles, also across blocks: 1 is near 0, and 2 near 1 but not near 0; 5 is near 3."""
    angles = np.radians([0, 5, 10, 90, 180, 92, 250])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1) * np.arange(1, 8)[:, None]
    for block in (2, 3, 2048):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(near_duplicates, "BLOCK", block)
            groups = near_duplicates.group_images(vectors, np.cos(np.radians(6)))
        same = groups[:, None] == groups[None]
        expected = np.eye(7, dtype=bool)
        for near in ((0, 1, 2), (3, 5)):
            expected[np.ix_(near, near)] = True
        np.testing.assert_array_equal(same, expected)
    first = near_duplicates.representatives(groups, np.array([0, 0, 1, 0, 0, 0, 0], bool))
    assert first.tolist() == [2, 2, 2, 3, 4, 3, 6]
    assert near_duplicates.representatives(groups, np.zeros(7, bool)).tolist() == [0, 0, 0, 3, 4, 3, 6]
    stored = near_duplicates.unpack([[row.astype(np.float16).tobytes() for row in vectors]])
    np.testing.assert_allclose(stored, vectors, rtol=1e-3, atol=1e-6)
    assert near_duplicates.unpack([]).shape == (0, 1)


@pytest.mark.parametrize("fields, message", [
    ({"quantile": 1.0}, "rule.quantile is 1.0; expected 0 or more, below 1"),
    ({"best": 0}, "rule.best is 0; expected a positive number"), ({"origins": ()}, "rule.origins")])
def test_rules_that_cannot_be(fields, message):
    with pytest.raises(ConfigError, match=message):
        Rule(**fields)
