"""The stages against the models that they call, and against themselves: interrupted, repeated, divided."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

import jaxmm
from jaxmm.capfilt import stages
from jaxmm.capfilt.merge import merge, merged_source
from jaxmm.capfilt.selection import Rule
from jaxmm.capfilt.stages import CAPTIONS, SCORES, SELECTED, begin, select, write_captions, write_scores
from jaxmm.capfilt.synthetic_captions import CaptionOptions
from jaxmm.data.base import DataError
from jaxmm.data.images import decode
from jaxmm.data.sources.registry import open_source
from jaxmm.inference.generate import Decoding
from jaxmm.validation import ConfigError
from tests.capfilt.conftest import MEDIAN, SAMPLED, contents, run
from tests.data import crawl

ROOT = Path(__file__).parents[2]


def rows(folder, stage):
    """All texts as dicts, with the picture they are about."""
    for shard in folder.shards:
        table = stages.read_texts(folder.table(stage, shard))
        for row in zip(*table.columns.values(), strict=True):
            yield dict(zip(table.columns, row, strict=True)) | {"shard": shard}


def picture(row):
    return decode(row["shard"].source[row["record"]]["image"])


def test_texts_are_the_webs_the_captioners_and_peoples(finished):
    found = list(rows(finished[0], CAPTIONS))
    own = {row["key"]: row["text"] for row in found if row["origin"] == "web"}
    assert own["00000/000000007"] == "picture 7" and own["00001/cmyk"] == "a clock"
    assert len(own["00001/long_text"]) <= 2000 and "00001/no_text" not in own
    drawn = {row["key"] for row in found if row["origin"] == "synthetic"}
    assert drawn - set(own) == {"00001/no_text", "00001/blank_text"}      # pictures without words get some
    assert {row["text"] for row in found if row["origin"] == "human"} >= {"a small circle", "picture 5"}
    assert all((row["log_probability"] is None or row["log_probability"] != row["log_probability"]) ==
               (row["origin"] != "synthetic") for row in found)


@pytest.mark.parametrize("decoding, captions", [(Decoding(max_length=9), 1), (Decoding(beams=3, max_length=9), 2)])
def test_captions_are_the_captioners(tmp_path, data, models, decoding, captions):
    folder = begin(tmp_path, f"tars:{data}/00002.tar", None)
    write_captions(folder, [str(models / "captioner")] * 2, CaptionOptions(decoding=decoding, captions=captions))
    found = [row for row in rows(folder, CAPTIONS) if row["origin"] == "synthetic"]
    model = jaxmm.load(models / "captioner")
    for captioner in (0, 1):
        mine = [row for row in found if row["captioner"] == captioner]
        for key in {row["key"] for row in mine}:
            here = [row for row in mine if row["key"] == key]
            [want] = model.caption([picture(here[0])], decoding=decoding, top=captions)
            want = [each for i, each in enumerate(want) if each[0] and each[0] not in [e[0] for e in want[:i]]]
            assert [row["text"] for row in here] == [text for text, _ in want]
            np.testing.assert_allclose([row["log_probability"] for row in here], [score for _, score in want],
                                       atol=1e-5)


def test_what_is_drawn_depends_on_the_key_alone(tmp_path, data, models, finished):
    """Other shards, other neighbours, another number of texts: the same captions."""
    folder = begin(tmp_path, f"tars:{data}/0000[02].tar", None)
    write_captions(folder, [str(models / "captioner")], CaptionOptions(decoding=SAMPLED, captions=2))
    again = {(row["key"], row["text"]) for row in rows(folder, CAPTIONS)}
    before = {(row["key"], row["text"]) for row in rows(finished[0], CAPTIONS)
              if row["key"].startswith(("00000/", "00002/"))}
    assert again == before and len({text for _, text in again}) > 20
    other = begin(tmp_path / "seed", f"tars:{data}/00002.tar", None)
    write_captions(other, [str(models / "captioner")], CaptionOptions(decoding=SAMPLED, captions=2, seed=1))
    assert not {(row["key"], row["text"]) for row in rows(other, CAPTIONS) if row["origin"] == "synthetic"} & before


def test_scores_are_the_filters(finished, models):
    model = jaxmm.load(models / "filter")
    found = list(rows(finished[0], SCORES))
    for row in found[::7]:
        image, text = [picture(row)], [row["text"]]
        np.testing.assert_allclose(row["itm"], model.match(image, text)[0, 0], atol=1e-6)
        np.testing.assert_allclose(row["itc"], (model.encode_image(image) @ model.encode_text(text).T)[0, 0], atol=1e-6)
    assert len({row["itm"] for row in found}) > len(found) / 2


def test_the_merged_data_is_what_stays(finished):
    folder, _ = finished
    merged = folder.path / "merged"
    kept: dict[str, list[str]] = {}
    for row in rows(folder, SELECTED):
        if row["kept"]:
            kept.setdefault(row["key"], []).append(row["text"])
    source = open_source(merged_source(merged, 3))
    web, human = (open_source(f"tfds:{merged}:{split}") for split in ("web", "human"))
    assert len(source) == len(web) + 3 * len(human) and len(human) == 6
    read = {source[i]["key"]: list(source[i]["texts"]) for i in range(len(source))}
    assert read == kept
    ids = {web[i]["image_id"]: decode(web[i]["image"]).tobytes() for i in range(len(web))}
    assert len(set(ids.values())) == len(ids) > 10 and all(len(each) == 32 for each in ids)
    assert all(decode(web[i]["image"]).tobytes() == ids[web[i]["image_id"]] for i in range(len(web)))


def test_what_is_done_is_not_done_again(finished, data, models, monkeypatch):
    folder, written = finished
    assert written == (5, 5, 5)      # three tars, two runs of at most four of people's records
    before = {path: path.stat().st_mtime_ns for path in folder.path.rglob("*")}
    monkeypatch.setattr(stages, "load", None)
    assert run(folder.path, data, models)[1] == (0, 0, 0)
    assert {path: path.stat().st_mtime_ns for path in folder.path.rglob("*")} == before


def test_types_are_recorded_by_their_first_names(finished):
    """Folders and digests of versions with other module names stay valid."""
    manifest = finished[0].manifest
    assert manifest["decoding"]["type"] == "jaxmm.generate.Decoding"
    assert manifest["rule"]["type"] == "jaxmm.capfilt.select.Rule"


def test_another_rule_asks_no_model(finished, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(finished[0].path, out)
    monkeypatch.setattr(stages, "load", None)
    folder = stages.Folder(out)
    before = len(open_source(f"tfds:{merge(folder)}:web"))
    assert select(folder, Rule(threshold=None, quantile=0.9)) == 5
    after = len(open_source(f"tfds:{merge(folder)}:web"))
    assert 0 < after < before
    select(folder, MEDIAN)
    merge(folder)
    assert contents(out) == contents(finished[0].path)


def test_runs_are_not_mixed(finished, tmp_path, data, models):
    out = tmp_path / "out"
    shutil.copytree(finished[0].path, out)
    folder, captioner = stages.Folder(out), str(models / "captioner")
    with pytest.raises(ConfigError, match=r"holds a run of something else.*\n  seed was 0 and is 1"):
        write_captions(folder, [captioner], CaptionOptions(decoding=SAMPLED, captions=2, seed=1))
    with pytest.raises(ConfigError, match="web was"):
        begin(out, "scenes:tiny/web", f"captions:{data}/human.jsonl", size=4)
    moved = tmp_path / "filter"
    shutil.copytree(models / "captioner", moved)
    next((out / SCORES).iterdir()).unlink()
    with pytest.raises(ConfigError, match="filter was"):
        write_scores(folder, str(moved))
    swapped = tmp_path / "models"
    shutil.copytree(models, swapped)
    fresh = tmp_path / "fresh"
    here = begin(fresh, f"tars:{data}/00002.tar", None)
    write_captions(here, [str(swapped / "captioner")])
    write_scores(here, str(swapped / "filter"))
    shutil.rmtree(swapped / "filter")
    matcher = jaxmm.load(models / "filter")
    replace(matcher, params={**matcher.params, "matching_head": {
        name: -leaf for name, leaf in matcher.params["matching_head"].items()}}).save(swapped / "filter")
    here.table(SCORES, here.shards[0]).unlink()
    with pytest.raises(ConfigError, match="filter_digest was"):
        write_scores(here, str(swapped / "filter"))


def test_what_cannot_be_done_is_said_first(tmp_path, data, models):
    folder = begin(tmp_path / "a", f"tars:{data}/00002.tar", None)
    with pytest.raises(ConfigError, match=r"captions/: 1 of 1 shards are missing, the first web-00000"):
        write_scores(folder, str(models / "filter"))
    with pytest.raises(ConfigError, match=r"captioner is .*a model that writes captions.* this one .*matches images"):
        write_captions(folder, [str(models / "filter")])
    folder = begin(tmp_path / "b", f"tars:{data}/00002.tar", None)
    with pytest.raises(ConfigError, match=r"captions is 2; expected at most decoding.beams = 1"):
        write_captions(folder, [str(models / "captioner")], CaptionOptions(decoding=Decoding(max_length=9), captions=2))
    folder = begin(tmp_path / "c", f"tars:{data}/00002.tar", None)
    write_captions(folder, [str(models / "captioner")])
    with pytest.raises(ConfigError, match=r"filter is .*a model that matches images.* this one .*writes captions"):
        write_scores(folder, str(models / "captioner"))
    with pytest.raises(ConfigError, match=r"a folder that `jaxmm capfilt caption` or `run` began"):
        stages.Folder(tmp_path / "d").tables(CAPTIONS)


def test_a_picture_that_vanishes_between_stages_is_named(tmp_path, models):
    data = tmp_path / "data"
    crawl.write_tar(data / "0.tar", crawl.pairs(0, 3))
    folder = begin(tmp_path / "out", f"tars:{data}/0.tar", None)
    write_captions(folder, [str(models / "captioner")])
    crawl.write_tar(data / "0.tar", [(f"{i:09d}.{end}", content) for i in range(3) for end, content in (
        ("jpg", b"" if i == 1 else crawl.jpeg(i)), ("txt", b"x"))])
    with pytest.raises(DataError, match="0/000000001 could be read when it was captioned, and now is empty"):
        write_scores(begin(tmp_path / "out", f"tars:{data}/0.tar", None), str(models / "filter"))


def process(out, data, models, **environment):
    return subprocess.Popen(
        [sys.executable, "-m", "tests.capfilt.process", out, data, models], cwd=ROOT, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | {name: str(value) for name, value in environment.items()})


class Stopped(BaseException):
    """Ends a run at a write, as a kill does."""


@pytest.mark.parametrize("at, least", [(3, 10), (7, 5)])
def test_stopped_again_and_again_it_ends_as_if_undisturbed(finished, tmp_path, data, models, monkeypatch, at, least):
    """Every run ends at its third (seventh) write to disk, whatever the stage."""
    out, writes, fsync, load = tmp_path / "out", 0, os.fsync, cache(jaxmm.load)

    def counted(file):
        nonlocal writes
        fsync(file)
        writes += 1
        if writes == at:
            raise Stopped

    monkeypatch.setattr(os, "fsync", counted)
    monkeypatch.setattr(stages, "load", lambda name, mesh: load(name))
    stops = 0
    while stops < 100:
        writes = 0
        try:
            run(out, data, models)
            break
        except Stopped:
            stops += 1
    assert stops >= least and contents(out) == contents(finished[0].path)


def test_killed_it_goes_on(finished, tmp_path, data, models):
    """The process is killed at its seventeenth write to disk, among the scores."""
    killed = process(tmp_path / "out", data, models, KILLED_AT=17)
    assert killed.wait() == -signal.SIGKILL, killed.stderr.read()
    assert run(tmp_path / "out", data, models)[1][0] == 0
    assert contents(tmp_path / "out") == contents(finished[0].path)


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.long)])
def test_several_processes_write_the_same_bytes(finished, tmp_path, data, models, count):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    started = [process(tmp_path / "out", data, models, HOSTS=count, HOST=i, ADDRESS=address) for i in range(count)]
    for host in started:
        assert host.wait(timeout=240) == 0, host.stderr.read()
    assert contents(tmp_path / "out") == contents(finished[0].path)
