"""Chips to plan for, and devices for the compiler that need no hardware."""

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
    """A kind of accelerator, with its vendor's figures."""

    hbm_bytes: int
    """Memory that a program can use."""
    peak_flops: float
    """bf16 operations per second."""
    clock_hz: float | None = None
    """Clock at which the matrix units reach `peak_flops`; None: no compiler here counts cycles for this chip."""
    link_bytes: float | None = None
    """Bytes per second and direction of one link to a neighbour."""
    max_chips: int = 1
    """Chips of the largest slice."""
    options: tuple[tuple[str, str], ...] = ()
    """Options of `topologies.get_topology_desc`."""


CHIPS: dict[str, Chip] = {
    "v4": Chip(hbm_bytes=int(30.75 * GIB), peak_flops=275e12, clock_hz=1.05e9, link_bytes=50e9, max_chips=4096,
               options=(("chip_config_name", "megacore"),)),
    "v5e": Chip(hbm_bytes=int(15.75 * GIB), peak_flops=197e12, clock_hz=1.5e9, link_bytes=50e9, max_chips=256),
    "v5p": Chip(hbm_bytes=int(95.74 * GIB), peak_flops=459e12, clock_hz=1.75e9, link_bytes=100e9, max_chips=8960),
    "v6e": Chip(hbm_bytes=int(31.25 * GIB), peak_flops=918e12, clock_hz=1.75e9, link_bytes=112e9, max_chips=256),
    "a100": Chip(hbm_bytes=40 * 10**9, peak_flops=312e12, max_chips=1024),
    "a100-80": Chip(hbm_bytes=80 * 10**9, peak_flops=312e12, max_chips=1024),
    "h100": Chip(hbm_bytes=80 * 10**9, peak_flops=989e12, max_chips=1024),
    "h200": Chip(hbm_bytes=141 * 10**9, peak_flops=989e12, max_chips=1024),
}
"""Google's and NVIDIA's published figures; for TPUs the memory that the compiler grants a program."""


@dataclass(frozen=True)
class Topology:
    """A target topology: chips of one kind, and how they are wired."""

    name: str
    kind: str
    chip: Chip
    devices: tuple[jax.Device, ...]
    """The compiler's TPU devices; for GPUs as many CPU devices."""

    @property
    def approximate(self) -> bool:
        """True if XLA's CPU compiler replaces the chip's own."""
        return self.chip.clock_hz is None


def open_topology(name: str) -> Topology:
    """Open the topology `KIND:AxB` or `KIND:AxBxC` of TPUs (v5e:16x16, v5p:4x4x8), or `KIND:N` of GPUs (h100:8).

    TPUs need libtpu, but no TPU. Call it before JAX initialises its devices: it restricts JAX to the CPU. Raises
    `ConfigError`.
    """
    form = f"KIND:SHAPE, a KIND of {', '.join(CHIPS)}, such as v5e:16x16, v5p:4x4x8 or h100:8"
    parts = re.fullmatch(r"([\w-]+):(\d+(?:x\d+)*)", name)
    require(parts is not None and parts[1] in CHIPS, "topology", name, form)
    kind, chip, shape = parts[1], CHIPS[parts[1]], [int(size) for size in parts[2].split("x")]
    count = math.prod(shape)
    require(0 < count <= chip.max_chips, "topology", name, f"1 to {chip.max_chips:,} chips of {kind}, not {count:,}")
    if chip.clock_hz is None:
        return Topology(name, kind, chip, _cpu_devices(count))
    require(len(shape) == (2 if kind in ("v5e", "v6e") else 3), "topology", name,
            f"a shape in {'two' if kind in ('v5e', 'v6e') else 'three'} dimensions for {kind}")
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(f"topology is {name!r}, whose compiler is not installed: pip install 'jaxmm[tpu]' "
                          "(no TPU is needed)")
    jax.config.update("jax_platforms", "cpu")
    for variable, value in (("TPU_SKIP_MDS_QUERY", "1"), ("TPU_ACCELERATOR_TYPE", "v5litepod-16"),
                            ("TPU_WORKER_HOSTNAMES", "localhost"), ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")):
        os.environ.setdefault(variable, value)      # otherwise libtpu asks the network and logs it
    try:
        description = topologies.get_topology_desc(platform="tpu", topology_name=name, **dict(chip.options))
    except Exception as error:      # JaxRuntimeError, NotImplementedError
        raise ConfigError(f"topology is {name!r}, which libtpu does not know: {str(error).splitlines()[0]}") from None
    return Topology(name, kind, chip, tuple(description.devices))


def _cpu_devices(count: int) -> tuple[jax.Device, ...]:
    """Return CPU devices that replace GPUs."""
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:      # the devices are initialised already
        pass
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise ConfigError(f"topology has {count} chips, but JAX is already initialised with {len(devices)} devices; "
                          "expected to be the first to use JAX")
    return tuple(devices[:count])
