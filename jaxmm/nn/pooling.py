"""Attention pooling: from many tokens to one vector."""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from jaxmm.nn.attention import Attention, Mask
from jaxmm.nn.transformer import Mlp, TransformerConfig, initializers, layer_norm


class MapHead(nn.Module):
    """Multi-head attention pooling (Zhai et al. 2022): one learned probe attends to all tokens, then an MLP."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self, tokens: Float[Array, "b n d"], mask: Mask | None = None, *, train: bool
    ) -> Float[Array, "b d"]:
        """Return the pooled vector; tokens where `mask` is False are ignored."""
        config = self.config
        probe = self.param("probe", nn.initializers.xavier_uniform(), (1, 1, config.width))
        probe = jnp.broadcast_to(probe, (len(tokens), 1, config.width)).astype(tokens.dtype)
        init = initializers(config)
        attention = Attention(config.width, config.heads, jnp.dtype(config.dtype), init_in=init.attention_in,
                              init_out=init.attention_out, name="attention")
        x, _ = attention(probe, tokens, mask, train=train)
        return (x + Mlp(config, name="mlp")(layer_norm(config, "mlp_norm")(x), train=train))[:, 0]
