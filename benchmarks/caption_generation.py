"""Caption generation: jaxmm against transformers' `generate`, BLIP base at 384 pixels, the same random weights.

    python -m benchmarks.caption_generation [--only NAME] [--rounds 3] [--json FILE] [--force]

From a batch of 4 images, as bytes for jaxmm and as normalised pixels for transformers, generate exactly 20 new tokens
after the start token, greedily and by beam search with 3 beams. The token ids must be the same on both sides before
anything is timed. `encode` is the image encoder alone; the rest of a call is `decode`. The arms are those of
`benchmarks.train_step`; quote `tuned`.

`one more token` is the slope of a line through the times of 5, 10, 20 and 40 new tokens, with the largest distance from
it. `recompiled` counts compilations while more batches of other images are captioned. `peak` is the peak memory of a
process while captioning with 3 beams, after a first call; each side runs in a separate process.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.loading import memory
from benchmarks.measure import Rounds, Worker, is_busy, machine, options, product_pace, seconds, serve, tuned_arms

SIDE, BATCH, TOKENS, LENGTHS = 384, 4, 20, (5, 10, 20, 40)
BEAMS = {"greedy": 1, "beam3": 3}
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def pictures(seed: int) -> np.ndarray:
    """Draw images [b h w 3] of coarse blocks and noise."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (BATCH, 4, 4, 3)).repeat(SIDE // 4, axis=1).repeat(SIDE // 4, axis=2)
    return np.clip(coarse + rng.integers(-20, 20, coarse.shape), 0, 255).astype(np.uint8)


def ours(folder: Path):
    """Return (write(mode, tokens, seed) -> ids [b t], encode(seed) -> image tokens, count of compilations so far)."""
    import jax

    from jaxmm.inference.captioning import make_caption_fn
    from jaxmm.inference.generate import Decoding
    from jaxmm.inference.matching import make_image_encoder
    from jaxmm.inference.model import load
    from jaxmm.training.runtime import keep_memory
    keep_memory()  # as the command does
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if event.endswith("backend_compile_duration") else None)
    model = load(folder)
    start = {"prompt": np.full((BATCH, 1), model.task.decoder.start_id, np.int32),
             "row": np.arange(BATCH, dtype=np.int32)}

    def write(mode, count, seed):
        decoding = Decoding(beams=BEAMS[mode], min_length=1 + count, max_length=1 + count)
        fn = make_caption_fn(model.task, decoding, 0, None)
        return np.asarray(fn(model.params, start | {"image": pictures(seed)})["tokens"])[:, 0]

    def see(seed):
        return np.asarray(make_image_encoder(model.task, None)(model.params, {"image": pictures(seed)})["image_tokens"])

    return write, see, lambda: len(compiled)


def theirs(folder: Path):
    """Return the same as `ours`, for transformers."""
    import torch
    import transformers
    model = transformers.BlipForConditionalGeneration.from_pretrained(folder).eval()

    @cache
    def pixels(seed):
        image = (pictures(seed).astype(np.float32) / 255 - np.float32(MEAN)) / np.float32(STD)
        return torch.from_numpy(image).permute(0, 3, 1, 2).contiguous()

    def write(mode, count, seed):
        with torch.inference_mode():
            return model.generate(pixel_values=pixels(seed), num_beams=BEAMS[mode], do_sample=False,
                                  min_length=1 + count, max_length=1 + count).numpy()

    def see(seed):
        with torch.inference_mode():
            return model.vision_model(pixels(seed)).last_hidden_state.numpy()

    return write, see, lambda: 0


SIDES = {"theirs": theirs, "ours": ours}


def worker(side: str, folder: Path) -> None:
    """Serve one side: a request such as `greedy 20` selects what `run` does, and does it once."""
    write, see, compiled = SIDES[side](folder)
    chosen = None

    def choose(function, check):
        nonlocal chosen
        chosen = function
        return check(function(0))

    def several(mode):
        write(mode, TOKENS, 0)
        before = compiled()
        tokens = [write(mode, TOKENS, seed).tolist() for seed in range(1, 4)]
        return {"compiled": compiled() - before, "tokens": tokens}

    serve({}, {f"{mode} {count}": partial(choose, partial(write, mode, count), lambda ids: {"tokens": ids.tolist()})
               for mode in BEAMS for count in LENGTHS}
          | {f"{mode} batches": partial(several, mode) for mode in BEAMS}
          | {"encode": partial(choose, see, lambda tokens: {"norm": float(np.linalg.norm(tokens))}),
             "run": lambda: {"s": seconds(lambda: chosen(0))},
             "pace": product_pace()})


def one(side: str, folder: Path) -> None:
    """Measure the memory of this process in bytes and print it as JSON."""
    write, _, _ = SIDES[side](folder)
    loaded = memory("VmRSS")
    write("beam3", TOKENS, 0)
    with_loading = memory("VmHWM")
    with contextlib.suppress(OSError):  # reset the peak
        Path("/proc/self/clear_refs").write_text("5")
    write("beam3", TOKENS, 1)
    print(json.dumps({"loaded": loaded, "whole": with_loading, "peak": memory("VmHWM")}))


def prepare(folder: Path) -> int:
    """Write random weights in transformers' format, so large that captions depend on the image; return their bytes."""
    import jax

    from jaxmm.config import ImageConfig
    from jaxmm.inference.model import Model
    from jaxmm.models.blip import blip
    from jaxmm.tasks.image_captioning import Captioning
    model = blip("base", image_size=SIDE, embed_dim=None, matching=False, temperature=None)
    task = Captioning(model=replace(model, text=replace(model.text, encoder=False)))
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: 3 * leaf if path[-1].key == "kernel" else leaf, jax.jit(task.init)(jax.random.key(0)))
    made = Model(task=task, params=params, preprocessing=ImageConfig(size=SIDE, eval_crop="squash"))
    made.save(folder, format="transformers")
    return 4 * made.num_parameters


