"""Parquet files with images, in the layouts of the hub's data sets and img2dataset."""

import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxmm.data.bad_records import BadRecord
from jaxmm.data.base import DataError, record_texts
from jaxmm.data.sources import parquet
from jaxmm.data.sources.registry import open_source
from jaxmm.data.sources.shards import shards


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
