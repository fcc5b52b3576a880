"""Classification: soft targets, mixup and CutMix, cross-entropy."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, Num


def soft_targets(labels: Int[Array, "b"], classes: int, smoothing: float = 0.0) -> Float[Array, "b c"]:
    """Return one-hot labels with `smoothing` of their mass spread over all classes (Szegedy et al. 2016, section 7)."""
    import optax  # a tenth of a second of import that using a trained model does without

    return optax.smooth_labels(jax.nn.one_hot(labels, classes), smoothing)


def cross_entropy(logits: Float[Array, "b c"], targets: Float[Array, "b c"]) -> Float[Array, ""]:
    """Return the mean softmax cross-entropy."""
    import optax

    return optax.softmax_cross_entropy(logits, targets).mean()


def sigmoid_cross_entropy(logits: Float[Array, "b c"], targets: Float[Array, "b c"]) -> Float[Array, ""]:
    """Return the mean over the batch of the sum over classes of binary cross-entropies (ImageNet-21k, AugReg)."""
    import optax

    return optax.sigmoid_binary_cross_entropy(logits, targets).sum(axis=-1).mean()


def mixup(
    image: Num[Array, "b h w 3"], targets: Float[Array, "b c"], alpha: float, rng: Key[Array, ""]
) -> tuple[Float[Array, "b h w 3"], Float[Array, "b c"]]:
    """Blend each example with its neighbour in the batch by one share for all (Zhang et al. 2018).

    The share is drawn from Beta(alpha, alpha); the example itself keeps the larger part.
    """
    share = jax.random.beta(rng, alpha, alpha)
    share = jnp.maximum(share, 1 - share)

    def blend(x):
        return share * x + (1 - share) * jnp.roll(x, 1, axis=0)

    return blend(image.astype(jnp.float32)), blend(targets)


def cutmix(
    image: Num[Array, "b h w 3"], targets: Float[Array, "b c"], alpha: float, rng: Key[Array, ""]
) -> tuple[Float[Array, "b h w 3"], Float[Array, "b c"]]:
    """Paste a rectangle of each example's neighbour into it, the same for all (Yun et al. 2019, eq. 1-2).

    Targets are mixed by the replaced area, after the rectangle is clipped at the borders.
    """
    height, width = image.shape[1:3]
    share_rng, row_rng, column_rng = jax.random.split(rng, 3)
    side = jnp.sqrt(1 - jax.random.beta(share_rng, alpha, alpha))

    def inside(rng, length):
        centre, half = jax.random.uniform(rng) * length, side * length / 2
        at = jnp.arange(length, dtype=jnp.float32) + 0.5
        return (at > centre - half) & (at < centre + half)

    box = inside(row_rng, height)[:, None] & inside(column_rng, width)[None, :]
    share = 1 - box.mean()
    image = image.astype(jnp.float32)
    image = jnp.where(box[None, :, :, None], jnp.roll(image, 1, axis=0), image)
    return image, share * targets + (1 - share) * jnp.roll(targets, 1, axis=0)
