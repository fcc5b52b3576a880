"""Checkpoint formats are records: one more is recognised, read and written without an edit elsewhere."""

import json

import numpy as np
import pytest

from jaxmm.inference.model import load
from jaxmm.pretrained import registry
from jaxmm.pretrained.family import Checkpoint, Export, Family
from jaxmm.pretrained.io.files import FileError, open_tensors
from jaxmm.pretrained.registry import FAMILIES, open_checkpoint, save_checkpoint
from jaxmm.pretrained.table import SAME, TRANSPOSED, Row
from jaxmm.sharding import named_leaves
from tests.pretrained import tiny
from tests.training.common import assert_same_bits


def rows(task):
    """Keys in capitals; the head's kernel transposed."""
    return [Row(path, path.upper(), TRANSPOSED if path == "head/kernel" else SAME)
            for path, _ in named_leaves(tiny.vit().params)]


def read(files, tensors):
    assert "HEAD/KERNEL" in tensors
    return Checkpoint(task=tiny.VIT, rows=rows(tiny.VIT), image=tiny.IMAGE, labels=tiny.LABELS, ignore=("^EXTRA$",),
                      notes=(files.json("capitals.json")["note"],))


def write(task, image, labels, tokenizer):
    return Export(configs={"capitals.json": {"note": f"{len(labels)} labels"}}, rows=rows(task),
                  weights="capitals.safetensors")


CAPITALS = Family(name="capitals", matches=lambda files, tensors: (files.folder / "capitals.json").is_file(),
                  read=read, write=write, architecture=(type(tiny.VIT.model),), resize="linear")


def test_a_format_is_one_record(tmp_path, monkeypatch):
    with pytest.raises(FileError, match=r"format is 'capitals', which has no ViTConfig; expected jaxmm, transformers, "
                                        r"timm$"):
        save(tmp_path / "saved")
    monkeypatch.setattr(registry, "FAMILIES", (*FAMILIES, CAPITALS))
    save(tmp_path / "saved")
    assert json.loads((tmp_path / "saved/capitals.json").read_text()) == {"note": "5 labels"}
    tensors, params = open_tensors(tmp_path / "saved/capitals.safetensors"), tiny.vit().params
    np.testing.assert_array_equal(tensors["HEAD/KERNEL"].read(), np.asarray(params["head"]["kernel"]).T)
    opened = open_checkpoint(tmp_path / "saved")
    assert (opened.family, opened.resize, opened.labels) == ("capitals", "linear", tiny.LABELS)
    model = load(tmp_path / "saved")
    assert model.notes == ("5 labels",)
    assert_same_bits(model.params, params)
    with pytest.raises(FileError, match="capitals', which has no CLIPConfig"):
        save_checkpoint(tmp_path / "clip", format="capitals", task=tiny.CLIP, params=tiny.clip().params,
                        image=tiny.IMAGE)


def save(folder):
    model = tiny.vit()
    save_checkpoint(folder, format="capitals", task=model.task, params=model.params, image=model.preprocessing,
                    labels=model.labels)


def test_the_first_record_that_matches_reads(tmp_path, monkeypatch):
    """A folder of ours with another format's configuration beside it is ours."""
    tiny.vit().save(tmp_path / "saved")
    (tmp_path / "saved/capitals.json").write_text('{"note": "read as capitals"}')
    monkeypatch.setattr(registry, "FAMILIES", (*FAMILIES, CAPITALS))
    assert open_checkpoint(tmp_path / "saved").family == "jaxmm"
    monkeypatch.setattr(registry, "FAMILIES", (CAPITALS, *FAMILIES))
    with pytest.raises(AssertionError):      # its `read` was called
        open_checkpoint(tmp_path / "saved")


def test_position_tables_are_resized_as_the_family_does():
    assert {family.name: family.resize for family in FAMILIES} == {
        "jaxmm": "bicubic-antialias", "open_clip": "bicubic-antialias", "transformers": "bicubic",
        "timm": "bicubic-antialias", "openai": "bicubic-antialias", "salesforce": "bicubic-antialias", "npz": "linear"}
