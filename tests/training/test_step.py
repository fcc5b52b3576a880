import functools
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmm.config import MeshConfig, OptimizerConfig
from jaxmm.sharding import make_mesh, place_batch, replicated, shardings, with_shardings
from jaxmm.training.optimizer import make_optimizer
from jaxmm.training.state import abstract_state, init_state, sharded_state
from jaxmm.training.step import compile_step, train_step
from jaxmm.validation import ConfigError
from tests.training.common import (
    ATTENTIONS,
    CLASSES,
    Linear,
    Steep,
    assert_same_bits,
    batch,
    leaves,
    model_task,
    plain_optimizer,
)

ONE = (1, 1, 1)
MESHES = {"data 8": (8, 1, 1), "fsdp 8": (1, 8, 1), "tensor 4": (2, 1, 4), "2x2x2": (2, 2, 2)}
KINDS = ("vit", "clip", "siglip", "igpt")
BATCH, STEPS = 64, 5
RANDOM = {"dropout": 0.1, "attention_dropout": 0.1, "drop_path": 0.2}


@dataclass(frozen=True)
class Run:
    losses: np.ndarray
    norms: np.ndarray
    temp_bytes: int
    shares: dict[str, float]
    """How much of each sharded parameter lies on one device."""


@functools.cache
def first_state(kind, drawn):
    task = model_task(kind, **dict(drawn))
    state = jax.jit(init_state, static_argnums=(0, 1))(task, plain_optimizer(task), jax.random.key(5))
    return jax.tree.map(np.asarray, state)


@functools.cache
def run(kind, axes, *, microbatches=1, scan=True, drawn=(), tile=None):
    """Five steps of a compiled train step."""
    task = model_task(kind, scan=scan, **dict(drawn))
    if tile is not None:
        task = replace(task, tile=tile)
    optimizer = plain_optimizer(task)
    mesh = make_mesh(MeshConfig(data=axes[0], fsdp=axes[1], tensor=axes[2]))
    shapes = abstract_state(task, optimizer)
    with jax.set_mesh(mesh):
        key = jax.device_put(jax.random.key(7), replicated(mesh))
        state = jax.device_put(first_state(kind, drawn), shardings(shapes, mesh))
        step = compile_step(task, optimizer, mesh, shapes, microbatches=microbatches)
        step = step.lower(state, place_batch(batch(kind, 0, BATCH), mesh), key).compile()
        metrics = []
        for number in range(STEPS):
            state, values = step(state, place_batch(batch(kind, number, BATCH), mesh), key)
            metrics.append((float(values["loss"]), float(values["grad_norm"])))
    shares = {jax.tree_util.keystr(path): leaf.addressable_shards[0].data.size / leaf.size
              for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)}
    losses, norms = np.transpose(metrics)
    return Run(losses, norms, step.memory_analysis().temp_size_in_bytes, shares)


def assert_learning(losses):
    assert np.isfinite(losses).all() and np.abs(np.diff(losses)).min() > 1e-3


@pytest.mark.parametrize("kind, axes", [
    pytest.param(kind, axes, id=f"{kind}-{name}", marks=[] if kind == "vit" or name == "2x2x2" else pytest.mark.long)
    for kind in KINDS for name, axes in MESHES.items()])
def test_eight_devices_compute_what_one_does(kind, axes, record_property):
    one, many = run(kind, ONE), run(kind, axes)
    assert_learning(one.losses)
    record_property(f"{kind} on {axes}, largest relative difference of a loss from one device's",
                    f"{np.max(np.abs(many.losses / one.losses - 1)):.1e}")
    np.testing.assert_allclose(many.losses, one.losses, rtol=1e-5)
    np.testing.assert_allclose(many.norms, one.norms, rtol=1e-4)
    cut = min(many.shares.values())
    assert cut == 1 / (axes[1] * axes[2])                      # the devices did not all do the same work


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[] if kind in ("quadratic", "learned_content")
                                               else pytest.mark.long) for kind in ATTENTIONS])
def test_attention_by_position_is_the_same_on_eight_devices(kind):
    """With dropout, of attention weights that all images share and of those that each has of its own."""
    drawn = (("dropout", 0.1), ("attention_dropout", 0.1))
    one, many = run(kind, ONE, drawn=drawn), run(kind, MESHES["2x2x2"], drawn=drawn)
    assert np.isfinite(one.losses).all() and np.ptp(one.losses) > 0.01
    np.testing.assert_allclose(many.losses, one.losses, rtol=1e-5)
    np.testing.assert_allclose(many.norms, one.norms, rtol=1e-4)
    assert min(many.shares.values()) == 1 / 4


