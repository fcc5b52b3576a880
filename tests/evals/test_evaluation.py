import itertools
import json
from dataclasses import dataclass, replace
from importlib.machinery import PathFinder

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from jaxmm.config import Evaluator
from jaxmm.data.sources.registry import open_source
from jaxmm.evals import CaptionChoice, LinearProbe, Retrieval
from jaxmm.evals import benchmark as benchmarks
from jaxmm.evals.benchmark import Benchmark, as_json, data_specs
from jaxmm.evals.context import Outcomes
from jaxmm.evals.evaluation import (
    EVALUATORS,
    Result,
    bootstrap,
    choose,
    class_accuracies,
    evaluate,
    measure,
    model_context,
)
from jaxmm.evals.frozen_features import few_shots
from jaxmm.evals.named_prompts import named_prompts
from jaxmm.evals.published_scores import data_set_name, published_score
from jaxmm.sharding import make_mesh
from jaxmm.training.loop import train
from jaxmm.validation import ConfigError
from tests.data.test_web_datasets import vector, web_dataset
from tests.evals.conftest import MemorySource, foil_records, numpy_outputs
from tests.pretrained import tiny
from tests.training.common import Killed, clip_run, lines


def test_the_metrics_are_those_of_the_run(scenes, tmp_path, shared_programs):
    config = clip_run(scenes, evals=(
        Retrieval(ks=(1, 3)), Retrieval(captions="first", pool=20, weights="average", prefix="mean", batch_size=9)))
    config = replace(config, steps=3, data=replace(config.data, val="scenes:tiny/val"))
    train(config, tmp_path)
    last = {name: value for name, value in lines(tmp_path)[-1].items() if name.startswith(("val/", "mean/"))}
    results = evaluate(tmp_path, mesh=make_mesh(config.mesh), data_dir=str(scenes))
    assert len(last) == 10 and last == {
        f"{prefix}/{name}": value for prefix, result in zip(("val", "mean"), results, strict=True)
        for name, value in result.metrics.items()}
    assert all(low <= results[0].metrics[name] <= high for name, (low, high) in results[0].intervals.items())


def source_of(kind, tmp_path):
    if kind == "classes":
        shards = [[("cls", str(row % 5).encode()) for row in range(11)]]
        return f"wds:{web_dataset(tmp_path / kind, shards, classes=tiny.LABELS)}"
    if kind == "tags":
        shards = [[("npy", vector(*range(5)))] * 2]
        return f"wds:{web_dataset(tmp_path / kind, shards, classes=tiny.LABELS, kind='multilabel')}"
    if kind == "texts":
        texts = [("txt", f"{text} {row}\na heart {row}".encode()) for row, text in enumerate(tiny.CORPUS)]
        return f"wds:{web_dataset(tmp_path / kind, [texts], classes=(), kind='retrieval')}"
    files = tiny.picture_files(tmp_path / "files", 2)
    rows = {"questions": {"question_id": 1, "image": files[0], "question": "a star?", "answer": "yes"},
            "pairs": {"images": files, "sentence": "a star", "label": True},
            "foils": {"image_0": files[0], "image_1": files[1], "caption_0": "red", "caption_1": "blue"}}
    form = {"questions": "vqa", "pairs": "nlvr", "foils": "winoground"}[kind]
    path = tmp_path / f"{kind}.{'json' if form == 'vqa' else 'jsonl'}"
    path.write_text(json.dumps([rows[kind]] if form == "vqa" else rows[kind]))
    return f"{form}:{path}"


@pytest.mark.parametrize("kind, chosen", [
    ("classes", {"clip": ["zero_shot"], "vit": ["accuracy"], "matcher": ["zero_shot"]}),
    ("tags", {"clip": ["zero_shot"], "matcher": ["zero_shot"]}),
    ("texts", {"clip": ["retrieval"], "matcher": ["retrieval", "reranking"], "captioner": ["captions"]}),
    ("questions", {"answerer": ["vqa"]}),
    ("pairs", {"pair": ["accuracy"]}),
    ("foils", {"clip": ["caption_choice"], "matcher": ["caption_choice"]})])
