import sys
from dataclasses import replace

import numpy as np
import pytest

from benchmarks import generate, plan, reranking
from benchmarks.common import Rounds, Worker
from benchmarks.sides import Case
from tests.planning.test_plan import planned

SLEEPER = """
from benchmarks.common import serve
import itertools
paces = itertools.chain({paces}, itertools.repeat(1.0))
serve({{"check": [{value}]}}, {{"run": lambda: {{"s": {value}}}, "pace": lambda: {{"s": next(paces)}}}})
"""


def worker(value, paces=()):
    return Worker([sys.executable, "-c", SLEEPER.format(value=value, paces=list(paces))])


def test_rounds_on_a_slow_machine_do_not_count():
    """The pace runs before the first round and after each: the second ends slow here, so the third starts slow."""
    workers = {"ours": worker(2.0, [1.0, 1.02, 1.5, 1.01, 1.0]), "theirs": worker(3.0)}
    rounds = Rounds(workers, workers["ours"], tolerance=0.05)
    rounds.measure(2, most=10)
    assert [pace for pace, _ in rounds.rounds] == [1.02, 1.5, 1.5, 1.01]
    assert len(rounds.kept()) == 2
    assert rounds.median("ours") == 2.0 and rounds.median("theirs") == 3.0
    for w in workers.values():
        w.close()


def test_a_worker_that_dies_says_why():
    with pytest.raises(SystemExit, match="ZeroDivisionError"):
        Worker([sys.executable, "-c", "1 / 0"])


def test_flop():
    """ViT-B/16 is known for 17.58 billion multiply-adds a picture."""
    case = Case("", "vit:B/16", False, 2, "float32", "none")
    assert case.flop == pytest.approx(2 * 2 * 17.58e9, rel=1e-3)
    train = Case("", "clip:ViT-B-32", True, 1, "float32", "none")
    assert train.flop == pytest.approx(3 * 14.78e9, rel=0.01)  # open_clip's model profile


def test_a_line_through_times():
    """Least squares by hand: the last time is 0.4 off a line of slope 2, which turns it a little."""
    slope, off = generate.line((0, 1, 2, 3), [1.0, 3.0, 5.0, 7.4])
    assert slope == pytest.approx(2 + 0.4 * 1.5 / 5) and off == pytest.approx(0.16)


@pytest.mark.parametrize("request_, ours, theirs, same", [
    ("greedy 5", {"tokens": [[3, 4]]}, {"tokens": [[3, 4]]}, True),
    ("greedy 5", {"tokens": [[3, 4]]}, {"tokens": [[3, 5]]}, False),
    ("encode", {"norm": 2.0}, {"norm": 2.00001}, True), ("encode", {"norm": 2.0}, {"norm": 2.1}, False)])
def test_sides_that_differ_are_not_timed(request_, ours, theirs, same):
    class Answering:
        def __init__(self, answer):
            self.answer = answer

        def ask(self, request):
            assert request == request_
            return self.answer

    sides = {"ours": Answering(ours), "theirs": Answering(theirs)}
    if same:
        generate.agreed(sides, request_)
    else:
        with pytest.raises(SystemExit, match=f"{request_}: the sides differ; nothing was timed"):
            generate.agreed(sides, request_)


def test_candidates_are_different_texts_that_end():
    image, tokens, chosen = reranking.work(8)
    assert image.shape == (8, 384, 384, 3) and chosen.shape == (8, 16)
    assert all(len(set(row)) == 16 for row in chosen.tolist())
    lengths = (tokens != 0).sum(axis=1)
    assert lengths.min() >= 8 and lengths.max() <= 20
    assert (tokens[np.arange(len(tokens)), lengths - 1] == 102).all() and (tokens[:, 0] == 30_523).all()


def test_plans_in_headers_and_growth(tmp_path, monkeypatch):
    text = 'r"""A recipe.\n\n    python run_train.py\n\nTold.\n"""\n\nimport this\n'
    (tmp_path / "clip_l14.py").write_text(text)
    monkeypatch.setattr(plan, "CONFIGS", tmp_path)
    monkeypatch.setattr(plan, "load_recipe", lambda path: None)
    monkeypatch.setattr(plan, "open_topology", lambda name: None)
    for peak in (3, 4):      # the second takes the first one's place
        made = planned(0.5, peak * 2**30, batch=1000)
        made = replace(made, hbm_bytes=16 * 2**30, estimated_utilization=0.25)
        monkeypatch.setattr(plan, "planned", lambda config, topology, made=made: made)
        plan.write_header("clip_l14", "v5e:2x2")
    assert (tmp_path / "clip_l14.py").read_text() == text.replace("Told.\n", (
        "Told.\n\nPlan on v5e:2x2 (1 chips): fits in 4.00 GiB of 16.00 GiB a chip, 2,000 pictures/s and 25% of peak by "
        "XLA's estimate.\n"))
    sizes = [replace(made, topology=f"v5e:{chips}", chips=chips, peak_bytes=peak)
             for chips, peak in ((16, 2**30), (256, 2**30 + 2**26))]
    assert plan.scaling("clip_l14", sizes) == ["- clip_l14: 1.00 GiB a chip on 16, 1.06 on 256 (+6.2%)"]
    assert plan.scaling("clip_l14", sizes[:1]) == []
    line = plan.line(plan.Row("clip_l14", "128 a chip", None, "v5e:2x2"), replace(made, fits=False, peak_bytes=2**35))
    assert "no, 16.00 GiB short" in line and "500 ms, 25%" in line


def test_plans_of_some_recipes_leave_those_of_others(tmp_path, monkeypatch):
    sizes = {"v5e:16": 16, "v5e:256": 256}
    monkeypatch.setattr(plan, "rows", lambda only: [
        plan.Row(name, "1 a chip", None, topology) for name in ("clip_b16", "clip_l14") for topology in sizes
        if name in only or not only])
    monkeypatch.setattr(plan, "open_topology", lambda name: name)
    for first, options in ((1, []), (2, ["--only", "clip_l14"])):
        monkeypatch.setattr(plan, "planned", lambda config, topology, first=first: replace(
            planned(None, first * 2**30), topology=topology, chips=sizes[topology]))
        monkeypatch.setattr("sys.argv", ["plan", "--out", str(tmp_path / "plan.md"), *options])
        plan.main()
    rows = [each.split("|") for each in (tmp_path / "plan.md").read_text().splitlines() if each.startswith("| clip")]
    assert [(row[1].strip(), row[7].strip()) for row in rows] == [("clip_b16", "1.00")] * 2 + [("clip_l14", "2.00")] * 2
    assert [each for each in (tmp_path / "plan.md").read_text().splitlines() if each.startswith("- ")] == [
        f"- {name}: {peak} GiB a chip on 16, {peak} on 256 (+0.0%)"
        for name, peak in (("clip_b16", "1.00"), ("clip_l14", "2.00"))]
