"""Lists of captions as other tools write them: encodings, tables, names of columns, and broken lines."""

import codecs
import json

import pytest

from jaxmm.data import DataError, open_source
from jaxmm.data.base import record_texts
from jaxmm.data.tools.checking import check
from tests.data.test_sources import png, write


@pytest.fixture
def folder(tmp_path):
    for number in range(4):
        write(tmp_path / f"{number}.png", png(number))
    return tmp_path


def texts(folder, name, content, options=""):
    source = open_source(f"captions:{write(folder / name, content)}{options}")
    return [record_texts(source, index) for index in range(len(source))]


@pytest.mark.parametrize("encoding, bom", [("utf-8", codecs.BOM_UTF8), ("utf-16-le", codecs.BOM_UTF16_LE),
                                           ("utf-32-be", codecs.BOM_UTF32_BE), ("utf-8", b"")])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_encodings_and_ends_of_lines(folder, encoding, bom, end):
    lines = [json.dumps({"image": f"{i}.png", "caption": f"caf\u00e9 {i}\u2028"}, ensure_ascii=False) for i in range(3)]
    assert texts(folder, "a.jsonl", bom + end.join(lines).encode(encoding)) == [
        (f"caf\u00e9 {i}\u2028",) for i in range(3)]


def test_what_is_not_utf8_is_said(folder):
    windows = '{"image": "0.png", "caption": "un caf\u00e9 \u2026"}\n'.encode("cp1252")
    source = open_source(f"captions:{write(folder / 'a.jsonl', windows)}")
    assert record_texts(source, 0) == ("un caf\u00e9 \u2026",)
    assert source.notes[0].endswith("a.jsonl is not UTF-8 (line 1) and is read as Windows-1252")
    mixed = '{"image": "0.png", "caption": "\u00e9"}\n'.encode() + b'{"image": "1.png", "caption": "caf\xe9"}'
    source = open_source(f"captions:{write(folder / 'b.jsonl', mixed)}")
    assert record_texts(source, 0) == ("\u00e9",) and record_texts(source, 1) == ("caf\ufffd",)
    assert "is not UTF-8 in 1 places (the first in line 2)" in source.notes[0]


@pytest.mark.parametrize("row", [
    {"image": "0.png", "caption": "x"}, {"file_name": "0.png", "text": "x"}, {"IMG_PATH": "0.png", "TXT": ["x", None]},
    {"filename": "0.png", "captions": [], "caption": "x"}, {"path": "0.png", "sentences": [{"raw": "x", "id": 3}]},
    {"image": {"path": "0.png"}, "caption": "None", "text": "x"}])
def test_names_of_columns(folder, row):
    assert texts(folder, "a.jsonl", json.dumps(row)) == texts(folder, "a.json", json.dumps([row])) == [("x",)]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|", "^"])
def test_tables(folder, delimiter):
    """Cells in quotes may have delimiters, quotes and line breaks; one row has a cell too many."""
    rows = [("file_name", "number", "caption"), ("0.png", "1", f'"a{delimiter} ""b"""'), ("1.png", "2", '"two\nlines"'),
            ("2.png", "3", "c", "d"), (), ("3.png", "4", ' 5" wide ')]
    source = open_source(f"captions:{write(folder / 'a.csv', chr(10).join(map(delimiter.join, rows)))}")
    assert [record_texts(source, i) for i in range(4)] == [(f'a{delimiter} "b"',), ("two\nlines",), (), ('5" wide',)]
    report = check(source)
    assert report["broken"] == {"malformed": 1} and report["examples"]["malformed"] == ["a.csv:5#2"]


def test_quotes_that_are_not_closed_cost_one_row(folder):
    table = 'image,caption\n0.png,"open\n1.png,one\n2.png,"he said "hi" to me"\n3.png,"a, b"\n'
    source = open_source(f"captions:{write(folder / 'a.csv', table)}")
    assert [record_texts(source, i) for i in range(4)] == [('"open',), ("one",), ('"he said "hi" to me"',), ("a, b",)]


def test_more_tables(folder):
    large = "x" * 200_000
    source = open_source(f"captions:{write(folder / 'a.csv', f'image,caption{chr(10)}0.png,{large}{chr(10)}1.png,b')}")
    assert check(source)["broken"] == {"malformed": 1} and record_texts(source, 1) == ("b",)
    assert texts(folder, "b.csv", 'image, caption\n0.png, "b, c"\n') == [("b, c",)]
    assert texts(folder, "c.csv", "image,caption,caption\n0.png,a,b\n") == [("a", "b")]
    assert texts(folder, "d.csv", '0.png,"a, b"\n1.png,c\n') == [("a, b",), ("c",)]
    assert texts(folder, "e.json", '{"0.png": ["a", null, "b"], "1.png": "c"}') == [("a", "b"), ("c",)]


