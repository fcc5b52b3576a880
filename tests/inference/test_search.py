"""The index against brute force; interrupted, damaged and larger than what is compared at a time."""

import json
import warnings

import numpy as np
import pytest

from jaxmm.inference import search
from jaxmm.inference.search import SearchError, build_index, open_index

SIZE = 6


def vector(path):
    """An embedding that depends on the path only."""
    rng = np.random.default_rng([ord(c) for c in path])
    row = rng.normal(size=SIZE)
    return (row / np.linalg.norm(row)).astype(np.float32)


def encode(paths, on_error):
    rows = []
    for path in paths:
        if "bad" in path:
            on_error(path, ValueError(f"{path} is broken"))
        else:
            rows.append(vector(path))
    return np.array(rows, np.float32).reshape(-1, SIZE)


def names(count):
    return [f"/p/{i}{'bad' if i % 7 == 3 else ''}.png" for i in range(count)]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(search, "CHUNK", 10)
    monkeypatch.setattr(search, "ROWS", 16)


@pytest.mark.parametrize("top", [1, 5, 1000])
def test_search_is_brute_force(tmp_path, top):
    bad = []
    paths = names(95)
    kept = build_index(encode, "some/model", paths, tmp_path / "index", on_error=lambda path, _: bad.append(path))
    good = [path for path in paths if "bad" not in path]
    assert kept == len(good) and bad == [path for path in paths if "bad" in path]
    index = open_index(tmp_path / "index")
    assert index.model == "some/model" and index.paths == good
    query = vector("query")
    scores = np.array([vector(path) for path in good]) @ query
    want = [(good[i], scores[i]) for i in np.argsort(-scores)[:top]]
    found = index.search(query, top)
    assert [picture.path for picture in found] == [path for path, _ in want]
    np.testing.assert_allclose([picture.score for picture in found], [score for _, score in want], atol=1e-6)
    lines = [json.loads(line) for line in (tmp_path / "index" / "pictures.jsonl").open()]
    assert sum("error" in line for line in lines) == len(bad) and "is broken" in lines[3]["error"]


def test_opening_leaves_no_list_open(tmp_path):
    build_index(encode, "m", names(9), tmp_path / "index", on_error=lambda *_: None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ResourceWarning)
        open_index(tmp_path / "index")
    assert not [warning for warning in caught if str(tmp_path) in str(warning.message)]


@pytest.mark.parametrize("after", [1, 4])
@pytest.mark.parametrize("torn", [False, True])
def test_an_interrupted_index_goes_on(tmp_path, after, torn):
    calls = []

    def interrupted(paths, on_error):
        calls.append(len(paths))
        if len(calls) > after:
            raise KeyboardInterrupt
        return encode(paths, on_error)

    def ignore(path, error):
        pass

    paths = names(48)
    with pytest.raises(KeyboardInterrupt):
        build_index(interrupted, "m", paths, tmp_path / "index", on_error=ignore)
    assert not (tmp_path / "index").exists()
    if torn:      # killed between writing rows and writing what they are
        with (tmp_path / "index.part" / "embeddings.f32").open("ab") as file:
            file.write(b"half a row")
        with (tmp_path / "index.part" / "pictures.jsonl").open("a") as file:
            file.write('{"path": "/p/')
    done = []
    build_index(encode, "m", paths, tmp_path / "index", on_error=ignore, on_chunk=done.append)
    assert done == [10 * after] + [10] * (4 - after) + [8]
    build_index(encode, "m", paths, tmp_path / "whole", on_error=ignore)
    for name in ("embeddings.f32", "pictures.jsonl", "index.json"):
        assert (tmp_path / "index" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_another_list_of_pictures_starts_anew(tmp_path):
    def interrupted(paths, on_error):
        if paths[0] != "/p/0.png":
            raise KeyboardInterrupt
        return encode(paths, on_error)

    for model in ("m", "other"):
        with pytest.raises(KeyboardInterrupt):
            build_index(interrupted, model, names(30), tmp_path / "index", on_error=lambda *_: None)
    done = []
    build_index(encode, "m", names(31), tmp_path / "index", on_error=lambda *_: None, on_chunk=done.append)
    assert done[0] == 0 and open_index(tmp_path / "index").paths == [p for p in names(31) if "bad" not in p]


def test_what_is_no_index(tmp_path):
    for paths, message in (([], "no images"), (["/p/bad.png"], "none of the 1 images can be read")):
        with pytest.raises(SearchError, match=message):
            build_index(encode, "m", paths, tmp_path / "index", on_error=lambda *_: None)
    build_index(encode, "m", names(12), tmp_path / "index", on_error=lambda *_: None)
    with pytest.raises(SearchError, match="exists"):
        build_index(encode, "m", names(12), tmp_path / "index", on_error=lambda *_: None)
    (tmp_path / "index" / "embeddings.f32").write_bytes(b"\0" * 20)
    for folder in (tmp_path / "index", tmp_path / "none", tmp_path):
        with pytest.raises(SearchError, match="is no index"):
            open_index(folder)
