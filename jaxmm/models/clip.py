"""CLIP (Radford et al. 2021) and SigLIP (Zhai et al. 2023): an image tower and a text tower with one shared space."""

import math
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

from jaxmm.models.vit import ViT, ViTConfig, transformer, vit
from jaxmm.nn.attention import causal_mask
from jaxmm.nn.embeddings import TokenEmbedding
from jaxmm.nn.pooling import MapHead
from jaxmm.nn.precision import widened
from jaxmm.nn.transformer import Stack, TransformerConfig, layer_norm
from jaxmm.validation import POSITIVE, check_types, require


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """A text tower. The defaults are CLIP's; SigLIP's is bidirectional, has no mask and pools the last position."""

    transformer: TransformerConfig
    vocab_size: Annotated[int | None, POSITIVE] = 49_408
    """Number of token ids; None: that of the run's tokenizer."""
    context_length: Annotated[int, POSITIVE] = 77
    """Tokens per text, padding included."""
    causal: bool = True
    """True if a token attends only to itself and those before it."""
    pad_id: int | None = None
    """Id of tokens that are hidden from attention and from mean pooling; None: there is none, as in CLIP (whose causal
    mask hides what follows the end) and SigLIP (trained without a mask)."""
    pool: Literal["argmax", "eos", "last", "first", "mean", "map"] = "argmax"
    """Vector that represents the text. argmax: at the largest id, CLIP's end token; eos: at the first `eos_id`; last:
    at the last position (SigLIP); first: at the first; mean: the mean without padding; map: attention pooling."""
    eos_id: int | None = None
    """End token, for the pool `eos`; None: that of the run's tokenizer."""

    def __post_init__(self):
        check_types(self, "text")

    def needed_length(self, tokens: Int[np.ndarray, "b t"]) -> Int[np.ndarray, "b"]:
        """Return how many leading tokens of each text its pooled vector depends on."""
        if not self.causal or self.pool not in ("argmax", "eos"):
            return np.full(len(tokens), tokens.shape[1])
        return (tokens.argmax(axis=1) if self.pool == "argmax" else (tokens == self.eos_id).argmax(axis=1)) + 1


@dataclass(frozen=True, kw_only=True)
class CLIPConfig:
    """Two towers, the size of their shared space, and the loss's learned scale and bias."""

    vision: ViTConfig
    text: TextConfig
    embed_dim: Annotated[int, POSITIVE] = 512
    """e, the size of the shared space."""
    vision_projection: bool = True
    """True if the pooled image is projected; SigLIP takes it as it is."""
    text_projection_bias: bool = False
    """True if the text projection has a bias, as in SigLIP."""
    logit_scale: float = math.log(1 / 0.07)
    """Initial logarithm of the temperature's inverse (ln 10 for SigLIP)."""
    logit_bias: float | None = None
    """Initial bias of the logits; None: none (-10 for SigLIP)."""

    def __post_init__(self):
        """Check that the towers fit the shared space."""
        check_types(self)
        require(not self.vision.classes, "vision.classes", self.vision.classes, "None: a tower has no head")
        if not self.vision_projection:
            width = self.vision.pre_logits or self.vision.transformer.width
            require(self.embed_dim == width, "embed_dim", self.embed_dim,
                    f"the image tower's {width}, without vision_projection")

    @property
    def tower(self) -> ViTConfig:
        """The image tower."""
        return self.vision

    def adopt(self, trained: Any, image_size: int) -> "CLIPConfig | None":
        """Return this model with the towers of another CLIP, or with the image tower of a ViT; None for others."""
        if trained.tower is not trained and not isinstance(trained, CLIPConfig):
            return None
        vision = self.vision.adopt(trained, image_size)
        if trained.tower is trained:
            return replace(self, vision=replace(vision, distillation_head=False))
        text = replace(trained.text, transformer=self.text.transformer.adopt(trained.text.transformer))
        return replace(trained, vision=vision, text=text,
                       logit_bias=None if self.logit_bias is None else trained.logit_bias or self.logit_bias)

    def trained_path(self, path: str, trained: Any) -> str | None:
        """Return the path in `trained` of the parameter at `path`; None if it starts anew."""
        if path.startswith("vision/"):
            return self.vision.trained_path(path.removeprefix("vision/"), trained)
        return None if trained.tower is trained else path


class TextOutput(NamedTuple):
    """Outputs of a text tower; `hidden` and `attention` are None unless requested."""

    tokens: Float[Array, "b t d"]
    """Tokens behind the final norm."""
    pooled: Float[Array, "b d"]
    """One vector per text."""
    hidden: Float[Array, "l b t d"] | None
    """Tokens after each layer."""
    attention: Float[Array, "l b h t t"] | None
    """Attention weights of each layer."""


