"""The `jaxmm` command, as it is typed."""

import csv
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxmm import cli
from jaxmm.cli.caption_files import caption_files, write_captions
from jaxmm.data.sources.registry import open_source
from jaxmm.evals.evaluation import evaluate
from jaxmm.inference.captioning import CAPTIONS
from jaxmm.inference.model import load
from jaxmm.sharding import named_leaves
from jaxmm.validation import ConfigError
from tests.data import crawl
from tests.data.crawl import jpeg, write_tar
from tests.data.test_web_datasets import web_dataset
from tests.pretrained import tiny


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tiny.clip().save(folder / "clip", format="transformers")
    tiny.vit().save(folder / "vit")
    tiny.captioner().save(folder / "captioner")
    tiny.matcher().save(folder / "matcher")
    tiny.answerer().save(folder / "answerer")
    return folder


@pytest.fixture
def jaxmm(user_cache, capsys, monkeypatch):
    monkeypatch.setattr("jaxmm.training.runtime.keep_memory", lambda: None)      # this process is the tests'

    def run(*args):
        try:
            status = cli.main([str(arg) for arg in args])
        except SystemExit as stop:      # how tyro refuses, and ends after --help
            status = stop.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def rows(text):
    return [json.loads(line) for line in text.splitlines()]


def test_classify(jaxmm, models, tmp_path):
    paths = tiny.picture_files(tmp_path / "pictures", 3)
    (tmp_path / "pictures" / "bad.png").write_bytes(b"?")
    (tmp_path / "pictures" / "film.mp4").write_bytes(b"?")
    status, out, err = jaxmm("classify", tmp_path / "pictures", "--model", models / "vit", "--top", 2, "--json")
    assert "passed over: 1 .mp4 files\n" in err
    assert status == 0 and "bad.png" in err and "1 of 4 images could not be read" in err
    want = tiny.vit().classify(tiny.pictures(3), top=2)
    assert [row["picture"] for row in rows(out)] == paths
    for row, found in zip(rows(out), want, strict=True):
        assert [(each["label"], pytest.approx(each["probability"], abs=1e-5)) for each in row["labels"]] == found
    status, out, _ = jaxmm("classify", *paths[:2], "--model", models / "clip", "--labels", "a circle, a star")
    assert status == 0 and out.count("a circle") == 2 and out.count("a star") == 2
    want = tiny.clip().classify(tiny.pictures(3)[:2], ["a circle", "a star"])
    assert re.findall(r"[\d.]+%", out) == [f"{share:.1%}" for found in want for _, share in found]
    (tmp_path / "labels.txt").write_text("a circle\n\na star\n")
    assert jaxmm("classify", *paths[:2], "--model", models / "clip", "--labels", tmp_path / "labels.txt")[1] == out


def test_templates_and_labels_with_commas(jaxmm, models, tmp_path):
    path, = tiny.picture_files(tmp_path / "pictures", 1)
    labels = ["a star, green", "circle"]
    (tmp_path / "templates.txt").write_text("a {}\n\nthe small {}, seen\n")
    for given, templates in ((("a small {}", "{}"), ("a small {}", "{}")),
                             ((tmp_path / "templates.txt",), ("a {}", "the small {}, seen"))):
        status, out, _ = jaxmm("classify", path, "--model", models / "clip", "--labels", '"a star, green", circle',
                               "--templates", *given, "--json")
        want = tiny.clip().classify(path, labels, templates=templates)[0]
        assert status == 0 and [(row["label"], pytest.approx(row["probability"], abs=1e-5))
                                for row in rows(out)[0]["labels"]] == want
    status, _, err = jaxmm("classify", path, "--model", models / "clip", "--labels", "a,b", "--templates", "a photo")
    assert status == 1 and "'a photo'; expected one {} in it" in err
    clip, vit = models / "clip", models / "vit"
    for args in (("show", clip), ("convert", clip, tmp_path / "new"), ("classify", path, "--model", clip),
                 ("caption", path, "--model", clip), ("match", path, "a", "--model", clip),
                 ("answer", path, "who?", "--model", clip), ("generate", vit, tmp_path / "a.png"),
                 ("complete", vit, path), ("eval", vit, "--on", f"folder:{tmp_path}"),
                 ("search", "index", tmp_path / "pictures", tmp_path / "index", "--model", clip)):
        status, _, err = jaxmm(*args, "--architecture", "ViT-B-32")
        assert status == 1 and "architecture is 'ViT-B-32', but" in err, args


