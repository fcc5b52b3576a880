"""Sharding: the mesh, one ordered table of rules for parameters, and the batch.

Models never mention a mesh. Parameters, optimizer moments and copies of parameters match by the end of their path, so
one table serves the full state. Specs are aligned to the trailing dimensions, which leaves a leading layer axis free.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxmm.config import MeshConfig
from jaxmm.validation import ConfigError, require

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")
TOKENS = PartitionSpec(BATCH, None, "tensor")
"""Spec of queries, keys and values [b t h ...]."""

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
    """Make a mesh of `data` x `fsdp` x `tensor` over `devices` (default: all devices of the run).

    Raises `ConfigError` if there are too few devices, or if they do not divide.
    """
    devices = list(jax.devices() if devices is None else devices)
    inner = config.fsdp * config.tensor
    if config.data == -1:
        if len(devices) % inner or not len(devices) // inner:
            raise ConfigError(f"mesh.fsdp x mesh.tensor is {config.fsdp} x {config.tensor} = {inner}; expected a "
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
    """Return a key path of `jax.tree_util` as text, such as `vision/blocks/mlp/up/kernel`."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def named_leaves(tree: Any) -> Iterator[tuple[str, Any]]:
    """Yield the leaves of `tree` with their paths as `path_name` writes them."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield path_name(path), leaf


def layer_stack(name: str) -> str | None:
    """Return the path of the stack of layers that holds the parameter `name`, such as `text/encoder/blocks`; or None.

    The parameters of a stack have the layer as their first axis.
    """
    stack, separator, _ = f"/{name}".partition("/blocks/")
    return f"{stack}/blocks".lstrip("/") if separator else None


def _axes_by_rule(name: str, shape: Sequence[int]) -> list[str | None]:
    """Return the axis of each dimension by the rules."""
    trailing = next(entry for pattern, entry in RULES if re.search(pattern, name))
    if len(trailing) > len(shape):  # a placeholder of the optimizer's
        return [None] * len(shape)
    return [None] * (len(shape) - len(trailing)) + list(trailing)


def spec(name: str, shape: Sequence[int], axes: dict[str, int]) -> PartitionSpec:
    """Return the `PartitionSpec` of an array called `name`, on mesh axes of the sizes `axes`.

    A dimension that its axis does not divide is replicated (see `unsharded_dims`).
    """
    entries = [None if axis is None or axes[axis] == 1 or size % axes[axis] else axis
               for axis, size in zip(_axes_by_rule(name, shape), shape, strict=True)]
    while entries and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries)


def unsharded_dims(tree: Any, mesh: Mesh) -> list[str]:
    """List the dimensions of `tree` that a rule shards but that do not divide, one message per dimension."""
    return [f"{name}: dimension {i} of {tuple(leaf.shape)} is not divisible by {axis} = {mesh.shape[axis]} and is "
            "replicated"
            for name, leaf in named_leaves(tree) for i, axis in enumerate(_axes_by_rule(name, leaf.shape))
            if axis is not None and leaf.shape[i] % mesh.shape[axis]]


def shardings(tree: Any, mesh: Mesh) -> Any:
    """Return the `NamedSharding` of every array (or `ShapeDtypeStruct`) of `tree` by the rules."""
    def place(path, leaf):
        return NamedSharding(mesh, spec(path_name(path), leaf.shape, dict(mesh.shape)))
    return jax.tree_util.tree_map_with_path(place, tree)


def with_shardings(tree: Any, mesh: Mesh) -> Any:
    """Return the shapes of `tree` with their shardings by the rules."""
    return jax.tree.map(lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree,
                        shardings(tree, mesh))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of a batch: the leading axis over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding with a full copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_shards(mesh: Mesh | None = None) -> int:
    """Return the number of shards of a batch on `mesh` (None: the current one)."""
    sizes = axis_sizes() if mesh is None else mesh.shape
    return math.prod(sizes[axis] for axis in BATCH)


def host_share(mesh: Mesh | None) -> tuple[int, int]:
    """Return (h, H): this host's devices have the h-th of the H equal runs of rows of a batch, one run per host.

    Raises `ConfigError` if hosts have unequal shares or share rows.
    """
    if mesh is None or {device.process_index for device in mesh.devices.flat} == {jax.process_index()}:
        return 0, 1
    shards, hosts = batch_shards(mesh), jax.process_count()
    rows: dict[int, set[int]] = {host: set() for host in range(hosts)}
    for device, (index,) in batch_sharding(mesh).devices_indices_map((shards,)).items():
        rows[device.process_index].add(index.indices(shards)[0])
    require(shards % hosts == 0 and all(len(part) == shards // hosts for part in rows.values())
            and sum(map(len, rows.values())) == shards, "mesh.data x mesh.fsdp", shards,
            f"a multiple of the {hosts} hosts over all devices, so that each host reads its own share of the batch")
    return sorted(rows, key=lambda host: min(rows[host])).index(jax.process_index()), hosts


def place_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Put this host's rows of a batch on the mesh, as global arrays."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}


def put_global(value: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Shard an array that every host has over the devices of all hosts, without communication."""
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def _alone() -> bool:
    """Return True if the current mesh has one device, or there is no mesh."""
    return math.prod(axis_sizes().values()) == 1


def _constrain(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    return x if _alone() else jax.lax.with_sharding_constraint(x, spec)


def constrain_batch(x: jax.Array) -> jax.Array:
    """Constrain the leading axis of `x` to the batch's axes and replicate the rest; outside a mesh return `x`."""
    return _constrain(x, PartitionSpec(BATCH))


def constrain_replicated(x: jax.Array) -> jax.Array:
    """Replicate `x` on every device; outside a mesh return `x`."""
    return _constrain(x, PartitionSpec())


def axis_sizes() -> dict[str, int]:
    """Return the number of devices along each axis of the current mesh; 1 outside a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or "data" not in mesh.axis_names or any(t != AxisType.Auto for t in mesh.axis_types):
        return dict.fromkeys(AXES, 1)
    return dict(mesh.shape)


def platform() -> Literal["cpu", "gpu", "tpu"]:
    """Return the platform being compiled for: the mesh's devices, present or not, else the default backend."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        return jax.default_backend()
    return "tpu" if device.device_kind.startswith("TPU") else "cpu" if device.device_kind == "cpu" else "gpu"


def all_gather_params(x: jax.Array, name: str) -> jax.Array:
    """All-gather the FSDP-sharded parameter `name` before use; its gradient is summed before it is sharded again.

    Only needed if `data` is 1: XLA would otherwise run a collective matmul over the shards.
    """
    axes = axis_sizes()
    needed = axes["fsdp"] > 1 and axes["data"] == 1
    return _constrain(x, spec(name, x.shape, axes | {"fsdp": 1})) if needed else x


def divides_mesh(batch: int, heads: int) -> bool:
    """Return whether `batch` images and `heads` divide equally among the devices of the current mesh."""
    return batch % batch_shards() == 0 and heads % axis_sizes()["tensor"] == 0


def on_each_device(run: Callable, in_specs: Any, out_specs: Any) -> Callable:
    """Map `run` over the shards of every device; on one device and outside a mesh return `run`."""
    return run if _alone() else jax.shard_map(run, in_specs=in_specs, out_specs=out_specs, check_vma=False)
