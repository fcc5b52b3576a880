"""Checkpoints as people have them: prefixes, averages, no configuration, adapters, old and odd configurations."""

import json
from dataclasses import replace

import numpy as np
import pytest

from jaxmm.inference.model import load
from jaxmm.pretrained.families import image_processor, open_clip, open_clip_names, transformers
from jaxmm.pretrained.io.files import FileError, Tensor, open_tensors, open_weights, write_safetensors
from jaxmm.pretrained.io.names import bare_names
from jaxmm.pretrained.registry import open_checkpoint
from tests.pretrained import tiny, writers
from tests.training.common import assert_same_bits


def as_tensor(array):
    return Tensor(array.shape, array.dtype, lambda: array)


def rewrite(folder, change, name="model.safetensors"):
    """Write the weights of a folder again, as `change` makes them."""
    write_safetensors(folder / name, change({key: as_tensor(value.read())
                                             for key, value in open_tensors(folder / name).items()}))


def edit(folder, file="config.json", **values):
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def saved(tmp_path):
    """A folder of transformers' CLIP."""
    tiny.clip().save(tmp_path / "saved", format="transformers")
    return tmp_path / "saved"


@pytest.fixture
def bare(tmp_path):
    """A CLIP of open_clip's without a configuration, and its configuration elsewhere."""
    tiny.clip().save(tmp_path / "saved", format="open_clip")
    (tmp_path / "saved" / "open_clip_config.json").rename(tmp_path / "config.json")
    return tmp_path / "saved" / "open_clip_model.safetensors"


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.", "_orig_mod.module.", "net.",
                                    "model._orig_mod.module.", "_forward_module.clip."])
def test_prefixes_in_any_order(prefix):
    given = {f"{prefix}a.b": as_tensor(np.ones(3)), f"{prefix}c.d": as_tensor(np.zeros(2))}
    tensors, notes = bare_names(given)
    assert list(tensors) == ["a.b", "c.d"] and notes == ()
    mixed = given | {"other.e": as_tensor(np.ones(1))}
    assert list(bare_names(mixed)[0]) == [name.replace("_orig_mod.", "") for name in mixed]
    assert list(bare_names({"module": as_tensor(np.ones(1))})[0]) == ["module"]


def test_names_of_compiled_and_sharded_parts():
    names = ["_orig_mod.a.0._checkpoint_wrapped_module.w", "_orig_mod.a.1._fsdp_wrapped_module.w"]
    assert list(bare_names({name: as_tensor(np.ones(1)) for name in names})[0]) == ["a.0.w", "a.1.w"]
    twice = {name: as_tensor(np.ones(1)) for name in ("a._orig_mod.w", "a.w")}
    assert list(bare_names(twice)[0]) == list(twice)


def test_a_model_with_a_prefix_is_that_model(saved):
    rewrite(saved, lambda tensors: {f"_orig_mod.module.{key}": value for key, value in tensors.items()})
    assert_same_bits(load(saved).params, tiny.clip().params)


RAW, MEAN = np.arange(6.0, dtype=np.float32), np.arange(6.0, dtype=np.float32) + 9


@pytest.mark.parametrize("names", [
    ("model.{}", "model_ema.{}"), ("{}", "ema.{}"), ("module.model.{}", "module.model_ema.{}"),
    ("{}", "state_dict_ema.module.{}"), ("online_model.{}", "ema_model.{}")])
def test_averaged_weights_beside_raw_ones(names):
    raw, average = ({name.format(key): as_tensor(value) for key in ("w.a", "w.b")}
                    for name, value in zip(names, (RAW, MEAN), strict=True))
    for weights, want, word in ((None, RAW, "raw"), ("params", RAW, "raw"), ("average", MEAN, "averaged")):
        tensors, (note,) = bare_names(raw | average, weights)
        assert list(tensors) == ["w.a", "w.b"] and (tensors["w.b"].read() == want).all()
        assert f"the {word}" in note and ("weights='params'" if word == "averaged" else "weights='average'") in note
    tensors, (note,) = bare_names(average)
    assert (tensors["w.a"].read() == MEAN).all() and "averaged" in note
    with pytest.raises(FileError, match="weights is 'params'; the file has averaged weights only"):
        bare_names(average, "params")
    with pytest.raises(FileError, match="weights is 'average'; the file has no averaged weights"):
        bare_names(raw, "average")
    counted = {f"module.{key}": as_tensor(MEAN) for key in ("a", "b.c")}
    tensors, (note,) = bare_names(counted | {"n_averaged": as_tensor(np.int64(7)[None])})
    assert list(tensors) == ["a", "b.c"] and "averaged" in note


