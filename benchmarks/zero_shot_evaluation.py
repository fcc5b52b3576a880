"""Zero-shot classification of a web dataset: `jaxmm.evaluate` against clip_benchmark, CLIP ViT-B/32, the same weights.

    python -m benchmarks.zero_shot_evaluation [--images 5000] [--classes 100] [--workers 2] [--rounds 3] [--json FILE]
        [--arm tuned] [--force]

JPEG files of 480 x 360 pixels in shards, seven templates, random weights, fp32 (clip_benchmark's `--no_amp`), batches
of 64. Both sides read the tars, decode, preprocess, encode images and prompts, and compute the metrics; clip_benchmark
has `--workers` processes that read. The arms are those of `benchmarks.train_step`; quote `tuned`. Accuracies of 500
images must agree before anything is timed. Needs clip-benchmark, webdataset, braceexpand, open_clip_torch and
torchvision, installed with `pip install --no-deps`.
"""

import argparse
import io
import json
import sys
import tarfile
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from benchmarks.measure import (
    Rounds,
    Worker,
    import_torch,
    is_busy,
    machine,
    options,
    product_pace,
    seconds,
    serve,
    tuned_arms,
)

BATCH, SHARD, DIFFERENT, CHECKED = 64, 250, 200, 500
TEMPLATES = ("itap of a {c}.", "a bad photo of the {c}.", "a origami {c}.", "a photo of the large {c}.",
             "a {c} in a video game.", "art of the {c}.", "a photo of the small {c}.")


def ours(folder: Path, workers: int):
    """Return a run that returns top-1 and top-5."""
    from jaxmm.evals.evaluation import evaluate
    from jaxmm.inference.model import load
    from jaxmm.training.runtime import keep_memory
    keep_memory()  # as the command does
    model = load(folder / "model", tokenizer=_vocabulary())

    def run(data):
        [result] = evaluate(model, f"wds:{folder / data}", batch_size=BATCH)
        return result.metrics["zero_shot_top1"], result.metrics["zero_shot_top5"]

    return run


def theirs(folder: Path, workers: int):
    """Return the same for clip_benchmark."""
    torch = import_torch()
    import open_clip
    from clip_benchmark.datasets.builder import build_wds_dataset
    from clip_benchmark.metrics import zeroshot_classification
    from safetensors.torch import load_file

    # its own function converts arrays of one number, which NumPy 2.4 refuses
    zeroshot_classification.accuracy = lambda output, target, topk: [
        float(output.topk(k)[1].eq(target[:, None]).sum()) / len(target) for k in topk]
    config = json.loads((folder / "model" / "open_clip_config.json").read_text())
    fields = {name: value for name, value in config["model_cfg"].items() if name != "custom_text"}
    model = open_clip.CLIP(**fields).eval()
    model.load_state_dict(load_file(folder / "model" / "open_clip_model.safetensors"))
    shown = config["preprocess_cfg"]
    transform = open_clip.image_transform(shown["size"], is_train=False, mean=shown["mean"], std=shown["std"])
    tokenizer = open_clip.SimpleTokenizer()

    def run(data):
        data = build_wds_dataset("own", transform, split="test", data_dir=str(folder / data))
        loader = torch.utils.data.DataLoader(data.batched(BATCH), batch_size=None, num_workers=workers)
        loader.dataset.classes = data.classes
        metrics = zeroshot_classification.evaluate(model, loader, tokenizer, data.classes, data.templates, "cpu",
                                                   amp=False)
        return metrics["acc1"], metrics["acc5"]

    return run


SIDES = {"jaxmm": ours, "clip_benchmark": theirs}


def _vocabulary() -> Path:
    from importlib.util import find_spec
    return Path(find_spec("open_clip").submodule_search_locations[0]) / "bpe_simple_vocab_16e6.txt.gz"


