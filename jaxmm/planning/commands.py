"""The command `jaxmm plan`: a recipe and a topology, and what the compiler says of the two."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from jaxmm.compiling import cache_folder
from jaxmm.config import TrainConfig
from jaxmm.planning import pareto as searching
from jaxmm.planning.chips import open_topology
from jaxmm.planning.pareto import Found, Planner
from jaxmm.planning.plan import Plan, make_plan, sharding_lines, trace
from jaxmm.recipes import parse_recipe
from jaxmm.terminal import print_json, print_table


@dataclass(frozen=True, kw_only=True)
class Planning:
    """Compiles a recipe's train step for chips that need not be there: does it fit, what does it exchange, how long
    does the compiler think it takes? Any field of the recipe can be set besides."""

    config: Path
    """The recipe: a Python file with `get_config()`. Its fields are the options below."""
    topology: str = "v5e:16x16"
    """Chips and how they are wired: v4:AxBxC, v5e:AxB, v5p:AxBxC, v6e:AxB; or of GPUs h100:N, h200:N, a100:N, for which
    XLA's CPU compiler answers: memory and FLOPs are then an approximation."""
    search: bool = False
    """Compile meshes, `remat` policies, microbatches and batch sizes, and print those that no other beats both in
    estimated pictures a second and in memory."""
    batch_sizes: tuple[int, ...] = ()
    """For the search; if not said, the recipe's."""
    fsdp: tuple[int, ...] = ()
    """For the search: shares of the parameters; if not said, 1, 4, 16, 64 and all chips."""
    remats: tuple[str, ...] = ()
    """For the search; if not said, none, cheap and full."""
    parts: tuple[int, ...] = ()
    """For the search: microbatches; if not said, 1 and 4."""
    remedies: bool = True
    """Where the recipe does not fit: look for changes that do."""
    shardings: bool = False
    """Print where every array of the state and the batch lies, and compile nothing."""
    json: bool = False
    """One JSON object instead of tables; of a search, a line for each recipe."""


@dataclass(frozen=True, kw_only=True)
class Command(Planning):
    """The whole command line."""

    train: Annotated[TrainConfig, tyro.conf.arg(name="")]


def plan(args: Sequence[str]) -> int:
    """Runs the command; its exit status: 0 where the recipe fits (or the search found one that does), else 3."""
    command = parse_recipe(Command, args, prog="jaxmm plan", description=Planning.__doc__)
    topology = open_topology(command.topology)
    if command.shardings:
        rows = sharding_lines(trace(command.train, topology))
        if command.json:
            for row in rows:
                print_json(dict(zip(("path", "shape", "spec", "on_a_chip"), row, strict=True)))
        else:
            print_table(("array", "shape", "spec", "on a chip"), rows)
        return 0

    def planned(config, topology):
        return make_plan(config, topology, cache_folder() / "plans")

    if command.search:
        return _search(command, topology, planned)
    made = planned(command.train, topology)
    if command.json:
        print_json(made.to_json())
    else:
        show(made)
    if not made.fits and command.remedies:
        _repair(command, topology, planned)
    return 0 if made.fits else 3


def _search(command: Command, topology, planned: Planner) -> int:
    configs = searching.candidates(command.train, topology, batch_sizes=command.batch_sizes, fsdp=command.fsdp,
                                   remats=command.remats, microbatches=command.parts)
    with tqdm(total=len(configs), unit=" recipes", desc="compiling", file=sys.stderr, dynamic_ncols=True) as bar:
        def tell(found: Found) -> None:
            bar.update()
            if command.json:
                print_json(found.plan.to_json() | {"flags": found.flags})
        found = searching.search(command.train, configs, topology, planned, tell)
    front = searching.pareto(found)
    if not command.json:
        print_found(f"{topology.name}: {sum(each.plan.fits for each in found)} of {len(found)} fit; not beaten are",
                    front)
        if front:
            print(f"\nthe fastest: python run_train.py --config {command.config} {front[0].flags}".rstrip())
    return 0 if any(each.plan.fits for each in found) else 3


