"""One layer of BLIP's text transformer, with a method for each mode."""

from dataclasses import replace

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from jaxmm.models.med_config import MedConfig
from jaxmm.nn.attention import Attention, CachedKeysValues, Mask, add_to_cache, to_bhtd
from jaxmm.nn.transformer import Linear, Mlp, initializers, layer_norm

ContextMask = Bool[Array, "#r 1 1 #n"]
Context = Float[Array, "r n c"] | tuple[Float[Array, "r n c"], Float[Array, "r n c"]]
"""Tokens that cross-attention reads; of both images, for a text about two."""
ContextKeysValues = tuple[Float[Array, "r h n k"], Float[Array, "r h n k"]]
"""Cross-attention keys and values of a context, laid out by head."""
PAIR_CROSS_ATTENTION = ("first_cross_attention", "second_cross_attention")
"""The cross-attentions of a layer that reads two images."""


class MedLayer(nn.Module):
    """One layer, in every mode that `config` has.

    It owns bidirectional self-attention, causal self-attention, cross-attention and an MLP. Each mode uses its part, so
    that what is shared is shared by structure.
    """

    config: MedConfig
    merging: bool = False
    """True if the outputs of both images' cross-attentions are merged by the linear layer `merge`."""

    def setup(self):
        """Declare the parts that the modes need, the shared ones once."""
        for name in self._names():
            part = name.removeprefix("causal_")
            pair = part == "cross_attention" and self.config.merge_from is not None
            for branch in PAIR_CROSS_ATTENTION if pair else (name,):
                setattr(self, branch, self._branch(part))
            setattr(self, f"{name}_norm", layer_norm(self.config.transformer, None))
        if self.merging:
            stack = self.config.transformer
            self.merge = Linear((stack.width,), dtype=jnp.dtype(stack.dtype),
                                kernel_init=initializers(stack).attention_out)
        self.dropout = nn.Dropout(self.config.transformer.dropout)

    def _names(self) -> list[str]:
        parts = ("attention", "cross_attention", "mlp")
        encoding = parts if self.config.encoder else ()
        decoding = map(self._decoder_part, parts) if self.config.decoder else ()
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

    def _decoder_part(self, part: str) -> str:
        return f"causal_{part}" if self.config.encoder and part in self.config.own else part

    def encode(
        self, x: Float[Array, "b t d"], mask: Mask, context: Context | None, context_mask: ContextMask | None, *,
        train: bool, weights: bool = False,
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b h t n"] | None]:
        """Run the layer of the unimodal encoder, or with a `context` that of the image-grounded one.

        Return the tokens, and the weights of cross-attention if `weights`. Row r of `x` reads row r // (b // rows) of a
        `context` with fewer rows.
        """
        x, probabilities = self._add("attention", x, self.attention(x, x, mask, train=train)[0], train), None
        if context is not None:
            y, probabilities = self._read(x, context, context_mask, train=train, weights=weights)
            x = self._add("cross_attention", x, y, train)
        return self._add("mlp", x, self.mlp(x, train=train), train), probabilities

    def _read(self, x, context, context_mask, *, train: bool, weights: bool):
        """Cross-attend to one image, or to two by separate cross-attentions whose outputs are merged or averaged."""
        if self.config.merge_from is None:
            return _attend_grouped(self.cross_attention, x, context, context_mask, train=train, weights=weights)
        first, second = (getattr(self, name)(x, image, context_mask, train=train)[0]
                         for name, image in zip(PAIR_CROSS_ATTENTION, context, strict=True))
        return self.merge(jnp.concatenate([first, second], axis=-1)) if self.merging else (first + second) / 2, None

    def decode(
        self, x: Float[Array, "b t d"], mask: Mask, context: Float[Array, "r n c"], context_mask: ContextMask | None, *,
        train: bool, weights: bool = False,
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b h t n"] | None]:
        """Run the layer of the image-grounded decoder on all tokens at once.

        Return the tokens, and the weights of cross-attention if `weights`. `context` may have fewer rows, as in
        `encode`.
        """
        attention, cross, mlp = map(self._decoder_part, ("attention", "cross_attention", "mlp"))
        x = self._add(attention, x, getattr(self, attention)(x, x, mask, train=train)[0], train)
        y, probabilities = _attend_grouped(getattr(self, cross), x, context, context_mask, train=train,
                                           weights=weights)
        x = self._add(cross, x, y, train)
        return self._add(mlp, x, getattr(self, mlp)(x, train=train), train), probabilities

    def cross_attention_cache(self, context: Float[Array, "r n c"]) -> ContextKeysValues:
        """Return the cross-attention keys and values of `context` for `decode_step` and `decode_cached`."""
        return tuple(map(to_bhtd, getattr(self, self._decoder_part("cross_attention")).keys_values(context)))

    def decode_step(
        self, x: Float[Array, "b 1 d"], cache: CachedKeysValues, position: Int[Array, ""], mask: Mask,
        context: ContextKeysValues, context_mask: ContextMask | None,
    ) -> tuple[Float[Array, "b 1 d"], CachedKeysValues]:
        """Run `decode` on the token at `position`, given the cached keys and values of those before.

        Return the token, and the cache with its keys and values. `context` may have fewer rows, as in `encode`.
        """
        name = self._decoder_part("attention")
        attention = getattr(self, name)
        cache = add_to_cache(cache, attention.keys_values(x), position)
        x = self._add(name, x, attention.attend_cached(x, cache, mask), False)
        return self._decode_context(x, context, context_mask), cache

    def decode_cached(
        self, x: Float[Array, "b t d"], mask: Mask, context: ContextKeysValues, context_mask: ContextMask | None,
    ) -> Float[Array, "b t d"]:
        """Run `decode` without dropout, given what `cross_attention_cache` returned."""
        name = self._decoder_part("attention")
        x = self._add(name, x, getattr(self, name)(x, x, mask, train=False)[0], False)
        return self._decode_context(x, context, context_mask)

    def _decode_context(self, x, context, context_mask):
        """Run cross-attention and the MLP of the decoder."""
        cross, mlp = self._decoder_part("cross_attention"), self._decoder_part("mlp")
        grouped = group_by_context(x, len(context[0]))
        x = self._add(cross, x, getattr(self, cross).attend_cached(grouped, context, context_mask).reshape(x.shape),
                      False)
        return self._add(mlp, x, getattr(self, mlp)(x, train=False), False)

    def __call__(self, x: Float[Array, "b t d"], context: Float[Array, "b n c"]) -> Float[Array, "b t d"]:
        """Run every mode once, to create its parameters."""
        mask = jnp.ones((1, 1, 1, 1), bool)
        if self.config.encoder:
            images = context if self.config.merge_from is None else (context, context)
            x, _ = self.encode(x, mask, images, None, train=False)
        return self.decode(x, mask, context, None, train=False)[0] if self.config.decoder else x


def _attend_grouped(attention, x, context, context_mask, *, train: bool, weights: bool):
    """Attend to contexts that may have fewer rows than `x`; keys and values are computed once per context."""
    keys_values = attention.keys_values(context)
    y, probabilities = attention.attend(group_by_context(x, len(context)), keys_values, context_mask, train=train,
                                        weights=weights)
    return y.reshape(x.shape), probabilities


def group_by_context(x: Float[Array, "b t d"], rows: int) -> Float[Array, "r s d"]:
    """Concatenate the texts that read the same one of `rows` contexts, as if they were one text."""
    return x.reshape(rows, -1, x.shape[-1])
