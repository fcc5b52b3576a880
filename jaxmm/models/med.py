"""BLIP's text transformer (Li et al. 2022, section 3.1): a mixture of encoder and decoder, BERT with cross-attention.

Its modes are methods: `encode` (a text alone, or grounded in an image), `decode` (all tokens at once), and
`decode_step` (one token more, with a cache).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from jaxmm.models.med_config import MedConfig
from jaxmm.models.med_layer import Context, ContextKeysValues, MedLayer
from jaxmm.nn.attention import CachedKeysValues, causal_mask
from jaxmm.nn.embeddings import TokenEmbedding
from jaxmm.nn.precision import wide
from jaxmm.nn.transformer import ACTIVATIONS, Linear, initializers, layer_norm, run_layers, unstack
from jaxmm.sharding import constrain_batch

Cache = list[CachedKeysValues]
"""Self-attention keys and values per layer, with room for all tokens to come."""


class CrossCache(NamedTuple):
    """Per-layer inputs of decoding: parameters, sliced out of the stack once, and the context's keys and values."""

    params: Any
    keys_values: ContextKeysValues


class Embedding(nn.Module):
    """Token and position embeddings, normalised (BERT, Devlin et al. 2019)."""

    config: MedConfig

    def setup(self):
        """Declare the tables."""
        config = self.config
        width = config.transformer.width
        self.tokens = TokenEmbedding(config.vocab_size, width)
        self.positions = self.param("positions", nn.initializers.normal(0.02), (config.positions, width))
        self.norm = layer_norm(config.transformer, None)
        self.dropout = nn.Dropout(config.transformer.dropout)

    def __call__(self, tokens: Int[Array, "b t"], start: int | Int[Array, ""] = 0, *, train: bool
                 ) -> Float[Array, "b t d"]:
        """Return the embeddings of `tokens`, the first of which has position `start`.

        Raise `ValueError` if there are more tokens than positions.
        """
        if tokens.shape[1] > self.config.positions:
            raise ValueError(f"texts are {tokens.shape[1]} tokens long; this model reads at most "
                             f"{self.config.positions}")
        positions = jax.lax.dynamic_slice_in_dim(self.positions, start, tokens.shape[1])
        x = self.norm(self.tokens(tokens) + positions[None])
        return self.dropout(x, deterministic=not train).astype(self.config.transformer.dtype)

    def attend(self, x: Float[Array, "b t d"]) -> Float[Array, "b t v"]:
        """Return the products with every token's embedding, fp32."""
        table = self.tokens.table
        return jnp.einsum("btd,vd->btv", x, table.astype(x.dtype), preferred_element_type=wide(x.dtype))


class LanguageHead(nn.Module):
    """BERT's language modelling head: linear, activation, norm, products with the token embeddings, and a bias."""

    config: MedConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"], embedding: Embedding) -> Float[Array, "b t v"]:
        """Return logits, fp32."""
        stack = self.config.transformer
        transform = Linear((stack.width,), dtype=jnp.dtype(stack.dtype), kernel_init=initializers(stack).up,
                           name="transform")
        x = layer_norm(stack, "norm")(ACTIVATIONS[stack.activation](transform(x)))
        return embedding.attend(x) + self.param("bias", nn.initializers.zeros, (self.config.vocab_size,))[None, None]


