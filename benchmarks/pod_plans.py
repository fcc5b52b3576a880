"""Plans of the recipes of published size on TPU pods: `benchmarks/results/pod_plans.md`.

    python -m benchmarks.pod_plans [--only NAME,...] [--headers] [--out benchmarks/results/pod_plans.md]

No TPU is needed, only libtpu (`pip install 'jaxmm[tpu]'`). Every row compiles the real train step, one to five minutes
on two cores and eleven for BLIP; the compiler's reports are cached, so an interrupted command continues if you rerun
it. With `--only` the lines of other recipes stay as they are.

The pairs per chip are the same from 16 chips to 256 (weak scaling), so memory should be, too. BLIP draws hard negatives
from the pairs of a chip, as the paper's pre-training does from those of a GPU. `--headers` writes the plan of each
recipe of published size on its target topology into the recipe's header.
"""

import argparse
import importlib.metadata
import re
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from jaxmm.atomic import write_atomically
from jaxmm.cli.plan import gib, planned
from jaxmm.config import TrainConfig
from jaxmm.planning.chips import open_topology
from jaxmm.planning.pareto import with_remat
from jaxmm.planning.plan import Plan
from jaxmm.recipes import load_recipe
from jaxmm.tasks.blip_pretraining import BLIPPretraining

CONFIGS = Path(__file__).parents[1] / "configs"
TOPOLOGIES = ("v5e:4x4", "v5e:8x8", "v5e:16x16", "v5p:4x4x8")
SHARES = {"clip_b16": 128, "clip_l14": 128, "siglip_so400m": 128, "blip_b16_pretrain": 45, "blip_l16_pretrain": 25}
"""Pairs per chip."""
TARGETS = {
    "blip_b16_pretrain": "v5e:4x8", "blip_l16_pretrain": "v5e:4x8", "blip_captions": "v5e:4x4",
    "blip_coco_caption": "v5e:4x4", "blip_coco_retrieval": "v5e:4x8", "blip_flickr_retrieval": "v5e:4x8",
    "blip_nlvr2": "v5e:4x8", "blip_vqav2": "v5e:4x8", "clip_b16": "v5e:16x16", "clip_b32": "v5e:16x16",
    "clip_l14": "v5e:16x16", "igpt_l_imagenet32": "v5e:4x8", "igpt_s_imagenet32": "v5e:2x4", "lit_b16": "v5e:8x8",
    "siglip_b16": "v5e:16x16", "siglip_so400m": "v5e:16x16", "vit_b16_imagenet": "v5e:8x8",
    "vit_s16_imagenet": "v5e:2x4"}
"""Target topology of each recipe of published size."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    note: str
    config: TrainConfig
    topology: str


def rows(only: set[str]) -> list[Row]:
    """Return the rows of the table."""
    result = []
    for name, share in SHARES.items():
        config = load_recipe(CONFIGS / f"{name}.py")
        pretraining = isinstance(config.task, BLIPPretraining)
        if pretraining:
            config = replace(config, task=replace(config.task, negatives=share))
        for topology in TOPOLOGIES:
            size = share * len(open_topology(topology).devices)
            if not pretraining or size <= config.task.queue:
                result.append(Row(name, f"{share} per chip", replace(config, data=replace(
                    config.data, batch_size=size)), topology))
    million = with_remat(load_recipe(CONFIGS / "siglip_b16.py"), "cheap")
    million = replace(million, task=replace(million.task, tile=1024), microbatches=32,
                      data=replace(million.data, batch_size=2**20))
    note = "one million pairs, 32 microbatches, remat cheap, blockwise loss"
    result.append(Row("siglip_b16", note, million, "v5e:16x16"))
    return [row for row in result if not only or row.name in only]


def line(row: Row, made: Plan) -> str:
    """Format a row in Markdown."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in made.mesh.items() if size > 1)
    collectives = "; ".join(f"{row.kind} {row.bytes / 2**30:.2f} ({' x '.join(row.axes)})"
                            for row in made.collectives[:3])
    fits = "yes" if made.fits else f"no, {gib(made.missing_bytes)} short"
    estimate = "" if made.estimated_step_seconds is None else (
        f"{made.estimated_step_seconds * 1e3:,.0f} ms, {made.estimated_utilization:.0%}")
    return (f"| {row.name} | {row.note} | {made.topology} | {mesh} | {made.batch_size:,} | {fits} | "
            f"{made.peak_bytes / 2**30:.2f} | {estimate} | {collectives} |")


