"""FLOPs counted in jaxprs equal those of formulas."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from jaxmm.config import MeshConfig
from jaxmm.models.clip import CLIP, clip
from jaxmm.models.vit import ViT, vit
from jaxmm.nn.transformer import TransformerConfig
from jaxmm.planning.flops import count_jaxpr
from jaxmm.sharding import make_mesh
from jaxmm.training.accumulate import value_and_grad
from tests.training.common import batch, model_task


def count(function, *arguments):
    return count_jaxpr(jax.make_jaxpr(function)(*arguments))


def stack_flops(config, tokens, images):
    """Return the forward FLOPs of a transformer: four products of width x width, the MLP's two, scores and values."""
    d, m = config.width, config.mlp_dim
    return 2 * images * config.depth * (tokens * (4 * d * d + 2 * d * m) + 2 * tokens * tokens * d)


def vit_flops(config, images):
    patches = (config.image_size // config.patch) ** 2
    tokens, d = patches + config.class_token, config.transformer.width
    return (2 * images * patches * 3 * config.patch**2 * d + stack_flops(config.transformer, tokens, images)
            + (2 * images * d * config.classes if config.classes else 0))


def forward(module, *shapes):
    params = jax.eval_shape(lambda rng, *x: module.init(rng, *x, train=False), jax.random.key(0), *shapes)
    return count(lambda p, *x: module.apply(p, *x, train=False), params, *shapes)


@pytest.mark.parametrize(("name", "gmacs"), [("S/16", 4.6), ("B/16", 17.6), ("L/16", 61.6)])
def test_vision_transformers(name, gmacs):
    config = vit(name, classes=1000)
    flops = forward(ViT(config), jax.ShapeDtypeStruct((3, 224, 224, 3), jnp.float32))
    assert flops.all == flops.model == vit_flops(config, 3)
    assert flops.all / 3 / 2e9 == pytest.approx(gmacs, rel=0.01)      # as published


def test_clip():
    config = clip("ViT-L-14")
    flops = forward(CLIP(config), jax.ShapeDtypeStruct((3, 224, 224, 3), jnp.float32),
                    jax.ShapeDtypeStruct((3, 77), jnp.int32))
    text = config.text.transformer
    expected = (vit_flops(config.vision, 3) + 2 * 3 * 1024 * 768
                + stack_flops(text, 77, 3) + 2 * 3 * text.width * 768)
    assert flops.all == expected


def gradient(task, size, **options):
    data = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch("clip", 0, size).items()}
    params = jax.eval_shape(task.init, jax.random.key(0))
    return count(lambda params, data, rng: value_and_grad(task, params, {}, data, rng, **options), params, data,
                 jax.eval_shape(lambda: jax.random.key(0)))


def test_a_gradient_costs_twice_its_function_and_recomputation_is_counted_separately():
    task = model_task("clip")
    plain, full = gradient(task, 8), gradient(model_task("clip", remat="full"), 8)
    params, model = jax.eval_shape(task.init, jax.random.key(0)), CLIP(task.model)
    data = batch("clip", 0, 8)
    once = count(lambda p, image, tokens: model.apply({"params": p}, image, tokens, train=True), params,
                 jnp.zeros(data["image"].shape), jnp.asarray(data["tokens"])).all
    embed, patches = task.model.embed_dim, 2 * 8 * 9 * 3 * 16 * task.model.vision.transformer.width
    assert plain.model == 3 * (once + 2 * 8 * 8 * embed) - patches      # pixels have no gradient
    assert full.model == plain.model < plain.all < full.all
    parts = gradient(task, 8, microbatches=2)
    assert parts.model == plain.model and parts.all == plain.all + once


def test_a_blockwise_loss_counts_on_every_device():
    task = model_task("clip")
    plain = gradient(task, 8)
    with jax.set_mesh(make_mesh(MeshConfig(data=4, tensor=2))):
        blocks = gradient(replace(task, tile=2), 8)
    assert blocks.model == plain.model + 2 * 8 * 8 * task.model.embed_dim * (2 * 3 - 3)      # twice the same


def test_scans():
    config = TransformerConfig(width=8, depth=5, heads=2, mlp_dim=16)
    assert stack_flops(config, 3, 1) == 2 * 5 * (3 * (4 * 64 + 2 * 128) + 2 * 9 * 8)
    flops = count(lambda x, w: jax.lax.scan(lambda y, _: (y @ w, None), x, length=5), jnp.ones((3, 8)),
                  jnp.ones((8, 8)))
    assert flops.all == 5 * 2 * 3 * 8 * 8
