import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmm import compiling
from jaxmm.compiling import compile_prediction, jit_options, largest_matrix
from jaxmm.config import MeshConfig
from jaxmm.sharding import make_mesh


def test_large_matrices_on_cpu_get_other_kernels_if_this_jaxlib_knows_them():
    assert jit_options("cpu") == jit_options("cpu", 2**18 + 1) == compiling.LARGE_MATRICES
    compiling._accepted.cache_clear()
    with jax.set_mesh(make_mesh(MeshConfig())), jax.transfer_guard("disallow"):      # as inside a run
        assert jit_options("cpu") == compiling.LARGE_MATRICES
    assert jit_options("cpu", 2**18) is jit_options("tpu") is jit_options("gpu", 2**30) is None


@pytest.mark.parametrize("options", [{"xla_cpu_option_of_tomorrow": "X"},
                                     {"xla_cpu_experimental_ynn_fusion_type": "TYPE_OF_TOMORROW"}], ids=str)
def test_programs_compile_without_options_that_this_jaxlib_does_not_know(options, monkeypatch):
    monkeypatch.setattr(compiling, "LARGE_MATRICES", options)
    assert jit_options("cpu") is None
    np.testing.assert_array_equal(compile_prediction(lambda x: x @ x, None)(2 * jnp.eye(3)), 4 * jnp.eye(3))


def test_largest_matrix_is_that_of_one_layer():
    shapes = {"vision": {"encoder": {"blocks": {"kernel": (12, 4, 5), "bias": (12, 999)}}}, "head": {"kernel": (3, 6)}}
    params = jax.tree.map(lambda shape: jax.ShapeDtypeStruct(shape, "float32"), shapes,
                          is_leaf=lambda node: isinstance(node, tuple))
    assert largest_matrix(params) == 20
    assert largest_matrix(params["vision"]["encoder"]) == 20          # the stack may be the root
    assert largest_matrix({"blocks_of": {"kernel": jnp.zeros((2, 2))}}) == 4