def test_what_is_random_is_the_same_on_eight_devices():
    drawn = tuple(RANDOM.items())
    one, many = run("clip", ONE, drawn=drawn), run("clip", MESHES["2x2x2"], drawn=drawn)
    np.testing.assert_allclose(many.losses, one.losses, rtol=1e-5)
    assert np.abs(one.losses / run("clip", ONE).losses - 1).max() > 1e-3        # it was drawn at all


@pytest.mark.parametrize("kind", ["vit", *(pytest.param(kind, marks=pytest.mark.long) for kind in KINDS[1:])])
def test_unrolled_layers_compute_what_scanned_ones_do(kind):
    np.testing.assert_allclose(run(kind, ONE, scan=False).losses, run(kind, ONE).losses, rtol=1e-5)


@pytest.mark.parametrize("kind", ["vit", "clip", pytest.param("siglip", marks=pytest.mark.long)])
def test_microbatches_give_the_same_losses_in_less_memory(kind, record_property):
    full, parts = run(kind, ONE), run(kind, ONE, microbatches=4)
    record_property(f"{kind}, batch {BATCH}, temporary memory",
                    f"{full.temp_bytes:,} bytes with --microbatches 1, {parts.temp_bytes:,} with 4 "
                    f"({parts.temp_bytes / full.temp_bytes:.2f} of it)")
    np.testing.assert_allclose(parts.losses, full.losses, rtol=1e-5)
    np.testing.assert_allclose(parts.norms, full.norms, rtol=1e-4)
    assert parts.temp_bytes < 0.6 * full.temp_bytes


def test_microbatches_are_exact_on_a_mesh():
    parts = run("clip", MESHES["2x2x2"], microbatches=4)
    np.testing.assert_allclose(parts.losses, run("clip", ONE).losses, rtol=1e-5)


@pytest.mark.parametrize("kind", ["clip", pytest.param("siglip", marks=pytest.mark.long)])
def test_losses_in_blocks_are_exact_with_microbatches_on_a_mesh(kind):
    blocks = run(kind, MESHES["2x2x2"], microbatches=4, tile=3)
    np.testing.assert_allclose(blocks.losses, run(kind, ONE).losses, rtol=1e-5)
    np.testing.assert_allclose(blocks.norms, run(kind, ONE).norms, rtol=1e-4)


@functools.cache
def linear(average=None, **fields):
    task = Linear(**fields)
    return task, make_optimizer(OptimizerConfig(learning_rate=0.02, warmup=0.0, average=average),
                                jax.eval_shape(task.init, jax.random.key(0)), 20)


def digits(step, size=16, bad=()):
    rng = np.random.default_rng(step)
    ids = np.zeros((size, 2), np.int32)
    ids[3] = bad or (1, 2)
    return {"image": jnp.asarray(rng.integers(0, 256, (size, 8, 8, 3)), jnp.uint8), "image_id": jnp.asarray(ids),
            "label": jnp.asarray(rng.integers(0, CLASSES, size), jnp.int32)}


def test_the_state_is_updated_in_place():
    task, optimizer = linear(0.5)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        state = sharded_state(task, optimizer, 0, with_shardings(abstract_state(task, optimizer), mesh))
        step = compile_step(task, optimizer, mesh, state)
        inputs = state, place_batch(jax.tree.map(np.asarray, digits(0)), mesh), jax.random.key(1)
        frozen_grads = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
        assert step.lower(*inputs).compile().memory_analysis().alias_size_in_bytes >= frozen_grads
        after, _ = step(*inputs)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.params, state.opt, state.average)))
    assert int(after.step) == 1 and int(after.extra["seen"]) == 16


def test_a_state_is_the_same_on_every_mesh():
    task, optimizer = linear(0.9, width=8)
    one = jax.jit(init_state, static_argnums=(0, 1))(task, optimizer, jax.random.key(5))
    assert_same_bits(one.params, one.average)
    for axes in MESHES.values():
        mesh = make_mesh(MeshConfig(data=axes[0], fsdp=axes[1], tensor=axes[2]))
        many = sharded_state(task, optimizer, 5, with_shardings(abstract_state(task, optimizer), mesh))
        shares = {x.addressable_shards[0].data.size / x.size for x in (
            many.params["head"]["kernel"], many.average["head"]["kernel"], many.opt[1].mu["head"]["kernel"])}
        assert shares == {{(8, 1, 1): 1, (1, 8, 1): 1 / 8, (2, 1, 4): 1, (2, 2, 2): 1 / 4}[axes]}   # 4 cuts no 10
        for a, b in zip(leaves(one), leaves(many), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8)


