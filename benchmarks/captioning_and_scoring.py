"""CapFilt's caption and score stages, in images/s: jaxmm against a loop over transformers.

    python -m benchmarks.captioning_and_scoring [--pictures 16] [--rounds 3] [--json FILE] [--force]

Two BLIP base models at 384 pixels, a captioner and a filter, with the same random weights on both sides; JPEG files of
500 x 375, each with a text of 12 words. One caption per image is sampled (nucleus sampling, p = 0.9, exactly 20
tokens), then the caption and the image's text are matched. From files to probabilities:

* `jaxmm`: `caption_shard`, then `score_shard`: the captioner encodes the image once, the filter once for both texts;
* `batched`: transformers' processor, `generate` and two calls of the matching model, on 16 images at a time;
* `loop`: the same for one image after another, the simplest program; for `--loop` images.

The sampled captions differ between the sides, because their random numbers differ. Before timing, the matching
probabilities of the same texts must agree. The arms are those of `benchmarks.train_step`; quote `tuned`.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from benchmarks.caption_generation import MEAN, SIDE, STD
from benchmarks.measure import Rounds, Worker, is_busy, machine, options, product_pace, seconds, serve, tuned_arms

BATCH, TOKENS, VOCABULARY = 16, 20, 30_522


def prepare(folder: Path, count: int) -> None:
    """Write `captioner/` and `filter/` in transformers' format with made-up vocabularies, and `pairs.jsonl`."""
    import jax

    from jaxmm.config import ImageConfig, TokenizerConfig
    from jaxmm.data.tokenizers import make_tokenizer
    from jaxmm.inference.model import Model
    from jaxmm.models.blip import blip
    from jaxmm.tasks.blip_pretraining import BLIPPretraining
    from jaxmm.tasks.image_captioning import Captioning
    words = [f"word{i}" for i in range(VOCABULARY)]
    words[0], words[100:104] = "[PAD]", ("[UNK]", "[CLS]", "[SEP]", "[MASK]")
    (folder / "vocab.txt").write_text("\n".join(words))
    tokenizer = make_tokenizer(TokenizerConfig(kind="bert", file=str(folder / "vocab.txt"), context_length=35))
    full = blip("base", image_size=SIDE, temperature=None)
    captioner = replace(full, embed_dim=None, matching=False, text=replace(full.text, encoder=False))
    tasks = {"captioner": Captioning(model=captioner, prompt=""),
             "filter": BLIPPretraining(model=replace(full, text=replace(full.text, decoder=False)))}
    for seed, (name, task) in enumerate(tasks.items()):
        Model(task=task, params=jax.jit(task.init)(jax.random.key(seed)), tokenizer=tokenizer,
              preprocessing=ImageConfig(size=SIDE, eval_crop="squash")).save(folder / name, format="transformers")
    rng, lines = np.random.default_rng(0), []
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize((500, 375), Image.Resampling.BICUBIC)
        coarse.save(folder / f"{i}.jpg", quality=90)
        text = " ".join(f"word{n}" for n in rng.integers(1000, VOCABULARY, 12))
        lines.append(json.dumps({"image": f"{i}.jpg", "captions": [text]}) + "\n")
    (folder / "pairs.jsonl").write_text("".join(lines))


def ours(folder: Path, loop: int):
    """Return ({way: run}, a function that returns the probabilities of the images' own texts)."""
    from jaxmm.capfilt.scoring import make_filter, score_shard
    from jaxmm.capfilt.synthetic_captions import CaptionOptions, caption_shard
    from jaxmm.data.sources.registry import open_source
    from jaxmm.inference.generate import Decoding
    from jaxmm.inference.model import load
    from jaxmm.training.runtime import keep_memory
    keep_memory()  # as the command does
    source = open_source(f"captions:{folder}/pairs.jsonl")
    captioner, filters = load(folder / "captioner"), [make_filter(load(folder / "filter"), "filter")]
    decoding = Decoding(sample=True, top_p=0.9, min_length=1 + TOKENS, max_length=1 + TOKENS)

    def run():
        return score_shard(source, caption_shard(source, [captioner], CaptionOptions(decoding=decoding)), filters)

    def check():
        return score_shard(source, caption_shard(source, []), filters)[0]["itm"].tolist()

    return {"jaxmm": run}, check


