"""Attention by position against attention by content and convolution, on small images with the same budget.

    python -m benchmarks.attention_against_convolution --train folder:DIR/train --test folder:DIR/test [--seeds 3]
        [--json FILE]

Every arm sees the same batches of `--train` (CIFAR-10 or the like, resized to `--size`) for the same number of steps,
with the same optimizer, width, depth and 2 x 2 patches:

    quadratic, generalised_quadratic, learned, learned_content    the attentions of `jaxmm.models.attention_conv`
    convolution    the same layers with a 3 x 3 convolution instead of attention
    vit            a plain ViT: pre-norm, learned positions, heads of width 16, hidden units four times the width

Printed are means and standard deviations over the seeds of the accuracy on `--test`, the last training losses, and the
seconds of a run, all of it included. Results of finished runs stay in `--out`; rerun the command to continue.
"""

import argparse
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from flax import linen as nn
from rich.console import Console
from rich.table import Table

from benchmarks.measure import machine
from jaxmm.atomic import write_atomically
from jaxmm.compiling import use_compilation_cache
from jaxmm.config import CheckpointConfig, DataConfig, ImageConfig, OptimizerConfig, TrainConfig
from jaxmm.evals import TopKAccuracy
from jaxmm.models.attention_conv import AttentionConvConfig
from jaxmm.models.vit import ViTConfig, ViTOutput
from jaxmm.nn.embeddings import PatchEmbedding
from jaxmm.nn.transformer import Mlp, TransformerConfig, initializers, layer_norm, torch_bias
from jaxmm.tasks.image_classification import Classification
from jaxmm.training.loop import train

ATTENTIONS = ("quadratic", "generalised_quadratic", "learned", "learned_content")
ARMS = (*ATTENTIONS, "convolution", "vit")


@dataclass(frozen=True, kw_only=True)
class ConvolutionConfig(AttentionConvConfig):
    """The same layers with convolutions."""

    @property
    def module(self) -> nn.Module:
        """The Flax module."""
        return Convolution(self)


class Convolution(nn.Module):
    """`AttentionConv` with 3 x 3 convolutions, whose padding is zero, instead of attention."""

    config: ConvolutionConfig

    @nn.compact
    def __call__(self, image: jax.Array, *, train: bool) -> ViTOutput:
        """Classify images."""
        config, stack = self.config, self.config.stack
        init, width = initializers(stack).attention_out, config.width
        x = PatchEmbedding(config.patch, width, kernel_init=initializers(stack).patches, bias_init=torch_bias(12),
                           name="patches")(image)
        for layer in range(config.depth):
            y = nn.Conv(width, (3, 3), bias_init=torch_bias(9 * width), name=f"convolution_{layer}",
                        kernel_init=nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
                        )(x.reshape(len(x), *config.grid, width)).reshape(x.shape)
            y = nn.Dense(width, kernel_init=init, bias_init=torch_bias(width), name=f"projection_{layer}")(y)
            y = nn.Dropout(config.dropout, deterministic=not train)(y)
            x = layer_norm(stack, f"convolution_norm_{layer}")(x + y)
            y = Mlp(stack, name=f"mlp_{layer}")(x, train=train)
            y = nn.Dropout(config.dropout, deterministic=not train)(y)
            x = layer_norm(stack, f"mlp_norm_{layer}")(x + y)
        pooled = x.mean(axis=1)
        head = nn.Dense(config.classes, kernel_init=init, bias_init=torch_bias(width), name="head")
        return ViTOutput(x, pooled, head(pooled), None, None)


def task(arm: str, args: argparse.Namespace) -> Classification:
    """Return the task of an arm."""
    if arm == "vit":
        stack = TransformerConfig(width=args.width, depth=args.depth, heads=args.width // 16, mlp_dim=4 * args.width,
                                  dropout=0.1)
        return Classification(model=ViTConfig(transformer=stack, image_size=args.size, patch=2, pool="gap",
                                              class_token=False))
    shared = {"width": args.width, "depth": args.depth, "mlp_dim": 2 * args.width, "image_size": args.size}
    if arm == "convolution":
        return Classification(model=ConvolutionConfig(**shared))
    return Classification(model=AttentionConvConfig(scores=arm, **shared))


