"""Image-text matching (ITM): hard negatives, and the loss (ALBEF, Li et al. 2021, section 3.2)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key


def hard_negatives(
    similarity: Float[Array, "*groups b b"], positive: Bool[Array, "*groups b b"], rng: Key[Array, ""]
) -> tuple[Int[Array, "*groups b"], Bool[Array, "*groups b"]]:
    """Draw a hard negative for each row: a column that is not a positive, with probability by similarity.

    The second result is False for a row without negatives.
    """
    weights = jax.nn.softmax(similarity) + 1e-4
    logits = jnp.where(positive, -jnp.inf, jnp.log(weights))
    exists = ~positive.all(axis=-1)
    return jax.random.categorical(rng, jnp.where(exists[..., None], logits, 0.0)), exists


def matching_loss(
    logits: Float[Array, "n 2"], labels: Int[Array, "n"], counts: Bool[Array, "n"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Return the mean cross-entropy and the accuracy over the pairs where `counts` is True."""
    import optax  # a tenth of a second of import that using a trained model does without

    counts = counts.astype(logits.dtype)
    total = jnp.maximum(counts.sum(), 1)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    correct = logits.argmax(axis=1) == labels
    return (losses * counts).sum() / total, (correct.astype(counts.dtype) * counts).sum() / total
