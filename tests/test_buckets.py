"""Paths in buckets, against real servers: what is read, how often, what is tried again, and what is said."""

import json
import logging
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from jaxmm import bucket_requests, folder_locks, object_cache
from jaxmm.atomic import atomic_file, write_atomically
from jaxmm.cli.caption_files import caption_files, write_captions
from jaxmm.cli.image_files import read_labels
from jaxmm.config import TokenizerConfig
from jaxmm.data.tokenizers import Tokenizer, make_tokenizer
from jaxmm.evals.benchmark import _stamp
from jaxmm.folder_locks import FolderInUse, lock_folder
from jaxmm.paths import local_copy, new_folder, open_data, remove_tree, user_path


@pytest.fixture(params=["gs", "s3"])
def folder(request):
    return user_path(request.getfixturevalue({"gs": "gcs", "s3": "s3"}[request.param]))


@pytest.fixture
def quick(monkeypatch):
    """No waiting between tries."""
    monkeypatch.setattr(bucket_requests.time, "sleep", lambda seconds: None)


def data(size, seed=0):
    return np.random.default_rng(seed).bytes(size)


def test_a_path_in_a_bucket_is_a_path(gcs):
    path = user_path("gs://b/run/config.json")
    assert isinstance(path, Path) and str(path) == "gs://b/run/config.json" and path.name == "config.json"
    assert str(path.parent / "x") == "gs://b/run/x" and path.suffix == ".json" and path.absolute() == path
    assert str(path.relative_to(user_path("gs://b"))) == "run/config.json"
    assert pickle.loads(pickle.dumps(path)) == path and hash(pickle.loads(pickle.dumps(path))) == hash(path)
    assert path.with_name("y.part") == user_path("gs://b/run/y.part")


def test_files_and_folders(folder, tmp_path):
    assert not folder.exists() and not folder.is_dir()
    write_atomically(folder / "a.txt", "one\n")
    with atomic_file(folder / "sub" / "b.bin") as file:
        file.write(b"\0\1\2")
    assert (folder / "a.txt").read_text() == "one\n" and (folder / "sub" / "b.bin").read_bytes() == b"\0\1\2"
    assert folder.is_dir() and (folder / "a.txt").is_file() and not (folder / "a.txt").is_dir()
    assert sorted(path.name for path in folder.iterdir()) == ["a.txt", "sub"]
    assert [path.relative_to(folder).as_posix() for path in folder.files()] == ["a.txt", "sub/b.bin"]
    assert list(folder.glob("*/b.bin")) == [folder / "sub" / "b.bin"] and (folder / "*.txt").matches() == [
        folder / "a.txt"]
    assert (folder / "a.txt").stat().st_size == 4
    before = (folder / "a.txt").version(), (folder / "a.txt").checksum()
    write_atomically(folder / "a.txt", "two\n")
    assert (folder / "a.txt").version() != before[0] and (folder / "a.txt").checksum() != before[1]
    with (folder / "a.txt").open() as file:
        assert file.read() == "two\n"
    with pytest.raises(RuntimeError), atomic_file(folder / "a.txt") as file:
        file.write(b"three")
        raise RuntimeError
    assert (folder / "a.txt").read_text() == "two\n"
    (folder / "sub").rename(folder / "moved")
    assert not (folder / "sub").exists() and (folder / "moved" / "b.bin").read_bytes() == b"\0\1\2"
    with pytest.raises(FileNotFoundError, match=f"{folder}/none"):
        (folder / "none").read_bytes()
    with pytest.raises(FileExistsError):
        (folder / "a.txt").create(b"three")
    (folder / "c").create(b"three")
    remove_tree(folder)
    assert not folder.exists()
    remove_tree(folder, missing_ok=True)


def test_a_new_folder_and_its_local_copy(folder, bucket_cache, tmp_path):
    with new_folder(folder / "model", last="weights") as part:
        (part / "inner").mkdir()
        for name in ("weights", "z", "inner/a"):
            (part / name).write_text(name)
    assert sorted(path.name for path in (folder / "model").files()) == ["a", "weights", "z"]
    local = local_copy(folder / "model")
    assert local.name == "model" and {path.relative_to(local).as_posix(): path.read_text() for path in local.rglob("*")
                                      if path.is_file()} == {name: name for name in ("weights", "z", "inner/a")}
    (folder / "model" / "z").write_text("changed")
    (folder / "model" / "inner" / "a").unlink()
    assert (local_copy(folder / "model") / "z").read_text() == "changed" and not (local / "inner" / "a").exists()
    assert local_copy(folder / "model" / "z").read_text() == "changed"
    assert local_copy(tmp_path) == tmp_path