def write_weights(folder: Path) -> None:
    """Write random weights in open_clip's format."""
    import jax

    from jaxmm.config import ImageConfig
    from jaxmm.inference.model import Model
    from jaxmm.models.clip import clip
    from jaxmm.tasks.contrastive_learning import ContrastiveLearning
    task = ContrastiveLearning(model=clip("ViT-B-32"))
    Model(task=task, params=jax.jit(task.init)(jax.random.key(0)), preprocessing=ImageConfig(size=224)).save(
        folder, format="open_clip")


def write_data(folder: Path, images: int, classes: int) -> None:
    """Write a web dataset."""
    data = folder / "test"
    data.mkdir(parents=True)
    rng, encoded = np.random.default_rng(0), []
    for _ in range(min(DIFFERENT, images)):
        out = io.BytesIO()
        coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8))
        smooth = np.asarray(coarse.resize((480, 360), Image.Resampling.BICUBIC), np.int16)
        noisy = smooth + rng.integers(-12, 13, smooth.shape)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
        encoded.append(out.getvalue())
    shards = range(0, images, SHARD)
    for number, start in enumerate(shards):
        with tarfile.open(data / f"{number}.tar", "w") as tar:
            for index in range(start, min(start + SHARD, images)):
                label = str(int(rng.integers(classes))).encode()
                for ending, content in (("jpg", encoded[index % len(encoded)]), ("cls", label)):
                    info = tarfile.TarInfo(f"s{index:07}.{ending}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    (data / "nshards.txt").write_text(f"{len(shards)}\n")
    (data.parent / "classnames.txt").write_text("".join(f"thing number {number}\n" for number in range(classes)))
    (data.parent / "zeroshot_classification_templates.txt").write_text("".join(f"{line}\n" for line in TEMPLATES))


def worker(what: str, folder: Path, workers: int) -> None:
    """Serve one of `SIDES`."""
    run = SIDES[what](folder, workers)
    serve({"check": list(run("check"))}, {"run": lambda: {"s": seconds(partial(run, "data"))}, "pace": product_pace()})


def main():
    """Measure, print, record."""
    parser = options(__doc__)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--workers", type=int, default=2, help="processes in which clip_benchmark reads; 0: none")
    parser.add_argument("--arm", help="measure this one only")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--worker", nargs=2, metavar=("WHAT", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker[0], Path(args.worker[1]), args.workers)
        return
    busy = is_busy(args.force)
    about, rows = machine(), []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_weights(folder / "model")
        for name, images in (("data", args.images), ("check", CHECKED)):
            write_data(folder / name, images, args.classes)
        for arm, env in tuned_arms(folder).items():
            if args.arm not in (None, arm):
                continue
            workers = {what: Worker([sys.executable, "-m", "benchmarks.zero_shot_evaluation", "--worker", what,
                                     str(folder), "--workers", str(args.workers)], env) for what in SIDES}
            checks = {what: side.about["check"] for what, side in workers.items()}
            differ = max(abs(a - b) for a, b in zip(*checks.values(), strict=True)) * CHECKED
            if differ > 2:
                sys.exit(f"accuracies differ by {differ:.0f} images: {checks}; nothing was timed")
            rounds = Rounds(workers, workers["jaxmm"], 0.15)
            rounds.measure(args.rounds, args.rounds if args.force else args.rounds + 1)
            for side in workers.values():
                side.close()
            median = {what: rounds.median(what) for what in SIDES}
            rows.append({"arm": arm, "s": {what: round(s, 2) for what, s in median.items()},
                         "ratio": round(median["clip_benchmark"] / median["jaxmm"], 2), "images": args.images,
                         "classes": args.classes, "workers": args.workers, "accuracies": checks,
                         "rounds": len(rounds.valid()), "busy": busy, "machine": about})
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")
    table = Table(title=f"{args.images} images, {about['processor']}, {about['cores']} cores")
    for column in ("arm", "jaxmm s", "clip_benchmark s", "ratio"):
        table.add_column(column)
    for row in rows:
        table.add_row(row["arm"] + (" (busy)" if busy else ""), *(f"{row['s'][what]:.1f}" for what in SIDES),
                      f"{row['ratio']:.2f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
