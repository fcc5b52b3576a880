import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmm.losses.contrastive import (
    contrastive_logits,
    equal_ids,
    positive_mask,
    sigmoid_contrastive,
    softmax_contrastive,
)
from jaxmm.training.optimizer import clamp_params
from tests.reference import arrays, fp64

B, E = 5, 3
# Pictures 0 and 3 are the same; texts 1 and 3 have the same words; the second halves of ids count as well.
IMAGE_IDS = jnp.asarray([[1, 7], [2, 7], [1, 8], [1, 7], [2, 9]])
TEXT_IDS = jnp.asarray([[5, 5], [6, 6], [5, 6], [6, 6], [7, 7]])
PAIRS = {(0, 3), (3, 0), (1, 3), (3, 1)} | {(i, i) for i in range(B)}
POSITIVE = np.array([[(i, j) in PAIRS for j in range(B)] for i in range(B)])


def brute_softmax(logits, positive):
    logits = fp64(logits)
    total = 0.0
    for matrix, same in ((logits, positive), (logits.T, positive.T)):
        for row, mine in zip(matrix, same, strict=True):
            probabilities = np.exp(row) / np.exp(row).sum()
            total += np.mean([-np.log(p) for p, yes in zip(probabilities, mine, strict=True) if yes]) / len(matrix)
    return total / 2


def brute_sigmoid(logits, positive):
    total = 0.0
    for logit, yes in zip(fp64(logits).ravel(), positive.ravel(), strict=True):
        total -= np.log(1 / (1 + np.exp(-logit if yes else logit)))
    return total / logits.shape[1]


LOSSES = {"softmax": (softmax_contrastive, brute_softmax), "sigmoid": (sigmoid_contrastive, brute_sigmoid)}


def embeddings(seed=0):
    image, text = arrays((B, E), (B, E), seed=seed)
    return image, text


def whole(image, text, loss, image_ids=IMAGE_IDS, text_ids=TEXT_IDS):
    logits = contrastive_logits(image, text, jnp.float32(2.5), jnp.float32(-0.5))
    return loss(logits, positive_mask(image_ids, text_ids, B))


def test_equal_ids_needs_both_halves():
    expected = [[i == j or {i, j} == {0, 3} for j in range(B)] for i in range(B)]
    np.testing.assert_array_equal(equal_ids(IMAGE_IDS), expected)


def test_positives():
    np.testing.assert_array_equal(positive_mask(IMAGE_IDS, TEXT_IDS, B), POSITIVE)
    np.testing.assert_array_equal(positive_mask(None, None, B), np.eye(B, dtype=bool))
    np.testing.assert_array_equal(positive_mask(IMAGE_IDS, None, B), equal_ids(IMAGE_IDS))
    np.testing.assert_array_equal(positive_mask(None, TEXT_IDS, B), equal_ids(TEXT_IDS))


