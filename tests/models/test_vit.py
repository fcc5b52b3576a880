from dataclasses import replace
from functools import cache

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmm.models.vit import SIZES, ViT, ViTConfig, keep_patches, transformer, vit
from jaxmm.nn.transformer import TransformerConfig
from jaxmm.sharding import named_leaves
from jaxmm.validation import ConfigError
from tests import reference
from tests.reference import arrays, fp64

STACK = TransformerConfig(width=12, depth=2, heads=3, mlp_dim=20, eps=1e-4)
TINY = ViTConfig(transformer=STACK, image_size=6, patch=2, classes=5)
VARIANTS = {
    "cls": {},
    "gap without class token": {"pool": "gap", "class_token": False},
    "gap with class token and registers": {"pool": "gap", "registers": 2},
    "map": {"pool": "map", "class_token": False},
    "map with registers": {"pool": "map", "class_token": False, "registers": 3},
    "clip": {"pre_norm": True, "patch_bias": False, "classes": None},
    "registers": {"registers": 3},
    "sincos": {"positions": "sincos"},
    "sincos without class token": {"positions": "sincos", "class_token": False, "pool": "gap"},
    "big_vision": {"position_class": False, "pre_logits": 7},
    "big_vision sincos": {"position_class": False, "positions": "sincos"},
}


@cache
def setting(name):
    config = replace(TINY, **VARIANTS[name])
    image, = arrays((2, 6, 6, 3), seed=1)
    return config, image, reference.random_params(ViT(config), image)


def abstract_params(config):
    side = config.image_size
    return jax.eval_shape(lambda key, image: ViT(config).init(key, image, train=False)["params"], jax.random.key(0),
                          jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32))


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("variant, expected", [
    ("Ti/16", 5_717_416), ("S/16", 22_050_664), ("B/16", 86_567_656), ("B/32", 88_224_232), ("L/16", 304_326_632),
    ("H/14", 632_045_800)])
def test_published_parameter_counts(variant, expected):
    assert count(abstract_params(vit(variant, classes=1000))) == expected


