"""Compile functions with jit: options per platform, and the cache of compiled programs."""

import os
import stat
from collections.abc import Callable
from pathlib import Path

import jax
from jax.sharding import Mesh

from jaxmm.config import ConfigError
from jaxmm.sharding import named_leaves, replicated
from jaxmm.training.runtime import log

SMALL = 2**18
"""Numbers in a small matrix, at most."""


def jit_options(platform: str, largest: int | None = None) -> dict[str, str] | None:
    """What `jax.jit` is told on `platform`, for a model whose largest matrix has `largest` numbers (None: many).

    On CPU, XLA's newer library of kernels multiplies large matrices a fifth slower than the one before it, and small
    ones half as fast again (jaxlib 0.10 and 0.12, AMD Zen 4, widths 768 and 128): where matrices are large it is left
    the reductions, which it does better.
    """
    if platform != "cpu" or (largest is not None and largest <= SMALL):
        return None
    return {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}


def largest_matrix(params) -> int:
    """How many numbers the largest matrix of one layer has."""
    return max((leaf.size // (leaf.shape[0] if "blocks/" in path else 1) for path, leaf in named_leaves(params)
                if path.endswith("kernel")), default=0)


def compile_prediction(predict: Callable, mesh: Mesh | None, *, whole: bool = True, few: bool = False) -> Callable:
    """`predict` as a jitted function on `mesh` (None: the default device).

    Every host holds its results `whole`, or they lie as they were computed. `few`: what its matrices multiply has few
    rows, as a decoder's newest tokens do, for which CPU has kernels that are twice as fast.
    """
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    return jax.jit(predict, out_shardings=replicated(mesh) if whole and mesh is not None else None,
                   compiler_options=None if few else jit_options(platform))


def cache_folder() -> Path:
    """Where jaxmm keeps what it can make again: jaxmm in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxmm"


def use_compilation_cache(folder: Path | None = None) -> None:
    """Keeps compiled programs in `folder`, so that the next start is fast; None: jaxmm/xla in the user's cache.

    Whoever can write there can run code as this user: a folder that others may write is refused with `ConfigError`.
    Without one that can be made and written, programs are compiled each time, with a warning.
    """
    folder = cache_folder() / "xla" if folder is None else folder
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = folder.stat()
    except OSError as error:
        log.warning("compiled programs are not kept: %s", error)
        return
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) or (hasattr(os, "getuid") and status.st_uid != os.getuid()):
        raise ConfigError(f"the compilation cache {folder} can be written by others; wanted a folder that only you "
                          "can write (chmod 700)")
    jax.config.update("jax_compilation_cache_dir", str(folder))
