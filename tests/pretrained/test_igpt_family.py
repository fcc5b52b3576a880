"""transformers' ImageGPT, written and read without it: keys, buffers, biases, palette and size."""

import json
import shutil

import numpy as np
import pytest
import safetensors.numpy

from jaxmm.config import ImageConfig
from jaxmm.inference.model import Model, load
from jaxmm.pretrained.io.files import FileError
from jaxmm.pretrained.registry import open_checkpoint
from jaxmm.pretrained.summary import describe
from tests.tasks import test_igpt as tasks
from tests.training.common import assert_same_bits

IMAGE = ImageConfig(size=tasks.SIDE, eval_crop="squash", interpolation="bilinear")


def model(task=tasks.PRETRAIN, **image):
    return Model(task=task, params=tasks.params(task), preprocessing=ImageConfig(
        **{"size": tasks.SIDE, "eval_crop": "squash", "interpolation": "bilinear"} | image))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("igpt") / "model"
    model().save(folder, format="transformers")
    return folder


def changed(folder, out, *, config=None, processor=None, tensors=None):
    """A copy of the folder with other fields, or other tensors."""
    shutil.copytree(folder, out)
    for name, fields in (("config.json", config), ("preprocessor_config.json", processor)):
        if fields is not None:
            values = json.loads((out / name).read_text()) | fields
            (out / name).write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    if tensors is not None:
        values = safetensors.numpy.load_file(out / "model.safetensors") | tensors
        safetensors.numpy.save_file({key: value for key, value in values.items() if value is not None},
                                    out / "model.safetensors")
    return out


def test_what_is_written_is_read_as_the_same(folder):
    loaded = load(folder)
    assert loaded.task == tasks.PRETRAIN and loaded.preprocessing == IMAGE
    assert_same_bits(loaded.params, tasks.params(tasks.PRETRAIN))
    assert any("without the start token" in note for note in loaded.notes)
    described = describe(open_checkpoint(folder))
    assert described["parameters"] == loaded.num_parameters and described["config"]["model.colors"] == tasks.COLORS


def test_keys_and_layouts(folder):
    """Conv1D keeps [in out]; query, key and value lie side by side; the start token is the last row; zero biases."""
    tensors, params = safetensors.numpy.load_file(folder / "model.safetensors"), tasks.params(tasks.PRETRAIN)
    assert tensors["transformer.wte.weight"].shape == (tasks.COLORS + 1, 12)
    np.testing.assert_array_equal(tensors["lm_head.weight"], params["head"]["kernel"].T)
    attention = params["blocks"]["attention"]
    np.testing.assert_array_equal(tensors["transformer.h.1.attn.c_attn.weight"], np.concatenate(
        [attention[name]["kernel"][1].reshape(12, 12) for name in ("query", "key", "value")], axis=1))
    np.testing.assert_array_equal(tensors["transformer.h.0.attn.c_proj.weight"],
                                  attention["out"]["kernel"][0].reshape(12, 12))
    np.testing.assert_array_equal(tensors["transformer.h.0.mlp.c_fc.weight"],
                                  params["blocks"]["mlp"]["up"]["kernel"][0])
    biases = {key: value for key, value in tensors.items() if key.endswith(".bias")}
    assert len(biases) == 8 and not any(value.any() for value in biases.values())


def test_buffers_of_old_files_are_ignored(folder, tmp_path):
    buffers = {f"transformer.h.{layer}.attn.{name}": value for layer in (0, 1) for name, value in (
        ("bias", np.tril(np.ones((1, 1, 16, 16), np.uint8))), ("masked_bias", np.array(-1e4, np.float32)))}
    old = changed(folder, tmp_path / "old", tensors=buffers, processor={"size": tasks.SIDE})
    assert_same_bits(load(old).params, load(folder).params)


@pytest.mark.parametrize("fields, words", [
    ({"tensors": {"transformer.h.1.attn.c_proj.bias": np.full(12, 0.1, np.float32)}},
     "1 biases are not zero, such as transformer.h.1.attn.c_proj.bias; expected zeros"),
    ({"tensors": {"lm_head.weight": None}}, "no lm_head.weight; expected the class ImageGPTForCausalImageModeling"),
    ({"tensors": {"transformer.h.1.ln_2.weight": None}}, "1 missing: transformer.h.1.ln_2.weight"),
    ({"tensors": {"transformer.extra": np.zeros(3, np.float32)}}, "1 left over: transformer.extra"),
    ({"processor": {"clusters": None}}, r"clusters of shape \[0\]; expected the palette of the model's 6 colours"),
    ({"processor": {"clusters": [[0.0, 0.0, 0.0]]}}, r"clusters of shape \[1, 3\]"),
    ({"processor": {"size": {"height": 32, "width": 32}}}, "size {'height': 32, 'width': 32}; expected 4"),
    ({"processor": {"size": None}}, "size {'height': 256, 'width': 256}; expected 4"),
    ({"config": {"n_positions": 17}}, "n_positions is 17; expected the number of pixels of a square image"),
    ({"config": {"scale_attn_weights": False}}, "not supported: scale_attn_weights = False"),
    ({"config": {"tie_word_embeddings": True}}, "tie_word_embeddings = True"),
    ({"config": {"activation_function": "relu"}}, "activation_function is 'relu'")])
def test_refused(folder, tmp_path, fields, words):
    with pytest.raises(FileError, match=words):
        load(changed(folder, tmp_path / "changed", **fields))


@pytest.mark.parametrize("make, words", [
    (lambda: model(tasks.BERT), "kind = 'bert', classes = None"),
    (lambda: model(tasks.FINETUNE), "classes = 5"),
    (lambda: model(eval_crop="center"), "eval_crop = 'center'")])
def test_what_transformers_does_not_compute_is_not_written(make, words, tmp_path):
    with pytest.raises(FileError, match=words):
        make().save(tmp_path / "out", format="transformers")
    assert not (tmp_path / "out").exists()
    make().save(tmp_path / "own")
    assert_same_bits(load(tmp_path / "own").params, make().params)


def test_other_formats_have_no_such_model(tmp_path):
    with pytest.raises(FileError, match="format is 'timm', which has no IGPTConfig; expected jaxmm, transformers"):
        model().save(tmp_path / "out", format="timm")
