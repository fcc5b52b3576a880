from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse

from jaxmm.config import DataConfig, ImageConfig
from jaxmm.evals import AttentionCenters, EvalContext, attention_centers
from jaxmm.evals.context import FIGURE, Drawing
from jaxmm.models.attention_conv import AttentionConvConfig
from jaxmm.models.vit import ViTConfig
from jaxmm.nn.transformer import TransformerConfig
from jaxmm.tasks.image_classification import Classification
from jaxmm.training.loop import train
from jaxmm.validation import ConfigError
from tests import reference
from tests.evals.conftest import LinearTask, MemorySource
from tests.reference import fp64, random_like
from tests.training.common import LINEAR, lines

SIDE = 7
CONFIG = AttentionConvConfig(width=6, depth=2, heads=3, mlp_dim=8, image_size=SIDE, patch=1, classes=4)
CENTERS = [[[0, 0], [-1, 2], [2, 1]], [[0, -2], [1, 1], [-2, 0]]]
PREFIX = f"{FIGURE}val/center"


def context_of(model, **fields):
    task = Classification(model=model)
    params = random_like(jax.eval_shape(task.init, jax.random.key(0)))
    images = tuple(np.random.default_rng(5).integers(0, 256, (11, SIDE, SIDE, 3)).astype(np.uint8))
    source = MemorySource(images=images, labels=tuple(i % 4 for i in range(11)), classes=tuple("abcd"))
    return EvalContext(task=task, params=params, val=source,
                       data=DataConfig(image=ImageConfig(size=SIDE, eval_crop="squash")), **fields)


def with_heads(context, **values):
    """Return the context with other positions of the heads."""
    params = jax.tree.map(lambda leaf: leaf, context.params)
    params["encoder"]["blocks"]["attention"] |= {name: jnp.asarray(value, jnp.float32)
                                                 for name, value in values.items()}
    return replace(context, params=params, examples=[])


def results(context, **fields):
    evaluator = AttentionCenters(**fields)
    values = dict(evaluator.run(context))
    assert tuple(values) == evaluator.metrics(context)
    centers = np.array([[[values[f"{PREFIX}/layer{layer}/head{head}/{axis}"] for axis in ("row", "column")]
                         for head in (1, 2, 3)] for layer in (1, 2)])
    return values, centers


@pytest.mark.usefixtures("drawings")
def test_sharp_heads_attend_to_their_centers(mesh):
    context = with_heads(context_of(CONFIG), centers=CENTERS, inverse_spread=np.full((2, 3), 8.0))
    if mesh is not None:
        everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        context = replace(context, mesh=mesh, params=jax.device_put(context.params, everywhere))
    values, centers = results(context, images=5)
    np.testing.assert_allclose(centers, CENTERS, atol=1e-5)
    assert values["val/center_distance@1"] == pytest.approx((0 + 5**0.5 + 5**0.5) / 3, abs=1e-5)
    assert values["val/center_distance@2"] == pytest.approx((2 + 2**0.5 + 2) / 3, abs=1e-5)
    assert values["val/center_spread@1"] == pytest.approx(0, abs=1e-3)
    [example] = context.examples
    assert isinstance(example, Drawing) and example.svg.startswith("<svg")


