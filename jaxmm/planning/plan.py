"""Compile one recipe for one target topology: what it needs and whether it fits."""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from jaxmm.atomic import write_atomically
from jaxmm.config import TrainConfig
from jaxmm.nn import tpu_attention
from jaxmm.planning import kernels
from jaxmm.planning.chips import Topology
from jaxmm.planning.flops import Flops, count_jaxpr
from jaxmm.planning.hlo import Collective, Program
from jaxmm.planning.shapes import batch_shapes, bind
from jaxmm.sharding import make_mesh, named_leaves, replicated, unsharded_dims, with_shardings
from jaxmm.task import Task
from jaxmm.training.accumulate import check_parts
from jaxmm.training.optimizer import make_optimizer
from jaxmm.training.state import abstract_state
from jaxmm.training.step import compile_step
from jaxmm.validation import ConfigError

CACHE_VERSION = "2"
"""Version of the cached reports: increase it if something else is read from a compiled program."""
UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Resources of a recipe's train step on a topology. Bytes and cycles are per chip, FLOPs over all chips."""

    topology: str
    chips: int
    mesh: dict[str, int]
    batch_size: int
    microbatches: int
    fits: bool
    parameters: int
    flops: float
    """FLOPs of a step, including recomputation."""
    model_flops: float
    """FLOPs of a step without recomputation."""
    hbm_bytes: int
    """Usable HBM per chip."""
    peak_bytes: int
    """Peak bytes per chip: arguments, temporaries, program and results, minus what is updated in place; if it does not
    fit, what the compiler requests."""
    argument_bytes: int | None
    """Bytes of state and batch; this and the next four are None if it does not compile."""
    temporary_bytes: int | None
    output_bytes: int | None
    aliased_bytes: int | None
    """Bytes of results that replace arguments."""
    code_bytes: int | None
    collectives: tuple[Collective, ...] = ()
    estimated_cycles: int | None = None
    """XLA's estimate of everything except collectives, including every iteration of loops and the instructions
    scheduled for kernels; None if unknown."""
    kernel_cycles: int = 0
    """Cycles of custom kernels among `estimated_cycles`."""
    estimated_step_seconds: float | None = None
    """`estimated_cycles` at the chip's clock, without waiting for collectives."""
    estimated_utilization: float | None = None
    """`model_flops` over the chips' peak FLOPs in that time."""
    exchange_seconds: float | None = None
    """Time of all collectives one after the other at the speed of two links, if nothing hides them."""
    replicated: tuple[str, ...] = ()
    """Messages about dimensions that do not divide."""
    assumed: tuple[str, ...] = ()
    """Messages about assumptions, for what only the data can say."""
    approximate: bool = False
    """True if XLA's CPU compiler replaced the chip's own."""
    compile_seconds: float = 0.0

    @property
    def missing_bytes(self) -> int:
        """Missing bytes per chip; 0 if it fits."""
        return max(0, self.peak_bytes - self.hbm_bytes)

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return dataclasses.asdict(self) | {"missing_bytes": self.missing_bytes}


@dataclass(frozen=True)
class TracedStep:
    """A recipe's train step and the sharded shapes of its arguments on a topology."""

    config: TrainConfig
    task: Task
    mesh: jax.sharding.Mesh
    optimizer: Any
    state: Any
    batch: dict[str, jax.ShapeDtypeStruct]
    key: jax.ShapeDtypeStruct
    assumed: tuple[str, ...]

    def step(self) -> Any:
        """Trace the step exactly as a run compiles it."""
        step = compile_step(self.task, self.optimizer, self.mesh, self.state, microbatches=self.config.microbatches,
                            skip_nonfinite=self.config.nonfinite == "skip")
        with jax.set_mesh(self.mesh):
            return step.trace(self.state, self.batch, self.key)


def trace(config: TrainConfig, topology: Topology) -> TracedStep:
    """Trace `config` on `topology` without compiling. Raises `ConfigError` if a run would."""
    mesh = make_mesh(config.mesh, topology.devices)
    check_parts(config, mesh)
    task, assumed = bind(config)
    params = jax.eval_shape(task.init, jax.random.key(0))
    optimizer = make_optimizer(config.optimizer, params, config.steps, task.clamps)
    state = with_shardings(abstract_state(task, optimizer), mesh)
    key = jax.eval_shape(lambda: jax.random.key(0))
    return TracedStep(config, task, mesh, optimizer, state, batch_shapes(task, config.data, mesh),
                      jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=replicated(mesh)), assumed)


