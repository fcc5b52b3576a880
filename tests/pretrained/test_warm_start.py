"""Training that starts from a trained model."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmm import train
from jaxmm.config import DataConfig, ImageConfig, InitConfig, MeshConfig, OptimizerConfig, TrainConfig
from jaxmm.inference.model import Model
from jaxmm.models.blip import BLIP
from jaxmm.nn.embeddings import resize_positions
from jaxmm.pretrained.warm_start import adopt, start_weights, with_longer_texts
from jaxmm.sharding import make_mesh, named_leaves
from jaxmm.tasks.blip_pretraining import BLIPPretraining
from jaxmm.validation import ConfigError
from tests.pretrained import tiny
from tests.tasks.common import params
from tests.training.common import assert_same_bits, lines, restored

MESH = make_mesh(MeshConfig(data=1))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tiny.clip().save(folder / "clip", format="transformers")
    tiny.vit().save(folder / "vit", format="timm")
    return folder


def started(task, source, size, **init):
    trained = {"clip": tiny.CLIP, "vit": tiny.VIT}[source.name]
    task = adopt(task, trained, size)
    if task.model is not None and hasattr(task.model, "classes") and task.model.classes is None:
        task = replace(task, model=replace(task.model, classes=3))
    given, anew = start_weights(InitConfig(source=str(source), **init), task, MESH)
    return task, given, anew


def test_a_classifier_from_a_classifier(saved):
    task, given, anew = started(tiny.VIT, saved / "vit", 20)
    assert set(anew) == {"head/kernel", "head/bias"} and task.model.image_size == 20
    found = dict(named_leaves(tiny.vit().params))
    for path, leaf in given.items():
        if path != "positions":
            np.testing.assert_array_equal(leaf, found[path])
    want = resize_positions(found["positions"], (5, 5), "bicubic-antialias", prefix=1)
    np.testing.assert_allclose(given["positions"], want, atol=1e-6)
    assert float(np.abs(jax.tree.leaves(task.init(jax.random.key(0))["head"])[0]).max()) == 0


def test_longer_texts(saved):
    """The table of texts is resized like open_clip's: linear between centres."""
    task = adopt(tiny.CLIP, tiny.CLIP, tiny.SIDE)
    for length in (16, 4):
        longer, tokenizer = with_longer_texts(task, tiny.TOKENIZER, length)
        assert longer.model.text.context_length == tokenizer.context_length == length
        given, anew = start_weights(InitConfig(source=str(saved / "clip"), context_length=length), longer, MESH)
        table = np.asarray(tiny.clip().params["text"]["positions"], np.float64)
        want = np.zeros((length, table.shape[1]))
        for row in range(length):
            at = min(max((row + 0.5) * tiny.LENGTH / length - 0.5, 0), tiny.LENGTH - 1)
            low = int(at)
            want[row] = (low + 1 - at) * table[low] + (at - low) * table[min(low + 1, tiny.LENGTH - 1)]
        assert not anew and given["text/positions"].shape == want.shape
        np.testing.assert_allclose(given["text/positions"], want, atol=1e-6)
        np.testing.assert_array_equal(given["vision/positions"], tiny.clip().params["vision"]["positions"])
        assert longer.bind(image_size=tiny.SIDE, classes=None, tokenizer=tokenizer).model == longer.model
    with pytest.raises(ConfigError, match=r"init\.context_length is 16; .*reads no texts"):
        with_longer_texts(tiny.VIT, None, 16)
    with pytest.raises(ConfigError, match=r"init\.context_length is 2; expected more than 2"):
        InitConfig(context_length=2)