def test_what_timm_s_training_saves(tmp_path):
    other = writers.tensor(source=writers.storage(key="1"))
    body = writers.mapping({"epoch": writers.whole(3), "state_dict": writers.mapping({"w": writers.tensor()}),
                            "state_dict_ema": writers.mapping({"module.w": other})})
    writers.torch_zip(tmp_path / "x.pth", body, {"0": RAW.tobytes(), "1": MEAN.tobytes()})
    for weights, want in ((None, RAW), ("average", MEAN)):
        tensors, (note,) = open_weights(tmp_path / "x.pth", weights)
        assert list(tensors) == ["w"] and (tensors["w"].read().ravel() == want).all() and "weights" in note


def test_what_scripts_keep_beside_weights(tmp_path):
    body = writers.mapping({
        "model": writers.mapping({"w": writers.tensor()}),
        "out": writers.call("pathlib", "PosixPath", writers.text("x")),
        "log": writers.call("pathlib._local", "PosixPath", writers.text("/"), writers.text("y")),
        "when": writers.call("datetime", "datetime", writers.text("0123456789")),
        "counts": writers.call("collections", "Counter", writers.mapping({"a": writers.whole(1)}))})
    writers.torch_zip(tmp_path / "x.pth", body, {"0": RAW.tobytes()})
    assert list(open_tensors(tmp_path / "x.pth")) == ["w"]


def test_a_bare_open_clip_checkpoint_needs_a_name(bare, tmp_path, monkeypatch):
    with pytest.raises(FileError, match=r"neither its activation nor its heads; .*no architecture of open_clip"):
        load(bare)
    config = json.loads((tmp_path / "config.json").read_text())["model_cfg"]
    for architecture in (tmp_path / "config.json", tmp_path / "plain.json"):
        (tmp_path / "plain.json").write_text(json.dumps(config))
        model = load(bare, architecture=str(architecture))
        assert replace(model.config, text=tiny.TEXT) == tiny.CLIP.model
        assert_same_bits(model.params, tiny.clip().params)
    with pytest.raises(FileError, match=r"architecture is 'ViT-B-32' \(image tower 768, patch 32, text tower 512\); .* "
                                        r"weights are image tower 24, patch 4, text tower 16"):
        load(bare, architecture="ViT-B-32")
    with pytest.raises(FileError, match=r"architecture is 'ViT-H-15'; supported are .*ViT-H-14, "):
        load(bare, architecture="ViT-H-15")
    for wrong in ("none.json", "wrong.json"):
        (tmp_path / "wrong.json").write_text("[1]")
        with pytest.raises(FileError, match=r"is no configuration of open_clip"):
            load(bare, architecture=str(tmp_path / wrong))
    vision = config["vision_cfg"] | {"layers": 12, "image_size": 24, "head_width": 12}
    named = {"Tiny-4": {**config, "vision_cfg": vision,
                        "text_cfg": config["text_cfg"] | {"heads": 4, "context_length": 77, "vocab_size": 400}}}
    monkeypatch.setattr(open_clip_names, "models", lambda: named)
    model = load(bare, architecture="Tiny-4")
    vision, text = model.config.vision, model.config.text
    assert (vision.transformer.heads, text.transformer.heads, vision.transformer.activation) == (2, 4, "gelu")
    assert (vision.image_size, vision.transformer.depth, text.context_length, text.vocab_size) == (
        tiny.SIDE, 3, tiny.LENGTH, tiny.TOKENIZER.vocab_size)
    assert "the image tower has 3 layers; Tiny-4 has 12" in model.notes
    with pytest.raises(FileError, match=r"heads; .*Tiny-4"):
        load(bare)


