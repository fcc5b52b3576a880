"""ITM re-ranking of the top 16, for 1,000 images and 1,000 texts: jaxmm against transformers.

    python -m benchmarks.pair_matching [--queries 16] [--rounds 3] [--json FILE] [--force]

BLIP base at 384 pixels, the same random weights (`BlipForImageTextRetrieval`), texts of 8 to 20 tokens. All 1,000
queries take hours on two cores, so `--queries` images with 16 texts each are measured, from bytes to the logits of the
pairs. They are a sample of the 16,000 image-to-text pairs; text-to-image pairs cost the same if image tokens are
cached.

* `jaxmm`: images encoded once in batches of 8, then `jaxmm.inference.matching.match_pairs`;
* `kept`: transformers' parts by hand: images encoded once in batches of 8, then an image's 16 texts in one batch,
  padded to the longest, which attend to 16 copies of its tokens;
* `plain`: the model called for every pair with its image and its text; for `--plain` pairs.

Logits must agree before anything is timed. `pair_s` is measured: seconds per pair, including a sixteenth of an image's
encoding. `whole_s` is that times 32,000, the pairs of both directions. On every side it counts an image's encoding
twice and pairs that both directions share twice, and leaves out reading and decoding.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.caption_generation import MEAN, SIDE, STD
from benchmarks.measure import Rounds, Worker, is_busy, machine, options, product_pace, seconds, serve, tuned_arms

CANDIDATES, BATCH, LENGTH, WHOLE = 16, 8, 35, 1000


def work(queries: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw images [n h w 3], tokens [m t] that begin with [ENC] as in training, and candidates [n 16] per image."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1_000, 30_000, (4 * CANDIDATES, LENGTH)).astype(np.int32)
    tokens[:, 0] = 30_523
    for row, length in zip(tokens, rng.integers(8, 21, len(tokens)), strict=True):
        row[length - 1], row[length:] = 102, 0
    chosen = np.stack([rng.choice(len(tokens), CANDIDATES, replace=False) for _ in range(queries)])
    return rng.integers(0, 256, (queries, SIDE, SIDE, 3), np.uint8), tokens, chosen


def ours(folder: Path, queries: int, count: int):
    """Return {way: a run that returns the logits of the pairs}."""
    from jaxmm.inference.batching import outputs
    from jaxmm.inference.matching import make_image_encoder, match_pairs
    from jaxmm.inference.model import load
    from jaxmm.training.runtime import keep_memory
    keep_memory()  # as the command does
    image, tokens, chosen = work(queries)
    model = load(folder)

    def run():
        batches = ({"image": image[start:start + BATCH], "mask": np.ones(BATCH, bool)}
                   for start in range(0, queries, BATCH))
        encode = make_image_encoder(model.task, None)
        image_tokens = np.concatenate([encoded["image_tokens"] for encoded, _ in outputs(encode, model.params, batches,
                                                                                         None)])
        return match_pairs(model.task, model.params, image_tokens, tokens, np.arange(queries).repeat(CANDIDATES),
                           chosen.ravel(), None)

    return {"jaxmm": run}


def theirs(folder: Path, queries: int, count: int):
    """Return the same as `ours`, for transformers."""
    import torch
    import transformers
    image, tokens, chosen = work(queries)
    model = transformers.BlipForImageTextRetrieval.from_pretrained(folder).eval()

    def pixels(bytes_):
        scaled = (bytes_.astype(np.float32) / 255 - np.float32(MEAN)) / np.float32(STD)
        return torch.from_numpy(scaled).permute(0, 3, 1, 2).contiguous()

    def words(rows):
        ids = tokens[rows]
        ids = torch.from_numpy(ids[:, :(ids != 0).sum(axis=1).max()]).long()
        return ids, (ids != 0).long()

    @torch.inference_mode()
    def kept():
        image_tokens = torch.cat([model.vision_model(pixels(image[start:start + BATCH])).last_hidden_state
                                  for start in range(0, queries, BATCH)])
        logits = []
        for context, rows in zip(image_tokens, chosen, strict=True):
            ids, mask = words(rows)
            read = model.text_encoder(input_ids=ids, attention_mask=mask, return_dict=True,
                                      encoder_hidden_states=context.expand(len(rows), -1, -1),
                                      encoder_attention_mask=torch.ones(len(rows), context.shape[0]))
            logits.append(model.itm_head(read.last_hidden_state[:, 0]))
        return torch.cat(logits).numpy()

    @torch.inference_mode()
    def plain():
        logits = []
        for row in chosen[0][:count]:
            ids, mask = words([row])
            logits.append(model(ids, pixels(image[:1]), attention_mask=mask).itm_score)
        return torch.cat(logits).numpy()

    return {"kept": kept, "plain": plain}


SIDES = {"jaxmm": ours, "kept": theirs, "plain": theirs}


def prepare(folder: Path) -> None:
    """Write random weights in transformers' format."""
    import jax

    from jaxmm.config import ImageConfig
    from jaxmm.inference.model import Model
    from jaxmm.models.blip import blip
    from jaxmm.tasks.blip_pretraining import BLIPPretraining
    model = blip("base", image_size=SIDE, temperature=None)
    task = BLIPPretraining(model=replace(model, text=replace(model.text, decoder=False)))
    params = jax.jit(task.init)(jax.random.key(0))
    Model(task=task, params=params, preprocessing=ImageConfig(size=SIDE, eval_crop="squash")).save(
        folder, format="transformers")


