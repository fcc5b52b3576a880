"""Embeddings of images and text from files on disk: jaxmm against transformers, CLIP ViT-B/32, the same weights.

    python -m benchmarks.encoding --pictures FOLDER --texts captions.json --merges bpe_simple_vocab_16e6.txt.gz
        [--count 512] [--rounds 3] [--json FILE]

Both read the files, decode, preprocess, tokenize and encode in batches of 64. transformers' side prepares the next
batch in a thread while torch computes, like jaxmm, and pads texts to the longest of their batch. The arms are those of
`benchmarks.train_step`; quote `tuned`. Embeddings must agree before anything is timed.
"""

import argparse
import json
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.measure import Rounds, Worker, is_busy, machine, options, product_pace, seconds, serve, tuned_arms

BATCH = 64


def work(folder: Path) -> tuple[list[str], list[str]]:
    """Read the image paths and the texts."""
    inputs = json.loads((folder / "work.json").read_text())
    return inputs["pictures"], inputs["texts"]


def ours(folder: Path):
    from jaxmm.inference.model import load
    pictures, texts = work(folder)
    model = load(folder / "model")
    return lambda: (model.encode_image(pictures), model.encode_text(texts))


def theirs(folder: Path):
    import torch
    import transformers
    from PIL import Image

    pictures, texts = work(folder)
    model = transformers.CLIPModel.from_pretrained(folder / "model").eval()
    processor = transformers.CLIPProcessor.from_pretrained(folder / "model")

    def images(start):
        opened = [Image.open(path).convert("RGB") for path in pictures[start:start + BATCH]]
        return processor(images=opened, return_tensors="pt")

    def words(start):
        return processor(text=texts[start:start + BATCH], padding=True, truncation=True, return_tensors="pt")

    def run():
        result = []
        with torch.inference_mode(), ThreadPoolExecutor(1) as pool:
            for prepare, encode in ((images, model.get_image_features), (words, model.get_text_features)):
                rows, pending = [], pool.submit(prepare, 0)
                for start in range(0, len(pictures), BATCH):
                    batch, pending = pending.result(), pool.submit(prepare, start + BATCH)\
                        if start + BATCH < len(pictures) else None
                    out = encode(**batch)
                    rows.append(getattr(out, "pooler_output", out))
                embeddings = torch.cat(rows)
                result.append((embeddings / embeddings.norm(dim=-1, keepdim=True)).numpy())
        return tuple(result)

    return run


def worker(side: str, folder: Path) -> None:
    """Serve one side."""
    run = {"ours": ours, "theirs": theirs}[side](folder)
    image, text = run()
    serve({"check": [float(x) for x in np.concatenate([image[:, :4].ravel(), text[:, :4].ravel()])]},
          {"run": lambda: {"s": seconds(run)}, "pace": product_pace()})


def prepare(args, folder: Path) -> None:
    """Write the model with its vocabulary in a format that both load, and the inputs."""
    import jax

    from jaxmm.config import ImageConfig, TokenizerConfig
    from jaxmm.data.base import find_images
    from jaxmm.data.tokenizers import make_tokenizer
    from jaxmm.inference.model import Model
    from jaxmm.models.clip import clip
    from jaxmm.tasks.contrastive_learning import ContrastiveLearning
    pictures, text = find_images(args.pictures), Path(args.texts).read_text(encoding="utf-8")
    texts = ([row["caption"] for row in json.loads(text)["annotations"]] if args.texts.endswith(".json")
             else text.splitlines())[:args.count]
    if min(len(pictures), len(texts)) < args.count:
        sys.exit(f"there are {len(pictures)} pictures and {len(texts)} texts; expected {args.count}")
    step = len(pictures) // args.count
    (folder / "work.json").write_text(json.dumps({"pictures": pictures[::step][:args.count], "texts": texts}))
    task = ContrastiveLearning(model=clip("ViT-B-32", activation="quick_gelu"))
    tokenizer = make_tokenizer(TokenizerConfig(kind="clip", file=args.merges))
    params = jax.jit(task.init)(jax.random.key(0))
    Model(task=task, params=params, preprocessing=ImageConfig(), tokenizer=tokenizer).save(
        folder / "model", format="transformers")


def main():
    """Measure, print, record."""
    parser = options(__doc__)
    parser.add_argument("--pictures", help="a folder")
    parser.add_argument("--texts", help="COCO captions, or a file with one text per line")
    parser.add_argument("--merges", help="CLIP's vocabulary")
    parser.add_argument("--count", type=int, default=512)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker[0], Path(args.worker[1]))
        return
    busy = is_busy(args.force)
    about, rows = machine(), []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(args, folder)
        arms = tuned_arms(folder)
        workers = {f"{side} {arm}": Worker([sys.executable, "-m", "benchmarks.encoding", "--worker", side, temporary],
                                           env) for arm, env in arms.items() for side in ("theirs", "ours")}
        checks = [np.array(side.about["check"]) for side in workers.values()]
        difference = max(float(np.abs(check - checks[0]).max()) for check in checks)
        if not difference < 1e-2:  # decoded images may differ by one level of 255
            sys.exit(f"embeddings differ by {difference:.2g}; nothing was timed")
        rounds = Rounds(workers, workers["ours as installed"], 0.15)
        rounds.measure(args.rounds, args.rounds if args.force else 3 * args.rounds)
        for side in workers.values():
            side.close()
    for arm in arms:
        a, b = (rounds.median(f"{side} {arm}") for side in ("ours", "theirs"))
        rows.append({"arm": arm, "count": args.count, "ours_s": round(a, 3), "theirs_s": round(b, 3),
                     "ratio": round(b / a, 3), "difference": difference, "rounds": len(rounds.valid()), "busy": busy,
                     "machine": about})
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")
    table = Table(title=f"{args.count} images and {args.count} texts, {about['processor']}, {about['cores']} cores")
    for column in ("arm", "ours s", "theirs s", "ratio"):
        table.add_column(column)
    for row in rows:
        table.add_row(row["arm"], f"{row['ours_s']:.2f}", f"{row['theirs_s']:.2f}", f"{row['ratio']:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
