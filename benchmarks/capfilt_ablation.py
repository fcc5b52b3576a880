"""The effect of each part of CapFilt on generated scenes with known truth: the arms of the paper's Tables 1, 2 and 4.

    python -m benchmarks.capfilt_ablation [--quick] [--seeds 3] [--only none,both] [--captions 5] [--out DIR]
                                          [--json FILE]

The data of `configs/capfilt_scenes.py`: 4,000 images with web texts, 40 % of them correct, and 2,000 images with
human captions. For each seed a BLIP is pre-trained on all of it (`none`), and a captioner and a filter are fine-tuned
from it on the 2,000. Every other arm trains a new BLIP from scratch, with the same steps, batches and learning rates:

    filter     web texts that the filter keeps
    captions   web texts and one synthetic caption per image, unfiltered
    both       web texts and synthetic captions that the filter keeps: CapFilt
    beam       like `both`, captions by beam search with 3 beams instead of nucleus sampling
    shared     like `both`, with one model as captioner and filter, fine-tuned for as long as the captioner

On held-out images: 100-way recall@1 by cosine and after ITM re-ranking, captions that name the largest object, and
captions that are true. On the texts: the share that the filter drops (the paper's noise ratio), its precision and
recall against the known noise of the web texts, and the share of correct texts among synthetic captions and among
training texts.

`--captions` is the number of captions of each human image per step from which captioner and filter learn; web images
have one text. Results stay in DIR; rerun the command to continue. `--quick` is one seed, `none` and `both`, and two
fifths of all steps: under 15 minutes on two cores, in which a captioner learns little and a filter drops nine of ten
texts.
"""

import argparse
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.measure import machine
from jaxmm.atomic import write_atomically
from jaxmm.capfilt.bootstrap import CapFiltConfig, Runs, on
from jaxmm.capfilt.merge import merge, merged_source
from jaxmm.capfilt.selection import Rule
from jaxmm.capfilt.stages import SELECTED, Folder, begin, select, write_captions, write_scores
from jaxmm.capfilt.synthetic_captions import CaptionOptions
from jaxmm.compiling import use_compilation_cache
from jaxmm.config import InitConfig, TrainConfig
from jaxmm.data.scenes import plain, scene_of, true_captions
from jaxmm.inference.generate import Decoding
from jaxmm.recipes import load_recipe
from jaxmm.training.runtime import keep_memory
from jaxmm.validation import count_steps

RECIPE = Path(__file__).parents[1] / "configs" / "capfilt_scenes.py"
METRICS = {"i2t_recall@1": "picture to text", "t2i_recall@1": "text to picture",
           "i2t_itm_recall@1": "matched again", "caption_largest": "largest named", "caption_true": "caption right"}
TRUTHS = {"dropped": "dropped", "precision": "precision", "recall": "recall", "synthetic": "synthetic right",
          "trained": "trained on right"}


@dataclass(frozen=True)
class Arm:
    """A rule for the texts that a model is trained on."""

    rule: Rule
    decoding: Decoding | None = None
    """Decoding of captions; None: the recipe's."""
    shared: bool = False


ARMS = {"none": None, "filter": Arm(Rule(origins=("web",))), "captions": Arm(Rule(threshold=None)), "both": Arm(Rule()),
        "beam": Arm(Rule(), decoding=Decoding(beams=3, max_length=32)), "shared": Arm(Rule(), shared=True)}
QUICK = ("none", "both")


def recipe(quick: bool, captions: int | None = None) -> CapFiltConfig:
    """Return the recipe, which all seeds share; captioner and filter learn from `captions` texts per image and step."""
    config = load_recipe(RECIPE)
    if captions is not None:
        config = replace(config, **{name: replace(run, data=replace(run.data, captions=captions)) for name, run in (
            ("captioner", config.captioner), ("filter", config.filter))})
    if not quick:
        return config
    runs = {name: getattr(config, name) for name in ("pretrain", "captioner", "filter")}
    return replace(config, **{name: shortened(run) for name, run in runs.items()})


def shortened(run: TrainConfig) -> TrainConfig:
    """Return two fifths of a run; its warm-up and ramp are as long as before."""
    warmup = count_steps(run.optimizer.warmup, run.steps)
    return replace(run, steps=run.steps * 2 // 5, task=run.task.with_steps(run.steps),
                   optimizer=replace(run.optimizer, warmup=warmup))


