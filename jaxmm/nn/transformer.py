"""The pre-norm transformer encoder (Dosovitskiy et al. 2021, eq. 2-3) as one stack of layers.

Parameters are stacked along a leading layer axis whether the layers are scanned or unrolled, so a checkpoint does
not depend on that choice.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jaxmm.nn.attention import Attention, CachedKeysValues, Linear, Mask
from jaxmm.sharding import constrain_batch
from jaxmm.validation import BELOW_ONE, POSITIVE, check_types, require


def exact_gelu(x: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """Return x times the normal CDF, by erf as torch computes it (Hendrycks and Gimpel 2016).

    `jax.nn.gelu` uses erfc, which made a train step on CPU 1.6 times slower.
    """
    return 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))


ACTIVATIONS = {
    "gelu": exact_gelu,
    "gelu_tanh": partial(nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
}

REMAT_POLICIES = {
    "cheap": jax.checkpoint_policies.save_only_these_names("projections", "attention", "middle", "hidden"),
    "mlp": jax.checkpoint_policies.save_only_these_names("projections", "attention", "middle"),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


TRAINING_FIELDS = ("dropout", "attention_dropout", "drop_path", "dtype", "remat", "scan", "init")
"""Fields of a `TransformerConfig` that say how it is computed and trained; the others are its architecture."""


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """A stack of identical pre-norm layers."""

    width: Annotated[int, POSITIVE]
    """Token dimension d."""
    depth: Annotated[int, POSITIVE]
    """Number of layers."""
    heads: Annotated[int, POSITIVE]
    mlp_dim: Annotated[int, POSITIVE]
    """Hidden units of the MLP."""
    activation: Literal["gelu", "gelu_tanh", "quick_gelu"] = "gelu"
    """gelu: exact, by erf (torch's default); gelu_tanh: approximate (Flax's default, SigLIP); quick_gelu: OpenAI's."""
    eps: float = 1e-6
    """Epsilon of every layer norm."""
    init: Literal["xavier", "clip", "torch", "normal", "igpt"] = "xavier"
    """Initial weights. xavier: vision_transformer's; clip: CLIP's text tower, scaled by width and depth; torch: that
    library's defaults, which OpenAI kept for CLIP's image tower; normal: std 0.02 (timm); igpt: iGPT's, attention
    scaled by width and depth."""
    dropout: Annotated[float, BELOW_ONE] = 0.0
    """Dropout rate after attention, inside and after the MLP."""
    attention_dropout: Annotated[float, BELOW_ONE] = 0.0
    """Dropout rate of the attention weights."""
    drop_path: Annotated[float, BELOW_ONE] = 0.0
    """Stochastic depth: probability that the last layer's branches are skipped, decreasing linearly to 0 at the
    first."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Type of the activations; parameters, norm statistics and softmax stay fp32. float64, for gradient checks, needs
    `jax.enable_x64` and then holds for everything."""
    remat: Literal["none", "cheap", "mlp", "dots", "full"] = "none"
    """What the backward pass recomputes. none: nothing; cheap: norms and activations; mlp: these and the MLP's hidden
    units, which are four ninths of what is stored otherwise; dots: all but matrix products with parameters; full:
    everything inside a layer."""
    scan: bool = True
    """True: compile one layer and loop over it. False: unroll the layers, which takes longer to compile, and without
    remat trains a quarter faster on a GPU (ViT-L/16, H200)."""

    def __post_init__(self):
        """Check that the heads divide the width."""
        check_types(self, "transformer")
        require(self.width % self.heads == 0, "transformer.heads", self.heads, f"a divisor of width = {self.width}")
        require(self.dtype != "float64" or jax.config.jax_enable_x64, "transformer.dtype", self.dtype,
                "float32 or bfloat16 while jax_enable_x64 is off")

    def adopt(self, trained: "TransformerConfig") -> "TransformerConfig":
        """Return `trained`, computed and trained as this stack is."""
        return replace(trained, **{name: getattr(self, name) for name in TRAINING_FIELDS})

    @property
    def stochastic(self) -> bool:
        """True if training draws random numbers."""
        return max(self.dropout, self.attention_dropout, self.drop_path) > 0


