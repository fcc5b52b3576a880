from dataclasses import replace
from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmm.models.attention_conv import AttentionConv, AttentionConvConfig, GridAttention, convolution_params
from jaxmm.validation import ConfigError
from tests import reference
from tests.reference import arrays, fp64

SCORES = ("quadratic", "generalised_quadratic", "learned", "learned_content")
TINY = AttentionConvConfig(width=10, depth=2, heads=3, mlp_dim=14, image_size=8, classes=5, dropout=0.0,
                           attention_dropout=0.0)
SIDE = 6
LAYER = replace(TINY, width=5, image_size=2 * SIDE)


@cache
def setting(scores):
    config = replace(TINY, scores=scores)
    image, = arrays((2, 8, 8, 3), seed=1)
    return config, image, reference.random_params(AttentionConv(config), image)


def abstract_params(config):
    side = config.image_size
    return jax.eval_shape(lambda key, image: AttentionConv(config).init(key, image, train=False)["params"],
                          jax.random.key(0), jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32))


@pytest.mark.parametrize("scores, expected", [
    ("quadratic", 12_086_844), ("generalised_quadratic", 12_086_844 + 6 * 9 * 3), ("learned", 12_278_682),
    ("learned_content", 12_278_682 + 6 * 2 * (400 * 3600 + 3600))])
def test_published_parameter_counts(scores, expected):
    params = abstract_params(AttentionConvConfig(scores=scores, classes=10))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == expected