class TextTower(nn.Module):
    """A transformer over tokens, pooled to one vector."""

    config: TextConfig

    @nn.compact
    def __call__(self, tokens: Int[Array, "b t"], *, train: bool, hidden: bool = False, attention: bool = False
                 ) -> TextOutput:
        """Encode texts. Raise `ValueError` if they are longer than the position table."""
        config, width = self.config, self.config.transformer.width
        length = tokens.shape[1]
        if length > config.context_length:
            raise ValueError(f"texts are {length} tokens long; this model reads at most {config.context_length}")
        x = TokenEmbedding(config.vocab_size, width, name="tokens")(tokens)
        x = x + self.param("positions", nn.initializers.normal(0.01), (config.context_length, width))[None, :length]
        valid = None if config.pad_id is None else tokens != config.pad_id
        mask = padding_mask = None if valid is None else valid[:, None, None, :]
        if config.causal:
            mask = causal_mask(length) if padding_mask is None else causal_mask(length) & padding_mask
        x = nn.Dropout(config.transformer.dropout, deterministic=not train)(x)
        stack = Stack(config.transformer, name="encoder")(
            x.astype(config.transformer.dtype), mask, train=train, hidden=hidden, attention=attention)
        x = layer_norm(config.transformer, "norm")(stack.tokens)
        return TextOutput(x, self._pool(x, tokens, valid, padding_mask, train), stack.hidden, stack.attention)

    def _pool(self, x, tokens, valid, padding_mask, train):
        config, (b, length) = self.config, tokens.shape
        match config.pool:
            case "argmax":
                at = tokens.argmax(axis=1)
            case "eos":
                at = (tokens == config.eos_id).argmax(axis=1)
            case "last":
                at = jnp.full((b,), length - 1)
            case "first":
                at = jnp.zeros((b,), int)
            case "mean":
                valid = jnp.ones((b, length), bool) if valid is None else valid
                valid = valid.astype(jnp.float32)
                weights = (valid / valid.sum(axis=1, keepdims=True).clip(1)).astype(x.dtype)
                return jnp.einsum("btd,bt->bd", x, weights)
            case "map":
                return MapHead(config.transformer, name="map_head")(x, padding_mask, train=train)
        return jnp.take_along_axis(x, at[:, None, None], axis=1)[:, 0]


class CLIPOutput(NamedTuple):
    """Embeddings of length 1, the scale and bias of their logits, and the attention weights if requested."""

    image: Float[Array, "b e"]
    text: Float[Array, "m e"]
    logit_scale: Float[Array, ""]
    """exp of the parameter."""
    logit_bias: Float[Array, ""]
    image_attention: Float[Array, "l b h n n"] | None
    """Attention weights of the image tower."""
    text_attention: Float[Array, "l m k t t"] | None
    """Attention weights of the text tower, k heads."""


def normalise(x: Float[Array, "b e"]) -> Float[Array, "b e"]:
    """Return the rows at length 1, in fp32."""
    x = widened(x)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


class CLIP(nn.Module):
    """Two towers with projections into one space.

    `encode_image` and `encode_text` return what the projections do, `embed_image` and `embed_text` return them at
    length 1.
    """

    config: CLIPConfig

    def setup(self):
        """Declare the towers."""
        config = self.config
        self.vision = ViT(config.vision)
        self.text = TextTower(config.text)

        def projection(width, bias):
            return nn.Dense(config.embed_dim, use_bias=bias, kernel_init=nn.initializers.normal(width**-0.5))

        vision_width = config.vision.pre_logits or config.vision.transformer.width
        if config.vision_projection:
            self.vision_projection = projection(vision_width, bias=False)
        self.text_projection = projection(config.text.transformer.width, config.text_projection_bias)
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(config.logit_scale), ())
        if config.logit_bias is not None:
            self.logit_bias = self.param("logit_bias", nn.initializers.constant(config.logit_bias), ())

    def encode_image(self, images: Float[Array, "b H W c"], *, train: bool) -> Float[Array, "b e"]:
        """Return image embeddings in the shared space, not normalised, fp32."""
        return self._project_image(self.vision(images, train=train))

    def encode_text(self, tokens: Int[Array, "b t"], *, train: bool) -> Float[Array, "b e"]:
        """Return text embeddings in the shared space, not normalised, fp32."""
        return self._project_text(self.text(tokens, train=train))

    def embed_image(self, images: Float[Array, "b H W c"], *, train: bool) -> Float[Array, "b e"]:
        """Return image embeddings in the shared space, of length 1, fp32."""
        return normalise(self.encode_image(images, train=train))

    def embed_text(self, tokens: Int[Array, "b t"], *, train: bool) -> Float[Array, "b e"]:
        """Return text embeddings in the shared space, of length 1, fp32."""
        return normalise(self.encode_text(tokens, train=train))

    def image_features(self, images: Float[Array, "b H W c"], *, train: bool) -> Float[Array, "b d"]:
        """Return the pooled image before the projection, which CLIP's linear probes read."""
        return widened(self.vision(images, train=train).pooled)

    def _project_image(self, vision):
        return self.vision_projection(widened(vision.pooled)) if self.config.vision_projection else widened(
            vision.pooled)

    def _project_text(self, text):
        return self.text_projection(widened(text.pooled))

    def __call__(
        self, images: Float[Array, "b H W c"], tokens: Int[Array, "m t"], *, train: bool, attention: bool = False,
    ) -> CLIPOutput:
        """Return the embeddings of both; `attention` requests the attention weights of both towers."""
        bias = jnp.zeros(()) if self.config.logit_bias is None else self.logit_bias
        vision = self.vision(images, train=train, attention=attention)
        text = self.text(tokens, train=train, attention=attention)
        return CLIPOutput(normalise(self._project_image(vision)), normalise(self._project_text(text)),
                          jnp.exp(self.logit_scale), bias, vision.attention, text.attention)