def test_search(jaxmm, models, tmp_path):
    paths = tiny.picture_files(tmp_path / "pictures", 9)
    (tmp_path / "pictures" / "bad.jpg").write_bytes(b"?")
    status, out, err = jaxmm("search", "index", tmp_path / "pictures", tmp_path / "index", "--model", models / "clip")
    assert status == 0 and "9 images" in out and "bad.jpg" in err
    clip = tiny.clip()
    scores = clip.encode_image(paths) @ clip.encode_text(["a star"])[0]
    status, out, _ = jaxmm("search", "query", tmp_path / "index", "a star", "--top", 4, "--json")
    assert status == 0 and [row["picture"] for row in rows(out)] == [paths[i] for i in np.argsort(-scores)[:4]]
    status, out, _ = jaxmm("search", "query", tmp_path / "index", paths[5], "--top", 1)
    assert status == 0 and paths[5] in out and "1.0000" in out
    status, _, err = jaxmm("search", "index", tmp_path / "pictures", tmp_path / "index", "--model", models / "clip")
    assert status == 1 and "exists" in err
    status, _, err = jaxmm("search", "index", tmp_path / "pictures", tmp_path / "other", "--model", models / "vit")
    assert status == 2 and "expected CLIP or SigLIP" in err


def test_a_query_loads_the_model_as_the_index_did(jaxmm, models, tmp_path, monkeypatch):
    tiny.picture_files(tmp_path / "pictures", 2)
    loaded = []
    monkeypatch.setattr("jaxmm.inference.model.load", lambda source, **options: loaded.append(options) or tiny.clip())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.json").write_text("{}")
    index = "search", "index", tmp_path / "pictures", tmp_path / "index", "--model", models / "clip"
    assert jaxmm(*index, "--architecture", "own.json", "--weights", "average")[0] == 0
    assert jaxmm("search", "query", tmp_path / "index", "a star")[0] == 0
    assert loaded == [{"architecture": "own.json", "weights": "average"},
                      {"architecture": str(tmp_path / "own.json"), "weights": "average"}]


def test_caption_and_match(jaxmm, models, tmp_path):
    paths = tiny.picture_files(tmp_path / "pictures", 2)
    options = "--decoding.max-length", 8, "--top", 2
    status, out, _ = jaxmm("caption", *paths, "--model", models / "captioner", *options, "--json")
    want = tiny.captioner().caption(paths, decoding=replace(CAPTIONS, max_length=8), top=2)
    assert status == 0 and [[(each["caption"], pytest.approx(each["score"], abs=1e-4)) for each in row["captions"]]
                            for row in rows(out)] == want
    status, out, _ = jaxmm("match", paths[0], "a red circle", "two stars", "--model", models / "matcher", "--json")
    want = tiny.matcher().match(paths[:1], ["a red circle", "two stars"])[0]
    assert status == 0 and [row["probability"] for row in rows(out)] == pytest.approx(want.tolist(), abs=1e-5)
    status, _, err = jaxmm("caption", *paths, "--model", models / "vit")
    assert status == 1 and "expected one that writes" in err


def test_captions_in_files(jaxmm, models, tmp_path):
    paths = tiny.picture_files(tmp_path / "pictures", 2)
    options = "--model", models / "captioner", "--decoding.max-length", 8, "--top", 2
    want = tiny.captioner().caption(paths, decoding=replace(CAPTIONS, max_length=8), top=2)
    texts = [[text for text, _ in row] for row in want]
    status, out, _ = jaxmm("caption", tmp_path / "pictures", *options, "--to", "txt")
    assert status == 0 and "captions of 2 images in 2 files" in out
    assert [Path(path).with_suffix(".txt").read_text().splitlines() for path in paths] == texts
    status, _, err = jaxmm("caption", tmp_path / "pictures", *options, "--to", "txt")
    assert status == 2 and "000.txt exists, and 1 more; expected new files, or --overwrite" in err
    for to in ("jsonl", "csv"):
        out = tmp_path / "new" / f"a.{to}"
        assert jaxmm("caption", *paths, *options, "--to", to, "--out", out)[0] == 0
    source = open_source(f"captions:{tmp_path}/new/a.jsonl")
    assert [list(source[i]["texts"]) for i in range(2)] == texts
    assert source[1]["image"] == Path(paths[1]).read_bytes()
    with (tmp_path / "new" / "a.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [(row["image"], row["caption"]) for row in table] == [
        (f"../pictures/{number:03}.png", text) for number, row in enumerate(texts) for text in row]
    assert jaxmm("caption", *paths, *options, "--to", "coco", "--out", tmp_path / "results.json")[0] == 0
    assert json.loads((tmp_path / "results.json").read_text()) == [
        {"image_id": number, "caption": row[0]} for number, row in enumerate(texts)]
    status, _, err = jaxmm("caption", *paths, *options, "--out", tmp_path / "x")
    assert status == 2 and "expected to = txt, csv, jsonl or coco" in err


