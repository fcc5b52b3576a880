"""Parquet files with images, in the layouts of the hub's data sets and img2dataset."""

import json
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxmm.data.bad_records import BadRecord, read_record
from jaxmm.data.base import DataError, record_texts
from jaxmm.data.sources import parquet
from jaxmm.data.sources.registry import open_source
from jaxmm.data.sources.shards import shards
from jaxmm.data.tools.checking import check
from tests.data.test_sources import png


def write(path, rows=3, **columns):
    pq.write_table(pa.table(columns), path, row_group_size=rows)
    return open_source(f"parquet:{path}")


def test_the_hub_s_layout(tmp_path):
    images = [{"bytes": b"picture %d" % i, "path": "/etc/passwd"} for i in range(7)] + [{"bytes": None,
                                                                                        "path": "/etc/passwd"}]
    captions = [["a", "b"], None, ["c"], [], ["d\0"], [None, "e"], ["f"], ["g"]]
    source = write(tmp_path / "train.parquet", image=images, captions=captions, image_id=[*range(8)])
    records = [source[i] for i in range(len(source))]
    assert [r.get("image") for r in records] == [b"picture %d" % i for i in range(7)] + [None]
    assert [r.get("texts", ()) for r in records] == [("a", "b"), (), ("c",), (), ("d",), ("e",), ("f",), ("g",)]
    assert [record_texts(source, i) for i in range(8)] == [r.get("texts", ()) for r in records]
    assert [(r["key"], r["image_id"]) for r in records] == [(f"train/{i}", str(i)) for i in range(8)]
    assert [source.key(i) for i in range(8)] == [r["key"] for r in records] and source.classes is None
    assert pickle.loads(pickle.dumps(source))[5] == records[5]
    with pytest.raises(IndexError):
        source[8]


@pytest.mark.parametrize("image", ["jpg", "bytes", "image"])
@pytest.mark.parametrize("caption", ["text", "caption", "texts"])
def test_columns(tmp_path, image, caption):
    source = write(tmp_path / "a.parquet", 2, key=["x", "y\n", "z"], **{
        image: pa.array([b"1", b"2", None], pa.large_binary()), caption: ["one", None, "three"], "width": [1, 2, 3]})
    assert [source[i] for i in range(3)] == [{"key": "a/x", "image": b"1", "texts": ("one",)},
                                             {"key": "a/y\ufffd", "image": b"2"}, {"key": "a/z", "texts": ("three",)}]


def test_origins_of_captions(tmp_path):
    """One for each, of which those of blank captions go, or one for all; a record may have none."""
    source = write(tmp_path / "a.parquet", image=[b"1", b"2", b"3", b"4"],
                   captions=[["a", " ", "b"], ["c", "d"], ["e"], ["f"]],
                   origins=[["web", "web", "human"], ["synthetic"], None, ["web", "web"]])
    assert source.has_origins and not write(tmp_path / "b.parquet", image=[b"1"], text=["a"]).has_origins
    assert [(source[i]["texts"], source[i].get("origins")) for i in range(3)] == [
        (("a", "b"), ("web", "human")), (("c", "d"), ("synthetic", "synthetic")), (("e",), None)]
    with pytest.raises(BadRecord, match="it has 1 texts and 2 origins; expected one for each text, or one"):
        read_record(source, 3)


def test_a_shard_a_file_and_a_group_at_a_time(tmp_path, monkeypatch):
    for number in range(3):
        write(tmp_path / f"{number}.parquet", image=[b"%d %d" % (number, i) for i in range(5)], text=["t"] * 5)
    source = open_source(f"parquet:{tmp_path}")
    parts = shards(source)
    assert len(source) == 15 and [len(part) for part in parts] == [5] * 3
    assert len({part.fingerprint for part in parts}) == 3 and parts[2][4] == source[14]
    read = []
    read_row_group = pq.ParquetFile.read_row_group
    monkeypatch.setattr(pq.ParquetFile, "read_row_group",
                        lambda self, group, columns: read.append((group, *columns)) or read_row_group(
                            self, group, columns))
    parquet._column.cache_clear()
    assert [source[i]["image"] for i in range(5, 10)] == [b"1 %d" % i for i in range(5)]
    assert read == [(0, "text"), (0, "image"), (1, "text"), (1, "image")]
    assert source.texts(12) == ("t",) and read[4:] == [(0, "text")]


def test_sizes_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "LARGEST_IMAGE", 30)
    monkeypatch.setattr(parquet, "LARGEST_TEXT", 20)
    source = write(tmp_path / "a.parquet", 2, image=[b"x" * 30, b"x" * 31, b"x", b"x"],
                   text=["y" * 20, "y", "y" * 21, "y"])
    assert len(source[0]["image"]) == 30
    for index in (1, 2):
        with pytest.raises(BadRecord, match="too large"):
            source[index]
    parquet._column.cache_clear()
    monkeypatch.setattr(parquet, "LARGEST_GROUP", 5)
    with pytest.raises(BadRecord, match="row group 1 has"):
        source[3]


