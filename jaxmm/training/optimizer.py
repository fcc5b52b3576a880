"""Build the optimizer: one optax chain."""

import math
import re
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from jaxmm.config import OptimizerConfig
from jaxmm.sharding import layer_stack, named_leaves, path_name
from jaxmm.validation import ConfigError, count_steps, require


@dataclass(frozen=True)
class Optimizer:
    """The optax transformation of a run, and the parts of `OptimizerConfig` that are not one."""

    tx: optax.GradientTransformation
    schedule: optax.Schedule
    """Learning rate at a step, without factors of layers."""
    freeze: tuple[str, ...] = ()
    average: float | None = None

    def stop_frozen_gradients(self, params: Any) -> Any:
        """Return `params` without gradients through the frozen ones, so that nothing is computed for them."""
        if not self.freeze:
            return params
        frozen = matching(params, self.freeze)
        return jax.tree.map(lambda stop, p: jax.lax.stop_gradient(p) if stop else p, frozen, params)


def matching(params: Any, patterns: tuple[str, ...]) -> Any:
    """Return a pytree like `params` of bools: whether any of `patterns` matches the path of the leaf."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: any(re.search(pattern, path_name(path)) for pattern in patterns), params
    )


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Return the schedule: linear warm-up, the schedule itself, linear cool-down to 0 over the last of `steps`.

    rsqrt falls as sqrt(w / t) after a warm-up of w steps (Zhai et al. 2022, section 3.5); exponential, by the same
    factor every step down to `final`.
    """
    warmup, cooldown = count_steps(config.warmup, steps), count_steps(config.cooldown, steps)
    require(warmup + cooldown <= steps, "optimizer.warmup + optimizer.cooldown", warmup + cooldown,
            f"at most steps = {steps}")
    length = max(1, steps - warmup)
    after = {
        "constant": optax.constant_schedule(1.0),
        "linear": optax.linear_schedule(1.0, config.final, length),
        "cosine": optax.cosine_decay_schedule(1.0, length, config.final),
        "exponential": lambda step: config.final ** (step / length),
        "rsqrt": lambda step: jnp.sqrt(max(warmup, 1) / (step + max(warmup, 1))),
    }[config.schedule]

    def schedule(step):
        rate = jnp.where(step < warmup, step / max(1, warmup), after(jnp.maximum(step - warmup, 0)))
        if cooldown:
            rate = rate * jnp.clip((steps - step) / cooldown, 0, 1)
        return config.learning_rate * rate

    return schedule


def clamp_params(clamps: tuple[tuple[str, float, float], ...]) -> optax.GradientTransformation:
    """Limit updates so that parameters whose path matches a pattern stay within (lowest, highest)."""
    def update(updates, state, params):
        def clamp(path, u, p):
            for pattern, low, high in clamps:
                if re.search(pattern, path_name(path)):
                    return jnp.clip(p + u, low, high) - p
            return u
        return jax.tree_util.tree_map_with_path(clamp, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


BELOW = re.compile(r"(patches|tokens|embedding|pre_norm)/|(positions|class_token|distillation_token|registers)$")
"""Parameters before the layers of a tower, by their path in it."""
ABOVE = re.compile(r"(^|/)(norm|\w*head|pre_logits|pair_hidden|\w+_projection)/|"
                   r"(^|/)(logit_scale|logit_bias|temperature)$")
"""Parameters behind the layers of a tower, or of all towers."""


def layer_scales(params: Any, factor: float, multipliers: tuple[tuple[str, float], ...] = ()) -> Any:
    """Return layer-wise learning-rate factors (BEiT, appendix): `factor` to the number of layers above, per tower.

    Stacked layers get a vector along their leading axis. What comes before a stack counts as below its first layer,
    what comes after it (norm, head, projections) as the top. Raises `ConfigError` for parameters that are neither, and
    that no pattern of `multipliers` covers.
    """
    leaves = dict(named_leaves(params))
    stacks = {layer_stack(name): leaf.shape[0] for name, leaf in leaves.items() if layer_stack(name)}
    towers = {stack.removesuffix("blocks").removesuffix("encoder/"): depth for stack, depth in stacks.items()}
    uncovered = []

    def scale(name: str, leaf: Any) -> jax.Array:
        tower = max((tower for tower in towers if name.startswith(tower)), key=len, default=None)
        if tower is not None:
            depth, rest = towers[tower], name.removeprefix(tower)
            if layer_stack(name) or rest.startswith("merge/"):  # BLIP merges two images in its last layers only
                factors = factor ** (depth - jnp.arange(depth, dtype=jnp.float32))[-leaf.shape[0]:]
                return factors.reshape(-1, *[1] * (leaf.ndim - 1))
            if BELOW.match(rest):
                return jnp.float32(factor ** (depth + 1))
        if not towers or not (ABOVE.search(name) or any(re.search(pattern, name) for pattern, _ in multipliers)):
            uncovered.append(name)
        return jnp.float32(1.0)

    scales = {name: scale(name, leaf) for name, leaf in leaves.items()}
    if uncovered and factor != 1:
        more = f" and {len(uncovered) - 8} more" if len(uncovered) > 8 else ""
        raise ConfigError(f"optimizer.layer_decay is {factor}, but these parameters belong to no layer: "
                          f"{', '.join(uncovered[:8])}{more}; expected stacks of layers called `blocks`, or a pattern "
                          "of optimizer.multipliers for what stands before or behind them")
    return jax.tree_util.tree_map_with_path(lambda path, _: scales[path_name(path)], params)


def scale_by_layer(config: OptimizerConfig, params: Any) -> optax.GradientTransformation:
    """Multiply updates by layer-wise decay and the recipe's own multipliers."""
    scales = layer_scales(params, config.layer_decay or 1.0, config.multipliers)

    def multiplied(path, scale):
        hit = (m for pattern, m in config.multipliers if re.search(pattern, path_name(path)))
        return scale * next(hit, 1.0)

    # By path, because the updates lack the frozen parameters.
    factors = dict(named_leaves(jax.tree_util.tree_map_with_path(multiplied, scales)))
    return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(
        lambda path, update: update * factors[path_name(path)], updates))


