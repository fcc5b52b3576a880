"""Patch embedding, position tables and how they are resized, token embedding."""

from typing import Literal

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxmm.sharding import constrain_batch, constrain_replicated


def patchify(image: Float[Array, "b H W c"], patch: int) -> Float[Array, "b n q"]:
    """Cut images into `patch` x `patch` squares, row by row, and flatten each as (row, column, channel)."""
    b, height, width, c = image.shape
    rows, columns = height // patch, width // patch
    x = image.reshape(b, rows, patch, columns, patch * c).swapaxes(2, 3)
    return x.reshape(b, rows * columns, patch * patch * c)


class PatchEmbedding(nn.Module):
    """Linear map of each patch (Dosovitskiy et al. 2021, eq. 1), with a convolution's kernel [p p c d].

    Computed as one matrix product, which is as fast forward and faster backward than the convolution it equals.
    """

    patch: int
    width: int
    bias: bool = True
    dtype: DTypeLike = jnp.float32
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal(in_axis=(0, 1, 2), out_axis=3)
    bias_init: nn.initializers.Initializer = nn.initializers.zeros

    @nn.compact
    def __call__(self, image: Float[Array, "b H W c"]) -> Float[Array, "b n d"]:
        """Embed the patches, row by row."""
        shape = (self.patch, self.patch, image.shape[-1], self.width)
        kernel = self.param("kernel", self.kernel_init, shape).reshape(-1, self.width)
        x = patchify(image.astype(self.dtype), self.patch) @ kernel.astype(self.dtype)
        if self.bias:
            x = x + self.param("bias", self.bias_init, (self.width,)).astype(self.dtype)[None, None]
        return x


def sincos_positions(rows: int, columns: int, width: int) -> Float[Array, "n d"]:
    """Return fixed 2-D sine-cosine positions (Beyer et al. 2022, MoCo v3): sin x, cos x, sin y, cos y, a quarter each.

    Raises ValueError unless 4 divides `width`.
    """
    if width % 4 or width < 8:
        raise ValueError(f"2-D sin-cos positions need a width divisible by 4, at least 8; got {width}")
    y, x = np.mgrid[:rows, :columns].reshape(2, -1, 1)
    omega = 10_000.0 ** -(np.arange(width // 4) / (width // 4 - 1))
    table = np.concatenate([np.sin(x * omega), np.cos(x * omega), np.sin(y * omega), np.cos(y * omega)], axis=1)
    return jnp.asarray(table, jnp.float32)


Resize = Literal["linear", "bicubic", "bicubic-antialias"]


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Evaluate the cubic convolution kernel (Keys 1981) with parameter `a`."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0))


def interpolation_matrix(old: int, new: int, method: Resize) -> np.ndarray:
    """Return fp64 weights [new, old] that resample a line of `old` points to `new` points.

    linear: corners onto corners, like scipy's zoom (vision_transformer, big_vision). bicubic: pixel centres, a =
    -0.75, edges repeated, like torch's `interpolate` (transformers, BLIP). bicubic-antialias: pixel centres, a =
    -0.5, kernel widened when shrinking, like torch's with `antialias=True` (timm, open_clip).
    """
    if method == "linear":
        at = np.linspace(0, old - 1, new) if new > 1 else np.zeros(1)
        return np.maximum(0, 1 - np.abs(at[:, None] - np.arange(old)))
    scale = old / new
    centre = (np.arange(new) + 0.5) * scale - 0.5
    if method == "bicubic":
        weights = np.zeros((new, old))
        base = np.floor(centre).astype(int)
        for offset in range(-1, 3):
            source = np.clip(base + offset, 0, old - 1)
            np.add.at(weights, (np.arange(new), source), _cubic(centre - base - offset, -0.75))
        return weights
    stretch = max(scale, 1.0)
    weights = _cubic((np.arange(old) - centre[:, None]) / stretch, -0.5)
    return weights / weights.sum(1, keepdims=True)


def resize_positions(
    table: Float[Array, "n d"], grid: tuple[int, int], method: Resize, *, prefix: int = 0
) -> Float[Array, "m d"]:
    """Resize a learned, square position table to another `grid` (rows, columns).

    The first `prefix` slots (class token) stay as they are. Raises ValueError if the rest is not a square.
    """
    table = np.asarray(table, np.float64)
    head, body = table[:prefix], table[prefix:]
    side = round(len(body) ** 0.5)
    if side * side != len(body):
        raise ValueError(f"a table of {len(table)} positions with {prefix} for class tokens is not a square grid")
    rows, columns = (interpolation_matrix(side, new, method) for new in grid)
    body = np.einsum("ri,cj,ijd->rcd", rows, columns, body.reshape(side, side, -1))
    return jnp.asarray(np.concatenate([head, body.reshape(-1, table.shape[-1])]), jnp.float32)


def resize_text_positions(table: Float[Array, "t d"], length: int) -> Float[Array, "s d"]:
    """Resize a learned table of text positions to `length`: linear between centres, ends repeated, like open_clip."""
    table = np.asarray(table, np.float64)
    at = np.clip((np.arange(length) + 0.5) * len(table) / length - 0.5, 0, len(table) - 1)
    weights = np.maximum(0, 1 - np.abs(at[:, None] - np.arange(len(table))))
    return jnp.asarray(weights @ table, jnp.float32)


class TokenEmbedding(nn.Module):
    """Table [v d] of token embeddings, initialised from N(0, `std`)."""

    vocab_size: int
    width: int
    std: float = 0.02

    def setup(self):
        """Declare the table."""
        self.table = self.param("embedding", nn.initializers.normal(self.std), (self.vocab_size, self.width))

    def __call__(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        """Look up the embeddings of `tokens`."""
        return constrain_batch(jnp.take(constrain_replicated(self.table), tokens, axis=0))