def config(arm: str, seed: int, args: argparse.Namespace) -> TrainConfig:
    """Return the run of an arm."""
    positions = r"/(centers|inverse_spread)$"
    moved = ((positions, 10.0),) if arm in ATTENTIONS[:2] else ()  # centers are many of Adam's steps from their goals
    return TrainConfig(
        task=task(arm, args), steps=args.steps, seed=seed, evals=(TopKAccuracy(examples=0),), log_every=50,
        data=DataConfig(train=args.train, val=args.test, batch_size=args.batch_size,
                        image=ImageConfig(size=args.size, train_crop="pad")),
        optimizer=OptimizerConfig(learning_rate=args.learning_rate, weight_decay=0.05, warmup=0.1, multipliers=moved),
        checkpoint=CheckpointConfig(every=args.steps))


def measure(arm: str, seed: int, args: argparse.Namespace) -> dict[str, float]:
    """Train an arm with one seed, unless `--out` has its result; return accuracy, loss, seconds and parameters."""
    file = args.out / (f"{arm}-seed{seed}-size{args.size}-width{args.width}-depth{args.depth}-"
                       f"{args.steps}x{args.batch_size}-rate{args.learning_rate}.json")
    if not file.exists():
        run, start = config(arm, seed, args), time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            metrics = train(run, Path(folder))
            seconds = time.perf_counter() - start
            lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
        if not metrics:
            raise SystemExit("stopped; rerun the same command to continue")
        bound = run.task.bind(image_size=args.size, classes=10, tokenizer=None)
        sizes = [leaf.size for leaf in jax.tree.leaves(jax.eval_shape(bound.init, jax.random.key(0)))]
        losses = [line["train/loss"] for line in lines if "train/loss" in line]
        args.out.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps({
            "top1": metrics["val/top1"], "train_loss": float(np.mean(losses[-4:])), "seconds": seconds,
            "parameters": int(sum(sizes))}))
    return json.loads(file.read_text())


def summary(values: list[float], form: str) -> str:
    """Format mean and standard deviation over seeds."""
    spread = f" ± {np.std(values, ddof=1):{form}}" if len(values) > 1 else ""
    return f"{np.mean(values):{form}}{spread}"


def main() -> None:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True, help="source of the training images")
    parser.add_argument("--test", required=True, help="source of the held-out images")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default=",".join(ARMS), help="arms, separated by commas")
    for name, value in (("size", 16), ("width", 128), ("depth", 3), ("steps", 800), ("batch-size", 64)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--out", type=Path, default=Path("runs/attention-against-convolution"))
    parser.add_argument("--json", metavar="FILE", type=Path)
    args = parser.parse_args()
    arms = args.only.split(",")
    if unknown := set(arms) - set(ARMS):
        parser.error(f"--only has {', '.join(sorted(unknown))}; expected some of {', '.join(ARMS)}")
    use_compilation_cache()
    rows = {arm: [] for arm in arms}
    for seed in range(args.seeds):  # seed by seed, so that an interrupted run has all arms
        for arm in arms:
            rows[arm].append(measure(arm, seed, args))
    title = f"{args.steps:,} steps of {args.batch_size}, {args.size} x {args.size} pixels, {args.seeds} seeds"
    table = Table("arm", "parameters", "top-1", "last training loss", "seconds", title=title)
    for arm, runs in sorted(rows.items(), key=lambda row: -np.mean([run["top1"] for run in row[1]])):
        table.add_row(arm, f"{runs[0]['parameters']:,}", *(summary([run[key] for run in runs], form) for key, form in (
            ("top1", ".3f"), ("train_loss", ".3f"), ("seconds", ".0f"))))
    Console(width=110, highlight=False).print(table)
    if args.json:
        settings = {name: getattr(args, name) for name in ("size", "width", "depth", "steps", "batch_size",
                                                           "learning_rate", "seeds")}
        write_atomically(args.json, json.dumps([
            {"arm": arm, **settings, "parameters": runs[0]["parameters"],
             **{key: [run[key] for run in runs] for key in ("top1", "train_loss", "seconds")}, "machine": machine()}
            for arm, runs in rows.items()], indent=1) + "\n")


if __name__ == "__main__":
    main()