def test_a_classifier_from_two_towers_and_two_towers_from_a_classifier(saved):
    task, given, anew = started(tiny.VIT, saved / "clip", tiny.SIDE)
    assert set(anew) == {"head/kernel", "head/bias"}
    assert (task.model.pre_norm, task.model.patch_bias, task.pixels) == (True, False, tiny.CLIP.pixels)
    np.testing.assert_array_equal(given["positions"], tiny.clip().params["vision"]["positions"])
    task, given, anew = started(tiny.CLIP, saved / "vit", tiny.SIDE)
    assert all(path.startswith("vision/") for path in given) and "vision/head/kernel" not in given
    assert not any(path.startswith("vision/") for path in anew) and "text/positions" in anew
    np.testing.assert_array_equal(given["vision/class_token"], tiny.vit().params["class_token"])


def test_blip_takes_a_picture_tower_and_its_own_kind(saved):
    tiny.captioner().save(saved / "captioner")
    tower = replace(tiny.CAPTIONER, model=replace(tiny.CAPTIONER.model, vision=replace(tiny.TOWER, image_size=20)))
    task = adopt(tower, tiny.VIT, 20)
    given, anew = start_weights(InitConfig(source=str(saved / "vit")), task, MESH)
    assert all(path.startswith("vision/") for path in given) and all(path.startswith("text/") for path in anew)
    task = adopt(tower, tiny.CAPTIONER, 20)
    given, anew = start_weights(InitConfig(source=str(saved / "captioner")), task, MESH)
    assert not anew and given["vision/positions"].shape == (26, 24)
    np.testing.assert_array_equal(given["text/head/bias"], tiny.captioner().params["text"]["head"]["bias"])
    assert adopt(tiny.VIT, tiny.CAPTIONER, tiny.SIDE).model.transformer == tiny.TOWER.transformer
    with pytest.raises(ConfigError, match=r"init\.from is 'BLIPPretraining'; expected a ViT"):
        adopt(tiny.CAPTIONER, tiny.MATCHER, tiny.SIDE)
    with pytest.raises(ConfigError, match=r"init\.from is 'ContrastiveLearning'"):
        adopt(tiny.CAPTIONER, tiny.CLIP, tiny.SIDE)


@pytest.mark.parametrize("own", [("attention",), ("cross_attention", "mlp")], ids=str)
def test_parts_of_a_pre_trained_blip_do_what_they_did(own, tmp_path):
    text = replace(tiny.MED, own=own)
    both = BLIPPretraining(model=replace(tiny.MATCHER.model, text=text))
    source = Model(task=both, params=params(both), preprocessing=tiny.IMAGE, tokenizer=tiny.TOKENIZER)
    source.save(tmp_path / "both")
    image = jnp.asarray(np.random.default_rng(0).normal(size=(2, tiny.SIDE, tiny.SIDE, 3)), jnp.float32)
    tokens = jnp.asarray(tiny.TOKENIZER(["a small red circle", "two stars"]))

    def does(task, given, method, *args):
        leaves, structure = jax.tree.flatten_with_path(jax.eval_shape(task.init, jax.random.key(0)))
        names = [path for path, _ in named_leaves(jax.tree.unflatten(structure, [leaf for _, leaf in leaves]))]
        tree = jax.tree.unflatten(structure, [given.get(path, 0.0) for path in names])
        return jax.jit(lambda tree, *args: BLIP(task.model).apply(
            {"params": tree}, *args, train=False, method=method))(tree, *args)

    whole = dict(named_leaves(source.params))
    seen = does(both, whole, BLIP.encode_image, image)
    captioner = replace(tiny.CAPTIONER, model=replace(tiny.CAPTIONER.model, text=replace(text, encoder=False)))
    for task, method in ((captioner, BLIP.decode), (tiny.MATCHER, BLIP.match), (both, BLIP.match), (both, BLIP.decode),
                         (tiny.ANSWERER, BLIP.encode_text_with_image)):
        task = adopt(task, both, tiny.SIDE)
        given, anew = start_weights(InitConfig(source=str(tmp_path / "both")), task, MESH)
        want = does(both, whole, method, tokens, seen)
        np.testing.assert_allclose(does(task, given, method, tokens, seen), want, rtol=1e-5, atol=1e-5)
        assert not anew or task.model.answer is not None
    names = [path for path in anew if not re.search(r"answer/blocks/cross_attention/(key|value)/kernel", path)]
    assert names == []


