import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxmm.config import MeshConfig
from jaxmm.models.vit import ViT, ViTConfig, transformer
from jaxmm.pretrained.families import npz, open_clip, timm, transformers
from jaxmm.pretrained.io.files import FileError, Tensor, open_tensors, write_safetensors
from jaxmm.pretrained.table import CONV, FLAT, SAME, TRANSPOSED, Row, lead, linear, read_params, write_tensors
from jaxmm.sharding import make_mesh, named_leaves, shardings

CONFIG = ViTConfig(transformer=transformer("mu", depth=3, width=24, heads=3, mlp_dim=40), image_size=12, patch=4,
                   classes=5)


def tensor(array):
    return Tensor(array.shape, array.dtype, lambda: np.array(array))


def shapes(config):
    image = jax.ShapeDtypeStruct((1, config.image_size, config.image_size, 3), np.float32)
    return jax.eval_shape(lambda key, x: ViT(config).init(key, x, train=False)["params"], jax.random.key(0), image)


def random_params(config):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), shapes(config))


@pytest.mark.parametrize("op, ours, theirs", [
    (SAME, (2, 3), (2, 3)), (SAME, (), ()), (FLAT, (2, 3), (6,)), (CONV, (4, 5, 3, 7), (7, 3, 4, 5)),
    (TRANSPOSED, (2, 3), (3, 2)), (linear(), (4, 2, 3), (6, 4)), (linear(2), (2, 3, 5), (5, 6)),
    (lead(1), (), (1,)), (lead(2), (3,), (1, 1, 3))])
def test_operations_are_what_they_say_and_back(op, ours, theirs):
    x = np.arange(np.prod(ours), dtype=np.float32).reshape(ours)
    assert op.shape(ours) == op.write(x).shape == theirs
    np.testing.assert_array_equal(op.read(op.write(x), ours), x)


@pytest.mark.parametrize("op, shape", [
    (TRANSPOSED, (70, 33)), (TRANSPOSED, (16, 17)), (linear(), (50, 3, 7)), (linear(2), (3, 7, 50)), (SAME, (40, 41)),
    (CONV, (4, 4, 3, 60)), (TRANSPOSED, (1, 400)), (TRANSPOSED, (400, 1))])
@pytest.mark.parametrize("layered", [False, True])
def test_large_arrays_are_copied_right(op, shape, layered):
    """Large enough to be copied a few columns at a time."""
    ours = np.random.default_rng(0).normal(size=(2, *shape) if layered else shape).astype(np.float32)
    row = Row("x", "theirs.{}" if layered else "theirs", op)
    tensors = write_tensors({"x": jnp.asarray(ours)}, [row])
    for i, array in enumerate(ours if layered else [ours]):
        name = row.theirs.format(i)
        np.testing.assert_array_equal(tensors[name].read(), op.write(array))
        assert tensors[name].read().flags.c_contiguous
    like = {"x": jax.ShapeDtypeStruct(ours.shape, np.float32)}
    np.testing.assert_array_equal(read_params(tensors, [row], like, name="w")["x"], ours)


def test_linear_computes_what_torch_does():
    kernel, x = np.random.default_rng(0).normal(size=(4, 2, 3)), np.arange(4.0)
    np.testing.assert_allclose(linear().write(kernel) @ x, np.einsum("d,dhk->hk", x, kernel).reshape(-1))
    kernel, x = np.random.default_rng(0).normal(size=(2, 3, 5)), np.arange(6.0).reshape(2, 3)
    np.testing.assert_allclose(linear(2).write(kernel) @ x.reshape(-1), np.einsum("hk,hkd->d", x, kernel))


ROWS = {
    "transformers": transformers.vit_rows(CONFIG, "vit.", 4, ["classifier"]),
    "transformers 5": transformers.vit_rows(CONFIG, "vit.", 5, ["classifier"]),
    "timm": timm.rows(CONFIG),
}


@pytest.mark.parametrize("family", ROWS)
def test_round_trip_through_a_file(family, tmp_path):
    params = random_params(CONFIG)
    write_safetensors(tmp_path / "w.safetensors", write_tensors(params, ROWS[family]))
    back = read_params(open_tensors(tmp_path / "w.safetensors"), ROWS[family], shapes(CONFIG), name="w")
    assert jax.tree.structure(back) == jax.tree.structure(params)
    for (name, ours), theirs in zip(named_leaves(params), jax.tree.leaves(back), strict=True):
        np.testing.assert_array_equal(ours, theirs, err_msg=name)