def test_logits():
    image, text = embeddings()
    expected = [[2.5 * fp64(x) @ fp64(y) - 0.5 for y in text] for x in image]
    logits = contrastive_logits(image, text, jnp.float32(2.5), jnp.float32(-0.5))
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", LOSSES)
def test_several_captions_of_an_image(kind):
    """All captions of an image are its positives, and so are those of the same words; the sigmoid loss is a mean."""
    captions = 3
    image, text = arrays((B, E), (B * captions, E))
    text_ids = jnp.asarray(np.random.default_rng(1).integers(0, 4, (B * captions, 2)), jnp.int32)
    words, pictures = (list(map(tuple, np.asarray(ids).tolist())) for ids in (text_ids, IMAGE_IDS))
    expected = np.array([[pictures[i] == pictures[j // captions] or words[j] in words[captions * i:captions * (i + 1)]
                          for j in range(B * captions)] for i in range(B)])
    positive = positive_mask(IMAGE_IDS, text_ids, B, captions)
    np.testing.assert_array_equal(positive, expected)
    assert expected.sum() > B * captions and not expected.all()
    np.testing.assert_array_equal(positive_mask(None, None, B, captions), np.eye(B, dtype=bool).repeat(captions, 1))
    np.testing.assert_array_equal(positive_mask(IMAGE_IDS, None, B, captions),
                                  np.asarray(equal_ids(IMAGE_IDS)).repeat(captions, axis=1))
    loss, brute = LOSSES[kind]
    logits = contrastive_logits(image, text, jnp.float32(2.5), jnp.float32(-0.5))
    np.testing.assert_allclose(loss(logits, positive), brute(logits, expected), rtol=1e-6)
    if kind == "sigmoid":
        each = [loss(logits[:, i::captions], positive[:, i::captions]) for i in range(captions)]
        np.testing.assert_allclose(loss(logits, positive), np.mean(each), rtol=1e-6)


class Variants(chex.TestCase):
    """Each loss, from embeddings and ids on, with jit, without and under pmap equals brute force."""

    def check(self, kind):
        loss, brute = LOSSES[kind]
        image, text = embeddings()
        run = self.variant(lambda *inputs: whole(*inputs[:2], loss, *inputs[2:]), n_devices=2)
        expected = brute(2.5 * fp64(image) @ fp64(text).T - 0.5, POSITIVE)
        np.testing.assert_allclose(run(image, text, IMAGE_IDS, TEXT_IDS), expected, rtol=1e-5)

    @chex.variants(with_jit=True, without_jit=True, with_pmap=True)
    def test_softmax(self):
        self.check("softmax")

    @chex.variants(with_jit=True, without_jit=True, with_pmap=True)
    def test_sigmoid(self):
        self.check("sigmoid")


def test_hand_computed():
    logits, one = jnp.zeros((4, 4)), jnp.eye(4, dtype=bool)
    np.testing.assert_allclose(softmax_contrastive(logits, one), np.log(4), rtol=1e-6)
    np.testing.assert_allclose(sigmoid_contrastive(logits, one), 4 * np.log(2), rtol=1e-6)
    np.testing.assert_allclose(sigmoid_contrastive(logits - 10, one), 10 + 4 * np.log1p(np.exp(-10)), rtol=1e-6)


@pytest.mark.parametrize("kind", LOSSES)
def test_order_of_pairs_does_not_matter(kind):
    image, text = embeddings()
    order = jnp.asarray([3, 1, 4, 0, 2])
    run = jax.jit(lambda *inputs: whole(*inputs[:2], LOSSES[kind][0], *inputs[2:]))
    one = run(image, text, IMAGE_IDS, TEXT_IDS)
    other = run(*(x[order] for x in (image, text, IMAGE_IDS, TEXT_IDS)))
    np.testing.assert_allclose(one, other, rtol=1e-5)


@pytest.mark.parametrize("kind", LOSSES)
def test_duplicates_are_not_pushed_apart(kind):
    """Two pairs of the same picture and words: their cross logits pull like the diagonal, not away from it."""
    ids = jnp.asarray([[1, 1], [1, 1], [2, 2], [3, 3], [4, 4]])
    logits, = arrays((B, B))
    grad = jax.jit(jax.grad(LOSSES[kind][0]))(logits, positive_mask(ids, None, B))
    plain = jax.jit(jax.grad(LOSSES[kind][0]))(logits, positive_mask(None, None, B))
    assert plain[0, 1] > 0 and grad[0, 1] < plain[0, 1]
    np.testing.assert_allclose(grad[2:, 2:], plain[2:, 2:], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", LOSSES)
def test_large_logits_are_finite(kind):
    grad, = jax.jit(jax.grad(lambda x: LOSSES[kind][0](x, positive_mask(IMAGE_IDS, TEXT_IDS, B)), (0,)))(
        embeddings()[0] @ embeddings()[1].T * 1e4)
    assert np.isfinite(grad).all()


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("kind", LOSSES)
def test_a_scale_at_its_limit_is_finite_in_half_precision(kind, dtype):
    """Embeddings that are all equal, all opposite, and zero; a scale that nothing clamps is infinite or NaN."""
    unit = jnp.full((B, E), E**-0.5, dtype)
    mask = positive_mask(IMAGE_IDS, TEXT_IDS, B)
    tx = clamp_params(((r"^logit_scale$", 0.0, math.log(100)),))

    @jax.jit
    def value_and_grad(image, text, log_scale):
        def loss(image, text, log_scale):
            return LOSSES[kind][0](contrastive_logits(image, text, jnp.exp(log_scale), jnp.zeros((), dtype)), mask)
        return jax.value_and_grad(loss, argnums=(0, 1, 2))(image, text, log_scale)

    for start in (1e4, -1e4):
        params = {"logit_scale": jnp.asarray(0.0, dtype)}
        updates, _ = tx.update({"logit_scale": jnp.asarray(start, dtype)}, tx.init(params), params)
        clamped = optax.apply_updates(params, updates)["logit_scale"]
        assert clamped.dtype == dtype and 0 <= float(clamped) <= math.log(100) * 1.01
        for image, text in ((unit, unit), (unit, -unit), (jnp.zeros_like(unit), unit)):
            numbers = jax.tree.leaves(value_and_grad(image, text, clamped))
            assert all(bool(jnp.isfinite(number).all()) for number in numbers), (start, numbers)
    unclamped = jax.tree.leaves(value_and_grad(unit, -unit, jnp.asarray(1e4, dtype)))
    assert not all(bool(jnp.isfinite(number).all()) for number in unclamped)