def test_two_pictures_are_read_as_one_was(saved):
    tiny.matcher().save(saved / "matcher")
    task = adopt(tiny.PAIR, tiny.MATCHER, tiny.SIDE)
    assert task == tiny.PAIR
    given, anew = start_weights(InitConfig(source=str(saved / "matcher")), task, MESH)
    assert {path.split("/")[0] for path in anew} == {"pair_hidden", "pair_head", "text"}
    assert sorted(path for path in anew if path.startswith("text/")) == ["text/merge/bias", "text/merge/kernel"]
    blocks = tiny.matcher().params["text"]["blocks"]
    for twin in ("first", "second"):
        for part in ("query", "out"):
            np.testing.assert_array_equal(given[f"text/blocks/{twin}_cross_attention/{part}/kernel"],
                                          blocks["cross_attention"][part]["kernel"])
    with pytest.raises(ConfigError, match=r"init\.from is 'Captioning'; expected a ViT"):
        adopt(tiny.PAIR, tiny.CAPTIONER, tiny.SIDE)
    with pytest.raises(ConfigError, match=r"init\.from is 'PairClassification'; expected a ViT"):
        adopt(tiny.MATCHER, tiny.PAIR, tiny.SIDE)


@pytest.mark.parametrize("width", [16, 24])
def test_answers_start_from_what_reads_and_writes(width, saved):
    """The decoder of a pre-trained model goes to the answers, as the authors have it; of another width, its keys and
    values of pictures stay behind."""
    tower = replace(tiny.TOWER, transformer=replace(tiny.TOWER.transformer, width=width, heads=2))
    text = replace(tiny.MED, context_width=width, own=("attention", "mlp"))
    pretraining = replace(tiny.MATCHER, model=replace(tiny.MATCHER.model, vision=tower, text=text, temperature=0.07))
    trained = Model(task=pretraining, params=params(pretraining), preprocessing=tiny.IMAGE, tokenizer=tiny.TOKENIZER)
    trained.save(saved / f"pretraining{width}")
    recipe = replace(tiny.ANSWERER, model=replace(tiny.ANSWERER.model, vision=tiny.TOWER, text=replace(
        tiny.ANSWERER.model.text, context_width=24)))
    task = adopt(recipe, pretraining, tiny.SIDE)
    assert (task.model.vision.transformer.width, task.model.text.context_width) == (width, width)
    assert task.model.answer.context_width == 16
    given, anew = start_weights(InitConfig(source=str(saved / f"pretraining{width}")), task, MESH)
    theirs = dict(named_leaves(trained.params))
    assert set(anew) == (set() if width == 16 else {
        f"answer/blocks/cross_attention/{part}/kernel" for part in ("key", "value")})
    for ours, source in (("answer/blocks/attention/query/kernel", "text/blocks/causal_attention/query/kernel"),
                         ("answer/blocks/mlp_norm/scale", "text/blocks/causal_mlp_norm/scale"),
                         ("answer/blocks/cross_attention/out/kernel", "text/blocks/cross_attention/out/kernel"),
                         ("answer/blocks/cross_attention/key/bias", "text/blocks/cross_attention/key/bias"),
                         ("answer/head/bias", "text/head/bias"), ("text/blocks/mlp/up/kernel",) * 2,
                         ("answer/embedding/positions", "text/embedding/positions")):
        np.testing.assert_array_equal(given[ours], theirs[source])