def test_two_calls_that_make_the_same_folder(folder):
    """No call uses the local files of another."""
    with new_folder(folder / "model", last="weights") as one:
        (one / "weights").write_text("first")
        with new_folder(folder / "model", last="weights") as other:
            assert list(other.iterdir()) == []
            (other / "weights").write_text("second")
        assert (folder / "model" / "weights").read_text() == "second" and not other.exists()
    assert (folder / "model" / "weights").read_text() == "first" and not one.exists()


def test_reads_through_the_cache(gcs, gcs_proxy, bucket_cache):
    """Any reads, from many threads: the bytes are right, and none is fetched twice."""
    path, content = user_path(gcs) / "big", data(3_000_001)
    path.write_bytes(content)
    gcs_proxy.requests.clear()
    rng = np.random.default_rng(1)
    places = [(int(start), int(rng.integers(1, 200_000))) for start in rng.integers(0, len(content), 60)]

    def check(place):
        with open_data(path) as file:
            file.seek(place[0])
            assert file.read(place[1]) == content[place[0]:sum(place)]

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(check, places))
    ranges = fetched(gcs_proxy, "big")
    assert sum(stop - start for start, stop in ranges) == len(set().union(*(range(*part) for part in ranges)))
    with open_data(path) as file:
        assert file.read() == content
    assert set().union(*(range(*part) for part in fetched(gcs_proxy, "big"))) == set(range(len(content)))
    count = len(gcs_proxy.requests)
    with open_data(path) as file:
        assert file.seek(0, 2) == len(content) and file.seek(5) == 5 and file.read(3) == content[5:8]
    assert len(gcs_proxy.requests) == count                              # not even its size is asked for again


def fetched(proxy, name):
    """The ranges of the object's bytes that were read."""
    ranges = [value.removeprefix("bytes=").split("-") for command, path, value in proxy.requests
              if command == "GET" and name in path and value]
    return [(int(start), int(stop) + 1) for start, stop in ranges]


def test_reading_in_order_reads_ahead(gcs, gcs_proxy, bucket_cache):
    path, content = user_path(gcs) / "long", data(6 * 2**20)
    path.write_bytes(content)
    gcs_proxy.requests.clear()
    with open_data(path) as file:
        assert b"".join(iter(lambda: file.read(10_000), b"")) == content
    assert len(fetched(gcs_proxy, "long")) < 12                            # of 96 blocks


def test_the_cache_keeps_to_its_limit(gcs, bucket_cache, monkeypatch):
    """What was used last stays; what is removed while it is read is fetched again."""
    monkeypatch.setenv("JAXMM_BUCKET_CACHE", str(2.5 / 2**10))
    monkeypatch.setattr(object_cache, "CHECK", 2**18)
    contents = {user_path(gcs) / str(n): data(2**20, n) for n in range(5)}
    for path, content in contents.items():
        path.write_bytes(content)
    for path, content in list(contents.items()) + list(contents.items())[:2]:
        with open_data(path) as file:
            assert file.read() == content
        assert object_cache.used() < 2**20 * 2.5 + 2**19


def test_the_files_of_the_cache_are_counted_once(gcs, bucket_cache, monkeypatch):
    """All processes add to one total, which tells how large the cache is without a look at its files."""
    counts, plain = [], object_cache._entries
    monkeypatch.setattr(object_cache, "_entries", lambda: counts.append(1) or plain())
    monkeypatch.setattr(object_cache, "CHECK", 2**18)
    for n in range(3):
        path = user_path(gcs) / str(n)
        path.write_bytes(data(2**20, n))
        with open_data(path) as file:
            file.read()
    copied = local_copy(user_path(gcs) / "2")
    assert len(counts) == 1 and copied.stat().st_size == 2**20
    total = int(bucket_cache.with_name("buckets.size").read_text())
    assert abs(total - 4 * 2**20) <= 2 * 2**18 and abs(object_cache.used() - total) <= 2 * 2**18
    monkeypatch.setenv("JAXMM_BUCKET_CACHE", str(2 / 2**10))
    assert object_cache.limit() == 2 * 2**20 and object_cache.used() <= 0.9 * 2 * 2**20


