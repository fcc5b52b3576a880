"""iGPT trains on digits with a palette of its own, generates, and is where fine-tuning starts."""

from dataclasses import replace

import numpy as np
import pytest

from jaxmm.config import ImageConfig, InitConfig, MeshConfig
from jaxmm.evals import ImageLikelihood
from jaxmm.inference.model import load
from jaxmm.models.igpt import IGPTConfig
from jaxmm.nn.transformer import TransformerConfig
from jaxmm.pretrained.warm_start import start_weights
from jaxmm.sharding import make_mesh, named_leaves
from jaxmm.tasks.generative_classification import GenerativeClassification
from jaxmm.tasks.generative_pretraining import GenerativePretraining
from jaxmm.training.loop import train
from jaxmm.training.setup import prepare
from tests.training.common import LINEAR, lines

STACK = TransformerConfig(width=12, depth=2, heads=2, mlp_dim=16, activation="quick_gelu", eps=1e-5, init="igpt")
MODEL = IGPTConfig(transformer=STACK, image_size=8, colors=5)
CONFIG = replace(LINEAR, task=GenerativePretraining(model=MODEL), steps=40, microbatches=2,
                 optimizer=replace(LINEAR.optimizer, learning_rate=1e-2, average=None), evals=(ImageLikelihood(),),
                 data=replace(LINEAR.data, val="digits:test", image=ImageConfig(
                     size=8, train_crop="squash", eval_crop="squash", flip=False)))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("igpt")
    train(CONFIG, folder / "run")
    return folder


def test_it_learns_and_generates(run):
    """The loss begins at that of equal chances, because the head is zero, and falls."""
    losses = [value for _, value in lines(run / "run", "train/loss")]
    assert losses[0] == pytest.approx(np.log(5), rel=1e-5) and losses[-1] < 0.85 * losses[0]
    assert lines(run / "run", "val/token_loss")[0][1] == pytest.approx(losses[-1], abs=0.15)
    model = load(run / "run")
    levels = {round(127.5 * (color[0] + 1)) for color in model.task.palette.colors}
    images = model.generate_images(3)
    assert images.shape == (3, 8, 8, 3) and set(np.unique(images)) <= levels and len(levels) == 5
    np.testing.assert_array_equal(model.complete(images[0], keep=0.5, samples=2)[0, :, :4], [images[0, :4]] * 2)


def test_fine_tuning_starts_from_it(run):
    init = InitConfig(source=str(run / "run"))
    config = replace(CONFIG, task=GenerativeClassification(model=replace(MODEL, colors=3)), init=init, evals=())
    task = prepare(config, run).task
    trained = load(run / "run")
    assert task.palette == trained.task.palette and task.model.colors == 5 and task.classes == 10
    loaded, initialised = start_weights(init, task, make_mesh(MeshConfig(data=1)))
    assert initialised == ["class_head/kernel"]
    for path, leaf in named_leaves(trained.params):
        np.testing.assert_array_equal(loaded[path], leaf)