@pytest.mark.parametrize("size", SIZES)
def test_every_size_builds(size):
    """The count by the formula of one layer, for a tower without a head."""
    width, depth, hidden, heads = SIZES[size]
    config = vit(f"{size}/16", image_size=64)
    params = abstract_params(config)
    layer = 4 * width * (width + 1) + 2 * width * hidden + hidden + width + 4 * width
    outside = 16 * 16 * 3 * width + width + (16 + 1) * width + width + 2 * width
    assert count(params) == depth * layer + outside
    query = params["encoder"]["blocks"]["attention"]["query"]["kernel"]
    assert query.shape == (depth, width, heads, width // heads)


@pytest.mark.parametrize("name", VARIANTS)
def test_forward_is_the_definition(name):
    config, image, params = setting(name)
    out = jax.jit(lambda p, x: ViT(config).apply({"params": p}, x, train=False, hidden=True, attention=True))(
        params, image)
    tokens, pooled, logits, hidden, weights = reference.vit(fp64(params), fp64(image), config)
    np.testing.assert_allclose(out.tokens, tokens, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(out.pooled, pooled, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(out.hidden, hidden, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(out.attention, weights, rtol=1e-3, atol=1e-5)
    if config.classes is None:
        assert out.logits is None and "head" not in params
    else:
        np.testing.assert_allclose(out.logits, logits, rtol=1e-3, atol=1e-4)
    present = {"class_token": config.class_token, "registers": config.registers > 0, "pre_norm": config.pre_norm,
               "positions": config.positions == "learned", "pre_logits": config.pre_logits is not None,
               "map_head": config.pool == "map"}
    assert {key: key in params for key in present} == present
    assert ("bias" in params["patches"]) == config.patch_bias


def test_scanned_is_unrolled():
    config, image, params = setting("cls")
    unrolled = replace(config, transformer=replace(config.transformer, scan=False))
    one, other = (jax.jit(lambda p, x, c=c: ViT(c).apply({"params": p}, x, train=False).logits)(params, image)
                  for c in (config, unrolled))
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    assert list(named_leaves(abstract_params(config))) == list(named_leaves(abstract_params(unrolled)))


@pytest.mark.parametrize("size", [4, 8, 7])
def test_refuses_pictures_of_another_size(size):
    config, _, params = setting("cls")
    image, = arrays((1, size, 6, 3))
    with pytest.raises(ValueError, match=f"images are {size} x 6; .* is for 6 x 6"):
        ViT(config).apply({"params": params}, image, train=False)


@pytest.mark.standard_promotion
def test_bf16():
    """Parameters, logits and softmax stay fp32, and the result is close to fp32's."""
    config, image, params = setting("map")
    half = replace(config, transformer=replace(config.transformer, dtype="bfloat16"))
    out = jax.jit(lambda p, x: ViT(half).apply({"params": p}, x, train=False, attention=True))(params, image)
    assert out.tokens.dtype == out.pooled.dtype == jnp.bfloat16
    assert out.logits.dtype == out.attention.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(abstract_params(half))} == {np.dtype("float32")}
    logits = reference.vit(fp64(params), fp64(image), config)[2]
    np.testing.assert_allclose(out.logits, logits, atol=0.05 * np.abs(logits).max())


def test_initial_values():
    """Zero head with its bias, zero class token; CLIP's and the learned table's spreads."""
    config = replace(TINY, transformer=replace(STACK, width=96), head_bias=-10.0)
    timm = replace(config, head_init="normal", positions_std=None,
                   transformer=replace(config.transformer, init="torch"))

    def some(config):
        def init(key):
            params = ViT(config).init(key, jnp.zeros((1, 6, 6, 3)), train=False)["params"]
            return {name: params[name] for name in ("head", "class_token", "positions")}
        return jax.jit(init)(jax.random.key(0))

    params = some(config)
    assert not np.any(params["head"]["kernel"]) and not np.any(params["class_token"])
    np.testing.assert_array_equal(params["head"]["bias"], np.full(5, -10))
    np.testing.assert_allclose(np.std(params["positions"]), 0.02, rtol=0.1)
    params = some(timm)
    np.testing.assert_allclose(np.std(params["head"]["kernel"]), 0.02, rtol=0.15)
    np.testing.assert_allclose(np.std(params["positions"]), 96**-0.5, rtol=0.1)
    np.testing.assert_allclose(np.std(params["class_token"]), 96**-0.5, rtol=0.3)


def test_keep_patches():
    """Each picture keeps its own random subset, every patch equally often."""
    b, n = 400, 10
    x = jnp.broadcast_to(jnp.arange(n, dtype=jnp.float32)[None, :, None], (b, n, 3))
    kept = np.asarray(jax.jit(keep_patches, static_argnums=1)(x, 0.7, jax.random.key(0)))
    assert kept.shape == (b, 3, 3)
    assert (kept == kept[..., :1]).all()
    rows = np.sort(kept[..., 0], axis=1)
    assert (np.diff(rows, axis=1) > 0).all(), "no patch twice"
    assert len(np.unique(rows, axis=0)) > 60, "subsets differ between pictures (120 are possible)"
    share = (kept[..., 0, None] == np.arange(n)).any(axis=1).mean(axis=0)
    assert (abs(share - 0.3) < 4 * np.sqrt(0.3 * 0.7 / b)).all()


def test_patch_dropout_keeps_position_and_class_token():
    """All but one patch dropped, of a picture whose patches are equal: what is left differs by position only."""
    config, _, params = setting("cls")
    config = replace(config, patch_dropout=0.99)
    image = jnp.ones((40, 6, 6, 3))
    out = jax.jit(lambda p, rng: ViT(config).apply({"params": p}, image, train=True, rngs={"dropout": rng}).tokens)(
        params, jax.random.key(0))
    assert out.shape == (40, 1 + 1, 12)
    assert len(np.unique(np.round(np.asarray(out[:, 1]), 3), axis=0)) == 9
    whole = jax.jit(lambda p: ViT(config).apply({"params": p}, image[:1], train=False).tokens)(params)
    assert whole.shape == (1, 1 + 9, 12)


@pytest.mark.parametrize("fields, message", [
    ({"image_size": 7}, "image_size is 7; expected a multiple of patch = 2"),
    ({"class_token": False}, "pool is 'cls'; expected gap or map"),
    ({"registers": -1}, "registers is -1"),
    ({"patch_dropout": 1.0}, "patch_dropout is 1.0"),
    ({"positions": "sincos", "transformer": replace(STACK, width=18)}, "transformer.width is 18; expected a multiple")])
def test_config_refuses(fields, message):
    with pytest.raises(ConfigError, match=message):
        replace(TINY, **fields)


def test_names():
    assert vit("L/14", image_size=28).patch == 14
    assert transformer("Ti", dtype="bfloat16").dtype == "bfloat16"
    with pytest.raises(ConfigError, match=r"size is 'Q'; expected one of mu, Ti"):
        vit("Q/16")
    with pytest.raises(ConfigError, match=r"variant is 'B'; expected SIZE/PATCH"):
        vit("B")


class Variants(chex.TestCase):
    """The same numbers with jit, without, and under pmap, which gives every device a copy of the arguments."""

    def check(self):
        config, image, params = setting("map with registers")
        run = self.variant(lambda p, x: ViT(config).apply({"params": p}, x, train=False).logits, n_devices=2)
        expected = reference.vit(fp64(params), fp64(image), config)[2]
        np.testing.assert_allclose(run(params, image), expected, rtol=1e-3, atol=1e-4)

    @chex.variants(with_jit=True, with_pmap=True)
    def test_vit(self):
        self.check()


@pytest.mark.long
class Eager(Variants):
    """Without jit, one operation after the other."""

    @chex.variants(without_jit=True)
    def test_vit(self):
        self.check()