def test_files_of_captions(tmp_path):
    paths = [str(tmp_path / name) for name in ("a.jpg", "b/a.png", "a.png")]
    with pytest.raises(ConfigError, match=r"a\.png and .*a\.jpg would both be captioned in .*a\.txt"):
        caption_files(paths, "txt", None, False)
    with pytest.raises(ConfigError, match="would both be captioned"):
        caption_files(paths[:2], "txt", tmp_path / "out", False)
    files = caption_files(paths[:2], "txt", None, False)
    assert list(files.values()) == [tmp_path / "a.txt", tmp_path / "b" / "a.txt"]
    rows = [(paths[0], [('a "cat", asleep', -0.5), ("two\nlines", -1.25)])]
    written, = write_captions(rows, "csv", caption_files(paths[:1], "csv", tmp_path / "x.csv", False))
    with written.open(newline="") as file:
        assert list(csv.reader(file)) == [["image", "caption", "score"], ["a.jpg", 'a "cat", asleep', "-0.5"],
                                          ["a.jpg", "two\nlines", "-1.25"]]
    assert caption_files(paths[:1], "jsonl", None, False) == {paths[0]: Path("captions.jsonl")}
    caption_files(paths[:1], "csv", tmp_path / "x.csv", True)
    with pytest.raises(ConfigError, match=r"x\.csv exists; expected new files"):
        caption_files(paths[:1], "csv", tmp_path / "x.csv", False)


def test_answer_and_choices(jaxmm, models, tmp_path):
    [path] = tiny.picture_files(tmp_path / "pictures", 1)
    status, out, _ = jaxmm("answer", path, "a red circle?", "--model", models / "answerer", "--choices",
                           "red, a heart,two", "--top", 2, "--json")
    want = tiny.answerer().answer([path], "a red circle?", choices=["red", "a heart", "two"], top=2)[0]
    assert status == 0 and [(row["answer"], pytest.approx(row["score"], abs=1e-4)) for row in rows(out)] == want
    (tmp_path / "choices.txt").write_text("red circle\n\ntwo stars\n")
    status, out, _ = jaxmm("caption", path, "--model", models / "captioner", "--choices", tmp_path / "choices.txt",
                           "--json")
    want = tiny.captioner().caption([path], choices=["red circle", "two stars"])[0]
    assert status == 0 and [each["caption"] for each in rows(out)[0]["captions"]] == [want[0][0]]
    status, _, err = jaxmm("answer", path, "a?", "--model", models / "answerer", "--choices", ",")
    assert status == 2 and "choices is []" in err
    status, _, err = jaxmm("answer", path, "?", "--model", models / "captioner")
    assert status == 1 and "expected one that answers" in err


def test_convert(jaxmm, models, tmp_path):
    status, out, _ = jaxmm("convert", models / "clip", tmp_path / "theirs", "--to", "open_clip")
    assert status == 0 and "for open_clip" in out
    texts = ["a red circle"]
    np.testing.assert_allclose(load(tmp_path / "theirs").encode_text(texts), tiny.clip().encode_text(texts), atol=1e-6)
    status, _, err = jaxmm("convert", models / "clip", tmp_path / "x", "--to", "timm")
    assert status == 1 and "'timm', which has no CLIPConfig; expected jaxmm, transformers, open_clip" in err
    assert jaxmm("convert", models / "clip", tmp_path / "x", "--to", "onnx")[0] == 2


