"""Scaled dot-product attention (Vaswani et al. 2017, eq. 1): a pure function, and the module that projects into it."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Key

Initializer = Callable[..., Array]
Mask = Bool[Array, "#b #h #t #s"]


def causal_mask(length: int) -> Bool[Array, "1 1 t t"]:
    """True where a token may look: at itself and at what comes before it."""
    return jnp.tril(jnp.ones((1, 1, length, length), bool))


def attention_weights(
    query: Float[Array, "b t h k"], key: Float[Array, "b s h k"], mask: Mask | None = None
) -> Float[Array, "b h t s"]:
    """softmax(q k' / sqrt(k)) in fp32; positions where `mask` is False get weight 0."""
    query = query * (query.shape[-1] ** -0.5)
    scores = jnp.einsum("bthk,bshk->bhts", query, key, preferred_element_type=jnp.float32)
    if mask is not None:  # the scores are fp32 here, so that finfo.min fits
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    return jax.nn.softmax(scores)


def attend(
    query: Float[Array, "b t h k"],
    key: Float[Array, "b s h k"],
    value: Float[Array, "b s h k"],
    mask: Mask | None = None,
    *,
    dropout: float = 0.0,
    rng: Key[Array, ""] | None = None,
) -> tuple[Float[Array, "b t h k"], Float[Array, "b h t s"]]:
    """The attended values, and the weights that made them (dropped by the compiler where nobody uses them).

    `dropout` is the share of weights set to zero when `rng` is given.
    """
    weights = attention_weights(query, key, mask)
    used = weights
    if rng is not None and dropout > 0:
        used = weights * jax.random.bernoulli(rng, 1 - dropout, weights.shape) / (1 - dropout)
    return jnp.einsum("bhts,bshk->bthk", used.astype(value.dtype), value), weights


class Attention(nn.Module):
    """Multi-head attention of `x` over `context`, with biased projections of width `d = h * k`."""

    heads: int
    dtype: DTypeLike = jnp.float32
    dropout: float = 0.0
    init_in: Initializer = nn.initializers.xavier_uniform()
    init_out: Initializer = nn.initializers.xavier_uniform()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t d"],
        context: Float[Array, "b s c"],
        mask: Mask | None = None,
        *,
        train: bool,
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b h t s"]]:
        """The attended `x` and the attention weights."""
        width = x.shape[-1]

        def project(name, inputs):
            shape = (self.heads, width // self.heads)
            return nn.DenseGeneral(shape, dtype=self.dtype, kernel_init=self.init_in, name=name)(inputs)

        rng = self.make_rng("dropout") if train and self.dropout > 0 else None
        query, key, value = project("query", x), project("key", context), project("value", context)
        y, weights = attend(query, key, value, mask, dropout=self.dropout, rng=rng)
        out = nn.DenseGeneral(width, axis=(-2, -1), dtype=self.dtype, kernel_init=self.init_out, name="out")
        return out(y), weights