def test_average_metrics_and_extra_follow_the_steps():
    task, optimizer = linear(0.7)
    state = init_state(task, optimizer, jax.random.key(0))
    step = jax.jit(lambda state, batch: train_step(task, optimizer, state, batch, jax.random.key(1)))
    average = leaves(state.params)
    for number in range(4):
        before = state.params
        state, metrics = step(state, digits(number))
        average = [0.7 * a + 0.3 * p for a, p in zip(average, leaves(state.params), strict=True)]
        (loss, _), grads = jax.value_and_grad(
            lambda p: task.loss(p, {"seen": jnp.zeros((), jnp.int32)}, digits(number), jax.random.key(0)),  # noqa: B023
            has_aux=True)(before)
        assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-6)
        norm = np.sqrt(sum(np.square(g).sum() for g in leaves(grads)))
        assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-5)
        assert float(metrics["learning_rate"]) == pytest.approx(float(optimizer.schedule(number)))
        assert int(state.step) == number + 1 and int(state.extra["seen"]) == 16 * (number + 1)
        assert bool(metrics["finite"]) and int(metrics["skips"]) == 0
    for ours, theirs in zip(leaves(state.average), average, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)


def test_a_skipped_step_leaves_everything_as_it_was():
    task, optimizer = linear(0.7, poison=((8, 9),))
    step = jax.jit(lambda state, batch: train_step(task, optimizer, state, batch, jax.random.key(1),
                                                   skip_nonfinite=True))
    good, _ = step(init_state(task, optimizer, jax.random.key(0)), digits(0))
    state = good
    for skips in (1, 2):
        state, metrics = step(state, digits(skips, bad=(8, 9)))
        assert np.isnan(metrics["loss"]) and not bool(metrics["finite"])
        assert int(metrics["skips"]) == int(state.skips) == skips and int(state.step) == 1 + skips
        assert_same_bits(state.replace(step=good.step, skips=good.skips), good)
    state, metrics = step(state, digits(3))
    assert int(state.skips) == int(metrics["skips"]) == 0 and int(state.extra["seen"]) == 32
    assert not np.array_equal(state.params["head"]["bias"], good.params["head"]["bias"])
    assert not np.array_equal(state.average["head"]["bias"], good.average["head"]["bias"])


def test_a_gradient_that_is_not_finite_counts_though_the_loss_is():
    """Without skipping, it spoils every parameter."""
    task, optimizer = Steep(poison=((8, 9),)), linear(0.7)[1]
    state = init_state(task, optimizer, jax.random.key(0))
    step, skipping = (jax.jit(partial(train_step, task, optimizer, rng=jax.random.key(1), skip_nonfinite=skip))
                      for skip in (False, True))
    spoilt, _ = step(state, digits(1, bad=(8, 9)))
    kept, metrics = skipping(state, digits(1, bad=(8, 9)))
    assert np.isfinite(metrics["loss"]) and not np.isfinite(metrics["grad_norm"]) and not bool(metrics["finite"])
    assert not any(np.isfinite(leaf).any() for leaf in leaves(spoilt.params) + leaves(spoilt.average))
    assert_same_bits(kept.replace(step=state.step, skips=state.skips), state)
    good, metrics = skipping(state, digits(1))
    assert bool(metrics["finite"]) and not np.array_equal(good.params["head"]["bias"], state.params["head"]["bias"])


def test_without_skipping_the_loss_is_reported_all_the_same():
    task, optimizer = linear(poison=((8, 9),))
    state, metrics = train_step(task, optimizer, init_state(task, optimizer, jax.random.key(0)),
                                digits(0, bad=(8, 9)), jax.random.key(1))
    assert not bool(metrics["finite"]) and np.isnan(leaves(state.params)[0]).any()


def test_frozen_parameters_stay_and_the_rest_learns():
    task = Linear()
    config = OptimizerConfig(learning_rate=0.02, warmup=0.0, weight_decay=0.3, freeze=(r"^up/",))
    optimizer = make_optimizer(config, jax.eval_shape(task.init, jax.random.key(0)), 20)
    state = init_state(task, optimizer, jax.random.key(0))
    after, _ = train_step(task, optimizer, state, digits(0), jax.random.key(1))
    assert_same_bits(after.params["up"], state.params["up"])
    assert not np.array_equal(after.params["head"]["kernel"], state.params["head"]["kernel"])
    with pytest.raises(ConfigError, match="leaves nothing to train"):
        make_optimizer(replace(config, freeze=("kernel", "bias")), state.params, 20)
