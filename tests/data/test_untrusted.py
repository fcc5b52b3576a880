"""Data of strangers: payloads that would leave a mark and do not, and specs of any form."""

import json
import os
import pickle
import subprocess
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jaxmm.data import DataError, open_source
from jaxmm.data.bad_records import BadRecord
from jaxmm.data.base import record_texts
from jaxmm.data.sources.registry import KINDS
from jaxmm.data.tools.checking import check
from jaxmm.validation import ConfigError
from tests.data.crawl import jpeg, write_tar
from tests.data.test_sources import png
from tests.data.test_web_datasets import web_dataset
from tests.properties import EXAMPLES, JSON, TEXTS


class Payload:
    """Makes the file `mark` where it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.fixture
def mark(tmp_path):
    return tmp_path / "mark"


def assert_harmless(mark, payload):
    """There is no mark; and the payload makes one where it is let."""
    assert not mark.exists()
    pickle.loads(payload) if isinstance(payload, bytes) else subprocess.run(payload, shell=True, check=False)
    assert mark.exists()
    mark.unlink()


def test_pickles_in_shards_are_not_read(tmp_path, mark):
    payload = pickle.dumps(Payload(mark))
    members = [(f"a.{ending}", payload) for ending in ("pkl", "pickle", "pyd", "pth", "pt", "npy", "npz", "cls")]
    source = open_source(f"tars:{write_tar(tmp_path / 'a.tar', [('a.jpg', jpeg(1)), ('a.txt', b'x'), *members])}")
    assert check(source)["usable"] == 1 and source[0]["texts"] == ("x",)
    np.save(tmp_path / "label.npy", np.array([Payload(mark)], object))
    label = (tmp_path / "label.npy").read_bytes()
    for number, content in enumerate((label, payload)):
        folder = web_dataset(tmp_path / f"wds{number}", [[("npy", content)]], kind="multilabel")
        with pytest.raises(BadRecord, match="no label"):
            open_source(f"wds:{folder}")[0]
    assert_harmless(mark, payload)


def test_pickles_in_the_types_of_parquet_are_not_read(tmp_path, mark):
    """What pyarrow ran before version 14 (CVE-2023-47248)."""
    payload = pickle.dumps(Payload(mark))
    extension = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": payload}
    fields = [pa.field("image", pa.binary(), metadata=extension), pa.field("caption", pa.string(), metadata=extension)]
    table = pa.table([[jpeg(1)], ["x"]], schema=pa.schema(fields, metadata={b"pandas": payload}))
    pq.write_table(table, tmp_path / "a.parquet")
    assert check(open_source(f"parquet:{tmp_path}/a.parquet"))["usable"] == 1
    assert_harmless(mark, payload)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["pipe:touch {}", "|touch {}", "$(touch {})", "`touch {}`", "; touch {};",
                                  "pipe:touch {} ; cat a.tar", "a.tar; touch {}"])
def test_a_spec_runs_no_command(kind, form, tmp_path, mark, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.tar").write_bytes(b"")
    with pytest.raises((DataError, ConfigError)):
        open_source(f"{kind}:{form.format(mark)}")
    assert not mark.exists() and {path.name for path in tmp_path.iterdir()} == {"a.tar"}
    if kind == "tars":
        assert_harmless(mark, form.format(mark).removeprefix("pipe:").removeprefix("|").replace("$(", "(").strip("; "))


def test_a_list_that_names_what_is_no_file(tmp_path):
    """A device without an end, a pipe that nobody writes to, a folder, and more than an image has."""
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "good.png").write_bytes(png(1))
    with (tmp_path / "large.png").open("wb") as file:
        file.truncate(2**40)                                        # takes no room on the disk
    names = ("/dev/zero", "pipe.png", "folder.png", "large.png", "good.png")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"image": name, "caption": "x"}) + "\n" for name in names))
    judged = []
    check(open_source(f"captions:{tmp_path}/a.jsonl"), on_record=judged.append)
    assert [judgement.reason for judgement in judged] == ["unreadable"] * 3 + ["too large", None]


PIECES = ["a.jsonl", "a.tar", "pictures", ":", "::", "@", "@image=", "*", "?", "[", "]", "{0..3}", "{a,b}", "{", "}",
          "~nobody", "$HOME", "\0", "\n", "\ud800", "%s", "#", " + ", "3*", "0*", " + captions:", "file:///", "https://[",
          "train", "[:3]", "x" * 300]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("specs")
    (root / "pictures").mkdir()
    (root / "pictures" / "0.jpg").write_bytes(jpeg(1))
    (root / "a.jsonl").write_text('{"image": "pictures/0.jpg", "caption": "x"}\n')
    write_tar(root / "a.tar", [("a.jpg", jpeg(1)), ("a.txt", b"x")])
    return root


LOCAL = sorted(set(KINDS) - {"scenes", "tfds", "wds"})
"""Kinds whose unknown locations are looked for on the disk alone."""


@EXAMPLES
@given(st.sampled_from(LOCAL), st.lists(st.sampled_from(PIECES) | st.text(
    st.characters(exclude_characters="/.~"), max_size=9), max_size=5))
@example("captions", ["a.jsonl"])
@example("tars", ["a.tar"])
def test_any_spec_is_opened_or_refused(folder, kind, pieces):
    before = sorted(folder.rglob("*"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        try:
            assert len(open_source(f"{kind}:{''.join(pieces)}")) > 0
        except (DataError, ConfigError) as error:
            assert str(error)
    assert sorted(folder.rglob("*")) == before


@EXAMPLES
@given(st.binary(max_size=80) | st.lists(st.dictionaries(st.sampled_from(["image", "caption", "captions", "origins"])
                                                         | TEXTS, JSON, max_size=3) | JSON, max_size=4))
def test_any_list_of_captions_is_read_or_refused(folder, content):
    """Whatever is in its lines: bad records have a reason, and texts can be written."""
    lines = content if isinstance(content, bytes) else "\n".join(map(json.dumps, content)).encode()
    (folder / "any.jsonl").write_bytes(lines)
    try:
        source = open_source(f"captions:{folder}/any.jsonl")
    except DataError as error:
        assert str(error)
        return
    assert check(source)["records"] == len(source) > 0
    for index in range(len(source)):
        for text in _texts(source, index):
            assert text.encode().decode() == text and not set(text) & set("\0\x1b\x7f")


def _texts(source, index):
    try:
        return record_texts(source, index)
    except BadRecord:
        return ()
