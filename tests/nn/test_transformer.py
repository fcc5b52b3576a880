from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxmm.nn.attention import causal_mask
from jaxmm.nn.transformer import Block, Mlp, Stack, TransformerConfig
from jaxmm.validation import ConfigError
from tests import reference
from tests.reference import arrays, fp64

B, T, DEPTH = 2, 5, 3
CONFIG = TransformerConfig(width=12, depth=DEPTH, heads=3, mlp_dim=20, eps=1e-3)


@cache
def setting():
    x, = arrays((B, T, CONFIG.width))
    return x, reference.random_params(Stack(CONFIG), x)


def run(config, params, x, mask=None, **options):
    return jax.jit(lambda p, x: Stack(config).apply({"params": p}, x, mask, train=False, **options))(params, x)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "quick_gelu"])
def test_mlp(activation):
    config = replace(CONFIG, activation=activation)
    x, = arrays((B, T, config.width), scale=2.0)
    params = reference.random_params(Mlp(config), x)
    out = jax.jit(lambda p: Mlp(config).apply({"params": p}, x, train=True))(params)
    np.testing.assert_allclose(out, reference.mlp(fp64(params), fp64(x), activation), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scan", [True, False])
def test_stack_is_the_definition(scan, masked):
    x, params = setting()
    mask = causal_mask(T) if masked else None
    out = run(replace(CONFIG, scan=scan), params, x, mask, hidden=True, attention=True)
    tokens, hidden, weights = reference.encoder(fp64(params), fp64(x), CONFIG, mask)
    assert out.hidden.shape == (DEPTH, B, T, 12) and out.attention.shape == (DEPTH, B, 3, T, T)
    np.testing.assert_allclose(out.tokens, tokens, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(out.hidden, hidden, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(out.attention, weights, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(out.hidden[-1], out.tokens)


def test_stack_is_a_loop_over_blocks():
    """Layer i is a `Block` with the i-th slice of every parameter, scanned or not."""
    x, params = setting()
    block = jax.jit(lambda p, x: Block(CONFIG).apply({"params": p}, x, train=False, weights=True))
    y = x
    for i in range(DEPTH):
        y, _ = block(jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"]), y)
    for scan in (True, False):
        out = run(replace(CONFIG, scan=scan), params, x)
        np.testing.assert_allclose(out.tokens, y, rtol=1e-5, atol=1e-5)
        assert out.hidden is None and out.attention is None


def test_every_layer_starts_differently():
    x, _ = setting()
    def init(key):
        params = Stack(CONFIG).init(key, x, train=False)["params"]["blocks"]
        return params["attention"]["query"]["kernel"], params["mlp_norm"]
    kernels, norm = jax.jit(init)(jax.random.key(0))
    assert kernels.shape == (DEPTH, 12, 3, 4)
    assert not np.allclose(kernels[0], kernels[1]) and not np.allclose(kernels[1], kernels[2])
    np.testing.assert_array_equal(norm["scale"], np.ones((DEPTH, 12)))
    np.testing.assert_array_equal(norm["bias"], np.zeros((DEPTH, 12)))


def test_initial_spread():
    """CLIP's initializers by their formulas; Xavier's bounds; the normal's spread."""
    width, depth, hidden = 96, 5, 200

    def kernels(init):
        config = TransformerConfig(width=width, depth=depth, heads=3, mlp_dim=hidden, init=init)
        block = Block(config)

        def four(key):
            params = block.init(key, jnp.zeros((1, 1, width)), train=False)["params"]
            attention, mlp = params["attention"], params["mlp"]
            return [layer["kernel"] for layer in (attention["value"], attention["out"], mlp["up"], mlp["down"])]

        return [np.asarray(kernel) for kernel in jax.jit(four)(jax.random.key(0))]

    def spread(init):
        return [kernel.std() for kernel in kernels(init)]

    deep = width**-0.5 * (2 * depth) ** -0.5
    np.testing.assert_allclose(spread("clip"), [width**-0.5, deep, (2 * width) ** -0.5, deep], rtol=0.05)
    np.testing.assert_allclose(spread("normal"), [0.02] * 4, rtol=0.05)
    uniform = {
        "xavier": [np.sqrt(6 / (2 * width))] * 2 + [np.sqrt(6 / (width + hidden))] * 2,
        # torch.nn.MultiheadAttention draws its input projections as one [3d, d] matrix; Linear within fan_in^-1/2
        "torch": [np.sqrt(6 / (4 * width)), width**-0.5, width**-0.5, hidden**-0.5],
    }
    for init, bounds in uniform.items():
        for kernel, bound in zip(kernels(init), bounds, strict=True):
            assert 0.98 * bound < abs(kernel).max() <= bound


def test_remat_gives_the_same_gradient():
    x, params = setting()
    params = jax.tree.map(lambda leaf: leaf[:2], params)

    def gradient(remat, scan):
        config = replace(CONFIG, depth=2, remat=remat, scan=scan)

        def loss(params):
            return (Stack(config).apply({"params": params}, x, train=True).tokens ** 2).sum()
        return jax.tree.leaves(jax.jit(jax.grad(loss))(params))

    expected = gradient("none", True)
    largest = max(np.abs(leaf).max() for leaf in expected)
    assert largest > 1
    for remat, scan in (("cheap", True), ("mlp", True), ("dots", True), ("full", True), ("full", False)):
        for one, other in zip(gradient(remat, scan), expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6 * largest, err_msg=f"{remat} {scan}")


def test_stronger_remat_stores_less():
    """Count the values that the backward pass stores."""
    x, params = setting()

    def saved(remat):
        config = replace(CONFIG, remat=remat)
        _, pull = jax.eval_shape(
            lambda p: jax.vjp(lambda p: Stack(config).apply({"params": p}, x, train=True).tokens, p), params)
        return sum(leaf.size for leaf in jax.tree.leaves(pull))

    assert saved("full") < saved("dots") < saved("none")
    assert saved("full") < saved("mlp") < saved("cheap") < saved("none")


DROP, ROWS = 0.6, 4000


@pytest.mark.parametrize("scan", [True, False])
def test_drop_path_rates(scan):
    """With attention's output at zero, a layer whose MLP is skipped leaves its row as it was: counts per layer."""
    config = replace(CONFIG, drop_path=DROP, scan=scan)
    x, params = setting()
    params = jax.tree.map(np.copy, params)
    params["blocks"]["attention"]["out"] = jax.tree.map(np.zeros_like, params["blocks"]["attention"]["out"])
    rows = jnp.broadcast_to(x[:1, :1], (ROWS, 1, 12))
    out = jax.jit(lambda p, rng: Stack(config).apply({"params": p}, rows, train=True, hidden=True,
                                                     rngs={"dropout": rng}))(params, jax.random.key(0))
    steps = np.concatenate([rows[None], out.hidden])
    skipped = (steps[1:] == steps[:-1]).all(axis=(2, 3))
    for share, rate in zip(skipped.mean(axis=1), [0, DROP / 2, DROP], strict=True):
        assert abs(share - rate) <= 4 * np.sqrt(rate * (1 - rate) / ROWS)
    both = (skipped[1] & skipped[2]).mean()
    assert abs(both - DROP**2 / 2) < 0.05, "layers draw by themselves"


def test_drop_path_keeps_the_expected_value():
    config = replace(CONFIG, drop_path=0.5)
    x, = arrays((1, T, 12))
    params = reference.random_params(Block(config), x)
    params["attention"]["out"] = jax.tree.map(np.zeros_like, params["attention"]["out"])
    rows = jnp.broadcast_to(x, (ROWS, T, 12))
    apply = jax.jit(lambda p, rows, rng, train: Block(config).apply(
        {"params": p}, rows, None, 0.25, train=train, rngs={"dropout": rng})[0], static_argnums=3)
    still = np.asarray(apply(params, rows, jax.random.key(0), False))
    np.testing.assert_allclose(still[0], still[-1])
    drawn = np.asarray(apply(params, rows, jax.random.key(0), True))
    branch = still[0] - np.asarray(x[0])
    kept = np.abs(drawn - np.asarray(x)).max(axis=(1, 2)) > 0
    expected = np.broadcast_to(x[0] + branch / 0.75, drawn[kept].shape)
    np.testing.assert_allclose(drawn[kept], expected, rtol=1e-4, atol=1e-4)
    assert abs(kept.mean() - 0.75) < 4 * np.sqrt(0.25 * 0.75 / ROWS)
    np.testing.assert_allclose(drawn.mean(axis=0), still[0], atol=0.05 * np.abs(branch).max())


def test_dropout_only_in_training():
    config = replace(CONFIG, dropout=0.3, attention_dropout=0.2)
    x, params = setting()
    apply = jax.jit(lambda rng, train: Stack(config).apply({"params": params}, x, train=train,
                                                           rngs={"dropout": rng}).tokens, static_argnums=1)
    first, second = apply(jax.random.key(0), True), apply(jax.random.key(1), True)
    assert not np.allclose(first, second)
    np.testing.assert_array_equal(first, apply(jax.random.key(0), True))
    np.testing.assert_allclose(apply(jax.random.key(0), False), run(CONFIG, params, x).tokens, rtol=1e-5, atol=1e-5)


@pytest.mark.standard_promotion
def test_bf16_activations_fp32_norm_statistics():
    """A large common offset: variance taken in bf16 would be nonsense."""
    config = replace(CONFIG, dtype="bfloat16", depth=1)
    x, params = setting()
    params = jax.tree.map(lambda leaf: leaf[:1], params)
    out = run(config, params, x)
    assert out.tokens.dtype == jnp.bfloat16
    expected, *_ = reference.encoder(fp64(params), fp64(x.astype(jnp.bfloat16)), config)
    np.testing.assert_allclose(fp64(out.tokens), expected, rtol=0.05, atol=0.05)
    shapes = jax.eval_shape(lambda k: Stack(config).init(k, x, train=False), jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {np.dtype("float32")}


def test_later_tokens_do_not_change_earlier_ones():
    x, params = setting()
    other = x.at[:, 3:].set(7.0)
    mask = causal_mask(T)
    one, two = (run(CONFIG, params, tokens, mask).tokens for tokens in (x, other))
    np.testing.assert_array_equal(one[:, :3], two[:, :3])
    assert not np.allclose(one[:, 3:], two[:, 3:])


@pytest.mark.parametrize("field, value, wanted", [
    ("heads", 5, "a divisor of width = 12"), ("depth", 0, "a positive number"),
    ("drop_path", 1.0, "0 or more, below 1"), ("attention_dropout", -0.1, "0 or more, below 1")])
def test_refuses(field, value, wanted):
    with pytest.raises(ConfigError) as error:
        replace(CONFIG, **{field: value})
    assert f"transformer.{field} is {value!r}; expected {wanted}" in str(error.value)


def test_flax_agrees():
    """A second opinion on one layer's attention: flax's own, with its parameters renamed."""
    x, params = setting()
    layer = jax.tree.map(lambda leaf: leaf[0], params["blocks"])["attention"]
    module = nn.MultiHeadDotProductAttention(num_heads=3)
    theirs = jax.jit(lambda x: module.apply({"params": layer}, x))(x)
    ours, _ = reference.attention(fp64(layer), fp64(x), fp64(x))
    np.testing.assert_allclose(theirs, ours, rtol=1e-4, atol=1e-5)
