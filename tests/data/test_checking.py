"""Sixteen records of a crawl, each judged by hand; what a report counts."""

import hashlib
import io
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from jaxmm.config import DataConfig, ImageConfig
from jaxmm.data.bad_records import REASONS
from jaxmm.data.pipeline import eval_batches
from jaxmm.data.sources.registry import open_source
from jaxmm.data.tools import showing
from jaxmm.data.tools.checking import check, examine, pixel_id
from tests.data.crawl import CASES, files, jpeg, pairs, photo, write_tar
from tests.data.test_images import encode
from tests.data.test_pipeline import Letters


@pytest.fixture(scope="module")
def crawl(tmp_path_factory):
    return open_source(f"tars:{write_tar(tmp_path_factory.mktemp('crawl') / 'crawl.tar', files(CASES))}")


def test_every_case_is_judged(crawl):
    judged = []
    report = check(crawl, on_record=judged.append)
    assert {j.key: (j.usable, j.reason) for j in judged} == {
        f"crawl/{key}": (reason is None, reason) for key, (_, reason) in CASES.items()}
    assert [j.key for j in judged] == [f"crawl/{key}" for key in CASES]
    assert next(j.detail for j in judged if j.key == "crawl/bomb").startswith("Image size (900000000 pixels)")
    reasons = Counter(reason for _, reason in CASES.values() if reason)
    assert (report["records"], report["usable"], report["broken"]) == (16, 16 - reasons.total(), dict(reasons))
    assert report["examples"]["no text"] == ["crawl/no_text", "crawl/blank_text"] and report["texts"] == 9
    assert report["caption_words"]["most"] == 200_000 and report["duplicates"] == 0 and report["faults"] == []


def test_training_judges_alike(crawl):
    [batch] = eval_batches(crawl, DataConfig(image=ImageConfig(size=8)), 16, Letters())
    assert [REASONS[fault - 1] if fault else None for fault in batch["fault"]] == [reason for _, reason in
                                                                                   CASES.values()]


def test_what_the_usable_ones_hold(crawl):
    found = {key: examine(crawl, number) for number, (key, (_, reason)) in enumerate(CASES.items()) if not reason}
    assert found["bad_utf8"].texts == ("caf\ufffd table",) and found["nul_text"].texts == ("a cup of tea",)
    assert found["rotated"].image.size == (24, 31) and found["ok_0"].image.size == (31, 24)
    assert {key for key, usable in found.items() if usable.encoded is None} == {"cmyk", "gray16", "palette", "animated",
                                                                               "rotated"}
    assert found["ok_0"].encoded == CASES["ok_0"][0]["jpg"]


def test_a_report(tmp_path):
    contents = [*pairs(0, 3), ("same.png", encode(Image.open(io.BytesIO(jpeg(1))))),
                ("same.txt", b"one two three four"), ("wide.png", encode(photo(9, 10, 101))), ("wide.txt", b"w")]
    write_tar(tmp_path / "0.tar", contents)
    write_tar(tmp_path / "1.tar", pairs(2, 2))
    (tmp_path / "2.tar").write_bytes(b"?" * 700)
    report = check(open_source(f"tars:{tmp_path}"))
    assert (report["records"], report["usable"], report["duplicates"], report["texts"]) == (7, 7, 2, 7)
    widths, words = [31] * 6 + [101], [2] * 5 + [4, 1]
    for name, values in (("width", widths), ("height", [24] * 6 + [10]), ("caption_words", words)):
        assert list(report[name].values()) == pytest.approx(np.quantile(values, [0, 0.05, 0.5, 0.95, 1]).tolist())
    assert [fault["shard"] for fault in report["faults"]] == [f"tars:{tmp_path / '2.tar'}"]


def test_sources_with_classes_need_labels_and_no_texts():
    report = check(open_source("digits:test"), shard_records=100)
    assert report["usable"] == report["records"] == len(open_source("digits:test")) and report["texts"] == 0
    assert report["caption_words"] is None and report["width"]["most"] == 8


def test_the_id_of_a_picture_is_of_its_pixels():
    image = photo(3, 5, 7)
    raw = b"7 5 " + np.asarray(image).tobytes()
    assert pixel_id(image) == hashlib.blake2b(raw, digest_size=16).hexdigest()
    assert pixel_id(image) != pixel_id(Image.frombytes("RGB", (5, 7), image.tobytes()))


def test_showing(crawl, tmp_path):
    shown = showing.first(crawl, 40)
    assert [record.key for record in shown] == [f"crawl/{key}" for key in CASES]
    assert shown[0].size == "31 x 24" and shown[0].texts == ("coin",) and shown[1].size.startswith("truncated: ")
    assert max(len(text) for record in shown for text in record.texts) == showing.LONGEST
    write_tar(tmp_path / "a.tar", [("<b>.jpg", jpeg(1)), ("<b>.txt", b"<script>alert(1)</script> \x1b[31m")])
    source = open_source(f"tars:{tmp_path}/a.tar")
    showing.write_html("<i>", showing.first(source, 1), tmp_path / "a.html")
    page = (tmp_path / "a.html").read_text()
    assert "&lt;script&gt;alert(1)&lt;/script&gt; \ufffd[31m" in page and "a/&lt;b&gt; · 31 x 24" in page
    assert "<script" not in page and "<b>" not in page and page.count("data:image/webp;base64,") == 1
