"""What iGPT learns in a small world: likelihood, probes by layer and along a run, both objectives, fine-tuning.

    python -m benchmarks.igpt_small [--only digits,scenes] [--out DIR] [--json FILE]

For each of the recipes `igpt_digits` and `igpt_scenes`:

    tables          held-out nats per pixel by tables of counts over the training tokens: unigram, given the previous
                    pixel, given the pixels on the left and above. 0.1 is added to every count
    random          probes by layer at random weights
    autoregressive  the recipe
    bert            the same steps with BERT's objective
    fine-tuned      both with labels, by the joint loss; and from random weights

Digits are probed and fine-tuned with their own labels, scenes with those of `shapes`, images of one shape each. Results
stay in DIR; rerun the command to continue. The Pearson correlation is that of held-out nats with the best layer's probe
over the evaluations of the autoregressive run (the paper's Figure 3).
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.measure import machine
from jaxmm.compiling import use_compilation_cache
from jaxmm.config import InitConfig, TrainConfig
from jaxmm.data.eval_pipeline import eval_batches
from jaxmm.data.sources.registry import open_source
from jaxmm.evals import EvalContext, LayerProbes, TopKAccuracy
from jaxmm.inference.model import load
from jaxmm.recipes import load_recipe
from jaxmm.tasks.generative_classification import GenerativeClassification
from jaxmm.training.loop import train
from jaxmm.training.runtime import keep_memory

CONFIGS = Path(__file__).parents[1] / "configs"
LABELLED = {"digits": ("digits:train", "digits:test"), "scenes": ("shapes:train", "shapes:val")}
"""Sources with labels, to train on and held out."""
ADDED = 0.1
"""Added to every count of a table."""


def table_losses(train_tokens: np.ndarray, val_tokens: np.ndarray, colors: int) -> dict[str, float]:
    """Return the mean negative log-likelihood of `val_tokens` [n s s] by tables counted over `train_tokens`."""
    def contexts(tokens: np.ndarray) -> dict[str, np.ndarray]:
        flat = tokens.reshape(len(tokens), -1)
        before = np.pad(flat, ((0, 0), (1, 0)), constant_values=colors)[:, :-1].reshape(tokens.shape)
        left, up = (np.pad(tokens, ((0, 0), *pad), constant_values=colors)[cut] for pad, cut in (
            (((0, 0), (1, 0)), np.s_[:, :, :-1]), (((1, 0), (0, 0)), np.s_[:, :-1])))
        return {"unigram": np.zeros_like(tokens), "previous pixel": before, "left and up": left * (colors + 1) + up}

    losses = {}
    for name, context in contexts(train_tokens).items():
        counts = np.full(((colors + 1) ** 2, colors), ADDED)
        np.add.at(counts, (context, train_tokens), 1)
        chances = counts / counts.sum(axis=1, keepdims=True)
        losses[name] = float(-np.log(chances[contexts(val_tokens)[name], val_tokens]).mean())
    return losses


def tokens_of(config: TrainConfig, task: Any, spec: str) -> np.ndarray:
    """Return the tokens [n s s] of all images of a source, as evaluation resizes them."""
    to_tokens, side = jax.jit(task.palette.to_tokens), config.data.image.size
    batches = eval_batches(open_source(spec, data_dir=config.data.data_dir), config.data, 256)
    return np.concatenate([np.asarray(to_tokens(batch["image"]))[batch["mask"]] for batch in batches]).reshape(
        -1, side, side)


def curve(workdir: Path, name: str) -> dict[int, float]:
    """Return a metric of a run by step."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row[name] for row in rows if name in row}


def probes(evaluator: LayerProbes, metrics: dict[str, float]) -> dict[str, Any]:
    """Return accuracies by layer, and those of the pixels, from the metrics of `evaluator`."""
    accuracies = {kind: [metrics[f"{evaluator.prefix}/layer_{kind}@{layer}"] for layer in evaluator.layers]
                  for kind in ("probe", "knn")}
    return accuracies | {f"pixels {kind}": metrics[f"{evaluator.prefix}/pixels_{kind}"] for kind in ("probe", "knn")}


