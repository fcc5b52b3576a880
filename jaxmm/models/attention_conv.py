"""Self-attention as convolution (Cordonnier, Loukas and Jaggi 2020, arXiv:1911.03584).

An image becomes a grid of small patches, and heads attend by relative position. Nine heads that attend to the nine
neighbours of a patch are a 3 x 3 convolution (theorem 1, `convolution_params`); training chooses where they attend.
"""

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxmm.models.vit import ViTOutput
from jaxmm.nn.attention import Linear, name_for_remat
from jaxmm.nn.embeddings import PatchEmbedding
from jaxmm.nn.precision import wide, widened
from jaxmm.nn.transformer import (
    TRAINING_FIELDS,
    Mlp,
    StackOutput,
    TransformerConfig,
    initializers,
    layer_norm,
    run_layers,
    torch_bias,
)
from jaxmm.sharding import constrain_batch
from jaxmm.validation import BELOW_ONE, POSITIVE, check_types, require


@dataclass(frozen=True, kw_only=True)
class AttentionConvConfig:
    """Post-norm layers whose heads attend by relative position. The defaults are the paper's for CIFAR-10."""

    scores: Literal["quadratic", "generalised_quadratic", "learned", "learned_content"] = "quadratic"
    """Score of a head for the key at offset δ from the query. quadratic: -s² |δ - μ|² / 2, a round Gaussian with centre
    μ; generalised_quadratic: -(δ - μ)ᵀ A Aᵀ (δ - μ) / 2, a Gaussian of any shape; learned: the sum of a learned
    function of the row offset and one of the column offset; learned_content: the same plus q·k / √width, the only one
    that depends on the image."""
    width: Annotated[int, POSITIVE] = 400
    """Token dimension d."""
    depth: Annotated[int, POSITIVE] = 6
    """Number of layers."""
    heads: Annotated[int, POSITIVE] = 9
    """Number of heads, each of which averages all d dimensions; it need not divide the width."""
    mlp_dim: Annotated[int, POSITIVE] = 512
    """Hidden units of the MLP."""
    image_size: Annotated[int, POSITIVE] = 32
    """Side in pixels of the square images."""
    patch: Annotated[int, POSITIVE] = 2
    """Side of a patch in pixels."""
    classes: int | None = None
    """Number of classes; None: that of the training source, or no head."""
    dropout: Annotated[float, BELOW_ONE] = 0.1
    """Dropout rate after attention and after the MLP."""
    attention_dropout: Annotated[float, BELOW_ONE] = 0.1
    """Dropout rate of the attention weights. Weights that all images share are dropped for all of them."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Type of the activations (see `TransformerConfig`)."""
    remat: Literal["none", "cheap", "mlp", "dots", "full"] = "none"
    """What the backward pass recomputes (see `TransformerConfig`)."""
    scan: bool = True
    """True: compile one layer and loop over it. False: unroll the layers."""

    def __post_init__(self):
        """Check that the patches tile the image."""
        check_types(self)
        require(self.image_size % self.patch == 0, "image_size", self.image_size, f"a multiple of patch = {self.patch}")
        require(self.dtype != "float64" or jax.config.jax_enable_x64, "dtype", self.dtype,
                "float32 or bfloat16 while jax_enable_x64 is off")

    @property
    def module(self) -> "AttentionConv":
        """The Flax module."""
        return AttentionConv(self)

    @property
    def grid(self) -> tuple[int, int]:
        """Numbers of rows and columns of patches."""
        return self.image_size // self.patch, self.image_size // self.patch

    @property
    def stack(self) -> TransformerConfig:
        """The MLPs and norms of the layers, and how they are computed."""
        shared = {name: getattr(self, name) for name in ("width", "depth", "mlp_dim", "dtype", "remat", "scan")}
        return TransformerConfig(**shared, heads=1, eps=1e-12, init="torch")

    def adopt(self, trained: Any, image_size: int) -> "AttentionConvConfig | None":
        """Return the architecture of `trained` at `image_size`, without a head; None if it is another kind of model.

        What only training uses stays that of this model.
        """
        if not isinstance(trained, AttentionConvConfig):
            return None
        kept = {name: getattr(self, name) for name in TRAINING_FIELDS if hasattr(self, name)}
        return replace(trained, **kept, image_size=image_size, classes=None)

    def trained_path(self, path: str, trained: Any) -> str | None:
        """Return the path in `trained` of the parameter at `path`; None for the head."""
        return None if path.startswith("head/") else path