def make_plan(config: TrainConfig, topology: Topology, cache: Path | None = None) -> Plan:
    """Compile the train step of `config` for `topology` and read the compiler's report. Takes minutes for large models.

    Reports are stored in the folder `cache` and reused. Raises `ConfigError` if the recipe cannot run there at all,
    however much memory there is.
    """
    traced = trace(config, topology)
    step = traced.step()
    with jax.set_mesh(traced.mesh):
        lowered, flops = step.lower(), count_jaxpr(step.jaxpr)
    file = None if cache is None else cache / _cache_name(lowered, topology)
    common: dict[str, Any] = {
        "topology": topology.name, "chips": len(topology.devices), "mesh": dict(traced.mesh.shape),
        "batch_size": config.data.batch_size, "microbatches": config.microbatches,
        "parameters": sum(leaf.size for _, leaf in named_leaves(traced.state.params)), "flops": flops.all,
        "model_flops": flops.model, "hbm_bytes": topology.chip.hbm_bytes, "assumed": traced.assumed,
        "replicated": tuple(unsharded_dims(traced.state, traced.mesh)), "approximate": topology.approximate}
    report = _read_cached(file) or compiler_report(lowered, topology, dict(traced.mesh.shape), file)
    collectives = tuple(Collective(**row | {"axes": tuple(row["axes"])}) for row in report.pop("collectives"))
    cycles = report.pop("cycles")
    if cycles is not None:
        common |= time_estimates(topology, cycles + report["kernel_cycles"], flops, collectives, traced.mesh.shape)
    return Plan(**common, **report,
                fits=report["peak_bytes"] <= topology.chip.hbm_bytes, collectives=collectives)


def compiler_report(lowered: Any, topology: Topology, mesh: dict[str, int], file: Path | None) -> dict[str, Any]:
    """Compile and return the compiler's figures as plain values; store them in `file`."""
    cache = None if file is None else file.parent
    start, enabled = time.monotonic(), jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)      # without the chips JAX could not read it back
    try:
        compiled, requested = lowered.compile(), None
    except jax.errors.JaxRuntimeError as error:
        requested = requested_bytes(str(error))
        if requested is None:
            raise ConfigError(f"{topology.name} does not compile this recipe: {str(error)[:2000]}") from error
        report = {"peak_bytes": requested, "collectives": [], "kernel_cycles": 0} | dict.fromkeys(
            ("cycles", "argument_bytes", "temporary_bytes", "output_bytes", "aliased_bytes", "code_bytes"))
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
    if requested is None:
        memory, program = compiled.memory_analysis(), Program(compiled.as_text())
        report = {"argument_bytes": memory.argument_size_in_bytes, "temporary_bytes": memory.temp_size_in_bytes,
                  "output_bytes": memory.output_size_in_bytes, "aliased_bytes": memory.alias_size_in_bytes,
                  "code_bytes": memory.generated_code_size_in_bytes}
        scheduled = [(times, kernels.cycles(kernel, topology.kind, cache)) for kernel, times in program.kernels.items()]
        known = all(cycles is not None for _, cycles in scheduled)
        report |= {"peak_bytes": sum(report.values()) - 2 * report["aliased_bytes"],
                   "cycles": program.cycles if known else None,
                   "kernel_cycles": sum(times * cycles for times, cycles in scheduled) if known else 0,
                   "collectives": [dataclasses.asdict(row) for row in program.collectives(mesh)]}
    report["compile_seconds"] = time.monotonic() - start
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(report))
    return report


def _read_cached(file: Path | None) -> dict[str, Any] | None:
    """Read a stored report; None if there is none."""
    with contextlib.suppress(OSError, ValueError):
        return None if file is None else json.loads(file.read_text())


def _cache_name(lowered: Any, topology: Topology) -> str:
    """Return a file name that identifies the program, the topology and the compiler.

    A kernel's compiled code contains paths of this machine, so the kernel's source is hashed instead.
    """
    compiler = "libtpu" if not topology.approximate else "jaxlib"
    program = re.sub(r'backend_config = "[^"]*"', "", lowered.as_text())
    source = Path(tpu_attention.__file__).read_text()
    parts = program, source, topology.name, importlib.metadata.version(compiler), CACHE_VERSION
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32] + ".json"


def time_estimates(
    topology: Topology, cycles: int, flops: Flops, collectives: tuple[Collective, ...], mesh: Any
) -> dict[str, Any]:
    """Convert XLA's cycles to seconds and utilization; {} if there are no cycles for this chip."""
    chip = topology.chip
    if chip.clock_hz is None or chip.link_bytes is None or not cycles:
        return {}
    seconds = cycles / chip.clock_hz
    exchanged = sum(row.sent_bytes(mesh) for row in collectives) / (2 * chip.link_bytes)
    return {"estimated_cycles": cycles, "estimated_step_seconds": seconds, "exchange_seconds": exchanged,
            "estimated_utilization": flops.model / (seconds * chip.peak_flops * len(topology.devices))}


def requested_bytes(message: str) -> int | None:
    """Parse how much memory a compiler requested from its out-of-memory message; None for other messages."""
    if "RESOURCE_EXHAUSTED" not in message and "out of memory" not in message.lower():
        return None
    for form in (r"Used ([\d.]+)([KMGT]?) of", r"temporaries \(([\d.]+)([KMGT]?)\)", r"allocat\w+ ([\d.]+)([KMGT]?)"):
        if used := re.search(form, message):
            return round(float(used[1]) * UNITS[used[2]])
    return None


def sharding_lines(traced: TracedStep) -> list[tuple[str, str, str, str]]:
    """List (path, shape, spec, shape per chip) of every array of the state and the batch."""
    return [(f"{part}/{name}", str(tuple(leaf.shape)), str(tuple(leaf.sharding.spec)),
             str(tuple(leaf.sharding.shard_shape(leaf.shape))))
            for part, tree in (("state", traced.state), ("batch", traced.batch)) for name, leaf in named_leaves(tree)
            if hasattr(leaf.sharding, "spec")]
