"""Everything that a step changes and a checkpoint holds."""

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
    """The task's own: momentum copies, queues."""
    average: Any
    """Moving average of the parameters; None where the recipe keeps none."""
    skips: Any
    """int32 scalar: steps skipped in a row because their loss or gradient was not finite."""


def init_state(
    task: Task, optimizer: Optimizer, rng: Key[Array, ""], given: Mapping[str, Array] | None = None
) -> State:
    """Parameters, then the `given` ones in their places by path, then what is derived from them, then the optimizer's
    state."""
    params_rng, extra_rng = jax.random.split(rng)
    given = given or {}
    params = jax.tree_util.tree_map_with_path(lambda path, leaf: given.get(path_name(path), leaf),
                                              task.init(params_rng))
    zero = jnp.zeros((), jnp.int32)
    average = jax.tree.map(jnp.copy, params) if optimizer.average else None
    return State(step=zero, params=params, opt=optimizer.tx.init(params), extra=task.init_extra(params, extra_rng),
                 average=average, skips=zero)


def abstract_state(task: Task, optimizer: Optimizer) -> State:
    """Shapes and dtypes of the state; nothing is computed."""
    return jax.eval_shape(lambda rng: init_state(task, optimizer, rng), jax.random.key(0))


def sharded_state(
    task: Task, optimizer: Optimizer, seed: int, like: State, given: Mapping[str, Array] | None = None
) -> State:
    """A state before its first step, laid out as `like`, each device making its own share: the whole never exists in
    one place."""
    where = jax.tree.map(lambda leaf: leaf.sharding, like)
    make = jax.jit(lambda rng, given: init_state(task, optimizer, rng, given), out_shardings=where)
    return make(jax.random.key(seed), dict(given or {}))
