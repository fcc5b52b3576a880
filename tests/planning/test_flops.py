"""FLOPs counted in traces, against formulas."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from jaxmm.config import MeshConfig
from jaxmm.models.clip import CLIP, clip
from jaxmm.models.vit import ViT, vit
from jaxmm.nn.transformer import TransformerConfig
from jaxmm.planning.flops import count
from jaxmm.sharding import make_mesh
from jaxmm.training.accumulate import value_and_grad
from tests.training.common import batch, model_task


def stack_flops(config, tokens, pictures):
    """Of a transformer's products, forwards: four of width x width, the MLP's two, scores and values."""
    d, m = config.width, config.mlp_dim
    return 2 * pictures * config.depth * (tokens * (4 * d * d + 2 * d * m) + 2 * tokens * tokens * d)


def vit_flops(config, pictures):
    patches = (config.image_size // config.patch) ** 2
    tokens, d = patches + config.class_token, config.transformer.width
    return (2 * pictures * patches * 3 * config.patch**2 * d + stack_flops(config.transformer, tokens, pictures)
            + (2 * pictures * d * config.classes if config.classes else 0))


def forward(module, *shapes):
    params = jax.eval_shape(lambda rng, *x: module.init(rng, *x, train=False), jax.random.key(0), *shapes)
    return count(lambda p, *x: module.apply(p, *x, train=False), params, *shapes)


@pytest.mark.parametrize(("name", "gmacs"), [("S/16", 4.6), ("B/16", 17.6), ("L/16", 61.6)])
def test_vision_transformers(name, gmacs):
    config = vit(name, classes=1000)
    found = forward(ViT(config), jax.ShapeDtypeStruct((3, 224, 224, 3), jnp.float32))
    assert found.all == found.model == vit_flops(config, 3)
    assert found.all / 3 / 2e9 == pytest.approx(gmacs, rel=0.01)      # as published


def test_clip():
    config = clip("ViT-L-14")
    found = forward(CLIP(config), jax.ShapeDtypeStruct((3, 224, 224, 3), jnp.float32),
                    jax.ShapeDtypeStruct((3, 77), jnp.int32))
    text = config.text.transformer
    expected = (vit_flops(config.vision, 3) + 2 * 3 * 1024 * 768
                + stack_flops(text, 77, 3) + 2 * 3 * text.width * 768)
    assert found.all == expected


def gradient(task, size, **options):
    data = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch("clip", 0, size).items()}
    params = jax.eval_shape(task.init, jax.random.key(0))
    return count(lambda params, data, rng: value_and_grad(task, params, {}, data, rng, **options), params, data,
                 jax.eval_shape(lambda: jax.random.key(0)))


def test_a_gradient_is_twice_its_function_and_what_is_computed_again_is_told_apart():
    task = model_task("clip")
    whole, full = gradient(task, 8), gradient(model_task("clip", remat="full"), 8)
    params, model = jax.eval_shape(task.init, jax.random.key(0)), CLIP(task.model)
    data = batch("clip", 0, 8)
    once = count(lambda p, image, tokens: model.apply({"params": p}, image, tokens, train=True), params,
                 jnp.zeros(data["image"].shape), jnp.asarray(data["tokens"])).all
    embed, patches = task.model.embed_dim, 2 * 8 * 9 * 3 * 16 * task.model.vision.transformer.width
    assert whole.model == 3 * (once + 2 * 8 * 8 * embed) - patches      # pixels have no gradient
    assert full.model == whole.model < whole.all < full.all
    parts = gradient(task, 8, microbatches=2)
    assert parts.model == whole.model and parts.all == whole.all + once


def test_blocks_count_on_every_device():
    task = model_task("clip")
    whole = gradient(task, 8)
    with jax.set_mesh(make_mesh(MeshConfig(data=4, tensor=2))):
        blocks = gradient(replace(task, tile=2), 8)
    assert blocks.model == whole.model + 2 * 8 * 8 * task.model.embed_dim * (2 * 3 - 3)      # tensor: twice the same


def test_scans():
    config = TransformerConfig(width=8, depth=5, heads=2, mlp_dim=16)
    assert stack_flops(config, 3, 1) == 2 * 5 * (3 * (4 * 64 + 2 * 128) + 2 * 9 * 8)
    found = count(lambda x, w: jax.lax.scan(lambda y, _: (y @ w, None), x, length=5), jnp.ones((3, 8)),
                  jnp.ones((8, 8)))
    assert found.all == 5 * 2 * 3 * 8 * 8
