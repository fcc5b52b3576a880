import math
from dataclasses import replace
from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmm.models.clip import (
    CLIP,
    CLIP_SIZES,
    SIGLIP_SIZES,
    CLIPConfig,
    TextConfig,
    TextTower,
    clip,
    normalise,
    siglip,
)
from jaxmm.models.vit import ViT, ViTConfig, vit
from jaxmm.nn.transformer import TransformerConfig
from jaxmm.validation import ConfigError
from tests import reference
from tests.reference import arrays, fp64

STACK = TransformerConfig(width=12, depth=2, heads=3, mlp_dim=20, eps=1e-4)
TEXT = TextConfig(transformer=STACK, vocab_size=11, context_length=7)
PAD, END = 0, 9
# The end token is the largest id but one, occurs twice in a row of its own, and stands at different places.
TOKENS = jnp.asarray([[8, 3, 9, 0, 0, 0, 0], [8, 9, 9, 5, 0, 0, 0], [8, 1, 2, 3, 4, 10, 9]])
POOLS = ("argmax", "eos", "last", "first", "mean", "map")


def text(**fields):
    return replace(TEXT, **{"eos_id": END} | fields)


@cache
def text_params():
    return reference.random_params(TextTower(text(pool="map")), TOKENS)


@partial(jax.jit, static_argnums=2)
def _pooled(params, tokens, config):
    return {pool: TextTower(replace(config, pool=pool)).apply({"params": params}, tokens, train=False).pooled
            for pool in POOLS}


def every_pool(tokens, config):
    """What each way of pooling makes of the same tower."""
    return _pooled(text_params(), tokens, config)


SETTINGS = pytest.mark.parametrize("causal, pad_id", [(True, None), (False, None), (False, PAD), (True, PAD)])


@SETTINGS
def test_text_tower_is_the_definition(causal, pad_id):
    config = text(causal=causal, pad_id=pad_id)
    for pool, ours in every_pool(TOKENS, config).items():
        expected = reference.text_tower(fp64(text_params()), np.asarray(TOKENS), replace(config, pool=pool))
        np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-4, err_msg=pool)


@SETTINGS
def test_padding(causal, pad_id):
    """With a `pad_id`, a text cut to its own length gives the same vector: as it does where a causal text is pooled
    at its end or start. SigLIP has neither, and texts that are not padded as in training come out differently."""
    config = text(causal=causal, pad_id=pad_id)
    long, short = every_pool(TOKENS, config), every_pool(TOKENS[:2, :4], config)
    unseen = {"argmax", "eos", "first"} if causal else set()
    unseen |= {"argmax", "eos", "first", "mean", "map"} if pad_id is not None else set()
    for pool in POOLS:
        equal = np.allclose(long[pool][:2], short[pool], rtol=1e-4, atol=1e-4)
        assert equal == (pool in unseen), pool


def test_clip_does_not_see_past_the_end():
    """Causal, pooled at the end token: padding by 0 (OpenAI) and by other ids (transformers) are the same."""
    other = jnp.asarray([[8, 3, 9, 7, 7, 7, 7], [8, 9, 9, 1, 2, 3, 4], [8, 1, 2, 3, 4, 10, 9]])
    one, two = every_pool(TOKENS, text()), every_pool(other, text())
    for pool in POOLS:
        assert np.allclose(one[pool], two[pool], atol=1e-5) == (pool in ("argmax", "eos", "first")), pool


def test_texts_that_are_too_long():
    with pytest.raises(ValueError, match="texts are 8 tokens long; this model reads at most 7"):
        TextTower(TEXT).apply({"params": text_params()}, jnp.zeros((1, 8), jnp.int32), train=False)


VISION = ViTConfig(transformer=replace(STACK, width=8, heads=2), image_size=6, patch=2)
CONFIGS = {
    "clip": CLIPConfig(vision=replace(VISION, pre_norm=True, patch_bias=False), text=TEXT, embed_dim=5),
    "siglip": CLIPConfig(
        vision=replace(VISION, pool="map", class_token=False), text=text(causal=False, pool="last"), embed_dim=8,
        vision_projection=False, text_projection_bias=True, logit_scale=math.log(10), logit_bias=-10.0),
}


@cache
def setting(name):
    config = CONFIGS[name]
    image, = arrays((3, 6, 6, 3), seed=2)
    return config, image, reference.random_params(CLIP(config), image, TOKENS)


