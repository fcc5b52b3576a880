"""What is no text is left out, and what cannot be written is replaced, whatever source it comes from."""

import json
import os
import unicodedata

import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import given
from hypothesis import strategies as st

from jaxmm.capfilt.image_batches import read_images
from jaxmm.config import DataConfig, ImageConfig, TokenizerConfig
from jaxmm.data import Source, open_source
from jaxmm.data.base import record_key, record_texts
from jaxmm.data.cleaning import clean, printable, texts_of, usable_texts
from jaxmm.data.pipeline import train_batches
from jaxmm.data.tokenizers import make_tokenizer
from jaxmm.data.tools import showing
from jaxmm.data.tools.checking import check
from jaxmm.data.tools.importing import import_source
from tests.data.test_sources import png, write
from tests.properties import EXAMPLES


@pytest.mark.parametrize("text, expected", [
    ("plain \u00e9 \U0001f600\n\t", "plain \u00e9 \U0001f600\n\t"), ("half \ud83d of it", "half ? of it"),
    ("a\0b\x07c\x1b[0m", "abc[0m"), ("one\x0btwo\x85three", "one two three"), ("\ufefftext", "text"),
    (b"caf\xe9\0", "caf\ufffd"), ("\ufeffx".encode("utf-16-be"), "x"), ("name \udce9", "name ?")])
def test_clean(text, expected):
    assert clean(text) == expected
    expected.encode()


@pytest.mark.parametrize("value, expected", [
    (None, ()), (float("nan"), ()), (np.float32("nan"), ()), (float("inf"), ()), (True, ()), ("", ("",)), (7, ("7",)),
    (2.5, ("2.5",)), (["a", None, ["b", 3]], ("a", "b", "3")), ({"raw": "a", "id": 4}, ("a",)), ({"id": 4}, ()),
    ([{"text": None, "caption": "b"}], ("b",)), (np.array([b"x", b"y"], object), ("x", "y")), (object(), ())])
def test_texts_of(value, expected):
    assert texts_of(value) == expected


def test_words_for_a_missing_text_are_none():
    assert usable_texts(["None", " nan ", "null", "none", "<NA>", " ", "a"]) == ("none", "a")


class Foreign(Source):
    """A source of another module, which cleans nothing."""

    name, fingerprint = "foreign", "f"
    rows = (("a \ud83d heart", None, "", "b\0"), (None,), ("None",), ("a red circle",))

    def __len__(self):
        return len(self.rows)

    def texts(self, index):
        return self.rows[index]

    def __getitem__(self, index):
        return {"key": f"k\ud83d{index}\n", "image": np.full((4, 5, 3), index, np.uint8), "texts": self.rows[index],
                "image_id": f"i\udce9{index}"}


def test_every_reader_gets_clean_text(tmp_path):
    """Checking, showing, importing, CapFilt and training of a source with halves of pairs, NUL and null."""
    source, judged = Foreign(), []
    assert record_texts(source, 0) == ("a ? heart", "b") and record_key(source, 0) == "k?0\ufffd"
    report = check(source, on_record=judged.append)
    assert report["usable"] == 2 and report["broken"] == {"no text": 2} and report["texts"] == 3
    json.dumps([judgement.key for judgement in judged]).encode()
    shown = showing.first(source, 4)
    showing.write_html("t", shown, tmp_path / "page.html")
    assert shown[0].texts == ("a ? heart", "b")
    assert import_source(source, tmp_path / "set").tally.usable == 2
    records = tfds.builder_from_directory(tmp_path / "set").as_data_source(split="train")
    assert [text.decode() for text in records[0]["texts"]] == ["a ? heart", "b"]
    web = list(read_images(source, [], lambda key, reason: None))
    assert [image.texts for image in web] == [("a ? heart", "b"), (), (), ("a red circle",)]
    tokenizer = make_tokenizer(TokenizerConfig(vocab_size=90), record_texts(source, 0)).at_length(8)
    batches = train_batches(source, DataConfig(batch_size=4, image=ImageConfig(size=4), max_bad=1.0), tokenizer, seed=0)
    assert set(next(batches)["index"].tolist()) <= {0, 3}
    batches.close()


def test_names_of_classes_and_files_that_are_not_utf8(tmp_path):
    root = os.fsencode(tmp_path / "classes")
    for name in (b"caf\xe9/1.png", b"caf\xe8/2.png", b"dog/\xe9.png"):
        os.makedirs(os.path.dirname(os.path.join(root, name)), exist_ok=True)
        with open(os.path.join(root, name), "wb") as file:
            file.write(png(3))
    source = open_source(f"folder:{tmp_path}/classes")
    assert source.classes == ("caf?#0", "caf?#1", "dog") and check(source)["usable"] == 3
    assert import_source(source, tmp_path / "set").tally.usable == 3


@pytest.mark.parametrize("kind, name, content", [
    ("captions", "a.jsonl", '{"image": "1.png", "caption": "x \\ud83d\\u0000"}\n{"image": "1.png", "caption": null}'),
    ("captions", "a.csv", "image,caption\n1.png,x ?\n1.png,\n"),
    ("coco", "a.json", '[{"image": "1.png", "caption": "x \\ud83d"}, {"image": "2.png", "caption": NaN}]'),
    ("coco", "b.json", '{"images": [{"id": 1, "file_name": "1.png"}, {"id": 2, "file_name": "2.png"}], "annotations": '
                       '[{"image_id": 1, "caption": "x \\ud83d"}, {"image_id": 2, "caption": null}]}'),
    ("coco", "c.json", '{"images": [{"filename": "1.png", "split": "a", "sentences": [{"raw": "x \\ud83d"}]}, '
                       '{"filename": "2.png", "split": "a", "sentences": [{"raw": null}]}]}'),
    ("vqa", "d.json", '[{"image": "1.png", "question": "x \\ud83d"}, {"image": "2.png", "question": null}]'),
])
def test_null_is_no_word_in_any_layout(tmp_path, kind, name, content):
    for number in (1, 2):
        write(tmp_path / f"{number}.png", png(number))
    source = open_source(f"{kind}:{write(tmp_path / name, content)}")
    report = check(source)
    assert report["broken"] == {"no text": 1} and record_texts(source, 0) == ("x ?",) and record_texts(source, 1) == ()


@EXAMPLES
@given(st.text(st.characters(), max_size=20) | st.binary(max_size=20))
def test_any_text_can_be_written_when_it_is_clean(text):
    cleaned = clean(text)
    assert cleaned.encode().decode() == cleaned == clean(cleaned)
    assert all(c in "\t\n" or unicodedata.category(c) not in ("Cc", "Cs") for c in cleaned)
    assert all(unicodedata.category(c) not in ("Cc", "Cs") for c in printable(cleaned))
