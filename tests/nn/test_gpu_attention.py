"""cuDNN's attention equals `attend`, computed here without a GPU, and compiles for several GPUs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmm.config import MeshConfig
from jaxmm.nn.attention import attend, causal_mask
from jaxmm.nn.gpu_attention import attention, is_supported
from jaxmm.sharding import make_mesh


def inputs(t=7, s=5, dtype=jnp.float32, b=4):
    keys = jax.random.split(jax.random.key(0), 3)
    return tuple(jax.random.normal(key, (b, n, 2, 8), dtype) for key, n in zip(keys, (t, s, s), strict=True))


@pytest.mark.parametrize("t, s", [(7, 7), (6, 4), (6, 5), (7, 4)])
def test_it_is_attend(t, s):
    def both(f):
        return jax.value_and_grad(lambda *x: (f(*x) ** 2).sum(), (0, 1, 2))(*inputs(t, s))

    got, expected = both(lambda *x: attention(*x, implementation="xla")), both(lambda *x: attend(*x)[0])
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_what_is_supported(monkeypatch):
    monkeypatch.setattr("jaxmm.nn.gpu_attention.platform", lambda: "gpu")
    half = inputs(dtype=jnp.bfloat16)[0]
    assert not is_supported(half, None)             # there is no GPU
    monkeypatch.setattr("jaxmm.nn.gpu_attention._ampere", lambda: True)
    assert is_supported(half, None)
    assert not is_supported(half, causal_mask(7))
    assert not is_supported(half.astype(jnp.float32), None)
    assert not is_supported(half[..., :6], None)
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:8])):
        assert not is_supported(half, None)         # 4 images, 8 devices


def test_each_gpu_attends_to_its_images(monkeypatch):
    """On 4 devices each computes its own images and heads, padded to an even number of tokens, and all agree."""
    calls, dot_product_attention = set(), jax.nn.dot_product_attention

    def cudnn(query, key, value, *, implementation, **lengths):
        calls.add((query.shape, key.shape, value.shape, implementation))
        return dot_product_attention(query, key, value, implementation="xla", **lengths)

    def gradients(f):
        return jax.jit(jax.grad(lambda *x: (f(*x) ** 2).sum(), (0, 1, 2)))(*inputs())

    monkeypatch.setattr(jax.nn, "dot_product_attention", cudnn)
    with jax.set_mesh(make_mesh(MeshConfig(tensor=2), jax.devices()[:4])):
        got = gradients(attention)
    assert calls == {((2, 8, 1, 8), (2, 6, 1, 8), (2, 6, 1, 8), "cudnn")}
    for a, b in zip(got, gradients(lambda *x: attend(*x)[0]), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
