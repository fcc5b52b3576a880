import base64
import io
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from jaxmm.charts import curves, drawing
from jaxmm.config import DataConfig, Evaluator, TrainConfig
from jaxmm.evals import CaptionExample, Drawing, ImageGrid, PredictionExample, RetrievalExample, Retrieved
from jaxmm.models.vit import vit
from jaxmm.pages import data_uri, number, overlay
from jaxmm.saved_config import save_config
from jaxmm.tasks.image_classification import Classification
from jaxmm.training.report import final_values, panels, read_metrics, summary, write_report

pytestmark = pytest.mark.usefixtures("drawings")
PICTURE = np.random.default_rng(0).integers(0, 256, (7, 9, 3)).astype(np.uint8)
ATTACK = '<script>alert("x")</script> & <b onclick=1>'


class Page(HTMLParser):
    """Tags, their attributes, and the text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data.strip())

    def count(self, tag, **attributes):
        return sum(t == tag and attributes.items() <= a.items() for t, a in self.tags)


def write_lines(folder, lines):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def training(steps, **more):
    return [{"step": s, "train/loss": 4 / s, "train/learning_rate": 1e-3} | more for s in steps]


def test_metrics_of_a_resumed_run_with_null_and_a_torn_line(tmp_path):
    write_lines(tmp_path, [*training([20, 40, 60]), {"step": 40, "train/loss": 9.0}, {"step": 60, "train/loss": None},
                           {"step": 80, "train/loss": 1, "val/top1": 0.5, "note": "text", "time": 3}])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 100, "train/lo')
    metrics = read_metrics(tmp_path / "metrics.jsonl")
    assert metrics.keys() == {"train/loss", "train/learning_rate", "val/top1"}
    steps, values = zip(*metrics["train/loss"], strict=True)
    assert steps == (20, 40, 60, 80)
    assert values[:2] == (0.2, 9.0) and math.isnan(values[2]) and values[3] == 1


def test_final_values_put_held_out_first_and_know_what_is_better():
    rows = final_values({"train/loss": [(1, 5.0), (2, 4.0)], "val/loss": [(1, 3.0), (2, math.nan), (3, 3.5)],
                         "val/top1": [(1, 0.2), (2, 0.6), (3, 0.5)], "val/knn_top1": [(3, 0.4)]})
    assert [(r["name"], r["value"], r["best"]) for r in rows] == [
        ("val/loss", 3.5, (3.0, 1)), ("val/top1", 0.5, (0.6, 2)), ("val/knn_top1", 0.4, None),
        ("train/loss", 4.0, None)]


def test_curves_are_grouped_and_empty_ones_left_out():
    two = [(1, 1.0), (2, 2.0)]
    drawn = panels({"train/grad_norm": two, "train/loss": two, "val/loss": [(2, 1.0)], "val/top1": two,
                    "val/top5": two, "val/i2t_recall@1": two, "val/i2t_recall@10": two,
                    "train/skipped": [(1, 0.0), (2, 0)], "val/probe_top1": [(2, 0.5)],
                    "train/lost": [(1, math.nan), (2, math.nan)]})
    assert [(p["title"], p["names"]) for p in drawn] == [
        ("loss", ["train/loss", "val/loss"]), ("top", ["val/top1", "val/top5"]),
        ("i2t_recall", ["val/i2t_recall@1", "val/i2t_recall@10"]), ("grad_norm", ["train/grad_norm"])]


def test_a_curve_has_gaps_at_nan_and_the_page_s_colours():
    values = [3.0, 2.0, math.nan, 1.5, 1.0]
    svg = curves({"train/loss": [(10 * i, v) for i, v in enumerate(values)]})
    path = re.search(r'<path d="([^"]*)"[^>]*style="fill: none; stroke: var\(--c1\)', svg).group(1)
    assert path.count("M") == 2 and path.count("L") == 2
    assert "currentColor" in svg and "var(--line)" in svg and not re.search("#0[123]0[123]0", svg)


def test_long_curves_are_thinned_and_decades_are_logarithmic():
    svg = curves({"train/loss": [(i, 1000 * math.exp(-i / 1000)) for i in range(1, 20_001)]})
    assert len(svg) < 40_000
    ys = re.search(r'<path d="([^"]*)"[^>]*stroke: var\(--c1\)', svg).group(1).replace("M", "L").split("L")[1:]
    x, y = np.array([p.split() for p in ys], float).T
    assert np.abs(np.polyval(np.polyfit(x, y, 1), x) - y).max() < 1      # exponential decay is a straight line


def test_pictures_survive_the_page():
    data = data_uri(PICTURE)
    kind, body = data.split(",", 1)
    assert kind == "data:image/webp;base64"
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(body))).convert("RGB")), PICTURE)


def test_overlay_is_bright_where_attention_is_high():
    white = np.full((8, 12, 3), 200, np.uint8)
    light = overlay(white, np.asarray([[1.0, 0.0], [0.5, 0.0]]))
    assert light.shape == white.shape and light[0, 0, 0] == 200 and light[0, -1, 0] == light[-1, -1, 0] == 40
    assert 40 < light[-1, 0, 0] < 200
    np.testing.assert_array_equal(overlay(white, np.full((2, 2), 0.25)), 40)


@pytest.mark.parametrize("value, text", [(0.91234, "0.9123"), (1e-5, "1e-05"), (12345.6, "12,346"), (3, "3"),
                                         (math.nan, "–"), (math.inf, "inf"), (-2.5e12, "-2.5e+12")])
def test_numbers(value, text):
    assert number(value) == text


@pytest.mark.parametrize("lines, words", [
    (None, "No metrics have been written yet."),
    (training([20]), "Too few lines in metrics.jsonl for a curve."),
    (training([20, 40]), "Nothing was measured on held-out data."),
    ([{"step": 20, "train/loss": None, "val/top1": None}], "–")])
def test_reports_of_runs_that_hardly_were(lines, words, tmp_path):
    if lines is not None:
        write_lines(tmp_path, lines)
    page = Page(write_report(tmp_path).read_text())
    assert words in page.words and tmp_path.name in page.words


def test_a_whole_report_is_self_contained_and_escapes_what_people_wrote(tmp_path):
    write_lines(tmp_path, [*training([20, 40]), {"step": 40, "val/top1": 0.91236}])
    task = Classification(model=vit("Ti/16"))
    save_config(TrainConfig(task=task, steps=40, data=DataConfig(train=f"folder:{ATTACK}"), evals=(Evaluator(),)),
                tmp_path / "config.json", versions={"jax": "9.8.7"}, devices=["cpu", "cpu"])
    results = (Retrieved(item=ATTACK, score=0.5, right=True), Retrieved(item="a dog " * 100, score=-0.25, right=False))
    other = (Retrieved(item=PICTURE, score=0.75, right=False),)
    path = write_report(tmp_path, [
        RetrievalExample(query=PICTURE, results=results), RetrievalExample(query=ATTACK, results=other),
        PredictionExample(image=PICTURE, truth=ATTACK, predictions=((ATTACK, 0.625), ("cat", 0.25))),
        CaptionExample(image=PICTURE, caption="a dog", right=True, truth="a cat",
                       words=(("a", np.eye(3)), (ATTACK, np.ones((3, 3)))))])
    assert path == tmp_path / "report.html" and not list(tmp_path.glob("*.part"))
    text = path.read_text()
    page = Page(text)
    assert page.count("script") == page.count("link") == 0 and not any("onclick" in a for _, a in page.tags)
    assert all(a["src"].startswith("data:image/webp;base64,") for t, a in page.tags if t == "img")
    assert not re.search(r'(src|href)="(?!data:|#)|url\((?!#)|@import', text)
    assert page.count("img") == 6 and page.count("img", **{"class": "small"}) == 6
    assert page.count("svg") == 2                                        # train/loss and train/learning_rate
    assert page.count("li", **{"class": "right"}) == 1                   # the right text
    assert page.count("li", **{"class": "bar right", "style": "--share: 62.5%"}) == 1
    assert page.count("span", **{"class": "tick"}) == 3 and "a dog" in page.words
    assert page.words.count(ATTACK) == 4 and f"“{ATTACK}”" in page.words  # found, truth, predicted
    assert "0.912" in page.words and "0.9124" in page.words and "-0.25" in page.words
    assert any(w.endswith("…") for w in page.words) and "jax 9.8.7" in page.words and "cpu, cpu" in page.words
    assert "Classification · kind softmax · label smoothing 0 · mixup 0 · cutmix 0" in page.words
    assert len(text) < 120_000


def test_grids_and_drawings_of_any_evaluator(tmp_path):
    svg = drawing(lambda axes: axes.plot([0, 1], [0, 1], color="#030302"), "a line", size=(2, 1))
    text = write_report(tmp_path, [
        ImageGrid(title="Grid", text=ATTACK, columns=("one", ATTACK), rows=((PICTURE, PICTURE), (PICTURE, PICTURE))),
        ImageGrid(title="Row", text="", rows=((PICTURE,),)),
        Drawing(title="Line", text="rises", svg=svg, names=("the line",))]).read_text()
    page = Page(text)
    assert page.count("img", alt="Grid") == 4 and page.count("img", alt="Row") == 1 and page.count("script") == 0
    assert page.words.count(ATTACK) == 2 and page.count("th") == 2
    assert page.count("svg", **{"aria-label": "a line"}) == 1 and "var(--c2)" in text and 'viewBox="0 0 144 72"' in text
    assert {"Grid", "Line", "rises", "the line"} <= set(page.words)


def test_long_values_are_counted():
    rows = dict(summary({"task": {"levels": list(range(50)), "steps": [1, 2]}}))
    assert rows["task"] == "levels 50 values · steps 1, 2"


def test_summary_counts_the_pictures_seen():
    rows = dict(summary({"config": {"steps": 2000, "data": {"train": "a:b", "val": None, "batch_size": 64,
                                                            "image": {"size": 32}},
                                    "optimizer": {"name": "lion", "learning_rate": 3e-4, "average": None}}}))
    assert rows == {"data": "train a:b", "length": "2,000 steps × 64 images = 128,000 images, 32 × 32 pixels",
                    "optimizer": "lion · learning rate 0.0003"}
