"""Contrastive losses over the global batch, with targets that know duplicates."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxmm.sharding import constrain_batch, constrain_replicated

Ids = Int[Array, "*groups b 2"]
"""64-bit hashes as two int32 each."""


def equal_ids(ids: Ids) -> Bool[Array, "*groups b b"]:
    """Which pairs have the same id."""
    return (ids[..., :, None, :] == ids[..., None, :, :]).all(axis=-1)


def positive_mask(image_ids: Ids | None, text_ids: Ids | None, size: int) -> Bool[Array, "*groups b b"]:
    """Which (picture, text) pairs of the batch, or of each group, belong together; without ids, of one alone.

    The diagonal, and all pairs whose pictures or whose texts are the same: a caption of the very same picture is no
    negative of it.
    """
    same = jnp.eye(size, dtype=bool)
    for ids in (image_ids, text_ids):
        if ids is not None:
            same = same | equal_ids(ids)
    return same


def contrastive_logits(
    image: Float[Array, "b e"], text: Float[Array, "b e"], scale: Float[Array, ""], bias: Float[Array, ""]
) -> Float[Array, "b b"]:
    """scale * image @ text' + bias; rows stay where their pictures are, every device sees all texts."""
    return constrain_batch(scale * constrain_batch(image) @ constrain_replicated(text).T + bias)


def softmax_contrastive(logits: Float[Array, "b b"], positive: Bool[Array, "b b"]) -> Float[Array, ""]:
    """Symmetric InfoNCE (Radford et al. 2021, figure 3): the mean of both directions' cross-entropies.

    A row with several positives spreads its target evenly over them.
    """
    def direction(axis):
        target = positive / positive.sum(axis=axis, keepdims=True)
        return -(target * jax.nn.log_softmax(logits, axis=axis)).sum(axis=axis).mean()

    return (direction(1) + direction(0)) / 2


def sigmoid_contrastive(logits: Float[Array, "b b"], positive: Bool[Array, "b b"]) -> Float[Array, ""]:
    """SigLIP's loss (Zhai et al. 2023, eq. 1): every pair by itself, summed, over the number of pictures."""
    sign = jnp.where(positive, 1.0, -1.0)
    return -jax.nn.log_sigmoid(sign * logits).sum() / len(logits)


def soft_contrastive(logits: Float[Array, "b n"], targets: Float[Array, "b n"]) -> Float[Array, ""]:
    """Mean cross-entropy of each row with a distribution over the columns."""
    return -(jax.nn.log_softmax(logits) * targets).sum(axis=1).mean()


def distilled_targets(
    teacher: Float[Array, "b n"], positive: Bool[Array, "b n"], alpha: Float[Array, ""]
) -> Float[Array, "b n"]:
    """alpha x the teacher's softmax + (1 - alpha) x a row's positives, evenly (ALBEF, Li et al. 2021, eq. 6)."""
    hard = positive / positive.sum(axis=1, keepdims=True)
    return jax.lax.stop_gradient(alpha * jax.nn.softmax(teacher) + (1 - alpha) * hard)
