"""Images are found by the name of the split and by many records; in doubt the candidates are named."""

import json
import os

import pytest

from jaxmm.data import DataError, open_source
from jaxmm.data.tools.checking import check
from tests.data.test_sources import png, write

COUNT = 7


def images(folder, first=0, names=range(COUNT)):
    for number in names:
        write(folder / f"{number}.png", png(first + number))


def listed(kind, file, names=range(COUNT)):
    """Write annotations of the images `names` in the layout of `kind`, and return the source."""
    rows = [{"image": f"{number}.png", "caption": "a", "question": "b?", "answer": "c"} for number in names]
    if kind == "coco":
        text = json.dumps({"images": [{"id": i, "file_name": row["image"]} for i, row in enumerate(rows)],
                           "annotations": [{"image_id": i, "caption": "a"} for i in range(len(rows))]})
    elif kind == "nlvr":
        text = json.dumps([{"images": [row["image"]] * 2, "sentence": "a", "label": "True"} for row in rows])
    else:
        text = "\n".join(map(json.dumps, rows))
    return f"{kind}:{write(file, text)}"


def first_image(source):
    image = source[0]["image"]
    return image[0] if isinstance(image, tuple) else image


@pytest.mark.parametrize("kind", ["coco", "vqa", "nlvr", "captions"])
class TestEveryKind:
    def test_the_split_of_the_file_comes_first(self, tmp_path, kind):
        """Both splits number their images from 0; the folders are named alike, but not equally."""
        for number, (split, folder) in enumerate([("train", "training"), ("val", "validation"), ("test", "test2015")]):
            images(tmp_path / "images" / folder, 10 * number)
            source = open_source(listed(kind, tmp_path / "annotations" / f"set_{split}.json"))
            assert first_image(source) == png(10 * number) and source.notes == ()

    def test_another_split_is_never_taken(self, tmp_path, kind):
        images(tmp_path / "train")
        spec = listed(kind, tmp_path / "val.json")
        with pytest.raises(DataError, match=r"only in .*train \(7 of 7\), of another split.*@DIR"):
            open_source(spec)
        assert first_image(open_source(f"{spec}@{tmp_path}/train")) == png(0)

    def test_several_that_fit_are_named(self, tmp_path, kind):
        for number, folder in enumerate(["small", "large"]):
            images(tmp_path / folder, 50 * number)
        spec = listed(kind, tmp_path / "all.json")
        with pytest.raises(DataError, match=r"may be in .*large \(7 of 7\), .*small \(7 of 7\)\. Say where they are"):
            open_source(spec)
        assert first_image(open_source(f"{spec}@{tmp_path}/small")) == png(0)
        assert first_image(open_source(f"{spec}@root={tmp_path}/large")) == png(50)

    def test_a_part_of_the_images_is_enough(self, tmp_path, kind):
        images(tmp_path / "images", names=range(2, COUNT))
        images(tmp_path / "thumbnails", 100, names=range(1))
        source = open_source(listed(kind, tmp_path / "all.json"))
        assert check(source)["broken"] == {"unreadable": 2}
        assert source.notes == (f"2 of 7 images that were looked up are not in {tmp_path / 'images'}",)

    def test_nothing_outside_is_taken(self, tmp_path, kind):
        """Another data set is beside the folder, and has images of the same names."""
        images(tmp_path / "other/images")
        spec = listed(kind, tmp_path / "mine/all.json")
        if kind == "captions":
            source = open_source(spec)
            assert check(source)["usable"] == 0 and "other/images (7 of 7), outside" in source.notes[0]
            return
        with pytest.raises(DataError, match=r"'0.png', the first image, none is .*other/images \(7 of 7\), outside"):
            open_source(spec)

    def test_paths_with_signs(self, tmp_path, kind, monkeypatch):
        """A real path may contain @ and =; the root may be relative to here or to the file, unless both exist."""
        folder = tmp_path / "me@home" / "a=b"
        images(folder / "set@2")
        images(folder / "other", 30)
        spec = listed(kind, folder / "x@y.json")
        assert first_image(open_source(f"{spec}@{folder}/set@2")) == png(0)
        monkeypatch.chdir(tmp_path)
        assert first_image(open_source(f"{spec}@set@2")) == png(0)
        (tmp_path / "other").mkdir()
        for root, message in [("other", "a folder here and beside the file"), ("nothing", "no folder 'nothing'"),
                              ("https://a/b", "in 'https://a/b'; expected a folder, local or in a bucket")]:
            with pytest.raises(DataError, match=message):
                open_source(f"{spec}@{root}")


def test_a_root_may_be_above(tmp_path):
    for split in ("train2014", "val2014"):
        images(tmp_path / "pictures" / split, 20 * split.startswith("v"))
    source = open_source(listed("coco", tmp_path / "elsewhere/captions_val2014.json") + f"@{tmp_path}/pictures")
    assert first_image(source) == png(20)


def test_names_are_found_however_they_are_written(tmp_path):
    write(tmp_path / "images/caf\u00e9.png", png(1))
    for name in ("images/cafe\u0301.png", "images\\caf\u00e9.png", ".\\images\\caf\u00e9.png"):
        file = write(tmp_path / "a.jsonl", json.dumps({"image": name, "caption": "x"}))
        assert first_image(open_source(f"captions:{file}")) == png(1)


def test_addresses_and_full_paths_of_images(tmp_path):
    write(tmp_path / "far/1.png", png(3))
    rows = [{"image": str(tmp_path / "far/1.png"), "caption": "x"}, {"image": "https://a.org/1.png", "caption": "y"}]
    source = open_source(f"captions:{write(tmp_path / 'near/a.jsonl', chr(10).join(map(json.dumps, rows)))}")
    assert first_image(source) == png(3) and check(source)["broken"] == {"no image": 1}


def test_links_to_one_folder_are_one_candidate(tmp_path):
    images(tmp_path / "pictures")
    os.symlink(tmp_path / "pictures", tmp_path / "photos")
    assert first_image(open_source(listed("coco", tmp_path / "all.json"))) == png(0)
