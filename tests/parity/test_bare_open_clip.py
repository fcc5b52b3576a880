"""Weights of open_clip without a configuration, at random weights: the name of the architecture says what they lack.

The towers have the widths of their names, few layers, small images and a small vocabulary.
"""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxmm import cli
from jaxmm.inference.batching import predictions
from jaxmm.inference.model import load
from jaxmm.pretrained.families.open_clip_names import models
from jaxmm.pretrained.io.files import FileError
from tests.parity.test_published import close

pytestmark = pytest.mark.parity
RNG = np.random.default_rng(0)


def files(state, folder):
    """Return files as open_clip's training, the hub and a compiled model write them."""
    torch.save({"epoch": 3, "name": "run", "state_dict": {f"module.{key}": value for key, value in state.items()},
                "optimizer": {"state": {}, "param_groups": [{"lr": 1e-3}]}}, folder / "epoch_3.pt")
    torch.save(state, folder / "open_clip_pytorch_model.bin")
    torch.save({f"_orig_mod.module.{key}": value for key, value in state.items()}, folder / "compiled.pt")
    return [folder / name for name in ("epoch_3.pt", "open_clip_pytorch_model.bin", "compiled.pt")]


@pytest.mark.parametrize("name, patches, heads", [
    ("ViT-H-14", 3, (16, 16)), ("ViT-B-32", 2, (12, 8)), ("ViT-B-32-quickgelu", 2, (12, 8))])
@torch.no_grad()
def test_it_computes_the_same(name, patches, heads, tmp_path, record_property, capsys):
    open_clip = pytest.importorskip("open_clip", reason="no extra names open_clip")
    config = models()[name]
    vision, text = dict(config["vision_cfg"]), dict(config["text_cfg"])
    side = vision["image_size"] = patches * vision["patch_size"]
    vision["layers"], text["layers"], text["vocab_size"], text["context_length"] = 2, 1, 90, 9
    torch.manual_seed(0)
    theirs = open_clip.CLIP(embed_dim=config["embed_dim"], vision_cfg=vision, text_cfg=text,
                            quick_gelu=config.get("quick_gelu", False)).eval()
    for parameter in theirs.parameters():
        if parameter.ndim > 1:
            parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
    images = RNG.integers(0, 256, (2, side, side, 3), np.uint8)
    tokens = RNG.integers(2, 80, (2, 9)).astype(np.int32)
    tokens[:, 6], tokens[:, 7:] = 89, 0
    for file in files(theirs.state_dict(), tmp_path):
        with pytest.raises(FileError, match=rf"neither its activation nor its heads.*\b{name}\b"):
            load(file)
        ours = load(file, architecture=name)
        assert (ours.config.vision.transformer.heads, ours.config.text.transformer.heads) == heads
        pixels = torch.from_numpy(np.array(ours.task.pixels(jnp.asarray(images))).transpose(0, 3, 1, 2))
        for part, want, batch in (("image", theirs.encode_image(pixels, normalize=True), {"image": images}),
                                  ("text", theirs.encode_text(torch.from_numpy(tokens).long(), normalize=True),
                                   {"tokens": tokens})):
            got = predictions(ours.task)[part](ours.params, {key: jnp.asarray(value) for key, value in batch.items()})
            close(got, want, 1e-5, f"bare {name} {part}, {file.name}", record_property)
    assert cli.main(["show", str(file), "--architecture", name]) == 0 and "gelu" in capsys.readouterr().out