def seed_results(config: CapFiltConfig, seed: int, out: Path, arms: list[str]) -> dict[str, Any]:
    """Train all arms with one seed; return the metrics of their models and texts."""
    runs = Runs(out)

    def trained(name: str, run: TrainConfig, source: str, *, init: bool = False) -> None:
        start = InitConfig(source=str(out / "none")) if init else run.init
        if not runs.run(name, replace(on(run, source), seed=seed, init=start), print):
            sys.exit("stopped; rerun the same command to continue")

    trained("none", config.pretrain, f"{config.web} + {config.human_weight}*{config.human}")
    joint = replace(config.pretrain, steps=config.captioner.steps, optimizer=replace(
        config.filter.optimizer, learning_rate=config.captioner.optimizer.learning_rate))
    for name in arms:
        arm = ARMS[name]
        if arm is None or f"model-{name}" in runs.metrics:
            continue
        roles = {"shared": joint} if arm.shared else {"captioner": config.captioner, "filter": config.filter}
        for role, run in roles.items():
            trained(role, run, config.human, init=True)
        texts = "shared-texts" if arm.shared else "texts" if arm.decoding is None else "beam-texts"
        folder = begin(out / texts, config.web, config.human)
        options = CaptionOptions(decoding=arm.decoding or config.decoding, seed=seed)
        write_captions(folder, [str(out / min(roles))], options)
        write_scores(folder, str(out / max(roles)))
        select(folder, arm.rule)
        runs.note(f"{name}-texts", truths(folder, arm.rule))
        trained(f"model-{name}", config.pretrain, merged_source(merge(folder), config.human_weight))
    results = {}
    for name in arms:
        model = runs.metrics["none" if name == "none" else f"model-{name}"]
        results[name] = {"model": {key.removeprefix("val/"): value for key, value in model.items()},
                         "texts": runs.metrics.get(f"{name}-texts", {})}
    return results


def truths(folder: Folder, rule: Rule) -> dict[str, float]:
    """Return the shares of correct texts of the web images, by the known truth; NaN if there is nothing to count.

    `dropped` counts the texts whose origins `rule` filters.
    """
    rows = []
    for shard, texts in zip(folder.shards, folder.tables(SELECTED), strict=True):
        if shard.origin != "web":
            continue
        true: dict[int, frozenset[str]] = {}
        for record, text, origin, kept in zip(*(texts.columns[name] for name in ("record", "text", "origin", "kept")),
                                              strict=True):
            if record not in true:
                true[record] = true_captions(scene_of(shard.source[record]))
            rows.append((origin == "web", origin in rule.origins, kept, plain(text) in true[record]))
    web, asked, kept, right = np.array(rows, bool).T
    return {"texts": int(asked.sum()), "kept": int(kept.sum()), "dropped": share(~kept[asked]),
            "precision": share(~right[web & ~kept]), "recall": share(~kept[web & ~right]),
            "synthetic": share(right[~web]), "synthetic_kept": share(right[~web & kept]), "trained": share(right[kept])}


def share(values: np.ndarray) -> float:
    """Return the share of True values; NaN for an empty array."""
    return float(values.mean()) if len(values) else float("nan")


def summary(values: list[float]) -> tuple[float, float]:
    """Return mean and standard deviation over seeds; the latter is NaN for one seed."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")


def format_summary(values: list[float]) -> str:
    """Format mean and standard deviation."""
    mean, deviation = summary(values)
    return "" if np.isnan(mean) else f"{mean:.3f}" + ("" if np.isnan(deviation) else f" ± {deviation:.3f}")


def print_results(results: dict[str, dict[str, list[float]]], seeds: int, title: str) -> None:
    """Print a table of the metrics of models and texts, and the difference between `both` and `none`."""
    table = Table(title=title)
    for column in ("", *METRICS.values(), *TRUTHS.values()):
        table.add_column(column)
    for name, values in results.items():
        table.add_row(name, *(format_summary(values[key]) if key in values else "" for key in (*METRICS, *TRUTHS)))
    console = Console(width=170, highlight=False)
    console.print(table)
    for metric, label in METRICS.items() if {"none", "both"} <= set(results) and seeds > 1 else ():
        (more, a), (less, b) = (summary(results[name][metric]) for name in ("both", "none"))
        error = float(np.sqrt((a**2 + b**2) / seeds))
        console.print(f"{label}: both - none = {more - less:+.3f}, {(more - less) / error:+.1f} standard errors")


def main() -> None:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--only", help="arms, separated by commas")
    parser.add_argument("--captions", type=int, help="captions per human image and step; default: the recipe's")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--json", metavar="FILE", type=Path)
    args = parser.parse_args()
    seeds = args.seeds or (1 if args.quick else 3)
    arms = args.only.split(",") if args.only else list(QUICK if args.quick else ARMS)
    if unknown := set(arms) - set(ARMS):
        parser.error(f"--only has {', '.join(sorted(unknown))}; expected some of {', '.join(ARMS)}")
    out = args.out or Path("runs") / ("capfilt-quick" if args.quick else "capfilt-benchmark")
    keep_memory()
    use_compilation_cache()
    config = recipe(args.quick, args.captions)
    seed_rows = [seed_results(config, seed, out / f"seed-{seed}", arms) for seed in range(seeds)]
    results = {name: {key: [row[name][part][key] for row in seed_rows] for part in ("model", "texts")
                      for key in seed_rows[0][name][part]} for name in arms}
    print_results(results, seeds, f"CapFilt on scenes, {config.pretrain.steps:,} steps, {seeds} seeds")
    if args.json:
        write_atomically(args.json, json.dumps([{
            "arm": name, "seeds": seeds, "steps": config.pretrain.steps, "quick": args.quick,
            "captions": config.captioner.data.captions, **values,
            "machine": machine()} for name, values in results.items()], indent=1) + "\n")


if __name__ == "__main__":
    main()
