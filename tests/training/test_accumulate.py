from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmm.training.accumulate import join, split, value_and_grad
from tests.tasks.common import CLASSIFY, SIGMOID, SOFTMAX, labelled, pairs, params

MIXED = replace(CLASSIFY, mixup=0.8, label_smoothing=0.1)
TASKS = {"classify with mixup": (MIXED, labelled()), "softmax": (SOFTMAX, pairs()), "sigmoid": (SIGMOID, pairs()),
         "three captions": (SOFTMAX, pairs(3))}


def test_split_and_join():
    x = jnp.arange(24).reshape(12, 2)
    parts = split({"x": x}, 3)["x"]
    assert parts.shape == (3, 4, 2)
    np.testing.assert_array_equal(parts[1], x[1::3])
    np.testing.assert_array_equal(join(parts), x)


@cache
def run(name, microbatches, freeze=None):
    task, batch = TASKS[name]

    def step(params, batch, rng):
        return value_and_grad(task, params, {}, batch, rng, microbatches=microbatches, freeze=freeze)
    return jax.jit(step)(params(task), batch, jax.random.key(5))


def close(one, other):
    """Equal within 1e-5 of the largest gradient."""
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(other))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * largest)


@pytest.mark.parametrize("name", TASKS)
def test_parts_give_the_gradient_of_the_whole(name):
    """Duplicates that fall into different parts are positives all the same, and mixup mixes over the whole."""
    (loss, (_, metrics)), grads = run(name, 1)
    for microbatches in (2, 4):
        (other, (extra, measured)), summed = run(name, microbatches)
        np.testing.assert_allclose(other, loss, rtol=1e-5)
        close(summed, grads)
        assert extra == {} and set(measured) == set(metrics)
        for key in metrics:
            np.testing.assert_allclose(measured[key], metrics[key], rtol=1e-5)


def test_averaging_the_parts_losses_would_be_wrong():
    """The accumulation must not do this; it shows that the test above would notice the difference."""
    loss = jax.jit(lambda batch: SOFTMAX.loss(params(SOFTMAX), {}, batch, jax.random.key(5))[0])
    parts = split(pairs(), 2)
    mean = np.mean([loss(jax.tree.map(lambda x, i=i: x[i], parts)) for i in range(2)])
    (full, _), _ = run("softmax", 2)
    assert abs(mean - full) > 0.1


@pytest.mark.parametrize("name, frozen", [("classify with mixup", "patches"), ("softmax", "vision")])
def test_frozen_parameters_get_no_gradient(name, frozen):
    """Frozen parameters get zeros, the others what they would get anyway."""
    def freeze(tree):
        return tree | {frozen: jax.lax.stop_gradient(tree[frozen])}

    _, free = run(name, 2)
    _, partial = run(name, 2, freeze)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(partial[frozen]))
    assert any(np.any(leaf) for leaf in jax.tree.leaves(free[frozen]))
    close({k: v for k, v in partial.items() if k != frozen}, {k: v for k, v in free.items() if k != frozen})