def test_a_name_is_for_files_without_a_configuration(saved):
    with pytest.raises(FileError, match=r"architecture is 'ViT-B-32', but .* is not a CLIP of open_clip without"):
        load(saved, architecture="ViT-B-32")


def test_openai_s_own_files_need_no_name():
    shapes = {"visual.conv1.weight": (128, 3, 4, 4), "visual.positional_embedding": (10, 128), "visual.proj": (128, 20),
              "visual.transformer.resblocks.0.ln_1.bias": (128,), "transformer.resblocks.0.ln_1.bias": (64,),
              "token_embedding.weight": (50, 64), "positional_embedding": (9, 64), "text_projection": (64, 20)}
    tensors = {name: as_tensor(np.zeros(shape, np.float16)) for name, shape in shapes.items()}
    with pytest.raises(FileError, match=r"this is a CLIP without a configuration"):
        open_clip.read_openai(tensors)
    constants = {name: as_tensor(np.int64(9)[None]) for name in open_clip_names.OPENAI}
    vision = open_clip.read_openai(tensors | constants).task.model.vision
    assert (vision.transformer.activation, vision.transformer.heads, vision.image_size) == ("quick_gelu", 2, 12)


def test_names_of_open_clip():
    models = open_clip_names.models()
    heads = {name: config["vision_cfg"]["width"] // config["vision_cfg"].get("head_width", 64)
             for name, config in models.items()}
    assert len(models) > 40 and {name: heads[name] for name in ("ViT-B-32", "ViT-H-14", "ViT-g-14", "ViT-bigG-14")} == {
        "ViT-B-32": 12, "ViT-H-14": 16, "ViT-g-14": 16, "ViT-bigG-14": 16}
    assert models["ViT-B-32-quickgelu"]["quick_gelu"] and not models["ViT-B-32"].get("quick_gelu")


def test_one_tower_alone(bare):
    rewrite(bare.parent, lambda tensors: {key: value for key, value in tensors.items() if key.startswith("visual.")},
            bare.name)
    with pytest.raises(FileError, match=r"the weights have no token_embedding\.weight, .*expected both towers"):
        load(bare, architecture="ViT-B-32")


@pytest.mark.parametrize("change, words", [
    (lambda t: {f"base_model.model.{key}.lora_A.weight": value for key, value in t.items()},
     r"is a PEFT adapter \(LORA\) for some/base, not a model"),
    (lambda t: t | {"text_model.encoder.layers.0.mlp.fc1.SCB": as_tensor(np.ones(3, np.float32))},
     r"holds quantised weights \(it has .*SCB\)"),
    (lambda t: t | {"vision_model.encoder.layers.1.mlp.fc1.weight": as_tensor(np.ones((40, 24), np.int8))},
     r"1 not floating-point: quantised\?: vision_model\.encoder\.layers\.1\.mlp\.fc1\.weight int8")])
def test_weights_that_are_no_model(saved, change, words):
    rewrite(saved, change)
    (saved / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "some/base"}')
    with pytest.raises(FileError, match=words):
        load(saved)


def test_what_configurations_say_of_the_weights(saved):
    (saved / "adapter_config.json").write_text("{}")
    assert any("the adapter is not applied" in note for note in open_checkpoint(saved).notes)
    edit(saved, quantization_config={"quant_method": "gptq"})
    with pytest.raises(FileError, match=r"holds quantised weights \(gptq\)"):
        load(saved)
    edit(saved, quantization_config=None, model_type="clip_text_model")
    with pytest.raises(FileError, match=r"is one tower of a model: model_type is 'clip_text_model'; .*'clip'"):
        load(saved)
    (saved / "config.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 605157884\n")
    with pytest.raises(FileError, match="it is a git-lfs pointer"):
        load(saved)