class Initializers(NamedTuple):
    """Initializers of a layer's kernels, its MLP's biases, and the patch embedding [p p c d]."""

    attention_in: nn.initializers.Initializer
    attention_out: nn.initializers.Initializer
    up: nn.initializers.Initializer
    down: nn.initializers.Initializer
    up_bias: nn.initializers.Initializer
    down_bias: nn.initializers.Initializer
    patches: nn.initializers.Initializer = nn.initializers.lecun_normal(in_axis=(0, 1, 2), out_axis=3)


def torch_bias(fan_in: int) -> nn.initializers.Initializer:
    """Return torch's default initializer of a bias: uniform, up to `fan_in`^-1/2."""
    return lambda rng, shape, dtype=jnp.float32: jax.random.uniform(rng, shape, dtype, -1, 1) * fan_in**-0.5


def initializers(config: TransformerConfig) -> Initializers:
    """Return the published initial distributions that `config.init` names."""
    normal, zeros = nn.initializers.normal, nn.initializers.zeros
    narrow, deep = config.width**-0.5, (2 * config.depth * config.width) ** -0.5

    def uniform(scale, **axes):
        return nn.initializers.variance_scaling(scale, "fan_in", "uniform", **axes)

    match config.init:
        case "xavier":
            return Initializers(*[nn.initializers.xavier_uniform()] * 4, *[normal(1e-6)] * 2)
        case "normal":
            return Initializers(*[normal(0.02)] * 4, zeros, zeros)
        case "igpt":
            return Initializers(normal(narrow), normal((config.depth * config.width) ** -0.5), normal(0.02),
                                normal(0.02), zeros, zeros)
        case "clip":
            return Initializers(normal(narrow), normal(deep), normal(narrow * 0.5**0.5), normal(deep), zeros, zeros)
        case "torch":  # query, key and value are one matrix [d 3d] there, drawn by Xavier's rule
            return Initializers(uniform(1 / 2), *[uniform(1 / 3)] * 3, torch_bias(config.width),
                                torch_bias(config.mlp_dim), uniform(1 / 3, in_axis=(0, 1, 2), out_axis=3))


class Mlp(nn.Module):
    """Linear, activation, linear."""

    config: TransformerConfig
    bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"], *, train: bool) -> Float[Array, "*b d"]:
        """Apply the MLP to every token."""
        config, init = self.config, initializers(self.config)
        linear = partial(Linear, dtype=jnp.dtype(config.dtype), bias=self.bias)
        up = linear((config.mlp_dim,), kernel_init=init.up, bias_init=init.up_bias, name="up")
        down = linear((config.width,), kernel_init=init.down, bias_init=init.down_bias, name="down")
        x = checkpoint_name(up(x), "hidden")
        x = ACTIVATIONS[config.activation](x)
        x = nn.Dropout(config.dropout, deterministic=not train)(x)
        return down(x)


def layer_norm(config: TransformerConfig, name: str | None) -> nn.LayerNorm:
    """Return a layer norm with the stack's epsilon and dtype; its statistics are fp32."""
    return nn.LayerNorm(epsilon=config.eps, dtype=jnp.dtype(config.dtype), name=name)