def test_evaluators_are_chosen_by_model_and_source(kind, chosen, tmp_path):
    source = open_source(source_of(kind, tmp_path))
    models = {name: getattr(tiny, name)() for name in ("clip", "vit", "matcher", "captioner", "answerer")}
    models["pair"] = replace(models["captioner"], task=tiny.PAIR)
    for name, model in models.items():
        context = model_context(model, source)
        if name in chosen:
            assert [type(e) for e in choose(context)] == [EVALUATORS[e] for e in chosen[name]], name
        else:
            with pytest.raises(ConfigError, match=r"expected a source that a .* can be measured on"):
                choose(context)


def test_evaluators_that_cannot_run_are_named(tmp_path):
    source = open_source(source_of("classes", tmp_path))
    context = model_context(tiny.vit(), source)
    for name, words in (("zero_shot", "ZeroShot needs a task"), ("knn", "KNN.train"), ("top1", "expected some of")):
        with pytest.raises(ConfigError, match=words):
            choose(context, [name])
    turned = model_context(replace(tiny.vit(), labels=tiny.LABELS[::-1]), source)
    with pytest.raises(ConfigError, match="the classes in the model's order: elk, dog"):
        choose(turned, ["accuracy"])
    smaller = model_context(replace(tiny.vit(), labels=tiny.LABELS[:3]), source)
    with pytest.raises(ConfigError, match="the 3 classes of the model, not 5"):
        choose(smaller, ["accuracy"])


def test_templates_and_names_of_the_source_are_used_as_they_are(tmp_path):
    """The article of a name and of a template are both kept, underscores too, as in CLIP_benchmark."""
    names = ("an ant", "red_fox", "owl")
    labels = [row % 3 for row in range(11)]
    folder = web_dataset(tmp_path / "a", [[("cls", str(label).encode()) for label in labels]], classes=names,
                         templates=("a {c} star", "two {c}"))
    model, source = tiny.clip(), open_source(f"wds:{folder}")
    [result] = evaluate(model, source, predictions=True)
    text = model.encode_text([f"{template[0]}{name}{template[1]}" for name in names
                              for template in (("a ", " star"), ("two ", ""))]).reshape(3, 2, -1).mean(axis=1)
    image = model.encode_image([tiny.Image.open(tiny_file(source, row, tmp_path)) for row in range(11)])
    best = (image @ (text / np.linalg.norm(text, axis=1, keepdims=True)).T).argmax(axis=1)
    assert result.metrics["zero_shot_top1"] == np.mean(best == labels)
    assert [row[1:] for row in result.predictions] == [(names[label], names[guess])
                                                       for label, guess in zip(labels, best, strict=True)]
    assert result.per_class == {name: np.mean(best[np.array(labels) == i] == i) for i, name in enumerate(names)}
    wrong = [row for row in range(11) if best[row] != labels[row]]
    assert [(m.record, m.key, m.expected, m.predicted) for m in result.mistakes] == [
        (row, f"0/s{row:07}", names[labels[row]], names[best[row]]) for row in wrong]


def tiny_file(source, row, folder):
    path = folder / f"{row}.jpg"
    path.write_bytes(source[row]["image"])
    return path


def test_class_accuracies_of_equal_names():
    values, labels = np.array([1, 0, 1, 1.0]), np.array([0, 0, 2, 3])
    assert class_accuracies(values, labels, ("crane", "elk", "crane", "owl")) == {
        "crane": 0.5, "crane (2)": 1.0, "owl": 1.0}


def test_bootstrap_intervals():
    rng = np.random.default_rng(0)
    right = rng.random(900) < 0.3
    got = bootstrap(Outcomes(values={"top1": right, "loss": np.full(900, 2.5)}))
    half = 1.96 * np.sqrt(right.mean() * (1 - right.mean()) / 900)
    np.testing.assert_allclose(got["top1"], (right.mean() - half, right.mean() + half), atol=0.004)
    assert got["loss"] == (2.5, 2.5) and got == bootstrap(Outcomes(values={"top1": right, "loss": np.full(900, 2.5)}))
    labels = np.repeat([0, 1], [880, 20])                      # the mean over classes is as uncertain as the rare one
    low, high = bootstrap(Outcomes(values={"top1": right}, labels=labels), "recall")["recall"]
    assert high - low > 2 * (got["top1"][1] - got["top1"][0])
    assert bootstrap(Outcomes(values={"top1": np.zeros(0)})) == {}


