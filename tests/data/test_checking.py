"""Checking: sixteen records of a crawl, judged by hand, and the numbers of a report."""

import hashlib
import io
import json
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from jaxmm.config import DataConfig, ImageConfig, TokenizerConfig
from jaxmm.data.bad_records import REASONS
from jaxmm.data.eval_pipeline import eval_batches
from jaxmm.data.pipeline import train_batches
from jaxmm.data.sources.registry import open_source
from jaxmm.data.tokenizers import make_tokenizer
from jaxmm.data.tools import showing
from jaxmm.data.tools.checking import check, examine, pixel_id
from tests.data.crawl import CASES, files, jpeg, pairs, photo, write_tar
from tests.data.test_images import encode
from tests.data.test_pipeline import Letters
from tests.data.test_sources import png, write


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
    usable = {key: examine(crawl, number)[1] for number, (key, (_, reason)) in enumerate(CASES.items()) if not reason}
    assert usable["bad_utf8"].texts == ("caf\ufffd table",) and usable["nul_text"].texts == ("a cup of tea",)
    assert usable["rotated"].images[0].size == (24, 31) and usable["ok_0"].images[0].size == (31, 24)
    assert {key for key, record in usable.items() if record.plain != (True,)} == {"cmyk", "gray16", "palette",
                                                                                 "animated", "rotated"}
    assert usable["ok_0"].record["image"] == CASES["ok_0"][0]["jpg"]


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


def test_every_reason_is_reported(crawl, tmp_path):
    """A record of each, in four sources; a damaged table of codes is `corrupt`."""
    data = bytearray(jpeg(1))
    data[data.index(b"\xff\xc4") + 5] = 255
    labels = [("a.jpg", jpeg(1)), ("a.cls", b"0"), ("b.jpg", jpeg(2)), ("c.jpg", bytes(data)), ("c.cls", b"0")]
    rows = [{"image": "1.png", "question": "what?", "answer": " "}, {"image": "2.png", "question": "why?",
                                                                    "answer": "so"}]
    write(tmp_path / "1.png", png(1))
    captions = write(tmp_path / "a.jsonl", '{"image": "1.png", "caption": "x"}\n' * 2 + '{"image"')
    sources = [crawl, *map(open_source, (
        f"tars:{write_tar(tmp_path / 'a.tar', labels)}", f"vqa:{write(tmp_path / 'q.json', json.dumps(rows))}",
        f"captions:{captions}"))]
    broken = [check(source)["broken"] for source in sources]
    assert broken[1:] == [{"corrupt": 1, "no label": 1}, {"unreadable": 1, "no answer": 1}, {"malformed": 1}]
    assert {reason for reasons in broken for reason in reasons} == set(REASONS)


def test_sources_with_classes_need_labels_and_no_texts():
    report = check(open_source("digits:test"), shard_records=100)
    assert report["usable"] == report["records"] == len(open_source("digits:test")) and report["texts"] == 0
    assert report["caption_words"] is None and report["width"]["most"] == 8


def test_the_id_of_a_image_is_of_its_pixels():
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
    assert "&lt;script&gt;alert(1)&lt;/script&gt; [31m" in page and "a/&lt;b&gt; · 31 x 24" in page
    assert "<script" not in page and "<b>" not in page and page.count("data:image/webp;base64,") == 1


def test_sources_of_questions_and_of_image_pairs(tmp_path):
    rows = [{"image": "1.png", "question": "what?", "answer": "red"}, {"image": "1.png", "question": "how?"},
            {"image": "2.png", "question": "who?", "answers": [" "]}, {"image": "3.png", "question": "why?",
                                                                      "answer": "so"}]
    for number in (1, 2):
        write(tmp_path / f"{number}.png", png(number))
    source = open_source(f"vqa:{write(tmp_path / 'q.json', json.dumps(rows))}")
    report = check(source)
    assert report["broken"] == {"unreadable": 1, "no answer": 2} and report["texts"] == 1
    batch = next(train_batches(source, DataConfig(batch_size=4, image=ImageConfig(size=8)), make_tokenizer(
        TokenizerConfig(vocab_size=90), ["what red"]), seed=0))
    assert Counter(REASONS[fault - 1] for fault in batch["fault"] if fault) == report["broken"]
    rows = [{"sentence": "a", "label": "True", "images": ["1.png", "2.png"]},
            {"sentence": "b", "label": "False", "images": ["2.png", "3.png"]}]
    source = open_source(f"nlvr:{write(tmp_path / 'pairs.json', json.dumps(rows))}")
    report = check(source)
    assert report["broken"] == {"unreadable": 1} and report["width"]["least"] == 5 and report["duplicates"] == 0
    shown = showing.first(source, 2)
    assert shown[0].size == "5 x 3, 5 x 3" and shown[1].size.startswith("unreadable") and shown[1].images == ()
    showing.write_html("pairs", shown, tmp_path / "pairs.html")
    assert (tmp_path / "pairs.html").read_text().count("data:image/webp;base64,") == 2


def test_showing_imports_no_models():
    program = ("import sys; from jaxmm.data.tools import showing; print([name for name in sys.modules if name in ("
               "'matplotlib', 'optax') or name.startswith(('jaxmm.models', 'jaxmm.evals'))])")
    printed = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert printed == "[]\n"
