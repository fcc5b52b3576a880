"""Vision Transformer (Dosovitskiy et al. 2021), in the published variants.

An image becomes patches, patches become tokens, a transformer encodes them, and their pooled vector is classified. The
image towers of CLIP, SigLIP and BLIP are configurations of the same module.
"""

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Key

from jaxmm.nn.embeddings import PatchEmbedding, sincos_positions
from jaxmm.nn.pooling import MapHead
from jaxmm.nn.precision import widened
from jaxmm.nn.transformer import Stack, TransformerConfig, initializers, layer_norm
from jaxmm.sharding import constrain_batch
from jaxmm.validation import BELOW_ONE, POSITIVE, at_least, check_types, require


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """A vision transformer. The defaults are the original's; `vit("B/16")` returns a published size."""

    transformer: TransformerConfig
    image_size: Annotated[int, POSITIVE] = 224
    """Side in pixels of the square images."""
    patch: Annotated[int, POSITIVE] = 16
    """Side of a patch in pixels."""
    pool: Literal["cls", "gap", "map"] = "cls"
    """Pooling: the class token, the mean of the patches, or attention pooling."""
    class_token: bool = True
    """True if there is a class token; `cls` needs one."""
    positions: Literal["learned", "sincos"] = "learned"
    """Position embedding: a learned table, or fixed 2-D sine-cosine."""
    positions_std: float | None = 0.02
    """Standard deviation of the learned table's initial values; None: width^-1/2 (CLIP, big_vision)."""
    position_class: bool = True
    """True if the class token has a slot in the position table (big_vision: False)."""
    distillation_token: bool = False
    """True if a second class token, trained by a teacher, follows the first (DeiT, Touvron et al. 2021)."""
    distillation_head: bool = False
    """True if the distillation token has a head; the logits are the mean of both heads."""
    registers: Annotated[int, at_least(0)] = 0
    """Number of extra learned tokens without position (Darcet et al. 2024)."""
    norm_pooled: bool = False
    """True if the final norm follows the pooling instead of preceding it (timm's `fc_norm`)."""
    pre_norm: bool = False
    """True if a layer norm precedes the stack (CLIP)."""
    patch_bias: bool = True
    """True if the patch embedding has a bias (CLIP: False)."""
    pre_logits: int | None = None
    """Size of a Dense + tanh before the head (ImageNet-21k's representation layer); None: none."""
    classes: int | None = None
    """Number of classes; None: that of the training source, or no head in a tower."""
    head_init: Literal["zeros", "normal"] = "zeros"
    """Initial kernel of the head: zeros (vision_transformer, big_vision) or normal, std 0.02 (timm)."""
    head_bias: float = 0.0
    """Initial bias of the head; -10 for sigmoid cross-entropy over many classes."""
    patch_dropout: Annotated[float, BELOW_ONE] = 0.0
    """Share of the patches left out in training (FLIP, Li et al. 2023)."""

    def __post_init__(self):
        """Check that patches tile the image, and that the pooling has the tokens it needs."""
        check_types(self)
        require(self.image_size % self.patch == 0, "image_size", self.image_size,
                f"a multiple of patch = {self.patch}")
        require(not self.distillation_token or (self.class_token and self.position_class), "distillation_token",
                self.distillation_token, "False, where there is no class token with a position")
        require(not self.distillation_head or self.distillation_token, "distillation_head", self.distillation_head,
                "False, where there is no distillation token")
        require(self.pool != "cls" or self.class_token, "pool", self.pool, "gap or map, where class_token is False")
        require(self.positions != "sincos" or self.transformer.width % 4 == 0, "transformer.width",
                self.transformer.width, "a multiple of 4, for sin-cos positions")

    @property
    def module(self) -> "ViT":
        """The Flax module."""
        return ViT(self)

    @property
    def tower(self) -> "ViTConfig":
        """The image tower: this."""
        return self

    def adopt(self, trained: Any, image_size: int) -> "ViTConfig":
        """Return the image tower of `trained` (a configuration with one) at `image_size`, without heads.

        What only training uses stays that of this tower. Raise `ConfigError` if the patches do not tile the image.
        """
        tower = trained.tower
        require(image_size % tower.patch == 0, "data.image.size", image_size,
                f"a multiple of the trained model's patch = {tower.patch}")
        return replace(tower, transformer=self.transformer.adopt(tower.transformer), image_size=image_size,
                       patch_dropout=self.patch_dropout, pre_logits=None, classes=None, head_init="zeros",
                       head_bias=0.0)

    def trained_path(self, path: str, trained: Any) -> str | None:
        """Return the path in `trained` of the parameter at `path`; None for heads."""
        if path.startswith(("head/", "distillation_head/", "pre_logits/")):
            return None
        return path if trained.tower is trained else f"vision/{path}"

    @property
    def grid(self) -> tuple[int, int]:
        """Numbers of rows and columns of patches."""
        return self.image_size // self.patch, self.image_size // self.patch


