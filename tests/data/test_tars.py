"""Tar shards, valid and hostile."""

import gzip
import json
import pickle
import struct
import subprocess
import sys
import tarfile

import numpy as np
import pytest

from jaxmm.data.bad_records import BadRecord
from jaxmm.data.base import DataError, Source, record_texts
from jaxmm.data.sources import tars
from jaxmm.data.sources.registry import open_source
from jaxmm.data.sources.shards import Slice, shards
from jaxmm.data.tools.checking import check
from tests.data.crawl import CASES, files, jpeg, pairs, write_tar


def special(name, kind, size=0, link=""):
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, size, link
    return info


def header(name, size, kind=tarfile.REGTYPE, format=tarfile.GNU_FORMAT):
    return special(name, kind, size).tobuf(format)


def member(name, content, kind=tarfile.REGTYPE):
    return header(name, len(content), kind) + content + b"\0" * (-len(content) % 512)


class Varied(Source):
    name, classes, fingerprint = "varied", None, "f"

    def __len__(self):
        return 7

    def __getitem__(self, index):
        return {"texts": (str(index),)}

    def vary(self, record, rng):
        return record | {"varied": True}


END = b"\0" * 1024


def records(source):
    return [source[i] for i in range(len(source))]


def test_shards_of_pairs(tmp_path):
    for shard in range(3):
        write_tar(tmp_path / f"{shard:05d}.tar", pairs(10 * shard, 2 + shard))
    source = open_source(f"tars:{tmp_path}/*.tar")
    numbers = [0, 1, 10, 11, 12, 20, 21, 22, 23]
    assert source.classes is None and len(source) == 9
    for record, number in zip(records(source), numbers, strict=True):
        assert record == {"key": f"{number // 10:05d}/{number:09d}", "image": jpeg(number),
                          "texts": (f"picture {number}",)}
    assert [record_texts(source, i)[0] for i in range(9)] == [f"picture {number}" for number in numbers]
    assert [source.key(i) for i in range(9)] == [record["key"] for record in records(source)]
    parts = shards(source)
    assert [len(part) for part in parts] == [2, 3, 4] and parts[1][2] == source[4]
    assert records(pickle.loads(pickle.dumps(source))) == records(source)
    same = open_source(f"tars:{tmp_path}")
    assert same.fingerprint == source.fingerprint and len({part.fingerprint for part in parts}) == 3
    write_tar(tmp_path / "00001.tar", pairs(11, 3))
    assert open_source(f"tars:{tmp_path}").fingerprint != source.fingerprint
    with pytest.raises(IndexError):
        source[9]


ONLY_WHAT_IS_NEEDED = """
import sys
from jaxmm.data import open_source
from jaxmm.data.sources import tars
from jaxmm.data.sources.shards import shards
read, members = [], tars.members
tars.members = lambda file, end: read.append(file.name[-5:]) or members(file, end)
parts = shards(open_source(sys.argv[1]))
print(len(parts), *read, len(parts[2]), parts[2][1]["texts"], *read)
"""


def test_a_shard_is_indexed_when_it_is_needed(tmp_path):
    for shard in range(4):
        write_tar(tmp_path / f"{shard}.tar", pairs(shard, 2))
    # in a process without the tests' checks of types, which look at every attribute
    printed = subprocess.run([sys.executable, "-c", ONLY_WHAT_IS_NEEDED, f"tars:{tmp_path}"], check=True, text=True,
                          capture_output=True).stdout
    assert printed == "4 0.tar 2 ('picture 3',) 0.tar 2.tar\n"


def test_stems_that_are_alike_and_keys_that_come_again(tmp_path):
    for folder in "ab":
        write_tar(tmp_path / folder / "0.tar", pairs(3, 1))
    source = open_source(f"tars:{tmp_path}/*/0.tar")
    assert len({source.key(i) for i in range(2)}) == 2
    again = write_tar(tmp_path / "c.tar", [("x.jpg", b"1"), ("y.jpg", b"2"), ("x.jpg", b"3"), ("x#2.jpg", b"4"),
                                           ("d/x.jpg", b"5"), ("x.JPEG", b"6"), ("x.png", b"7"), ("x.txt", b"t")])
    actual = records(open_source(f"tars:{again}"))
    assert [(r["key"], r["image"]) for r in actual] == [("c/x", b"1"), ("c/y", b"2"), ("c/x#2", b"3"),
                                                        ("c/x#2#2", b"4"), ("c/d/x", b"5"), ("c/x#3", b"6")]
    assert actual[-1]["texts"] == ("t",)