@pytest.mark.parametrize("kind, count", [("status", 2), ("reset", 4), ("stall", 1)])
def test_what_may_pass_is_tried_again_and_named(gcs, gcs_proxy, bucket_cache, kind, count, caplog, monkeypatch):
    """The HTTP client itself repeats the first request on a connection that was reset, and says nothing."""
    path, content = user_path(gcs) / "object", data(300_000)
    path.write_bytes(content)
    monkeypatch.setattr(gcs_proxy, "plan", [kind] * count)
    with caplog.at_level(logging.WARNING), open_data(path) as file:
        assert file.read() == content
    assert gcs_proxy.plan == []
    assert count == 1 or ("object" in caplog.text and "trying again" in caplog.text)


@pytest.mark.parametrize("scheme", ["gcs", "s3"])
def test_late_writes_replace_nothing_newer(scheme, request, quick, tmp_path):
    """A request that seemed lost comes when the object has been written again: of a new object, and of an old one."""
    folder, proxy = user_path(request.getfixturevalue(scheme)), request.getfixturevalue(f"{scheme}_proxy")
    (folder / "old").write_bytes(b"zero")
    (tmp_path / "first").write_bytes(b"first")
    proxy.writes += ["late"]
    (folder / "new").upload(tmp_path / "first")
    proxy.writes += ["late"]
    (folder / "old").write_bytes(b"first")
    for name in ("new", "old"):
        assert (folder / name).read_bytes() == b"first"
        (folder / name).write_bytes(b"second")
    assert proxy.deliver() == [412, 412]
    assert (folder / "new").read_bytes() == (folder / "old").read_bytes() == b"second"


@pytest.mark.parametrize("scheme", ["gcs", "s3"])
def test_writes_whose_answer_is_lost(scheme, request, quick, monkeypatch):
    """The repeated request is refused, because the first one was done. What another process has written is replaced."""
    path, proxy = user_path(request.getfixturevalue(scheme)) / "object", request.getfixturevalue(f"{scheme}_proxy")
    for write, content in ((path.create, b"first"), (path.write_bytes, b"second")):
        proxy.writes += ["lost"]
        write(content)
        assert path.read_bytes() == content and not proxy.writes
    before, plain = [path._object()], type(path)._object
    path.write_bytes(b"another's")
    monkeypatch.setattr(type(path), "_object", lambda self: before.pop() if before else plain(self))
    path.write_bytes(b"third")
    assert path.read_bytes() == b"third" and not before


def test_what_does_not_pass_ends_with_the_name(gcs, gcs_proxy, quick, monkeypatch):
    path = user_path(gcs) / "object"
    path.write_bytes(b"x")
    monkeypatch.setattr(bucket_requests, "TRIES", 2)
    for status, message in ((401, "access denied"), (403, "access denied"), (400, "")):
        monkeypatch.setattr(gcs_proxy, "always", status)
        with pytest.raises(OSError, match=f"{path}.*{message}"):
            path.read_bytes()


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
    with pytest.raises(ImportError, match=r"a path in a bucket needs gcsfs, s3fs; install the extra: pip install "
                                          r"'jaxmm\[buckets\]'"):
        user_path("gs://b/x")


def test_locks(folder, monkeypatch):
    """One owner at a time; one that has gone, or does nothing for a while, is replaced, and ends if it comes back."""
    with monkeypatch.context() as patch:
        patch.setattr(folder_locks, "RENEWAL", 0.1)
        with lock_folder(folder), pytest.raises(FolderInUse, match="another process has locked"), lock_folder(folder):
            raise AssertionError
    with lock_folder(folder):
        pass
    monkeypatch.setattr(folder_locks, "LEASE", 0.3)
    monkeypatch.setattr(folder_locks, "RENEWAL", 0.1)
    (folder / ".lock" / "7").write_text(json.dumps({"machine": "another", "process": 1, "count": 3}))
    with lock_folder(folder):
        assert [path.name for path in (folder / ".lock").iterdir()] == ["8"]
        ended = threading.Event()
        monkeypatch.setattr(folder_locks.os, "_exit", lambda status: ended.set() if status == 75 else None)
        (folder / ".lock" / "9").write_text("{}")
        assert ended.wait(60)
        (folder / ".lock" / "9").unlink()
    gone = json.dumps({"machine": folder_locks.machine(), "process": 2**22 + 1, "count": 3})
    (folder / ".lock" / "9").write_text(gone)
    monkeypatch.setattr(folder_locks, "LEASE", 1e9)
    with lock_folder(folder):
        pass


