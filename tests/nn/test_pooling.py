import jax
import numpy as np
import pytest

from jaxmm.nn.pooling import MapHead
from jaxmm.nn.transformer import TransformerConfig
from tests import reference
from tests.reference import arrays, fp64

CONFIG = TransformerConfig(width=12, depth=1, heads=3, mlp_dim=20, activation="gelu_tanh")


def run(params, tokens, mask=None):
    return jax.jit(lambda p, x: MapHead(CONFIG).apply({"params": p}, x, mask, train=False))(params, tokens)


@pytest.mark.parametrize("masked", [False, True])
def test_map_head(masked):
    tokens, = arrays((2, 5, 12))
    params = reference.random_params(MapHead(CONFIG), tokens)
    mask = np.arange(5) < np.array([[5], [2]]) if masked else None
    mask = mask[:, None, None, :] if masked else None
    expected = reference.map_head(fp64(params), fp64(tokens), CONFIG, mask)
    np.testing.assert_allclose(run(params, tokens, None if mask is None else jax.numpy.asarray(mask)), expected,
                               rtol=1e-4, atol=1e-5)


def test_order_of_tokens_does_not_matter():
    tokens, = arrays((2, 5, 12))
    params = reference.random_params(MapHead(CONFIG), tokens)
    np.testing.assert_allclose(run(params, tokens), run(params, tokens[:, ::-1]), rtol=1e-4, atol=1e-5)
