"""Likelihood, samples and layer probes of a task whose every number numpy computes again."""

from dataclasses import replace

import numpy as np
import pytest

from jaxmm.config import DataConfig, ImageConfig
from jaxmm.data.scenes import one_shape
from jaxmm.data.sources.registry import open_source
from jaxmm.evals import KNN, Drawing, EvalContext, ImageGrid, ImageLikelihood, ImageSamples, LayerProbes, LinearProbe
from jaxmm.evals.context import evenly_spaced
from jaxmm.evals.evaluation import choose
from jaxmm.evals.knn import knn
from jaxmm.evals.probe import probe
from jaxmm.validation import ConfigError
from tests.chain import CHAIN, SIDE, chain_images, chain_params, log_chances
from tests.evals.conftest import MemorySource

DATA = DataConfig(image=ImageConfig(size=SIDE, eval_crop="squash"))


def labelled(count, seed):
    labels = tuple(np.random.default_rng(seed).integers(0, 3, count).tolist())
    return MemorySource(tuple(chain_images(count, seed)), labels=labels, classes=("a", "b", "c"))


def context(val, **fields):
    return EvalContext(**{"task": CHAIN, "params": chain_params(), "data": DATA, "val": val} | fields)


def test_likelihood_is_the_mean_over_all_pixels():
    source = MemorySource((*chain_images(7), b"broken"))
    tokens = np.asarray(CHAIN.to_tokens(chain_images(7)))
    want = -np.take_along_axis(log_chances(chain_params(), tokens), tokens[..., None], axis=2).mean()
    assert dict(ImageLikelihood(batch_size=3).run(context(source))) == {"val/token_loss": pytest.approx(want, rel=1e-6)}


def test_layer_probes_fit_every_layer_and_the_pixels():
    train, val = labelled(40, 1), labelled(23, 2)
    run = context(val, train=train)
    got = dict(LayerProbes(layers=(0, 2), batch_size=9, k=3).run(run))
    want = {}
    pixels = [np.stack(source.images).reshape(len(source), -1).astype(np.float32) / 255 for source in (train, val)]
    labels = [np.array(source.labels) for source in (train, val)]
    for layer in (0, 2, None):
        kernel = np.eye(48, dtype=np.float32) if layer is None else chain_params()["layers"][layer]
        (x, y), (held_x, held_y) = ((part @ kernel, label) for part, label in zip(pixels, labels, strict=True))
        where = "pixels_{}" if layer is None else f"layer_{{}}@{layer}"
        want |= {"val/" + where.format("probe"): probe(x, y, held_x, held_y, c=(0.316,), max_iter=1000),
                 "val/" + where.format("knn"): knn(x, y, held_x, held_y, k=3, temperature=0.07)}
    assert got == want
    assert tuple(got) == LayerProbes(layers=(0, 2)).metrics(run)
    [drawing] = run.examples
    assert isinstance(drawing, Drawing) and len(drawing.names) == 4 and "40 images" in drawing.text
    one = dict([*LinearProbe(layer=2, batch_size=8).run(run), *KNN(layer=2, k=3).run(run)])
    assert one == {"val/probe_top1": want["val/layer_probe@2"], "val/knn_top1": want["val/layer_knn@2"]}


@pytest.mark.parametrize("make, words", [
    (lambda: LayerProbes(layers=()), "evals.layers"), (lambda: LayerProbes(layers=(-1,)), "evals.layers"),
    (lambda: LayerProbes(layers=(1, 3)), "evals.layers is .1, 3.; expected at most 2: there are 3 layers"),
    (lambda: LinearProbe(layer=3), "LinearProbe.layer is 3; expected 0 to 2"),
    (lambda: ImageSamples(keep="right"), "keep is 'right'; expected top"),
    (lambda: ImageSamples(temperature=0.0), "temperature"), (lambda: ImageSamples(samples=0), "evals.samples")])
def test_bad_values(make, words):
    with pytest.raises(ConfigError, match=words):
        list(make().run(context(labelled(9, 2), train=labelled(12, 1))))


