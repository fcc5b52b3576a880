"""A task outside jaxmm whose decoder writes images: a Markov chain of grey levels, small enough for numpy to repeat."""

from dataclasses import dataclass, replace
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmm.task import Decoder, Embedder, Task

SIDE, LEVELS = 4, 5


@dataclass(frozen=True, kw_only=True)
class Chain(Task):
    """The next grey level depends on the one before and on the position. Level 5 is the start token."""

    levels: tuple[int, ...] | None = None
    """Grey levels of the tokens; None: quantiles of the training images."""
    decomposes: ClassVar[bool] = True
    image_size: ClassVar = SIDE

    def bind(self, *, image_size, classes, tokenizer):
        return self

    def fit(self, images):
        if self.levels is not None:
            return self
        return replace(self, levels=tuple(np.quantile(images(7), np.linspace(0, 1, LEVELS)).astype(int).tolist()))

    def init(self, rng):
        first, second, third = jax.random.split(rng, 3)
        return {"next": jax.random.normal(first, (LEVELS + 1, LEVELS)),
                "positions": jax.random.normal(second, (SIDE * SIDE, LEVELS)),
                "layers": jax.random.normal(third, (3, SIDE * SIDE * 3, 6))}

    def to_tokens(self, image):
        distance = jnp.abs(image[..., :1].astype(jnp.int32) - jnp.asarray(self.levels)[None, None, None])
        return distance.argmin(axis=-1).reshape(len(image), -1)

    def to_images(self, tokens):
        image = jnp.take(jnp.asarray(self.levels, jnp.uint8), tokens).reshape(-1, SIDE, SIDE, 1)
        return jnp.repeat(image, 3, axis=-1)

    def logits(self, params, tokens, prepared=None, context_mask=None):
        return params["next"][tokens] + params["positions"][None, :tokens.shape[1]]

    def encode(self, params, batch, rng):
        tokens = jnp.pad(self.to_tokens(batch["image"]), ((0, 0), (1, 0)), constant_values=LEVELS)
        return optax.softmax_cross_entropy_with_integer_labels(
            self.logits(params, tokens[:, :-1]), tokens[:, 1:]).mean(axis=1)

    def objective(self, params, outputs, batch):
        return outputs.mean(), {}

    @property
    def embedder(self):
        def layers(params, batch):
            return jnp.einsum("bp,lpd->bld", batch["image"].reshape(len(batch["image"]), -1) / 255.0, params["layers"])

        return Embedder(image=lambda params, batch: layers(params, batch)[:, 1], layers=layers,
                        features=lambda params, batch: layers(params, batch)[:, 1])

    @property
    def decoder(self):
        def decode_step(params, tokens, position, cache, prepared, cache_mask, context_mask):
            return params["next"][tokens] + params["positions"][position][None], cache

        return Decoder(
            context=None, cache=lambda rows, length: jnp.zeros((rows, 1)), decode_step=decode_step, logits=self.logits,
            start_id=LEVELS, end_id=None, pad_id=None, longest=SIDE * SIDE + 1, vocab_size=LEVELS,
            to_tokens=self.to_tokens, to_images=self.to_images, grid=(SIDE, SIDE))


CHAIN = Chain(levels=(0, 60, 120, 180, 240))


def chain_params():
    return jax.tree.map(np.asarray, CHAIN.init(jax.random.key(3)))


def chain_images(count, seed=0):
    """Images of the chain's levels, uint8 [n 4 4 3]."""
    levels = np.random.default_rng(seed).choice(CHAIN.levels, (count, SIDE, SIDE, 1))
    return levels.astype(np.uint8).repeat(3, axis=-1)


def log_chances(params, tokens):
    """Log-probabilities [n 16 5] of every token given the one before, by numpy."""
    before = np.concatenate([np.full((len(tokens), 1), LEVELS), tokens[:, :-1]], axis=1)
    logits = params["next"][before].astype(np.float64) + params["positions"]
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
