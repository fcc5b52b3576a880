"""Seconds and memory to load CLIP ViT-L/14 (1.7 GB of safetensors): jaxmm against transformers, the same file.

    python -m benchmarks.loading [--model ViT-L-14] [--rounds 5] [--json FILE]

Each load runs in a new process; the sides take turns, so the file is in the system's cache for both. `peak` is the peak
memory while loading minus the memory before it (imports), divided by the bytes of the parameters; `in all` includes the
memory before.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.measure import machine


def memory(name: str) -> int:
    """Read bytes from /proc/self/status: VmRSS (now) or VmHWM (peak)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def ours(folder: Path):
    import jax

    from jaxmm.inference.model import load
    jax.devices()
    return lambda: jax.block_until_ready(load(folder).params)


def theirs(folder: Path):
    import torch
    import transformers

    model = transformers.CLIPModel

    def run():
        loaded = model.from_pretrained(folder)
        # from_pretrained may leave parameters mapped to the file; a program that runs the model reads them
        return sum(float(parameter.detach().flatten()[::512].sum()) for parameter in loaded.parameters()), loaded
    torch.zeros(1)
    return run


def one(side: str, folder: Path) -> None:
    """Load the model in this process and print time and memory as JSON."""
    run = {"ours": ours, "theirs": theirs}[side](folder)
    before, start = memory("VmRSS"), time.perf_counter()
    loaded = run()
    seconds = time.perf_counter() - start
    print(json.dumps({"s": seconds, "before": before, "peak": memory("VmHWM")}))
    del loaded


def write(name: str, folder: Path) -> int:
    """Write random weights in transformers' format; return the bytes of the parameters."""
    import jax
    import numpy as np

    from jaxmm.config import ImageConfig
    from jaxmm.inference.model import Model
    from jaxmm.models.clip import clip
    from jaxmm.tasks.contrastive_learning import ContrastiveLearning
    task = ContrastiveLearning(model=clip(name, activation="quick_gelu"))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32) * np.float32(0.02),
                          jax.eval_shape(task.init, jax.random.key(0)))
    model = Model(task=task, params=params, preprocessing=ImageConfig(size=task.model.vision.image_size))
    model.save(folder, format="transformers")
    return 4 * model.num_parameters


def main():
    """Measure, print, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-L-14", help="open_clip's name")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--one", nargs=2, metavar=("SIDE", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        one(args.one[0], Path(args.one[1]))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        size = write(args.model, folder)
        runs = {"ours": [], "theirs": []}
        for _ in range(args.rounds + 1):  # the first one warms the file cache
            for side, results in runs.items():
                command = [sys.executable, "-m", "benchmarks.loading", "--one", side, str(folder)]
                results.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True,
                                                         env=os.environ | {"JAX_PLATFORMS": "cpu"}).stdout))
    rows = []
    for side, results in runs.items():
        median = {name: statistics.median(run[name] for run in results[1:]) for name in results[0]}
        rows.append({"side": side, "model": args.model, "bytes": size, "seconds": round(median["s"], 3),
                     "peak": round((median["peak"] - median["before"]) / size, 3),
                     "in_all": round(median["peak"] / size, 3), "rounds": args.rounds, "machine": machine()})
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")
    table = Table(title=f"{args.model}, {size / 2**30:.2f} GiB")
    for column in ("", "seconds", "peak / parameters", "in all"):
        table.add_column(column)
    for row in rows:
        table.add_row(row["side"], f"{row['seconds']:.2f}", f"{row['peak']:.2f}", f"{row['in_all']:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
