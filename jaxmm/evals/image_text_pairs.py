"""Embedded images and their texts, which of them match, and the ranks and recalls that follow.

The same image twice, or the same words under two images, are right answers for each other. A tie counts as a miss.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import csr_array

from jaxmm.config import Evaluator
from jaxmm.data.base import Source, record_texts
from jaxmm.data.eval_pipeline import eval_texts
from jaxmm.evals.context import Arrays, EvalContext, Outcomes, concatenate
from jaxmm.validation import require

TIE = np.float32(1e-6)
"""Cosines closer than this are equal: the resolution of a float32 dot product of unit vectors."""
CHUNK = 2**24
"""Most similarities in memory at once."""
DIRECTIONS = ("i2t", "t2i")


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """n embedded images and their m texts; the texts of an image follow each other."""

    image: Float[np.ndarray, "n e"]
    text: Float[np.ndarray, "m e"]
    tokens: Int[np.ndarray, "m t"]
    record: Int[np.ndarray, "n"]
    """Index in the source."""
    owner: Int[np.ndarray, "m"]
    """Row of the text's image."""
    image_number: Int[np.ndarray, "n"]
    """Equal for equal images."""
    text_number: Int[np.ndarray, "m"]
    """Equal for texts of the same words."""
    is_match: csr_array
    """[image numbers, text numbers], true if they belong together."""

    def cut(self, start: int, stop: int) -> "Pairs":
        """Return the images from `start` to `stop` and their texts."""
        rows, columns = slice(start, stop), slice(*np.searchsorted(self.owner, (start, stop)).tolist())
        return Pairs(image=self.image[rows], text=self.text[columns], tokens=self.tokens[columns],
                     record=self.record[rows], owner=self.owner[columns] - start, is_match=self.is_match,
                     image_number=self.image_number[rows], text_number=self.text_number[columns])

    def pools(self, size: int | None) -> Iterator["Pairs"]:
        """Yield runs of `size` images with their texts (None: all), without the remainder."""
        count = len(self.image)
        size = count if size is None else min(size, count)
        return (self.cut(start, start + size) for start in range(0, count - size + 1, size))

    def ranks(self, image_scores: Callable[[slice], np.ndarray], text_scores: Callable[[slice], np.ndarray],
              tie: np.float32 = TIE) -> tuple[Int[np.ndarray, "q"], Int[np.ndarray, "r"]]:
        """Return the best ranks of each image's texts and of each text's images.

        The scores are functions of a slice: images against all texts, and texts against all images.
        """
        return (best_ranks(image_scores, self.image_number, self.text_number, self.is_match, tie),
                best_ranks(text_scores, self.text_number, self.image_number, self.is_match.T.tocsr(), tie))


def check_ranks(pool: int | None, ks: tuple[int, ...]) -> None:
    """Raise `ConfigError` if the pool or a rank is out of range."""
    require(pool is None or pool > 1, "evals.pool", pool, "2 or more, or None")
    require(len(ks) > 0 and min(ks) > 0, "evals.ks", ks, "one positive number or more")


def check_pairs(evaluator: Evaluator, context: EvalContext, source: Source, pool: int | None) -> None:
    """Raise `ConfigError` if the source has no texts, or fewer images than a pool."""
    name = type(evaluator).__name__
    require(_has_texts(source), f"{name}.source", source.name, "a source whose images have texts")
    images = None if pool is None else len(context.sources.by_image(source))
    require(pool is None or pool <= images, f"{name}.pool", pool, f"at most the {images} images of {source.name!r}")


def _has_texts(source: Source) -> bool:
    for index in range(min(len(source), 100)):
        try:
            if record_texts(source, index):
                return True
        except Exception:                                      # the pipeline counts bad records
            continue
    return False


def recall_names(ks: tuple[int, ...], kind: str = "") -> tuple[str, ...]:
    """Return the names of the values that `recalls` returns."""
    return tuple(f"{direction}_{kind}recall@{k}" for direction in DIRECTIONS for k in ks)


def recalls(ranks: Iterable[tuple[np.ndarray, np.ndarray]], ks: tuple[int, ...]) -> list[float]:
    """Return the recalls at each of `ks` in both directions, averaged over the pools that `ranks` are of."""
    values = []
    for pools in zip(*ranks, strict=True):
        for k in ks:
            shares = [np.mean(pool < k) for pool in pools if len(pool)]
            values.append(float(np.mean(shares)) if shares else float("nan"))
    return values


