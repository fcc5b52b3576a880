import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmm.losses.classification import cross_entropy, cutmix, mixup, sigmoid_cross_entropy, soft_targets
from tests import reference
from tests.reference import arrays, fp64

B, C, H, W = 4, 5, 6, 9


def logits_and_targets():
    logits, targets = arrays((B, C), (B, C), scale=3.0)
    return logits, jax.nn.softmax(targets)


def brute_cross_entropy(logits, targets):
    rows = []
    for row, target in zip(fp64(logits), fp64(targets), strict=True):
        probabilities = np.exp(row) / np.exp(row).sum()
        rows.append(-sum(t * np.log(p) for t, p in zip(target, probabilities, strict=True)))
    return np.mean(rows)


def brute_sigmoid(logits, targets):
    rows = []
    for row, target in zip(fp64(logits), fp64(targets), strict=True):
        chance = 1 / (1 + np.exp(-row))
        rows.append(-(target * np.log(chance) + (1 - target) * np.log(1 - chance)).sum())
    return np.mean(rows)


class Variants(chex.TestCase):
    """Each loss with jit, without and under pmap equals brute force."""

    @chex.variants(with_jit=True, without_jit=True, with_pmap=True)
    def test_cross_entropy(self):
        logits, targets = logits_and_targets()
        loss = self.variant(cross_entropy, n_devices=2)(logits, targets)
        np.testing.assert_allclose(loss, brute_cross_entropy(logits, targets), rtol=1e-5)

    @chex.variants(with_jit=True, without_jit=True, with_pmap=True)
    def test_sigmoid_cross_entropy(self):
        logits, targets = logits_and_targets()
        loss = self.variant(sigmoid_cross_entropy, n_devices=2)(logits, targets)
        np.testing.assert_allclose(loss, brute_sigmoid(logits, targets), rtol=1e-5)


def test_hand_computed():
    np.testing.assert_allclose(cross_entropy(jnp.zeros((2, 4)), jnp.eye(4)[:2]), np.log(4), rtol=1e-6)
    np.testing.assert_allclose(sigmoid_cross_entropy(jnp.zeros((2, 4)), jnp.eye(4)[:2]), 4 * np.log(2), rtol=1e-6)


def test_large_logits_are_finite():
    logits = jnp.asarray([[1e4, -1e4]])
    assert cross_entropy(logits, jnp.asarray([[0.0, 1.0]])) == 2e4
    assert sigmoid_cross_entropy(logits, jnp.asarray([[0.0, 1.0]])) == 2e4


def test_gradient_is_probability_minus_target():
    logits, targets = logits_and_targets()
    grad = jax.jit(jax.grad(cross_entropy))(logits, targets)
    np.testing.assert_allclose(grad, (reference.softmax(fp64(logits)) - fp64(targets)) / B, atol=1e-6)


def test_soft_targets():
    out = soft_targets(jnp.asarray([2, 0]), 4, 0.2)
    np.testing.assert_allclose(out, [[0.05, 0.05, 0.85, 0.05], [0.85, 0.05, 0.05, 0.05]], rtol=1e-6)
    np.testing.assert_array_equal(soft_targets(jnp.asarray([1]), 3), [[0, 1, 0]])


def test_order_of_examples_does_not_matter():
    logits, targets = logits_and_targets()
    order = jnp.asarray([2, 0, 3, 1])
    for loss in (cross_entropy, sigmoid_cross_entropy):
        np.testing.assert_allclose(loss(logits, targets), loss(logits[order], targets[order]), rtol=1e-6)


def pictures():
    image = jnp.asarray(np.random.default_rng(0).integers(0, 256, (B, H, W, 3)), jnp.uint8)
    return image, jnp.eye(C)[:B]


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_mixup(alpha):
    image, targets = pictures()
    run = jax.jit(mixup, static_argnums=2)
    shares = []
    for seed in range(12):
        mixed, soft = run(image, targets, alpha, jax.random.key(seed))
        share = float(soft[0, 0])
        shares.append(share)
        assert 0.5 <= share <= 1
        neighbour = fp64(image)[[3, 0, 1, 2]]
        np.testing.assert_allclose(mixed, share * fp64(image) + (1 - share) * neighbour, rtol=1e-4, atol=1e-2)
        np.testing.assert_allclose(soft, share * np.eye(C)[:B] + (1 - share) * np.eye(C)[[3, 0, 1, 2]], atol=1e-6)
        np.testing.assert_allclose(soft.sum(axis=1), 1, rtol=1e-6)
    assert len(set(shares)) == 12


def test_cutmix():
    """One rectangle for all, really replaced by the neighbour's pixels; targets by its exact area."""
    image, targets = pictures()
    image = jnp.arange(B * H * W * 3, dtype=jnp.float32).reshape(B, H, W, 3)  # no pixel twice
    run = jax.jit(cutmix, static_argnums=2)
    areas, cut_at_border = [], 0
    for seed in range(30):
        mixed, soft = run(image, targets, 1.0, jax.random.key(seed))
        mixed, neighbour = np.asarray(mixed), np.asarray(image)[[3, 0, 1, 2]]
        box = (mixed != np.asarray(image)).all(axis=(0, 3))
        expected = np.where(box[None, :, :, None], neighbour, image)
        np.testing.assert_array_equal(mixed, expected)
        if box.any():
            rows, columns = np.flatnonzero(box.any(axis=1)), np.flatnonzero(box.any(axis=0))
            assert box[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
            assert len(rows) * len(columns) == box.sum(), "a rectangle"
            cut_at_border += rows[0] == 0 or columns[0] == 0 or rows[-1] == H - 1 or columns[-1] == W - 1
        share = 1 - box.sum() / (H * W)
        areas.append(share)
        np.testing.assert_allclose(soft, share * np.eye(C)[:B] + (1 - share) * np.eye(C)[[3, 0, 1, 2]], atol=1e-6)
        np.testing.assert_allclose(soft.sum(axis=1), 1, rtol=1e-6)
    assert len(set(areas)) > 10 and min(areas) < 0.6 and max(areas) > 0.9 and cut_at_border > 3
