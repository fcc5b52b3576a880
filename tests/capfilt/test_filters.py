"""Several filters at once, near-duplicates and formulas, through all stages; stopped and continued."""

import os
import shutil
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

import jaxmm
from jaxmm.capfilt import stages
from jaxmm.capfilt.html_report import measure, write_report
from jaxmm.capfilt.merge import merge
from jaxmm.capfilt.scoring import split_name
from jaxmm.capfilt.selection import Rule
from jaxmm.capfilt.stages import EMBEDDINGS, SCORES, SELECTED, begin, select, write_captions, write_scores
from jaxmm.capfilt.tables import read_texts
from jaxmm.data.images import decode
from jaxmm.data.sources.registry import open_source
from jaxmm.validation import ConfigError
from tests.capfilt.conftest import contents
from tests.data import crawl
from tests.pretrained import tiny

RULE = Rule(formula="itm > quantile(itm, 0.4) or clip > quantile(clip, 0.6)", near_duplicates=0.9999)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Two shards: an image occurs in both as another file, and a human caption is of one in the second."""
    folder = tmp_path_factory.mktemp("small")
    tiny.clip().save(folder / "clip")
    tiny.matcher().save(folder / "filter")
    again = [("000000077.jpg", crawl.jpeg(1, comment=b"again")), ("000000077.txt", b"picture 1 again")]
    crawl.write_tar(folder / "00000.tar", crawl.pairs(0, 5))
    crawl.write_tar(folder / "00001.tar", crawl.pairs(30, 4) + again)
    (folder / "0.jpg").write_bytes(crawl.jpeg(32, comment=b"by a person"))
    (folder / "human.jsonl").write_text('{"image": "0.jpg", "captions": ["a small circle"]}\n')
    return folder


def run(out, small, rule=RULE):
    folder = begin(out, f"tars:{small}/*.tar", f"captions:{small}/human.jsonl")
    write_captions(folder, [])
    write_scores(folder, [str(small / "filter"), f"clip={small / 'clip'}"], embeddings="clip")
    select(folder, rule)
    merge(folder)
    return folder


@pytest.fixture(scope="module")
def scored(tmp_path_factory, small):
    return run(tmp_path_factory.mktemp("scored") / "out", small)


def test_every_score_is_its_models(scored, small):
    matcher, clip = jaxmm.load(small / "filter"), jaxmm.load(small / "clip")
    for shard in scored.shards:
        table, images = read_texts(scored.table(SCORES, shard)), read_texts(scored.table(EMBEDDINGS, shard))
        assert list(table.columns)[-3:] == ["itm", "itc", "clip"] and len(images) == len(set(table.columns["record"]))
        for i, text in enumerate(table.columns["text"]):
            image = [decode(shard.source[table.columns["record"][i]]["image"])]
            vector = clip.encode_image(image)
            for name, want in (("itm", matcher.match(image, [text])), ("clip", vector @ clip.encode_text([text]).T),
                               ("itc", matcher.encode_image(image) @ matcher.encode_text([text]).T)):
                np.testing.assert_allclose(table[name][i], want[0, 0], atol=1e-5)
            stored = np.frombuffer(images.columns["embedding"][images.columns["record"].index(
                table.columns["record"][i])], np.float16)
            np.testing.assert_allclose(stored, vector[0], atol=1e-3)


def test_near_duplicates_go_or_count_as_one_image(scored, small, tmp_path):
    """The copy in the second shard and the image that a person captioned too; the person's stays."""
    tables = scored.tables(SELECTED)
    why = {key: reason for table in tables for key, reason in zip(table.columns["key"], table.columns["why"],
                                                                  strict=True)}
    near = {key for key, reason in why.items() if reason == "near duplicate"}
    assert near == {"00001/000000077", "00001/000000032"} and measure(tables)["near_duplicates"] == 2
    page = write_report(scored, examples=2).read_text()
    assert "images are nearly the same as another one" in page and "quantile(itm, 0.4)" in page
    out = tmp_path / "out"
    shutil.copytree(scored.path, out)
    folder = stages.Folder(out)
    rule = Rule(threshold=None, near_duplicates=0.9999, group=True)
    select(folder, rule)
    merge(folder)
    web, human = (open_source(f"tfds:{out}/merged:{split}") for split in ("web", "human"))
    records = [source[i] for source in (web, human) for i in range(len(source))]
    ids = {record["key"]: record["image_id"] for record in records}
    assert len(web) == 10 and len(set(ids.values())) == 9
    assert ids["00001/000000077"] == ids["00000/000000001"]
    assert ids["00001/000000032"] == next(value for key, value in ids.items() if not key.startswith("0000"))
    assert measure(folder.tables(SELECTED))["near_duplicates"] == 2
    assert web.has_origins and {record["origins"] for record in records} == {("web",), ("human",)}
    select(folder, RULE)
    merge(folder)
    assert contents(out) == contents(scored.path)


