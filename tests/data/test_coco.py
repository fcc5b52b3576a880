"""COCO's captions in the layouts of COCO, Karpathy and BLIP."""

import json

import pytest

from jaxmm.data.base import DataError, record_texts
from jaxmm.data.sources.registry import open_source
from jaxmm.data.tools.checking import check
from tests.data.test_sources import png, write


@pytest.mark.parametrize("folder", ["annotations", "annotations/images", "annotations/val", "val2017"])
def test_coco(tmp_path, folder):
    content = {
        "images": [{"id": 9, "file_name": "b.png"}, {"id": 4, "file_name": "a.png"}],
        "annotations": [{"image_id": 4, "caption": "first", "id": 1}, {"image_id": 9, "caption": "second", "id": 2},
                        {"image_id": 4, "caption": "third", "id": 3}],
    }
    file = write(tmp_path / "annotations/captions.json", json.dumps(content))
    for number, name in enumerate("ab"):
        write(tmp_path / folder / f"{name}.png", png(number))
    source = open_source(f"coco:{file}")
    assert [(r["image_id"], r["texts"], r["image"]) for r in (source[0], source[1])] == [
        ("9", ("second",), png(1)), ("4", ("first", "third"), png(0))]
    assert source.key(1).startswith("a.png")


def test_bad_coco(tmp_path):
    for text, message in [("{", "captions.json:1 is not JSON"), ("{}", "is none of the known layouts"),
                          ("[]", "is empty"),
                          ('{"images": []}', "not COCO's captions layout: KeyError 'annotations'"),
                          ('{"images": [], "annotations": []}', "is empty"),
                          ('{"images": [{"id": 1, "file_name": "x.png"}], "annotations": []}', "'x.png', the first")]:
        file = write(tmp_path / "captions.json", text)
        with pytest.raises(DataError, match=message):
            open_source(f"coco:{file}")


KARPATHY = [("train2014", "train", 11), ("val2014", "restval", 12), ("val2014", "val", 13), ("train2014", "train", 14),
            ("val2014", "test", 15)]


def karpathy(tmp_path, folders=True):
    """A file of five images in four splits, each with two captions."""
    images = []
    for folder, split, number in KARPATHY:
        image = {"filename": f"{number}.png", "split": split, "sentences": [{"raw": f"{k} of {number}."} for k in "ab"]}
        images.append(image | ({"filepath": folder, "cocoid": number, "imgid": 0} if folders else {"imgid": number}))
        write(tmp_path / (folder if folders else "pictures") / f"{number}.png", png(number))
    return write(tmp_path / "karpathy" / "dataset.json", json.dumps({"dataset": "made", "images": images}))


@pytest.mark.parametrize("folders", [True, False], ids=["coco", "flickr30k"])
def test_karpathy_splits(tmp_path, folders):
    file = karpathy(tmp_path, folders)
    for split, numbers in {"train": [11, 12, 14], "train-only": [11, 14], "restval": [12], "val": [13], "test": [15],
                           "val+test": [13, 15]}.items():
        source = open_source(f"coco:{file}:{split}")
        assert [source[i]["image_id"] for i in range(len(source))] == [str(number) for number in numbers]
        assert [source[i]["image"] for i in range(len(source))] == [png(number) for number in numbers]
        assert record_texts(source, 0) == (f"a of {numbers[0]}.", f"b of {numbers[0]}.")
    assert open_source(f"coco:{file}:val").fingerprint != open_source(f"coco:{file}:test").fingerprint


@pytest.mark.parametrize("split, message", [
    ("", "has the splits train, restval, val, test; expected one of them behind the file, as in FILE.json:train"),
    (":dev", "has no split 'dev'; expected one of train, restval, val, test"),
    (":val+tset", "has no split 'tset'"),
])
def test_a_split_that_is_missing_is_named(tmp_path, split, message):
    with pytest.raises(DataError, match=message.replace("+", r"\+")):
        open_source(f"coco:{karpathy(tmp_path)}{split}")


def test_blip_lists(tmp_path):
    for number in (1, 2):
        write(tmp_path / f"images/val2014/{number}.png", png(number))
    entries = [{"image": "val2014/1.png", "caption": "a", "image_id": "coco_1"},
               {"image": "val2014/2.png", "caption": "b", "image_id": "coco_2"},
               {"image": "val2014/1.png", "caption": "c", "image_id": "coco_1"}]
    train = open_source(f"coco:{write(tmp_path / 'train.json', json.dumps(entries))}")
    assert [(r["image_id"], r["texts"], r["image"]) for r in (train[0], train[1])] == [
        ("coco_1", ("a", "c"), png(1)), ("coco_2", ("b",), png(2))]
    entries = [{"image": "val2014/2.png", "caption": ["d", "e"]}, {"image": "val2014/1.png", "caption": ["f"]}]
    val = open_source(f"coco:{write(tmp_path / 'val.json', json.dumps(entries))}")
    assert [(r["texts"], "image_id" in r) for r in (val[0], val[1])] == [(("d", "e"), False), (("f",), False)]


