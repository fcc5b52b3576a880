"""A palette of colours: images as tokens, one per pixel, and back (iGPT, Chen et al. 2020, section 3.1)."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, UInt8

from jaxmm.optional import require_extra
from jaxmm.validation import check_types, require

PIXELS = 2**18
"""Most pixels that a palette is fitted to."""


@dataclass(frozen=True, kw_only=True)
class Palette:
    """Colours, each of which is a token."""

    colors: tuple[tuple[float, float, float], ...]
    """Red, green and blue on the scale -1 to 1."""

    def __post_init__(self):
        """Check the colours."""
        check_types(self, "palette")
        require(self.colors, "palette.colors", self.colors, "one colour or more")

    def to_tokens(self, image: UInt8[Array | np.ndarray, "*b h w 3"]) -> Int[Array, "*b n"]:
        """Return the number of the nearest colour of every pixel, row by row; among equals the first.

        Squared distances are compared without the square of the pixel, which is the same for all colours.
        """
        colors = jnp.asarray(self.colors, jnp.float32)
        pixels = jnp.asarray(image).astype(jnp.float32).reshape(-1, 3) / 127.5 - 1
        products = jnp.matmul(pixels, colors.T, precision=jax.lax.Precision.HIGHEST)
        nearest = (jnp.square(colors).sum(axis=1)[None] - 2 * products).argmin(axis=1)
        return nearest.reshape(*image.shape[:-3], -1)

    def to_images(self, tokens: Int[Array | np.ndarray, "*b n"], side: int) -> UInt8[Array, "*b {side} {side} 3"]:
        """Return square images of the colours of `tokens`."""
        levels = np.clip(np.rint(127.5 * (np.asarray(self.colors) + 1)), 0, 255).astype(np.uint8)
        return jnp.take(jnp.asarray(levels), tokens, axis=0).reshape(*tokens.shape[:-1], side, side, 3)


def fit_palette(images: UInt8[np.ndarray, "*b 3"], count: int) -> Palette:
    """Return `count` colours for `images`, by k-means of their pixels; if they have no more colours, exactly those.

    The same images give the same palette. The last colour is repeated if there are fewer than `count`.
    """
    pixels = images.reshape(-1, 3)
    if len(pixels) > PIXELS:
        pixels = pixels[np.random.default_rng(0).choice(len(pixels), PIXELS, replace=False)]
    colors = np.unique(pixels, axis=0) / 127.5 - 1
    if len(colors) > count:
        require_extra("train", "a palette of the training images")
        from sklearn.cluster import MiniBatchKMeans  # takes a second to import

        means = MiniBatchKMeans(count, batch_size=4096, n_init=1, random_state=0).fit(pixels / 127.5 - 1)
        colors = means.cluster_centers_
    colors = np.concatenate([colors, np.repeat(colors[-1:], count - len(colors), axis=0)])
    return Palette(colors=tuple(map(tuple, np.round(colors, 6).tolist())))  # a digit's difference of a host is lost
