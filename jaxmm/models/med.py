"""BLIP's text transformer (Li et al. 2022, section 3.1): a mixture of encoder and decoder, BERT with a picture to see.

Its three modes are methods. A layer owns self-attention that reads both ways and self-attention that is causal,
cross-attention to a picture, and an MLP; each mode uses its part of them, so that what is shared is shared by
structure.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from jaxmm.nn.attention import Attention, CachedKeysValues, Mask, causal_mask, to_bhtd
from jaxmm.nn.embeddings import TokenEmbedding
from jaxmm.nn.precision import wide
from jaxmm.nn.transformer import (
    ACTIVATIONS,
    REMAT_POLICIES,
    Linear,
    Mlp,
    TransformerConfig,
    initializers,
    layer_norm,
    unstack,
)
from jaxmm.sharding import constrain_batch
from jaxmm.validation import check_types, require

Seen = tuple[Float[Array, "r h n k"], Float[Array, "r h n k"]]
"""The keys and values of a context, laid out by head."""
Cache = list[CachedKeysValues]
"""Every layer's keys and values of the tokens decoded so far, in room for all to come."""
ContextMask = Bool[Array, "#r 1 1 #n"]
Context = Float[Array, "r n c"] | tuple[Float[Array, "r n c"], Float[Array, "r n c"]]
"""The tokens that cross-attention looks at; a text about two pictures looks at those of both."""
Part = Literal["attention", "cross_attention", "mlp"]
TWINS = ("first_cross_attention", "second_cross_attention")
"""The cross-attentions of a layer that looks at two pictures."""


@dataclass(frozen=True, kw_only=True)
class MedConfig:
    """A text transformer in BERT's form: norms behind the branches. The defaults are BLIP base's."""

    transformer: TransformerConfig = field(default_factory=lambda: TransformerConfig(
        width=768, depth=12, heads=12, mlp_dim=3072, eps=1e-12, init="normal", dropout=0.1, attention_dropout=0.1))
    """`dropout` is on the embeddings and behind each branch."""
    vocab_size: int | None = 30_524
    """BERT's 30,522, and the first tokens of the decoder and of the image-grounded encoder. None: those of the run's
    tokenizer, and these two."""
    positions: int = 512
    """Longest text, in tokens."""
    context_width: int = 768
    """c, of the tokens that cross-attention looks at."""
    encoder: bool = True
    """Whether it encodes: texts alone, and texts with a picture."""
    decoder: bool = True
    """Whether it decodes."""
    own: tuple[Part, ...] = ("attention",)
    """What the decoder does not share with the encoder. The paper compares all but self-attention (the default, table
    3), all but cross-attention, everything, and nothing."""
    merge_from: int | None = None
    """Read with two pictures (section 4.5): each layer has a cross-attention for either, whose results the layers from
    this number on merge by a linear layer (BLIP: 6 of 12); those before take the mean. None: one picture."""
    pad_id: int = 0
    """Hidden from attention."""
    end_id: int = 102
    """[SEP]."""
    decode_id: int = 30_522
    """[DEC], which begins what is decoded."""
    encode_id: int = 30_523
    """[ENC], which takes the place of [CLS] where a picture is seen."""

    def __post_init__(self):
        """Checks ranges."""
        check_types(self, "text")
        require(self.encoder or self.decoder, "text.encoder", self.encoder, "True, where decoder is False")
        require(self.vocab_size is None or self.vocab_size > 0, "text.vocab_size", self.vocab_size, "positive, or None")
        for name in ("positions", "context_width"):
            require(getattr(self, name) > 0, f"text.{name}", getattr(self, name), "a positive number")
        for name in ("pad_id", "end_id"):
            require(0 <= getattr(self, name) < (self.vocab_size or math.inf), f"text.{name}", getattr(self, name),
                    f"0 or more, below vocab_size = {self.vocab_size}")
        if self.merge_from is not None:
            depth = self.transformer.depth
            require(0 < self.merge_from < depth, "text.merge_from", self.merge_from,
                    f"1 to {depth - 1}, below the depth, or None")
            require(not self.decoder, "text.decoder", self.decoder, "False: with merge_from it only encodes")


