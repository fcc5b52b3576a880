"""Define the train step, one for every model on every mesh."""

from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Key

from jaxmm.compiling import jit_options, largest_matrix
from jaxmm.sharding import batch_sharding, replicated, shardings
from jaxmm.task import Batch, Metrics, Task
from jaxmm.training.accumulate import value_and_grad
from jaxmm.training.optimizer import Optimizer
from jaxmm.training.state import State


def train_step(
    task: Task, optimizer: Optimizer, state: State, batch: Batch, rng: Key[Array, ""], *,
    microbatches: int = 1, skip_nonfinite: bool = False,
) -> tuple[State, Metrics]:
    """Do one optimizer step on a global batch.

    `rng` is the run's root key; the step folds its own number in. With `skip_nonfinite`, a step whose loss or
    gradient is not finite changes only the step count and `skips`.
    """
    rng = jax.random.fold_in(rng, state.step)
    (loss, (extra, metrics)), grads = value_and_grad(
        task, state.params, state.extra, batch, rng, microbatches=microbatches, freeze=optimizer.stop_frozen_gradients)
    updates, opt = optimizer.tx.update(grads, state.opt, state.params)
    params = optax.apply_updates(state.params, updates)
    average = state.average
    if optimizer.average:
        average = optax.incremental_update(params, state.average, 1 - optimizer.average)

    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    new = state.replace(step=state.step + 1, params=params, opt=opt, extra=extra, average=average)
    if skip_nonfinite:
        skipped = state.replace(step=state.step + 1, skips=state.skips + 1)
        new = jax.tree.map(partial(jnp.where, finite), new.replace(skips=jnp.zeros_like(state.skips)), skipped)
    metrics = metrics | {"loss": loss, "grad_norm": norm, "learning_rate": optimizer.schedule(state.step),
                         "finite": finite, "skips": new.skips}
    return new, metrics


def compile_step(task: Task, optimizer: Optimizer, mesh: Mesh, state: State, **options):
    """Return `train_step` as a jitted function of (state, batch, rng) on `mesh`, with donated state.

    `state` may be abstract; `options` are `train_step`'s own.
    """
    where = shardings(state, mesh)
    return jax.jit(
        lambda state, batch, rng: train_step(task, optimizer, state, batch, rng, **options),
        in_shardings=(where, batch_sharding(mesh), replicated(mesh)),
        out_shardings=(where, replicated(mesh)), donate_argnums=0,
        compiler_options=jit_options(mesh.devices.flat[0].platform, largest_matrix(state.params)))
