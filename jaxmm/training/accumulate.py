"""Compute the gradient of a batch in microbatches.

A contrastive loss of a batch is not the mean of the losses of its parts. So the parts are encoded without
keeping what the backward pass needs, the loss over all outputs is differentiated with respect to them, and then
each part is encoded again and its share of the gradient pulled back (GradCache, Gao et al. 2021).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key

from jaxmm.config import TrainConfig
from jaxmm.sharding import batch_shards, constrain_batch
from jaxmm.task import Batch, Metrics, Params, Task
from jaxmm.validation import require


def check_parts(config: TrainConfig, mesh: Mesh) -> None:
    """Raise `ConfigError` if the batch does not divide into microbatches and shards, or the loss does not split."""
    shards, part = batch_shards(mesh), config.data.batch_size // config.microbatches
    require(part % shards == 0, "data.batch_size", config.data.batch_size,
            f"a multiple of mesh.data x mesh.fsdp x microbatches = {shards} x {config.microbatches}")
    require(config.microbatches == 1 or config.task.splits, "microbatches", config.microbatches,
            f"1: the loss of {type(config.task).__name__} cannot be computed in parts")
    config.task.check_batch(config.data.batch_size)


def split(tree: Any, parts: int) -> Any:
    """Reshape [b ...] leaves to [parts, b / parts, ...]; part i has rows i, i + parts, ...

    Strided, so that each part is spread over the devices as the batch was and nothing moves.
    """
    return jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), tree)


def join(tree: Any) -> Any:
    """Invert `split`."""
    return jax.tree.map(lambda x: constrain_batch(x.swapaxes(0, 1).reshape(-1, *x.shape[2:])), tree)


def value_and_grad(
    task: Task, params: Params, extra: Any, batch: Batch, rng: Key[Array, ""], *, microbatches: int = 1, freeze=None
) -> tuple[tuple[Float[Array, ""], tuple[Any, Metrics]], Params]:
    """Compute `jax.value_and_grad(task.loss, has_aux=True)` in `microbatches` parts, one after the other.

    `freeze` is applied to the parameters inside the differentiated function (see `Optimizer.stop_frozen_gradients`).
    """
    freeze = freeze or (lambda tree: tree)
    if microbatches == 1:
        def loss(params):
            return task.loss(freeze(params), extra, batch, rng)
        return jax.value_and_grad(loss, has_aux=True)(params)

    mixing, drawing = jax.random.split(rng)
    batch = task.prepare(batch, mixing)
    parts = split(batch, microbatches), jax.random.split(drawing, microbatches)

    def encode(params, part, key):
        return task.encode(freeze(params), jax.tree.map(constrain_batch, part), key)

    if task.decomposes:
        def one(part):
            def loss(params):
                return task.objective(freeze(params), encode(params, *part), part[0])
            return jax.value_and_grad(loss, has_aux=True)(params)

        shapes = jax.eval_shape(one, jax.tree.map(lambda x: x[0], parts))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        total, _ = jax.lax.scan(lambda total, part: (jax.tree.map(jnp.add, total, one(part)), None), zeros, parts)
        (loss, metrics), grads = jax.tree.map(lambda x: x / microbatches, total)
        return (loss, (extra, metrics)), grads

    with jax.named_scope("recomputed"):      # below, for the gradient
        outputs = join(jax.lax.map(lambda part: encode(params, *part), parts))

    def objective(params, outputs):
        return task.objective(freeze(params), outputs, batch)

    (loss, metrics), (grads, cotangents) = jax.value_and_grad(objective, (0, 1), has_aux=True)(params, outputs)

    def replay(total, inputs):
        part, cotangent = inputs
        _, pull = jax.vjp(lambda p: encode(p, *part), params)
        return jax.tree.map(jnp.add, total, pull(cotangent)[0]), None

    grads, _ = jax.lax.scan(replay, grads, (parts, split(cotangents, microbatches)))
    return (loss, (extra, metrics)), grads
