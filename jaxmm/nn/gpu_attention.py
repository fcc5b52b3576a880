"""Attention on NVIDIA GPUs by cuDNN's kernels, which do not write the scores to memory (FlashAttention, Dao et al.
2022).

In training cuDNN needs an even number of tokens; a class token makes it odd. Padding by one masked token costs less
than writing the scores.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmm.sharding import TOKENS, divides_mesh, on_each_device, platform

MAX_HEAD_DIM, HEAD_DIM_MULTIPLE = 128, 8
"""Largest head dimension that cuDNN takes, and its divisor."""


def is_supported(query: Float[Array, "b t h k"], mask: Array | None) -> bool:
    """Return whether cuDNN can compute this attention on the present GPUs: 16-bit inputs, Ampere or newer, no mask
    (only text has one, and text is short), and batch and heads divisible by the current mesh."""
    b, _, heads, width = query.shape
    fits = query.dtype.itemsize == 2 and mask is None and width <= MAX_HEAD_DIM and width % HEAD_DIM_MULTIPLE == 0
    return fits and divides_mesh(b, heads) and platform() == "gpu" and _ampere()


def _ampere() -> bool:
    capability = getattr(jax.local_devices()[0], "compute_capability", "").replace(".", "")  # "gfx942" of AMD's
    return capability.isdigit() and int(capability) >= 80


def attention(
    query: Float[Array, "b t h k"], key: Float[Array, "b s h k"], value: Float[Array, "b s h k"], *,
    implementation: str = "cudnn",
) -> Float[Array, "b t h k"]:
    """Return the output of `attend`. `implementation="xla"` runs on every platform."""
    return on_each_device(partial(_pad_to_even, implementation), TOKENS, TOKENS)(query, key, value)


def _pad_to_even(implementation, query, key, value):
    """Attend with queries, keys and values padded to an even number of tokens."""
    b, t, s = *query.shape[:2], key.shape[1]
    if s % 2 == t % 2 == 0:
        return jax.nn.dot_product_attention(query, key, value, implementation=implementation)
    padded = (jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (query, key, value))
    return jax.nn.dot_product_attention(*padded, query_seq_lengths=jnp.full(b, t), key_value_seq_lengths=jnp.full(b, s),
                                        implementation=implementation)[:, :t]