# name: width, depth, MLP, heads (facts: big_vision's decode_variant; g-opt and G-opt from the same table)
SIZES: dict[str, tuple[int, int, int, int]] = {
    "mu": (32, 1, 128, 2),
    "Ti": (192, 12, 768, 3),
    "S": (384, 12, 1536, 6),
    "M": (512, 12, 2048, 8),
    "B": (768, 12, 3072, 12),
    "L": (1024, 24, 4096, 16),
    "So400m": (1152, 27, 4304, 16),
    "H": (1280, 32, 5120, 16),
    "g": (1408, 40, 6144, 16),
    "g-opt": (1536, 40, 6144, 16),
    "G": (1664, 48, 8192, 16),
    "G-opt": (1536, 48, 8192, 16),
    "e": (1792, 56, 15360, 16),
}


def transformer(size: str, **overrides) -> TransformerConfig:
    """Return the stack of a published size; `overrides` are fields of `TransformerConfig`."""
    require(size in SIZES, "size", size, "one of " + ", ".join(SIZES))
    width, depth, mlp_dim, heads = SIZES[size]
    return TransformerConfig(**{"width": width, "depth": depth, "mlp_dim": mlp_dim, "heads": heads} | overrides)


def vit(variant: str, *, stack: dict | None = None, **overrides) -> ViTConfig:
    """Return a published size and patch, such as `vit("B/16", image_size=384)`.

    `stack` are fields of `TransformerConfig`, `overrides` fields of `ViTConfig`.
    """
    size, _, patch = variant.partition("/")
    require(patch.isdigit(), "variant", variant, "SIZE/PATCH, such as B/16")
    return ViTConfig(transformer=transformer(size, **(stack or {})), **{"patch": int(patch)} | overrides)


class ViTOutput(NamedTuple):
    """Output of a vision transformer."""

    tokens: Float[Array, "b t d"]
    """Tokens after the final norm (before it, with `norm_pooled`): class token, distillation token, registers (if there
    are any), patches."""
    pooled: Float[Array, "b d"]
    """Pooled vector per image."""
    logits: Float[Array, "b classes"] | None
    """Logits in fp32; None without a head."""
    hidden: Float[Array, "l b t d"] | None
    """Tokens after each layer, if requested."""
    attention: Float[Array, "l b h t t"] | None
    """Attention weights of each layer, if requested."""


def keep_patches(x: Float[Array, "b n d"], share: float, rng: Key[Array, ""]) -> Float[Array, "b m d"]:
    """Select a random subset of each image's patches, leaving out `share` of them (FLIP, section 3)."""
    b, n, _ = x.shape
    kept = max(1, round(n * (1 - share)))
    order = jnp.argsort(jax.random.uniform(rng, (b, n)), axis=1)[:, :kept]
    return jnp.take_along_axis(x, order[..., None], axis=1)


