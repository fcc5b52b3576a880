import importlib.util
import tomllib
from pathlib import Path

import pytest

from jaxmm import optional


def test_a_missing_package_names_its_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not optional.has_extra("captions")
    with pytest.raises(optional.MissingExtra, match=r"the metric CIDEr needs pycocoevalcap; .* pip install "
                                                    r"'jaxmm\[captions\]'"):
        optional.require_extra("captions", "the metric CIDEr")


def test_what_is_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert optional.has_extra("train")
    optional.require_extra("train", "training")


def test_every_extra_is_declared():
    declared = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"][
        "optional-dependencies"]
    packages = {name: {part.split(">")[0].split("=")[0] for part in parts} for name, parts in declared.items()}
    renamed = {"sklearn": "scikit-learn", "libtpu": "jax[tpu]", "prometheus_client": "prometheus-client",
               "python_multipart": "python-multipart"}
    for extra, modules in optional.EXTRAS.items():
        assert {renamed.get(module, module) for module in modules} == packages[extra]