# open_clip's and OpenAI's names: size/patch of the image tower, image side, text width, heads, layers, embed_dim
CLIP_SIZES: dict[str, tuple[str, int, int, int, int, int]] = {
    "ViT-S-32": ("S/32", 224, 384, 6, 12, 384),
    "ViT-S-16": ("S/16", 224, 384, 6, 12, 384),
    "ViT-M-32": ("M/32", 224, 512, 8, 12, 512),
    "ViT-M-16": ("M/16", 224, 512, 8, 12, 512),
    "ViT-B-32": ("B/32", 224, 512, 8, 12, 512),
    "ViT-B-32-256": ("B/32", 256, 512, 8, 12, 512),
    "ViT-B-16": ("B/16", 224, 512, 8, 12, 512),
    "ViT-L-16": ("L/16", 224, 768, 12, 12, 768),
    "ViT-L-14": ("L/14", 224, 768, 12, 12, 768),
    "ViT-L-14-336": ("L/14", 336, 768, 12, 12, 768),
    "ViT-H-14": ("H/14", 224, 1024, 16, 24, 1024),
    "ViT-g-14": ("g/14", 224, 1024, 16, 24, 1024),
    "ViT-bigG-14": ("G/14", 224, 1280, 20, 32, 1280),
}


def clip(name: str, *, activation: str = "gelu", stack: dict | None = None, **overrides) -> CLIPConfig:
    """Return the configuration of open_clip's `name`; `activation="quick_gelu"` for OpenAI's weights.

    `stack` holds fields of both towers' `TransformerConfig`, `overrides` fields of `CLIPConfig`.
    """
    require(name in CLIP_SIZES, "name", name, "one of " + ", ".join(CLIP_SIZES))
    variant, image_size, width, heads, depth, embed_dim = CLIP_SIZES[name]
    common = {"activation": activation, "eps": 1e-5} | (stack or {})
    text = TransformerConfig(**{"width": width, "depth": depth, "heads": heads, "mlp_dim": 4 * width,
                                "init": "clip"} | common)
    vision = vit(variant, image_size=image_size, pre_norm=True, patch_bias=False, positions_std=None,
                 stack={"init": "torch"} | common)
    return CLIPConfig(**{"vision": vision, "text": TextConfig(transformer=text), "embed_dim": embed_dim} | overrides)


# image tower, text tower, patch
SIGLIP_SIZES: dict[str, tuple[str, str, int]] = {
    "B/16": ("B", "B", 16),
    "L/16": ("L", "L", 16),
    "So400m/14": ("So400m", "So400m", 14),
    "So400m/16": ("So400m", "So400m", 16),
    "g-opt/16": ("g-opt", "So400m", 16),
}


def siglip(name: str, *, image_size: int = 224, vocab_size: int | None = 32_000, context_length: int = 64,
           stack: dict | None = None, **overrides) -> CLIPConfig:
    """Return the configuration of a published SigLIP (SigLIP 2: `vocab_size=256_000`).

    Images for So400m/14 are cropped to a multiple of 14: 384 becomes 378. `stack` holds fields of both
    towers' `TransformerConfig`, `overrides` fields of `CLIPConfig`.
    """
    require(name in SIGLIP_SIZES, "name", name, "one of " + ", ".join(SIGLIP_SIZES))
    vision_size, text_size, patch = SIGLIP_SIZES[name]
    common = {"activation": "gelu_tanh", "eps": 1e-6} | (stack or {})
    vision = ViTConfig(transformer=transformer(vision_size, **common), patch=patch, image_size=image_size,
                       pool="map", class_token=False, positions_std=None)
    text = TextConfig(transformer=transformer(text_size, **common), vocab_size=vocab_size,
                      context_length=context_length, causal=False, pool="last")
    defaults = {"vision": vision, "text": text, "embed_dim": vision.transformer.width, "vision_projection": False,
                "text_projection_bias": True, "logit_scale": math.log(10), "logit_bias": -10.0}
    return CLIPConfig(**defaults | overrides)