def test_show(jaxmm, models):
    status, out, _ = jaxmm("show", models / "clip", "--json")
    told = rows(out)[0]
    counts = {path: leaf.size for path, leaf in named_leaves(tiny.clip().params)}
    assert status == 0 and told["parameters"] == sum(counts.values()) == sum(told["parts"].values())
    assert told["parts"]["vision/encoder"] == sum(n for path, n in counts.items() if path.startswith("vision/encoder/"))
    assert told["parts"]["logit_scale"] == 1 and told["tokenizer"]["vocabulary"] == tiny.TOKENIZER.vocab_size
    assert told["config"]["model.vision.patch"] == 4
    status, out, _ = jaxmm("show", models / "vit")
    assert status == 0 and "positions" in out and "model.transformer.width" in out


def test_data(jaxmm, tmp_path):
    write_tar(tmp_path / "0.tar", crawl.files(crawl.CASES))
    (tmp_path / "1.tar").write_bytes(b"no tar at all" * 90)
    spec = f"tars:{tmp_path}/*.tar"
    status, out, _ = jaxmm("data", "check", spec, "--workers", 1, "--json")
    report = rows(out)[0]
    assert status == 0 and (report["records"], report["usable"]) == (16, 9) and report["broken"]["no text"] == 2
    assert report["faults"][0]["shard"].endswith("1.tar")
    status, out, _ = jaxmm("data", "check", spec, "--workers", 1, "--records")
    assert {row["key"]: row["reason"] for row in rows(out)} == {
        f"0/{key}": reason for key, (_, reason) in crawl.CASES.items()}
    status, out, _ = jaxmm("data", "check", spec, "--workers", 1)
    assert status == 0 and "9 of 16 records can be used" in out and "0/no_text, 0/blank_text" in out and "1.tar" in out
    status, out, _ = jaxmm("data", "show", spec, "--count", 2)
    assert status == 0 and "0/ok_0" in out and "31 x 24" in out and "truncated: " in out and "0/empty" not in out
    assert jaxmm("data", "show", spec, "--html", tmp_path / "a.html")[0] == 0 and "coin" in (
        tmp_path / "a.html").read_text()
    for again in (False, True):
        status, out, _ = jaxmm("data", "import", spec, tmp_path / "out", "--split", "web", "--workers", 1)
        assert status == 0 and "9 images in 1 shards" in out and "7 of 16 records" in out and "0/html" in out
        assert ("nothing to do" in out) == again
    assert len(open_source(f"tfds:{tmp_path}/out:web")) == 9
    for args, words in ((("import", spec, tmp_path / "out"), "exists"), (("check", "tras:x"), "unknown kind 'tras'"),
                        (("show", spec, "--count", 0), "count is 0"), (("check", spec, "--workers", 0), "workers is 0"),
                        (("import", spec, tmp_path / "x", "--shard-records", 0), "shard_records is 0"),
                        (("show", "tars:/none/*.tar"), "no file matches")):
        status, _, err = jaxmm("data", *args)
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        assert status == 1 and len(lines) == 1 and words in lines[0] and "Traceback" not in err


def test_data_of_which_nothing_can_be_used(jaxmm, tmp_path):
    """The exit status says so: of captions, questions and pairs; also if the report is one line per record."""
    for name, row in [("captions", {"caption": None, "text": "None"}), ("vqa", {"question": " ", "answer": "a"}),
                      ("nlvr", {"images": ["1.png", "2.png"], "sentence": "a", "label": "True"})]:
        (tmp_path / f"{name}.json").write_text(json.dumps([{"image": "1.png", **row}, {"image": "1.png", **row}]))
    tiny.picture_files(tmp_path, 1)
    (tmp_path / "1.png").write_bytes(b"no image")
    for spec in (f"vqa:{tmp_path}/vqa.json", f"nlvr:{tmp_path}/nlvr.json@{tmp_path}"):
        for args in (["check"], ["check", "--json"], ["check", "--records"], ["show"], ["show", "--count", "5"]):
            assert jaxmm("data", *args, spec)[0] == 1
    assert jaxmm("data", "show", "--count", "1", f"vqa:{tmp_path}/vqa.json")[0] == 0      # the other may be better
    status, _, err = jaxmm("data", "check", f"captions:{tmp_path}/captions.json")
    assert status == 1 and "has no captions" in err