def test_few_shots_fit_what_sklearn_fits(context, params, pictures):
    rng = np.random.default_rng(4)
    train, held_out = (MemorySource(pictures(n, n), labels=tuple(rng.integers(0, 3, n).tolist()), classes=tuple("abc"))
                       for n in (41, 17))
    shots = few_shots(train, 4, seed=2)
    chosen = [group[0] for group in shots.groups]
    assert sorted(train.labels[row] for row in chosen) == [0] * 4 + [1] * 4 + [2] * 4 and len(set(chosen)) == 12
    assert chosen != [group[0] for group in few_shots(train, 4, seed=3).groups]
    result = measure(context(held_out, train=train), LinearProbe(batch_size=8, shots=4, seed=2))
    x, held_x = numpy_outputs(params, train)[0][chosen], numpy_outputs(params, held_out)[0]
    fitted = LogisticRegression(C=0.316, max_iter=1000).fit(x, np.array(train.labels)[chosen])
    assert result.metrics["probe_top1"] == fitted.score(held_x, held_out.labels)


@dataclass(frozen=True)
class Foils(MemorySource):
    """Pairs of images and of captions."""

    has_foils: bool = True
    images_per_record: int = 2


def test_caption_choice_against_numpy(context, params, pictures):
    images, words = pictures(24), ["".join(pair) for pair in itertools.product("abcde", "vwxyz")]
    x, _, text = numpy_outputs(params, MemorySource(images), words)
    x, text = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (x, text))
    rows = foil_records(x, text, count=3)
    both, captions = zip(*(((images[left], images[right]), (words[one], words[other]))
                           for left, right, one, other in rows), strict=True)
    source = Foils((*both, both[0]), captions=(*captions, ("a", "a")))                 # a tie is a miss
    result = measure(context(source), CaptionChoice(batch_size=4))
    assert result.metrics == {"text_score": 6 / 13, "image_score": 6 / 13, "group_score": 3 / 13}
    single = replace(source, images=tuple(left for left, _ in source.images), images_per_record=1)
    result = measure(context(single), CaptionChoice(batch_size=4), True)
    right = [x[left] @ text[one] > x[left] @ text[other] for left, _, one, other in rows] + [False]
    assert result.metrics == {"text_score": np.mean(right)} and 0.4 < np.mean(right) < 1
    assert result.predictions == tuple((str(row), one, one if right[row] else other)
                                       for row, (one, other) in enumerate(source.captions))


def test_names_and_templates_of_installed_packages(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: PathFinder.find_spec(name, [str(tmp_path)]))
    with pytest.raises(ConfigError, match=r"an installed clip-benchmark \(pip install --no-deps clip-benchmark\)"):
        named_prompts("imagenet1k")
    package = tmp_path / "open_clip"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('it must not be imported')")
    (package / "zero_shot_metadata.py").write_text(
        "IMAGENET_CLASSNAMES = ['tench', 'fox']\nOPENAI_IMAGENET_TEMPLATES = (lambda c: f'a {c}.',)\n")
    assert named_prompts("imagenet1k") == (("tench", "fox"), ("a {}.",))
    with pytest.raises(ConfigError, match="expected one of imagenet1k"):
        named_prompts("cars")
    package = tmp_path / "clip_benchmark"
    (package / "datasets").mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('it must not be imported')")
    (package / "datasets" / "en_classnames.json").write_text(json.dumps({"flowers": ["rose"]}))
    (package / "datasets" / "en_zeroshot_classification_templates.json").write_text(
        json.dumps({"flowers": ["a {c}, a flower"], "cars": ["a photo of my {c}"]}))
    assert named_prompts("flowers") == (("rose",), ("a {}, a flower",))
    assert named_prompts("cars") == (None, ("a photo of my {}",))


def test_names_of_data_sets():
    assert data_specs("folder:a,b/c, tars:x{0,1}.tar,coco:f.json@caption=t,image=i") == [
        "folder:a,b/c", "tars:x{0,1}.tar", "coco:f.json@caption=t,image=i"]
    root = "/data/wds_{}"
    assert data_specs("cifar10,retrieval,cifar10", root) == [
        f"wds:/data/wds_{name}:test" for name in ("cifar10", "mscoco_captions", "flickr8k", "flickr30k")]
    vtab = data_specs("vtab", root)
    assert len(vtab) == 19 and vtab[0] == "wds:/data/wds_vtab-caltech101:test"
    for spec, name in ((vtab[0], "caltech101"), ("tfds:cifar10:test", "cifar10"), (data_specs("sun397")[0], "sun397"),
                       ("wds:https://huggingface.co/datasets/a/wds_imagenet-a/tree/main:test", "imagenet-a")):
        assert data_set_name(spec) == name