@pytest.mark.parametrize("scores", SCORES)
def test_forward_is_the_definition(scores):
    config, image, params = setting(scores)
    out = jax.jit(lambda p, x: AttentionConv(config).apply({"params": p}, x, train=False, hidden=True, attention=True))(
        params, image)
    tokens, pooled, logits, hidden, weights = reference.attention_conv(fp64(params), fp64(image), config)
    np.testing.assert_allclose(out.tokens, tokens, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(out.pooled, pooled, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(out.logits, logits, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(out.hidden, hidden, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(out.attention, weights, rtol=1e-3, atol=1e-5)
    differs = np.abs(weights[:, 0] - weights[:, 1]).max() > 1e-3
    assert differs == (scores == "learned_content")


def test_scanned_is_unrolled():
    config, image, params = setting("generalised_quadratic")
    one, other = (jax.jit(lambda p, x, c=c: AttentionConv(c).apply({"params": p}, x, train=False).logits)(params, image)
                  for c in (config, replace(config, scan=False, remat="full")))
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_initial_values():
    """torch's defaults for linear maps, N(0, 1) for tables, the paper's centres and spreads."""
    config = AttentionConvConfig(width=60, depth=2, heads=50, mlp_dim=70, image_size=16, classes=90)
    image = jnp.zeros((1, 16, 16, 3))

    def layers(scores):
        model = AttentionConv(replace(config, scores=scores))
        params = jax.jit(lambda key: model.init(key, image, train=False)["params"])(jax.random.key(0))
        return params, params["encoder"]["blocks"]["attention"]

    def uniform(array, fan_in):
        limit = fan_in**-0.5
        assert np.abs(array).max() <= limit and np.std(array) == pytest.approx(limit / 3**0.5, rel=0.15)

    params, attention = layers("quadratic")
    block = params["encoder"]["blocks"]
    for part, fan_in in ((params["patches"], 12), (attention["out"], 50 * 60), (attention["projection"], 60),
                         (block["mlp"]["up"], 60), (block["mlp"]["down"], 70), (params["head"], 60)):
        uniform(part["kernel"], fan_in)
        uniform(part["bias"], fan_in)
    assert np.std(attention["centers"]) == pytest.approx(2, rel=0.15)
    assert np.std(attention["inverse_spread"]) == pytest.approx(0.01, rel=0.2)
    assert np.mean(attention["inverse_spread"]) == pytest.approx(1, rel=0.01)
    assert not np.array_equal(attention["centers"][0], attention["centers"][1])
    _, attention = layers("generalised_quadratic")
    noise = np.asarray(attention["inverse_spread"]) - np.eye(2)
    assert np.std(noise) == pytest.approx(0.01, rel=0.2) and abs(np.mean(noise)) < 0.003
    _, attention = layers("learned_content")
    assert attention["row_embedding"].shape == (2, 15, 60) and np.std(attention["row_embedding"]) == pytest.approx(
        1, rel=0.1)
    uniform(attention["column_scores"]["kernel"], 60)
    uniform(attention["query"]["kernel"], 60)
    uniform(attention["key"]["bias"], 60)


def test_dropout_of_shared_weights_is_shared():
    config, _, params = setting("quadratic")
    layer = jax.tree.map(lambda leaf: leaf[0], params["encoder"]["blocks"]["attention"])
    x, = arrays((1, 16, 10))
    run = GridAttention(replace(config, attention_dropout=0.5)).apply
    rngs = {"dropout": jax.random.key(3)}
    y, _ = run({"params": layer}, jnp.concatenate([x, x]), train=True, rngs=rngs)
    np.testing.assert_allclose(y[0], y[1], rtol=1e-5, atol=1e-6)
    assert np.abs(y - run({"params": layer}, x, train=False)[0]).max() > 0.1


@pytest.mark.standard_promotion
@pytest.mark.parametrize("scores", ["quadratic", "learned_content"])
def test_bf16(scores):
    config, image, params = setting(scores)
    half = replace(config, dtype="bfloat16")
    out = jax.jit(lambda p, x: AttentionConv(half).apply({"params": p}, x, train=False, attention=True))(params, image)
    assert out.tokens.dtype == jnp.bfloat16 and out.logits.dtype == out.attention.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(abstract_params(half))} == {np.dtype("float32")}
    logits = reference.attention_conv(fp64(params), fp64(image), config)[2]
    np.testing.assert_allclose(out.logits, logits, atol=0.05 * np.abs(logits).max())


@pytest.mark.parametrize("fields, message", [
    ({"image_size": 7}, "image_size is 7; expected a multiple of patch = 2"), ({"heads": 0}, "heads is 0"),
    ({"dropout": 1.0}, "dropout is 1.0"),
    ({"dtype": "float64"}, "dtype is 'float64'; expected float32 or bfloat16")])
def test_config_refuses(fields, message):
    with pytest.raises(ConfigError, match=message):
        replace(TINY, **fields)


def test_refuses_images_of_another_size():
    config, _, params = setting("quadratic")
    with pytest.raises(ValueError, match="images are 6 x 8; expected 8 x 8"):
        AttentionConv(config).apply({"params": params}, jnp.zeros((1, 6, 8, 3)), train=False)


class Variants(chex.TestCase):
    """The same numbers with jit, without, and under pmap."""

    def check(self):
        config, image, params = setting("learned_content")
        run = self.variant(lambda p, x: AttentionConv(config).apply({"params": p}, x, train=False).logits, n_devices=2)
        expected = reference.attention_conv(fp64(params), fp64(image), config)[2]
        np.testing.assert_allclose(run(params, image), expected, rtol=1e-3, atol=1e-4)

    @chex.variants(with_jit=True, with_pmap=True)
    def test_attention_conv(self):
        self.check()


@pytest.mark.long
class Eager(Variants):
    """Without jit, one operation after the other."""

    @chex.variants(without_jit=True)
    def test_attention_conv(self):
        self.check()


# Theorem 1: a layer is a convolution

def layer(heads):
    return GridAttention(replace(LAYER, heads=heads))


@partial(jax.jit, static_argnums=0)
def attend(heads, params, x):
    b, side, _, c = x.shape
    return layer(heads).apply({"params": params}, x.reshape(b, side * side, c), train=False)[0].reshape(
        b, side, side, -1)


def convolution(kernel, bias, x, dilation=1, mode="edge"):
    """The definition, in numpy: the sum over the kernel's positions of the image moved by their offsets."""
    rows, columns = kernel.shape[:2]
    before = [dilation * ((size - 1) // 2) for size in (rows, columns)]
    after = [dilation * (size - 1) - start for size, start in zip((rows, columns), before, strict=True)]
    padded = np.pad(x, ((0, 0), (before[0], after[0]), (before[1], after[1]), (0, 0)), mode=mode)
    return bias + sum(padded[:, i * dilation:i * dilation + SIDE, j * dilation:j * dilation + SIDE] @ kernel[i, j]
                      for i, j in np.ndindex(rows, columns))


@cache
def example(shape):
    """A kernel [rows columns 3 5], a bias and images of 3 channels, whose convolution has values of about 1."""
    kernel, bias, x = arrays((*shape, 3, 5), (5,), (2, SIDE, SIDE, 3), seed=sum(shape))
    return kernel * (3 * shape[0] * shape[1])**-0.5, bias, x


@pytest.mark.parametrize("shape, dilation", [((3, 3), 1), ((3, 3), 2), ((2, 2), 1), ((1, 1), 1), ((2, 3), 1)])
def test_a_layer_is_a_convolution(shape, dilation):
    """With edge padding everywhere; with zero padding (XLA's SAME) where the kernel is inside, and only there."""
    kernel, bias, x = example(shape)
    heads, dilations = shape[0] * shape[1], (dilation, dilation)
    out = attend(heads, convolution_params(kernel, bias, dilation=dilation), x)
    np.testing.assert_allclose(out, convolution(*map(fp64, (kernel, bias, x)), dilation), rtol=0, atol=1e-6)
    same = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", rhs_dilation=dilations,
                                        dimension_numbers=("NHWC", "HWIO", "NHWC")) + bias[None, None, None]
    inside = slice(dilation, SIDE - dilation)
    np.testing.assert_allclose(out[:, inside, inside], same[:, inside, inside], rtol=0, atol=1e-6)
    assert heads == 1 or np.abs(out - same).max() > 0.1


def test_heads_in_another_order_are_another_convolution():
    kernel, bias, x = example((3, 3))
    params = convolution_params(kernel, bias)
    wrong = attend(9, params | {"centers": params["centers"][::-1]}, x)
    assert np.abs(wrong - convolution(*map(fp64, (kernel, bias, x)))).max() > 1
    np.testing.assert_allclose(wrong, convolution(*map(fp64, (kernel[::-1, ::-1], bias, x))), rtol=0, atol=1e-6)


def test_gradients_are_those_of_the_convolution():
    kernel, bias, x = example((3, 3))
    weight, = arrays((2, SIDE, SIDE, 5), seed=9)

    def by_attention(kernel, bias, x):
        return (weight * attend(9, convolution_params(kernel, bias), x)).sum()

    def by_convolution(kernel, bias, x):
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
        y = jax.lax.conv_general_dilated(padded, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return (weight * (y + bias[None, None, None])).sum()

    ours, theirs = (jax.jit(jax.grad(f, (0, 1, 2)))(kernel, bias, x) for f in (by_attention, by_convolution))
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-5)


def test_the_error_falls_exponentially():
    """At an inner patch 4 exp(-sharpness / 2) of the attention goes to the four neighbours, to first order."""
    kernel, bias, x = example((3, 3))
    exact = convolution(*map(fp64, (kernel, bias, x)))
    sharpness = np.array([10.0, 14.0, 18.0, 22.0])
    errors = [np.abs(attend(9, convolution_params(kernel, bias, sharpness=value), x) - exact).max()
              for value in sharpness]
    slope = np.polyfit(sharpness, np.log(errors), 1)[0]
    assert slope == pytest.approx(-0.5, abs=0.01)


def test_one_layer_of_a_model_is_set():
    """Follow the docstring; the other layer stays."""
    params = setting("quadratic")[2]
    kernel, bias = arrays((1, 3, 10, 10), (10,))
    blocks = params["encoder"]["blocks"]["attention"]
    changed = jax.tree.map(lambda old, new: old.at[1].set(new), blocks, convolution_params(kernel, bias))
    assert jax.tree.map(jnp.shape, changed) == jax.tree.map(jnp.shape, blocks)
    np.testing.assert_array_equal(changed["centers"][1], [[0, -1], [0, 0], [0, 1]])
    np.testing.assert_array_equal(changed["out"]["kernel"][0], blocks["out"]["kernel"][0])


@pytest.mark.standard_promotion
def test_training_finds_the_nine_offsets():
    """Gradient descent from the paper's initial values to random convolutions: each head ends at its own neighbour.

    Six of eight starts did; in the others two heads share one.
    """
    layer, steps, starts, side, c = GridAttention(replace(LAYER, width=4, heads=9)), 1500, 3, SIDE, 4
    tx = optax.chain(optax.adam(optax.cosine_decay_schedule(0.02, steps)), optax.stateless(
        lambda updates, _: updates | {name: 5 * updates[name] for name in ("centers", "inverse_spread")}))

    def loss(params, x, kernel):
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
        y = jax.lax.conv_general_dilated(padded, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        out = layer.apply({"params": params}, x.reshape(len(x), side * side, c), train=False)[0]
        return jnp.square(out - y.reshape(out.shape)).mean()

    @jax.jit
    @jax.vmap
    def train(key):
        first, second, drawing = jax.random.split(key, 3)
        kernel = jax.random.normal(first, (3, 3, c, c))
        params = layer.init(second, jnp.zeros((1, side * side, c)), train=False)["params"]

        def step(state, key):
            params, optimizer = state
            value, gradients = jax.value_and_grad(loss)(params, jax.random.normal(key, (16, side, side, c)), kernel)
            updates, optimizer = tx.update(gradients, optimizer, params)
            return (optax.apply_updates(params, updates), optimizer), value

        (trained, _), losses = jax.lax.scan(step, (params, tx.init(params)), jax.random.split(drawing, steps))
        return params["centers"], trained["centers"], losses[-1] / losses[0]

    def finds(centers):
        return [sorted(np.round(one).tolist()) == neighbours for one in np.asarray(centers)]

    neighbours = [[row, column] for row in (-1, 0, 1) for column in (-1, 0, 1)]
    before, after, left = train(jax.vmap(jax.random.key)(jnp.arange(starts)))
    assert not any(finds(before)) and sum(finds(after)) >= starts - 1
    assert sorted(left)[-2] < 1e-5