def test_flickr_without_a_header(folder):
    assert texts(folder, "Flickr8k.token.txt", "0.png#0\tA dog , \"it\" runs .\n0.png#1\tA cat\n3.png#4\t\n") == [
        ('A dog , "it" runs .',), ("A cat",), ()]
    source = open_source(f"captions:{folder}/Flickr8k.token.txt")
    assert source[1]["image"] == png(0) and source[2]["image"] == png(3)
    assert texts(folder, "results.csv", "image_name| comment_number| comment\n1.png| 0| A dog .\n2.png| 4   Cat\n") == [
        ("A dog .",), ()]


def test_columns_are_named(folder):
    table = "picture_file,english,german\n0.png,dog,Hund\n1.png,cat,Katze\n"
    with pytest.raises(DataError, match=r"columns are 'picture_file', 'english', 'german'; expected one for each of"):
        texts(folder, "a.csv", table)
    assert texts(folder, "a.csv", table, "@image=picture_file,caption=german") == [("Hund",), ("Katze",)]
    assert texts(folder, "a.csv", table, f"@{folder}@image=picture_file,captions=english") == [("dog",), ("cat",)]
    one, other = (open_source(f"captions:{folder}/a.csv@image=picture_file,caption={name}").fingerprint
                  for name in ("english", "german"))
    assert one != other
    for options, message in [("@image=picture_file,captoin=german", "no option 'captoin'; did you mean 'caption'"),
                             ("@image=picture_file,caption=french", "columns are 'picture_file', 'english', 'german'")]:
        with pytest.raises(DataError, match=message):
            texts(folder, "a.csv", table, options)
    rows = '{"image": "0.png", "de": "Hund", "fr": "chien"}'
    assert texts(folder, "b.jsonl", rows, "@caption=fr") == [("chien",)]
    with pytest.raises(DataError, match="has no captions: the keys of its rows are image, de, fr"):
        texts(folder, "b.jsonl", rows)


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "captions.tsv"])
def test_the_list_in_a_folder(folder, name):
    rows = {"metadata.jsonl": '{"file_name": "1.png", "text": "b"}', "metadata.csv": "file_name,text\n1.png,b\n",
            "captions.tsv": "image\tcaption\n1.png\tb\n"}
    write(folder / name, rows[name])
    source = open_source(f"captions:{folder}")
    assert source[0]["image"] == png(1) and record_texts(source, 0) == ("b",)
    write(folder / "captions.jsonl", '{"image": "1.png", "caption": "c"}')
    with pytest.raises(DataError, match=rf"has .*{name}.*; expected one of them"):
        open_source(f"captions:{folder}")
    write(folder / "above/train" / name, rows[name])
    with pytest.raises(DataError, match=rf"lists are in {folder}/above/train; expected one of them"):
        open_source(f"captions:{folder}/above")


def test_text_files_beside_images(folder):
    write(folder / "0.txt", "\ufeffone\n\ntwo\r\n")
    write(folder / "deep/er/9.png", png(9))
    write(folder / "deep/er/9.png.caption", b"caf\xe9\0")
    write(folder / ".hidden/8.png", png(8))
    source = open_source(f"captions:{folder}")
    assert [source.key(i) for i in range(len(source))] == [
        "0.png#0", "1.png#1", "2.png#2", "3.png#3", "deep/er/9.png#4"]
    assert [record_texts(source, i) for i in (0, 1, 4)] == [("one", "two"), (), ("caf\u00e9",)]
    assert "3 of 5 images have no text file with a caption beside them" in source.notes
    before = source.fingerprint
    write(folder / "1.txt", "three")
    assert open_source(f"captions:{folder}").fingerprint != before
    for path in folder.rglob("*.[tc][xa][tp]*"):
        path.unlink()
    with pytest.raises(DataError, match="no text file with a caption beside one of 5 images"):
        open_source(f"captions:{folder}")


@pytest.mark.parametrize("content, message", [
    ('{"images": [], "annotations": []}', "one object with 'images', 'annotations'.*Is it coco:FILE.json"),
    ("[1, 2]", "entry 0 is int; expected an object"), ('{"image": "0.png"', ":1 is not JSON"),
    (b"\x1f\x8b\x08 packed", "is gzip; expected text"), (b"PAR1 x PAR1", "is Parquet .see parquet:GLOB"),
    ('[{"image": "0.png", "caption": "x"}, {"image', "a.jsonl:1 is not JSON")])
def test_what_is_no_list(folder, content, message):
    with pytest.raises(DataError, match=message):
        texts(folder, "a.jsonl", content)