class ViT(nn.Module):
    """The vision transformer."""

    config: ViTConfig

    @nn.compact
    def __call__(
        self, image: Float[Array, "b H W c"], *, train: bool, hidden: bool = False, attention: bool = False
    ) -> ViTOutput:
        """Encode normalised images with sides `config.image_size`.

        Raises ValueError for images of another size: resize the position table (`resize_positions`) and the
        configuration together.
        """
        config, width = self.config, self.config.transformer.width
        if image.shape[1:3] != (config.image_size, config.image_size):
            raise ValueError(f"images are {image.shape[1]} x {image.shape[2]}; this model's position table is for "
                             f"{config.image_size} x {config.image_size}")
        patches = PatchEmbedding(config.patch, width, config.patch_bias, jnp.dtype(config.transformer.dtype),
                                 initializers(config.transformer).patches, name="patches")
        x = widened(patches(image))

        slots = config.grid[0] * config.grid[1]
        on_class = int(config.class_token and config.position_class) + config.distillation_token
        if config.positions == "learned":
            std = width**-0.5 if config.positions_std is None else config.positions_std
            table = self.param("positions", nn.initializers.normal(std), (slots + on_class, width))
        else:
            table = jnp.pad(sincos_positions(*config.grid, width), ((on_class, 0), (0, 0)))
        x = x + table[None, on_class:]
        if train and config.patch_dropout > 0:
            x = keep_patches(x, config.patch_dropout, self.make_rng("dropout"))
        first = []
        if config.class_token:
            openai = config.transformer.init == "torch"
            init = nn.initializers.normal(width**-0.5) if openai else nn.initializers.zeros
            token = self.param("class_token", init, (width,))
            first.append((token + table[0] if on_class else token)[None])
        if config.distillation_token:
            token = self.param("distillation_token", nn.initializers.zeros, (width,))
            first.append((token + table[1])[None])
        if config.registers:
            first.append(self.param("registers", nn.initializers.normal(0.02), (config.registers, width)))
        if first:
            first = jnp.concatenate(first)
            x = jnp.concatenate([jnp.broadcast_to(first, (len(x), *first.shape)), x], axis=1)

        x = nn.Dropout(config.transformer.dropout, deterministic=not train)(x)
        x = x.astype(config.transformer.dtype)
        if config.pre_norm:
            x = layer_norm(config.transformer, "pre_norm")(x)
        stack = Stack(config.transformer, name="encoder")(x, train=train, hidden=hidden, attention=attention)
        norm = layer_norm(config.transformer, "norm")
        tokens = stack.tokens if config.norm_pooled else norm(stack.tokens)
        pooled = self._pool(tokens, train)
        if config.norm_pooled:
            pooled = norm(pooled)
        if config.pre_logits:
            dense = nn.Dense(config.pre_logits, dtype=tokens.dtype, name="pre_logits",
                             kernel_init=nn.initializers.xavier_uniform())
            pooled = nn.tanh(dense(pooled))
        logits = None
        if config.classes:
            logits = self._head("head", pooled)
            if config.distillation_head:
                logits = (logits + self._head("distillation_head", tokens[:, 1])) / 2
        return ViTOutput(tokens, pooled, logits, stack.hidden, stack.attention)

    def _head(self, name, pooled):
        config = self.config
        kernel = {"zeros": nn.initializers.zeros, "normal": nn.initializers.normal(0.02)}[config.head_init]
        head = nn.Dense(config.classes, kernel_init=kernel, bias_init=nn.initializers.constant(config.head_bias),
                        name=name)
        # Held here, or XLA's partitioner gives wrong gradients below a pre-logits layer on data x fsdp x tensor.
        return constrain_batch(head(widened(pooled)))

    def _pool(self, tokens, train):
        if self.config.pool == "cls":
            return tokens[:, 0]
        if self.config.pool == "gap":
            skipped = int(self.config.class_token) + self.config.distillation_token + self.config.registers
            return tokens[:, skipped:].mean(axis=1)
        return MapHead(self.config.transformer, name="map_head")(tokens, train=train)
