"""BLIP learns to tell whether the left or the right of two pictures is red."""

import itertools
import json
from dataclasses import replace
from functools import cache

import jax
import numpy as np
import pytest
from PIL import Image

from jaxmm.config import DataConfig, ImageConfig, MeshConfig, OptimizerConfig, TokenizerConfig, TrainConfig
from jaxmm.evals import TopKAccuracy
from jaxmm.inference.model import load
from jaxmm.models.blip import BLIPConfig
from jaxmm.models.med_config import MedConfig
from jaxmm.models.vit import ViTConfig
from jaxmm.nn.transformer import TransformerConfig
from jaxmm.tasks.pair_classification import PairClassification
from jaxmm.training.loop import train
from tests.training.common import lines

COLOURS = {"red": (220, 20, 20), "blue": (20, 20, 220)}
STACK = {"depth": 2, "heads": 2, "init": "xavier"}
MODEL = BLIPConfig(
    vision=ViTConfig(transformer=TransformerConfig(width=24, mlp_dim=40, **STACK), image_size=8, patch=4),
    text=MedConfig(transformer=TransformerConfig(width=16, mlp_dim=56, eps=1e-12, **STACK), context_width=24,
                   positions=12, decoder=False, merge_from=1),
    embed_dim=None, matching=False, temperature=None)


def colour(name):
    return np.full((9, 11, 3), COLOURS[name], np.uint8)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """`run(steps)`: a work folder, and the last metrics."""
    folder, lines = tmp_path_factory.mktemp("nlvr"), []
    for name in COLOURS:
        Image.fromarray(colour(name)).save(folder / f"{name}.png")
    for left, right, side, said in itertools.product(COLOURS, COLOURS, ("left", "right"), COLOURS):
        truth = (left if side == "left" else right) == said
        lines.append({"sentence": f"The {side} is {said}.", "label": str(truth),
                      "images": [f"{left}.png", f"{right}.png"]})
    (folder / "all.json").write_text(json.dumps(lines))
    data = DataConfig(train=f"nlvr:{folder}/all.json", val=f"nlvr:{folder}/all.json", batch_size=32,
                      image=ImageConfig(size=8, scale=(0.5, 1.0), eval_crop="squash"),
                      tokenizer=TokenizerConfig(vocab_size=40, context_length=8))
    config = TrainConfig(
        task=PairClassification(model=MODEL), steps=150, log_every=1, data=data,
        mesh=MeshConfig(data=1), microbatches=2,
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup=10, weight_decay=0.0), evals=(TopKAccuracy(examples=3),))
    return cache(lambda steps: (folder / str(steps), train(replace(config, steps=steps), folder / str(steps))))


@pytest.mark.long
def test_it_learns(run):
    folder, metrics = run(150)
    losses = [loss for _, loss in lines(folder, "train/loss")]
    assert losses[0] > 0.5 and losses[-1] < 0.1 and metrics["val/loss"] < 0.1 and metrics["val/top1"] == 1
    assert (folder / "report.html").read_text().count("<b>True</b>") >= 1


def test_it_is_trained_and_asked_about_pictures(run):
    folder, metrics = run(10)
    assert len(lines(folder, "train/loss")) == 10 and metrics["val/loss"] > 0
    assert "<b>True</b>" in (folder / "report.html").read_text()
    asked(folder)


@pytest.mark.long
def test_what_it_learned_is_asked_of_pictures(run):
    assert (asked(run(150)[0]) > 0.5).tolist() == [True, False, True]


def asked(folder):
    """Answers of the model in `folder`, compared with what it computes."""
    model = load(folder)
    red, blue = map(colour, COLOURS)
    found = model.compare_pair([(red, blue), (blue, red), (red, blue)],
                          ["The left is red!", "the left is red", "the right is blue"])
    assert found.shape == (3,)
    batch = {"image": model.preprocess([blue, red])[None], "tokens": model.tokenize(["the left is red"])}
    logits = jax.jit(model.task.classifier.logits)(model.params, batch)
    np.testing.assert_allclose(found[1], jax.nn.softmax(logits)[0, 1], rtol=1e-4)
    assert model.encode_image([red]).shape == (1, 24) and model.compare_pair([], []).shape == (0,)
    with pytest.raises(ValueError, match="1 pairs and 2 texts"):
        model.compare_pair([(red, blue)], ["one", "two"])
    return found
