"""The home folder and addresses, in every path that a user gives."""

import os

import pytest

from jaxmm.capfilt.stages import begin
from jaxmm.config import TokenizerConfig
from jaxmm.data import Source
from jaxmm.data.tokenizers import make_tokenizer
from jaxmm.data.tools.importing import import_source
from jaxmm.inference.model import load
from jaxmm.inference.search import build_index, open_index
from jaxmm.paths import is_address, is_bucket, user_path
from jaxmm.recipes import find_recipe, load_recipe
from jaxmm.training.loop import train
from jaxmm.validation import ConfigError
from tests.pretrained import tiny

ADDRESSES = ["http://b", "https://host/x?y=1", "HF://a/b", "file:///tmp/x", "az+blob://c/d"]


@pytest.mark.parametrize("address", ADDRESSES)
def test_addresses(address):
    assert is_address(address)
    with pytest.raises(ConfigError, match=r"workdir is .*; expected a local path, or one in a bucket"):
        user_path(address, "workdir")


@pytest.mark.parametrize("bucket", ["gs://bucket/run", "s3://b"])
def test_buckets(bucket):
    assert is_address(bucket) and is_bucket(bucket) and str(user_path(bucket)) == bucket
    with pytest.raises(ConfigError, match="workdir is 'gs:///'; expected the name of a bucket behind it"):
        user_path("gs:///", "workdir")


@pytest.mark.parametrize("path", ["runs/x", "/data/a:b/c", "C:/data", "a:b", "~/x", "gs:", "me@home:x", "1:/a"])
def test_paths(path):
    assert not is_address(path) and str(user_path(path)) == os.path.expanduser(path)


@pytest.mark.parametrize("use", [
    lambda path: train(load_recipe("vit_digits"), path), lambda path: load(path), lambda path: tiny.vit().save(path),
    lambda path: find_recipe(path), lambda path: open_index(path), lambda path: begin(path, "web", None),
    lambda path: build_index(lambda paths, on_error: None, "m", ["x"], path, on_error=lambda path, error: None),
    lambda path: import_source(Source(), path), lambda path: tiny.vit().prepare(path),
    lambda path: make_tokenizer(TokenizerConfig(kind="clip", file=path))])
def test_no_address_becomes_a_folder(use, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="'http://bucket/x'; expected a local path"):
        use("http://bucket/x")
    assert list(tmp_path.iterdir()) == []


def test_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    model = tiny.vit()
    model.save("~/model")
    for path in ("~/model", tmp_path / "model"):
        assert load(path).num_parameters == model.num_parameters
    [file] = tiny.picture_files(tmp_path / "images", 1)
    assert (model.prepare(file) == model.prepare("~/images/" + os.path.basename(file))).all()
