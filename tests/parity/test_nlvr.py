"""BLIP on NLVR2: the authors' file, against what they published written once more in plain torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn.functional import gelu, layer_norm

from jaxmm.inference.model import load
from jaxmm.pretrained.io.files import FileError
from jaxmm.tasks.pair_classification import PairClassification
from tests.parity.test_published import close

pytestmark = pytest.mark.parity
WIDTH, SEEN, MLP, LAYERS, BLOCKS, VOCABULARY, SIDE, PATCH = 128, 192, 56, 8, 2, 110, 20, 5
RNG = np.random.default_rng(0)
IMAGE = RNG.standard_normal((3, 2, SIDE, SIDE, 3), np.float32)
WORDS = RNG.integers(1, 107, (3, 9)).astype(np.int32)
WORDS[1, 6:] = 0


def shapes():
    """Return the shape of every tensor in the file, by name."""
    def linear(name, inputs, outputs):
        return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}

    def norm(name, width):
        return {f"{name}.weight": (width,), f"{name}.bias": (width,)}

    see, read = "visual_encoder", "text_encoder"
    tensors = {f"{see}.cls_token": (1, 1, SEEN), f"{see}.pos_embed": (1, 1 + (SIDE // PATCH) ** 2, SEEN),
             f"{see}.patch_embed.proj.weight": (SEEN, 3, PATCH, PATCH), f"{see}.patch_embed.proj.bias": (SEEN,),
             f"{read}.embeddings.word_embeddings.weight": (VOCABULARY, WIDTH),
             f"{read}.embeddings.position_embeddings.weight": (12, WIDTH)}
    tensors |= norm(f"{see}.norm", SEEN) | norm(f"{read}.embeddings.LayerNorm", WIDTH)
    for block in (f"{see}.blocks.{i}" for i in range(BLOCKS)):
        tensors |= norm(f"{block}.norm1", SEEN) | norm(f"{block}.norm2", SEEN)
        tensors |= linear(f"{block}.attn.qkv", SEEN, 3 * SEEN) | linear(f"{block}.attn.proj", SEEN, SEEN)
        tensors |= linear(f"{block}.mlp.fc1", SEEN, MLP) | linear(f"{block}.mlp.fc2", MLP, SEEN)
    for i in range(LAYERS):
        layer = f"{read}.encoder.layer.{i}"
        for kind, inputs, number in (("attention.self", WIDTH, ""), ("crossattention.self", SEEN, "0"),
                                     ("crossattention.self", SEEN, "1")):
            tensors |= linear(f"{layer}.{kind}{number}.query", WIDTH, WIDTH)
            tensors |= linear(f"{layer}.{kind}{number}.key", inputs, WIDTH)
            tensors |= linear(f"{layer}.{kind}{number}.value", inputs, WIDTH)
            tensors |= linear(f"{layer}.{kind.split('.')[0]}.output.dense{number}", WIDTH, WIDTH)
        if i >= 6:
            tensors |= linear(f"{layer}.crossattention.output.merge_layer", 2 * WIDTH, WIDTH)
        for name in ("attention.output", "crossattention.output", "output"):
            tensors |= norm(f"{layer}.{name}.LayerNorm", WIDTH)
        tensors |= linear(f"{layer}.intermediate.dense", WIDTH, MLP) | linear(f"{layer}.output.dense", MLP, WIDTH)
    return tensors | linear("cls_head.0", WIDTH, WIDTH) | linear("cls_head.2", WIDTH, 2)


def weights():
    made = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=made) * 0.1 for name, shape in shapes().items()}
    for name, value in tensors.items():
        if "orm" in name and name.endswith("weight"):
            value.add_(1)
    return tensors


def linear(w, name, x):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def norm(w, name, x, eps):
    return layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)


def attended(query, key, value, keep=None):
    """Heads of 64."""
    def heads(x):
        return x.unflatten(-1, (-1, 64)).transpose(1, 2)
    scores = heads(query) @ heads(key).transpose(-1, -2) / 8
    if keep is not None:
        scores = scores.masked_fill(~keep[:, None, None, :], -1e9)
    return (scores.softmax(-1) @ heads(value)).transpose(1, 2).flatten(2)


def encoded_image(w, image):
    x = torch.nn.functional.conv2d(image, w["visual_encoder.patch_embed.proj.weight"],
                                   w["visual_encoder.patch_embed.proj.bias"], stride=PATCH).flatten(2).transpose(1, 2)
    x = torch.cat([w["visual_encoder.cls_token"].expand(len(x), -1, -1), x], 1) + w["visual_encoder.pos_embed"]
    for name in (f"visual_encoder.blocks.{i}" for i in range(BLOCKS)):
        packed = linear(w, f"{name}.attn.qkv", norm(w, f"{name}.norm1", x, 1e-6))
        x = x + linear(w, f"{name}.attn.proj", attended(*packed.chunk(3, -1)))
        x = x + linear(w, f"{name}.mlp.fc2", gelu(linear(w, f"{name}.mlp.fc1", norm(w, f"{name}.norm2", x, 1e-6))))
    return norm(w, "visual_encoder.norm", x, 1e-6)


def published(w, first, second, words):
    """The logits."""
    images = encoded_image(w, torch.cat([first, second])).split(len(first))
    keep, words = words != 0, words.clone()
    words[:, 0] = VOCABULARY - 1
    name = "text_encoder.embeddings"
    x = w[f"{name}.word_embeddings.weight"][words] + w[f"{name}.position_embeddings.weight"][:words.shape[1]]
    x = norm(w, f"{name}.LayerNorm", x, 1e-12)

    def looked(x, context, name, keep=None):
        return attended(linear(w, f"{name}.query", x), linear(w, f"{name}.key", context),
                        linear(w, f"{name}.value", context), keep)

    for i in range(LAYERS):
        layer = f"text_encoder.encoder.layer.{i}"
        y = linear(w, f"{layer}.attention.output.dense", looked(x, x, f"{layer}.attention.self", keep))
        x = norm(w, f"{layer}.attention.output.LayerNorm", x + y, 1e-12)
        cross = f"{layer}.crossattention"
        one, two = (linear(w, f"{cross}.output.dense{k}", looked(x, images[k], f"{cross}.self{k}")) for k in (0, 1))
        y = (one + two) / 2 if i < 6 else linear(w, f"{cross}.output.merge_layer", torch.cat([one, two], -1))
        x = norm(w, f"{cross}.output.LayerNorm", x + y, 1e-12)
        y = linear(w, f"{layer}.output.dense", gelu(linear(w, f"{layer}.intermediate.dense", x)))
        x = norm(w, f"{layer}.output.LayerNorm", x + y, 1e-12)
    return linear(w, "cls_head.2", linear(w, "cls_head.0", x[:, 0]).relu())


def test_the_authors_file(tmp_path, record_property):
    w = weights()
    torch.save({"model": w | {"text_encoder.embeddings.position_ids": torch.arange(12)[None]}}, tmp_path / "nlvr.pth")
    ours = load(tmp_path / "nlvr.pth")
    assert (type(ours.task), ours.config.text.merge_from, ours.preprocessing.size) == (PairClassification, 6, SIDE)
    assert ours.labels == ("False", "True") and ours.params["text"]["merge"]["kernel"].shape == (2, 256, 128)
    got = jax.jit(lambda params: ours.module.apply({"params": params}, jnp.asarray(IMAGE), jnp.asarray(WORDS),
                                                   train=False).pair_logits)(ours.params)
    first, second = (torch.from_numpy(IMAGE[:, i].transpose(0, 3, 1, 2).copy()) for i in (0, 1))
    want = published(w, first, second, torch.from_numpy(WORDS).long())
    close(got, want, 1e-5, "Salesforce NLVR2 logits", record_property)
    assert (want - published(w, second, first, torch.from_numpy(WORDS).long())).abs().max() > 0.01
    with pytest.raises(FileError, match="transformers has no such BLIP"):
        ours.save(tmp_path / "folder", format="transformers")
    ours.save(tmp_path / "kept")
    np.testing.assert_array_equal(load(tmp_path / "kept").params["text"]["merge"]["bias"],
                                  ours.params["text"]["merge"]["bias"])


def test_a_file_without_its_merges(tmp_path):
    w = {name: value for name, value in weights().items() if "merge_layer" not in name}
    torch.save({"model": w}, tmp_path / "nlvr.pth")
    with pytest.raises(FileError, match=r"8 missing: text_encoder\.encoder\.layer\.4\.crossattention\.output\.merge"):
        load(tmp_path / "nlvr.pth")
