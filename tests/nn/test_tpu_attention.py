"""The interpreted kernels equal `attend`; what they do not support is left to XLA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmm.config import MeshConfig
from jaxmm.nn.attention import attend, causal_mask, fused_attend
from jaxmm.nn.tpu_attention import attention, gradients, heads_at_once, is_supported
from jaxmm.sharding import make_mesh
from tests.reference import arrays

B, T, S, H, K = 4, 9, 11, 2, 16
SEEN = np.random.default_rng(0).random((B, 1, T, S)) > 0.3
MASKS = {"none": None, "texts": SEEN[:, :, :1], "one for all": SEEN[:1], "each its own": SEEN}


def inputs(t=T, s=S):
    return arrays((B, t, H, K), (B, s, H, K), (B, s, H, K), (B, t, H, K))


def plain(query, key, value, gradient, mask):
    out, pull = jax.vjp(lambda *x: attend(*x, mask)[0], query, key, value)
    return out, *pull(gradient)


def kernels(query, key, value, gradient, mask):
    return (attention(query, key, value, mask, interpret=True),
            *gradients(query, key, value, gradient, mask, interpret=True))


@pytest.mark.parametrize("mask", MASKS)
def test_kernels_are_attention(mask):
    mask = None if MASKS[mask] is None else jnp.asarray(MASKS[mask])
    for one, other in zip(kernels(*inputs(), mask), plain(*inputs(), mask), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6)


def test_causal_rows_and_bf16():
    values = [x.astype(jnp.bfloat16) for x in inputs(t=S)]
    for one, other in zip(kernels(*values, causal_mask(S)), plain(*values, causal_mask(S)), strict=True):
        assert one.dtype == jnp.bfloat16
        np.testing.assert_allclose(one.astype(jnp.float32), other.astype(jnp.float32), atol=0.04)


def test_images_and_heads_are_sharded_over_the_devices():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    mask = jnp.asarray(SEEN)
    expected = plain(*inputs(), mask)
    with jax.set_mesh(mesh):
        sharded = jax.jit(kernels)(*inputs(), mask)
    for one, other in zip(sharded, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6)
        assert one.addressable_shards[0].data.size * 8 == one.size


def test_some_heads_at_a_time_if_memory_is_short():
    assert heads_at_once(257, 257, 16, 64, 2) == 16
    count = heads_at_once(577, 577, 12, 64, 2)
    assert 0 < count < 12 and count * 64 % 128 == 0
    assert heads_at_once(2048, 2048, 12, 64, 2) == 0


def test_an_image_in_parts():
    """Heads of 64, two at a time, since twelve do not fit."""
    query, key, value, gradient = arrays(*[(1, 577, 4, 64)] * 4)
    assert heads_at_once(577, 577, 4, 64, 4) == 2
    for one, other in zip(kernels(query, key, value, gradient, None), plain(query, key, value, gradient, None),
                          strict=True):
        np.testing.assert_allclose(one, other, atol=5e-6)


def test_what_is_not_supported():
    query, key, *_ = inputs()
    assert is_supported(query, key, None) and is_supported(query, key, jnp.asarray(SEEN))
    assert not is_supported(query, key, jnp.ones((1, H, 1, S), bool))
    long = jnp.zeros((1, 4096, 1, 64))
    assert not is_supported(long, long, None)
    with jax.set_mesh(make_mesh(MeshConfig(data=8))):
        assert not is_supported(query, key, None)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, tensor=4))):
        assert not is_supported(query, key, None)


def test_other_platforms_do_without():
    query, key, value, _ = inputs()
    text = jax.jit(fused_attend).lower(query, key, value).compile().as_text()
    assert "dot" in text and "conditional" not in text and "tpu_custom_call" not in text
