import os
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

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


@pytest.fixture
def program_cache(tmp_path):
    """An empty cache of compiled programs, in use while the test runs."""
    names = {"jax_compilation_cache_dir": str(tmp_path / "programs"), "jax_persistent_cache_min_compile_time_secs": 0.0,
             "jax_persistent_cache_min_entry_size_bytes": -1}
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in names.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield tmp_path / "programs"
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def compute(x):
    """Run a program that this process has not compiled yet, as a new start does."""
    def damaged_entry_program(x):
        return jnp.sin(x) @ x.T

    return np.asarray(jax.jit(damaged_entry_program)(x))


def entries(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*-cache")}


@pytest.mark.parametrize("damage", [
    lambda data: b"", lambda data: data[:100], lambda data: data[:-1], lambda data: b"not a program" * 50,
    lambda data: zlib.compress(b"\0" * 4 + b"no executable" * 50), lambda data: bytes(len(data))],
    ids=["empty", "short", "without its last byte", "garbage", "of another program", "zeros"])
def test_a_damaged_entry_of_the_cache_is_compiled_again_with_a_warning(damage, program_cache):
    """JAX survives it: the numbers are the same. It leaves the entry as it is. Asked to, it raises instead."""
    x = jnp.arange(12.0).reshape(3, 4) / 7
    want = compute(x)
    (name, good), = [(name, data) for name, data in entries(program_cache).items() if "damaged_entry" in name]
    with warnings.catch_warnings(action="error"):
        np.testing.assert_array_equal(compute(x), want)             # read from the cache
    (program_cache / name).write_bytes(damage(good))
    expected = "Error reading persistent compilation cache entry for 'jit_damaged_entry_program'"
    with pytest.warns(UserWarning, match=expected):
        np.testing.assert_array_equal(compute(x), want)
    assert entries(program_cache)[name] == damage(good)
    jax.config.update("jax_raise_persistent_cache_errors", True)
    try:
        with pytest.raises(Exception):  # noqa: B017  (of zlib, zstandard or XLA)
            compute(x)
    finally:
        jax.config.update("jax_raise_persistent_cache_errors", False)
    (program_cache / name).unlink()
    np.testing.assert_array_equal(compute(x), want)
    assert name in entries(program_cache)


SHARE = """
import jax.numpy as jnp
from tests.test_compiling import compute
print(compute(jnp.arange(12.0).reshape(3, 4) / 7).tobytes().hex())
"""


@pytest.mark.long
def test_two_processes_share_a_cache(program_cache):
    """They begin at once with an empty one, get the same numbers, and this process reads what they wrote."""
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(program_cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1", "PYTHONPATH": str(Path(__file__).parents[1])}
    started = [subprocess.Popen([sys.executable, "-c", SHARE], env=environment, text=True,
                                stdout=subprocess.PIPE) for _ in range(2)]
    printed = [process.communicate()[0].strip() for process in started]
    x = jnp.arange(12.0).reshape(3, 4) / 7
    written = entries(program_cache)
    assert sum("damaged_entry" in name for name in written) == 1
    assert [*printed, compute(x).tobytes().hex()] == [printed[0]] * 3 and printed[0]
    assert {name: data for name, data in entries(program_cache).items() if "damaged_entry" in name} == {
        name: data for name, data in written.items() if "damaged_entry" in name}