def theirs(folder: Path, loop: int):
    """Return the same as `ours`, for transformers."""
    import torch
    import transformers
    tokenizer = transformers.BertTokenizer(str(folder / "vocab.txt"))
    processor = transformers.BlipProcessor(transformers.BlipImageProcessor(
        size={"height": SIDE, "width": SIDE}, image_mean=MEAN, image_std=STD), tokenizer)
    captioner = transformers.BlipForConditionalGeneration.from_pretrained(folder / "captioner").eval()
    matcher = transformers.BlipForImageTextRetrieval.from_pretrained(folder / "filter").eval()
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    pairs = [(folder / row["image"], row["captions"][0]) for row in rows]

    def opened(files):
        return [Image.open(file).convert("RGB") for file in files]

    def matched(images, texts):
        words = processor(images=images, text=texts, padding=True, return_tensors="pt")
        words["input_ids"][:, 0] = matcher.config.text_config.vocab_size - 1  # [ENC], as the models were trained
        return matcher(**{name: words[name] for name in ("input_ids", "attention_mask", "pixel_values")}
                       ).itm_score.softmax(dim=1)[:, 1]

    @torch.inference_mode()
    def run(size, pairs):
        probabilities = []
        for start in range(0, len(pairs), size):
            files, own = zip(*pairs[start:start + size], strict=True)
            images = opened(files)
            drawn = captioner.generate(**processor(images=images, return_tensors="pt"), do_sample=True, top_p=0.9,
                                       top_k=0, min_length=1 + TOKENS, max_length=1 + TOKENS)
            written = processor.batch_decode(drawn, skip_special_tokens=True)
            probabilities += [matched(images, list(own)), matched(images, written)]
        return torch.cat(probabilities)

    @torch.inference_mode()
    def check():
        return torch.cat([matched(opened([file]), [text]) for file, text in pairs]).tolist()

    return {"batched": lambda: run(BATCH, pairs), "loop": lambda: run(1, pairs[:loop])}, check


SIDES = {"jaxmm": ours, "batched": theirs, "loop": theirs}


def worker(what: str, folder: Path, loop: int) -> None:
    """Serve one of `SIDES`."""
    runs, check = SIDES[what](folder, loop)
    serve({"check": check()}, {"run": lambda: {"s": seconds(runs[what])}, "pace": product_pace()})


def main():
    """Measure, print, record."""
    parser = options(__doc__)
    parser.add_argument("--pictures", type=int, default=16, help=f"a multiple of {BATCH}")
    parser.add_argument("--loop", type=int, default=4, help="images of the loop")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--worker", nargs=2, metavar=("WHAT", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker[0], Path(args.worker[1]), args.loop)
        return
    if args.pictures < 1 or args.pictures % BATCH or not 0 < args.loop <= args.pictures:
        parser.error(f"--pictures is {args.pictures}, --loop {args.loop}; expected a multiple of {BATCH}, "
                     "and 1 to that")
    busy = is_busy(args.force)
    about, rows = machine(), []
    counts = {what: args.loop if what == "loop" else args.pictures for what in SIDES}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(folder, args.pictures)
        for arm, env in tuned_arms(Path(temporary)).items():
            workers = {what: Worker([sys.executable, "-m", "benchmarks.captioning_and_scoring", "--worker", what,
                                     temporary, "--loop", str(args.loop)], env) for what in SIDES}
            first, *rest = (np.array(side.about["check"]) for side in workers.values())
            difference = max(float(np.abs(check - first).max()) for check in rest)
            if not difference < 2e-3:  # the sides resize images with different libraries
                sys.exit(f"probabilities differ by {difference:.2g}; nothing was timed")
            rounds = Rounds(workers, workers["jaxmm"], 0.15)
            rounds.measure(args.rounds, args.rounds if args.force else args.rounds + 1)
            for side in workers.values():
                side.close()
            rate = {what: counts[what] / rounds.median(what) for what in SIDES}
            rows.append({"arm": arm, "pictures_per_second": {what: round(images, 4) for what, images in rate.items()},
                         "ratio": {what: round(rate["jaxmm"] / rate[what], 3) for what in ("batched", "loop")},
                         "pictures": counts, "difference": difference, "rounds": len(rounds.valid()), "busy": busy,
                         "machine": about})
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")
    table = Table(title=f"captions and scores, {about['processor']}, {about['cores']} cores")
    for column in ("arm", "images/s: jaxmm", "batched", "loop", "jaxmm to batched", "to loop"):
        table.add_column(column)
    for row in rows:
        table.add_row(row["arm"] + (" (busy)" if busy else ""),
                      *(f"{row['pictures_per_second'][what]:.3f}" for what in SIDES),
                      *(f"{row['ratio'][what]:.2f}" for what in ("batched", "loop")))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
