"""`jaxmm plan`: the memory, collectives and estimated speed of a recipe on a target topology."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from jaxmm.cli.parsing import with_recipe
from jaxmm.config import TrainConfig
from jaxmm.planning import pareto
from jaxmm.planning.chips import Topology, open_topology
from jaxmm.planning.pareto import Trial
from jaxmm.planning.plan import Plan, make_plan, sharding_lines, trace
from jaxmm.terminal import print_json, print_table
from jaxmm.user_cache import cache_folder


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Options of the command that are not part of the recipe."""

    config: Path
    """The recipe: the name of one of jaxmm's own, or a Python file with `get_config()`. Its fields are options too."""
    topology: str = "v5e:16x16"
    """Target topology: v4:AxBxC, v5e:AxB, v5p:AxBxC, v6e:AxB; or GPUs h100:N, h200:N, a100:N, which XLA's CPU compiler
    stands in for: memory and FLOPs are then an approximation."""
    search: bool = False
    """Compile meshes, `remat` policies, microbatches and batch sizes, and print the Pareto-optimal ones (estimated
    images/s against memory)."""
    batch_sizes: tuple[int, ...] = ()
    """Batch sizes to search. Default: the recipe's."""
    fsdp: tuple[int, ...] = ()
    """FSDP shards to search. Default: 1, 4, 16, 64 and all chips."""
    remats: tuple[str, ...] = ()
    """Remat policies to search. Default: none, cheap and full."""
    parts: tuple[int, ...] = ()
    """Numbers of microbatches to search. Default: 1 and 4."""
    suggestions: Annotated[bool, tyro.conf.arg(aliases=("--remedies",))] = True
    """Look for changes that fit, if the recipe does not."""
    shardings: bool = False
    """Print the sharding of every array of the state and the batch, and compile nothing."""
    json: bool = False
    """Print one JSON object instead of tables; for a search, one line per recipe."""


@with_recipe(PlanOptions, TrainConfig)
def plan(options: PlanOptions, config: TrainConfig) -> int:
    """Compile a recipe's train step for a target topology: does it fit, how fast is it.

    Reports the memory, the collectives and the compiler's estimate of a step's time. No such chip is needed. The exit
    status is 3 if the recipe does not fit.
    """
    topology = open_topology(options.topology)
    if options.shardings:
        rows = sharding_lines(trace(config, topology))
        if options.json:
            for row in rows:
                print_json(dict(zip(("path", "shape", "spec", "on_a_chip"), row, strict=True)))
        else:
            print_table(("array", "shape", "spec", "on a chip"), rows)
        return 0

    if options.search:
        return _search(options, config, topology)
    made = planned(config, topology)
    if options.json:
        print_json(made.to_json())
    else:
        show(made)
    if not made.fits and options.suggestions:
        _suggest(options, config, topology)
    return 0 if made.fits else 3


def planned(config: TrainConfig, topology: Topology) -> Plan:
    """Make a plan, with the user's cache of the compiler's reports."""
    return make_plan(config, topology, cache_folder() / "plans")


def _search(options: PlanOptions, config: TrainConfig, topology: Topology) -> int:
    configs = pareto.candidates(config, topology, batch_sizes=options.batch_sizes, fsdp=options.fsdp,
                                remats=options.remats, microbatches=options.parts)
    results = list(_compiled(options, config, configs, topology))
    front = pareto.pareto(results)
    fitting = sum(result.plan.fits for result in results)
    if not options.json:
        print_plans(f"{topology.name}: {fitting} of {len(results)} fit; Pareto-optimal are", front)
        if front:
            print(f"\nthe fastest: python run_train.py --config {options.config} {front[0].flags}".rstrip())
    return 0 if fitting else 3


def _suggest(options: PlanOptions, config: TrainConfig, topology: Topology) -> None:
    changes = pareto.suggestions(config, len(topology.devices))
    if not options.json:
        print(f"looking for changes that fit, of {len(changes)}", file=sys.stderr)
    fitting = pareto.first_fitting(_compiled(options, config, changes, topology))
    if not options.json:
        print_plans("these fit, each compiled" if fitting else "none of the changes fits", fitting)


