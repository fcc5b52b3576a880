"""vision_transformer's and big_vision's files: written from their description, computed once more in plain numpy."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmm.inference.batching import predictions
from jaxmm.inference.model import load
from jaxmm.pretrained.families import npz
from jaxmm.pretrained.io.files import open_tensors
from jaxmm.pretrained.registry import open_checkpoint
from jaxmm.pretrained.table import write_tensors
from tests.reference import ACTIVATIONS, attend, norm, patchify, unit

WIDTH, DEPTH, HEADS, MLP, PATCH, SIDE, CLASSES, VOCABULARY, LENGTH = 24, 3, 3, 40, 4, 12, 5, 31, 7
SLOTS = (SIDE // PATCH) ** 2


def stack(kind, encoder, stacked=False):
    """Names and shapes of the layers under `encoder`."""
    first, attention, second, hidden = npz.KINDS[kind]
    layer = {f"{name}/{part}": (WIDTH,) for name in (first, second) for part in ("scale", "bias")}
    layer |= attention_shapes(attention) | mlp_shapes(hidden)
    names = {f"{encoder}/encoder_norm/scale": (WIDTH,), f"{encoder}/encoder_norm/bias": (WIDTH,)}
    for part, shape in layer.items():
        if stacked:
            names[f"{encoder}/encoderblock/{part}"] = (DEPTH, *shape)
        else:
            names |= {f"{encoder}/encoderblock_{i}/{part}": shape for i in range(DEPTH)}
    return names


def attention_shapes(name):
    head = WIDTH // HEADS
    shapes = {f"{name}/out/kernel": (HEADS, head, WIDTH), f"{name}/out/bias": (WIDTH,)}
    for part in ("query", "key", "value"):
        shapes |= {f"{name}/{part}/kernel": (WIDTH, HEADS, head), f"{name}/{part}/bias": (HEADS, head)}
    return shapes


def mlp_shapes(name):
    return {f"{name}/Dense_0/kernel": (WIDTH, MLP), f"{name}/Dense_0/bias": (MLP,),
            f"{name}/Dense_1/kernel": (MLP, WIDTH), f"{name}/Dense_1/bias": (WIDTH,)}


def tower(kind, prefix="", stacked=False, **more):
    """Names and shapes of a image tower."""
    return {f"{prefix}embedding/kernel": (PATCH, PATCH, 3, WIDTH), f"{prefix}embedding/bias": (WIDTH,),
            **stack(kind, f"{prefix}Transformer", stacked), **more}


def siglip_names():
    """Names and shapes of two towers."""
    pool = "img/MAPHead_0"
    return tower("big_vision", "img/") | {
        "img/pos_embedding": (1, SLOTS, WIDTH), f"{pool}/probe": (1, 1, WIDTH),
        f"{pool}/LayerNorm_0/scale": (WIDTH,), f"{pool}/LayerNorm_0/bias": (WIDTH,),
        **attention_shapes(f"{pool}/MultiHeadDotProductAttention_0"), **mlp_shapes(f"{pool}/MlpBlock_0"),
        "txt/Embed_0/embedding": (VOCABULARY, WIDTH), "txt/pos_embedding": (1, LENGTH, WIDTH),
        **stack("big_vision", "txt/Encoder_0"), "txt/head/kernel": (WIDTH, WIDTH), "txt/head/bias": (WIDTH,),
        "t": (1,), "b": (1,)}


def drawn(names, wrapper=""):
    rng = np.random.default_rng(1)
    return {wrapper + name: (rng.normal(size=shape) * 0.3 + name.endswith("/scale")).astype(np.float32)
            for name, shape in names.items()}


HEAD = {"head/kernel": (WIDTH, CLASSES), "head/bias": (CLASSES,)}
OLD = {"cls": (1, 1, WIDTH), "Transformer/posembed_input/pos_embedding": (1, SLOTS + 1, WIDTH)}
FILES = {
    "vision_transformer": (tower("vision_transformer", **HEAD, **OLD), ""),
    "vision_transformer, wrapped": (tower("vision_transformer", **HEAD, **OLD), "opt/target/"),
    "vision_transformer, pre-logits": (
        tower("vision_transformer", **HEAD, **OLD) | {"pre_logits/kernel": (WIDTH, WIDTH), "pre_logits/bias": (WIDTH,)},
        ""),
    "big_vision, class token": (
        tower("big_vision", **HEAD, cls=(1, 1, WIDTH), pos_embedding=(1, SLOTS, WIDTH)), "params/"),
    "big_vision, scanned": (tower("big_vision", stacked=True, **HEAD, pos_embedding=(1, SLOTS, WIDTH)), "params/"),
}


def dense(a, name, x):
    return x @ a[f"{name}/kernel"].reshape(x.shape[-1], -1) + a[f"{name}/bias"].reshape(-1)


def attention(a, name, x, context):
    query, key, value = (dense(a, f"{name}/{part}", y).reshape(*y.shape[:2], HEADS, -1)
                         for part, y in (("query", x), ("key", context), ("value", context)))
    y, _ = attend(query, key, value)
    return y.reshape(*x.shape[:2], WIDTH) @ a[f"{name}/out/kernel"].reshape(WIDTH, WIDTH) + a[f"{name}/out/bias"]


def mlp(a, name, x):
    return dense(a, f"{name}/Dense_1", ACTIVATIONS["gelu_tanh"](dense(a, f"{name}/Dense_0", x)))


def layer_norm(a, name, x):
    return norm({"scale": a[f"{name}/scale"], "bias": a[f"{name}/bias"]}, x, 1e-6)


def encode(a, encoder, kind, x):
    """The layers and the last norm."""
    first, attending, second, hidden = npz.KINDS[kind]
    for i in range(DEPTH):
        name = f"{encoder}/encoderblock_{i}"
        if f"{encoder}/encoderblock/{first}/scale" in a:
            layer = {key.replace("encoderblock/", f"encoderblock_{i}/"): value[i] for key, value in a.items()
                     if key.startswith(f"{encoder}/encoderblock/")}
        else:
            layer = a
        y = layer_norm(layer, f"{name}/{first}", x)
        x = x + attention(layer, f"{name}/{attending}", y, y)
        x = x + mlp(layer, f"{name}/{hidden}", layer_norm(layer, f"{name}/{second}", x))
    return layer_norm(a, f"{encoder}/encoder_norm", x)


def see(a, image, kind, prefix=""):
    """Tokens behind the last norm, the class token first where there is one."""
    x = patchify(image, PATCH) @ a[f"{prefix}embedding/kernel"].reshape(-1, WIDTH) + a[f"{prefix}embedding/bias"]
    cls = np.tile(a["cls"], (len(x), 1, 1)) if "cls" in a else np.zeros((len(x), 0, WIDTH))
    if kind == "vision_transformer":
        x = np.concatenate([cls, x], axis=1) + a["Transformer/posembed_input/pos_embedding"]
    else:
        x = np.concatenate([cls, x + a[f"{prefix}pos_embedding"]], axis=1)
    return encode(a, f"{prefix}Transformer", kind, x)


def fp64(arrays, wrapper):
    return {name.removeprefix(wrapper): array.astype(np.float64) for name, array in arrays.items()}


def images():
    return np.random.default_rng(2).integers(0, 256, (3, SIDE, SIDE, 3), np.uint8)


@pytest.mark.parametrize("name", FILES)
def test_vit(name, tmp_path, record_property):
    names, wrapper = FILES[name]
    kind, arrays = name.split(",")[0], drawn(names, wrapper)
    np.savez(tmp_path / "vit.npz", **arrays)
    model = load(tmp_path / "vit.npz")
    a = fp64(arrays, wrapper)
    tokens = see(a, images() / 127.5 - 1, kind)
    pooled = tokens[:, 0] if "cls" in a else tokens.mean(axis=1)
    if "pre_logits/kernel" in a:
        pooled = np.tanh(dense(a, "pre_logits", pooled))
    got = model.task.classifier.logits(model.params, {"image": jnp.asarray(images())})
    difference = np.abs(got - dense(a, "head", pooled)).max()
    record_property(f"npz {name}, largest absolute difference", f"{difference:.1e}")
    assert difference < 1e-4
    opened = open_checkpoint(tmp_path / "vit.npz")
    checkpoint = npz.read(open_tensors(tmp_path / "vit.npz"), "vit.npz")
    again = write_tensors(model.params, checkpoint.rows)
    assert set(again) == set(arrays) and opened.family == "npz"
    for key, value in again.items():
        np.testing.assert_array_equal(value.read(), arrays[key], err_msg=key)


@pytest.mark.parametrize("wrapper", ["", "params/"])
def test_siglip(wrapper, tmp_path, record_property):
    arrays, pool = drawn(siglip_names(), wrapper), "img/MAPHead_0"
    np.savez(tmp_path / "siglip.npz", **arrays)
    model = load(tmp_path / "siglip.npz")
    a = fp64(arrays, wrapper)
    tokens = see(a, images() / 127.5 - 1, "big_vision", "img/")
    y = attention(a, f"{pool}/MultiHeadDotProductAttention_0", np.tile(a[f"{pool}/probe"], (3, 1, 1)), tokens)
    image = unit((y + mlp(a, f"{pool}/MlpBlock_0", layer_norm(a, f"{pool}/LayerNorm_0", y)))[:, 0])
    ids = np.random.default_rng(3).integers(0, VOCABULARY, (3, LENGTH)).astype(np.int32)
    words = encode(a, "txt/Encoder_0", "big_vision", a["txt/Embed_0/embedding"][ids] + a["txt/pos_embedding"])
    text = unit(dense(a, "txt/head", words[:, -1]))
    for name, want, batch in (("image", image, {"image": jnp.asarray(images())}),
                              ("text", text, {"tokens": jnp.asarray(ids)})):
        difference = np.abs(predictions(model.task)[name](model.params, batch) - want).max()
        record_property(f"npz SigLIP {name}, largest absolute difference", f"{difference:.1e}")
        assert difference < 2e-5
    assert float(model.params["logit_scale"]) == arrays[f"{wrapper}t"][0]
    assert float(model.params["logit_bias"]) == arrays[f"{wrapper}b"][0]
    assert (model.preprocessing.eval_crop, model.task.kind) == ("squash", "sigmoid")