@pytest.mark.parametrize("name", CONFIGS)
def test_embeddings_are_the_definition(name):
    config, image, params = setting(name)
    out = jax.jit(lambda p: CLIP(config).apply({"params": p}, image, TOKENS, train=True))(params)
    x, y = reference.clip(fp64(params), fp64(image), np.asarray(TOKENS), config)
    np.testing.assert_allclose(out.image, x, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(out.text, y, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(out.logit_scale, np.exp(params["logit_scale"]), rtol=1e-6)
    assert out.logit_bias == params.get("logit_bias", 0)
    assert ("vision_projection" in params) == config.vision_projection
    assert ("bias" in params["text_projection"]) == config.text_projection_bias


def test_methods_of_one_tower():
    """Not normalised, and what the linear probe reads is before the projection."""
    config, image, params = setting("clip")
    model = CLIP(config)
    embedded, words, features, both = jax.jit(lambda p: (
        model.apply({"params": p}, image, train=False, method=CLIP.encode_image),
        model.apply({"params": p}, TOKENS, train=False, method=CLIP.encode_text),
        model.apply({"params": p}, image, train=False, method=CLIP.image_features),
        model.apply({"params": p}, image, TOKENS, train=False)))(params)
    np.testing.assert_allclose(embedded, features @ params["vision_projection"]["kernel"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(normalise(embedded), both.image, rtol=1e-5)
    np.testing.assert_allclose(normalise(words), both.text, rtol=1e-5)
    assert features.shape == (3, 8) and embedded.shape == (3, 5)
    assert not np.allclose(np.linalg.norm(embedded, axis=1), 1, atol=0.1)


def test_attention_weights():
    config, image, params = setting("clip")
    plain, out = jax.jit(lambda p: tuple(CLIP(config).apply({"params": p}, image, TOKENS, train=False, attention=asked)
                                         for asked in (False, True)))(params)
    np.testing.assert_allclose(out.image, plain.image, atol=1e-6)
    np.testing.assert_allclose(out.text, plain.text, atol=1e-6)
    assert plain.image_attention is plain.text_attention is None
    vision = ViT(config.vision).apply({"params": params["vision"]}, image, train=False, attention=True)
    np.testing.assert_allclose(out.image_attention, vision.attention, atol=1e-6)
    stack, heads = config.text.transformer, config.text.transformer.heads
    assert out.text_attention.shape == (stack.depth, 3, heads, 7, 7)
    np.testing.assert_allclose(out.text_attention.sum(axis=-1), 1, rtol=1e-5)
    np.testing.assert_array_equal(np.triu(out.text_attention[0, 0, 0], 1), 0)     # causal
    text = TextTower(config.text).apply({"params": params["text"]}, TOKENS, train=False, hidden=True)
    assert text.hidden.shape == (stack.depth, 3, 7, stack.width) and text.attention is None


def test_normalise():
    out = normalise(jnp.asarray([[3, 4], [0, 0]], jnp.bfloat16))
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, [[0.6, 0.8], [0, 0]], rtol=1e-6)


def abstract_params(config):
    side = config.vision.image_size
    shapes = (jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32),
              jax.ShapeDtypeStruct((1, config.text.context_length), jnp.int32))
    return jax.eval_shape(lambda key, image, tokens: CLIP(config).init(key, image, tokens, train=False)["params"],
                          jax.random.key(0), *shapes)


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("config, expected", [
    (clip("ViT-B-32"), 151_277_313), (clip("ViT-L-14"), 427_616_513), (siglip("B/16"), 203_155_970)])
def test_published_parameter_counts(config, expected):
    assert count(abstract_params(config)) == expected


@pytest.mark.parametrize("name", CLIP_SIZES)
def test_every_clip_builds(name):
    config = clip(name, activation="quick_gelu")
    params = abstract_params(config)
    variant, side, width, heads, depth, embed_dim = CLIP_SIZES[name]
    tower = vit(variant)
    assert params["vision_projection"]["kernel"].shape == (tower.transformer.width, embed_dim)
    assert params["vision"]["positions"].shape == ((side // tower.patch) ** 2 + 1, tower.transformer.width)
    query = params["text"]["encoder"]["blocks"]["attention"]["query"]["kernel"]
    assert query.shape == (depth, width, heads, 64), "heads are 64 wide in every text tower"
    assert config.vision.transformer.activation == config.text.transformer.activation == "quick_gelu"
    assert config.vision.transformer.eps == config.text.transformer.eps == 1e-5
    assert params["logit_scale"].shape == () and "logit_bias" not in params


@pytest.mark.parametrize("name", SIGLIP_SIZES)
def test_every_siglip_builds(name):
    config = siglip(name, image_size=SIGLIP_SIZES[name][2] * 4, vocab_size=256_000)
    params = abstract_params(config)
    width = config.vision.transformer.width
    assert params["vision"]["positions"].shape == (16, width)
    assert params["vision"]["map_head"]["probe"].shape == (1, 1, width)
    assert params["text_projection"]["kernel"].shape == (config.text.transformer.width, width)
    assert params["text"]["tokens"]["embedding"].shape[0] == 256_000
    assert config.text.pool == "last" and not config.text.causal and config.text.pad_id is None
    assert config.text.transformer.activation == "gelu_tanh" and config.text.transformer.eps == 1e-6
    assert params["logit_bias"].shape == ()


def test_initial_scale_and_bias():
    values = {}
    for name, config in CONFIGS.items():
        def init(key, config=config):
            params = CLIP(config).init(key, jnp.zeros((1, 6, 6, 3)), TOKENS[:1], train=False)["params"]
            return {name: params[name] for name in ("logit_scale", "logit_bias") if name in params}
        values[name] = jax.jit(init)(jax.random.key(0))
    assert set(values["clip"]) == {"logit_scale"}
    np.testing.assert_allclose(values["clip"]["logit_scale"], 2.6592, atol=1e-4)
    np.testing.assert_allclose(values["siglip"]["logit_scale"], 2.302585, atol=1e-6)
    assert values["siglip"]["logit_bias"] == -10


@pytest.mark.standard_promotion
def test_bf16():
    config, image, params = setting("siglip")
    half = {"dtype": "bfloat16"}
    config = replace(config, vision=replace(config.vision, transformer=replace(config.vision.transformer, **half)),
                     text=replace(config.text, transformer=replace(STACK, **half)))
    out = jax.jit(lambda p: CLIP(config).apply({"params": p}, image, TOKENS, train=False))(params)
    assert out.image.dtype == out.text.dtype == out.logit_scale.dtype == jnp.float32
    for ours, exact in zip(out[:2], reference.clip(fp64(params), fp64(image), np.asarray(TOKENS), config), strict=True):
        np.testing.assert_allclose(ours, exact, atol=0.05)
        np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1, rtol=1e-5)
    assert {leaf.dtype for leaf in jax.tree.leaves(abstract_params(config))} == {np.dtype("float32")}


@pytest.mark.parametrize("build, message", [
    (lambda: clip("ViT-Q"), "name is 'ViT-Q'; expected one of ViT-S-32"),
    (lambda: siglip("Q/1"), "name is 'Q/1'; expected one of B/16"),
    (lambda: replace(CONFIGS["clip"], embed_dim=0), "embed_dim is 0"),
    (lambda: replace(CONFIGS["siglip"], embed_dim=9), "embed_dim is 9; expected the image tower's 8"),
    (lambda: replace(CONFIGS["clip"], vision=replace(VISION, classes=3)), "vision.classes is 3"),
    (lambda: text(context_length=0), "text.context_length is 0"),
    (lambda: text(vocab_size=0), "text.vocab_size is 0")])
def test_config_refuses(build, message):
    with pytest.raises(ConfigError, match=message):
        build()


class Variants(chex.TestCase):
    """The same numbers with jit, without, and under pmap."""

    def check(self, name):
        config, image, params = setting(name)
        run = self.variant(lambda p, x, t: CLIP(config).apply({"params": p}, x, t, train=False), n_devices=2)
        out = run(params, image, TOKENS)
        x, y = reference.clip(fp64(params), fp64(image), np.asarray(TOKENS), config)
        np.testing.assert_allclose(out.image, x, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(out.text, y, rtol=1e-3, atol=1e-4)

    @chex.variants(with_jit=True, with_pmap=True)
    def test_clip(self):
        self.check("clip")

    @chex.variants(with_jit=True, with_pmap=True)
    def test_siglip(self):
        self.check("siglip")


@pytest.mark.long
class Eager(Variants):
    """Without jit, one operation after the other."""

    @chex.variants(without_jit=True)
    def test_clip(self):
        self.check("clip")

    @chex.variants(without_jit=True)
    def test_siglip(self):
        self.check("siglip")