def test_captions_come_from_text_or_json(tmp_path):
    contents = [("a.jpg", b"a"), ("a.json", json.dumps({"caption": "of \ud800JSON\0"}).encode()),
                ("b.json", b"{" * 100_000), ("b.jpg", b"b"), ("c.jpg", b"c"), ("c.json", b'{"caption": NaN}'),
                ("d.json", b'["caption"]'), ("d.jpg", b"d"), ("e.txt", b"caf\xe9\0"), ("e.json", b'{"caption": "no"}')]
    actual = records(open_source(f"tars:{write_tar(tmp_path / 'a.tar', contents)}"))
    assert [r.get("texts") for r in actual] == [("of ?JSON",), None, None, None, ("caf\ufffd",)]
    assert ["image" in r for r in actual] == [True, True, True, True, False]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_formats_and_long_names(tmp_path, format):
    long = "deep/" * 18 + "0123456789" * 8 if format == tarfile.USTAR_FORMAT else "deep/" * 60 + "0123456789" * 20
    path = write_tar(tmp_path / "a.tar", [(f"{long}.jpg", b"1"), (f"{long}.txt", b"one"), ("b.seg.png", b"2"),
                                          (".hidden.jpg", b"3"), ("c.jpg", b"4")], format=format)
    assert [(r["key"], r["image"]) for r in records(open_source(f"tars:{path}"))] == [(f"a/{long}", b"1"),
                                                                                     ("a/c", b"4")]


def test_names_are_only_names_and_only_plain_files_count(tmp_path):
    outside = tmp_path / "secret.txt"
    outside.write_text("secret")
    pax = tarfile.TarInfo("sparse.jpg")
    pax.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.realsize": str(2**50)}
    contents = [
        ("../../../etc/up.jpg", b"1"), ("/root/there.jpg", b"2"), ("we\x1b[31mird\n.jpg", b"3"),
        special("link.txt", tarfile.SYMTYPE, link=str(outside)), special("hard.txt", tarfile.LNKTYPE, link="../secret"),
        special("null.jpg", tarfile.CHRTYPE), special("disk.jpg", tarfile.BLKTYPE),
        special("pipe.jpg", tarfile.FIFOTYPE), special("folder.jpg", tarfile.DIRTYPE), pax,
        ("run.pkl", b"cos\nsystem\n(S'true'\ntR."), ("run.pyd", b"x"), ("run.pth", b"x"), ("last.jpg", b"4"),
    ]
    path = write_tar(tmp_path / "in" / "a.tar", contents, format=tarfile.PAX_FORMAT)
    before = sorted(tmp_path.rglob("*"))
    actual = records(open_source(f"tars:{path}"))
    assert [(r["key"], r["image"]) for r in actual] == [("a/../../../etc/up", b"1"), ("a//root/there", b"2"),
                                                       ("a/we\ufffd[31mird\ufffd", b"3"), ("a/last", b"4")]
    assert sorted(tmp_path.rglob("*")) == before


def test_old_sparse_files_are_passed_over(tmp_path):
    sparse = bytearray(header("hole.jpg", 512, tarfile.GNUTYPE_SPARSE))
    sparse[482] = 1      # another block of the map follows
    sparse[483:495] = b"\x80" + (2**60).to_bytes(11, "big")
    sparse[148:156] = b"%06o\0 " % (sum(sparse[:148]) + sum(sparse[156:]) + 8 * 32)
    path = tmp_path / "a.tar"
    path.write_bytes(bytes(sparse) + b"\0" * 512 + b"x" * 512 + member("b.jpg", b"1") + END)
    assert [r["key"] for r in records(open_source(f"tars:{path}"))] == ["a/b"]
    path.write_bytes(bytes(sparse))
    with pytest.raises(DataError, match="is empty"):
        open_source(f"tars:{path}")


@pytest.mark.parametrize("end, fault", [
    (b"", "without the mark of its end"),
    (header("c.jpg", 10 * 2**30), "inside of 'c.jpg'"),
    (header("c.jpg", 3000) + b"x" * 700, "inside of 'c.jpg'"),
    (header("c.jpg", 3000)[:300], "without the mark of its end"),
    (b"\1" * 512 + END, "there is no header at byte 2,048"),
    (header("c.jpg", -512), "claims a size of -512 bytes"),
    (header("c.jpg", 2**80), "claims a size of"),
    (header("x", 2**40, tarfile.XHDTYPE), "extended header at byte 2,048 claims"),
    (header("x", 2**17, tarfile.GNUTYPE_LONGNAME), "extended header at byte 2,048 claims"),
    (member("x", b"9 path=ab\n", tarfile.XHDTYPE), "extended header at byte 2,048 is damaged"),
    (member("x", b"0 path=ab\n", tarfile.XHDTYPE), "extended header at byte 2,048 is damaged"),
    (member("x", b"-9 path=ab\n", tarfile.XHDTYPE), "extended header at byte 2,048 is damaged"),
    (member("x", b"11 size=-9\n", tarfile.XHDTYPE) + member("c.jpg", b"c"), "claims a size of -9 bytes"),
    (member("x", b"12 size=1e5\n", tarfile.XHDTYPE) + member("c.jpg", b"c"), "there is no header"),
])
def test_what_comes_before_the_damage_is_kept_and_the_damage_named(tmp_path, caplog, end, fault):
    (tmp_path / "0.tar").write_bytes(member("a.jpg", b"a") + member("b.txt", b"b") + end)
    write_tar(tmp_path / "1.tar", pairs(5, 2))
    source = open_source(f"tars:{tmp_path}")
    damaged = source.shards()[0]
    assert fault in damaged.fault and fault in caplog.text and str(tmp_path / "0.tar") in caplog.text
    actual = [source.key(i) for i in range(len(source))]
    assert [key for key in actual if key != "0/c"] == ["0/a", "0/b", "1/000000005", "1/000000006"]
    assert source[0]["image"] == b"a"
    if "0/c" in actual:
        with pytest.raises(BadRecord, match="truncated"):
            source[2]