class Stopped(BaseException):
    """Ends a run at a write, as a kill does."""


def test_stopped_again_and_again_it_writes_the_same_bytes(scored, small, tmp_path, monkeypatch):
    writes, fsync, load = 0, os.fsync, cache(jaxmm.load)

    def counted(file):
        nonlocal writes
        fsync(file)
        writes += 1
        if writes == 3:
            raise Stopped

    monkeypatch.setattr(os, "fsync", counted)
    monkeypatch.setattr(stages, "load", lambda name, mesh: load(name))
    stops = 0
    while stops < 50:
        writes = 0
        try:
            run(tmp_path / "out", small)
            break
        except Stopped:
            stops += 1
    assert stops >= 5 and contents(tmp_path / "out") == contents(scored.path)


def test_a_two_tower_model_alone(small, tmp_path):
    folder = begin(tmp_path / "out", f"tars:{small}/00000.tar", None)
    write_captions(folder, [])
    write_scores(folder, str(small / "clip"))
    assert list(read_texts(folder.table(SCORES, folder.shards[0])).columns)[-1] == "itc"
    with pytest.raises(ConfigError, match=r"rule\.score is 'itm'; expected one of itc"):
        select(folder, Rule())
    with pytest.raises(ConfigError, match=r"rule\.formula is .* of the scores itc such as .* no score 'itm'"):
        select(folder, Rule(formula="itm > 0"))
    with pytest.raises(ConfigError, match=r"rule\.near_duplicates is 0\.9; expected None, or a folder that was scored"):
        select(folder, Rule(score="itc", near_duplicates=0.9))
    assert select(folder, replace(Rule(), score="itc", threshold=None, quantile=0.5)) == 1
    with pytest.raises(ConfigError, match="filter was"):
        write_scores(folder, [f"clip={small / 'clip'}"])


def test_what_cannot_be(small, tmp_path):
    folder = begin(tmp_path / "out", f"tars:{small}/00000.tar", None)
    write_captions(folder, [])
    clip = str(small / "clip")
    for filters, message in (([clip, clip], "filter is .*one or more, with different names"), ([], "one or more"),
                             ([f"text={clip}"], "another name than text: it is taken"),
                             ([f"quantile={clip}"], "another name than quantile"), ([f"or={clip}"], "than or: it is")):
        with pytest.raises(ConfigError, match=message):
            write_scores(folder, filters)
    with pytest.raises(ConfigError, match="embeddings is 'clip'; expected one of the cosines itc"):
        write_scores(folder, clip, embeddings="clip")
    assert [write_scores(folder, clip, embeddings=name) for name in ("itc", "itc", None)] == [1, 0, 1]
    with pytest.raises(ConfigError, match=r"expected None, or a folder that was scored with `--embeddings NAME`"):
        select(folder, Rule(score="itc", near_duplicates=0.9))
    assert split_name("C:/a=b") == (None, "C:/a=b") and split_name("big=runs/a=b") == ("big", "runs/a=b")
