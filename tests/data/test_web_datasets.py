import io
import json

import numpy as np
import pytest

from jaxmm.data.bad_records import BadRecord
from jaxmm.data.base import DataError
from jaxmm.data.sources.registry import open_source
from jaxmm.data.sources.shards import Slice, shards
from jaxmm.data.tools.checking import check
from jaxmm.data.tools.importing import import_source
from jaxmm.data.tools.showing import first
from jaxmm.data.usable import read_usable
from tests.data.crawl import jpeg, write_tar

NAMES = ("crane", "crane", "elk")


def web_dataset(folder, shards, *, classes=NAMES, templates=("a {c}", "{c}, {c}!"), kind=None, split="test"):
    """Write CLIP_benchmark's layout by hand: each shard is a list of (ending of the text or label, its content)."""
    (folder / split).mkdir(parents=True)
    number = 0
    for shard, members in enumerate(shards):
        files = []
        for ending, content in members:
            files += [(f"s{number:07}.jpg", jpeg(number)), (f"s{number:07}.{ending}", content)]
            number += 1
        write_tar(folder / split / f"{shard}.tar", files)
    (folder / split / "nshards.txt").write_text(f"{len(shards)}\n")
    if classes:
        (folder / "classnames.txt").write_text("".join(f"{name}\n" for name in classes))
        (folder / "zeroshot_classification_templates.txt").write_text("".join(f"{line}\n" for line in templates))
    if kind:
        (folder / "dataset_type.txt").write_text(f"{kind}\n")
    return folder


def test_classes_with_equal_names_and_shards_in_order_of_number(tmp_path):
    shards = [[("cls", str((shard + 1) % 3).encode())] for shard in range(11)]
    source = open_source(f"wds:{web_dataset(tmp_path / 'a', shards)}")
    assert source.classes == NAMES and source.templates == ("a {}", "{}, {}!")
    assert [source[row]["label"] for row in range(11)] == [(shard + 1) % 3 for shard in range(11)]
    assert [source.key(row).split("/")[0] for row in (2, 10)] == ["2", "10"]
    assert source[10]["image"] == jpeg(10) and "texts" not in source[10]


def test_labels_that_are_no_class_are_bad_records(tmp_path):
    source = open_source(f"wds:{web_dataset(tmp_path / 'a', [[('cls', b'3'), ('cls', b'elk'), ('cls', b'2')]])}")
    for row in (0, 1):
        with pytest.raises(BadRecord, match=r"label (3|None) of 3 classes"):
            read_usable(source, row, ("label",))
    assert read_usable(source, 2, ("label",)).label == 2


def test_one_caption_per_line(tmp_path):
    text = "a dog\na \\n cat\n\nCafé".encode()
    source = open_source(f"wds:{web_dataset(tmp_path / 'a', [[('txt', text)]], classes=(), kind='retrieval')}:test")
    assert source.texts(0) == ("a dog", "a \\n cat", "Café") and source.classes is None and source.templates is None


def test_splits_and_faults(tmp_path):
    root = web_dataset(tmp_path / "a", [[("cls", b"0")]], split="train")
    assert len(open_source(f"wds:{root}:train")) == 1
    for spec, words in (
            (f"wds:{root}", "expected one of the splits train"), (f"wds:{tmp_path / 'none'}", "no folder"),
            (f"wds:{tmp_path}", "expected CLIP_benchmark's layout"), ("wds:ftp://a/b", "no data set of the hub")):
        with pytest.raises(DataError, match=words):
            open_source(spec)
    (root / "train" / "nshards.txt").write_text("2")
    with pytest.raises(DataError, match=r"1\.tar is missing; .*says 2 shards"):
        open_source(f"wds:{root}:train")
    (root / "dataset_type.txt").write_text("depth")
    (root / "train" / "nshards.txt").write_text("1")
    with pytest.raises(DataError, match="'depth'; expected classification, multilabel or retrieval"):
        open_source(f"wds:{root}:train")


