"""Where each family keeps each parameter, pinned: `python -m tests.pretrained.test_golden` writes the listings anew."""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxmm.models.clip import siglip
from jaxmm.models.vit import ViTConfig
from jaxmm.pretrained.families import npz, open_clip, timm, transformers, transformers_igpt
from jaxmm.pretrained.families import transformers_blip as blip
from jaxmm.pretrained.io.files import Tensor
from jaxmm.sharding import named_leaves
from jaxmm.tasks.contrastive_learning import ContrastiveLearning
from tests.pretrained import test_npz_family, tiny

GOLDEN = Path(__file__).parent / "golden"


def flax(names):
    """Rows of an `.npz` that holds arrays of these names and shapes."""
    tensors = {name: Tensor(shape, np.dtype(np.float32), lambda: np.zeros(0)) for name, shape in names.items()}
    return npz.read(tensors, "golden").rows


def families():
    stack = replace(tiny.STACK, eps=1e-6)
    vit = ViTConfig(transformer=stack, image_size=12, patch=4, classes=5)
    deit = replace(vit, distillation_token=True, distillation_head=True)
    pooled = replace(vit, pool="map", class_token=False, classes=None)
    clip = tiny.CLIP.model
    return {
        "transformers_vit_4": transformers.vit_rows(vit, "vit.", 4, ["classifier"]),
        "transformers_vit_5": transformers.vit_rows(vit, "vit.", 5, ["classifier"]),
        "transformers_deit": transformers.vit_rows(deit, "deit.", 4, ["cls_classifier", "distillation_classifier"]),
        "transformers_clip": transformers.clip_rows(), "transformers_siglip": transformers.siglip_rows(),
        "transformers_igpt": transformers_igpt.rows(),
        "transformers_blip_captions": blip.transformers_rows(tiny.CAPTIONER.model),
        "transformers_blip_matching": blip.transformers_rows(tiny.MATCHER.model),
        "transformers_blip_answers": blip.transformers_rows(tiny.ANSWERER.model),
        "timm_vit": timm.rows(vit), "timm_deit": timm.rows(deit), "timm_siglip": timm.rows(pooled),
        "open_clip": open_clip.rows(clip, custom=False),
        "open_clip_custom": open_clip.rows(replace(clip, text_projection_bias=True, logit_bias=-10.0), custom=True),
        "vision_transformer": flax(test_npz_family.FILES["vision_transformer"][0]),
        "big_vision": flax(test_npz_family.FILES["big_vision, scanned"][0]),
        "big_vision_siglip": flax(test_npz_family.siglip_names()),
    }


def listing(rows):
    """A line a row: our path, their key, and which part of how many."""
    return "".join(f"{row.ours} <- {row.theirs}{f' [{row.part} of {row.parts}]' if row.parts > 1 else ''}\n"
                   for row in sorted(rows, key=lambda row: row.ours))


@pytest.mark.parametrize("name", families())
def test_paths_are_what_they_were(name):
    assert listing(families()[name]) == (GOLDEN / f"{name}.txt").read_text()


def test_the_listing_covers_every_parameter_of_siglip():
    task = ContrastiveLearning(kind="sigmoid", model=siglip("B/16", image_size=32, vocab_size=50))
    paths = {path for path, _ in named_leaves(jax.eval_shape(task.init, jax.random.key(0)))}
    assert paths == {row.ours for row in transformers.siglip_rows()}


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for name, rows in families().items():
        (GOLDEN / f"{name}.txt").write_text(listing(rows))
