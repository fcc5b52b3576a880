"""Where things lie: the mesh, one ordered table of rules for parameters, and the batch.

Models never mention a mesh. Parameters, optimizer moments and copies of parameters are placed by the end of their
path, so one table serves the whole state; specs are aligned to the trailing dimensions, which leaves a leading
layer axis alone.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxmm.config import ConfigError, MeshConfig, require

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")
TOKENS = PartitionSpec(BATCH, None, "tensor")
"""Where queries, keys and values [b t h ...] lie."""

RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"(^|/)v_(row|col)/", ()),  # Adafactor's factored moments lack a dimension of their parameter, and are small
    (r"(query|key|value)/kernel$", ("fsdp", "tensor", None)),  # [d h k]
    (r"(query|key|value)/bias$", ("tensor", None)),  # [h k]
    (r"attention/out/kernel$", ("tensor", None, "fsdp")),  # [h k d]
    (r"mlp/up/kernel$", ("fsdp", "tensor")),  # [d m]
    (r"mlp/up/bias$", ("tensor",)),  # [m]
    (r"mlp/down/kernel$", ("tensor", "fsdp")),  # [m d]
    (r"patches/kernel$", (None, None, None, "fsdp")),  # [p p c d]
    (r"tokens/embedding$", ("tensor", "fsdp")),  # [v d]
    (r"(head|pre_logits)/kernel$", ("fsdp", "tensor")),  # [d c]
    (r"projection/kernel$", ("fsdp", None)),  # [d e]
    (r"", ()),  # everything else is replicated
)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of `data` x `fsdp` x `tensor` over `devices` (default: all of this run's).

    Raises `ConfigError` when there are too few devices, or when they do not divide.
    """
    devices = list(jax.devices() if devices is None else devices)
    inner = config.fsdp * config.tensor
    if config.data == -1:
        if len(devices) % inner or not len(devices) // inner:
            raise ConfigError(f"mesh.fsdp x mesh.tensor is {config.fsdp} x {config.tensor} = {inner}; wanted a "
                              f"divisor of the {len(devices)} devices")
        data = len(devices) // inner
    else:
        data = config.data
    if data * inner > len(devices):
        raise ConfigError(f"mesh.data x mesh.fsdp x mesh.tensor is {data} x {config.fsdp} x {config.tensor} = "
                          f"{data * inner} devices; this run has {len(devices)} ({devices[0].platform})")
    chosen = devices[: data * inner]
    return jax.make_mesh((data, config.fsdp, config.tensor), AXES, axis_types=(AxisType.Auto,) * 3, devices=chosen)


def path_name(path: Sequence[Any]) -> str:
    """`vision/blocks/mlp/up/kernel` for a key path of `jax.tree_util`."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def named_leaves(tree: Any) -> Iterator[tuple[str, Any]]:
    """The leaves of `tree` with their paths as `path_name` writes them."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield path_name(path), leaf


def layer_stack(name: str) -> str | None:
    """Return the path of the stack of layers that holds the parameter `name`, such as `text/encoder/blocks`; or None.

    The parameters of a stack have the layer as their first axis.
    """
    stack, found, _ = f"/{name}".partition("/blocks/")
    return f"{stack}/blocks".lstrip("/") if found else None


def _wanted(name: str, shape: Sequence[int]) -> list[str | None]:
    """The axis that the rules give each dimension."""
    trailing = next(entry for pattern, entry in RULES if re.search(pattern, name))
    if len(trailing) > len(shape):  # a placeholder of the optimizer's
        return [None] * len(shape)
    return [None] * (len(shape) - len(trailing)) + list(trailing)


def spec(name: str, shape: Sequence[int], axes: dict[str, int]) -> PartitionSpec:
    """The `PartitionSpec` of an array called `name`, on mesh axes of the sizes `axes`.

    A dimension that its axis does not divide is replicated (see `unsharded_dims`).
    """
    entries = [None if axis is None or axes[axis] == 1 or size % axes[axis] else axis
               for axis, size in zip(_wanted(name, shape), shape, strict=True)]
    while entries and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries)


def unsharded_dims(tree: Any, mesh: Mesh) -> list[str]:
    """What is replicated in `tree` although a rule would cut it, a line for each dimension."""
    return [f"{name}: dimension {i} of {tuple(leaf.shape)} is not divisible by {axis} = {mesh.shape[axis]} and is "
            "replicated"
            for name, leaf in named_leaves(tree) for i, axis in enumerate(_wanted(name, leaf.shape))
            if axis is not None and leaf.shape[i] % mesh.shape[axis]]