class Block(nn.Module):
    """One layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t d"], mask: Mask | None = None, drop_path: float | Array = 0.0, *,
        train: bool, weights: bool = False,
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b h t t"] | None]:
        """Return the layer's tokens, and its attention weights if `weights`.

        `drop_path` is this layer's probability of skipping a branch.
        """
        config, init = self.config, initializers(self.config)

        def branch(y):
            y = nn.Dropout(config.dropout, deterministic=not train)(y)
            if train and config.drop_path > 0:
                keep = jax.random.bernoulli(self.make_rng("dropout"), 1 - drop_path, (len(y), 1, 1))
                y = y * (keep.astype(jnp.float32) / (1 - drop_path)).astype(y.dtype)
            return y

        y = layer_norm(config, "attention_norm")(x)
        attention = Attention(config.width, config.heads, jnp.dtype(config.dtype), config.attention_dropout,
                              init.attention_in, init.attention_out, name="attention")
        y, probabilities = attention(y, y, mask, train=train, weights=weights)
        x = checkpoint_name(x + branch(y), "middle")
        y = Mlp(config, name="mlp")(layer_norm(config, "mlp_norm")(x), train=train)
        return x + branch(y), probabilities


class StackOutput(NamedTuple):
    """Output of a stack; `hidden` and `attention` are None unless requested."""

    tokens: Float[Array, "b t d"]
    hidden: Float[Array, "l b t d"] | None
    """Tokens after each layer."""
    attention: Float[Array, "l b h t t"] | None
    """Attention weights of each layer."""


class Stack(nn.Module):
    """`config.depth` layers with their parameters stacked under `blocks`."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t d"],
        mask: Mask | None = None,
        *,
        train: bool,
        hidden: bool = False,
        attention: bool = False,
    ) -> StackOutput:
        """Apply the layers in order; `hidden` and `attention` request the outputs of every layer."""
        config = self.config
        block = Block(config, parent=None)

        def init(rng):
            def one(key):
                return block.init(key, jnp.zeros((1, 1, config.width)), train=False)["params"]
            return jax.vmap(one)(jax.random.split(rng, config.depth))

        params = self.param("blocks", init)
        if self.is_initializing():
            return StackOutput(x, None, None)
        rates = jnp.linspace(0, config.drop_path, config.depth)
        keys = None
        if train and config.stochastic:
            keys = jax.random.split(self.make_rng("dropout"), config.depth)

        def layer(x, inputs):
            params, rate, key = inputs
            rngs = None if key is None else {"dropout": key}
            x, weights = block.apply({"params": params}, constrain_batch(x), mask, rate, train=train,
                                     weights=attention, rngs=rngs)
            x = constrain_batch(x)
            return x, (x if hidden else None, weights)

        x, (hiddens, weights) = run_layers(layer, x.astype(config.dtype), (params, rates, keys), config)
        return StackOutput(x, hiddens, weights)


def run_layers(layer: Callable, x: Any, inputs: Any, config: TransformerConfig) -> tuple[Any, Any]:
    """Apply `(x, output) = layer(x, input)` for each layer's input, scanned or unrolled, with remat, as `config` says.

    The leaves of `inputs` have a leading layer axis. Return the last x, and the outputs of all layers, stacked.
    """
    if config.remat != "none":
        layer = jax.checkpoint(layer, policy=REMAT_POLICIES[config.remat], prevent_cse=not config.scan)
    if config.scan:
        return jax.lax.scan(layer, x, inputs)
    outputs = []
    for one in unstack(inputs, len(jax.tree.leaves(inputs)[0])):
        x, output = layer(x, one)
        outputs.append(output)
    return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)


def empty_cache(config: TransformerConfig, batch: int, length: int) -> list[CachedKeysValues]:
    """Return the cache of every layer's self-attention: zeros, with room for `length` tokens of `batch` sequences."""
    room = jnp.zeros((batch, config.heads, length, config.width // config.heads), config.dtype)
    return [(room, room)] * config.depth


def unstack(tree, length: int) -> list:
    """Split a tree whose leaves have a leading axis of `length` into a list of `length` trees.

    Each leaf is split once, so that the gradient is one concatenation: indexing layer by layer would add `length`
    padded gradients instead.
    """
    leaves, structure = jax.tree.flatten(tree)
    parts = [[part[0] for part in jax.lax.split(leaf, (1,) * length, axis=0)] for leaf in leaves]
    return [jax.tree.unflatten(structure, layer) for layer in zip(*parts, strict=True)]
