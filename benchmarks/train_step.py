"""Seconds per step: jaxmm against transformers on the same cores or GPU, with the same weights, sizes and batch.

    python -m benchmarks.train_step [--only NAME] [--rounds N] [--json [FILE]] [--force]

On a CPU: ViT-B/16 forward and train step (forward, backward, AdamW) and CLIP ViT-B/32 train step, batch 8, fp32. torch
multiplies with MKL, which does not use AVX-512 on other vendors' processors, so there are two arms. `as installed` is
what a user gets. In `tuned`, the one to quote, torch runs with a preloaded library that makes MKL use it, and the
processes of both sides keep their memory instead of mapping it again in every step.

On a GPU: ViT-L/16 and CLIP ViT-L/14 in bf16 (fp32 parameters), against transformers under `torch.compile` with
FlashAttention and fused AdamW. Our layers are unrolled there: with a loop, stacking what the backward pass needs took a
quarter of the step.

Each side of each arm is one process for all rounds. They take turns (A B A B), one at a time, and medians are compared.
Outputs and the losses of two steps must agree before anything is timed. A round is valid only if a fixed matrix product
ran at the machine's best speed before and after it. On a busy machine nothing is recorded unless `--force`, and then
the record says so. `of_peak` is the share of the machine's best measured rate on a large matrix product.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.measure import Rounds, Worker, is_busy, machine, options, tuned_arms
from benchmarks.train_step_sides import Case, command

CPU = (
    Case("ViT-B/16 forward", "vit:B/16", False, 8, "float32", "none"),
    Case("ViT-B/16 train", "vit:B/16", True, 8, "float32", "cheap"),
    Case("CLIP ViT-B/32 train", "clip:ViT-B-32", True, 8, "float32", "cheap"),
)
GPU = (
    Case("ViT-L/16 forward", "vit:L/16", False, 128, "bfloat16", "none", scan=False),
    Case("ViT-L/16 train", "vit:L/16", True, 128, "bfloat16", "none", scan=False),
    Case("CLIP ViT-L/14 train", "clip:ViT-L-14", True, 64, "bfloat16", "none", scan=False),
)
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}


def gpu_name() -> str | None:
    """Return the first GPU's name; None without one."""
    if shutil.which("nvidia-smi") is None:
        return None
    listed = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True)
    return listed.stdout.splitlines()[0] if listed.returncode == 0 and listed.stdout.strip() else None


def agree(case: Case, checks: dict[str, list[float]]) -> float:
    """Return the largest relative difference between the sides' outputs; exit if it is too large."""
    first, *rest = checks.values()
    largest = max(map(abs, first))
    difference = max(max(abs(a - b) for a, b in zip(first, other, strict=True)) for other in rest) / largest
    if not difference < TOLERANCE[case.dtype]:
        sys.exit(f"{case.name}: the sides' outputs differ by {difference:.2g} of the largest; nothing was timed. "
                 f"{ {name: check[:3] for name, check in checks.items()} }")
    return difference


def measure(case: Case, arms: dict[str, dict[str, str]], args, gpu: bool, folder: Path) -> list[dict]:
    """Measure one case; return one row per arm."""
    weights = folder / f"{case.model.replace('/', '-')}.npz"
    workers = {}
    try:
        for arm, env in arms.items():
            for side in ("theirs", "ours"):
                workers[f"{side} {arm}"] = Worker(command(side, case, weights, gpu), env)
        difference = agree(case, {name: worker.about["check"] for name, worker in workers.items()})
        peaks = {name: worker.ask("peak")["flop_per_s"] for name, worker in workers.items()}
        rounds = Rounds(workers, workers[max(peaks, key=peaks.get)], args.tolerance)
        rounds.measure(args.rounds, args.rounds if args.force else 3 * args.rounds)
        peaks = {name: max(peaks[name], worker.ask("peak")["flop_per_s"]) for name, worker in workers.items()}
    finally:
        for worker in workers.values():
            worker.close()
    busy = len(rounds.valid()) < args.rounds
    if busy and not args.force:
        sys.exit(f"{case.name}: only {len(rounds.valid())} of {len(rounds.rounds)} rounds ran at the machine's best "
                 "speed; something else is computing. Nothing recorded (--force records anyway).")
    peak, rows = max(peaks.values()), []
    for arm in arms:
        a, b = (rounds.median(f"{side} {arm}") for side in ("ours", "theirs"))
        rows.append({
            "name": case.name, "ours_s": round(a, 5), "theirs_s": round(b, 5), "ratio": round(b / a, 3),
            "of_peak": round(case.flop / a / peak, 3), "theirs_of_peak": round(case.flop / b / peak, 3), "arm": arm,
            "batch": case.batch, "dtype": case.dtype, "remat": case.remat, "scan": case.scan,
            "rounds": len(rounds.valid()),
            "difference": float(f"{difference:.2g}"), "peak_gflop_per_s": round(peak / 1e9),
            "busy": busy, "load": round(os.getloadavg()[0], 2),
        })
    return rows


def main():
    """Measure, print, record."""
    parser = options(__doc__, rounds=7)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--tolerance", type=float, default=0.08, help="allowed distance from the best speed")
    parser.add_argument("--batch", type=int, help="batch size, default: that of each case")
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE",
                        help="write the rows there, with the machine; without FILE, to standard output")
    args = parser.parse_args()
    gpu = gpu_name()
    loaded = gpu is None and is_busy(args.force)
    cases = [case for case in (GPU if gpu else CPU) if args.only.lower() in case.name.lower()]
    if args.batch:
        cases = [Case(**(vars(case) | {"batch": args.batch})) for case in cases]
    about = machine() | {"gpu": gpu}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        arms = {"torch.compile": {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}} if gpu else tuned_arms(folder)
        for case in cases:
            rows += [row | {"busy": row["busy"] or loaded, "machine": about}
                     for row in measure(case, arms, args, gpu is not None, folder)]
            if args.json not in (None, "-"):
                Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")
    if args.json == "-":
        print(json.dumps(rows, indent=1))
        return
    table = Table(title=f"{gpu or about['processor']}, {about['cores']} cores")
    for column in ("", "arm", "ours ms", "theirs ms", "ratio", "of peak", "theirs"):
        table.add_column(column, justify="left" if column in ("", "arm") else "right")
    for row in rows:
        table.add_row(row["name"], row["arm"] + (" (busy)" if row["busy"] else ""), f"{row['ours_s'] * 1e3:.0f}",
                      f"{row['theirs_s'] * 1e3:.0f}", f"{row['ratio']:.2f}", f"{row['of_peak']:.0%}",
                      f"{row['theirs_of_peak']:.0%}")
    console = Console()
    console.print(table)
    console.print(f"peak: {max(r['peak_gflop_per_s'] for r in rows)} GFLOP/s; ratio > 1: jaxmm is faster")


if __name__ == "__main__":
    main()
