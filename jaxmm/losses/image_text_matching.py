"""Whether a picture and a text belong together: hard negatives, and the loss (ALBEF, Li et al. 2021, section 3.2)."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key


def hard_negatives(
    similarity: Float[Array, "*groups b b"], positive: Bool[Array, "*groups b b"], rng: Key[Array, ""]
) -> tuple[Int[Array, "*groups b"], Bool[Array, "*groups b"]]:
    """For each row a column that is no positive of it, drawn the likelier the more similar the two are.

    The second result says where there is one: a row all of whose columns are positives has none.
    """
    weights = jax.nn.softmax(similarity) + 1e-4
    logits = jnp.where(positive, -jnp.inf, jnp.log(weights))
    there = ~positive.all(axis=-1)
    return jax.random.categorical(rng, jnp.where(there[..., None], logits, 0.0)), there


def matching_loss(
    logits: Float[Array, "n 2"], labels: Int[Array, "n"], counts: Bool[Array, "n"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Mean cross-entropy and accuracy over the pairs that count."""
    total = jnp.maximum(counts.sum(), 1)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    right = logits.argmax(axis=1) == labels
    return (losses * counts).sum() / total, (right * counts).sum() / total
