"""What each part of CapFilt does, in a world whose truth is known: the arms of the paper's Tables 1, 2 and 4.

    python -m benchmarks.capfilt [--quick] [--seeds 3] [--only none,both] [--out DIR] [--json FILE]

`configs/capfilt_scenes.py`: 4,000 pictures with web texts, of which 40 % are right, and 2,000 that people told of. For
each seed a BLIP is pre-trained on all of it (`none`); a captioner and a filter are fine-tuned from it on the 2,000;
what they make of the web's texts trains a new BLIP from scratch, the same steps, batches and learning rates in every
arm:

    filter     the web's texts that the filter keeps
    captions   the web's texts and one synthetic caption of each picture, all of them
    both       those of both that the filter keeps: CapFilt
    beam       as `both`, captions by 3 beams in place of nucleus sampling
    shared     as `both`, one model, fine-tuned for both as long as the captioner alone, is captioner and filter

Held-out pictures: 100-way recall@1 by cosine and matched again, captions that name the largest object, captions that
say what is so. Of the texts: the share that the filter drops (the paper's noise ratio), precision and recall of that
against the known noise of the web's, how many of the synthetic captions are right, and of what was trained on.

What is done stays in DIR: the same command goes on. `--quick` is one seed, `none` and `both`, and two fifths of all
steps: under 15 minutes on two cores, in which a captioner learns little and a filter drops nine texts of ten.
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

from benchmarks.common import machine
from jaxmm.atomic import write_atomically
from jaxmm.capfilt.bootstrap import CapFiltConfig, Runs, on
from jaxmm.capfilt.merge import merge, merged_source
from jaxmm.capfilt.selection import Rule
from jaxmm.capfilt.stages import SELECTED, Folder, begin, select, write_captions, write_scores
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
    """How the texts come about that a model is trained on."""

    rule: Rule
    decoding: Decoding | None = None
    """None: as the recipe says."""
    shared: bool = False


ARMS = {"none": None, "filter": Arm(Rule(origins=("web",))), "captions": Arm(Rule(threshold=None)), "both": Arm(Rule()),
        "beam": Arm(Rule(), decoding=Decoding(beams=3, max_length=32)), "shared": Arm(Rule(), shared=True)}
QUICK = ("none", "both")


def recipe(quick: bool) -> CapFiltConfig:
    """What all seeds share."""
    config = load_recipe(RECIPE)
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
    """Of each arm what its model can do and what its texts were like."""
    runs = Runs(out)

    def trained(name: str, run: TrainConfig, source: str, *, init: bool = False) -> None:
        start = InitConfig(source=str(out / "none")) if init else run.init
        if not runs.run(name, replace(on(run, source), seed=seed, init=start), print):
            sys.exit("stopped; the same command goes on")

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
        write_captions(folder, [str(out / min(roles))], decoding=arm.decoding or config.decoding, seed=seed)
        write_scores(folder, str(out / max(roles)))
        select(folder, arm.rule)
        runs.note(f"{name}-texts", truths(folder, arm.rule))
        trained(f"model-{name}", config.pretrain, merged_source(merge(folder), config.human_weight))
    found = {}
    for name in arms:
        model = runs.metrics["none" if name == "none" else f"model-{name}"]
        found[name] = {"model": {key.removeprefix("val/"): value for key, value in model.items()},
                       "texts": runs.metrics.get(f"{name}-texts", {})}
    return found


def truths(folder: Folder, rule: Rule) -> dict[str, float]:
    """What is known of the texts of the web's pictures: shares, and NaN where there is nothing to count. Dropped is of
    the texts that `rule` was asked about."""
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
    """How many are True; NaN of none."""
    return float(values.mean()) if len(values) else float("nan")


def summary(values: list[float]) -> tuple[float, float]:
    """Mean and standard deviation over seeds, the latter NaN of one seed."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")


def told(values: list[float]) -> str:
    """Mean and standard deviation in words."""
    mean, deviation = summary(values)
    return "" if np.isnan(mean) else f"{mean:.3f}" + ("" if np.isnan(deviation) else f" ± {deviation:.3f}")


def print_results(results: dict[str, dict[str, list[float]]], seeds: int, title: str) -> None:
    """One table of what the models can do and what their texts were like; and `both` less `none`."""
    table = Table(title=title)
    for column in ("", *METRICS.values(), *TRUTHS.values()):
        table.add_column(column)
    for name, found in results.items():
        table.add_row(name, *(told(found[each]) if each in found else "" for each in (*METRICS, *TRUTHS)))
    console = Console(width=170, highlight=False)
    console.print(table)
    for metric, label in METRICS.items() if {"none", "both"} <= set(results) and seeds > 1 else ():
        (more, a), (less, b) = (summary(results[name][metric]) for name in ("both", "none"))
        error = float(np.sqrt((a**2 + b**2) / seeds))
        console.print(f"{label}: both - none = {more - less:+.3f}, {(more - less) / error:+.1f} standard errors")


def main() -> None:
    """Measures, prints, records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--only", help="arms, commas between them")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--json", metavar="FILE", type=Path)
    args = parser.parse_args()
    seeds = args.seeds or (1 if args.quick else 3)
    arms = args.only.split(",") if args.only else list(QUICK if args.quick else ARMS)
    if unknown := set(arms) - set(ARMS):
        parser.error(f"--only has {', '.join(sorted(unknown))}; wanted some of {', '.join(ARMS)}")
    out = args.out or Path("runs") / ("capfilt-quick" if args.quick else "capfilt-benchmark")
    keep_memory()
    use_compilation_cache()
    config = recipe(args.quick)
    found = [seed_results(config, seed, out / f"seed-{seed}", arms) for seed in range(seeds)]
    results = {name: {key: [each[name][part][key] for each in found] for part in ("model", "texts")
                      for key in found[0][name][part]} for name in arms}
    print_results(results, seeds, f"CapFilt on scenes, {config.pretrain.steps:,} steps, {seeds} seeds")
    if args.json:
        write_atomically(args.json, json.dumps([{
            "arm": name, "seeds": seeds, "steps": config.pretrain.steps, "quick": args.quick, **values,
            "machine": machine()} for name, values in results.items()], indent=1) + "\n")


if __name__ == "__main__":
    main()