def agreed(workers: dict[str, Worker], request: str) -> None:
    """Send a request to all workers; exit if tokens, or the norms of image tokens, differ."""
    answers = {name: worker.ask(request) for name, worker in workers.items()}
    first, *rest = answers.values()
    if "norm" in first:
        same = all(abs(answer["norm"] / first["norm"] - 1) < 1e-4 for answer in rest)
    else:
        same = all(answer == first for answer in rest)
    if not same:
        sys.exit(f"{request}: the sides differ; nothing was timed. {answers}")


def medians(workers: dict[str, Worker], request: str, args) -> tuple[dict[str, float], int]:
    """Return the median seconds of `request` by worker, and the number of valid rounds."""
    agreed(workers, request)
    rounds = Rounds(workers, workers[list(workers)[-1]], 0.15)
    rounds.measure(args.rounds, args.rounds if args.force else args.rounds + 2)
    return {name: rounds.median(name) for name in workers}, len(rounds.valid())


def line(lengths: tuple[int, ...], times: list[float]) -> tuple[float, float]:
    """Fit a line through `times`; return its slope and the largest distance from it."""
    slope, start = np.polyfit(lengths, times, 1)
    return float(slope), float(np.abs(start + slope * np.array(lengths) - times).max())


def main():
    """Measure, print, record."""
    parser = options(__doc__)
    parser.add_argument("--only", default="", help="greedy or beam3")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--worker", nargs=2, metavar=("SIDE", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("--one", nargs=2, metavar=("SIDE", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker[0], Path(args.worker[1]))
        return
    if args.one:
        one(args.one[0], Path(args.one[1]))
        return
    busy = is_busy(args.force)
    about, rows = machine(), []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        size = prepare(folder)
        arms = tuned_arms(Path(temporary))
        peaks = {side: json.loads(subprocess.run(
            [sys.executable, "-m", "benchmarks.caption_generation", "--one", side, str(folder)], check=True, text=True,
            stdout=subprocess.PIPE, env=os.environ | arms["as installed"]).stdout.splitlines()[-1]) for side in SIDES}
        command = [sys.executable, "-m", "benchmarks.caption_generation", "--worker"]
        workers = {f"{side} {arm}": Worker([*command, side, str(folder)], env)
                   for arm, env in arms.items() for side in SIDES}
        last = {f"{side} {list(arms)[-1]}": workers[f"{side} {list(arms)[-1]}"] for side in SIDES}
        encode, _ = medians(workers, "encode", args)
        for mode in (mode for mode in BEAMS if args.only in mode):
            times, counted = medians(workers, f"{mode} {TOKENS}", args)
            several = {name: side.ask(f"{mode} batches") for name, side in last.items()}
            mine, other = several.values()
            if mine["tokens"] != other["tokens"]:
                sys.exit(f"{mode}: the sides generate different tokens for other images")
            recompiled = next(answer["compiled"] for name, answer in several.items() if name.startswith("ours"))
            longer = {count: medians(last, f"{mode} {count}", args)[0] if count != TOKENS else times
                      for count in LENGTHS}
            lines = {side: line(LENGTHS, [medians[f"{side} {list(arms)[-1]}"] for medians in longer.values()])
                     for side in SIDES}
            for arm in arms:
                row = {"name": f"BLIP base captions {mode}", "arm": arm, "batch": BATCH, "tokens": TOKENS}
                for side in ("ours", "theirs"):
                    total, encoding = times[f"{side} {arm}"], encode[f"{side} {arm}"]
                    row |= {f"{side}_s": round(total, 4), f"{side}_encode_s": round(encoding, 4),
                            f"{side}_decode_s": round(total - encoding, 4)}
                row["ratio"] = round(row["theirs_s"] / row["ours_s"], 3)
                rows.append(row | {
                    "slope_s": {side: round(lines[side][0], 5) for side in SIDES},
                    "residual_s": {side: round(lines[side][1], 5) for side in SIDES}, "lengths": LENGTHS,
                    "recompiled": recompiled, "parameters": size, "peak": peaks, "rounds": counted, "busy": busy,
                    "machine": about})
        for side in workers.values():
            side.close()
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")
    table = Table(title=f"{BATCH} images, {TOKENS} new tokens, {about['processor']}, {about['cores']} cores")
    for column in ("", "arm", "ours s", "theirs s", "ratio", "encode", "theirs", "decode", "theirs"):
        table.add_column(column)
    for row in rows:
        table.add_row(row["name"], row["arm"] + (" (busy)" if busy else ""), *(f"{row[key]:.2f}" for key in (
            "ours_s", "theirs_s", "ratio", "ours_encode_s", "theirs_encode_s", "ours_decode_s", "theirs_decode_s")))
    console = Console(width=120)
    console.print(table)
    for row in rows[::len(arms)]:
        console.print(f"{row['name']}, {list(arms)[-1]}: one more token takes " + ", ".join(
            f"{side} {row['slope_s'][side] * 1e3:.1f} ms (at most {row['residual_s'][side] * 1e3:.1f} ms off a line)"
            for side in ("ours", "theirs")) + f"; recompiled {row['recompiled']} times over 3 more batches")
    console.print("peak with 3 beams: " + ", ".join(
        f"{side} {peaks[side]['peak'] / 2**20:.0f} MiB ({peaks[side]['whole'] / 2**20:.0f} with loading and compiling)"
        for side in ("ours", "theirs")) + f"; parameters {size / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
