import argparse
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest

from benchmarks import attention_against_convolution as arms
from benchmarks import capfilt_ablation, caption_generation, caption_mixing, igpt_small, pair_matching, pod_plans
from benchmarks.measure import Rounds, Worker
from benchmarks.train_step_sides import Case
from jaxmm.recipes import load_recipe
from tests.planning.test_plan import planned

SLEEPER = """
from benchmarks.measure import serve
import itertools
paces = itertools.chain({paces}, itertools.repeat(1.0))
serve({{"check": [{value}]}}, {{"run": lambda: {{"s": {value}}}, "pace": lambda: {{"s": next(paces)}}}})
"""


def worker(value, paces=()):
    return Worker([sys.executable, "-c", SLEEPER.format(value=value, paces=list(paces))])


def test_rounds_on_a_slow_machine_are_not_valid():
    """The pace runs before the first round and after every round: the second ends slow, so the third starts slow."""
    workers = {"ours": worker(2.0, [1.0, 1.02, 1.5, 1.01, 1.0]), "theirs": worker(3.0)}
    rounds = Rounds(workers, workers["ours"], tolerance=0.05)
    rounds.measure(2, max_rounds=10)
    assert [pace for pace, _ in rounds.rounds] == [1.02, 1.5, 1.5, 1.01]
    assert len(rounds.valid()) == 2
    assert rounds.median("ours") == 2.0 and rounds.median("theirs") == 3.0
    for w in workers.values():
        w.close()


def test_a_worker_that_dies_says_why():
    with pytest.raises(SystemExit, match="ZeroDivisionError"):
        Worker([sys.executable, "-c", "1 / 0"])


def test_flop():
    """ViT-B/16 needs 17.58 billion multiply-adds per image."""
    case = Case("", "vit:B/16", False, 2, "float32", "none")
    assert case.flop == pytest.approx(2 * 2 * 17.58e9, rel=1e-3)
    train = Case("", "clip:ViT-B-32", True, 1, "float32", "none")
    assert train.flop == pytest.approx(3 * 14.78e9, rel=0.01)  # open_clip's model profile


def test_arms_with_convolution_and_attention_are_of_one_size():
    """The layers differ by the positions of 9 heads, of 3 numbers each."""
    args = argparse.Namespace(width=24, depth=2, size=8)

    def count(arm):
        task = arms.task(arm, args).bind(image_size=8, classes=5, tokenizer=None)
        return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(task.init, jax.random.key(0))))

    assert count("quadratic") - count("convolution") == 2 * 9 * 3
    task = arms.task("convolution", args).bind(image_size=8, classes=5, tokenizer=None)
    image = jax.ShapeDtypeStruct((3, 8, 8, 3), np.uint8)
    logits = jax.eval_shape(lambda key, image: task.classifier.logits(task.init(key), {"image": image}),
                            jax.random.key(0), image)
    assert logits.shape == (3, 5)


def test_captioner_and_filter_learn_from_several_captions():
    config = capfilt_ablation.recipe(True, captions=4)
    assert [getattr(config, name).data.captions for name in ("pretrain", "captioner", "filter")] == [1, 4, 4]
    assert capfilt_ablation.recipe(False) == load_recipe(capfilt_ablation.RECIPE)


def test_a_share_is_the_weight_of_synthetic_captions():
    weights = [caption_mixing.clip_recipe(share, "tfds:a:web", 7, 2) for share in (0.0, 0.8, 1.0)]
    assert [run.data.origins for run in weights] == [
        (("web", 1.0),), (("web", pytest.approx(0.2)), ("synthetic", 0.8)), (("synthetic", 1.0),)]
    assert {(run.data.train, run.seed, run.steps) for run in weights} == {("tfds:a:web", 2, 7)}


def test_a_line_through_times():
    """Least squares by hand: the last time is 0.4 off a line of slope 2."""
    slope, off = caption_generation.line((0, 1, 2, 3), [1.0, 3.0, 5.0, 7.4])
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
        caption_generation.agreed(sides, request_)
    else:
        with pytest.raises(SystemExit, match=f"{request_}: the sides differ; nothing was timed"):
            caption_generation.agreed(sides, request_)