class Sight(NamedTuple):
    """What a layer that decodes step by step works with: its parameters, cut out of the stack once for all steps, and
    the keys and values of the context."""

    params: Any
    seen: Seen


class MedLayer(nn.Module):
    """One layer, in every mode that `config` has."""

    config: MedConfig
    merging: bool = False
    """Whether it merges what it sees of two pictures, by `merge`."""

    def setup(self):
        """Declares the parts that the modes need, the shared ones once."""
        for name in self._names():
            part = name.removeprefix("causal_")
            twins = TWINS if part == "cross_attention" and self.config.merge_from is not None else (name,)
            for each in twins:
                setattr(self, each, self._branch(part))
            setattr(self, f"{name}_norm", layer_norm(self.config.transformer, None))
        if self.merging:
            stack = self.config.transformer
            self.merge = Linear((stack.width,), dtype=jnp.dtype(stack.dtype),
                                kernel_init=initializers(stack).attention_out)
        self.dropout = nn.Dropout(self.config.transformer.dropout)

    def _names(self) -> list[str]:
        parts = ("attention", "cross_attention", "mlp")
        encoding = parts if self.config.encoder else ()
        decoding = map(self._causal, parts) if self.config.decoder else ()
        return list(dict.fromkeys((*encoding, *decoding)))

    def _branch(self, part: str) -> nn.Module:
        stack = self.config.transformer
        if part == "mlp":
            return Mlp(replace(stack, dropout=0.0))
        init = initializers(stack)
        return Attention(stack.width, stack.heads, jnp.dtype(stack.dtype), stack.attention_dropout,
                         init.attention_in, init.attention_out)

    def _add(self, name: str, x, y, train: bool):
        y = self.dropout(y, deterministic=not train)
        return getattr(self, f"{name}_norm")(x + y)

    def _causal(self, part: str) -> str:
        return f"causal_{part}" if self.config.encoder and part in self.config.own else part

    def encode(
        self, x: Float[Array, "b t d"], mask: Mask, context: Context | None, context_mask: ContextMask | None, *,
        train: bool, weights: bool = False,
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b h t n"] | None]:
        """The layer of the unimodal encoder, and with a `context` of the image-grounded one; and with `weights` those
        of cross-attention.

        `context` may have fewer rows than `x`: then each of them is looked at by as many rows of `x` in turn.
        """
        x, shares = self._add("attention", x, self.attention(x, x, mask, train=train)[0], train), None
        if context is not None:
            y, shares = self._see(x, context, context_mask, train=train, weights=weights)
            x = self._add("cross_attention", x, y, train)
        return self._add("mlp", x, self.mlp(x, train=train), train), shares

    def _see(self, x, context, context_mask, *, train: bool, weights: bool):
        """What cross-attention finds in a picture; of two, each by its own, what they find is merged, or its mean."""
        if self.config.merge_from is None:
            seen = self.cross_attention.keys_values(context)
            y, shares = self.cross_attention.attend(group_by_context(x, len(seen[0])), seen, context_mask, train=train,
                                                       weights=weights)
            return y.reshape(x.shape), shares
        first, second = (getattr(self, name)(x, picture, context_mask, train=train)[0]
                         for name, picture in zip(TWINS, context, strict=True))
        return self.merge(jnp.concatenate([first, second], axis=-1)) if self.merging else (first + second) / 2, None

    def decode(
        self, x: Float[Array, "b t d"], mask: Mask, context: Float[Array, "b n c"], context_mask: ContextMask | None, *,
        train: bool, weights: bool = False,
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b h t n"] | None]:
        """The layer of the image-grounded decoder, all tokens at once; and with `weights` those of cross-attention."""
        own, cross, mlp = map(self._causal, ("attention", "cross_attention", "mlp"))
        x = self._add(own, x, getattr(self, own)(x, x, mask, train=train)[0], train)
        y, shares = getattr(self, cross)(x, context, context_mask, train=train, weights=weights)
        x = self._add(cross, x, y, train)
        return self._add(mlp, x, getattr(self, mlp)(x, train=train), train), shares

    def look(self, context: Float[Array, "r n c"]) -> Seen:
        """What `step` and `follow` see of the context."""
        return tuple(map(to_bhtd, getattr(self, self._causal("cross_attention")).keys_values(context)))

    def step(
        self, x: Float[Array, "b 1 d"], past: CachedKeysValues, at: Int[Array, ""], mask: Mask, seen: Seen,
        context_mask: ContextMask | None,
    ) -> tuple[Float[Array, "b 1 d"], CachedKeysValues]:
        """`decode` of the token at place `at`, with the keys and values of those before; and `past` with its own.

        `seen` may have fewer rows than `x`: then each of them is looked at by as many rows of `x` in turn.
        """
        own = self._causal("attention")
        past = tuple(jax.lax.dynamic_update_slice_in_dim(old, to_bhtd(new).astype(old.dtype), at, axis=2)
                     for old, new in zip(past, getattr(self, own).keys_values(x), strict=True))
        x = self._add(own, x, getattr(self, own).attend_cached(x, past, mask), False)
        return self._grounded(x, seen, context_mask), past

    def follow(
        self, x: Float[Array, "b t d"], mask: Mask, seen: Seen, context_mask: ContextMask | None,
    ) -> Float[Array, "b t d"]:
        """`decode` without dropout, of what `look` saw; with fewer rows in `seen` as in `step`."""
        own = self._causal("attention")
        return self._grounded(self._add(own, x, getattr(self, own)(x, x, mask, train=False)[0], False), seen,
                              context_mask)

    def _grounded(self, x, seen, context_mask):
        cross, mlp = self._causal("cross_attention"), self._causal("mlp")
        y = getattr(self, cross).attend_cached(group_by_context(x, len(seen[0])), seen, context_mask).reshape(x.shape)
        x = self._add(cross, x, y, False)
        return self._add(mlp, x, getattr(self, mlp)(x, train=False), False)

    def __call__(self, x: Float[Array, "b t d"], context: Float[Array, "b n c"]) -> Float[Array, "b t d"]:
        """Every mode once, to make its parameters."""
        mask = jnp.ones((1, 1, 1, 1), bool)
        if self.config.encoder:
            pictures = context if self.config.merge_from is None else (context, context)
            x, _ = self.encode(x, mask, pictures, None, train=False)
        return self.decode(x, mask, context, None, train=False)[0] if self.config.decoder else x


class Embedding(nn.Module):
    """Tokens and their places, normalised (BERT, Devlin et al. 2019)."""

    config: MedConfig

    def setup(self):
        """Declares the tables."""
        config = self.config
        width = config.transformer.width
        self.tokens = TokenEmbedding(config.vocab_size, width)
        self.positions = self.param("positions", nn.initializers.normal(0.02), (config.positions, width))
        self.norm = layer_norm(config.transformer, None)
        self.dropout = nn.Dropout(config.transformer.dropout)

    def __call__(self, tokens: Int[Array, "b t"], start: int | Int[Array, ""] = 0, *, train: bool
                 ) -> Float[Array, "b t d"]:
        """The vectors of `tokens`, the first of which is at place `start`."""
        if tokens.shape[1] > self.config.positions:
            raise ValueError(f"texts are {tokens.shape[1]} tokens long; this model reads at most "
                             f"{self.config.positions}")
        places = jax.lax.dynamic_slice_in_dim(self.positions, start, tokens.shape[1])
        x = self.norm(self.tokens(tokens) + places)
        return self.dropout(x, deterministic=not train).astype(self.config.transformer.dtype)

    def attend(self, x: Float[Array, "b t d"]) -> Float[Array, "b t v"]:
        """Products with every token's vector, fp32."""
        table = self.tokens.table
        return jnp.einsum("btd,vd->btv", x, table.astype(x.dtype), preferred_element_type=wide(x.dtype))


class LanguageHead(nn.Module):
    """BERT's prediction of tokens: linear, activation, norm, then products with the table of tokens, and a bias."""

    config: MedConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"], embedding: Embedding) -> Float[Array, "b t v"]:
        """Logits, fp32."""
        stack = self.config.transformer
        transform = Linear((stack.width,), dtype=jnp.dtype(stack.dtype), kernel_init=initializers(stack).up,
                           name="transform")
        x = layer_norm(stack, "norm")(ACTIVATIONS[stack.activation](transform(x)))
        return embedding.attend(x) + self.param("bias", nn.initializers.zeros, (self.config.vocab_size,))


class Med(nn.Module):
    """The text transformer."""

    config: MedConfig

    def setup(self):
        """Declares the parts; layers are stacked under `blocks`, what only some of them have under `merge`."""
        config = self.config
        self.embedding = Embedding(config)
        depth = config.transformer.depth

        def init(rng, count, merging=False):
            layer = MedLayer(config, merging, parent=None)

            def one(key):
                return layer.init(key, jnp.zeros((1, 1, config.transformer.width)),
                                  jnp.zeros((1, 1, config.context_width)))["params"]
            return jax.vmap(one)(jax.random.split(rng, count))

        self.blocks = self.param("blocks", init, depth)
        if config.merge_from is not None:
            self.merge = self.param("merge", lambda rng: init(rng, depth - config.merge_from, True)["merge"])
        if config.decoder:
            self.head = LanguageHead(config)

    def encode(
        self, tokens: Int[Array, "b t"], context: Context | None = None, *, train: bool,
        mask: Bool[Array, "b t"] | None = None, context_mask: Bool[Array, "r n"] | None = None,
    ) -> Float[Array, "b t d"]:
        """Tokens read both ways: by themselves, or with a picture (whose first token is then `encode_id`), or two.

        `mask` says which tokens are there; None: those that are not padding. With fewer pictures than texts, as many
        texts in turn look at each, whose keys and values are computed once for all that do.
        """
        mask = tokens != self.config.pad_id if mask is None else mask
        x = self.embedding(tokens, train=train)
        if self.is_initializing():
            return x
        return self._run(MedLayer.encode, x, mask[:, None, None, :], context, context_mask, train=train)[0]

    def decode(
        self, tokens: Int[Array, "b t"], context: Float[Array, "b n c"], *, train: bool,
        mask: Bool[Array, "b t"] | None = None, context_mask: Bool[Array, "b n"] | None = None,
    ) -> Float[Array, "b t v"]:
        """Logits of the token after each, in view of those before and of the context."""
        mask = tokens != self.config.pad_id if mask is None else mask
        x = self.embedding(tokens, train=train)
        if not self.is_initializing():
            seen = causal_mask(tokens.shape[1]) & mask[:, None, None, :]
            x, _ = self._run(MedLayer.decode, x, seen, context, context_mask, train=train)
        return self.head(x, self.embedding)

    def cross_attention(
        self, tokens: Int[Array, "b t"], context: Float[Array, "b n c"], *, causal: bool,
        context_mask: Bool[Array, "b n"] | None = None,
    ) -> Float[Array, "l b h t n"]:
        """Where in the context each token looks, in every layer: of the decoder, or of the encoder."""
        mask, method = (tokens != self.config.pad_id)[:, None, None, :], MedLayer.encode
        if causal:
            mask, method = causal_mask(tokens.shape[1]) & mask, MedLayer.decode
        x = self.embedding(tokens, train=False)
        return self._run(method, x, mask, context, context_mask, train=False, weights=True)[1]

    def look(self, context: Float[Array, "r n c"]) -> list[Sight]:
        """What every layer works with in `step` and `follow`, made once for all calls."""
        layer = MedLayer(self.config, parent=None)
        return [Sight(params, layer.apply({"params": params}, context, method=MedLayer.look))
                for params in unstack(self.blocks, self.config.transformer.depth)]

    def step(
        self, tokens: Int[Array, "b"], at: Int[Array, ""], cache: Cache, sights: list[Sight],
        mask: Bool[Array, "b s"], context_mask: Bool[Array, "r n"] | None = None,
    ) -> tuple[Float[Array, "b v"], Cache]:
        """Logits after one more token of each text, at place `at`; and the cache with it.

        `mask` says at which places of the cache there are tokens. `sights` is what `look` made.
        """
        layer, new = MedLayer(self.config, parent=None), []
        mask = mask[:, None, None, :]
        context_mask = None if context_mask is None else context_mask[:, None, None, :]
        x = self.embedding(tokens[:, None], at, train=False)
        for past, (params, seen) in zip(cache, sights, strict=True):
            x, past = layer.apply({"params": params}, x, past, at, mask, seen, context_mask, method=MedLayer.step)
            new.append(past)
        return self.head(x, self.embedding)[:, 0], new

    def follow(
        self, tokens: Int[Array, "b t"], sights: list[Sight], context_mask: Bool[Array, "r n"] | None = None,
    ) -> Float[Array, "b t v"]:
        """`decode` without dropout, of what `look` made; each row of the context is seen by as many texts in turn."""
        layer = MedLayer(self.config, parent=None)
        mask = causal_mask(tokens.shape[1]) & (tokens != self.config.pad_id)[:, None, None, :]
        context_mask = None if context_mask is None else context_mask[:, None, None, :]
        x = self.embedding(tokens, train=False)
        for params, seen in sights:
            x = layer.apply({"params": params}, x, mask, seen, context_mask, method=MedLayer.follow)
        return self.head(x, self.embedding)

    def _run(self, method, x, mask, context, context_mask, *, train: bool, weights: bool = False):
        """All layers, one after the other, those that merge last: the tokens, and with `weights` those of
        cross-attention."""
        stack, first = self.config.transformer, self.config.merge_from
        context_mask = None if context_mask is None else context_mask[:, None, None, :]
        keys = None
        if train and stack.stochastic:
            keys = jax.random.split(self.make_rng("dropout"), stack.depth)

        def run(x, layer, layers, count):
            def one(x, inputs):
                params, key = inputs
                rngs = None if key is None else {"dropout": key}
                x, shares = layer.apply({"params": params}, constrain_batch(x), mask, context, context_mask,
                                        train=train, weights=weights, rngs=rngs, method=method)
                return constrain_batch(x), shares

            if stack.remat != "none":
                one = jax.checkpoint(one, policy=REMAT_POLICIES[stack.remat], prevent_cse=not stack.scan)
            if stack.scan:
                return jax.lax.scan(one, x, layers)
            collected = []
            for inputs in unstack(layers, count):
                x, shares = one(x, inputs)
                collected.append(shares)
            return x, jnp.stack(collected) if weights else None

        layers = self.blocks, keys
        if first is None:
            return run(x, MedLayer(self.config, parent=None), layers, stack.depth)
        low, (params, keys) = (jax.tree.map(lambda leaf, part=part: leaf[part], layers)
                               for part in (slice(first), slice(first, None)))
        x, _ = run(x, MedLayer(self.config, parent=None), low, first)
        layers = {**params, "merge": self.merge}, keys
        return run(x, MedLayer(self.config, True, parent=None), layers, stack.depth - first)


def group_by_context(x: Float[Array, "b t d"], rows: int) -> Float[Array, "r s d"]:
    """The texts that look at one of `rows` contexts, one behind the other, as if they were the tokens of one text."""
    return x.reshape(rows, -1, x.shape[-1])


def empty_cache(config: MedConfig, batch: int, length: int) -> Cache:
    """Room for `length` tokens of `batch` texts."""
    stack = config.transformer
    room = jnp.zeros((batch, stack.heads, length, stack.width // stack.heads), stack.dtype)
    return [(room, room)] * stack.depth
