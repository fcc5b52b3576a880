"""The precision of scores, sums, logits and losses: fp32 or wider."""

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Num


def wide(dtype: DTypeLike) -> jnp.dtype:
    """Return the type for scores, sums, logits and losses of `dtype`: fp32, or `dtype` if that is wider."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def widened(x: Num[Array, "*b"]) -> Num[Array, "*b"]:
    """Cast `x` to fp32 unless it is wider already."""
    return x.astype(wide(x.dtype))
