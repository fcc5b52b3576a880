import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmm.nn.attention import Attention, attend, causal_mask, fused_attend
from tests import reference
from tests.reference import arrays, fp64

B, T, S, H, K = 2, 5, 7, 3, 4


def masks(t, s):
    rng = np.random.default_rng(9)
    sparse = rng.random((B, H, t, s)) < 0.5
    sparse[..., 0] = True  # a query that sees nothing has no softmax
    padding = np.arange(s) < np.array([s, 3])[:, None]
    return {"none": None, "each": sparse, "padding": padding[:, None, None, :], "one query": sparse[:, :1, :1]}


@pytest.mark.parametrize("name", ["none", "each", "padding", "one query"])
def test_attend_is_the_definition(name):
    mask = masks(T, S)[name]
    query, key, value = arrays((B, T, H, K), (B, S, H, K), (B, S, H, K))
    out, weights = jax.jit(attend)(query, key, value, mask)
    expected, expected_weights = reference.attend(*fp64((query, key, value)), mask)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(weights, expected_weights, rtol=1e-5, atol=1e-6)
    if mask is not None:
        assert (np.asarray(weights)[~np.broadcast_to(mask, weights.shape)] == 0).all()


@pytest.mark.parametrize("name", ["none", "each", "padding", "one query"])
def test_fused_attend_is_attend(name):
    """Values and the gradients of all three, which are written by hand."""
    mask = None if name == "none" else jnp.asarray(masks(T, S)[name])
    inputs = arrays((B, T, H, K), (B, S, H, K), (B, S, H, K), seed=5)
    direction, = arrays((B, T, H, K), seed=6)

    def both(function):
        return jax.jit(jax.value_and_grad(lambda *x: (function(*x) * direction).sum(), (0, 1, 2)))(*inputs)

    value, grads = both(lambda *x: fused_attend(*x, mask))
    expected, expected_grads = both(lambda *x: attend(*x, mask)[0])
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(grad, wanted, rtol=1e-5, atol=1e-6)


def test_fused_attend_in_bf16_is_near():
    inputs = arrays((B, T, H, K), (B, S, H, K), (B, S, H, K), seed=5)

    def grads(dtype):
        return jax.grad(lambda *x: (fused_attend(*x).astype(jnp.float32) ** 2).sum(), (0, 1, 2))(
            *(jnp.asarray(x, dtype) for x in inputs))

    for low, high in zip(grads(jnp.bfloat16), grads(jnp.float32), strict=True):
        assert low.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(low, np.float32), high, atol=0.03 * np.abs(high).max())


def test_causal_mask():
    expected = [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert causal_mask(3).dtype == bool
    np.testing.assert_array_equal(causal_mask(3), np.array(expected, bool)[None, None])


def test_gradient_is_that_of_the_definition():
    """Finite differences of the numpy version, in every direction at once."""
    query, key, value, direction = arrays((B, T, H, K), (B, T, H, K), (B, T, H, K), (B, T, H, K), seed=3)
    mask = causal_mask(T)

    def ours(query, key, value):
        return (attend(query, key, value, mask)[0] * direction).sum()

    def theirs(arguments):
        return (reference.attend(*arguments, mask)[0] * fp64(direction)).sum()

    grads = jax.jit(jax.grad(ours, (0, 1, 2)))(query, key, value)
    arguments = fp64([query, key, value])
    for i, grad in enumerate(grads):
        step = fp64(arrays(arguments[i].shape, seed=10 + i)[0])
        h = 1e-5
        up, down = (theirs([x + sign * h * step * (i == j) for j, x in enumerate(arguments)]) for sign in (1, -1))
        np.testing.assert_allclose((fp64(grad) * step).sum(), (up - down) / (2 * h), rtol=1e-4)


@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_bf16_scores_and_softmax_are_fp32(scale):
    """Only the rounding of the inputs is seen in the weights, also where bf16 scores would tell nothing apart."""
    query, key, value = (jnp.asarray(x, jnp.bfloat16)
                         for x in arrays((B, T, H, K), (B, S, H, K), (B, S, H, K), scale=scale))
    mask = masks(T, S)["padding"]
    out, weights = jax.jit(attend)(query, key, value, mask)
    exact = fp64([query, key, value])
    expected, expected_weights = reference.attend(*exact, mask)
    assert weights.dtype == jnp.float32 and out.dtype == jnp.bfloat16
    np.testing.assert_allclose(weights, expected_weights, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, rtol=0.02, atol=0.02 * scale)


def test_dropout_zeroes_its_share_and_keeps_the_mean():
    b, t, s, rate = 64, 5, 7, 0.25
    query, key = arrays((b, t, 1, K), (b, s, 1, K), seed=4)
    value = jnp.broadcast_to(jnp.eye(s)[None, :, None], (b, s, 1, s))  # reads out the weights
    query, key = (jnp.pad(x, ((0, 0),) * 3 + ((0, s - K),)) for x in (query, key))
    used, weights = jax.jit(lambda rng: attend(query, key, value, dropout=rate, rng=rng))(jax.random.key(0))
    used, weights = np.asarray(used)[:, :, 0], np.asarray(weights)[:, 0]
    dropped = used == 0
    assert abs(dropped.mean() - rate) < 4 * np.sqrt(rate * (1 - rate) / dropped.size)
    np.testing.assert_allclose(used[~dropped], weights[~dropped] / (1 - rate), rtol=1e-5)
    kept, _ = attend(query, key, value, dropout=rate)
    np.testing.assert_allclose(np.asarray(kept)[:, :, 0], weights, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("cross", [False, True])
def test_module(cross):
    d, c = H * K, 11
    x, context = arrays((B, T, d), (B, S, c))
    context = context if cross else x
    module = Attention(H * K, H)
    params = reference.random_params(module, x, context)
    mask = None if cross else causal_mask(T)
    out, weights = jax.jit(lambda p: module.apply({"params": p}, x, context, mask, train=True, weights=True))(params)
    expected, expected_weights = reference.attention(fp64(params), fp64(x), fp64(context), mask)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(weights, expected_weights, rtol=1e-4, atol=1e-6)
    assert params["query"]["kernel"].shape == (d, H, K) and params["out"]["kernel"].shape == (H, K, d)
    assert params["key"]["kernel"].shape == (c if cross else d, H, K)


def test_module_drops_weights_only_in_training():
    x, = arrays((B, T, H * K))
    module = Attention(H * K, H, dropout=0.5)
    params = reference.random_params(module, x, x)
    run = jax.jit(lambda p, rng, train: module.apply({"params": p}, x, x, train=train, rngs={"dropout": rng})[0],
                  static_argnums=2)
    still = run(params, jax.random.key(0), False)
    np.testing.assert_array_equal(still, run(params, jax.random.key(1), False))
    first, second = (run(params, jax.random.key(i), True) for i in range(2))
    assert not np.allclose(first, second) and not np.allclose(first, still)