def test_arrays_go_to_their_places_on_a_mesh():
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=1), jax.devices()[:4])
    like = jax.tree.map(lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16, sharding=where),
                        shapes(CONFIG), shardings(shapes(CONFIG), mesh))
    params = random_params(CONFIG)
    back = read_params(write_tensors(params, ROWS["timm"]), ROWS["timm"], like, name="w")
    for (name, leaf), wanted, ours in zip(named_leaves(back), jax.tree.leaves(like), jax.tree.leaves(params),
                                          strict=True):
        assert leaf.sharding == wanted.sharding and leaf.dtype == jnp.bfloat16, name
        np.testing.assert_array_equal(leaf, ours.astype(jnp.bfloat16))


def test_every_problem_is_listed_and_nothing_is_read():
    rows = ROWS["timm"]
    tensors = write_tensors(random_params(CONFIG), rows)

    def explode():
        raise AssertionError("read before it was checked")

    tensors = {key: Tensor(t.shape, t.dtype, explode) for key, t in tensors.items()}
    del tensors["blocks.1.norm1.bias"], tensors["cls_token"]
    tensors["pos_embed"] = tensor(np.zeros((1, 11, 24), np.float32))
    tensors |= {"ema": tensor(np.zeros(3)), "buffer.index": tensor(np.zeros(3))}
    with pytest.raises(FileError) as error:
        read_params(tensors, rows, shapes(CONFIG), name="model.safetensors", ignore=(r"^buffer\.",))
    text = str(error.value)
    assert text.startswith("model.safetensors does not hold this model")
    assert "2 missing: blocks.1.norm1.bias, cls_token" in text and "1 left over: ema" in text
    assert "1 of another shape: pos_embed [1, 11, 24], expected [1, 10, 24]" in text and "buffer" not in text


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_weights_that_are_not_finite_are_named(dtype, monkeypatch):
    monkeypatch.setattr("jaxmm.pretrained.table.COUNTED", 7)
    params = random_params(CONFIG)
    tensors = {name: Tensor(value.shape, np.dtype(dtype), lambda value=value: value.read().astype(dtype))
               for name, value in write_tensors(params, ROWS["timm"]).items()}
    read_params(tensors, ROWS["timm"], shapes(CONFIG), name="w")
    for name, places in (("blocks.1.mlp.fc1.bias", [3, 39]), ("pos_embed", [0])):
        array = tensors[name].read()
        array.reshape(-1)[places] = [np.nan, -np.inf][:len(places)]
        tensors[name] = tensor(array)
    with pytest.raises(FileError) as error:
        read_params(tensors, ROWS["timm"], shapes(CONFIG), name="w")
    assert str(error.value) == (
        "w cannot be used:\n  2 with NaN or infinite values: blocks.1.mlp.fc1.bias (encoder/blocks/mlp/up/bias): 2 of "
        "40 values, pos_embed (positions): 1 of 240 values")


def test_a_table_and_a_model_that_do_not_agree_are_named():
    with pytest.raises(FileError, match=r"do not agree on .*no/such"):
        read_params({}, [*ROWS["timm"], Row("no/such", "x")], shapes(CONFIG), name="w")
    with pytest.raises(FileError, match="no place for surprise"):
        write_tensors(random_params(CONFIG) | {"surprise": jnp.zeros(3)}, ROWS["timm"])


def test_heads_of_resnets_and_strangers_are_named():
    conv = {"visual.conv1.weight": tensor(np.zeros((4, 3, 2, 2))), "visual.layer1.0.conv1.weight": tensor(np.zeros(1))}
    with pytest.raises(FileError, match="ModifiedResNet"):
        open_clip.read_openai(conv)
    with pytest.raises(FileError, match="hybrid with a ResNet"):
        npz.read({"conv_root/kernel": tensor(np.zeros(3))}, "r50.npz")
    with pytest.raises(FileError, match=re.escape("architecture is 'resnet50'")):
        timm.read({"architecture": "resnet50"}, {})
    with pytest.raises(FileError, match="model_type is 'bert'; supported are vit, deit, clip, siglip"):
        transformers.read({"model_type": "bert"}, {}, None)
