"""The share of synthetic captions in contrastive training: Recap-DataComp's mixing rate p (Li et al. 2024) on scenes.

    python -m benchmarks.caption_mixing [--shares 0,0.5,0.8,1] [--seeds 3] [--captions 5] [--out DIR]
                                        [--json FILE]

For each seed, the models of `configs/capfilt_scenes.py` are a BLIP pre-trained on web texts and human captions, and a
captioner fine-tuned from it, which captions the 4,000 images of the web split. Nothing is filtered. The CLIP of
`configs/clip_scenes.py` then trains on these images from scratch, once per share p: a synthetic caption is drawn with
probability p at every step, the web's text otherwise (`data.origins`). `--captions` is the number of captions of each
human image per step from which the captioner learns.

On held-out images: 100-way recall@1 in both directions, and zero-shot classification of single shapes (`shapes:test`).
Results stay in DIR; rerun the command to continue. `--texts FOLDER` takes the captions of a finished CapFilt folder,
such as `texts` of a seed of `benchmarks.capfilt_ablation`, instead of training a captioner.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.capfilt_ablation import RECIPE, format_summary, recipe
from benchmarks.measure import machine
from jaxmm.atomic import write_atomically
from jaxmm.capfilt.bootstrap import CapFiltConfig, Runs, on
from jaxmm.capfilt.merge import merge
from jaxmm.capfilt.selection import Rule
from jaxmm.capfilt.stages import begin, select, write_captions, write_scores
from jaxmm.capfilt.synthetic_captions import CaptionOptions
from jaxmm.compiling import use_compilation_cache
from jaxmm.config import InitConfig, TrainConfig
from jaxmm.evals import Retrieval, ZeroShot
from jaxmm.recipes import load_recipe
from jaxmm.training.runtime import keep_memory

EVALS = (Retrieval(pool=100, captions="first"), ZeroShot(source="shapes:test", templates=("a {}", "a picture of a {}")))
METRICS = {"i2t_recall@1": "image to text", "t2i_recall@1": "text to image", "zero_shot_top1": "zero-shot"}


def clip_recipe(share: float, source: str, steps: int | None, seed: int) -> TrainConfig:
    """Return the training of a CLIP on `source`, which draws a synthetic caption with probability `share`."""
    config = load_recipe(RECIPE.with_name("clip_scenes.py"))
    weights = tuple((name, weight) for name, weight in (("web", 1 - share), ("synthetic", share)) if weight)
    return replace(on(replace(config, data=replace(config.data, origins=weights)), source), seed=seed, evals=EVALS,
                   steps=steps or config.steps, eval_every=None)


def caption_web(config: CapFiltConfig, runs: Runs, seed: int) -> Path:
    """Train a captioner, caption the web's images, and return the data set with web texts and synthetic captions."""
    both = f"{config.web} + {config.human_weight}*{config.human}"
    trained(runs, "pretrain", replace(on(config.pretrain, both), seed=seed))
    trained(runs, "captioner", replace(on(config.captioner, config.human), seed=seed,
                                       init=InitConfig(source=str(runs.out / "pretrain"))))
    folder = begin(runs.out / "texts", config.web, None)
    write_captions(folder, [str(runs.out / "captioner")], CaptionOptions(decoding=config.decoding, seed=seed))
    write_scores(folder, str(runs.out / "pretrain"))
    select(folder, Rule(threshold=None))
    return merge(folder)


def trained(runs: Runs, name: str, config: TrainConfig) -> None:
    """Train `config` unless it is done, and end the program if it was asked to stop."""
    if not runs.run(name, config, print):
        sys.exit("stopped; rerun the same command to continue")


def seed_results(config: CapFiltConfig, shares: list[float], args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Return the metrics of each share's model."""
    runs = Runs(args.out / f"seed-{seed}")
    merged = args.texts / "merged" if args.texts else caption_web(config, runs, seed)
    results = {}
    for share in shares:
        trained(runs, f"p-{share:g}", clip_recipe(share, f"tfds:{merged}:web", args.steps, seed))
        results[f"{share:g}"] = {key.removeprefix("val/"): value for key, value in runs.metrics[f"p-{share:g}"].items()}
    return results


def print_results(results: dict[str, dict[str, list[float]]], title: str) -> None:
    """Print a row per share."""
    table = Table("synthetic", *METRICS.values(), title=title)
    for share, values in results.items():
        table.add_row(share, *(format_summary(values[key]) for key in METRICS))
    Console(width=120, highlight=False).print(table)


def main() -> None:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shares", default="0,0.5,0.8,1", help="shares of synthetic captions, separated by commas")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="steps of each CLIP; default: the recipe's")
    parser.add_argument("--captions", type=int, help="captions per human image and step; default: the recipe's")
    parser.add_argument("--texts", type=Path, help="a finished CapFilt folder, for all seeds")
    parser.add_argument("--out", type=Path, default=Path("runs/caption-mixing"))
    parser.add_argument("--json", metavar="FILE", type=Path)
    args = parser.parse_args()
    try:
        shares = [float(share) for share in args.shares.split(",")]
    except ValueError:
        shares = []
    if not shares or not all(0 <= share <= 1 for share in shares):
        parser.error(f"--shares is {args.shares}; expected numbers from 0 to 1, separated by commas")
    keep_memory()
    use_compilation_cache()
    config = recipe(False, args.captions)
    rows = [seed_results(config, shares, args, seed) for seed in range(args.seeds)]
    results = {share: {key: [row[share][key] for row in rows] for key in rows[0][share]} for share in rows[0]}
    steps = clip_recipe(1.0, config.web, args.steps, 0).steps
    print_results(results, f"{steps:,} steps, {args.seeds} seeds")
    if args.json:
        write_atomically(args.json, json.dumps([{
            "share": float(share), "seeds": args.seeds, "steps": steps, "metrics": values, "machine": machine()}
            for share, values in results.items()], indent=1) + "\n")


if __name__ == "__main__":
    main()