@pytest.mark.parametrize("content, fault", [
    (b"", "it has 0 bytes"), (b"<html>", "it has 6 bytes"), (b"not a tar " * 100, "begins with b'not a tar no'"),
    (b"\x1f\x8b" + b"x" * 600, "compressed"), (struct.pack("<1000Q", *range(1000)), "it is no tar"),
])
def test_what_is_no_tar_is_named_and_the_others_are_read(tmp_path, caplog, content, fault):
    (tmp_path / "0.tar").write_bytes(content)
    write_tar(tmp_path / "1.tar", pairs(5, 2))
    source = open_source(f"tars:{tmp_path}/?.tar")
    assert len(source) == 2 and fault in source.shards()[0].fault and source.shards()[1].fault is None


def test_sizes_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(tars, "LARGEST_IMAGE", 30)
    monkeypatch.setattr(tars, "LARGEST_TEXT", 20)
    path = write_tar(tmp_path / "a.tar", [("a.jpg", b"x" * 30), ("a.txt", b"y" * 20), ("b.jpg", b"x" * 31),
                                          ("c.jpg", b"x"), ("c.txt", b"y" * 21)])
    source = open_source(f"tars:{path}")
    assert len(source[0]["image"]) == 30 and len(source[0]["texts"][0]) == 20
    for index, words in ((1, "its image has 31 bytes; at most 30"), (2, "its text has 21 bytes; at most 20")):
        with pytest.raises(BadRecord, match=words):
            source[index]


def test_bad_specs(tmp_path):
    with pytest.raises(DataError, match="no file matches"):
        open_source(f"tars:{tmp_path}/*.tar")
    write_tar(tmp_path / "a.tar", [("a.pkl", b"x")])
    with pytest.raises(DataError, match="is empty"):
        open_source(f"tars:{tmp_path}/*.tar")


def test_slices(tmp_path):
    source = open_source(f"tars:{write_tar(tmp_path / 'a.tar', files(CASES))}")
    digits = open_source("digits:test")
    [*parts] = shards(digits, 100)
    assert [len(part) for part in parts] == [100, 100, 100, len(digits) - 300]
    assert parts[2].classes == digits.classes and parts[2].name == digits.name and not parts[2].varies
    assert (parts[2][7]["image"] == digits[207]["image"]).all() and parts[2].key(7) == digits.key(207)
    assert len({part.fingerprint for part in parts}) == 4
    part = pickle.loads(pickle.dumps(Slice(source, 5, 9)))
    assert [part.texts(i) for i in range(len(part))] == [source.texts(i) for i in range(5, 9)]
    assert Slice(Varied(), 3, 5).vary({}, np.random.default_rng()) == {"varied": True} and Slice(Varied(), 3, 5).varies
    assert Slice(Varied(), 3, 5).texts(1) == ("4",)
    with pytest.raises(IndexError):
        part[4]


