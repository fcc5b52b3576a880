"""Retrieval baselines without a vision model: chance, and a ridge regression from words to pixels.

    python -m benchmarks.caption_baseline captions:train.jsonl captions:test.jsonl [--run WORKDIR]

The regression maps a bag of words to the image resized to 16 x 16 pixels; a text's predicted pixels are compared with
the held-out images by cosine after subtracting the mean training image. Recall ranks all test pairs by the rule of
`jaxmm.evals.Retrieval` (first captions; equal texts or images are correct answers for each other). With `--run`, the
last evaluation in that workdir's metrics.jsonl is shown too.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import RidgeCV

from jaxmm.data.images import decode
from jaxmm.data.rows import image_id, text_id
from jaxmm.data.sources.registry import open_source
from jaxmm.evals.image_text_pairs import best_ranks, match_table

KS = (1, 5, 10)


def read(spec: str, side: int):
    """Read pixels [n, side * side * 3] in 0 to 1, first captions, and ids of equal images and equal texts."""
    records = [record for record in open_source(spec) if record.get("texts")]
    pixels = [np.asarray(decode(r["image"]).resize((side, side)), np.float32).ravel() / 255 for r in records]
    texts = [r["texts"][0] for r in records]
    ids = [np.unique(np.stack(part), axis=0, return_inverse=True)[1].ravel()
           for part in ([image_id(r) for r in records], [text_id(t) for t in texts])]
    return np.stack(pixels), texts, *ids


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def recalls(image: np.ndarray, text: np.ndarray, picture: np.ndarray, words: np.ndarray) -> dict[str, float]:
    is_match = match_table(picture, words, np.arange(len(words)))
    ranks = {"i2t": best_ranks(lambda rows: image[rows] @ text.T, picture, words, is_match),
             "t2i": best_ranks(lambda rows: text[rows] @ image.T, words, picture, is_match.T.tocsr())}
    return {f"{way}@{k}": float(np.mean(ranks[way] < k)) for way in ranks for k in KS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train")
    parser.add_argument("val")
    parser.add_argument("--run", type=Path, help="a workdir whose last evaluation is shown too")
    parser.add_argument("--side", type=int, default=16, help="side of the resized images (default: 16)")
    arguments = parser.parse_args()

    pixels, texts, *_ = read(arguments.train, arguments.side)
    val_pixels, val_texts, picture, words = read(arguments.val, arguments.side)
    bag = CountVectorizer(token_pattern=r"\w+")
    mean = pixels.mean(0)
    ridge = RidgeCV(alphas=(0.3, 1, 3, 10, 30, 100)).fit(bag.fit_transform(texts).toarray(), pixels - mean)
    predicted = ridge.predict(bag.transform(val_texts).toarray())
    n = len(val_texts)
    rows = {"chance": {f"{way}@{k}": min(1.0, k / n) for way in ("i2t", "t2i") for k in KS},
            f"ridge on words (alpha {ridge.alpha_:g})": recalls(unit(val_pixels - mean), unit(predicted), picture,
                                                                words)}
    if arguments.run:
        lines = [json.loads(line) for line in (arguments.run / "metrics.jsonl").read_text().splitlines()]
        last = next(line for line in reversed(lines) if "val/i2t_recall@1" in line)
        rows[f"jaxmm, step {last['step']}"] = {f"{way}@{k}": last[f"val/{way}_recall@{k}"]
                                               for way in ("i2t", "t2i") for k in KS}
    columns = list(next(iter(rows.values())))
    table = Table("recall among all pairs", *columns, title=f"{n} held-out pairs, {len(texts)} training pairs")
    for name, row in rows.items():
        table.add_row(name, *(f"{row[column]:.3f}" for column in columns))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
