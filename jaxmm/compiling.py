"""Compile functions with jit: options per platform, and the cache of compiled programs."""

import functools
import logging
import os
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
from jax.sharding import Mesh

from jaxmm.paths import is_bucket
from jaxmm.sharding import layer_stack, named_leaves, replicated
from jaxmm.user_cache import cache_folder
from jaxmm.validation import ConfigError

log = logging.getLogger(__name__)

SMALL = 2**18
"""Largest number of elements of a small matrix."""
LARGE_MATRICES = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}
"""Options of jaxlib 0.10 and 0.12 for programs on CPU with large matrices."""


def jit_options(platform: str, largest: int | None = None) -> dict[str, str] | None:
    """Return the compiler options on `platform` for a model whose largest matrix has `largest` elements (None: many).

    On CPU, XLA's newer library of kernels multiplies large matrices a fifth slower than the one before it, and small
    ones half as fast again (jaxlib 0.10 and 0.12, AMD Zen 4, widths 768 and 128). If matrices are large it gets only
    the reductions, which it does better.
    """
    if platform != "cpu" or (largest is not None and largest <= SMALL):
        return None
    return LARGE_MATRICES if _accepted(tuple(LARGE_MATRICES.items())) else None


@functools.cache
def _accepted(options: tuple[tuple[str, str], ...]) -> bool:
    """Return whether the CPU compiler of this jaxlib knows `options`, which are experimental."""
    device = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    probe = jax.jit(lambda: jax.numpy.zeros(()), out_shardings=device, compiler_options=dict(options))
    try:
        with ThreadPoolExecutor(1) as outside:  # a thread has neither the mesh nor the guards of its caller
            outside.submit(lambda: probe.lower().compile()).result()
    except jax.errors.JaxRuntimeError as error:
        log.info("programs are compiled without %s: %s", dict(options), error)
        return False
    return True


def largest_matrix(params) -> int:
    """Return the number of elements of the largest matrix of one layer."""
    return max((leaf.size // (leaf.shape[0] if layer_stack(path) else 1) for path, leaf in named_leaves(params)
                if path.endswith("kernel")), default=0)


def compile_prediction(
    predict: Callable, mesh: Mesh | None, *, replicate_outputs: bool = True, small_matmuls: bool = False,
) -> Callable:
    """Return `predict` as a jitted function on `mesh` (None: the default device).

    With `replicate_outputs` every host gets all of the results; else they stay where they were computed. With
    `small_matmuls`, for matrices with few rows, such as a decoder's newest tokens, CPU uses faster kernels.
    """
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    return jax.jit(predict, out_shardings=replicated(mesh) if replicate_outputs and mesh is not None else None,
                   compiler_options=None if small_matmuls else jit_options(platform))


def use_compilation_cache(folder: Path | None = None) -> None:
    """Keep compiled programs in `folder`, so that the next start is fast; None: jaxmm/xla in the user's cache.

    Whoever can write there can run code as this user: a folder that others may write raises `ConfigError`. If the
    folder cannot be made, programs are compiled each time, with a warning.
    """
    folder = cache_folder() / "xla" if folder is None else folder
    if is_bucket(folder):  # JAX reads and writes it, and the owner of the bucket says who may
        jax.config.update("jax_compilation_cache_dir", str(folder))
        return
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = folder.stat()
    except OSError as error:
        log.warning("compiled programs are not kept: %s", error)
        return
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) or (hasattr(os, "getuid") and status.st_uid != os.getuid()):
        raise ConfigError(f"the compilation cache {folder} can be written by others; expected a folder that only you "
                          "can write (chmod 700)")
    jax.config.update("jax_compilation_cache_dir", str(folder))