class Med(nn.Module):
    """The text transformer."""

    config: MedConfig

    def setup(self):
        """Declare the parts: layers are stacked under `blocks`, and what only some of them have under `merge`."""
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
        """Encode texts bidirectionally: alone, or with one image or two (the first token is then `encode_id`).

        `mask` is False for tokens to ignore; None: padding is ignored. If `context` has fewer rows than `tokens`, row r
        of the tokens reads context r // (b // rows), and keys and values are computed once per context.
        """
        mask = tokens != self.config.pad_id if mask is None else mask
        x = self.embedding(tokens, train=train)
        if self.is_initializing():
            return x
        return self._run(MedLayer.encode, x, mask[:, None, None, :], context, context_mask, train=train)[0]

    def decode(
        self, tokens: Int[Array, "b t"], context: Float[Array, "r n c"], *, train: bool,
        mask: Bool[Array, "b t"] | None = None, context_mask: Bool[Array, "r n"] | None = None,
    ) -> Float[Array, "b t v"]:
        """Return the logits of the token after each one, given those before it and the context.

        The context may have fewer rows than `tokens`, as in `encode`.
        """
        mask = tokens != self.config.pad_id if mask is None else mask
        x = self.embedding(tokens, train=train)
        if not self.is_initializing():
            mask = causal_mask(tokens.shape[1]) & mask[:, None, None, :]
            x, _ = self._run(MedLayer.decode, x, mask, context, context_mask, train=train)
        return self.head(x, self.embedding)

    def cross_attention_weights(
        self, tokens: Int[Array, "b t"], context: Float[Array, "b n c"], *, causal: bool,
        context_mask: Bool[Array, "b n"] | None = None,
    ) -> Float[Array, "l b h t n"]:
        """Return each layer's cross-attention weights: of the decoder if `causal`, else of the encoder."""
        mask, method = (tokens != self.config.pad_id)[:, None, None, :], MedLayer.encode
        if causal:
            mask, method = causal_mask(tokens.shape[1]) & mask, MedLayer.decode
        x = self.embedding(tokens, train=False)
        return self._run(method, x, mask, context, context_mask, train=False, weights=True)[1]

    def cross_attention_cache(self, context: Float[Array, "r n c"]) -> list[CrossCache]:
        """Return what each layer needs in `decode_step` and `decode_cached`, computed once for all calls."""
        layer = MedLayer(self.config, parent=None)
        return [CrossCache(params, layer.apply({"params": params}, context, method=MedLayer.cross_attention_cache))
                for params in unstack(self.blocks, self.config.transformer.depth)]

    def decode_step(
        self, tokens: Int[Array, "b"], position: Int[Array, ""], cache: Cache, cross_cache: list[CrossCache],
        mask: Bool[Array, "b s"], context_mask: Bool[Array, "r n"] | None = None,
    ) -> tuple[Float[Array, "b v"], Cache]:
        """Return the logits after one more token of each text, at `position`, and the cache with it.

        `mask` is True for the filled positions of the cache.
        """
        layer, new_cache = MedLayer(self.config, parent=None), []
        mask = mask[:, None, None, :]
        context_mask = None if context_mask is None else context_mask[:, None, None, :]
        x = self.embedding(tokens[:, None], position, train=False)
        for self_cache, (params, context) in zip(cache, cross_cache, strict=True):
            x, self_cache = layer.apply({"params": params}, x, self_cache, position, mask, context, context_mask,
                                        method=MedLayer.decode_step)
            new_cache.append(self_cache)
        return self.head(x, self.embedding)[:, 0], new_cache

    def decode_cached(
        self, tokens: Int[Array, "b t"], cross_cache: list[CrossCache], context_mask: Bool[Array, "r n"] | None = None,
    ) -> Float[Array, "b t v"]:
        """Return the logits of `decode` without dropout, given what `cross_attention_cache` returned.

        The context may have fewer rows than `tokens`, as in `encode`.
        """
        layer = MedLayer(self.config, parent=None)
        mask = causal_mask(tokens.shape[1]) & (tokens != self.config.pad_id)[:, None, None, :]
        context_mask = None if context_mask is None else context_mask[:, None, None, :]
        x = self.embedding(tokens, train=False)
        for params, context in cross_cache:
            x = layer.apply({"params": params}, x, mask, context, context_mask, method=MedLayer.decode_cached)
        return self.head(x, self.embedding)

    def _run(self, method, x, mask, context, context_mask, *, train: bool, weights: bool = False):
        """Run all layers in order, those that merge two images last.

        Return the tokens, and the weights of cross-attention if `weights`.
        """
        stack, first = self.config.transformer, self.config.merge_from
        context_mask = None if context_mask is None else context_mask[:, None, None, :]
        keys = None
        if train and stack.stochastic:
            keys = jax.random.split(self.make_rng("dropout"), stack.depth)

        def run(x, layer, layers):
            def one(x, inputs):
                params, key = inputs
                rngs = None if key is None else {"dropout": key}
                x, probabilities = layer.apply({"params": params}, constrain_batch(x), mask, context,
                                               context_mask, train=train, weights=weights, rngs=rngs, method=method)
                return constrain_batch(x), probabilities

            return run_layers(one, x, layers, stack)

        layers = self.blocks, keys
        if first is None:
            return run(x, MedLayer(self.config, parent=None), layers)
        low, (params, keys) = (jax.tree.map(lambda leaf, part=part: leaf[part], layers)
                               for part in (slice(first), slice(first, None)))
        x, _ = run(x, MedLayer(self.config, parent=None), low)
        layers = {**params, "merge": self.merge}, keys
        return run(x, MedLayer(self.config, True, parent=None), layers)
