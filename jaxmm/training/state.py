"""Define the state of a run: everything that a step changes and a checkpoint contains."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Key

from jaxmm.sharding import path_name
from jaxmm.task import Task
from jaxmm.training.optimizer import Optimizer


class State(struct.PyTreeNode):
    """The state of a run after `step` steps: arrays, or in their places their shapes or shardings."""

    step: Any
    """int32 scalar."""
    params: Any
    opt: Any
    extra: Any
    """State of the task besides the parameters: momentum copies, queues."""
    average: Any
    """Moving average of the parameters; None if the recipe keeps none."""
    skips: Any
    """int32 scalar: steps skipped in a row because their loss or gradient was not finite."""


def init_state(
    task: Task, optimizer: Optimizer, rng: Key[Array, ""], loaded: Mapping[str, Array] | None = None
) -> State:
    """Initialise the parameters, replace those in `loaded` by path, then derive the extra and the optimizer's state."""
    params_rng, extra_rng = jax.random.split(rng)
    loaded = loaded or {}
    params = jax.tree_util.tree_map_with_path(lambda path, leaf: loaded.get(path_name(path), leaf),
                                              task.init(params_rng))
    zero = jnp.zeros((), jnp.int32)
    average = jax.tree.map(jnp.copy, params) if optimizer.average else None
    return State(step=zero, params=params, opt=optimizer.tx.init(params), extra=task.init_extra(params, extra_rng),
                 average=average, skips=zero)


def abstract_state(task: Task, optimizer: Optimizer) -> State:
    """Return shapes and dtypes of the state; nothing is computed."""
    return jax.eval_shape(lambda rng: init_state(task, optimizer, rng), jax.random.key(0))


def sharded_state(
    task: Task, optimizer: Optimizer, seed: int, like: State, loaded: Mapping[str, Array] | None = None
) -> State:
    """Return the state before the first step, laid out as `like`: each device computes its own shards only."""
    target = jax.tree.map(lambda leaf: leaf.sharding, like)
    make = jax.jit(lambda rng, loaded: init_state(task, optimizer, rng, loaded), out_shardings=target)
    return make(jax.random.key(seed), dict(loaded or {}))