def _repair(command: Command, topology, planned: Planner) -> None:
    options = searching.remedies(command.train, topology)
    if not command.json:
        print(f"looking for changes that fit, of {len(options)}", file=sys.stderr)
    with tqdm(total=len(options), unit=" recipes", desc="compiling", file=sys.stderr, dynamic_ncols=True) as bar:
        def tell(found: Found) -> None:
            bar.update()
            if command.json:
                print_json(found.plan.to_json() | {"flags": found.flags})
        found = searching.repair(command.train, topology, planned, on_plan=tell)
    if not command.json:
        print_found("what would fit, each compiled" if found else "none of what was tried fits", found)


def gib(size: float | None) -> str:
    """GiB."""
    return "" if size is None else f"{size / 2**30:,.2f} GiB"


def show(made: Plan) -> None:
    """A plan for people."""
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    mesh = " x ".join(f"{name} {size}" for name, size in made.mesh.items() if size > 1) or "one device"
    parts = f", in {made.microbatches} microbatches" if made.microbatches > 1 else ""
    console.print(f"{made.topology}: {made.chips:,} chips, {mesh}; {made.batch_size:,} pictures a step{parts}")
    verdict = "fits" if made.fits else f"DOES NOT FIT: {gib(made.missing_bytes)} a chip are missing"
    console.print(f"{verdict} ({gib(made.peak_bytes)} of {gib(made.hbm_bytes)} a chip)")
    table = Table("", "", show_header=False)
    table.add_row("parameters", f"{made.parameters:,}")
    again = f", {made.flops / made.model_flops - 1:.0%} of it computed again" if made.flops > made.model_flops else ""
    table.add_row("FLOPs of a step", f"{made.flops:.3e}{again}")
    for name, size in (("arguments: state and batch", made.argument_bytes), ("temporaries", made.temporary_bytes),
                       ("results", made.output_bytes), ("of them in the arguments' place", made.aliased_bytes),
                       ("program", made.code_bytes)):
        if size is not None:
            table.add_row(f"{name}, a chip", gib(size))
    if made.estimated_step_seconds is not None:
        table.add_row("XLA's estimate of a step", f"{made.estimated_step_seconds * 1e3:,.0f} ms, "
                      f"{made.batch_size / made.estimated_step_seconds:,.0f} pictures/s, "
                      f"{made.estimated_utilization:.0%} of the chips' peak")
        if made.kernel_cycles:
            table.add_row("of it kernels, by their schedule", f"{made.kernel_cycles / made.estimated_cycles:.0%}")
        table.add_row("exchanges, if nothing hid them", f"{made.exchange_seconds * 1e3:,.0f} ms")
    table.add_row("compiled in", f"{made.compile_seconds:.0f} s")
    console.print(table)
    if made.collectives:
        print_table(("exchange", "along", "times a step", "of"), (
            (each.kind, " x ".join(each.axes), f"{each.count:,}", gib(each.bytes)) for each in made.collectives))
    for note in made.replicated:
        console.print(f"note: {note}")
    for note in made.assumed:
        console.print(f"assumed: {note}")
    if made.approximate:
        console.print("approximate: XLA's CPU compiler answered, which fuses and schedules otherwise than that of GPUs")
    elif made.estimated_step_seconds is not None:
        console.print("The estimate is the compiler's count of cycles, loops included; no chip has run it.")


def print_found(title: str, found: Sequence[Found]) -> None:
    """A table of recipes and what they need."""
    print(title)
    print_table(("options", "a chip", "XLA's estimate", "pictures/s", "of peak"), (
        (each.flags or "(the recipe as it is)", gib(each.plan.peak_bytes),
         f"{each.plan.estimated_step_seconds * 1e3:,.0f} ms" if each.plan.estimated_step_seconds else "",
         f"{each.pictures_per_second:,.0f}" if each.pictures_per_second else "",
         f"{each.plan.estimated_utilization:.0%}" if each.plan.estimated_utilization else "") for each in found))
