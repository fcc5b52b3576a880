"""Chips to plan for, and devices that stand for them without being there."""

import importlib.util
import math
import os
import re
from dataclasses import dataclass

import jax
from jax.experimental import topologies

from jaxmm.validation import ConfigError, require

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Chip:
    """A kind of accelerator, by its maker's figures."""

    hbm_bytes: int
    """That a program can use."""
    peak_flops: float
    """bf16 operations a second."""
    clock_hz: float | None = None
    """By which `peak_flops` is what the matrix units do a cycle; None: no compiler here counts cycles for it."""
    link_bytes: float | None = None
    """A second and direction of one link to a neighbour."""
    most: int = 1
    """Chips of the largest slice."""
    options: tuple[tuple[str, str], ...] = ()
    """Of `topologies.get_topology_desc`."""


CHIPS: dict[str, Chip] = {
    "v4": Chip(hbm_bytes=int(30.75 * GIB), peak_flops=275e12, clock_hz=1.05e9, link_bytes=50e9, most=4096,
               options=(("chip_config_name", "megacore"),)),
    "v5e": Chip(hbm_bytes=int(15.75 * GIB), peak_flops=197e12, clock_hz=1.5e9, link_bytes=50e9, most=256),
    "v5p": Chip(hbm_bytes=int(95.74 * GIB), peak_flops=459e12, clock_hz=1.75e9, link_bytes=100e9, most=8960),
    "v6e": Chip(hbm_bytes=int(31.25 * GIB), peak_flops=918e12, clock_hz=1.75e9, link_bytes=112e9, most=256),
    "a100": Chip(hbm_bytes=40 * 10**9, peak_flops=312e12, most=1024),
    "a100-80": Chip(hbm_bytes=80 * 10**9, peak_flops=312e12, most=1024),
    "h100": Chip(hbm_bytes=80 * 10**9, peak_flops=989e12, most=1024),
    "h200": Chip(hbm_bytes=141 * 10**9, peak_flops=989e12, most=1024),
}
"""Google's and NVIDIA's published figures; of TPUs the memory that their compiler grants a program."""


@dataclass(frozen=True)
class Topology:
    """Chips of one kind, and how they are wired."""

    name: str
    kind: str
    chip: Chip
    devices: tuple[jax.Device, ...]
    """For TPUs their compiler's own; for GPUs as many CPU devices."""

    @property
    def approximate(self) -> bool:
        """Whether another compiler than the chip's own answers."""
        return self.chip.clock_hz is None


def open_topology(name: str) -> Topology:
    """The topology `KIND:AxB` or `KIND:AxBxC` of TPUs (v5e:16x16, v5p:4x4x8), or `KIND:N` of GPUs (h100:8).

    TPUs need libtpu, but no TPU. To be called before JAX has touched a device: it is told to have CPU only. Raises
    `ConfigError`.
    """
    form = f"KIND:SHAPE, a KIND of {', '.join(CHIPS)}, such as v5e:16x16, v5p:4x4x8 or h100:8"
    found = re.fullmatch(r"([\w-]+):(\d+(?:x\d+)*)", name)
    require(found is not None and found[1] in CHIPS, "topology", name, form)
    kind, chip, shape = found[1], CHIPS[found[1]], [int(size) for size in found[2].split("x")]
    count = math.prod(shape)
    require(0 < count <= chip.most, "topology", name, f"1 to {chip.most:,} chips of {kind}, not {count:,}")
    if chip.clock_hz is None:
        return Topology(name, kind, chip, _cpus(count))
    require(len(shape) == (2 if kind in ("v5e", "v6e") else 3), "topology", name,
            f"a shape in {'two' if kind in ('v5e', 'v6e') else 'three'} dimensions for {kind}")
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(f"topology is {name!r}, whose compiler is not installed: pip install 'jaxmm[tpu]' "
                          "(no TPU is needed)")
    jax.config.update("jax_platforms", "cpu")
    for variable, value in (("TPU_SKIP_MDS_QUERY", "1"), ("TPU_ACCELERATOR_TYPE", "v5litepod-16"),
                            ("TPU_WORKER_HOSTNAMES", "localhost"), ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")):
        os.environ.setdefault(variable, value)      # else libtpu asks the network where it is, and says so
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **dict(chip.options))
    except Exception as error:      # JaxRuntimeError, NotImplementedError
        raise ConfigError(f"topology is {name!r}, which libtpu does not know: {str(error).splitlines()[0]}") from None
    return Topology(name, kind, chip, tuple(found.devices))


def _cpus(count: int) -> tuple[jax.Device, ...]:
    """CPU devices in the place of others."""
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:      # devices have been touched
        pass
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise ConfigError(f"topology has {count} chips, but this process has begun with {len(devices)} devices; "
                          "wanted to be the first that uses JAX")
    return tuple(devices[:count])