def add_outcomes(context: EvalContext, ranks: Sequence[tuple[np.ndarray, np.ndarray]], ks: tuple[int, ...],
                 names: tuple[str, ...]) -> None:
    """Add what `recalls` averages to `context`, of every query; `names` are those of the recalls."""
    for direction, of_direction in enumerate(zip(*ranks, strict=True)):
        rank = np.concatenate(of_direction)
        own = names[direction * len(ks):]
        context.outcomes.append(Outcomes(values={name: rank < k for name, k in zip(own, ks, strict=False)}))


def embed_pairs(evaluator: Evaluator, context: EvalContext, source: Source, captions: str,
                encode: Callable[[Iterable], Iterator[tuple[Arrays, Arrays]]] | None = None) -> Pairs:
    """Return the images of `source` and their first or all `captions`, embedded.

    `encode` yields (predictions, batch) with `image` [b e] and, if a batch has tokens, `text` [b e]; None: the task's
    predictions.
    """
    first = captions == "first"
    if encode is None:
        def encode(batches):
            return context.predictions(evaluator, ("image", "text") if first else ("image",), batches)
    batches = context.batches(evaluator, source, context.tokenizer if first else None)
    result, batch = concatenate(encode(batches))
    image, record = result["image"], batch["index"]
    if first:
        text, texts, owner = result["text"], batch, np.arange(len(image))
    else:
        batches = eval_texts(source, context.tokenizer, context.batch_size(evaluator))
        result, texts = concatenate(context.predictions(evaluator, ("text",), batches))
        owner = np.minimum(np.searchsorted(record, texts["owner"]), len(record) - 1)
        readable = record[owner] == texts["owner"]         # the texts of unreadable images are left out
        text, owner = result["text"][readable], owner[readable]
        texts = {name: texts[name][readable] for name in ("tokens", "text_id")}
    image_number, text_number = _numbers(batch["image_id"]), _numbers(texts["text_id"])
    return Pairs(image=image, text=text, tokens=texts["tokens"], record=record, owner=owner, image_number=image_number,
                 text_number=text_number, is_match=match_table(image_number, text_number, owner))


def _numbers(ids: Int[np.ndarray, "n 2"]) -> Int[np.ndarray, "n"]:
    return np.unique(ids, axis=0, return_inverse=True)[1].reshape(-1)


def match_table(image_number: Int[np.ndarray, "n"], text_number: Int[np.ndarray, "m"], owner: Int[np.ndarray, "m"]
                ) -> csr_array:
    """Return [images, texts] by number, true if some text with these words belongs to that image."""
    shape = (image_number.max(initial=0) + 1, text_number.max(initial=0) + 1)
    return csr_array((np.ones(len(text_number), bool), (image_number[owner], text_number)), shape=shape)


def best_ranks(scores: Callable[[slice], Float[np.ndarray, "r m"]], query_number: Int[np.ndarray, "n"],
               item_number: Int[np.ndarray, "m"], is_match: csr_array, tie: np.float32 = TIE
               ) -> Int[np.ndarray, "q"]:
    """Return for each query with a matching item how many others score at least as high as its best match.

    `scores` returns a new array of a slice of the queries against all items; scores closer than `tie` are equal.
    `is_match` [query numbers, item numbers] says which items match. If the score of the best match is not finite, the
    rank is worse than any k.
    """
    ranks = [np.empty(0, np.int64)]
    for rows in chunks(len(query_number), len(item_number)):
        score = scores(rows)
        row, column = is_match[query_number[rows]][:, item_number].nonzero()
        correct = score[row, column]
        best = np.full(len(score), -np.inf, np.float32)
        np.maximum.at(best, row, np.where(np.isfinite(correct), correct, -np.inf))
        score[row, column] = -np.inf
        above = len(item_number) - np.count_nonzero(score < best[:, None] - tie, axis=1)     # NaN counts as above
        above = np.where(np.isfinite(best), above, np.iinfo(np.int64).max)
        ranks.append(above[np.unique(row)])
    return np.concatenate(ranks)


def chunks(queries: int, items: int) -> Iterator[slice]:
    """Yield slices of the queries whose scores against all `items` fit into memory."""
    rows = max(1, CHUNK // max(1, items))
    return (slice(start, start + rows) for start in range(0, queries, rows))