def test_paths_from_the_home_folder(jaxmm, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "classes").mkdir()
    tiny.picture_files(tmp_path / "classes/a", 2)
    assert jaxmm("data", "show", "folder:~/classes", "--html", "~/page.html")[0] == 0
    assert jaxmm("data", "import", "folder:~/classes", "~/set", "--workers", 1)[0] == 0
    assert (tmp_path / "page.html").is_file() and (tmp_path / "set/features.json").is_file()
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    for args in (["data", "import", "folder:~/classes", "hf://b/set"], ["train", "--workdir", "http://b/run"],
                 ["data", "show", "folder:~/classes", "--html", "https://b/page.html"]):
        status, _, err = jaxmm(*args)
        assert status == 1
        assert err == f"error: path is {args[-1]!r}; expected a local path, or one in a bucket (gs://, s3://)\n"
    assert sorted(tmp_path.iterdir()) == before


def test_what_is_typed_wrong_ends_in_one_line(jaxmm, models, tmp_path):
    for args, words in (
            (("show", tmp_path / "none at all"), "is no folder, no file"),
            (("classify", tmp_path / "none.png", "--model", models / "vit"), "does not exist"),
            (("classify", tmp_path, "--model", models / "vit"), "a folder without images"),
            (("search", "query", tmp_path, "words"), "is no index"),
            (("parity", models / "vit"), "")):
        status, out, err = jaxmm(*args)
        if args[0] == "parity":
            assert status == 0 and "not compared" in out and "vision layer 3" in out
        else:
            assert status != 0 and words in err and err.startswith("error: ") and err.count("\n") == 1


def test_help_names_every_command(jaxmm):
    status, out, _ = jaxmm("--help")
    assert status == 0 and all(name in out for name in ("classify", "search", "convert", "show", "parity"))
    for args in (("search", "--help"), ("classify", "--help"), ("search", "query", "--help")):
        assert jaxmm(*args)[0] == 0


def test_the_command_is_installed():
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert 'jaxmm = "jaxmm.cli:main"' in text and callable(cli.main)


def test_eval(jaxmm, models, tmp_path):
    animals = web_dataset(tmp_path / "wds_animals", [[("cls", str(row % 5).encode()) for row in range(11)]],
                          classes=tiny.LABELS)
    options = ("--root", tmp_path / "wds_{}", "--out", tmp_path / "out", "--batch-size", 8)
    status, out, err = jaxmm("eval", models / "clip", models / "vit", "--on", "animals,none", *options, "--json",
                             tmp_path / "all.json", "--html", tmp_path / "page.html", "--predictions")
    assert status == 1 and err.count("error: ") == 2 and f"vit on wds:{tmp_path / 'wds_none'}:test: " in err
    assert "3 of 4 done" in err and "zero_shot_top1" in out and "mean_recall" in out
    clip, vit = json.loads((tmp_path / "all.json").read_text())
    [want] = evaluate(load(models / "clip"), f"wds:{animals}", batch_size=8)
    assert clip["dataset"] == "wds/animals" and clip["metrics"]["acc1"] == want.metrics["zero_shot_top1"]
    assert vit["jaxmm"]["metrics"]["top1"] == np.mean([
        rows[0][0] == tiny.LABELS[row % 5] for row, rows in enumerate(tiny.vit().classify(
            [Image.open(io.BytesIO(jpeg(row))) for row in range(11)]))])
    mistakes = clip["jaxmm"]["mistakes"] + vit["jaxmm"]["mistakes"]
    assert (tmp_path / "page.html").read_text().count("<img") == len(mistakes) > 0
    files = sorted((tmp_path / "out").glob("*.json"))
    assert [re.sub("_[0-9a-f]{6}.json", "", path.name) for path in files] == [
        "clip_animals_zero_shot", "vit_animals_topk_accuracy"]
    first, _ = sorted((tmp_path / "out" / "predictions").iterdir())
    written = [tuple(row.values()) for row in map(json.loads, first.read_text().splitlines())]
    assert first.stem == files[0].stem and len(written) == 11
    assert {tuple(mistake.values())[1:] for mistake in clip["jaxmm"]["mistakes"]} < set(written)
    assert jaxmm("eval", models / "vit", "--on", "animals", *options, "--predictions")[0] == 0
    status, _, err = jaxmm("eval", models / "vit", *options)
    assert status == 1 and "batch_size is 8; expected a source to measure on" in err
    for extra, words in ((("--evaluators", "top1"), "expected some of zero_shot, accuracy"),
                         (("--prompts", "nothing"), "prompts is 'nothing'")):
        status, _, err = jaxmm("eval", models / "clip", "--on", f"wds:{animals}", *extra)
        assert status == 1 and words in err
