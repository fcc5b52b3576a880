"""Changes of a recipe: suggestions that fit a topology, and a search for the Pareto-optimal ones (speed, memory)."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from jaxmm.config import MeshConfig, TrainConfig
from jaxmm.nn.transformer import REMAT_POLICIES
from jaxmm.planning.chips import Topology
from jaxmm.planning.plan import Plan
from jaxmm.planning.shapes import with_batch_size
from jaxmm.saved_config import differences, to_dict
from jaxmm.task import with_fields
from jaxmm.validation import ConfigError

Planner = Callable[[TrainConfig, Topology], Plan]
REMATS = ("none", *REMAT_POLICIES)
"""Remat policies from the fastest to the one that needs the least memory."""
TILE = 1024


@dataclass(frozen=True)
class Trial:
    """A compiled variant of a recipe."""

    config: TrainConfig
    plan: Plan
    flags: str
    """Command-line options that make this variant of the recipe; empty for the recipe itself."""

    @property
    def images_per_second(self) -> float | None:
        """Speed by the compiler's estimate; None if there is no estimate."""
        seconds = self.plan.estimated_step_seconds
        return self.plan.batch_size / seconds if seconds else None


def flags(base: TrainConfig, other: TrainConfig) -> str:
    """Return the command-line options that turn `base` into `other`."""
    return " ".join(f"--{name} {value}" for name, value in _changed(to_dict(base), to_dict(other)))


def _changed(old: Any, new: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    for key in new:
        if isinstance(new[key], dict) and isinstance(old.get(key), dict):
            yield from _changed(old[key], new[key], f"{name}{key}.")
        elif differences(old.get(key), new[key]):
            yield name + key, new[key]


def with_remat(config: TrainConfig, policy: str) -> TrainConfig:
    """Return `config` with this `remat` in every stack of layers."""
    return replace(config, task=with_fields(config.task, remat=policy))


def remat_of(config: TrainConfig) -> str | None:
    """Return the policy of the first stack; None if the task has no stack."""
    def policies(value):
        if hasattr(value, "remat"):
            yield value.remat
        elif dataclasses.is_dataclass(value):
            for field in dataclasses.fields(value):
                yield from policies(getattr(value, field.name))
    return next(policies(config.task), None)


def _meshes(config: TrainConfig, chips: int) -> list[MeshConfig]:
    """Return meshes with an increasing number of FSDP shards."""
    tensor = config.mesh.tensor
    sizes = sorted({size for size in (1, 4, 16, 64, chips) if size <= chips and chips % (size * tensor) == 0})
    return [MeshConfig(fsdp=size, tensor=tensor) for size in sizes]


def suggestions(config: TrainConfig, chips: int) -> list[TrainConfig]:
    """Return changes that need less memory, from the cheapest: more FSDP shards, a blockwise loss, remat, microbatches;
    then all of these at once; last a smaller batch, which is another recipe."""
    meshes = [mesh for mesh in _meshes(config, chips) if mesh.fsdp > config.mesh.fsdp]
    changes = [replace(config, mesh=mesh) for mesh in meshes]
    tiled = config
    if (task := config.task.with_blockwise_loss(TILE)) is not None:
        tiled = replace(config, task=task)
        changes.append(tiled)
    policy = remat_of(config)
    changes += [with_remat(config, stronger) for stronger in (REMATS[REMATS.index(policy) + 1:] if policy else ())]
    parts = [config.microbatches * n for n in (2, 4, 8, 16)] if config.task.splits else []
    parts = [n for n in parts if config.data.batch_size % (n * chips) == 0]
    changes += [replace(config, microbatches=n) for n in parts]
    smallest = with_remat(replace(tiled, mesh=meshes[-1] if meshes else config.mesh), "full")
    changes += [smallest, *(replace(smallest, microbatches=n) for n in parts)]
    sizes = [config.data.batch_size // n for n in (2, 4, 8, 16, 32, 64)]
    changes += [with_batch_size(base, size) for size in sizes if size > 0 and size % chips == 0
                for base in (config, smallest)]
    return list(dict.fromkeys(change for change in changes if change != config))


def candidates(
    config: TrainConfig, topology: Topology, *, batch_sizes: Iterable[int] = (), fsdp: Iterable[int] = (),
    remats: Iterable[str] = (), microbatches: Iterable[int] = (),
) -> list[TrainConfig]:
    """Return all combinations of the options. Defaults: the recipe's batch, 1 to all FSDP shards, three remat policies,
    and 1 or 4 microbatches."""
    chips = len(topology.devices)
    meshes = [MeshConfig(fsdp=size, tensor=config.mesh.tensor) for size in fsdp] or _meshes(config, chips)
    parts = (tuple(microbatches) or (1, 4)) if config.task.splits else (1,)
    sizes = tuple(batch_sizes) or (config.data.batch_size,)
    configs = []
    for size, mesh, policy, n in itertools.product(sizes, meshes, tuple(remats) or ("none", "cheap", "full"), parts):
        if size % (n * chips) == 0:
            changed = replace(config, microbatches=1, mesh=mesh, data=replace(config.data, batch_size=size))
            configs.append(with_remat(replace(changed, microbatches=n), policy))
    if not configs:
        raise ConfigError(f"search has nothing to try: no batch of {sizes} divides into {chips} chips and "
                          f"{parts} microbatches")
    return list(dict.fromkeys(configs))


def compile_variants(
    base: TrainConfig, configs: Iterable[TrainConfig], topology: Topology, plan: Planner
) -> Iterator[Trial]:
    """Compile `configs`, variants of `base`, one after the other, and yield those that can run."""
    for config in configs:
        try:
            yield Trial(config, plan(config, topology), flags(base, config))
        except ConfigError:
            continue


def first_fitting(trials: Iterable[Trial], count: int = 3) -> list[Trial]:
    """Return the first `count` of the trials that fit, fastest first; what follows them is not compiled."""
    fitting = itertools.islice((trial for trial in trials if trial.plan.fits), count)
    return sorted(fitting, key=lambda trial: -(trial.images_per_second or 0))


def pareto(trials: Iterable[Trial]) -> list[Trial]:
    """Return the Pareto front of the trials that fit (estimated images/s against memory), fastest first."""
    fitting = sorted((trial for trial in trials if trial.plan.fits and trial.images_per_second),
                     key=lambda trial: (-trial.images_per_second, trial.plan.peak_bytes))
    front: list[Trial] = []
    for trial in fitting:
        if not front or trial.plan.peak_bytes < front[-1].plan.peak_bytes:
            front.append(trial)
    return front