def test_published_scores_are_found_by_model_and_data_set():
    assert published_score("openai/clip-vit-base-patch32", data_specs("imagenet1k")[0], "zero_shot_top1").value == .6332
    assert published_score("/models/siglip-base-patch16-224/", "wds:/d/wds_flickr30k", "t2i_recall@1").value == .7468
    assert published_score("Salesforce/blip-itm-base-coco", "wds:/d/mscoco_captions", "i2t_itm_recall@1").value == .819
    assert published_score("openai/clip-vit-base-patch32", "folder:/data/own", "zero_shot_top1") is None


def test_json_has_clip_benchmarks_names():
    result = Result(source=data_specs("vtab/pets")[0], evaluator="zero_shot", records=3, intervals={"a": (0.0, 1.0)},
                    metrics={"zero_shot_top1": 0.5, "zero_shot_mean_recall": 0.25, "zero_shot_top5": float("nan")})
    row = as_json("openai/clip", result, {})
    assert {name: row[name] for name in ("dataset", "model", "pretrained", "task", "metrics", "language")} == {
        "dataset": "wds/vtab/pets", "model": "clip", "pretrained": "openai/clip", "task": "zeroshot_classification",
        "metrics": {"acc1": 0.5, "mean_per_class_recall": 0.25}, "language": "en"}
    assert as_json("openai/clip", replace(result, metrics={"zero_shot_map": 0.5}), {})["metrics"] == {
        "mean_average_precision": 0.5}


def test_predictions_of_every_evaluator_that_writes_them(tmp_path):
    """Also of one that is defined elsewhere."""
    @dataclass(frozen=True, kw_only=True)
    class Own(Evaluator):
        results: str | None = None

    benchmark, file = Benchmark(out=tmp_path, predictions=True), tmp_path / "a.json"
    assert benchmark._with_results(Own(), file).results == str(tmp_path / "predictions" / "a.results.json")
    assert benchmark._with_results(Retrieval(), file) == Retrieval()
    assert replace(benchmark, predictions=False)._with_results(Own(), file) == Own()


def test_killed_and_started_again_nothing_is_done_twice(tmp_path, monkeypatch):
    models = [str(tmp_path / name) for name in ("one", "two")]
    tiny.clip().save(models[0], format="open_clip")
    tiny.matcher().save(models[1])
    specs = [source_of("classes", tmp_path), source_of("texts", tmp_path), source_of("foils", tmp_path)]
    calls = []

    def counted(context, evaluator, predictions, stop=None):
        if len(calls) == 4 and "killed" not in calls:
            calls.append("killed")
            raise Killed
        calls.append(type(evaluator).__name__)
        return measure(context, evaluator, predictions)

    def run(out):
        benchmark = Benchmark(out=out, batch_size=4)
        return [row for model in models for spec in specs for row, _ in benchmark.run(model, spec)]

    monkeypatch.setattr(benchmarks, "measure", counted)
    with pytest.raises(Killed):
        run(tmp_path / "out")
    first = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert len(first) == 4
    rows = run(tmp_path / "out")
    assert calls == ["ZeroShot", "Retrieval", "CaptionChoice", "ZeroShot", "killed", "Retrieval", "Reranking",
                     "CaptionChoice"]
    assert first.items() <= {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}.items()
    assert run(tmp_path / "other") == rows == run(tmp_path / "out") and len(calls) == 15
    assert len({path.read_bytes() for path in (tmp_path / "out").iterdir()}) == 7 == len(rows)
    for path in (tmp_path / "out").iterdir():
        assert path.read_bytes() == (tmp_path / "other" / path.name).read_bytes()
    again = Benchmark(out=tmp_path / "out", batch_size=5)      # other settings are another measurement
    assert [row for row, _ in again.run(models[0], specs[0])] != rows[:1] and len(calls) == 16