def _compiled(
    options: PlanOptions, config: TrainConfig, variants: list[TrainConfig], topology: Topology
) -> Iterator[Trial]:
    """Compile variants of a recipe, with a progress bar, and print each plan as JSON if asked to."""
    trials = pareto.compile_variants(config, variants, topology, planned)
    for trial in tqdm(trials, total=len(variants), unit=" recipes", desc="compiling", file=sys.stderr,
                      dynamic_ncols=True):
        if options.json:
            print_json(trial.plan.to_json() | {"flags": trial.flags})
        yield trial


def gib(size: float | None) -> str:
    """Format a size in bytes as GiB."""
    return "" if size is None else f"{size / 2**30:,.2f} GiB"


def show(made: Plan) -> None:
    """Print a plan as text and tables."""
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    mesh = " x ".join(f"{name} {size}" for name, size in made.mesh.items() if size > 1) or "one device"
    parts = f", in {made.microbatches} microbatches" if made.microbatches > 1 else ""
    console.print(f"{made.topology}: {made.chips:,} chips, {mesh}; {made.batch_size:,} images per step{parts}")
    verdict = "fits" if made.fits else f"DOES NOT FIT: {gib(made.missing_bytes)} per chip are missing"
    console.print(f"{verdict} ({gib(made.peak_bytes)} of {gib(made.hbm_bytes)} per chip)")
    table = Table("", "", show_header=False)
    table.add_row("parameters", f"{made.parameters:,}")
    recomputed = f", {made.flops / made.model_flops - 1:.0%} of it recomputed" if made.flops > made.model_flops else ""
    table.add_row("FLOPs per step", f"{made.flops:.3e}{recomputed}")
    for name, size in (("arguments: state and batch", made.argument_bytes), ("temporaries", made.temporary_bytes),
                       ("results", made.output_bytes), ("results that replace arguments", made.aliased_bytes),
                       ("program", made.code_bytes)):
        if size is not None:
            table.add_row(f"{name}, per chip", gib(size))
    if made.estimated_step_seconds is not None:
        table.add_row("XLA's estimate of the step", f"{made.estimated_step_seconds * 1e3:,.0f} ms, "
                      f"{made.batch_size / made.estimated_step_seconds:,.0f} images/s, "
                      f"{made.estimated_utilization:.0%} of the chips' peak")
        if made.kernel_cycles:
            table.add_row("of it attention kernels", f"{made.kernel_cycles / made.estimated_cycles:.0%}")
        table.add_row("collectives, if nothing hides them", f"{made.exchange_seconds * 1e3:,.0f} ms")
    table.add_row("compiled in", f"{made.compile_seconds:.0f} s")
    console.print(table)
    if made.collectives:
        print_table(("collective", "axes", "per step", "bytes"), (
            (row.kind, " x ".join(row.axes), f"{row.count:,}", gib(row.bytes)) for row in made.collectives))
    for note in made.replicated:
        console.print(f"note: {note}")
    for note in made.assumed:
        console.print(f"assumed: {note}")
    if made.approximate:
        console.print("approximate: XLA's CPU compiler replaces that of GPUs, which fuses and schedules differently")
    elif made.estimated_step_seconds is not None:
        console.print("The estimate is the compiler's count of cycles, including loops; no chip has run it.")


def print_plans(title: str, results: Sequence[Trial]) -> None:
    """Print a table of changes to the recipe and what each needs."""
    print(title)
    print_table(("options", "per chip", "XLA's estimate", "images/s", "of peak"), (
        (row.flags or "(the recipe as it is)", gib(row.plan.peak_bytes),
         f"{row.plan.estimated_step_seconds * 1e3:,.0f} ms" if row.plan.estimated_step_seconds else "",
         f"{row.images_per_second:,.0f}" if row.images_per_second else "",
         f"{row.plan.estimated_utilization:.0%}" if row.plan.estimated_utilization else "") for row in results))
