"""Contrastive losses over the global batch, with duplicates as positives."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxmm.sharding import constrain_batch, constrain_replicated

Ids = Int[Array, "*groups b 2"]
"""64-bit hashes as two int32 each."""


def equal_ids(ids: Ids) -> Bool[Array, "*groups b b"]:
    """Return the mask of pairs with the same id."""
    return (ids[..., :, None, :] == ids[..., None, :, :]).all(axis=-1)


def positive_mask(
    image_ids: Ids | None, text_ids: Int[Array, "*groups m 2"] | None, size: int, captions: int = 1
) -> Bool[Array, "*groups b m"]:
    """Return the mask of (image, text) positives in the batch, or in each group; without ids, in one group.

    Positives are an image's own captions and all pairs with the same image or the same text: another caption of the
    same image is not a negative. An image has m / b = `captions` texts, one after the other, and `text_ids` [.. m 2]
    are theirs.
    """
    positive = jnp.repeat(jnp.eye(size, dtype=bool), captions, axis=1)
    if image_ids is not None:
        same = jnp.repeat(equal_ids(image_ids), captions, axis=-1)
        positive = jnp.broadcast_to(positive, same.shape) | same
    if text_ids is not None:
        same = equal_ids(text_ids)
        same = same.reshape(*same.shape[:-2], size, captions, -1).any(axis=-2)
        positive = jnp.broadcast_to(positive, same.shape) | same
    return positive


def contrastive_logits(
    image: Float[Array, "b e"], text: Float[Array, "m e"], scale: Float[Array, ""], bias: Float[Array, ""]
) -> Float[Array, "b m"]:
    """Return scale * image @ text' + bias; rows stay sharded like the images, texts are replicated."""
    return constrain_batch(scale * constrain_batch(image) @ constrain_replicated(text).T + bias)


def softmax_contrastive(logits: Float[Array, "b m"], positive: Bool[Array, "b m"]) -> Float[Array, ""]:
    """Return the symmetric InfoNCE (Radford et al. 2021, figure 3): the mean of both directions' cross-entropies.

    A row or a column with several positives has a uniform target over them, as in UniCL (Yang et al. 2022) and
    StableRep (Tian et al. 2023). With several captions per image, all of an image's captions are positives of it. The
    directions weigh the same: one is a mean over b images, the other over m texts.
    """
    weight = positive.astype(logits.dtype)

    def direction(axis):
        target = weight / weight.sum(axis=axis, keepdims=True)
        return -(target * jax.nn.log_softmax(logits, axis=axis)).sum(axis=axis).mean()

    return (direction(1) + direction(0)) / 2


def sigmoid_contrastive(logits: Float[Array, "b m"], positive: Bool[Array, "b m"]) -> Float[Array, ""]:
    """Return SigLIP's loss (Zhai et al. 2023, eq. 1): the sum over all pairs, divided by the number of texts.

    With several captions per image it is the mean of the losses with one of them each.
    """
    sign = jnp.where(positive, 1.0, -1.0)
    return -jax.nn.log_sigmoid(sign * logits).sum() / logits.shape[1]


def soft_contrastive(logits: Float[Array, "b n"], targets: Float[Array, "b n"]) -> Float[Array, ""]:
    """Return the mean cross-entropy of the rows with target distributions over the columns."""
    return -(jax.nn.log_softmax(logits) * targets).sum(axis=1).mean()


def distilled_targets(
    teacher: Float[Array, "b n"], positive: Bool[Array, "b n"], alpha: Float[Array, ""]
) -> Float[Array, "b n"]:
    """Return alpha * softmax(teacher) + (1 - alpha) * uniform over a row's positives (ALBEF, Li et al. 2021, eq. 6)."""
    weight = positive.astype(teacher.dtype)
    hard = weight / weight.sum(axis=1, keepdims=True)
    return jax.lax.stop_gradient(alpha * jax.nn.softmax(teacher) + (1 - alpha) * hard)