@pytest.mark.parametrize("change", ["another container", "an owner between two listings", "the same number"])
def test_a_lock_that_only_looks_free(gcs, monkeypatch, change):
    """A live owner keeps its folder from one whose process has the same number, and from one with an old listing."""
    folder = user_path(gcs)
    monkeypatch.setattr(folder_locks, "RENEWAL", 0.05)
    if change == "an owner between two listings":
        plain, calls = folder_locks._Lease._numbers, []

        def numbers(self):
            calls.append(self)
            return [5] if len(calls) == 1 else plain(self)

        monkeypatch.setattr(folder_locks._Lease, "_numbers", numbers)
        monkeypatch.setattr(folder_locks._Lease, "_is_expired", lambda self, path: True)
        (folder / ".lock" / "1").write_text("the live owner's")
    elif change == "the same number":
        monkeypatch.setattr(folder_locks._Lease, "_numbers", lambda self: [])
        (folder / ".lock" / "1").write_bytes(folder_locks._Lease(folder)._note(0))
    else:
        (folder / ".lock" / "1").write_text(json.dumps({
            "machine": f"{folder_locks.machine()}1", "host": folder_locks.socket.gethostname(),
            "process": 2**22 + 1, "count": 0}))
        plain_read, reads = type(folder).read_bytes, []

        def read(self):
            reads.append(self)
            return plain_read(self) + b" " * len(reads)                     # it is renewed

        monkeypatch.setattr(type(folder), "read_bytes", read)
    with pytest.raises(FolderInUse), lock_folder(folder):
        raise AssertionError
    assert (folder / ".lock" / "1").exists() and not (folder / ".lock" / "6").exists()


def test_a_cache_that_was_cut_short(gcs, bucket_cache):
    """What a process that was killed has removed of the cache is not taken for what the bucket has."""
    path, content = user_path(gcs) / "object", data(2**17)
    path.write_bytes(content)
    with open_data(path) as file:
        assert file.read() == content
    [entry] = bucket_cache.iterdir()
    for part in [entry] if entry.is_file() else entry.iterdir():            # any one of its files is gone
        if part.name != "blocks":
            part.unlink()
    object_cache._opened.clear()                                            # another process opens it
    with open_data(path) as file:
        assert file.read() == content


def test_copies_in_use_stay(gcs, bucket_cache, monkeypatch):
    """The files that a process reads are not removed to make room for others; those of a process that ended are."""
    monkeypatch.setenv("JAXMM_BUCKET_CACHE", str(1.5 / 2**10))
    for name in "ab":
        (user_path(gcs) / name / "file").write_bytes(data(2**20))
    first = local_copy(user_path(gcs) / "a")
    second = local_copy(user_path(gcs) / "b")
    assert (first / "file").exists() and (second / "file").exists()
    object_cache.os.close(object_cache._kept.pop(first.parent))             # as at the end of a process
    object_cache._make_room()
    assert not first.exists() and (second / "file").exists()


def test_a_model_that_is_written_again_is_evaluated_again(folder):
    (folder / "model" / "config.json").write_text("{}")
    (folder / "model" / "model.safetensors").write_bytes(b"one")
    before = _stamp(str(folder / "model"))
    assert [name for name, *_ in before] == ["config.json", "model.safetensors"]
    (folder / "model" / "model.safetensors").write_bytes(b"three")
    assert _stamp(str(folder / "model")) != before


def test_arguments_in_buckets(folder, tmp_path):
    """Files of labels are read; captions are put beside the image, or name it as it is."""
    (folder / "labels.txt").write_text("a cat, asleep\n\na dog\n")
    assert read_labels(f"{folder}/labels.txt") == ["a cat, asleep", "a dog"]
    image = f"{folder}/images/1.jpg"
    files = caption_files([image], "txt", None, False)
    assert files == {image: folder / "images" / "1.txt"}
    write_captions([(image, [("a cat", 1.0)])], "txt", files)
    assert (folder / "images" / "1.txt").read_text() == "a cat\n"
    for file, name in ((tmp_path / "all.jsonl", image), (folder / "all.jsonl", "images/1.jpg")):
        write_captions([(image, [("a cat", 1.0)])], "jsonl", {image: file})
        assert json.loads(file.read_text())["image"] == name


def test_a_tokenizer_is_saved_into_a_bucket(folder, bucket_cache):
    tokenizer = make_tokenizer(TokenizerConfig(kind="train-bpe", vocab_size=300), ["a cat", "a dog"])
    tokenizer.save(str(folder / "tokenizer"))
    assert Tokenizer.load(folder / "tokenizer")(["a dog"]).tolist() == tokenizer(["a dog"]).tolist()
