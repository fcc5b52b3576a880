"""Which changes of a recipe fit a topology, and which of those that fit are the fastest by the compiler's estimate."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from jaxmm.config import ConfigError, MeshConfig, TrainConfig, differences, to_dict
from jaxmm.nn.transformer import REMAT_POLICIES, TransformerConfig
from jaxmm.planning.chips import Topology
from jaxmm.planning.plan import Plan
from jaxmm.planning.shapes import resized

Planner = Callable[[TrainConfig, Topology], Plan]
REMATS = ("none", *REMAT_POLICIES)
"""From the fastest to the smallest."""
TILE = 1024


@dataclass(frozen=True)
class Found:
    """A recipe that was compiled, and how it differs from where the search began."""

    config: TrainConfig
    plan: Plan
    flags: str
    """Options of the command line; empty where nothing was changed."""

    @property
    def pictures_per_second(self) -> float | None:
        """By the compiler's estimate."""
        seconds = self.plan.estimated_step_seconds
        return self.plan.batch_size / seconds if seconds else None


def flags(base: TrainConfig, other: TrainConfig) -> str:
    """The options that make `other` of `base`."""
    return " ".join(f"--{name} {value}" for name, value in _changed(to_dict(base), to_dict(other)))


def _changed(old: Any, new: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    for key in new:
        if isinstance(new[key], dict) and isinstance(old.get(key), dict):
            yield from _changed(old[key], new[key], f"{name}{key}.")
        elif differences(old.get(key), new[key]):
            yield name + key, new[key]


def with_remat(config: TrainConfig, policy: str) -> TrainConfig:
    """`config` with this `remat` in every stack of layers."""
    return replace(config, task=_in_stacks(config.task, policy))


def _in_stacks(value: Any, policy: str) -> Any:
    if isinstance(value, TransformerConfig):
        return replace(value, remat=policy)
    if not dataclasses.is_dataclass(value):
        return value
    fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    changed = {name: new for name, old in fields.items() if (new := _in_stacks(old, policy)) is not old}
    return replace(value, **changed) if changed else value


def remat_of(config: TrainConfig) -> str:
    """The policy of the first stack."""
    def stacks(value):
        if isinstance(value, TransformerConfig):
            yield value
        elif dataclasses.is_dataclass(value):
            for field in dataclasses.fields(value):
                yield from stacks(getattr(value, field.name))
    return next(stacks(config.task)).remat


def _shapes(config: TrainConfig, topology: Topology) -> list[MeshConfig]:
    """Meshes with ever more shares of the parameters."""
    chips, tensor = len(topology.devices), config.mesh.tensor
    sizes = sorted({size for size in (1, 4, 16, 64, chips) if size <= chips and chips % (size * tensor) == 0})
    return [MeshConfig(fsdp=size, tensor=tensor) for size in sizes]


def remedies(config: TrainConfig, topology: Topology) -> list[TrainConfig]:
    """Changes that need less memory, from what costs least: parameters in more shares, the loss in blocks, computing
    again, microbatches; then all of these at once; and last a smaller batch, which is another recipe."""
    shapes = [mesh for mesh in _shapes(config, topology) if mesh.fsdp > config.mesh.fsdp]
    found = [replace(config, mesh=mesh) for mesh in shapes]
    tiled = config
    if getattr(config.task, "tile", 0) is None:
        tiled = replace(config, task=replace(config.task, tile=TILE))
        found.append(tiled)
    found += [with_remat(config, policy) for policy in REMATS[REMATS.index(remat_of(config)) + 1:]]
    parts = [config.microbatches * n for n in (2, 4, 8, 16)] if config.task.splits else []
    parts = [n for n in parts if config.data.batch_size % (n * len(topology.devices)) == 0]
    found += [replace(config, microbatches=n) for n in parts]
    least = with_remat(replace(tiled, mesh=shapes[-1] if shapes else config.mesh), "full")
    found += [least, *(replace(least, microbatches=n) for n in parts)]
    halves = [config.data.batch_size // n for n in (2, 4, 8, 16, 32, 64)]
    found += [resized(each, size) for size in halves if size % len(topology.devices) == 0 for each in (config, least)]
    return list(dict.fromkeys(each for each in found if each != config))


def repair(
    config: TrainConfig, topology: Topology, plan: Planner, *, wanted: int = 3,
    on_plan: Callable[[Found], None] = lambda found: None,
) -> list[Found]:
    """The first `wanted` of `remedies` that fit, each compiled, by estimated step time.

    `on_plan` is told of each that was tried.
    """
    found: list[Found] = []
    for each in _plans(config, remedies(config, topology), topology, plan):
        on_plan(each)
        if each.plan.fits:
            found.append(each)
        if len(found) == wanted:
            break
    return sorted(found, key=lambda each: -(each.pictures_per_second or 0))


def candidates(
    config: TrainConfig, topology: Topology, *, batch_sizes: Iterable[int] = (), fsdp: Iterable[int] = (),
    remats: Iterable[str] = (), microbatches: Iterable[int] = (),
) -> list[TrainConfig]:
    """All combinations; of what is not given, what is likely: the recipe's batch, meshes of any shares, three policies,
    and 1 or 4 microbatches."""
    meshes = [MeshConfig(fsdp=size, tensor=config.mesh.tensor) for size in fsdp] or _shapes(config, topology)
    parts = (tuple(microbatches) or (1, 4)) if config.task.splits else (1,)
    sizes = tuple(batch_sizes) or (config.data.batch_size,)
    found = []
    for size, mesh, policy, n in itertools.product(sizes, meshes, tuple(remats) or ("none", "cheap", "full"), parts):
        if size % (n * len(topology.devices)) == 0:
            changed = replace(config, microbatches=1, mesh=mesh, data=replace(config.data, batch_size=size))
            found.append(with_remat(replace(changed, microbatches=n), policy))
    if not found:
        raise ConfigError(f"search has nothing to try: no batch of {sizes} divides into {len(topology.devices)} chips "
                          f"and {parts} microbatches")
    return list(dict.fromkeys(found))


def search(
    config: TrainConfig, configs: Iterable[TrainConfig], topology: Topology, plan: Planner,
    on_plan: Callable[[Found], None] = lambda found: None,
) -> list[Found]:
    """All of `configs` compiled; `on_plan` is told of each."""
    found = []
    for each in _plans(config, configs, topology, plan):
        on_plan(each)
        found.append(each)
    return found


def _plans(base, configs, topology, plan) -> Iterator[Found]:
    """Those that can run at all."""
    for config in configs:
        try:
            yield Found(config, plan(config, topology), flags(base, config))
        except ConfigError:
            continue


def pareto(found: Iterable[Found]) -> list[Found]:
    """Of those that fit, each that no other beats both in estimated pictures a second and in memory; fastest first."""
    fitting = sorted((each for each in found if each.plan.fits and each.pictures_per_second),
                     key=lambda each: (-each.pictures_per_second, each.plan.peak_bytes))
    front: list[Found] = []
    for each in fitting:
        if not front or each.plan.peak_bytes < front[-1].plan.peak_bytes:
            front.append(each)
    return front