LAYOUTS = {
    "dots in keys": "22.05.jpg=1, 22.05.txt=a, 22.06.jpg=2, 22.06.txt=b, 22.07.jpg=3",
    "some dots": "x.jpg=1, x.txt=a, St. Mary.jpeg=2, St. Mary.txt=b, y.mask.png=0",
    "inputs and outputs": "x.input.jpg=1, x.output.txt=a, y.input.png=2, y.output.txt=b",
    "masks": "x.jpg=1, x.mask.png=0, x.txt=a, y.mask.png=0, y.jpg=2, y.txt=b",
    "texts with dots": "x.jpg=1, x.caption.txt=a, y.tags.txt=c, y.txt=b, y.jpg=2, y.mask.png=0",
    "several inputs": "x.depth.png=0, x.image.jpg=1, x.prompt.txt=a, y.caption.txt=b, y.rgb.png=2, y.depth.png=0",
    "endings": "x.jpg=1, x.caption=a, y.PNG=2, y.text=b",
    "texts first": "x.txt=a, y.txt=b, x.jpg=1, y.jpg=2",
    "JSON": 'x.jpg=1, x.txt= , x.json={"url":"","caption":null,"text":"a"}, y.jpg=2, y.json={"captions":[null,"b"]}',
    "files of a system": "._x.jpg=0, x.jpg=1, x.txt=a, y.jpg=2, y.txt=b, ._y.txt=0",
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(tmp_path, name):
    members = [member.split("=", 1) for member in LAYOUTS[name].split(", ")]
    path = write_tar(tmp_path / "a.tar", [(file, content.encode()) for file, content in members])
    actual = records(open_source(f"tars:{path}"))
    pairs_of = [(r["image"], r.get("texts")) for r in actual]
    assert pairs_of[:2] == [(b"1", ("a",)), (b"2", ("b",))] and pairs_of[2:] == (
        [(b"3", None)] if name == "dots in keys" else [])
    assert len({record["key"] for record in actual}) == len(actual)


def test_null_is_no_caption(tmp_path):
    contents = [("x.jpg", jpeg(1)), ("x.txt", b"None"), ("y.jpg", jpeg(2)), ("y.txt", b"none")]
    report = check(open_source(f"tars:{write_tar(tmp_path / 'a.tar', contents)}"))
    assert report["broken"] == {"no text": 1} and report["usable"] == 1


@pytest.mark.parametrize("labels, classes, expected", [
    ([b"3", b"0\n", b"03", b""], ("0", "1", "2", "3"), [3, 0, 3, None]),
    ([b"dog", b"cat", b"dog"], ("cat", "dog"), [1, 0, 1])])
def test_labels(tmp_path, labels, classes, expected):
    """The classes are those of all tars, in every part."""
    for number, label in enumerate(labels):
        write_tar(tmp_path / f"{number}.tar", [("x.jpg", jpeg(number)), ("x.cls", label)])
    source = open_source(f"tars:{tmp_path}/*.tar")
    assert source.classes == classes and [part.classes for part in source.shards()] == [classes] * len(labels)
    assert [record["label"] for record in records(source)] == expected
    report = check(source)
    assert report["usable"] == sum(label is not None for label in expected)
    with_texts = write_tar(tmp_path / "texts/a.tar", [("x.jpg", jpeg(1)), ("x.cls", b"2"), ("x.txt", b"a")])
    assert open_source(f"tars:{with_texts}").classes is None
    assert open_source(f"tars:{with_texts}@label=cls").classes == ("0", "1", "2")


def test_endings_are_named(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("x.left.jpg", b"1"), ("x.right.jpg", b"2"), ("x.en.txt", b"a"),
                                          ("x.de.txt", b"b")])
    [record] = records(open_source(f"tars:{path}@image=right.jpg,caption=de.txt"))
    assert (record["key"], record["image"], record["texts"]) == ("a/x", b"2", ("b",))
    with pytest.raises(DataError, match="no option 'captoin'; did you mean 'caption'"):
        open_source(f"tars:{path}@captoin=txt")


def test_compressed_tars(tmp_path):
    plain = write_tar(tmp_path / "plain/a.tar", pairs(0, 5))
    for name in ("a.tar.gz", "b.tgz"):
        (tmp_path / name).write_bytes(gzip.compress(plain.read_bytes()))
    source = open_source(f"tars:{tmp_path}")
    assert len(source) == 10 and "slow to read at random" in source.notes[0] and source.key(7).startswith("b/")
    expected = records(open_source(f"tars:{plain}"))
    for index in (4, 0, 3, 9, 5, 1):
        assert source[index]["image"] == expected[index % 5]["image"]
        assert source[index]["texts"] == expected[index % 5]["texts"]
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(plain.read_bytes())[:-200])
    source = open_source(f"tars:{tmp_path}")
    assert len(source) == 5 and "compressed and damaged" in source.shards()[0].fault


def test_lists_of_files(tmp_path):
    for number in (8, 9, 10, 11):
        write_tar(tmp_path / f"part-{number:03d}.tar", pairs(number, 1))
    for location, numbers in [("part-{008..010}.tar", [8, 9, 10]), ("part-{009,011}.tar", [9, 11]),
                              (f"part-008.tar::{tmp_path}/part-01*.tar", [8, 10, 11])]:
        assert [record["texts"] for record in records(open_source(f"tars:{tmp_path}/{location}"))] == [
            (f"picture {number}",) for number in numbers]
    for location, message in [("part-{008..012}.tar", "no file matches .*part-012.tar"),
                              ("{0..99999999}.tar", "has more than 1000000 files"),
                              ("part-008.tar::https://b/1.tar", "'https://b/1.tar' is no local path")]:
        with pytest.raises(DataError, match=message):
            open_source(f"tars:{tmp_path}/{location}")
