"""iGPT (Chen et al. 2020): a GPT-2 whose tokens are the colours of an image's pixels, row by row.

Pre-norm layers with root-mean-square norms and no biases, learned positions, separate tables for input and output. The
start token is the last row of the input table.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from jaxmm.nn.attention import Attention, CachedKeysValues, Mask, add_to_cache, causal_mask
from jaxmm.nn.embeddings import TokenEmbedding
from jaxmm.nn.precision import wide, widened
from jaxmm.nn.transformer import REMAT_POLICIES, Mlp, TransformerConfig, initializers, unstack
from jaxmm.sharding import constrain_batch
from jaxmm.validation import check_types, require

Cache = list[CachedKeysValues]
"""Keys and values per layer, with room for all tokens to come."""


@dataclass(frozen=True, kw_only=True)
class IGPTConfig:
    """An iGPT; `igpt("S")` returns a published size."""

    transformer: TransformerConfig
    """Stack of layers, without dropout; its `eps` is that of the root-mean-square norms."""
    image_size: int = 32
    """Side in pixels of the square images; each pixel is a token."""
    colors: int = 512
    """Number of colours in the palette."""
    classes: int | None = None
    """Number of classes; None: that of the training source, or no head."""

    def __post_init__(self):
        """Check ranges."""
        check_types(self)
        for name in ("image_size", "colors"):
            require(getattr(self, name) > 0, name, getattr(self, name), "a positive number")
        require(not self.transformer.stochastic, "transformer.dropout", self.transformer.dropout,
                "0, and no other dropout: iGPT has none")

    @property
    def pixels(self) -> int:
        """Number of pixels of an image, which is that of the positions."""
        return self.image_size**2

    def adopt(self, trained: "IGPTConfig", image_size: int) -> "IGPTConfig":
        """Return the architecture of `trained`, computed as this is. Raise `ConfigError` for another image size."""
        require(image_size == trained.image_size, "data.image.size", image_size,
                f"the trained model's {trained.image_size}: each pixel has a position")
        return replace(trained, transformer=self.transformer.adopt(trained.transformer), classes=self.classes)


SIZES: dict[str, tuple[int, int, int | None]] = {
    "S": (24, 512, 8), "M": (36, 1024, 8), "L": (48, 1536, 16), "XL": (60, 3072, None)}
"""Depth, width and heads. The heads of XL, whose weights were never released, are not public."""


def igpt(size: str, *, stack: dict[str, Any] | None = None, **overrides: Any) -> IGPTConfig:
    """Return a published size, such as `igpt("S", image_size=48)`.

    `stack` are fields of `TransformerConfig`, `overrides` fields of `IGPTConfig`. XL needs `stack={"heads": N}`.
    """
    require(size in SIZES, "size", size, "one of " + ", ".join(SIZES))
    depth, width, heads = SIZES[size]
    fields = {"width": width, "depth": depth, "mlp_dim": 4 * width, "heads": heads, "eps": 1e-5,
              "activation": "quick_gelu", "init": "igpt"} | (stack or {})
    require(fields["heads"] is not None, "stack", stack, "{'heads': N}: the paper does not say how many XL has")
    return IGPTConfig(transformer=TransformerConfig(**fields), **overrides)


def rms_norm(config: TransformerConfig) -> nn.RMSNorm:
    """Return a root-mean-square norm with the stack's epsilon and dtype; its statistics are fp32."""
    return nn.RMSNorm(epsilon=config.eps, dtype=jnp.dtype(config.dtype))


class IGPTLayer(nn.Module):
    """One layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    config: TransformerConfig

    def setup(self):
        """Declare the parts."""
        config, init = self.config, initializers(self.config)
        self.attention_norm, self.mlp_norm = rms_norm(config), rms_norm(config)
        self.attention = Attention(config.width, config.heads, jnp.dtype(config.dtype), init_in=init.attention_in,
                                   init_out=init.attention_out, bias=False)
        self.mlp = Mlp(config, bias=False)

    def __call__(self, x: Float[Array, "b t d"], mask: Mask | None) -> tuple[Float[Array, "b t d"],
                                                                             Float[Array, "b t d"]]:
        """Return the layer's tokens, and the normed input of its attention, which the paper probes."""
        y = self.attention_norm(x)
        x = checkpoint_name(x + self.attention(y, y, mask, train=False)[0], "middle")
        return x + self.mlp(self.mlp_norm(x), train=False), y

    def decode_step(
        self, x: Float[Array, "b 1 d"], cache: CachedKeysValues, position: Int[Array, ""], mask: Mask,
    ) -> tuple[Float[Array, "b 1 d"], CachedKeysValues]:
        """Run the layer on the token at `position`, given the cached keys and values of those before.

        Return the token, and the cache with its keys and values.
        """
        y = self.attention_norm(x)
        cache = add_to_cache(cache, self.attention.keys_values(y), position)
        x = x + self.attention.attend_cached(y, cache, mask)
        return x + self.mlp(self.mlp_norm(x), train=False), cache