def make_optimizer(
    config: OptimizerConfig, params: Any, steps: int, clamps: tuple[tuple[str, float, float], ...] = ()
) -> Optimizer:
    """Build the chain: clip, precondition, decay, learning rate, per-layer factors, clamps; skip frozen parameters.

    `params` may be abstract. Raises `ConfigError` if a pattern of `freeze`, `multipliers` or `decay` matches nothing,
    or if everything is frozen.
    """
    names = [name for name, _ in named_leaves(params)]
    for field, patterns in (("freeze", config.freeze), ("multipliers", [p for p, _ in config.multipliers]),
                            ("decay", [config.decay] if config.weight_decay else [])):
        for pattern in patterns:
            if not any(re.search(pattern, name) for name in names):
                raise ConfigError(f"optimizer.{field} has {pattern!r}, which matches none of the {len(names)} "
                                  f"parameters, such as {names[0]}")
    frozen = matching(params, config.freeze)
    if all(jax.tree.leaves(frozen)):
        raise ConfigError(f"optimizer.freeze is {config.freeze}, which leaves nothing to train")

    schedule = learning_rate(config, steps)
    moment_dtype = jnp.dtype(config.moment_dtype)
    precondition = {
        "adamw": partial(optax.scale_by_adam, config.b1, config.b2, config.eps, mu_dtype=moment_dtype),
        "lion": partial(optax.scale_by_lion, config.b1, config.b2, mu_dtype=moment_dtype),
        "adafactor": partial(_adafactor, config.b1, moment_dtype),
        "muon": partial(_muon, config, moment_dtype),
        "sgd": partial(optax.trace, config.momentum, accumulator_dtype=moment_dtype),
    }[config.name]()
    parts = [optax.clip_by_global_norm(config.clip)] if config.clip is not None else []
    parts.append(precondition)
    if config.weight_decay:
        parts.append(optax.add_decayed_weights(config.weight_decay, lambda tree: matching(tree, (config.decay,))))
    parts.append(optax.scale_by_learning_rate(schedule))
    if config.layer_decay or config.multipliers:
        parts.append(scale_by_layer(config, params))
    if clamps:
        parts.append(clamp_params(clamps))
    tx = optax.chain(*parts)
    if config.freeze:
        labels = jax.tree.map(lambda stop: "frozen" if stop else "trained", frozen)
        tx = optax.partition({"trained": tx, "frozen": optax.set_to_zero()}, labels)
    return Optimizer(tx, schedule, config.freeze, config.average)


def _adafactor(b1: float, dtype: jnp.dtype) -> optax.GradientTransformation:
    """Build Adafactor as Zhai et al. 2022 (section 3.4): factored second moment, first moment, clipped updates.

    Dimensions from 32 on are factored, so that the kernels [d h k] of attention are.
    """
    return optax.chain(optax.scale_by_factored_rms(decay_rate=0.8, min_dim_size_to_factor=32),
                       optax.clip_by_block_rms(1.0), optax.ema(b1, debias=False, accumulator_dtype=dtype))


def is_matrix(name: str) -> bool:
    """Return whether Muon orthogonalises the parameter `name`: the matrices of layers and of the patch embedding."""
    return name.endswith("kernel") if layer_stack(name) else re.search(r"(^|/)patches/kernel$", name) is not None


def _muon(config: OptimizerConfig, dtype: jnp.dtype) -> optax.GradientTransformation:
    """Build Muon (Jordan 2024): momentum of matrices made orthogonal, with the size of Adam's updates.

    (Liu et al. 2025, section 2.2.) Adam is used for tables, vectors, and parameters before or behind the layers.
    """
    def numbers(path, leaf) -> optax.contrib.MuonDimensionNumbers:
        name, first = path_name(path), 0 if path_name(path).endswith("patches/kernel") else 1  # a layer axis before
        last = leaf.ndim - 1 if name.endswith(("out/kernel", "patches/kernel")) else first + 1
        return optax.contrib.MuonDimensionNumbers(tuple(range(first, last)), tuple(range(last, leaf.ndim)))

    def sized(path, update):
        rows, columns = (math.prod(update.shape[axis] for axis in axes) for axes in numbers(path, update))
        return 0.2 * max(rows, columns)**0.5 * update

    across = jax.tree_util.tree_map_with_path
    muon = optax.chain(
        optax.contrib.scale_by_muon(beta=config.momentum, mu_dtype=dtype,
                                    weight_dimension_numbers=lambda tree: across(numbers, tree)),
        optax.stateless(lambda updates, _: across(sized, updates)))
    adam = optax.scale_by_adam(config.b1, config.b2, config.eps, mu_dtype=dtype)
    return optax.partition({"matrix": muon, "rest": adam}, lambda tree: across(
        lambda path, _: "matrix" if is_matrix(path_name(path)) else "rest", tree))
