import importlib
import io
import json
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from sklearn.datasets import load_digits

from jaxmm.config import DataConfig, ImageConfig
from jaxmm.data import DataError, Source, open_source, register_source
from jaxmm.data.bad_records import BadRecord
from jaxmm.data.base import record_texts
from jaxmm.data.pipeline import train_batches
from jaxmm.data.sources import registry
from jaxmm.data.tools.checking import check


def png(value, size=(5, 3)):
    stream = io.BytesIO()
    Image.new("RGB", size, (value, 2 * value, 0)).save(stream, "png")
    return stream.getvalue()


def write(path, content=b""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_folder_is_a_class_a_folder(tmp_path):
    for number, name in enumerate(["b/2.JPG", "b/10.png", "a/deep/er/1.webp", "a/0.gif", ".cache/x.png",
                                   "a/.hidden.png", "a/notes.txt", "b/3.jpeg"]):
        write(tmp_path / name, bytes([number]))
    (tmp_path / "empty").mkdir()
    source = open_source(f"folder:{tmp_path}")
    assert source.classes == ("a", "b", "empty") and source.name == f"folder:{tmp_path}"
    records = [source[i] for i in range(len(source))]
    assert [(r["key"], r["label"], r["image"]) for r in records] == [
        ("a/0.gif", 0, b"\3"), ("a/deep/er/1.webp", 0, b"\2"),
        ("b/10.png", 1, b"\1"), ("b/2.JPG", 1, b"\0"), ("b/3.jpeg", 1, b"\7"),
    ]
    same, pickled = open_source(f"folder:{tmp_path}"), pickle.loads(pickle.dumps(source))
    assert same.fingerprint == source.fingerprint and pickled[3] == source[3]
    write(tmp_path / "b/4.png")
    assert open_source(f"folder:{tmp_path}").fingerprint != source.fingerprint


def test_captions(tmp_path):
    write(tmp_path / "images/1.png", png(7))
    lines = [{"image": "images/1.png", "caption": "one"}, {"image": "images/1.png", "captions": ["two", " ", "three"]},
             {"image": "images/2.png", "texts": ["four"], "image_id": 12}, {"image": "images/2.png"}]
    file = write(tmp_path / "train.jsonl", "\n\n".join(map(json.dumps, lines)).encode() + b"\n")
    source = open_source(f"captions:{file}")
    assert len(source) == 4 and source.classes is None
    assert source[0]["image"] == png(7) and source[0]["texts"] == ("one",) and "image_id" not in source[0]
    with pytest.raises(FileNotFoundError):
        source[2]
    assert [record_texts(source, i) for i in range(4)] == [("one",), ("two", "three"), ("four",), ()]
    assert len({source.key(i) for i in range(4)}) == 4
    write(tmp_path / "images/2.png", png(8))
    assert source[2]["image_id"] == "12"
    assert pickle.loads(pickle.dumps(source))[1] == source[1]


def test_captions_that_are_not_utf8_are_replaced(tmp_path):
    file = write(tmp_path / "a.jsonl", b'{"image": "1.png", "caption": "caf\xe9 \xe2\x80\xa8 x"}\n')
    assert record_texts(open_source(f"captions:{file}"), 0) == ("caf� \u2028 x",)


@pytest.mark.parametrize("line, message", [
    ('{"image": "1.png", "caption": ', "a.jsonl:3 is not JSON"),
    ('["1.png"]', "a.jsonl:3 names no image"),
    ('7', "a.jsonl:3 is int; expected an object"),
    ('{"caption": "x"}', "a.jsonl:3 names no image; its keys are caption"),
])
def test_a_bad_line_is_one_bad_record(tmp_path, line, message):
    write(tmp_path / "1.png", png(1))
    good = '{"image": "1.png", "caption": "x"}'
    file = write(tmp_path / "a.jsonl", "\n".join([good, "", line, good, good]))
    source = open_source(f"captions:{file}")
    report = check(source)
    assert report["broken"] == {"malformed": 1} and report["usable"] == 3 and len(source) == 4
    assert report["examples"]["malformed"] == ["a.jsonl:3#1"] and source.notes == ("1 of 4 rows cannot be read",)
    with pytest.raises(BadRecord, match=message):
        source[1]
    assert pickle.loads(pickle.dumps(source))[3]["texts"] == ("x",)


def test_digits_are_split_by_class():
    train, test = open_source("digits:train"), open_source("digits:test")
    assert train.classes == tuple("0123456789") and train.fingerprint != test.fingerprint
    labels = [np.array([s[i]["label"] for i in range(len(s))]) for s in (train, test)]
    total = np.bincount(load_digits().target)
    np.testing.assert_array_equal(np.bincount(labels[1]), total // 5)
    np.testing.assert_array_equal(np.bincount(labels[0]) + np.bincount(labels[1]), total)
    rows = [{s[i]["image"].tobytes() for i in range(len(s))} for s in (train, test)]
    assert not rows[0] & rows[1]
    first = train[0]["image"]
    assert first.shape == (8, 8, 3) and first.dtype == np.uint8
    np.testing.assert_array_equal(first[..., 1], np.rint(load_digits().images[0] * 255 / 16))


class TinyPictures(tfds.core.GeneratorBasedBuilder):
    """Seven images with labels, captions and ids."""

    VERSION = tfds.core.Version("1.2.3")

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
            "label": tfds.features.ClassLabel(names=["even", "odd"]),
            "image_id": tfds.features.Text(),
            "captions": tfds.features.Sequence({"id": np.int64, "text": tfds.features.Text()}),
        }))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(7), "val": self._generate_examples(2)}

    def _generate_examples(self, count):
        for i in range(count):
            yield i, {"image": io.BytesIO(png(i)), "label": i % 2, "image_id": f"id{i}",
                      "captions": [{"id": k, "text": f"caption {k} of {i}"} for k in range(1 + i % 2)]}


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    tfds.display_progress_bar(False)
    builder = TinyPictures(data_dir=folder, file_format="array_record")
    builder.download_and_prepare(download_dir=folder / "downloads")
    return folder


