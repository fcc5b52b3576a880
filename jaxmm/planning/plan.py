"""One recipe compiled for one topology: what it needs and whether that is there."""

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
from jaxmm.config import ConfigError, TrainConfig
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

READING = "2"
"""Changes when what is read from a compiled program does."""
UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a step of a recipe takes on a topology. Bytes and cycles are of one chip, FLOPs of all."""

    topology: str
    chips: int
    mesh: dict[str, int]
    batch_size: int
    microbatches: int
    fits: bool
    parameters: int
    flops: float
    """Of a step, what is computed again included."""
    model_flops: float
    """The same without that."""
    hbm_bytes: int
    """That a program has on a chip."""
    peak_bytes: int
    """That the program has at once, at most: arguments, what it computes and results, less what is updated in place;
    where it does not fit, what the compiler asks for."""
    argument_bytes: int | None
    """State and batch; these and the next three are None where it did not compile."""
    temporary_bytes: int | None
    output_bytes: int | None
    aliased_bytes: int | None
    """Of the results, what is written where arguments were."""
    code_bytes: int | None
    collectives: tuple[Collective, ...] = ()
    estimated_cycles: int | None = None
    """XLA's estimate of everything but exchanges, loops counted, and the instructions that it scheduled for kernels;
    None where it does not tell."""
    kernel_cycles: int = 0
    """Of them, those of kernels."""
    estimated_step_seconds: float | None = None
    """`estimated_cycles` at the chip's clock, nothing waiting for an exchange."""
    estimated_utilization: float | None = None
    """`model_flops` over what the chips could do in that time."""
    exchange_seconds: float | None = None
    """What all exchanges would take one after the other at the speed of two links, if nothing hid them."""
    replicated: tuple[str, ...] = ()
    """What did not divide, in words."""
    assumed: tuple[str, ...] = ()
    """What only the data would know, in words."""
    approximate: bool = False
    """Whether XLA's CPU compiler answered in the place of the chip's."""
    compile_seconds: float = 0.0

    @property
    def missing_bytes(self) -> int:
        """On each chip, 0 where it fits."""
        return max(0, self.peak_bytes - self.hbm_bytes)

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return dataclasses.asdict(self) | {"missing_bytes": self.missing_bytes}


@dataclass(frozen=True)
class Traced:
    """A recipe's train step and its arguments' shapes, laid out on a topology."""

    config: TrainConfig
    topology: Topology
    task: Task
    mesh: jax.sharding.Mesh
    optimizer: Any
    state: Any
    batch: dict[str, jax.ShapeDtypeStruct]
    key: jax.ShapeDtypeStruct
    assumed: tuple[str, ...]

    def step(self) -> Any:
        """The step as a run would compile it, traced by JAX."""
        step = compile_step(self.task, self.optimizer, self.mesh, self.state, microbatches=self.config.microbatches,
                            skip_nonfinite=self.config.nonfinite == "skip")
        with jax.set_mesh(self.mesh):
            return step.trace(self.state, self.batch, self.key)


def trace(config: TrainConfig, topology: Topology) -> Traced:
    """`config` on `topology`, nothing compiled yet. Raises `ConfigError` where a run would."""
    mesh = make_mesh(config.mesh, topology.devices)
    check_parts(config, mesh)
    bound = bind(config)
    params = jax.eval_shape(bound.task.init, jax.random.key(0))
    optimizer = make_optimizer(config.optimizer, params, config.steps, bound.task.bounds)
    state = with_shardings(abstract_state(bound.task, optimizer), mesh)
    key = jax.eval_shape(lambda: jax.random.key(0))
    return Traced(config, topology, bound.task, mesh, optimizer, state, batch_shapes(bound.task, config.data, mesh),
                  jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=replicated(mesh)), bound.assumed)


def make_plan(config: TrainConfig, topology: Topology, cache: Path | None = None) -> Plan:
    """Compiles the train step of `config` for `topology` and reads what the compiler says. Minutes for large models.

    What the compiler said of a program is kept in the folder `cache` and not asked again. Raises `ConfigError` where
    the recipe cannot run there at all, whatever the memory.
    """
    traced = trace(config, topology)
    step = traced.step()
    with jax.set_mesh(traced.mesh):
        lowered, flops = step.lower(), count_jaxpr(step.jaxpr)
    file = None if cache is None else cache / _file(lowered, topology)
    common: dict[str, Any] = {
        "topology": topology.name, "chips": len(topology.devices), "mesh": dict(traced.mesh.shape),
        "batch_size": config.data.batch_size, "microbatches": config.microbatches,
        "parameters": sum(leaf.size for _, leaf in named_leaves(traced.state.params)), "flops": flops.all,
        "model_flops": flops.model, "hbm_bytes": topology.chip.hbm_bytes, "assumed": traced.assumed,
        "replicated": tuple(unsharded_dims(traced.state, traced.mesh)), "approximate": topology.approximate}
    told = _remembered(file) or _compile(lowered, topology, dict(traced.mesh.shape), file)
    collectives = tuple(Collective(**each | {"axes": tuple(each["axes"])}) for each in told.pop("collectives"))
    cycles = told.pop("cycles")
    if cycles is not None:
        common |= times(topology, cycles + told["kernel_cycles"], flops, collectives, traced.mesh.shape)
    return Plan(**common, **told,
                fits=told["peak_bytes"] <= topology.chip.hbm_bytes, collectives=collectives)


