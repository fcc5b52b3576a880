"""Data in buckets is what it is in folders, and no byte of it is read twice."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxmm import folder_locks
from jaxmm.config import DataConfig, ImageConfig
from jaxmm.data.base import DataError
from jaxmm.data.pipeline import train_batches
from jaxmm.data.sources.registry import open_source
from jaxmm.data.tools.importing import import_source
from jaxmm.paths import user_path
from tests.data import crawl
from tests.data.test_web_datasets import web_dataset
from tests.test_buckets import fetched


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """A folder with images in every layout that is read from buckets."""
    folder = tmp_path_factory.mktemp("data")
    crawl.write_tar(folder / "00000.tar", crawl.pairs(0, 18))
    crawl.write_tar(folder / "00001.tar", crawl.files(crawl.CASES))
    rows = [{"image": {"bytes": crawl.jpeg(i)}, "caption": f"picture {i}"} for i in range(9)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "some.parquet", row_group_size=4)
    for i in range(6):
        path = folder / "classes" / "ab"[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(crawl.jpeg(70 + i))
    (folder / "classes" / "a" / "notes.txt").write_text("not an image")
    (folder / "list.jsonl").write_text("".join(
        json.dumps({"image": f"classes/{'ab'[i % 2]}/{i}.jpg", "caption": f"picture {i}"}) + "\n" for i in range(6)))
    (folder / "coco.json").write_text(json.dumps([
        {"image": f"classes/{'ab'[i % 2]}/{i}.jpg", "caption": f"picture {i}"} for i in range(6)]))
    questions = [{"question_id": i, "image_id": i, "question": f"what is {i}?"} for i in range(6)]
    (folder / "OpenEnded_questions.json").write_text(json.dumps({"questions": questions}))
    (folder / "annotations.json").write_text(json.dumps({"annotations": [
        {"question_id": i, "answers": [{"answer": f"a {i}"}]} for i in range(5)]}))
    two = [f"{'ab'[i % 2]}/{i}.jpg" for i in range(6)]
    (folder / "nlvr.json").write_text(json.dumps([
        {"sentence": f"{i} is left", "label": str(i < 3), "images": [two[i], two[5 - i]]} for i in range(6)]))
    (folder / "crepe.json").write_text(json.dumps({str(i): {
        "filename": two[i], "caption": f"picture {i}", "negative_caption": f"picture {i + 1}"} for i in range(6)}))
    (folder / "examples.jsonl").write_text("".join(json.dumps({
        "image_0": two[i], "image_1": two[i + 1], "caption_0": f"a {i}", "caption_1": f"b {i}"}) + "\n"
        for i in range(5)))
    for i in range(6):
        (folder / "numbers").mkdir(exist_ok=True)
        (folder / "numbers" / f"{i:012d}.jpg").write_bytes(crawl.jpeg(80 + i))
    import_source(open_source(f"captions:{folder}/list.jsonl"), folder / "imported", shard_records=4)
    return folder


def upload(local, target):
    """Copy the folder into a bucket."""
    for path in local.rglob("*"):
        if path.is_file():
            (user_path(target) / path.relative_to(local).as_posix()).upload(path)


SOURCES = ["tars:{}/*.tar", "tars:{}/{{00000..00001}}.tar", "tars:{}", "parquet:{}/some.parquet", "folder:{}/classes",
           "captions:{}/list.jsonl", "coco:{}/coco.json", "tfds:{}/imported:train",
           "captions:{}/list.jsonl@{}", "vqa:{}/OpenEnded_questions.json@{}/numbers", "nlvr:{}/nlvr.json@{}/classes",
           "sugarcrepe:{}/crepe.json@{}/classes", "winoground:{}/examples.jsonl@classes",
           "tfds:{}/imported:train[1:3]+train[:50%]", "2*captions:{}/list.jsonl + tfds:{}/imported:train"]


def records(source):
    """All records, or what is wrong with them."""
    result = []
    for index in range(len(source)):
        try:
            result.append(source[index])
        except Exception as error:
            result.append(str(error))
    return result


@pytest.mark.parametrize("scheme", ["gcs", "s3"])
def test_every_kind_is_what_it_is_in_a_folder(local, request, scheme, bucket_cache):
    target = request.getfixturevalue(scheme)
    upload(local, target)
    for form in SOURCES:
        near, far = (open_source(form.replace("{}", str(place)).replace("{{", "{").replace("}}", "}"))
                     for place in (local, target))
        assert [len(far), far.classes, far.image_id_scope is None] == [
            len(near), near.classes, near.image_id_scope is None], form
        assert far.fingerprint == near.fingerprint and records(far) == records(near), form
        assert [far.texts(i) for i in range(len(far))] == [near.texts(i) for i in range(len(near))], form


def test_batches_are_the_same_and_bytes_are_read_once(local, gcs, gcs_proxy, bucket_cache):
    """Two epochs, in threads and in worker processes."""
    upload(local, gcs)
    gcs_proxy.requests.clear()
    config = DataConfig(train="", batch_size=7, max_bad=1.0, image=ImageConfig(size=12), workers=0)
    near, far = (open_source(f"tars:{place}/*.tar") for place in (local, gcs))
    batches = [train_batches(source, config, seed=3) for source in (near, far)]
    for _ in range(10):
        one, other = map(next, batches)
        assert all((one[name] == other[name]).all() for name in one)
    for iterator in batches:
        iterator.close()
    for name in ("00000.tar", "00001.tar"):
        ranges = fetched(gcs_proxy, name)
        assert sum(stop - start for start, stop in ranges) <= (local / name).stat().st_size
    assert sum("00000.tar" in path for _, path, _ in gcs_proxy.requests) < 6


def test_only_shards_of_the_split_are_copied(local, gcs, gcs_proxy, bucket_cache):
    """What was copied before stays, and is not copied again."""
    upload(local / "imported", f"{gcs}/imported")

    def copied():
        return [number for number in (0, 1) if any(
            f"{number:05d}-of-00002" in path and "alt=media" in path for _, path, _ in gcs_proxy.requests)]

    for split, first, count, numbers in (("train[:4]", 0, 4, [0]), ("train[4:]", 4, 2, [1]), ("train", 0, 6, [])):
        gcs_proxy.requests.clear()
        source = open_source(f"tfds:{gcs}/imported:{split}")
        assert len(source) == count and source[0]["texts"] == (f"picture {first}",) and copied() == numbers
    with pytest.raises(DataError, match="cannot open split 'test'"):
        open_source(f"tfds:{gcs}/imported:test")


def test_a_data_set_larger_than_the_cache(local, gcs, s3, bucket_cache, monkeypatch):
    """ArrayRecord's own reader reads `gs://` in ranges; from `s3://` it is refused in words."""
    monkeypatch.setenv("JAXMM_BUCKET_CACHE", "1e-6")
    for target in (gcs, s3):
        upload(local / "imported", f"{target}/imported")
    assert records(open_source(f"tfds:{gcs}/imported:train")) == records(open_source(f"tfds:{local}/imported:train"))
    with pytest.raises(DataError, match="more than the local cache"):
        open_source(f"tfds:{s3}/imported:train")