class GridAttention(nn.Module):
    """Attention over a grid of patches by relative position. A head averages the tokens themselves.

    The averages of all heads go through one linear map, `out`, and then through another, `projection`.
    """

    config: AttentionConvConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n c"], *, train: bool, weights: bool = False
    ) -> tuple[Float[Array, "b n d"], Float[Array, "b h n n"] | None]:
        """Return the layer's output, and its attention weights if `weights`.

        Only `learned_content` has weights of its own for each image; otherwise they are computed once.
        """
        config, init, dtype = self.config, initializers(self.config.stack), jnp.dtype(self.config.dtype)
        scores = self._position_scores()
        if config.scores == "learned_content":
            query, key = (Linear((config.heads, config.width), dtype=dtype, kernel_init=init.attention_out,
                                 bias_init=torch_bias(x.shape[-1]), name=name)(x) for name in ("query", "key"))
            scores = scores[None] + jnp.einsum("bqhk,bshk->bhqs", query * config.width**-0.5, key,
                                               preferred_element_type=wide(dtype))
        probabilities = jax.nn.softmax(scores)
        dropped = nn.Dropout(config.attention_dropout, deterministic=not train)(probabilities).astype(dtype)
        heads = jnp.einsum("bhqs,bsc->bqhc" if scores.ndim == 4 else "hqs,bsc->bqhc", dropped, x.astype(dtype))
        y = Linear((config.width,), inputs=2, dtype=dtype, kernel_init=init.attention_out,
                   bias_init=torch_bias(config.heads * x.shape[-1]), name="out")(name_for_remat(heads, "attention"))
        y = Linear((config.width,), dtype=dtype, kernel_init=init.attention_out, bias_init=torch_bias(config.width),
                   name="projection")(y)
        if not weights:
            return y, None
        return y, jnp.broadcast_to(probabilities, (len(x), *probabilities.shape[-3:]))

    def _position_scores(self) -> Float[Array, "h n n"]:
        """Return what the scores owe to the offsets of keys from queries."""
        config = self.config
        if config.scores.startswith("learned"):
            return _on_grid(*(self._learned(*axis) for axis in zip(("row", "column"), config.grid, strict=True)))
        normal = nn.initializers.normal
        centers = self.param("centers", normal(2.0), (config.heads, 2))[..., None, None]
        down, right = (_offsets(size).astype(centers.dtype)[None] - centers[:, i] for i, size in enumerate(config.grid))
        if config.scores == "quadratic":
            scale = self.param("inverse_spread", lambda rng: 1 + normal(0.01)(rng, (config.heads,)))[:, None, None]
            return -0.5 * _on_grid(jnp.square(scale * down), jnp.square(scale * right))
        scale = self.param("inverse_spread", lambda rng: jnp.eye(2)[None] + normal(0.01)(rng, (config.heads, 2, 2)))
        scale = scale[..., None, None]
        return -0.5 * sum(jnp.square(_on_grid(scale[:, 0, i] * down, scale[:, 1, i] * right)) for i in range(2))

    def _learned(self, name: str, size: int) -> Float[Array, "h r r"]:
        """Return the learned scores of queries and keys along one axis of the grid, with `size` patches."""
        config = self.config
        table = self.param(f"{name}_embedding", nn.initializers.normal(1.0), (2 * size - 1, config.width))
        scores = nn.Dense(config.heads, use_bias=False, kernel_init=initializers(config.stack).attention_out,
                          name=f"{name}_scores")(table)
        return scores.T[:, _offsets(size) + size - 1]


def _offsets(size: int) -> Int[Array, "r r"]:
    """Return the offset of each key from each query along an axis with `size` patches."""
    return jnp.arange(size)[None, :] - jnp.arange(size)[:, None]


def _on_grid(rows: Float[Array, "h r r"], columns: Float[Array, "h c c"]) -> Float[Array, "h n n"]:
    """Return the sum of a function of the row offset and one of the column offset, for all patches, row by row."""
    h, r, c = len(rows), rows.shape[1], columns.shape[1]
    return (rows[:, :, None, :, None] + columns[:, None, :, None, :]).reshape(h, r * c, r * c)


