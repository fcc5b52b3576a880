"""Blockwise losses equal the plain ones, in value and gradient, for any mesh and tile size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmm.config import MeshConfig
from jaxmm.losses.blockwise import (
    NOT_IN_BATCH,
    Anchors,
    Candidates,
    Distilled,
    Sigmoid,
    Softmax,
    blockwise_contrastive,
    blockwise_loss,
    pair_keys,
)
from jaxmm.losses.contrastive import (
    contrastive_logits,
    distilled_targets,
    equal_ids,
    positive_mask,
    sigmoid_contrastive,
    soft_contrastive,
    softmax_contrastive,
)
from jaxmm.sharding import make_mesh
from tests.losses.test_contrastive import brute_sigmoid, brute_softmax
from tests.reference import arrays, fp64, unit

B, E, Q = 48, 6, 16
MESHES = ((1, 1, 1), (8, 1, 1), (2, 4, 1), (2, 2, 2))
LOSSES = {"softmax": (Softmax, softmax_contrastive, brute_softmax),
          "sigmoid": (Sigmoid, sigmoid_contrastive, brute_sigmoid)}
SCALE, BIAS = 20.0, -3.0


def mesh(shape):
    return make_mesh(MeshConfig(data=shape[0], fsdp=shape[1], tensor=shape[2]))


def embeddings(*sizes):
    return [jnp.asarray(unit(x), jnp.float32) for x in arrays(*((size, E) for size in sizes))]


def ids(size, seed):
    """Draw ids, some of which are equal."""
    return jnp.asarray(np.random.default_rng(seed).integers(0, 30, (size, 2)) * [1, 0] + [0, 5], jnp.int32)


IDS = ids(B, 0), ids(B, 1)


def plain(kind, image, text, scale, bias):
    logits, positive = contrastive_logits(image, text, scale, bias), positive_mask(*IDS, size=B)
    nearest = jnp.take_along_axis(positive, logits.argmax(axis=1)[:, None], axis=1)
    return LOSSES[kind][1](logits, positive), {"accuracy": nearest.mean()}


def differentiated(function, arguments, *inputs):
    return jax.jit(jax.value_and_grad(function, arguments, has_aux=True))(*inputs)


@pytest.mark.parametrize("kind", LOSSES)
def test_blocks_are_the_plain_loss(kind, record_property):
    inputs = *embeddings(B, B), jnp.float32(SCALE), jnp.float32(BIAS)
    expected = differentiated(lambda *x: plain(kind, *x), (0, 1, 2, 3), *inputs)
    brute = LOSSES[kind][2](SCALE * fp64(inputs[0]) @ fp64(inputs[1]).T + BIAS, np.asarray(positive_mask(*IDS, size=B)))
    largest = 0.0
    for shape, tile in [*((shape, 4) for shape in MESHES), ((8, 1, 1), 1000), ((1, 1, 1), 7)]:
        with jax.set_mesh(mesh(shape)):
            result = differentiated(lambda *x, tile=tile: blockwise_contrastive(
                LOSSES[kind][0], *x[:2], IDS, *x[2:], tile=tile), (0, 1, 2, 3), *inputs)
        np.testing.assert_allclose(result[0][0], brute, rtol=1e-6)
        assert result[0][1]["accuracy"] == expected[0][1]["accuracy"] > 0
        for one, other in zip(jax.tree.leaves(result[1]), jax.tree.leaves(expected[1]), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
            largest = max(largest, float(np.abs(one - other).max()))
    record_property(f"{kind} loss in blocks, largest difference of a gradient", f"{largest:.1e}")


@pytest.mark.parametrize("kind", LOSSES)
def test_several_captions_in_blocks(kind):
    captions = 2
    image, text = embeddings(B, B * captions)
    names = IDS[0], ids(B * captions, 3)
    positive = positive_mask(*names, size=B, captions=captions)
    inputs = image, text, jnp.float32(SCALE), jnp.float32(BIAS)
    expected = differentiated(lambda *x: (LOSSES[kind][1](contrastive_logits(*x), positive), {}), (0, 1, 2, 3), *inputs)
    for shape, tile in (((2, 2, 2), 5), ((8, 1, 1), 1000), ((1, 1, 1), 7)):
        with jax.set_mesh(mesh(shape)):
            result = differentiated(lambda *x, tile=tile: blockwise_contrastive(
                LOSSES[kind][0], *x[:2], names, *x[2:], tile=tile), (0, 1, 2, 3), *inputs)
        np.testing.assert_allclose(result[0][0], expected[0][0], rtol=1e-6)
        for one, other in zip(jax.tree.leaves(result[1]), jax.tree.leaves(expected[1]), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_the_distilled_loss_in_blocks_is_the_plain_one():
    student, teacher, new, queue = embeddings(B, B, B, Q)
    queued = jnp.concatenate([IDS[0][:5], jnp.full((Q - 5, 2), -9, jnp.int32)])      # five images are in the queue
    positive = jnp.concatenate([positive_mask(IDS[0], None, B), (IDS[0][:, None] == queued[None]).all(-1)], axis=1)
    assert bool(positive[:, B:].any())

    def plain(student, teacher, scale, alpha):
        columns = jnp.concatenate([new, queue])
        targets = distilled_targets(scale * teacher @ columns.T, positive, alpha)
        return soft_contrastive(scale * student @ columns.T, targets), {}

    def blocks(student, teacher, scale, alpha):
        keys = pair_keys((IDS[0],), jnp.arange(B)), pair_keys((queued,), jnp.full(Q, NOT_IN_BATCH))
        return blockwise_loss(Distilled, Anchors((student, teacher), keys[0]), Candidates((new, queue), keys), scale,
                              jnp.zeros(()), alpha, tile=4)

    inputs = student, teacher, jnp.float32(SCALE), jnp.float32(0.3)
    expected = differentiated(plain, (0, 1), *inputs)
    scaled = jax.grad(lambda s: soft_contrastive(s * student @ jnp.concatenate([new, queue]).T, distilled_targets(
        SCALE * teacher @ jnp.concatenate([new, queue]).T, positive, jnp.float32(0.3))))(SCALE)
    for shape in MESHES:
        with jax.set_mesh(mesh(shape)):
            (loss, _), (d_student, d_teacher, d_scale, d_alpha) = differentiated(blocks, (0, 1, 2, 3), *inputs)
        np.testing.assert_allclose(loss, expected[0][0], rtol=1e-6)
        np.testing.assert_allclose(d_student, expected[1][0], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(d_scale, scaled, rtol=1e-4)
        assert float(np.abs(d_teacher).max()) == 0 == float(d_alpha)


def test_entries_outside_the_batch_match_nothing():
    keys = pair_keys((ids(3, 0),), jnp.arange(3)), pair_keys((ids(3, 1) + 1000,), jnp.full(3, NOT_IN_BATCH))
    assert keys[0].shape == (3, 2, 2)
    assert not (keys[0][:, None] == keys[1][None]).all(-1).any()
    np.testing.assert_array_equal(positive_mask(ids(3, 0), None, 3), equal_ids(ids(3, 0)) | np.eye(3, dtype=bool))


def memory(loss, batch, devices):
    """Return the bytes per device for value and gradient, without inputs and outputs."""
    sharding = jax.sharding.NamedSharding(mesh((devices, 1, 1)), jax.sharding.PartitionSpec("data"))
    inputs = [jax.ShapeDtypeStruct((batch, 32), jnp.float32, sharding=sharding)] * 2
    with jax.set_mesh(mesh((devices, 1, 1))):
        step = jax.jit(jax.value_and_grad(loss, (0, 1)), out_shardings=(None, (sharding, sharding)))
        return step.lower(*inputs).compile().memory_analysis().temp_size_in_bytes


def test_memory_grows_with_a_device_share_alone(record_property):
    def blocks(image, text):
        return blockwise_contrastive(Softmax, image, text, (None, None), jnp.float32(SCALE),
                                     jnp.float32(BIAS), tile=64)[0]

    def plain(image, text):
        return softmax_contrastive(contrastive_logits(image, text, jnp.float32(SCALE), jnp.float32(BIAS)),
                                   positive_mask(None, None, len(image)))

    one, double, wider = (memory(blocks, *size) for size in ((8192, 4), (16384, 4), (16384, 8)))
    assert 1.6 < double / one < 2.2 and 0.9 < wider / one < 1.1
    assert memory(plain, 8192, 4) > 50 * one
    record_property("softmax loss in blocks of 8,192 pairs on 4 devices, bytes per device", one)


def test_what_does_not_divide():
    image, text = embeddings(12, 12)
    with (jax.set_mesh(mesh((8, 1, 1))),
          pytest.raises(ValueError, match="12 rows cannot be divided among 8 devices")):
        blockwise_contrastive(Softmax, image, text, (None, None), jnp.float32(SCALE), jnp.float32(BIAS), tile=8)