def last(workdir: Path) -> dict[str, float]:
    """Return the metrics of a run's last evaluation."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {name: value for row in rows if row["step"] == rows[-1]["step"] for name, value in row.items()}


def measure(name: str, out: Path) -> Iterator[dict[str, Any]]:
    """Train everything for one recipe; yield the results after each part."""
    config = load_recipe(CONFIGS / f"igpt_{name}.py")
    evaluator = next(e for e in config.evals if isinstance(e, LayerProbes))
    train(config, out / "autoregressive")
    model = load(out / "autoregressive")
    result: dict[str, Any] = {"tables": table_losses(*(
        tokens_of(config, model.task, spec) for spec in (config.data.train, config.data.val)), model.config.colors)}
    metrics = last(out / "autoregressive")
    result |= {"loss": metrics["val/token_loss"], "autoregressive": probes(evaluator, metrics)}
    result["completions"] = {key.removeprefix("val/"): value for key, value in metrics.items()
                             if key.startswith("val/completion")}
    losses = curve(out / "autoregressive", "val/token_loss")
    best = {step: max(curve(out / "autoregressive", f"{evaluator.prefix}/layer_probe@{layer}")[step]
                      for layer in evaluator.layers) for step in losses}
    result["along"] = [{"step": step, "loss": losses[step], "probe": best[step]} for step in losses]
    result["correlation"] = float(np.corrcoef(list(losses.values()), list(best.values()))[0, 1])
    sources = {part: open_source(getattr(config.data, part)) for part in ("train", "val")}
    context = EvalContext(task=model.task, params=jax.jit(model.task.init)(jax.random.key(1)), data=config.data,
                          **sources)
    result["random"] = probes(evaluator, dict(evaluator.run(context)))
    yield result
    train(replace(config, task=replace(config.task, kind="bert"), evals=(evaluator,), eval_every=None), out / "bert")
    result["bert"] = probes(evaluator, last(out / "bert"))
    yield result
    labelled = replace(config.data, **dict(zip(("train", "val"), LABELLED[name], strict=True)))
    tuned = replace(config, data=labelled, steps=config.steps // 4, evals=(TopKAccuracy(),), eval_every=None,
                    optimizer=replace(config.optimizer, learning_rate=config.optimizer.learning_rate / 4))
    starts = {"autoregressive": InitConfig(source=str(out / "autoregressive")),
              "bert": InitConfig(source=str(out / "bert")), "random": InitConfig()}
    result["fine-tuned"] = {}
    for start, init in starts.items():
        task = GenerativeClassification(model=config.task.model, palette=None if init.source else model.task.palette,
                                        kind="bert" if start == "bert" else "autoregressive")
        result["fine-tuned"][start] = train(replace(tuned, task=task, init=init), out / f"tuned-{start}")["val/top1"]
    yield result


def show(name: str, result: dict[str, Any], console: Console) -> None:
    """Print the results of one recipe."""
    console.print(f"{name}: held-out nats per pixel {result['loss']:.3f}; by tables "
                  + ", ".join(f"{table} {loss:.3f}" for table, loss in result["tables"].items()))
    table = Table(title=f"{name}: held-out accuracy by layer")
    for column in ("features", "classifier", *map(str, range(len(result["random"]["probe"]))), "pixels"):
        table.add_column(column)
    for part in ("random", "autoregressive", "bert"):
        for kind in ("probe", "knn"):
            row = [*result[part][kind], result[part][f"pixels {kind}"]]
            table.add_row(part, kind, *(f"{value:.3f}" for value in row))
    console.print(table)
    console.print("along the run: " + ", ".join(f"step {row['step']}: {row['loss']:.3f} nats, best probe "
                                                f"{row['probe']:.3f}" for row in result["along"])
                  + f"; correlation {result['correlation']:.2f}")
    for key in ("fine-tuned", "completions"):
        console.print(f"{key}: " + ", ".join(f"{part} {value:.3f}" for part, value in result[key].items()))


def main():
    """Train, print, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="digits,scenes")
    parser.add_argument("--out", type=Path, default=Path("runs/igpt_small"))
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    use_compilation_cache()
    keep_memory()
    results: dict[str, Any] = {"machine": machine()}
    for name in args.only.split(","):
        for result in measure(name, args.out / name):
            results[name] = result
            if args.json:
                Path(args.json).write_text(json.dumps(results, indent=1) + "\n")
        show(name, results[name], Console(width=120))


if __name__ == "__main__":
    main()
