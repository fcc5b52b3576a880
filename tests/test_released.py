"""What earlier versions saved is opened by this one, with the numbers that it had then (see `data/released`)."""

import importlib.metadata
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from jaxmm.inference.model import load
from tests.data.released import write_release as release

RELEASED = Path(release.__file__).parent
VERSIONS = sorted(path.parent.name for path in RELEASED.glob("*/expected.json"))
CLOSE = {"rtol": 1e-3, "atol": 2e-4}
"""Tolerance of what other processors and versions of JAX compute."""


def test_this_version_is_among_them():
    """A version with a new number writes its folder with `write_release`; all of them stay small."""
    assert ".".join(importlib.metadata.version("jaxmm").split(".")[:2]) in VERSIONS
    assert sum(path.stat().st_size for path in RELEASED.rglob("*")) < 2**20


@pytest.fixture(params=VERSIONS)
def released(request, tmp_path, monkeypatch):
    """A copy of a version's folder, which is the working folder, and its numbers."""
    shutil.copytree(RELEASED / request.param, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return json.loads(Path("expected.json").read_text())


def assert_opened(model, expected, compute=True):
    contents = release.contents(model)
    assert contents == {name: expected[name] for name in contents}
    for name, values in release.numbers(model).items() if compute else ():
        np.testing.assert_allclose(values, expected[name], err_msg=name, **CLOSE)


def test_a_run_goes_on(released):
    assert_opened(load("vit_run"), released["vit_run"], compute=False)
    np.testing.assert_allclose(release.continued(Path("vit_run")), released["continued"], **CLOSE)


@pytest.mark.parametrize("name", release.FORMATS)
def test_models_of_every_format_are_loaded(released, name):
    """All formats have the same parameters, labels and token ids, bit for bit; one computes its numbers."""
    saved = sorted(Path("models").glob(f"{name}.*"))
    assert {path.suffix[1:] for path in saved} == set(release.FORMATS[name])
    for path in saved:
        assert_opened(load(path), released[name], compute=path.name == "vit.jaxmm")


@pytest.mark.long
@pytest.mark.parametrize("name", ["vit_run", "clip_run", "models/clip.jaxmm", "models/captioner.jaxmm",
                                  "models/filter.jaxmm"])
def test_numbers_of_the_other_models(released, name):
    assert_opened(load(name), released[Path(name).stem])


def test_indices_data_sets_and_capfilt_folders_are_opened(released):
    paths, scores = zip(*released["index"], strict=True)
    now = release.index_numbers(Path("index"))
    assert [path for path, _ in now] == list(paths)
    np.testing.assert_allclose([score for _, score in now], scores, **CLOSE)
    assert release.data_set_records(Path("capfilt/merged")) == released["data_set"]
    folder, written = release.bootstrap(Path("capfilt"))
    assert written == (0, 0, 0)                                     # nothing is made again
    numbers = release.capfilt_numbers(folder)
    assert numbers == released["capfilt"] and 0 < sum(numbers["kept"]) < len(numbers["kept"])