def test_answers_start_from_captions_and_from_answers(saved):
    recipe = replace(tiny.ANSWERER, model=replace(tiny.ANSWERER.model, vision=tiny.TOWER, text=replace(
        tiny.ANSWERER.model.text, context_width=24)))
    if not (saved / "writes").exists():
        tiny.captioner().save(saved / "writes")
    given, anew = start_weights(InitConfig(source=str(saved / "writes")), adopt(recipe, tiny.CAPTIONER, tiny.SIDE),
                                MESH)
    theirs = tiny.captioner().params["text"]
    np.testing.assert_array_equal(given["answer/blocks/attention/query/kernel"],
                                  theirs["blocks"]["attention"]["query"]["kernel"])
    assert all(path.startswith(("text/", "answer/blocks/cross_attention/")) for path in anew)
    assert "text/embedding/positions" in anew and "answer/blocks/cross_attention/key/kernel" in anew
    tiny.answerer().save(saved / "answers")
    given, anew = start_weights(InitConfig(source=str(saved / "answers")), adopt(recipe, tiny.ANSWERER, tiny.SIDE),
                                MESH)
    assert not anew and len(given) == len(list(named_leaves(tiny.answerer().params)))


def test_skipped_paths_start_anew_and_training_fields_stay(saved):
    stack = replace(tiny.VISION.transformer, drop_path=0.1, remat="full", width=48, activation="quick_gelu")
    recipe = replace(tiny.CLIP, model=replace(tiny.CLIP.model, vision=replace(tiny.VISION, transformer=stack)))
    task, given, anew = started(recipe, saved / "clip", tiny.SIDE, skip=("^text/",))
    stack = task.model.vision.transformer
    assert (stack.drop_path, stack.remat, stack.width, stack.activation) == (0.1, "full", 24, "gelu")
    assert not any(path.startswith("text/") for path in given) and "text/positions" in anew


def recipe(source, folder, **fields):
    return TrainConfig(**{"task": tiny.VIT, "steps": 3, "log_every": 1, "mesh": MeshConfig(data=1),
                          "init": InitConfig(source=str(source)),
                          "data": DataConfig(train="digits:train", val=None, batch_size=8,
                                             image=ImageConfig(size=16, flip=False)),
                          "optimizer": OptimizerConfig(learning_rate=1e-3, schedule="constant", warmup=0.0)} | fields)


def test_a_run_starts_from_it_and_goes_on_without_it(saved, tmp_path):
    source = tmp_path / "moved"
    (saved / "clip").rename(source)
    config = recipe(source, tmp_path)
    try:
        train(config, tmp_path / "run")
        train(replace(config, steps=6), tmp_path / "whole")
    finally:
        source.rename(saved / "clip")
    train(replace(config, steps=6), tmp_path / "run")      # the source is gone, its architecture is known
    assert_same_bits(restored(tmp_path / "run", 6), restored(tmp_path / "whole", 6))
    assert [step for step, _ in lines(tmp_path / "run", "train/loss")] == [1, 2, 3, 4, 5, 6]
    assert lines(tmp_path / "run", "train/loss")[0][1] == pytest.approx(np.log(10), abs=1e-4)      # a head of zeros


def test_frozen_layers_stay_what_they_were(saved, tmp_path):
    config = recipe(saved / "clip", tmp_path, optimizer=OptimizerConfig(freeze=("^(?!head)",)))
    train(config, tmp_path / "run")
    params = restored(tmp_path / "run", 3)["params"]
    before = tiny.clip().params["vision"]
    np.testing.assert_array_equal(params["encoder"]["blocks"]["mlp"]["up"]["kernel"],
                                  before["encoder"]["blocks"]["mlp"]["up"]["kernel"])
    assert np.abs(params["head"]["kernel"]).max() > 0


@pytest.mark.parametrize("change, message", [
    ({"init": InitConfig(source="nowhere/at all")}, "init.from is 'nowhere/at all'"),
    ({"data": DataConfig(train="digits:train", val=None, image=ImageConfig(size=18))}, "multiple of the trained"),
])
def test_what_cannot_start(saved, change, message, tmp_path):
    config = recipe(saved / "vit", tmp_path, **change)
    with pytest.raises(ConfigError, match=message):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()
