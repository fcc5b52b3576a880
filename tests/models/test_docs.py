"""docs/models.md: its code runs, and what it says of the layers is so."""

import re
from pathlib import Path

import numpy as np
from PIL import Image

import jaxmm
from jaxmm.models.blip import BLIP, BLIPOutput
from jaxmm.models.clip import CLIP, CLIPOutput, TextOutput
from jaxmm.models.igpt import IGPTOutput
from jaxmm.models.vit import ViTOutput
from tests.pretrained import tiny

PAGE = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")


def test_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jaxmm, "load", lambda source: tiny.clip(), raising=False)
    Image.fromarray(tiny.pictures(1)[0]).save("cat.jpg")
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(block, names)
    model, out = names["model"], names["out"]
    np.testing.assert_allclose(names["logits"], model.similarity("cat.jpg", "a sleeping cat"), atol=1e-4)
    assert out.image_attention.shape == (3, 1, 3, 10, 10) and out.text_attention.shape == (3, 1, 2, 9, 9)
    assert np.abs(names["gradients"]["vision"]["positions"]).max() > 0
    np.testing.assert_allclose(names["after"], names["vision"].hidden[1], atol=1e-5)
    assert names["units"].shape == (1, 10, 40)
    captured = model.module.apply({"params": model.params}, names["images"], names["tokens"], train=False,
                                  capture_intermediates=True)[1]["intermediates"]
    assert set(captured["vision"]["encoder"]) == {"__call__"}


def test_names():
    """Every field and method in the tables is there, and every field is in them."""
    page = PAGE.replace("`CLIP.text`", "`TextTower`")
    rows = dict(re.findall(r"\n\| `(\w+)`(?:: `\w+`)? \| `[^|]*` \| (.*) \|", page))
    for module, output in (("ViT", ViTOutput), ("AttentionConv", ViTOutput), ("CLIP", CLIPOutput),
                           ("TextTower", TextOutput), ("BLIP", BLIPOutput), ("IGPT", IGPTOutput)):
        assert tuple(re.findall(r"`(\w+)`", rows[module])) == output._fields
    methods = re.findall(r"`(CLIP|BLIP)\.(\w+)`", PAGE[PAGE.index("| method"):])
    assert len(methods) > 8 and all(hasattr({"CLIP": CLIP, "BLIP": BLIP}[module], name) for module, name in methods)