def vector(*values, dtype=np.float32):
    file = io.BytesIO()
    np.save(file, np.array(values, dtype))
    return file.getvalue()


def test_several_labels_per_image(tmp_path):
    labels = [vector(0, 1, 1), vector(0, 0, 0, dtype=np.int64), vector(1, 0), vector("a", "b", "c", dtype=str),
              vector(0, 0, 1)[:-1], b"2"]
    folder = web_dataset(tmp_path / "a", [[("npy", label) for label in labels], [("npy", vector(1, 0, 1))]],
                         kind="multilabel")
    source = open_source(f"wds:{folder}")
    assert source.tags == NAMES and source.classes is None and source.templates == ("a {}", "{}, {}!")
    assert [source.tags_of(row) for row in (0, 1, 6)] == [(1, 2), (), (0, 2)] and source[0]["tags"] == (1, 2)
    assert shards(source)[1].tags_of(0) == Slice(source, 5, 7).tags_of(1) == (0, 2)
    for row, words in ((2, r"float32 with the shape \(2,\); expected 3 numbers"), (3, "<U1 with"), (4, "buffer"),
                       (5, "EOF")):
        with pytest.raises(BadRecord, match=f"no label: .*{words}"):
            source[row]
    report = check(source)
    assert report["usable"] == 3 and report["broken"] == {"no label": 4}
    assert [shown.texts for shown in first(source, 2)] == [("crane", "elk"), ()]
    with pytest.raises(DataError, match="has questions, several labels or several images per record"):
        import_source(source, tmp_path / "b")


@pytest.mark.parametrize("root", ["own/wds_cats", "https://huggingface.co/datasets/own/wds_cats/tree/v2"])
def test_a_data_set_of_the_hub(root, tmp_path, monkeypatch):
    asked = []

    def download(name, **options):
        asked.append((name, options))
        return str(folder)

    folder = web_dataset(tmp_path / "a", [[("cls", b"0")]])
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert len(open_source(f"wds:{root}:test")) == 1
    revision = "v2" if "tree" in root else None
    assert asked == [("own/wds_cats", {"repo_type": "dataset", "revision": revision,
                                       "allow_patterns": ["*.txt", "test/*"]})]


def test_sugar_crepe_and_winoground(tmp_path):
    for name in ("1.jpg", "2.png"):
        (tmp_path / name).write_bytes(jpeg(int(name[0])))
    entries = {"0": {"filename": "1.jpg", "caption": "a dog on a cat", "negative_caption": "a cat on a dog"},
               "7": {"filename": "1.jpg", "caption": "a dog"}}
    (tmp_path / "swap_obj.json").write_text(json.dumps(entries))
    source = open_source(f"sugarcrepe:{tmp_path / 'swap_obj.json'}")
    assert source.has_foils and source.images_per_record == 1 and source[0]["image"] == jpeg(1)
    assert source.texts(0) == ("a dog on a cat", "a cat on a dog")
    with pytest.raises(BadRecord, match="entry 7 expected an object with filename, caption, negative_caption"):
        source[1]
    (tmp_path / "images").mkdir()
    for number in (0, 1):
        (tmp_path / "images" / f"ex_0_img_{number}.png").write_bytes(jpeg(number))
    row = {"image_0": "ex_0_img_0", "image_1": "ex_0_img_1", "caption_0": "one", "caption_1": "two"}
    (tmp_path / "examples.jsonl").write_text(json.dumps(row) + "\n")
    source = open_source(f"winoground:{tmp_path / 'examples.jsonl'}")
    assert source.images_per_record == 2 and source[0]["image"] == (jpeg(0), jpeg(1))
    assert np.array_equal(source.texts(0), ("one", "two"))
    (tmp_path / "examples.jsonl").write_text('{"image_0": "a"}\n')
    with pytest.raises(DataError, match="expected an object with image_0, image_1, caption_0, caption_1"):
        open_source(f"winoground:{tmp_path / 'examples.jsonl'}")