def test_tfds(tfds_dir):
    source = open_source("tfds:tiny_pictures:train", data_dir=str(tfds_dir))
    assert len(source) == 7 and source.classes == ("even", "odd")
    records = {r["image_id"]: r for r in (source[i] for i in range(7))}
    assert len({r["key"] for r in records.values()}) == 7
    for i in range(7):
        record = records[f"id{i}"]
        assert record["image"] == png(i) and record["label"] == i % 2
        assert record["texts"] == tuple(f"caption {k} of {i}" for k in range(1 + i % 2))
    assert pickle.loads(pickle.dumps(source))[3] == source[3]
    version = open_source("tfds:tiny_pictures:1.2.3:train[3:]+val", data_dir=str(tfds_dir))
    assert len(version) == 6 and version.fingerprint != source.fingerprint
    folder = open_source(f"tfds:{tfds_dir}/tiny_pictures/1.2.3:val")
    assert len(folder) == 2


@pytest.mark.parametrize("spec, message", [
    ("tfds:tiny_pictures:trian", "Unknown split 'trian'. Should be one of"),
    ("tfds:tiny_pictres:train", "TFDS has no data set 'tiny_pictres'"),
    ("tfds:tiny_pictures", "expected tfds:NAME:SPLIT"),
    ("tfds:mnist:train", "is not prepared in"),
])
def test_bad_tfds(tfds_dir, spec, message):
    with pytest.raises(DataError, match=message):
        open_source(spec, data_dir=str(tfds_dir))


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "missing"])
def test_damaged_array_records(tfds_dir, tmp_path, damage):
    """ArrayRecord's own checksums find it: a record is what was written, or unreadable."""
    folder = tmp_path / "tiny_pictures" / "1.2.3"
    shutil.copytree(tfds_dir / "tiny_pictures" / "1.2.3", folder)
    good = [*map(open_source(f"tfds:{folder}:train").__getitem__, range(7))]
    [file] = folder.glob("*train.array_record*")
    data = file.read_bytes()
    if damage != "flipped":
        file.unlink() if damage == "missing" else file.write_bytes(data[:len(data) // 2 * (damage == "cut")])
        assert check(open_source(f"tfds:{folder}:train"))["broken"] == {"unreadable": 7}
        return
    spoilt = 0
    for at in np.random.default_rng(0).choice(np.flatnonzero(np.frombuffer(data, np.uint8)), 30, replace=False):
        file.write_bytes(data[:at] + bytes([data[at] ^ 16]) + data[at + 1:])
        source, judged = open_source(f"tfds:{folder}:train"), []
        check(source, on_record=judged.append)
        spoilt += sum(not judgement.usable for judgement in judged)
        assert all(source[i] == good[i] for i in range(7) if judged[i].usable)
    assert spoilt > 20


def test_no_code_of_others_is_imported_for_a_data_set(tfds_dir, tmp_path, monkeypatch):
    """TFDS imports the module of a feature's class, and downloads and imports what is in a namespace."""
    folder, mark = tmp_path / "other_pictures" / "1.2.3", tmp_path / "mark"
    shutil.copytree(tfds_dir / "tiny_pictures" / "1.2.3", folder)
    features = (folder / "features.json").read_text()
    monkeypatch.syspath_prepend(tmp_path)                           # a notebook's own folder
    for number, key in enumerate(('"pythonClassName"', '"python_class_name"', '"\\u0070ythonClassName"')):
        name = f"own_features_{number}"
        (tmp_path / f"{name}.py").write_text(f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n")
        (folder / "features.json").write_text(features.replace('"pythonClassName"', key).replace(
            "tensorflow_datasets.core.features.image_feature", name))
        for spec in (f"tfds:{folder}:train", "tfds:other_pictures:train", "tfds:OtherPictures:1.2.3:train"):
            with pytest.raises(DataError, match=rf"names the class {name}\.Image; expected one of TFDS, or import"):
                open_source(spec, data_dir=str(tmp_path))
        assert not mark.exists()
        with pytest.raises(ValueError):
            tfds.builder_from_directory(folder)
        assert mark.exists()                                        # TFDS alone has imported it
        mark.unlink()
    monkeypatch.setattr(tfds, "builder", None)
    for name in ("kubric:movi_a", "huggingface:mnist", "some-one:a/b:1.0.0"):
        with pytest.raises(DataError, match="is in a namespace, from which TFDS would download and run code"):
            open_source(f"tfds:{name}:train")


@pytest.mark.parametrize("spec, message", [
    ("fodler:x", "unknown kind 'fodler' .did you mean 'folder'.*captions:FILE.jsonl"),
    ("/data/pictures", "unknown kind '/data/pictures'; expected one of"),
    ("folder", "expected folder:DIR"),
    ("folder:", "expected folder:DIR"),
    ("folder:/no/such/place", "no folder '/no/such/place'"),
    ("captions:/no/such/file.jsonl", "cannot read /no/such/file.jsonl: No such file"),
    ("coco:/no/such/file.json", "cannot read /no/such/file.json: No such file"),
    ("digits:val", "unknown split 'val'; expected train or test"),
])
def test_bad_specs(spec, message):
    with pytest.raises(DataError, match=message):
        open_source(spec)


def test_empty_sources(tmp_path):
    (tmp_path / "a").mkdir()
    file = write(tmp_path / "a.jsonl", "\n\n")
    for spec in (f"folder:{tmp_path}", f"captions:{file}"):
        with pytest.raises(DataError, match="is empty"):
            open_source(spec)


class Greys(Source):
    """A source of a user's own module: images of one grey each."""

    classes = ("dark", "bright")

    def __init__(self, name, count):
        self.name, self.fingerprint, self.count = name, f"greys {count}", count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index == 3:
            raise RuntimeError("this record is broken")
        image = np.full((4, 6, 3), 20 * index, np.uint8)
        return {"image": image, "label": int(index > 5), "texts": ("a", f"b {index}")}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_source_of_another_module(workers, monkeypatch):
    monkeypatch.setattr(registry, "REGISTERED", {})
    with pytest.raises(DataError, match="unknown kind 'greys'"):
        open_source("greys:11")
    register_source("greys", lambda spec, location, data_dir: Greys(spec, int(location)), "COUNT")
    source = open_source("greys:11")
    batches = train_batches(source, DataConfig(batch_size=11, workers=workers, image=ImageConfig(size=4)), seed=3)
    batch = next(batches)
    batches.close()
    assert sorted(batch["drawn"]) == list(range(11)) and 3 not in batch["index"]
    np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], 20 * batch["index"])
    np.testing.assert_array_equal(batch["label"], batch["index"] > 5)
    report = check(source, workers=2, shard_records=6)
    assert report["broken"] == {"unreadable": 1} and report["examples"] == {"unreadable": ["greys:11#3"]}
    assert source.texts(2) == ("a", "b 2") and source.key(2) == "greys:11#2" and source.answers(2) == ()
    assert not source.varies and source.image_id_scope == "greys:11" and source.shards() == ()
    with pytest.raises(DataError, match="expected greys:COUNT"):
        open_source("greys:")


@pytest.mark.parametrize("kind", ["coco", "Own", "own kind", "own:", ""])
def test_kinds_that_cannot_be_registered(kind):
    with pytest.raises(ValueError, match="expected lower-case letters, other than captions"):
        register_source(kind, lambda *_: None)


def test_every_kind_has_an_opener():
    for kind, row in registry.KINDS.items():
        assert callable(getattr(importlib.import_module(row.module), row.opener)), kind


def test_opening_a_source_imports_what_it_needs():
    program = ("import sys; from jaxmm.data import open_source; print(sorted({'jax', 'tensorflow_datasets', 'pyarrow', "
               "'sklearn', 'PIL'} & set(sys.modules)))")
    printed = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert printed == "[]\n"


def classes_of(root, *names):
    for number, name in enumerate(names):
        write(root / name, png(number))
    return open_source(f"folder:{root}")


def test_hidden_and_system_folders_are_no_classes(tmp_path):
    source = classes_of(tmp_path, "cat/1.png", "cat/.ipynb_checkpoints/1.png", "dog/@eaDir/1.png", "dog/2.png",
                        "__MACOSX/cat/._1.png", "cat/._1.png", ".git/3.png", "lost+found/4.png", "dog/notes.txt",
                        "dog/READ", "5.png")
    (tmp_path / "bird").mkdir()
    source = open_source(f"folder:{tmp_path}")
    assert source.classes == ("bird", "cat", "dog") and [source.key(i) for i in range(2)] == ["cat/1.png", "dog/2.png"]
    assert len(source) == 2 and source.notes == (
        "1 of 3 classes have no images: bird",
        "passed over hidden folders: 5, .txt files: 1, READ files: 1, hidden files: 1",
        "1 images are not in the folder of a class and are passed over")


def test_the_folder_above_splits_is_no_class(tmp_path):
    with pytest.raises(DataError, match=r"test, train, val are splits, not classes; expected one of .*/train"):
        classes_of(tmp_path / "a", "train/cat/1.png", "train/dog/2.png", "val/cat/3.png", "test/4.png")
    assert classes_of(tmp_path / "b", "train/1.png", "car/2.png").classes == ("car", "train")
    source = classes_of(tmp_path / "c", "all/a/1.png", "all/b/2.png")
    assert "one class, 'all', with 2 folders; are these" in source.notes[0]


def test_links_to_folders_are_followed_once(tmp_path):
    classes_of(tmp_path, "dog/1.png")
    write(tmp_path / "store/more/2.png", png(2))
    root = tmp_path / "classes"
    (root / "dog").mkdir(parents=True)
    (root / "dog/more").symlink_to(tmp_path / "store")
    (root / "dog/again").symlink_to(root / "dog")
    (root / "cat").symlink_to(tmp_path / "dog")
    source = open_source(f"folder:{root}")
    assert [source.key(i) for i in range(len(source))] == ["cat/1.png", "dog/more/more/2.png"]


@pytest.mark.parametrize("kind, address", [
    *((kind, address) for kind in ("folder", "captions", "coco", "vqa", "nlvr", "tars", "parquet")
      for address in ("https://host/a.tar", "hf://a/b", "file:///a"))])
def test_addresses_are_refused_at_once(kind, address):
    with pytest.raises(DataError, match=f"'{address}' is no local path.*; expected one: .*addresses are not supported"):
        open_source(f"{kind}:{address}")


def test_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "a/1.png", png(7))
    write(tmp_path / "list.csv", "image,caption\n1.png,x\n")
    assert open_source("folder:~").classes == ("a",)
    assert open_source("captions:~/list.csv@~/a")[0]["image"] == png(7)