def _compile(lowered: Any, topology: Topology, mesh: dict[str, int], file: Path | None) -> dict[str, Any]:
    """What the compiler says, as plain values; kept in `file`."""
    cache = None if file is None else file.parent
    begun, kept = time.monotonic(), jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)      # without the chips it could not be read again
    try:
        compiled, needed = lowered.compile(), None
    except jax.errors.JaxRuntimeError as error:
        needed = bytes_asked_for(str(error))
        if needed is None:
            raise ConfigError(f"{topology.name} does not compile this recipe: {str(error)[:2000]}") from error
        told = {"peak_bytes": needed, "collectives": [], "kernel_cycles": 0} | dict.fromkeys(
            ("cycles", "argument_bytes", "temporary_bytes", "output_bytes", "aliased_bytes", "code_bytes"))
    finally:
        jax.config.update("jax_enable_compilation_cache", kept)
    if needed is None:
        memory, program = compiled.memory_analysis(), Program(compiled.as_text())
        told = {"argument_bytes": memory.argument_size_in_bytes, "temporary_bytes": memory.temp_size_in_bytes,
                "output_bytes": memory.output_size_in_bytes, "aliased_bytes": memory.alias_size_in_bytes,
                "code_bytes": memory.generated_code_size_in_bytes}
        scheduled = [(times, kernels.cycles(each, topology.kind, cache)) for each, times in program.kernels.items()]
        known = all(each is not None for _, each in scheduled)
        told |= {"peak_bytes": sum(told.values()) - 2 * told["aliased_bytes"],
                 "cycles": program.cycles if known else None,
                 "kernel_cycles": sum(times * each for times, each in scheduled) if known else 0,
                 "collectives": [dataclasses.asdict(each) for each in program.collectives(mesh)]}
    told["compile_seconds"] = time.monotonic() - begun
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(told))
    return told


def _remembered(file: Path | None) -> dict[str, Any] | None:
    """What was written there about this very program."""
    with contextlib.suppress(OSError, ValueError):
        return None if file is None else json.loads(file.read_text())


def _file(lowered: Any, topology: Topology) -> str:
    """Named after the program, who it is for, and what compiles it. A kernel's code holds paths of this machine: its
    source stands for it."""
    compiler = "libtpu" if not topology.approximate else "jaxlib"
    program = re.sub(r'backend_config = "[^"]*"', "", lowered.as_text())
    source = Path(tpu_attention.__file__).read_text()
    parts = program, source, topology.name, importlib.metadata.version(compiler), READING
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32] + ".json"


def times(topology: Topology, cycles: int, flops: Flops, collectives: tuple[Collective, ...], mesh: Any
          ) -> dict[str, Any]:
    """What XLA's cycles mean in seconds and in use of the chips; nothing where it counts none."""
    chip = topology.chip
    if chip.clock_hz is None or chip.link_bytes is None or not cycles:
        return {}
    seconds = cycles / chip.clock_hz
    exchanged = sum(each.sent_bytes(mesh) for each in collectives) / (2 * chip.link_bytes)
    return {"estimated_cycles": cycles, "estimated_step_seconds": seconds, "exchange_seconds": exchanged,
            "estimated_utilization": flops.model / (seconds * chip.peak_flops * len(topology.devices))}


def bytes_asked_for(message: str) -> int | None:
    """What a compiler that ran out of memory wanted, from its message; None where that is not what happened."""
    if "RESOURCE_EXHAUSTED" not in message and "out of memory" not in message.lower():
        return None
    for form in (r"Used ([\d.]+)([KMGT]?) of", r"temporaries \(([\d.]+)([KMGT]?)\)", r"allocat\w+ ([\d.]+)([KMGT]?)"):
        if used := re.search(form, message):
            return round(float(used[1]) * UNITS[used[2]])
    return None


def sharding_lines(traced: Traced) -> list[tuple[str, str, str, str]]:
    """(path, shape, spec, shape on a chip) of every array of the state and the batch."""
    return [(f"{part}/{name}", str(tuple(leaf.shape)), str(tuple(leaf.sharding.spec)),
             str(tuple(leaf.sharding.shard_shape(leaf.shape))))
            for part, tree in (("state", traced.state), ("batch", traced.batch)) for name, leaf in named_leaves(tree)
            if hasattr(leaf.sharding, "spec")]
