"""Models, images and an index of `search` in a bucket."""

import numpy as np
import pytest

import jaxmm
from jaxmm.inference.search import SETTINGS, SearchError, build_index, open_index
from jaxmm.paths import user_path
from jaxmm.pretrained.io.files import FileError
from tests.pretrained import tiny


def test_an_index_whose_upload_was_interrupted(gcs, bucket_cache, monkeypatch):
    """The same call goes on; a folder with anything else stays as it is."""
    folder, plain = user_path(gcs) / "index", type(user_path(gcs)).upload

    def upload(self, file):
        if self.name == SETTINGS:
            raise OSError("interrupted")
        plain(self, file)

    def build():
        return build_index(lambda chunk, on_error: np.eye(len(chunk), 3, dtype=np.float32), "model", ["a", "b"], folder,
                           on_error=lambda path, error: None)

    with monkeypatch.context() as patch:
        patch.setattr(type(folder), "upload", upload)
        with pytest.raises(OSError, match="interrupted"):
            build()
    with pytest.raises(SearchError):
        open_index(folder)
    assert build() == 2 and len(open_index(folder).paths) == 2
    with pytest.raises(SearchError, match="exists; expected a new folder"):
        build()


def test_two_processes_do_not_build_the_same_index(gcs, bucket_cache):
    def build(encode):
        return build_index(encode, "model", ["a", "b"], f"{gcs}/index", on_error=lambda path, error: None)

    def encode(chunk, on_error):
        with pytest.raises(SearchError, match=f"another process is building {gcs}/index"):
            build(lambda *_: np.zeros((2, 3), np.float32))
        return np.eye(len(chunk), 3, dtype=np.float32)

    assert build(encode) == 2
    np.testing.assert_array_equal(open_index(f"{gcs}/index").embeddings, np.eye(2, 3))


def test_an_export_whose_upload_was_interrupted(gcs, bucket_cache, monkeypatch, tmp_path):
    """It is replaced, with files that only the other format has."""
    model, folder = tiny.clip(), user_path(gcs) / "model"
    plain = type(folder).upload

    def upload(self, file):
        if self.suffix == ".safetensors":
            raise OSError("interrupted")
        plain(self, file)

    with monkeypatch.context() as patch:
        patch.setattr(type(folder), "upload", upload)
        with pytest.raises(OSError, match="interrupted"):
            model.save(folder, format="open_clip")
    assert (folder / "open_clip_config.json").exists()
    model.save(folder)
    model.save(tmp_path / "model")
    assert {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.files()} == {
        path.relative_to(tmp_path / "model").as_posix(): path.read_bytes() for path in (tmp_path / "model").rglob("*")
        if path.is_file()}
    with pytest.raises(FileError, match=f"{folder} exists"):
        model.save(folder)


@pytest.mark.parametrize("scheme", ["gcs", "s3"])
def test_models_images_and_an_index(scheme, request, tmp_path, bucket_cache):
    folder = request.getfixturevalue(scheme)
    model = tiny.clip()
    model.save(f"{folder}/model")
    with pytest.raises(FileError, match=f"{folder}/model exists; expected a new folder"):
        model.save(f"{folder}/model")
    files = tiny.picture_files(tmp_path / "images", 5)
    for file in files:
        user_path(f"{folder}/images/{file.rpartition('/')[2]}").upload(file)
    loaded = jaxmm.load(f"{folder}/model")
    paths = [str(path) for path in user_path(f"{folder}/images").files()]
    embeddings = loaded.encode_image(paths)
    np.testing.assert_array_equal(embeddings, model.encode_image(files))
    build_index(lambda chunk, on_error: loaded.encode_image(chunk), f"{folder}/model", paths, f"{folder}/index",
                on_error=lambda path, error: None)
    index = open_index(f"{folder}/index")
    assert index.model == f"{folder}/model" and index.paths == paths
    assert index.search(embeddings[3], 1)[0].path == paths[3]