class GridBlock(nn.Module):
    """One layer: norm(x + attention(x)), then norm(x + mlp(x))."""

    config: AttentionConvConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n d"], *, train: bool, weights: bool = False
    ) -> tuple[Float[Array, "b n d"], Float[Array, "b h n n"] | None]:
        """Return the layer's tokens, and its attention weights if `weights`."""
        stack = self.config.stack

        def add(name, x, y):
            return layer_norm(stack, name)(x + nn.Dropout(self.config.dropout, deterministic=not train)(y))

        y, probabilities = GridAttention(self.config, name="attention")(x, train=train, weights=weights)
        x = checkpoint_name(add("attention_norm", x, y), "middle")
        return add("mlp_norm", x, Mlp(stack, name="mlp")(x, train=train)), probabilities


class GridStack(nn.Module):
    """`config.depth` layers with their parameters stacked under `blocks`."""

    config: AttentionConvConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n d"], *, train: bool, hidden: bool = False, attention: bool = False
    ) -> StackOutput:
        """Apply the layers in order; `hidden` and `attention` request the outputs of every layer."""
        config, block = self.config, GridBlock(self.config, parent=None)

        def init(rng):
            def one(key):
                return block.init(key, jnp.zeros((1, *x.shape[1:])), train=False)["params"]
            return jax.vmap(one)(jax.random.split(rng, config.depth))

        params = self.param("blocks", init)
        if self.is_initializing():
            return StackOutput(x, None, None)
        keys = None
        if train and max(config.dropout, config.attention_dropout) > 0:
            keys = jax.random.split(self.make_rng("dropout"), config.depth)

        def layer(x, inputs):
            params, key = inputs
            rngs = None if key is None else {"dropout": key}
            x, weights = block.apply({"params": params}, constrain_batch(x), train=train, weights=attention, rngs=rngs)
            x = constrain_batch(x)
            return x, (x if hidden else None, weights)

        x, (hiddens, weights) = run_layers(layer, x, (params, keys), config.stack)
        return StackOutput(x, hiddens, weights)


class AttentionConv(nn.Module):
    """The classifier: patches, layers, mean pooling, head. There is no class token and no position table."""

    config: AttentionConvConfig

    @nn.compact
    def __call__(
        self, image: Float[Array, "b H W c"], *, train: bool, hidden: bool = False, attention: bool = False
    ) -> ViTOutput:
        """Encode normalised images with sides `config.image_size`. Raise ValueError for images of another size."""
        config, init = self.config, initializers(self.config.stack)
        if image.shape[1:3] != (config.image_size, config.image_size):
            raise ValueError(f"images are {image.shape[1]} x {image.shape[2]}; expected {config.image_size} x "
                             f"{config.image_size}")
        x = PatchEmbedding(config.patch, config.width, dtype=jnp.dtype(config.dtype), kernel_init=init.patches,
                           bias_init=torch_bias(config.patch**2 * image.shape[-1]), name="patches")(image)
        stack = GridStack(config, name="encoder")(x, train=train, hidden=hidden, attention=attention)
        pooled, logits = stack.tokens.mean(axis=1), None
        if config.classes:
            head = nn.Dense(config.classes, kernel_init=init.attention_out, bias_init=torch_bias(config.width),
                            name="head")
            logits = constrain_batch(head(widened(pooled)))
        return ViTOutput(stack.tokens, pooled, logits, stack.hidden, stack.attention)


def convolution_params(
    kernel: Float[Array, "i j c d"], bias: Float[Array, " d"], *, dilation: int = 1, sharpness: float = 64.0
) -> dict[str, Any]:
    """Return the parameters of a quadratic `GridAttention` that computes a convolution (theorem 1).

    Head h reads the patch at the offset of the kernel's position h, row by row; with an even side the middle is the
    upper left of the four. The layer is the convolution with stride 1 and edge padding, because the patch nearest to a
    position outside the grid is on its edge; the share of attention that goes elsewhere is 4 exp(-sharpness / 2), which
    fp32 cannot show from 64 on. The layer needs i * j heads and width d.

    To set layer l of a model: `jax.tree.map(lambda old, new: old.at[l].set(new), params["encoder"]["blocks"]
    ["attention"], convolution_params(kernel, bias))`.
    """
    rows, columns, c, d = kernel.shape
    offsets = np.mgrid[:rows, :columns].reshape(2, -1).T - [(rows - 1) // 2, (columns - 1) // 2]
    return {"centers": jnp.asarray(dilation * offsets, jnp.float32),
            "inverse_spread": jnp.full(rows * columns, sharpness**0.5, jnp.float32),
            "out": {"kernel": jnp.reshape(kernel, (rows * columns, c, d)), "bias": jnp.asarray(bias)},
            "projection": {"kernel": jnp.eye(d), "bias": jnp.zeros(d)}}