def test_old_configurations_have_precedence_as_in_transformers():
    config = {"vision_config": {"hidden_size": 48, "num_attention_heads": 4, "hidden_act": "gelu"}}
    default = transformers.CLIP_VISION
    assert transformers.tower(config, "vision", default)["num_attention_heads"] == 4
    old = transformers.tower(config, "vision", default, {"num_attention_heads": 8})
    assert (old["hidden_size"], old["num_attention_heads"], old["hidden_act"]) == (48, 8, "quick_gelu")
    assert transformers.tower({"vision_config": None}, "vision", default) == default


@pytest.mark.parametrize("labels, names, noted", [
    ({"0": "a", "1": "b", "2": "c"}, ("a", "b", "c"), False), ({"0": "a", "1": "b"}, ("a", "b", "LABEL_2"), True),
    ({"0": "a", "1": "b", "5": "c"}, ("a", "b", "LABEL_2"), True), (None, None, False), ({}, None, False),
    (["a", "b", "c"], ("a", "b", "c"), False)])
def test_names_of_classes(labels, names, noted):
    got, notes = transformers.class_names({"id2label": labels}, 3)
    assert got == names and bool(notes) == noted


DEFAULT = {"size": 32, "shortest": True, "crop": 32, "resample": 3}


@pytest.mark.parametrize("config, crop, resize", [
    ({"size": 40}, "center_floor", 1.25), ({"size": {"shortest_edge": 40}}, "center_floor", 1.25),
    ({"size": [32, 32], "do_center_crop": False}, "squash", 1.0), ({"size": None}, "center_floor", 1.0),
    ({"size": {"height": 32, "width": 32}, "crop_size": [32, 32]}, "squash", 1.0),
    ({"resample": "bicubic", "image_mean": None, "image_std": 0.5}, "center_floor", 1.0),
    ({"resample": None, "crop_size": {"height": 32, "width": 32}}, "center_floor", 1.0)])
def test_image_processors(config, crop, resize):
    model, pixels = replace(tiny.VISION, image_size=32, patch=8), tiny.CLIP.pixels
    image, got, notes = image_processor.read_preprocessor(config, model, pixels, DEFAULT)
    assert (image.size, image.eval_crop, image.eval_resize, image.interpolation) == (32, crop, resize, "bicubic")
    assert got.mean == pixels.mean and got.std == ((0.5,) * 3 if "image_std" in config else pixels.std) and not notes


@pytest.mark.parametrize("config, words", [
    ({"size": {"longest_edge": 32}}, r"size is \{'longest_edge': 32\}; supported are squares and shortest_edge"),
    ({"size": [32, 40]}, r"size is \[32, 40\]"), ({"crop_size": {"height": 32}}, "crop_size is"),
    ({"size": "32"}, "size is 32"), ({"image_mean": [0.5]}, r"image_mean is \[0\.5\]; expected three numbers"),
    ({"do_normalize": None}, "do_normalize = None"), ({"resample": "hamming"}, "resample is 'hamming'")])
def test_image_processors_that_are_refused(config, words):
    with pytest.raises(FileError, match=words):
        image_processor.read_preprocessor(config, replace(tiny.VISION, image_size=32, patch=8), tiny.CLIP.pixels,
                                          DEFAULT)


def test_sides_that_are_written_twice(saved):
    config = json.loads((saved / "config.json").read_text())
    edit(saved, vision_config=config["vision_config"] | {"image_size": [tiny.SIDE] * 2, "patch_size": [4, 4]})
    assert open_checkpoint(saved).task.model.vision == load(saved).config.vision
    edit(saved, vision_config=config["vision_config"] | {"image_size": [12, 16]})
    with pytest.raises(FileError, match=r"config\.json: image_size is \[12, 16\]; supported are squares"):
        load(saved)


def test_a_pointer_in_place_of_the_vocabulary(saved):
    (saved / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n")
    with pytest.raises(FileError, match=r"tokenizer\.json cannot be read: it is a git-lfs pointer"):
        load(saved)


def test_resnets_are_refused_by_name():
    tensors = {"visual.layer1.0.conv1.weight": as_tensor(np.zeros((1, 1, 1, 1)))}
    assert open_clip.is_bare(tensors)
    with pytest.raises(FileError, match="ModifiedResNet"):
        open_clip.read_openai(tensors)
