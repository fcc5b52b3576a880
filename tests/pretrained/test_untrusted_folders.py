"""Checkpoints of strangers: no code beside the weights is run, and any change of a configuration is read or refused."""

import importlib
import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmm.inference.model import load
from jaxmm.pretrained.io.files import FileError
from jaxmm.pretrained.registry import open_checkpoint
from jaxmm.validation import ConfigError
from tests.pretrained import tiny
from tests.properties import EXAMPLES, JSON, places, replaced
from tests.training.common import assert_same_bits

MODULES = ("configuration_own", "modeling_own", "tokenization_own", "image_processing_own", "__init__", "setup")
CONFIGS = {"jaxmm": "jaxmm.json", "transformers": "config.json", "open_clip": "open_clip_config.json"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A CLIP in all formats."""
    folder = tmp_path_factory.mktemp("saved")
    for format in CONFIGS:
        tiny.clip().save(folder / format, format=format)
    return folder


def test_remote_code_is_never_followed(saved, tmp_path, monkeypatch):
    """Every configuration asks for a module of the folder, which is importable, as in a notebook beside it."""
    folder, mark = tmp_path / "model", tmp_path / "mark"
    shutil.copytree(saved / "transformers", folder)
    for name in MODULES:
        (folder / f"{name}.py").write_text(f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n")
    own = {"auto_map": {"AutoConfig": "configuration_own.Own", "AutoModel": "modeling_own.Own",
                        "AutoTokenizer": ["tokenization_own.Own", None],
                        "AutoImageProcessor": "some/repository--image_processing_own.Own"},
           "custom_pipelines": {"own": {"impl": "modeling_own.Own"}}, "trust_remote_code": True}
    for path in folder.glob("*.json"):
        if "config" in path.name:
            path.write_text(json.dumps(json.loads(path.read_text()) | own))
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    assert_same_bits(load(folder).params, tiny.clip().params)
    config = json.loads(Path("config.json").read_text())
    for kind in ("own", "configuration_own.Own"):
        Path("config.json").write_text(json.dumps(config | {"model_type": kind, "architectures": ["modeling_own.Own"]}))
        with pytest.raises(FileError, match=kind):
            load(folder)
    towers = {"vision_cfg": {}, "text_cfg": {"hf_model_name": "own/code"}}
    for name, other, words in (
            ("jaxmm.json", {"task": {"type": "modeling_own.Own"}, "image": None, "labels": None}, "is not imported"),
            ("open_clip_config.json", own | {"model_cfg": towers}, "hf_model_name")):
        Path(name).write_text(json.dumps(other))
        with pytest.raises(FileError, match=words):
            load(folder)
        Path(name).unlink()
    assert not mark.exists()
    importlib.import_module("modeling_own")
    assert mark.exists()


@pytest.mark.parametrize("format", CONFIGS)
@pytest.mark.parametrize("count", [6, pytest.param(400, marks=pytest.mark.long)])
def test_any_change_of_a_configuration_is_read_or_refused(saved, format, count):
    path = saved / format / CONFIGS[format]
    good = json.loads(path.read_text())
    spots = list(places(good))

    @settings(EXAMPLES, max_examples=count)
    @given(st.sampled_from(spots), JSON | st.sampled_from(["os.system", "jaxmm.config.MeshConfig", "subprocess.Popen"]))
    def changed(spot, value):
        path.write_text(json.dumps(replaced(good, spot, value)))
        try:
            open_checkpoint(saved / format)
        except (FileError, ConfigError) as error:
            assert str(error)

    try:
        changed()
    finally:
        path.write_text(json.dumps(good))
    assert open_checkpoint(saved / format).task == tiny.CLIP