def shardings(tree: Any, mesh: Mesh) -> Any:
    """A `NamedSharding` for every array (or `ShapeDtypeStruct`) of `tree`, by the rules."""
    def place(path, leaf):
        return NamedSharding(mesh, spec(path_name(path), leaf.shape, dict(mesh.shape)))
    return jax.tree_util.tree_map_with_path(place, tree)


def with_shardings(tree: Any, mesh: Mesh) -> Any:
    """The shapes of `tree` with the shardings that the rules give them."""
    return jax.tree.map(lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), tree,
                        shardings(tree, mesh))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading axis over every device that holds its own examples."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts a batch is cut."""
    return math.prod(mesh.shape[axis] for axis in BATCH)


def host_share(mesh: Mesh | None) -> tuple[int, int]:
    """(h, H): of the H equal runs of rows that a batch is cut into, one a host, the h-th lies on this host's devices.

    Raises `ConfigError` where hosts have unequal shares or share rows.
    """
    if mesh is None or {device.process_index for device in mesh.devices.flat} == {jax.process_index()}:
        return 0, 1
    shards, hosts = batch_shards(mesh), jax.process_count()
    rows: dict[int, set[int]] = {host: set() for host in range(hosts)}
    for device, (where,) in batch_sharding(mesh).devices_indices_map((shards,)).items():
        rows[device.process_index].add(where.indices(shards)[0])
    require(shards % hosts == 0 and all(len(each) == shards // hosts for each in rows.values())
            and sum(map(len, rows.values())) == shards, "mesh.data x mesh.fsdp", shards,
            f"a multiple of the {hosts} hosts over all devices, so that each host reads its own share of the batch")
    return sorted(rows, key=lambda host: min(rows[host])).index(jax.process_index()), hosts


def place_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This host's rows of a batch, as global arrays on the mesh."""
    where = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(where, rows) for name, rows in batch.items()}


def put_global(value: np.ndarray, where: NamedSharding) -> jax.Array:
    """An array that every host holds, laid out over the devices of all; nothing is sent between hosts."""
    return jax.make_array_from_callback(value.shape, where, lambda index: value[index])


def _alone() -> bool:
    """Whether the current mesh is one device, or there is none."""
    return math.prod(axis_sizes().values()) == 1


def _constrain(x: jax.Array, where: PartitionSpec) -> jax.Array:
    if _alone():
        return x
    return jax.lax.with_sharding_constraint(x, where)


def constrain_batch(x: jax.Array) -> jax.Array:
    """Holds the leading axis of `x` to the batch's axes and the rest replicated. Outside a mesh, `x` itself."""
    return _constrain(x, PartitionSpec(BATCH))


def constrain_replicated(x: jax.Array) -> jax.Array:
    """Holds all of `x` on every device. Outside a mesh, `x` itself."""
    return _constrain(x, PartitionSpec())


def axis_sizes() -> dict[str, int]:
    """Devices along each of AXES in the current mesh; 1 outside of one."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or "data" not in mesh.axis_names or any(t != AxisType.Auto for t in mesh.axis_types):
        return dict.fromkeys(AXES, 1)
    return dict(mesh.shape)


def platform() -> Literal["cpu", "gpu", "tpu"]:
    """What is traced now is for: the current mesh's devices, present or not; outside of one, this machine's."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        return jax.default_backend()
    return "tpu" if device.device_kind.startswith("TPU") else "cpu" if device.device_kind == "cpu" else "gpu"


def all_gather_params(x: jax.Array, name: str) -> jax.Array:
    """A parameter called `name`, put together from the shares of `fsdp` before it is used; so is its gradient, before
    it is cut. Where a mesh has no axis `data`, XLA would multiply by each share as it comes around instead."""
    axes = axis_sizes()
    alone = axes["fsdp"] > 1 and axes["data"] == 1
    return _constrain(x, spec(name, x.shape, axes | {"fsdp": 1})) if alone else x


def divides_mesh(batch: int, heads: int) -> bool:
    """Whether so many pictures and heads give every device of the current mesh as much."""
    return batch % batch_devices() == 0 and heads % axis_sizes()["tensor"] == 0


def on_each_device(run: Callable, in_specs: Any, out_specs: Any) -> Callable:
    """`run` on every device's own share; itself on one device and outside a mesh."""
    return run if _alone() else jax.shard_map(run, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def batch_devices() -> int:
    """Into how many parts a batch is cut in the current mesh."""
    sizes = axis_sizes()
    return math.prod(sizes[axis] for axis in BATCH)
