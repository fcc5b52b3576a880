"""The losses of BLIP against one pair, one token after the other."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxmm.losses.contrastive import distilled_targets, soft_contrastive
from jaxmm.losses.image_text_matching import hard_negatives, matching_loss
from jaxmm.losses.language_modeling import language_loss, token_losses
from tests.reference import log_softmax

RNG = np.random.default_rng(0)


def test_soft_targets():
    logits, teacher = (RNG.normal(size=(3, 7)).astype(np.float32) for _ in range(2))
    positive = np.eye(3, 7, dtype=bool)
    positive[0, 5] = positive[2, 0] = True
    targets = distilled_targets(jnp.asarray(teacher), jnp.asarray(positive), jnp.asarray(0.3))
    want, total = np.zeros((3, 7)), 0.0
    for i, j in np.ndindex(3, 7):
        want[i, j] = 0.3 * np.exp(log_softmax(teacher, 1))[i, j] + 0.7 * positive[i, j] / positive[i].sum()
        total -= want[i, j] * log_softmax(logits, 1)[i, j]
    np.testing.assert_allclose(targets, want, atol=1e-6)
    np.testing.assert_allclose(soft_contrastive(jnp.asarray(logits), targets), total / 3, rtol=1e-5)
    assert float(jnp.abs(jax.grad(lambda t: distilled_targets(t, jnp.asarray(positive), jnp.asarray(0.3)).sum())(
        jnp.asarray(teacher))).max()) == 0


def test_hard_negatives_are_drawn_by_similarity_and_never_positive():
    similarity = jnp.asarray([[9.0, 1.0, 2.0, 0.0], [0.0, 9.0, 8.0, 1.0], [0.0, 0.0, 0.0, 0.0], [1.0, 2.0, 3.0, 4.0]])
    positive = jnp.asarray([[1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 1, 0], [1, 1, 1, 1]], bool)
    keys = jax.random.split(jax.random.key(0), 20_000)
    drawn, there = jax.jit(jax.vmap(lambda key: hard_negatives(similarity, positive, key)))(keys)
    assert there[0].tolist() == [True, True, True, False]
    weights = np.asarray(jax.nn.softmax(similarity)) + 1e-4
    for row in range(3):
        want = np.where(positive[row], 0, weights[row])
        shares = np.bincount(drawn[:, row], minlength=4) / len(keys)
        np.testing.assert_allclose(shares, want / want.sum(), atol=0.015)
    loss, accuracy = matching_loss(jnp.asarray([[2.0, 1.0], [0.0, 3.0], [5.0, 5.0]]), jnp.asarray([1, 1, 0]),
                                   jnp.asarray([True, True, False]))
    want = -(log_softmax(np.array([[2.0, 1.0]]), 1)[0, 1] + log_softmax(np.array([[0.0, 3.0]]), 1)[0, 1]) / 2
    np.testing.assert_allclose([loss, accuracy], [want, 0.5], rtol=1e-6)


def test_language_loss():
    logits = RNG.normal(size=(2, 5, 6)).astype(np.float32)
    tokens = np.array([[4, 2, 3, 1, 0], [4, 5, 1, 0, 0]])
    for smoothing in (0.0, 0.1):
        expected = np.zeros((2, 5))
        for b in range(2):
            for t in range(1, 5):
                if tokens[b, t] != 0:
                    log_p = log_softmax(logits[b, t - 1], 0)
                    expected[b, t] = -(1 - smoothing) * log_p[tokens[b, t]] - smoothing * log_p.mean()
        args = jnp.asarray(logits), jnp.asarray(tokens), jnp.asarray(tokens != 0), smoothing
        np.testing.assert_allclose(token_losses(*args), expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(language_loss(*args), expected.sum() / 5, rtol=1e-5)
        # the texts are two captions of one image: the mean over three and over two tokens weighs the same
        want = (expected[0].sum() / 3 + expected[1].sum() / 2) / 2
        np.testing.assert_allclose(language_loss(*args, captions=2), want, rtol=1e-6)
    assert float(language_loss(jnp.asarray(logits), jnp.asarray(tokens), jnp.zeros((2, 5), bool))) == 0
