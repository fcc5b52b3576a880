"""Image generation: jaxmm against transformers' `generate`, iGPT-S at 32 x 32, the same random weights.

    python -m benchmarks.image_generation [--pixels 1024] [--rounds 1] [--json FILE] [--force]

Both sides write the first `--pixels` pixels of 8 images greedily with their caches. The first 32 must be the same on
both sides before anything is timed. The arms are those of `benchmarks.train_step`; quote `tuned`. Beside seconds there
are CPU seconds of both cores, which depend less on what else runs. In the last arm jaxmm's time is also measured for an
eighth, a quarter and half of the pixels, to see how it grows.
"""

import argparse
import json
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.caption_generation import agreed, line
from benchmarks.measure import Worker, import_torch, is_busy, machine, options, product_pace, serve, tuned_arms

BATCH, CHECKED = 8, 32


def prepare(folder: Path) -> None:
    """Write random weights in transformers' format, so large that pixels depend on each other."""
    import jax

    from jaxmm.config import ImageConfig
    from jaxmm.inference.model import Model
    from jaxmm.models.igpt import igpt
    from jaxmm.nn.palette import Palette
    from jaxmm.tasks.generative_pretraining import GenerativePretraining
    palette = Palette(colors=tuple((level / 256 - 1, 0.0, 0.0) for level in range(512)))
    task = GenerativePretraining(model=igpt("S"), palette=palette)
    params = jax.jit(task.init)(jax.random.key(0))
    params["head"]["kernel"] = 0.2 * jax.random.normal(jax.random.key(1), params["head"]["kernel"].shape)
    params["tokens"]["embedding"] *= 20
    Model(task=task, params=params, preprocessing=ImageConfig(size=32, eval_crop="squash")).save(
        folder, format="transformers")


def ours(folder: Path):
    """Return a function from a number of pixels to the tokens of all images."""
    import jax

    from jaxmm.inference.generate import Decoding, generate
    from jaxmm.inference.model import load
    from jaxmm.training.runtime import keep_memory
    keep_memory()
    model = load(folder)
    start, lengths = np.zeros((BATCH, 1), np.int32), np.ones(BATCH, np.int32)

    def write(params, keys, count):
        return generate(model.task.decoder, params, None, jax.numpy.asarray(start), jax.numpy.asarray(lengths), keys,
                        Decoding(max_length=1 + count)).tokens[:, 0, 1:]

    compiled = jax.jit(write, static_argnums=2)
    keys = jax.random.split(jax.random.key(0), BATCH)
    return lambda count: np.asarray(compiled(model.params, keys, count))


def theirs(folder: Path):
    """Return the same for transformers."""
    torch = import_torch()
    import transformers
    model = transformers.ImageGPTForCausalImageModeling.from_pretrained(folder).eval()
    start = torch.full((BATCH, 1), 512)

    def write(count):
        with torch.inference_mode():
            return model.generate(start, attention_mask=torch.ones_like(start), do_sample=False, min_length=1 + count,
                                  max_length=1 + count).numpy()[:, 1:]

    return write


SIDES = {"theirs": theirs, "ours": ours}


def worker(side: str, folder: Path, pixels: int) -> None:
    """Serve one side."""
    write = SIDES[side](folder)

    def timed(count):
        write(count) if side == "ours" else write(1)  # compiles
        wall, cpu = time.perf_counter(), time.process_time()
        write(count)
        return {"s": time.perf_counter() - wall, "cpu": time.process_time() - cpu}

    serve({}, {"check": lambda: {"tokens": write(min(CHECKED, pixels)).tolist()}, "run": lambda: timed(pixels),
               "pace": product_pace()} | {f"write {count}": partial(timed, count) for count in parts(pixels)})


def parts(pixels: int) -> tuple[int, ...]:
    """Return the numbers of pixels at which jaxmm's growth is measured."""
    return tuple(pixels // share for share in (8, 4, 2))


def main():
    """Measure, print, record."""
    parser = options(__doc__, rounds=1)
    parser.add_argument("--pixels", type=int, default=1024)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--worker", nargs=2, metavar=("SIDE", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker[0], Path(args.worker[1]), args.pixels)
        return
    busy, about, rows = is_busy(args.force), machine(), []
    with tempfile.TemporaryDirectory() as temporary:
        prepare(folder := Path(temporary) / "model")
        command = [sys.executable, "-m", "benchmarks.image_generation", "--pixels", str(args.pixels),
                   "--worker"]
        arms = tuned_arms(Path(temporary))
        for arm, env in arms.items():
            workers = {side: Worker([*command, side, str(folder)], env) for side in SIDES}
            agreed(workers, "check")
            answers = {side: [] for side in SIDES}
            for _ in range(args.rounds):
                for side, process in workers.items():
                    answers[side].append(process.ask("run"))
            best = {side: min(runs, key=lambda answer: answer["s"]) for side, runs in answers.items()}
            row = {}
            if arm == list(arms)[-1]:
                grown = {count: workers["ours"].ask(f"write {count}") for count in parts(args.pixels)}
                slope, off = line((*grown, args.pixels), [*(part["s"] for part in grown.values()), best["ours"]["s"]])
                row = {"ours_by_pixels": grown, "slope_s": slope, "residual_s": off}
            rows.append(row | {"name": "iGPT-S, 32 x 32", "arm": arm, "batch": BATCH, "pixels": args.pixels,
                         "best": best,
                         "ratio": best["theirs"]["s"] / best["ours"]["s"],
                         "cpu_ratio": best["theirs"]["cpu"] / best["ours"]["cpu"], "rounds": args.rounds, "busy": busy,
                         "machine": about})
            for process in workers.values():
                process.close()
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")
    table = Table(title=f"{BATCH} images, {args.pixels} pixels each, {about['processor']}, {about['cores']} cores")
    for column in ("arm", "ours s", "theirs s", "ratio", "ours CPU s", "theirs CPU s", "ratio"):
        table.add_column(column)
    for row in rows:
        best = row["best"]
        table.add_row(row["arm"] + (" (busy)" if busy else ""), *(f"{value:.2f}" for value in (
            best["ours"]["s"], best["theirs"]["s"], row["ratio"], best["ours"]["cpu"], best["theirs"]["cpu"],
            row["cpu_ratio"])))
    console = Console(width=120)
    console.print(table)
    console.print(f"one more pixel of {BATCH} images takes jaxmm {1e3 * rows[-1]['slope_s']:.1f} ms (at most "
                  f"{rows[-1]['residual_s']:.2f} s off a line)")


if __name__ == "__main__":
    main()
