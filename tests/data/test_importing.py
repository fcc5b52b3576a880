"""Sources become TFDS data sets; interrupted anywhere they come out the same, byte for byte."""

import io
import json
import multiprocessing
import os
import signal
import struct
import sys
import zlib
from pathlib import Path

import filelock
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from jaxmm.data.base import DataError, Source
from jaxmm.data.images import decode
from jaxmm.data.sources.registry import open_source
from jaxmm.data.tools import writing
from jaxmm.data.tools.checking import pixel_id
from jaxmm.data.tools.importing import import_source
from jaxmm.data.tools.writing import finish, image_features, shard_path, write_shard
from tests.data.crawl import CASES, files, jpeg, pairs, photo, write_tar
from tests.data.test_images import encode


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write_tar(folder / "0.tar", pairs(0, 4))
    write_tar(folder / "1.tar", files(CASES))
    (folder / "2.tar").write_bytes(b"no tar at all" * 90)
    write_tar(folder / "3.tar", [("x.txt", b"without a picture")])
    write_tar(folder / "4.tar", pairs(3, 5))
    return f"tars:{folder}/*.tar"


@pytest.fixture(scope="module")
def reference(shards, tmp_path_factory):
    dest = tmp_path_factory.mktemp("whole") / "web"
    return dest, import_source(open_source(shards), dest)


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_where_captions_come_from_is_kept(tmp_path):
    """From a list to a data set, alone and mixed with a source that does not say."""
    lines = [{"image": "0.jpg", "captions": ["a", "", "b"], "origins": ["web", "web", "human"]},
             {"image": "0.jpg", "caption": "c", "origin": "synthetic"}, {"image": "0.jpg", "caption": "d"},
             {"image": "0.jpg", "captions": ["e", "f", "g"], "origins": ["web", "human"]}]
    (tmp_path / "0.jpg").write_bytes(jpeg(1))
    (tmp_path / "all.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "plain.jsonl").write_text(json.dumps(lines[2]))
    source, plain = (open_source(f"captions:{tmp_path}/{name}.jsonl") for name in ("all", "plain"))
    expected = [(("a", "b"), ("web", "human")), (("c",), ("synthetic",)), (("d",), None)]
    import_source(source, tmp_path / "data")
    data, mixed = open_source(f"tfds:{tmp_path}/data:train"), open_source(f"{plain.name} + {source.name}")
    for opened in (source, data):
        assert [(opened[i]["texts"], opened[i].get("origins")) for i in range(3)] == expected and opened.has_origins
    assert len(data) == 3 and source.faults[3].startswith("cannot be used: it has 3 texts and 2 origins")
    assert mixed.has_origins and not plain.has_origins and mixed[1]["origins"] == ("web", "human")
    import_source(plain, tmp_path / "other")
    assert "origins" not in (tmp_path / "other" / "features.json").read_text()


def test_both_readers_see_the_images(shards, reference):
    dest, imported = reference
    assert (imported.tally.records, imported.tally.usable, imported.shards) == (26, 18, 3)
    assert not imported.complete_before
    assert imported.tally.broken == {"truncated": 1, "empty": 1, "no text": 2, "no image": 2, "not an image": 1,
                                     "too large": 1}
    assert [Path(fault["shard"]).name for fault in imported.faults] == ["2.tar"]
    assert sorted(contents(dest)) == ["dataset_info.json", "features.json", "import.json", *(
        f"web-train.array_record-0000{i}-of-00003" for i in range(3))]
    ours, source = open_source(f"tfds:{dest}:train"), open_source(shards)
    theirs = tfds.builder_from_directory(dest).as_data_source(split="train")
    assert len(ours) == len(theirs) == 18 and "tensorflow" not in sys.modules
    for i in range(18):
        record, example = ours[i], theirs[i]
        original = source[next(k for k in range(len(source)) if source.key(k) == record["key"])]
        expected = decode(original["image"])
        np.testing.assert_array_equal(np.asarray(decode(record["image"])), np.asarray(expected))
        np.testing.assert_array_equal(example["image"], np.asarray(expected))      # upright RGB to any reader
        assert record["texts"] == original["texts"] == tuple(text.decode() for text in example["texts"])
        assert record["key"] == ours.key(i) == example["key"].decode()
        assert record["image_id"] == pixel_id(expected)
        case = record["key"].split("/")[1]
        assert (record["image"] == original["image"]) == (case not in ("cmyk", "gray16", "palette", "animated",
                                                                       "rotated")), case
    ids = [ours[i]["image_id"] for i in range(18)]
    assert len(set(ids)) == 16      # pair 3 is in two shards, pair 1 is ok_0


def test_the_bytes_do_not_depend_on_workers(shards, reference, tmp_path):
    import_source(open_source(shards), tmp_path / "web", workers=3)
    assert contents(tmp_path / "web") == contents(reference[0])


class Deadly(Source):
    """A shard that kills the process at a record."""

    def __init__(self, shard, at):
        self.shard, self.at, self.name, self.fingerprint = shard, at, shard.name, shard.fingerprint

    def __len__(self):
        return len(self.shard)

    def __getitem__(self, index):
        if index == self.at:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.shard[index]

    def key(self, index):
        return self.shard.key(index)


def killed(spec, dest, where):
    """An import that ends at `where`."""
    def kill(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    source, done = open_source(spec), []
    if where == "in a shard":
        parts = source.shards()
        source = type(source)(name=source.name, parts=(*parts[:4], Deadly(parts[4], 2)))
    if where == "naming":
        replace = Path.replace
        Path.replace = lambda self, to: kill() if str(to).endswith("00001-of-00003") else replace(self, to)
    if where == "describing":
        tfds.core.DatasetInfo.write_to_directory = kill
    if where == "tidying":
        writing.remove_work = kill
    import_source(source, dest, on_shard=lambda _: done.append(1) or (where == "shard 2" and len(done) == 2 and kill()))


@pytest.mark.parametrize("where", ["shard 2", "in a shard", "naming", "describing", "tidying"])
def test_a_killed_import_goes_on(shards, reference, tmp_path, where):
    dest = tmp_path / "web"
    process = multiprocessing.get_context("spawn").Process(target=killed, args=(shards, dest, where))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL and dest.exists() == (where == "tidying")
    times = {path.name: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json") if path.parent.name == "work"}
    assert len(times) == {"shard 2": 2, "in a shard": 4}.get(where, 5)
    if where == "shard 2":      # what is there is not written again: a mark in its note stays
        note = dest.with_name("web.part") / "work" / "train-00000.json"
        note.write_text(json.dumps(json.loads(note.read_text()) | {"bytes": 1_000_000}))
    again = import_source(open_source(shards), dest)
    assert again.tally == reference[1].tally and again.complete_before == (where == "tidying")
    written, expected = contents(dest), contents(reference[0])
    if where == "shard 2":
        assert json.loads(written.pop("dataset_info.json"))["splits"][0]["numBytes"] > "1000000"
        expected.pop("dataset_info.json")
    assert written == expected and not dest.with_name("web.part").exists()


def test_what_is_there_already(shards, reference, tmp_path):
    dest, _ = reference
    before = contents(dest)
    assert import_source(open_source(shards), dest).complete_before
    write_tar(tmp_path / "0.tar", pairs(0, 2))
    for source, options in ((f"tars:{tmp_path}", {}), (shards, {"split": "web"})):
        with pytest.raises(DataError, match="exists and is not what this import would write"):
            import_source(open_source(source), dest, **options)
    (tmp_path / "other").mkdir()
    with pytest.raises(DataError, match="exists"):
        import_source(open_source(shards), tmp_path / "other")
    assert contents(dest) == before


def test_other_settings_do_not_go_on_from_these(shards, tmp_path):
    part = tmp_path / "web.part" / "work"
    part.mkdir(parents=True)
    with filelock.FileLock(part / ".lock"), pytest.raises(DataError, match="another process imports"):
        import_source(open_source(shards), tmp_path / "web")
    digits = open_source("digits:test")
    with pytest.raises(KeyboardInterrupt):
        import_source(digits, tmp_path / "web", shard_records=100, on_shard=interrupt)
    imported = import_source(digits, tmp_path / "web", shard_records=150)
    source = open_source(f"tfds:{tmp_path}/web:train")
    assert imported.shards == 3 and len(source) == len(digits) and source.classes == digits.classes
    for i in (0, 149, 150, len(digits) - 1):
        record = source[i]
        assert (record["key"], record["label"], record["texts"]) == (digits.key(i), digits[i]["label"], ())
        np.testing.assert_array_equal(np.asarray(decode(record["image"])), digits[i]["image"])


def interrupt(records):
    raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["rgb16", "grey", "rgba", "key", "webp", "apng", "plain", "progressive"])
def test_images_that_others_see_otherwise_are_written_anew(tmp_path, name):
    deep = np.arange(90, dtype=np.uint16).reshape(5, 6, 3) * 700
    data = {
        "rgb16": rgb16(deep), "grey": encode(photo().convert("L"), "jpeg"), "rgba": encode(photo().convert("RGBA")),
        "key": encode(Image.new("RGB", (3, 2), (1, 2, 3)), "png", transparency=(1, 2, 3)),
        "webp": encode(photo(), "webp"),
        "apng": encode(photo(1), "png", save_all=True, append_images=[photo(2)]), "plain": encode(photo()),
        "progressive": jpeg(progressive=True),
    }[name]
    write_tar(tmp_path / "a.tar", [("a.png", data), ("a.txt", b"a")])
    import_source(open_source(f"tars:{tmp_path}"), tmp_path / "out")
    record = open_source(f"tfds:{tmp_path}/out:train")[0]
    assert (record["image"] == data) == (name in ("plain", "progressive"))
    image = Image.open(io.BytesIO(record["image"]))
    assert image.mode == "RGB" and "transparency" not in image.info
    np.testing.assert_array_equal(np.asarray(image), np.asarray(decode(data)))


def rgb16(values):
    """A PNG of 16 bits a sample, uint16 [h, w, 3]."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def test_several_splits_and_one_feature_more(tmp_path):
    """Write two splits as a merge does, and mix them by naming a split twice."""
    features = image_features(origin=tfds.features.Text())
    folder = tmp_path / "merged.part"
    image = encode(photo())

    def examples(*keys):
        return [{"key": key, "image": image, "image_id": key, "texts": [key], "origin": key[0]} for key in keys]

    written = {"human": [write_shard(examples("h0", "h1"), shard_path(folder, "human", 0), features),
                         write_shard([], shard_path(folder, "human", 1), features),
                         write_shard(examples("h2"), shard_path(folder, "human", 2), features)],
               "web": [write_shard(examples("w0"), shard_path(folder, "web", 0), features)]}
    finish(folder, tmp_path / "4 Merged", features, written)
    assert sorted(path.name for path in (tmp_path / "4 Merged").iterdir()) == [
        "data_4_merged-human.array_record-00000-of-00002", "data_4_merged-human.array_record-00001-of-00002",
        "data_4_merged-web.array_record-00000-of-00001", "dataset_info.json", "features.json"]
    mixed = open_source(f"tfds:{tmp_path}/4 Merged:human+human+web")
    assert [mixed[i]["texts"] for i in range(len(mixed))] == [(f"h{i}",) for i in (0, 1, 2, 0, 1, 2)] + [("w0",)]
    theirs = tfds.builder_from_directory(tmp_path / "4 Merged").as_data_source(split="web")
    assert theirs[0]["origin"] == b"w"


@pytest.mark.parametrize("spec, options, message", [
    ("tars:{}/bad.tar", {}, "none of its 1 records can be used .1 no text"),
    ("digits:test", {"split": "all"}, "split is 'all'"), ("digits:test", {"split": "a-b"}, "split is 'a-b'"),
])
def test_what_cannot_be_imported(tmp_path, spec, options, message):
    write_tar(tmp_path / "bad.tar", [("a.jpg", jpeg())])
    with pytest.raises(DataError, match=message):
        import_source(open_source(spec.format(tmp_path)), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
