"""iGPT against numpy: all tokens at once, hidden ones, and token by token with the cache."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmm.models.igpt import IGPT, IGPTConfig, igpt
from jaxmm.nn.transformer import TransformerConfig, empty_cache
from jaxmm.sharding import named_leaves
from jaxmm.validation import ConfigError
from tests import reference
from tests.reference import fp64

STACK = TransformerConfig(width=12, depth=3, heads=2, mlp_dim=20, eps=1e-4, activation="quick_gelu", init="igpt")
TINY = IGPTConfig(transformer=STACK, image_size=3, colors=7, classes=5)


@cache
def setting():
    tokens = np.random.default_rng(0).integers(0, 7, (4, 9)).astype(np.int32)
    shapes = jax.eval_shape(lambda key: IGPT(TINY).init(key, jnp.asarray(tokens))["params"], jax.random.key(0))
    return tokens, reference.random_like(shapes)


@cache
def apply(config):
    return jax.jit(lambda params, tokens, hidden=None, causal=True: IGPT(config).apply(
        {"params": params}, tokens, hidden, causal=causal), static_argnames="causal")


def shapes_of(config):
    return jax.eval_shape(lambda key: IGPT(config).init(key, jnp.zeros((1, 1), jnp.int32))["params"], jax.random.key(0))


@pytest.mark.parametrize("causal", [True, False])
def test_forward_is_the_definition(causal):
    tokens, params = setting()
    tokens = np.concatenate([np.full((4, 1), 7, np.int32), tokens[:, 1:]], axis=1) if causal else tokens
    hidden = np.random.default_rng(1).random(tokens.shape) < 0.4
    for given in (None, hidden):
        out = apply(TINY)(params, tokens, given, causal=causal)
        logits, layers, classes = reference.igpt(fp64(params), tokens, TINY, given, causal)
        np.testing.assert_allclose(out.logits, logits, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(out.layers, layers, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(out.class_logits, classes, rtol=1e-3, atol=1e-4)
        assert out.tokens.shape == (4, 9, 12)


def test_scanned_recomputed_and_unrolled_are_the_same():
    tokens, params = setting()
    want = apply(TINY)(params, tokens)
    for fields in ({"scan": False}, {"remat": "cheap"}, {"remat": "full", "scan": False}):
        config = replace(TINY, transformer=replace(STACK, **fields))
        got = apply(config)(params, tokens)
        np.testing.assert_allclose(got.logits, want.logits, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(got.layers, want.layers, rtol=1e-5, atol=1e-5)
        assert list(named_leaves(shapes_of(config))) == list(named_leaves(shapes_of(TINY)))


def test_token_by_token_is_all_at_once():
    """The cache is longer than what is filled, and its rest is garbage."""
    tokens, params = setting()
    want = apply(TINY)(params, tokens).logits
    cache = jax.tree.map(lambda leaf: leaf + 9.0, empty_cache(TINY.transformer, 4, 12))

    @jax.jit
    def step(tokens, position, cache):
        mask = jnp.broadcast_to(jnp.arange(12)[None] <= position, (4, 12))
        layers = IGPT(TINY).apply({"params": params}, method=IGPT.separate_layers)
        return IGPT(TINY).apply({"params": params}, tokens, position, cache, layers, mask, method=IGPT.decode_step)

    for position in range(9):
        logits, cache = step(tokens[:, position], position, cache)
        np.testing.assert_allclose(logits, want[:, position], atol=1e-5)


def test_a_token_depends_on_those_before_it():
    tokens, params = setting()
    changed = tokens.copy()
    changed[:, 5] = (changed[:, 5] + 1) % 7
    one, other = (np.asarray(apply(TINY)(params, given).logits) for given in (tokens, changed))
    np.testing.assert_array_equal(one[:, :5], other[:, :5])
    assert (np.abs(one - other)[:, 5:].max(axis=(0, 2)) > 1e-4).all()


@pytest.mark.standard_promotion
def test_bf16():
    """Parameters, logits and features stay fp32, and the results are close to fp32's."""
    tokens, params = setting()
    half = replace(TINY, transformer=replace(STACK, dtype="bfloat16"))
    out, want = apply(half)(params, tokens), apply(TINY)(params, tokens)
    assert out.tokens.dtype == jnp.bfloat16
    assert out.logits.dtype == out.layers.dtype == out.class_logits.dtype == jnp.float32
    np.testing.assert_allclose(out.logits, want.logits, atol=0.05 * np.abs(want.logits).max())
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes_of(half))} == {np.dtype("float32")}


@pytest.mark.parametrize("size, count", [("S", 76_571_648), ("M", 455_157_760), ("L", 1_362_250_752)])
def test_published_sizes(size, count):
    """12 w^2 layers + (2 x 512 + 1 + n_ctx + 2 layers + 1) w; the released files have 76M, 455M and 1,362M."""
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes_of(igpt(size)))) == count


def test_the_largest_size_needs_heads():
    with pytest.raises(ConfigError, match="the paper does not say how many XL has"):
        igpt("XL")
    assert igpt("XL", stack={"heads": 24}, image_size=64).transformer.heads == 24
    with pytest.raises(ConfigError, match="size is 'B'; expected one of S, M, L, XL"):
        igpt("B")


def test_initial_values():
    """The spreads of OpenAI's code; both heads begin at zero."""
    config = IGPTConfig(transformer=replace(STACK, width=96, mlp_dim=384, heads=4), image_size=8, colors=60, classes=5)
    params = jax.jit(lambda key: IGPT(config).init(key, jnp.zeros((1, 1), jnp.int32))["params"])(jax.random.key(0))
    spread = {path: float(np.std(leaf)) for path, leaf in named_leaves(params)}
    blocks = {f"blocks/attention/{name}/kernel": 96**-0.5 for name in ("query", "key", "value")}
    want = blocks | {"blocks/attention/out/kernel": (96 * 3) ** -0.5, "blocks/mlp/up/kernel": 0.02,
                     "blocks/mlp/down/kernel": 0.02, "tokens/embedding": 0.02, "positions": 0.01, "head/kernel": 0,
                     "class_head/kernel": 0}
    assert {path: pytest.approx(value, rel=0.05) for path, value in want.items()} == {
        path: value for path, value in spread.items() if not path.endswith("scale")}
    assert all((leaf == 1).all() for path, leaf in named_leaves(params) if path.endswith("scale"))


def test_bad_input():
    params = setting()[1]
    with pytest.raises(ValueError, match="sequences are 10 tokens long; this model has 9 positions"):
        apply(TINY)(params, np.zeros((1, 10), np.int32))
    with pytest.raises(ConfigError, match=r"dropout is 0.1; expected 0, and no other dropout"):
        replace(TINY, transformer=replace(STACK, dropout=0.1))
    with pytest.raises(ConfigError, match="colors is 0"):
        replace(TINY, colors=0)
    with pytest.raises(ConfigError, match=r"data.image.size is 4; expected the trained model's 3"):
        TINY.adopt(TINY, 4)
