"""Where half precision stops."""

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Num


def wide(dtype: DTypeLike) -> jnp.dtype:
    """The type in which scores, sums, logits and losses of `dtype` are computed: fp32, or `dtype` where it is wider."""
    return jnp.promote_types(dtype, jnp.float32)


def widened(x: Num[Array, "*b"]) -> Num[Array, "*b"]:
    """`x` in fp32, or as it is where that is wider."""
    return x.astype(wide(x.dtype))