def test_a_task_without_layers_is_refused():
    class Plain(type(CHAIN)):
        embedder = replace(CHAIN.embedder, layers=None)

    run = context(labelled(9, 2), train=labelled(12, 1), task=Plain(levels=CHAIN.levels))
    with pytest.raises(ConfigError, match=r"KNN.layer is 0; expected None: Plain offers no features of every layer"):
        KNN(layer=0).check(run)


class Graded(MemorySource):
    """Images whose colour is right if their last pixel is brighter than 100, and shape if their first one is."""

    grades_images = True

    def shows_largest(self, index, images, part):
        assert part.sum() == 8 and not part[:2].any()
        return None if index % 2 else (images[:, -1, -1, 0] > 100, images[:, 0, 0, 0] > 100)


def test_samples_and_graded_completions():
    source = Graded((*chain_images(11, 4)[:5], b"broken", *chain_images(11, 4)[6:]))
    run = context(source)
    evaluator = ImageSamples(count=10, examples=3, samples=2, graded=4)
    assert evenly_spaced(11, 3).tolist() == [0, 5, 10]           # the broken one is left out
    got = dict(evaluator.run(run))
    chosen = chain_images(11, 4)[[0, 2, 4, 6]]
    assert got["val/completion_color_limit"] == (chosen[:, -1, -1, 0] > 100).mean()
    assert got["val/completion_shape_limit"] == got["val/completion_shape"] == (chosen[:, 0, 0, 0] > 100).mean()
    assert 0 <= got["val/completion_color"] <= 1
    drawn, completed = run.examples
    assert isinstance(drawn, ImageGrid) and [len(row) for row in drawn.rows] == [8, 2]
    assert [len(row) for row in completed.rows] == [4] * 2 and len(completed.columns) == 4
    for image, given, *samples in completed.rows:
        np.testing.assert_array_equal(image[:2], given[:2])
        assert (given[2:] == 128).all() and all((sample[:2] == image[:2]).all() for sample in samples)
    silent = context(source)
    assert dict(replace(evaluator, examples=0).run(silent)) == got and silent.examples == []
    assert ImageSamples().names(MemorySource(tuple(chain_images(1)))) == ()


def test_it_is_chosen_for_models_that_write_images():
    assert [type(evaluator) for evaluator in choose(context(labelled(9, 2)))] == [ImageLikelihood]


def test_scenes_are_graded_by_the_nearest_drawing(scenes):
    """Images themselves are right; repainted objects are wrong in colour only; an object that is not cut has no grade.
    """
    source = open_source("scenes:tiny/val", data_dir=str(scenes))
    from jaxmm.data.scenes import draw, scene_of
    part = np.zeros((32, 32), bool)
    part[16:] = True
    graded = 0
    for index in range(len(source)):
        scene = scene_of(source[index])
        largest = max(scene.objects, key=lambda o: o.radius)
        other = replace(largest, color="red" if largest.color == "blue" else "blue")
        images = np.stack([np.asarray(draw(replace(scene, objects=tuple(
            new if o == largest else o for o in scene.objects)), 32)) for new in (largest, other)])
        grades = source.shows_largest(index, images, part)
        top, bottom = (largest.y - largest.radius) * 32, (largest.y + largest.radius) * 32
        if top > 16 or bottom < 16:
            assert grades is None
        if grades is not None:
            graded += 1
            assert grades[0].tolist() == [True, False] and grades[1].tolist() == [True, True]
    assert graded >= 5


def test_shapes_are_drawn_with_their_names():
    source = open_source("shapes:val")
    assert len(source) == 1000 and source.classes == tuple(one_shape.SHAPES)
    record = source[8]
    assert record["label"] == 1 and record["image"].shape == (32, 32, 3)
    np.testing.assert_array_equal(source[8]["image"], record["image"])
    assert (source[1]["image"] != record["image"]).any()
    assert (open_source("shapes:train")[8]["image"] != record["image"]).any()
    assert source.fingerprint != open_source("shapes:test").fingerprint
    with pytest.raises(ValueError, match="unknown split 'all'; expected one of train, val, test"):
        open_source("shapes:all")