def test_candidates_are_different_texts_that_end():
    image, tokens, chosen = pair_matching.work(8)
    assert image.shape == (8, 384, 384, 3) and chosen.shape == (8, 16)
    assert all(len(set(row)) == 16 for row in chosen.tolist())
    lengths = (tokens != 0).sum(axis=1)
    assert lengths.min() >= 8 and lengths.max() <= 20
    assert (tokens[np.arange(len(tokens)), lengths - 1] == 102).all() and (tokens[:, 0] == 30_523).all()


def test_plans_in_headers_and_growth(tmp_path, monkeypatch):
    text = 'r"""A recipe.\n\n    python run_train.py\n\nProse.\n"""\n\nimport this\n'
    (tmp_path / "clip_l14.py").write_text(text)
    monkeypatch.setattr(pod_plans, "CONFIGS", tmp_path)
    monkeypatch.setattr(pod_plans, "load_recipe", lambda path: None)
    monkeypatch.setattr(pod_plans, "open_topology", lambda name: None)
    monkeypatch.setattr(pod_plans.importlib.metadata, "version", lambda name: {"libtpu": "1.2"}[name])
    for peak in (3, 4):      # the second takes the first one's place
        made = planned(0.5, peak * 2**30, batch=1000)
        made = replace(made, hbm_bytes=16 * 2**30, estimated_utilization=0.25)
        monkeypatch.setattr(pod_plans, "planned", lambda config, topology, made=made: made)
        pod_plans.write_header("clip_l14", "v5e:2x2")
    assert (tmp_path / "clip_l14.py").read_text() == text.replace("Prose.\n", (
        "Prose.\n\nPlan on v5e:2x2 (1 chips): fits in 4.00 GiB of 16.00 GiB per chip, 2,000 images/s and 25% of peak "
        "by XLA's estimate\n(libtpu 1.2).\n"))
    sizes = [replace(made, topology=f"v5e:{chips}", chips=chips, peak_bytes=peak)
             for chips, peak in ((16, 2**30), (256, 2**30 + 2**26))]
    assert pod_plans.scaling("clip_l14", sizes) == ["- clip_l14: 1.00 GiB per chip on 16, 1.06 on 256 (+6.2%)"]
    assert pod_plans.scaling("clip_l14", sizes[:1]) == []
    row = pod_plans.Row("clip_l14", "128 per chip", None, "v5e:2x2")
    line = pod_plans.line(row, replace(made, fits=False, peak_bytes=2**35))
    assert "no, 16.00 GiB short" in line and "500 ms, 25%" in line


def test_plans_of_some_recipes_leave_those_of_others(tmp_path, monkeypatch):
    sizes = {"v5e:16": 16, "v5e:256": 256}
    monkeypatch.setattr(pod_plans, "rows", lambda only: [
        pod_plans.Row(name, "1 per chip", None, topology) for name in ("clip_b16", "clip_l14") for topology in sizes
        if name in only or not only])
    monkeypatch.setattr(pod_plans, "open_topology", lambda name: name)
    for first, options in ((1, []), (2, ["--only", "clip_l14"])):
        monkeypatch.setattr(pod_plans, "planned", lambda config, topology, first=first: replace(
            planned(None, first * 2**30), topology=topology, chips=sizes[topology]))
        monkeypatch.setattr("sys.argv", ["plan", "--out", str(tmp_path / "plan.md"), *options])
        pod_plans.main()
    lines = (tmp_path / "plan.md").read_text().splitlines()
    rows = [line.split("|") for line in lines if line.startswith("| clip")]
    assert [(row[1].strip(), row[7].strip()) for row in rows] == [("clip_b16", "1.00")] * 2 + [("clip_l14", "2.00")] * 2
    assert [line for line in lines if line.startswith("- ")] == [
        f"- {name}: {peak} GiB per chip on 16, {peak} on 256 (+0.0%)"
        for name, peak in (("clip_b16", "1.00"), ("clip_l14", "2.00"))]


def test_tables_of_counts():
    """The losses of held-out tokens by chances counted by hand: two images of 1 x 2 pixels, two colours."""
    train, val = np.array([[[0, 1]], [[0, 0]]]), np.array([[[0, 1]]])
    losses = igpt_small.table_losses(train, val, 2)
    zero, one = 3.1 / 4.2, 1.1 / 4.2
    assert losses["unigram"] == pytest.approx(-np.log([zero, one]).mean())
    begins = -np.log(2.1 / 2.2)                                  # after the start both images have 0; then 1 of 2
    assert losses["previous pixel"] == losses["left and up"] == pytest.approx((begins - np.log(1.1 / 2.2)) / 2)