def scaling(name: str, plans: list[Plan]) -> list[str]:
    """Compare the memory per chip on 16 and 256 chips in one line, if both were planned."""
    peaks = {made.chips: made.peak_bytes for made in plans if made.topology.startswith("v5e") and made.fits}
    if not {16, 256} <= set(peaks):
        return []
    return [f"- {name}: {peaks[16] / 2**30:.2f} GiB per chip on 16, {peaks[256] / 2**30:.2f} on 256 "
            f"({peaks[256] / peaks[16] - 1:+.1%})"]


def write_header(name: str, topology: str) -> None:
    """Write the plan into the recipe's docstring and replace an older one."""
    path = CONFIGS / f"{name}.py"
    made = planned(load_recipe(path), open_topology(topology))
    estimate = "" if made.estimated_step_seconds is None else (
        f", {made.batch_size / made.estimated_step_seconds:,.0f} images/s and {made.estimated_utilization:.0%} of "
        f"peak by XLA's estimate (libtpu {importlib.metadata.version('libtpu')})")
    fits = f"fits in {gib(made.peak_bytes)}" if made.fits else f"does not fit: {gib(made.peak_bytes)}"
    text = f"Plan on {topology} ({made.chips} chips): {fits} of {gib(made.hbm_bytes)} per chip{estimate}."
    words, lines = text.split(), [""]
    for word in words:
        if len(lines[-1]) + len(word) > 118:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    source = re.sub(r'\n\nPlan on [^"]*?\n"""', '\n"""', path.read_text(), count=1)
    head, _, rest = source.partition('\n"""\n')
    write_atomically(path, f"{head}\n\n" + "\n".join(lines) + f'\n"""\n{rest}')


def main() -> None:
    """Compile and write the table or the headers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="recipes, separated by commas")
    parser.add_argument("--headers", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "pod_plans.md")
    args = parser.parse_args()
    only = set(filter(None, args.only.split(",")))
    if args.headers:
        for name, topology in tqdm(TARGETS.items(), unit=" recipes"):
            if not only or name in only:
                write_header(name, topology)
        return
    before = args.out.read_text().splitlines() if only and args.out.exists() else []
    table, growth = [], []
    plans = [(row, planned(row.config, open_topology(row.topology))) for row in tqdm(rows(only), unit=" plans")]
    for name in (*SHARES, "siglip_b16"):
        mine = [(row, made) for row, made in plans if row.name == name]
        table += [line(row, made) for row, made in mine] or [old for old in before if old.startswith(f"| {name} |")]
        growth += scaling(name, [made for _, made in mine]) if mine else [
            old for old in before if old.startswith(f"- {name}: ")]
    text = [
        "# Plans", "",
        "Made by `python -m benchmarks.pod_plans`: each line is the real train step, compiled ahead of time by libtpu.",
        "GiB is the peak memory per chip: arguments, temporaries, the program, and results minus those that replace",
        "arguments. The estimate is XLA's count of cycles, including loops, plus the scheduled instructions of the",
        "attention kernels, at the chip's clock: time of a step, and utilization without recomputation. It leaves out",
        "waiting for collectives, and no chip has run it. Collectives: GiB per step and chip, the three largest.", "",
        "| recipe | pairs | topology | mesh | batch | fits | GiB | estimate | collectives |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |", *table, "",
        "Memory per chip at the same number of pairs per chip:", "", *growth, ""]
    write_atomically(args.out, "\n".join(text))
    print("\n".join(text))


if __name__ == "__main__":
    main()
