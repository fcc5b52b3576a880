"""Attention on NVIDIA GPUs by cuDNN's kernels, which write no scores (FlashAttention, Dao et al. 2022).

cuDNN asks for even numbers of tokens in training; a class token makes them odd. One token more, that nobody looks at,
costs less than the scores do.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmm.sharding import TOKENS, divides_mesh, on_each_device, platform

WIDEST, MULTIPLE = 128, 8
"""What a head may measure."""


def is_supported(query: Float[Array, "b t h k"], mask: Array | None) -> bool:
    """Whether cuDNN can do it on the GPUs at hand: two bytes a number, an Ampere or newer, no mask, which texts have
    and are short, and shares for all devices of the current mesh."""
    b, _, heads, width = query.shape
    fits = query.dtype.itemsize == 2 and mask is None and width <= WIDEST and width % MULTIPLE == 0
    return fits and divides_mesh(b, heads) and platform() == "gpu" and _ampere()


def _ampere() -> bool:
    capability = getattr(jax.local_devices()[0], "compute_capability", "").replace(".", "")  # "gfx942" of AMD's
    return capability.isdigit() and int(capability) >= 80


def attention(
    query: Float[Array, "b t h k"], key: Float[Array, "b s h k"], value: Float[Array, "b s h k"], *,
    implementation: str = "cudnn",
) -> Float[Array, "b t h k"]:
    """What `attend` gives. `implementation` "xla" computes it anywhere."""
    return on_each_device(partial(_even, implementation), TOKENS, TOKENS)(query, key, value)


def _even(implementation, query, key, value):
    """Of tokens filled up to an even number."""
    b, t, s = *query.shape[:2], key.shape[1]
    if s % 2 == t % 2 == 0:
        return jax.nn.dot_product_attention(query, key, value, implementation=implementation)
    filled = (jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (query, key, value))
    return jax.nn.dot_product_attention(*filled, query_seq_lengths=jnp.full(b, t), key_value_seq_lengths=jnp.full(b, s),
                                        implementation=implementation)[:, :t]