def test_splits_and_fields_that_are_not_there(tmp_path):
    for content, split, message in [
        ([{"image": "1.png", "caption": "a"}], ":val", "has BLIP's layout, without splits; given 'val'"),
        ({"images": [], "annotations": []}, ":val", "has COCO's layout, without splits"),
        ([{"image": "1.png"}], "", "a.json: entry 0 has no `caption`"),
        ({"images": [{"sentences": [], "filename": "1.png"}]}, ":val", "not Karpathy's captions layout: KeyError"),
    ]:
        file = write(tmp_path / "a.json", json.dumps(content))
        with pytest.raises(DataError, match=message):
            open_source(f"coco:{file}{split}")


def coco_of(tmp_path, ids, used, files=None):
    """Open COCO's layout with images of `ids` and one caption for each of `used`."""
    files = files or [f"{number}.png" for number in range(len(ids))]
    for number, file in enumerate(files):
        write(tmp_path / file, png(number))
    content = {"images": [{"id": image_id, "file_name": file} for image_id, file in zip(ids, files, strict=True)],
               "annotations": [{"image_id": image_id, "caption": f"t{i}"} for i, image_id in enumerate(used)]}
    return open_source(f"coco:{write(tmp_path / 'a.json', json.dumps(content))}")


@pytest.mark.parametrize("ids, used", [
    (["0", "11", "2"], [0, 11, 2]), ([0, 11, 2], ["0", "11", "2"]), ([0, 11, 2], [0.0, 11.0, 2.0]),
    (["000000000000", "000000000011", "000000000002"], [0, 11, 2]), ([0, 11, 2], ["00", " 011 ", "002"]),
    (["a", "b/1", "7"], ["a", "b/1", 7]), (["01", "1", "001"], ["01", 1, "001"])])
def test_ids_match_whatever_their_type(tmp_path, ids, used):
    source = coco_of(tmp_path, ids, used)
    assert [record_texts(source, i) for i in range(3)] == [("t0",), ("t1",), ("t2",)] and source.notes == ()
    assert [source[i]["image_id"] for i in range(3)] == [str(image_id) for image_id in ids]


def test_captions_of_no_image_are_counted(tmp_path):
    source = coco_of(tmp_path, [0, 1, 2], [1, 9, None, "1", [3]])
    assert [record_texts(source, i) for i in range(3)] == [(), ("t0", "t3"), ()]
    assert source.notes == ("3 of 5 captions are of images that are not listed, such as image_id 9",)
    with pytest.raises(DataError, match="no `image_id` of its 2 annotations, such as 'x', is an `id` of its images"):
        coco_of(tmp_path, [0, 1, 2], ["x", "y"])


def test_one_id_of_several_images_is_refused(tmp_path):
    source = coco_of(tmp_path, [4, "4", 5], [4, 5])
    report = check(source)
    assert report["broken"] == {"malformed": 2} and record_texts(source, 2) == ("t1",)
    same = coco_of(tmp_path, [4, 4], [4], ["0.png", "0.png"])
    assert [record_texts(same, i) for i in range(2)] == [("t0",), ("t0",)]


def test_bad_entries_and_captions_are_counted(tmp_path):
    write(tmp_path / "1.png", png(1))
    content = {"images": [{"id": 1, "coco_url": "http://x.org/val2017/1.png"}, {"id": 2}, 7, {"file_name": "1.png"}],
               "annotations": [{"image_id": 1, "caption": text} for text in (None, 3, "a", " ", ["b", None], {})] + [5]}
    source = open_source(f"coco:{write(tmp_path / 'a.json', json.dumps(content))}")
    assert record_texts(source, 0) == ("3", "a", "b") and source[0]["image"] == png(1)
    assert check(source)["broken"] == {"malformed": 3}
    assert source.notes == ("3 of 6 captions are null, blank or no text", "3 of 4 entries cannot be read")
    with pytest.raises(DataError, match="no `caption` in its annotations, which have image_id, bbox"):
        content["annotations"] = [{"image_id": 1, "bbox": [0, 0, 1, 1]}]
        open_source(f"coco:{write(tmp_path / 'b.json', json.dumps(content))}")


def test_a_split_and_a_folder(tmp_path):
    file = karpathy(tmp_path / "a", folders=False)
    (tmp_path / "a/pictures").rename(tmp_path / "far@away")
    with pytest.raises(DataError, match="Say where they are"):
        open_source(f"coco:{file}:val")
    for location in (f"{file}:val@{tmp_path}/far@away", f"{file}@{tmp_path}/far@away:val"):
        source = open_source(f"coco:{location}")
        assert len(source) == 1 and source[0]["image"] == png(13)