def test_a_web_dataset(tmp_path, gcs, s3, bucket_cache):
    shards = [[("cls", b"2"), ("cls", b"0")], [("cls", b"1")]]
    local = web_dataset(tmp_path / "set", shards, split="train")
    near = open_source(f"wds:{local}:train")
    for target in (gcs, s3):
        upload(local, f"{target}/set")
        far = open_source(f"wds:{target}/set:train")
        assert [far.classes, far.templates, records(far)] == [near.classes, near.templates, records(near)]
        with pytest.raises(DataError, match=f"no {target}/set/test/nshards.txt; expected one of the splits train"):
            open_source(f"wds:{target}/set")
    (user_path(gcs) / "set" / "train" / "1.tar").unlink()
    with pytest.raises(DataError, match=r"1.tar is missing; .*nshards.txt says 2 shards"):
        open_source(f"wds:{gcs}/set:train")


def test_what_was_uploaded_since_is_there(local, gcs, bucket_cache):
    with pytest.raises(DataError, match="no object matches"):
        open_source(f"tars:{gcs}")
    upload(local, gcs)
    assert len(open_source(f"tars:{gcs}"))


def test_an_import_into_a_bucket(local, gcs, tmp_path, monkeypatch):
    """It is what it is in a folder, also after it was interrupted."""
    source = open_source(f"tars:{local}/*.tar")
    import_source(source, tmp_path / "set")
    dest = user_path(gcs) / "set"
    plain, calls = type(dest).upload, []

    def upload_some(self, file):
        calls.append(self)
        if len(calls) == 3:
            raise OSError("interrupted")
        plain(self, file)

    monkeypatch.setattr(type(dest), "upload", upload_some)
    with pytest.raises(OSError, match="interrupted"):
        import_source(source, dest)
    assert not import_source(source, dest).complete_before
    assert {path.relative_to(dest).as_posix(): path.read_bytes() for path in dest.files()} == {
        path.relative_to(tmp_path / "set").as_posix(): path.read_bytes() for path in (tmp_path / "set").rglob("*")
        if path.is_file()}
    assert import_source(source, dest).complete_before
    assert not (dest.parent / "set.part").exists()


def test_the_lock_of_an_import_stays_to_the_end(local, gcs, monkeypatch):
    """An owner whose lock is removed ends its process."""
    held, plain = [], folder_locks._Lease.__exit__

    def leave(self, *error):
        held.append(self._path.exists())
        plain(self, *error)

    monkeypatch.setattr(folder_locks._Lease, "__exit__", leave)
    import_source(open_source(f"captions:{local}/list.jsonl"), f"{gcs}/set")
    assert held == [True] and not user_path(f"{gcs}/set.part").exists()


@pytest.mark.parametrize("spec, message", [
    ("tars:{}/none-*.tar", "no object matches"), ("folder:{}/none", "no folder"),
    ("captions:{}/none.jsonl", "there is no such object"), ("vqa:{}/x.json", "there is no such object"),
    ("tars:https://host/a.tar", r"no local path or in a bucket \(gs://, s3://\)")])
def test_what_is_not_there(spec, message, gcs):
    with pytest.raises(DataError, match=message):
        open_source(spec.replace("{}", gcs))