class Head(nn.Module):
    """A linear map to fp32 logits, initialised to zero, without a bias."""

    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b v"]:
        """Return the logits."""
        kernel = self.param("kernel", nn.initializers.zeros, (x.shape[-1], self.features))
        return jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=wide(x.dtype))


class IGPTOutput(NamedTuple):
    """Output of iGPT."""

    tokens: Float[Array, "b t d"]
    """Tokens after the final norm."""
    logits: Float[Array, "b t v"]
    """Logits of the colours, fp32: of the next pixel, or of this one if all tokens attend to all."""
    class_logits: Float[Array, "b classes"] | None
    """Logits of the classes, from the mean of `tokens`, fp32; None without a head."""
    layers: Float[Array, "b l d"]
    """Features of every layer, fp32: the mean over positions of the normed input of its attention."""


class IGPT(nn.Module):
    """The model. Token number `config.colors` is the start token."""

    config: IGPTConfig

    def setup(self):
        """Declare the parts: layers are stacked under `blocks`."""
        config, stack = self.config, self.config.transformer
        layer = IGPTLayer(stack, parent=None)

        def init(rng):
            def one(key):
                return layer.init(key, jnp.zeros((1, 1, stack.width)), None)["params"]
            return jax.vmap(one)(jax.random.split(rng, stack.depth))

        self.tokens = TokenEmbedding(config.colors + 1, stack.width)
        self.positions = self.param("positions", nn.initializers.normal(0.01), (config.pixels, stack.width))
        self.blocks = self.param("blocks", init)
        self.norm = rms_norm(stack)
        self.head = Head(config.colors)
        if config.classes:
            self.class_head = Head(config.classes)

    def __call__(
        self, tokens: Int[Array, "b t"], hidden: Bool[Array, "b t"] | None = None, *, causal: bool = True
    ) -> IGPTOutput:
        """Compute all tokens at once; `hidden` ones are embedded as zeros, at their positions (BERT's objective).

        Raise `ValueError` if there are more tokens than positions.
        """
        if tokens.shape[1] > self.config.pixels:
            raise ValueError(f"sequences are {tokens.shape[1]} tokens long; this model has {self.config.pixels} "
                             f"positions: the start token and all pixels but the last")
        x = self.tokens(tokens)
        if hidden is not None:
            x = jnp.where(hidden[..., None], jnp.zeros((), x.dtype), x)
        x = (x + self.positions[None, :tokens.shape[1]]).astype(self.config.transformer.dtype)
        layers = jnp.zeros((len(x), 0, x.shape[-1]))
        if not self.is_initializing():
            x, layers = self._run(x, causal_mask(tokens.shape[1]) if causal else None)
        x = self.norm(x)
        classes = self.class_head(widened(x).mean(axis=1)) if self.config.classes else None
        return IGPTOutput(x, self.head(x), classes, layers)

    def _run(self, x, mask):
        """Run all layers in order; return the tokens and every layer's features."""
        stack = self.config.transformer
        layer = IGPTLayer(stack, parent=None)

        def one(x, params):
            x, normed = layer.apply({"params": params}, constrain_batch(x), mask)
            return constrain_batch(x), widened(normed).mean(axis=1)

        if stack.remat != "none":
            one = jax.checkpoint(one, policy=REMAT_POLICIES[stack.remat], prevent_cse=not stack.scan)
        if stack.scan:
            x, layers = jax.lax.scan(one, x, self.blocks)
        else:
            collected = []
            for params in unstack(self.blocks, stack.depth):
                x, features = one(x, params)
                collected.append(features)
            layers = jnp.stack(collected)
        return x, layers.swapaxes(0, 1)

    def separate_layers(self) -> list[Any]:
        """Return the parameters of each layer, sliced out of the stack, for `decode_step`."""
        return unstack(self.blocks, self.config.transformer.depth)

    def decode_step(
        self, tokens: Int[Array, "b"], position: Int[Array, ""], cache: Cache, layers: list[Any],
        mask: Bool[Array, "b s"],
    ) -> tuple[Float[Array, "b v"], Cache]:
        """Return the logits after one more token of each image, at `position`, and the cache with it.

        `layers` are what `separate_layers` returned; `mask` is True for the filled positions of the cache.
        """
        layer, new_cache = IGPTLayer(self.config.transformer, parent=None), []
        x = self.tokens(tokens[:, None]) + jax.lax.dynamic_slice_in_dim(self.positions, position, 1)[None]
        x = x.astype(self.config.transformer.dtype)
        for filled, params in zip(cache, layers, strict=True):
            x, filled = layer.apply({"params": params}, x, filled, position, mask[:, None, None],
                                    method=IGPTLayer.decode_step)
            new_cache.append(filled)
        return self.head(self.norm(x))[:, 0], new_cache