@pytest.mark.usefixtures("drawings")
def test_moments_are_those_of_the_attention():
    """Attention by content, whose map is another one for each image: the mean over evenly spaced images."""
    context = context_of(replace(CONFIG, scores="learned_content"))
    values, centers = results(context, images=3, batch_size=2)
    images = np.stack([context.val.images[i] for i in (0, 5, 10)])
    weights = reference.attention_conv(fp64(context.params), images / 127.5 - 1, context.task.model)[4]
    middle = weights[:, :, :, SIDE // 2 * SIDE + SIDE // 2].mean(axis=1)                  # [l h n]
    offsets = np.stack([np.arange(SIDE**2) // SIDE - SIDE // 2, np.arange(SIDE**2) % SIDE - SIDE // 2], axis=1)
    expected = middle @ offsets
    np.testing.assert_allclose(centers, expected, atol=1e-4)
    variance = (middle @ offsets**2 - expected**2).mean(axis=-1)
    for layer in (0, 1):
        assert values[f"val/center_spread@{layer + 1}"] == pytest.approx(np.sqrt(variance[layer]).mean(), rel=1e-3)


@pytest.mark.usefixtures("drawings")
def test_a_vit_attends_over_its_patches_alone():
    stack = TransformerConfig(width=12, depth=2, heads=3, mlp_dim=8, eps=1e-4)
    model = ViTConfig(transformer=stack, image_size=SIDE, patch=1, classes=4, registers=2)
    context = context_of(model)
    _, centers = results(context, images=2)
    images = np.stack([context.val.images[i] for i in (0, 10)])
    weights = reference.vit(fp64(context.params), images / 127.5 - 1, model)[4][:, :, :, 3:, 3:]
    middle = weights[:, :, :, SIDE // 2 * SIDE + SIDE // 2]
    middle = (middle / middle.sum(axis=-1, keepdims=True)).mean(axis=1)
    offsets = np.stack([np.arange(SIDE**2) // SIDE - SIDE // 2, np.arange(SIDE**2) % SIDE - SIDE // 2], axis=1)
    np.testing.assert_allclose(centers, middle @ offsets, atol=1e-4)


def test_the_figure(monkeypatch):
    """Dots at the centers, with rows downwards; paths from the logged centers; an ellipse along the spread."""
    drawn = []

    def draw_only(draw, label, size):
        drawn.append(Figure().add_subplot())
        draw(drawn[0])
        return "<svg></svg>"

    monkeypatch.setattr(attention_centers, "drawing", draw_only)
    history = {f"{PREFIX}/layer1/head2/row": [(10, 1.0), (20, 0.0)],
               f"{PREFIX}/layer1/head2/column": [(10, 3.0), (20, 2.5)]}
    spreads = np.tile(8.0 * np.eye(2), (2, 3, 1, 1))
    spreads[0, 1] = [[1, 0], [0, 8]]        # wide along rows
    context = with_heads(context_of(replace(CONFIG, scores="generalised_quadratic"), history=lambda: history),
                         centers=CENTERS, inverse_spread=spreads)
    dict(AttentionCenters(images=1).run(context))
    [axes] = drawn
    paths = [np.array(line.get_xydata()) for line in axes.lines[::2]]
    assert len(paths) == 6 and all(len(path) == 1 for path in (*paths[:1], *paths[2:]))
    np.testing.assert_allclose(paths[1], [[3, -1], [2.5, 0], [2, 0.8]], atol=0.25)  # the grid's edge cuts its Gaussian
    np.testing.assert_allclose(paths[2], [[1, -2]], atol=1e-4)
    apart = 2 * 3.5 + 1
    np.testing.assert_allclose(paths[3], [[apart - 2, 0]], atol=1e-4)               # of the next layer, beside it
    ellipse = [patch for patch in axes.patches if isinstance(patch, Ellipse)][1]
    assert ellipse.width > 3 * ellipse.height and abs(abs(ellipse.angle) - 90) < 1


@pytest.mark.parametrize("fields, message", [({"images": 0}, "images is 0"), ({"batch_size": 0}, "batch_size is 0")])
def test_refuses(fields, message):
    with pytest.raises(ConfigError, match=message):
        AttentionCenters(**fields)


def test_other_tasks(context, pictures):
    assert not isinstance(context(None).task, Classification)
    with pytest.raises(ConfigError, match="AttentionCenters needs a task that attends over patches; LinearTask embeds"):
        AttentionCenters().check(context(MemorySource(images=pictures(2)), task=LinearTask()))


def test_paths_survive_a_resumed_run(tmp_path, monkeypatch):
    """The centers are logged at every evaluation, drawn at the end, and in no curve or table."""
    histories = []
    figure = AttentionCenters._figure

    def recorded(self, context, *args):
        histories.append(context.history())
        return figure(self, context, *args)

    monkeypatch.setattr(AttentionCenters, "_figure", recorded)
    model = replace(CONFIG, image_size=8, patch=2, classes=10, dropout=0.0, attention_dropout=0.0)
    config = replace(LINEAR, task=Classification(model=model), steps=4, eval_every=2,
                     optimizer=replace(LINEAR.optimizer, average=None), evals=(AttentionCenters(images=2),),
                     data=replace(LINEAR.data, val="digits:test"), checkpoint=replace(LINEAR.checkpoint, every=2))
    train(config, tmp_path)
    name = f"{PREFIX}/layer2/head3/column"
    train(replace(config, steps=6), tmp_path)
    logged = lines(tmp_path, name)
    assert [step for step, _ in logged] == [2, 4, 6]
    assert [history.get(name, []) for history in histories] == [[], logged[:1], logged[:2]]
    page = (tmp_path / "report.html").read_text()
    assert "Where the heads attend" in page and FIGURE not in page and "center_distance@2" in page