def worker(what: str, folder: Path, queries: int, count: int) -> None:
    """Serve one of `SIDES`."""
    run = SIDES[what](folder, queries, count)[what]
    serve({"check": run().ravel().tolist()}, {"run": lambda: {"s": seconds(run)}, "pace": product_pace()})


def main():
    """Measure, print, record."""
    parser = options(__doc__)
    parser.add_argument("--queries", type=int, default=16, help=f"images, a multiple of {BATCH}")
    parser.add_argument("--plain", type=int, default=4, help="pairs of the plain loop, at most 16")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--worker", nargs=2, metavar=("WHAT", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker[0], Path(args.worker[1]), args.queries, args.plain)
        return
    if args.queries < 1 or args.queries % BATCH or not 0 < args.plain <= CANDIDATES:
        parser.error(f"--queries is {args.queries}, --plain {args.plain}; expected a multiple of {BATCH}, and 1 to "
                     f"{CANDIDATES}")
    busy = is_busy(args.force)
    about, rows, pairs = machine(), [], args.queries * CANDIDATES
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        prepare(folder)
        for arm, env in tuned_arms(Path(temporary)).items():
            workers = {what: Worker([sys.executable, "-m", "benchmarks.pair_matching", "--worker", what, str(folder),
                                     "--queries", str(args.queries), "--plain", str(args.plain)], env)
                       for what in SIDES}
            first, *rest = (np.array(side.about["check"]) for side in workers.values())
            difference = max(float(np.abs(check - first[:len(check)]).max()) for check in rest)
            if not difference < 1e-3:
                sys.exit(f"logits differ by {difference:.2g}; nothing was timed")
            rounds = Rounds(workers, workers["jaxmm"], 0.15)
            rounds.measure(args.rounds, args.rounds if args.force else args.rounds + 1)
            for side in workers.values():
                side.close()
            one = {what: rounds.median(what) / (args.plain if what == "plain" else pairs) for what in SIDES}
            rows.append({
                "arm": arm, "pair_s": {what: round(s, 5) for what, s in one.items()},
                "whole_s": {what: round(s * 2 * WHOLE * CANDIDATES) for what, s in one.items()},
                "ratio": {what: round(one[what] / one["jaxmm"], 2) for what in ("kept", "plain")},
                "queries": args.queries, "pairs": pairs, "plain_pairs": args.plain, "difference": difference,
                "rounds": len(rounds.valid()), "busy": busy, "machine": about})
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")
    table = Table(title=f"{pairs} pairs of {args.queries} images ({args.plain} of the plain loop), "
                        f"{about['processor']}, {about['cores']} cores")
    for column in ("arm", "jaxmm ms per pair", "kept", "plain", "jaxmm to kept", "to plain", "all in hours: jaxmm",
                   "kept", "plain"):
        table.add_column(column)
    for row in rows:
        table.add_row(row["arm"] + (" (busy)" if busy else ""), *(f"{row['pair_s'][what] * 1e3:.1f}" for what in SIDES),
                      *(f"{row['ratio'][what]:.2f}" for what in ("kept", "plain")),
                      *(f"{row['whole_s'][what] / 3600:.2f}" for what in SIDES))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