def test_what_is_no_parquet(tmp_path, caplog):
    (tmp_path / "0.parquet").write_bytes(b"PAR1" + b"?" * 100)
    write(tmp_path / "1.parquet", image=[b"1"], text=["t"])
    source = open_source(f"parquet:{tmp_path}")
    assert len(source) == 1 and "cannot be read as Parquet" in source.shards()[0].fault
    assert str(tmp_path / "0.parquet") in caplog.text
    with pytest.raises(DataError, match=r"0.parquet: it cannot be read as Parquet"):
        open_source(f"parquet:{tmp_path}/0.parquet")
    with pytest.raises(DataError, match="none of its columns url, image has images"):
        write(tmp_path / "2.parquet", url=["x"], image=["a text"])
    with pytest.raises(DataError, match="no file matches"):
        open_source(f"parquet:{tmp_path}/*.pq")


STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def images(*values):
    return pa.array([{"bytes": value, "path": "x"} for value in values], STRUCT)


@pytest.mark.parametrize("column, value", [
    ("img", images(b"1")), ("image_bytes", pa.array([b"1"])), ("photograph", pa.array([b"1"], pa.large_binary())),
    ("images", pa.array([[{"bytes": b"1", "path": "x"}]], pa.list_(STRUCT))), ("IMAGE", images(b"1")),
    ("jpg", pa.array([b"1"]).dictionary_encode())])
def test_images_by_other_names(tmp_path, column, value):
    assert write(tmp_path / "a.parquet", **{column: value, "caption": ["a"]})[0]["image"] == b"1"


@pytest.mark.parametrize("columns", [
    {"caption": pa.array(["a", "b"]).dictionary_encode()}, {"sentences_raw": [["a"], ["b"]]}, {"en": ["a", "b"]},
    {"captions": pa.array([["a", None], ["b", ""]], pa.list_(pa.string(), 2))}, {"words_of_it": ["a", "b"]},
    {"captions": [[{"raw": "a", "id": 1}], [{"raw": "b", "id": 2}]]}, {"TEXT": ["a", "b"], "URL": ["u", "v"]},
    {"text": pa.array([None, "b"], pa.string()), "caption": ["a", "c"]}, {"captions": [{"text": "a"}, {"text": "b"}]}])
def test_captions_of_other_types_and_names(tmp_path, columns):
    source = write(tmp_path / "a.parquet", image=images(b"1", b"2"), **columns)
    assert [record_texts(source, i) for i in range(2)] == [("a",), ("b",)] and source.classes is None


def labelled(path, features, **columns):
    """Write a file with the Hub's description of its labels."""
    described = {name: {"names": names, "_type": "ClassLabel"} for name, names in features.items()}
    metadata = {b"huggingface": json.dumps({"info": {"features": described | {"img": {"_type": "Image"}}}}).encode()}
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), path)


def test_labels_of_the_hub(tmp_path, caplog):
    for number in range(2):
        labelled(tmp_path / f"{number}.parquet", {"label": ["cat", "dog"]}, img=images(png(1), png(2)), label=[1, -1])
    source = open_source(f"parquet:{tmp_path}")
    assert source.classes == ("cat", "dog") == shards(source)[1].classes
    assert [source[i]["label"] for i in range(4)] == [1, -1] * 2
    assert check(source)["broken"] == {"no label": 2}
    labelled(tmp_path / "2.parquet", {"label": ["cat", "wolf"]}, img=images(png(1)), label=[0])
    assert "classes are not those of the first" in open_source(f"parquet:{tmp_path}").shards()[2].fault


def test_a_damaged_page_is_a_bad_record(tmp_path):
    """The column of keys is damaged, so records are named after the file."""
    path = tmp_path / "a.parquet"
    write(path, image=images(png(1)), caption=["a"], key=["the key"])
    with pq.ParquetFile(path) as file:
        starts = [file.metadata.row_group(0).column(i).data_page_offset for i in range(file.metadata.num_columns)]
    data = bytearray(path.read_bytes())
    for start in starts:
        data[start:start + 8] = b"\xff" * 8
    path.write_bytes(data)
    assert check(open_source(f"parquet:{path}"))["examples"] == {"unreadable": [f"parquet:{path}#0"]}


def test_what_is_not_clear_is_asked(tmp_path):
    path = tmp_path / "a.parquet"
    labelled(path, {"fine": ["a", "b"], "coarse": ["c"]}, img=images(png(1)), fine=[1], coarse=[0])
    with pytest.raises(DataError, match="its columns fine, coarse have classes; name one, as in @label=fine"):
        open_source(f"parquet:{path}")
    assert open_source(f"parquet:{path}@label=coarse").classes == ("c",)
    pq.write_table(pa.table({"left": images(b"1"), "right": images(b"2"), "de": ["a"], "fr": ["b"]}), path)
    with pytest.raises(DataError, match="its columns left, right may be images; name one, as in @image=left"):
        open_source(f"parquet:{path}")
    source = open_source(f"parquet:{path}@image=right")
    assert source[0] == {"key": "a/0", "image": b"2"}
    assert source.notes == ("none of its columns de, fr is known to have captions; name one, as in @caption=de",)
    assert open_source(f"parquet:{path}@image=right,caption=fr")[0]["texts"] == ("b",)
    with pytest.raises(DataError, match="none of its columns left, right, de, fr is es"):
        open_source(f"parquet:{path}@image=right,caption=es")
    pq.write_table(pa.table({"image": images(b"1"), "question": ["a"], "answer": ["b"]}), path)
    assert "which are not read from Parquet" in open_source(f"parquet:{path}").notes[0]
    pq.write_table(pa.table({"image": images(b"1"), "label": [3], "url": ["u"]}), path)
    assert open_source(f"parquet:{path}").notes == (
        "its column label has no names of classes (a ClassLabel of the Hub) and is not read",)
