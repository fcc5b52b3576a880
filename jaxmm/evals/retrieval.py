"""Retrieval recall between pictures and texts, in both directions."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import csr_array

from jaxmm.config import Evaluator, require
from jaxmm.data.base import Source, record_texts
from jaxmm.data.pipeline import eval_texts
from jaxmm.evals.context import (
    EvalContext,
    RetrievalExample,
    Retrieved,
    check,
    chosen_weights,
    embed,
    joined,
    picture_batches,
    spread,
    thumbnail,
)
from jaxmm.inference.batching import outputs, padded_batch_size, predict_fn

TIE = np.float32(1e-6)
"""Cosines closer than this are equal: what a float32 dot product of unit vectors can tell apart."""
CHUNK = 2**24
"""Similarities held at once."""


@dataclass(frozen=True, kw_only=True)
class PairEvaluator(Evaluator):
    """Base of what finds texts for pictures and pictures for texts, and takes recalls.

    The same picture twice, or the same words under two pictures, are right answers for each other. A tie counts
    as a miss.
    """

    pool: int | None = None
    """N-way protocol: the pictures are cut in order into pools of this many, recalls are averaged over the
    pools, a remainder is left out; None: all against all."""
    captions: Literal["first", "all"] = "all"
    """Texts of each picture that take part."""
    ks: tuple[int, ...] = (1, 5, 10)
    """Ranks at which the recall is taken."""
    kind: ClassVar[str] = ""
    """Part of the metrics' names."""
    asks: ClassVar[tuple[str, ...]] = ("image", "text")
    """What the task must predict."""

    def __post_init__(self):
        """Checks ranges."""
        super().__post_init__()
        require(self.pool is None or self.pool > 1, "evals.pool", self.pool, "2 or more, or None")
        require(len(self.ks) > 0 and min(self.ks) > 0, "evals.ks", self.ks, "one positive number or more")

    def check(self, context: EvalContext) -> Source:
        """The source measured on; raises `ConfigError` where this cannot run."""
        source, name = check(self, context, *self.asks, tokenizer=True), type(self).__name__
        require(_has_texts(source), f"{name}.source", source.name, "a source whose pictures have texts")
        require(self.pool is None or self.pool <= len(source), f"{name}.pool", self.pool,
                f"at most the {len(source)} pictures of {source.name!r}")
        return source

    def metrics(self, context: EvalContext) -> tuple[str, ...]:
        """The names that `run` yields."""
        return tuple(self._name(way, k) for way in ("i2t", "t2i") for k in self.ks)

    def _name(self, way: str, k: int) -> str:
        return f"{self.prefix}/{way}_{self.kind}recall@{k}"

    def pools(self, pairs: "Pairs") -> Iterator["Pairs"]:
        """`pairs` cut into pools."""
        count = len(pairs.image)
        pool = count if self.pool is None else min(self.pool, count)
        return (pairs.cut(start, start + pool) for start in range(0, count - pool + 1, pool))

    def recalls(self, ranks: Iterable[tuple[Int[np.ndarray, "q"], Int[np.ndarray, "r"]]]
                ) -> Iterator[tuple[str, float]]:
        """Metric names and values, from the pools' ranks of pictures' texts and of texts' pictures."""
        for way, found in zip(("i2t", "t2i"), zip(*ranks, strict=True), strict=True):
            for k in self.ks:
                shares = [np.mean(pool < k) for pool in found if len(pool)]
                yield self._name(way, k), float(np.mean(shares)) if shares else float("nan")


@dataclass(frozen=True, kw_only=True)
class Retrieval(PairEvaluator):
    """Yields `i2t_recall@k`, one of a picture's texts is among the k nearest, and `t2i_recall@k`, its picture is."""

    examples: int = 6
    """Queries in each direction added to the report."""

    def run(self, context: EvalContext) -> Iterator[tuple[str, float]]:
        """Yields metric names and values."""
        source = self.check(context)
        pairs = embed_pairs(self, source, context)
        if self.examples:
            context.examples.extend(_examples(source, next(self.pools(pairs)), self.examples))
        yield from self.recalls(
            (best_rank(pool.image, pool.text, pool.picture, pool.words, pool.right),
             best_rank(pool.text, pool.image, pool.words, pool.picture, pool.right.T.tocsr()))
            for pool in self.pools(pairs))


def _has_texts(source: Source) -> bool:
    for index in range(min(len(source), 100)):
        try:
            if record_texts(source, index):
                return True
        except Exception:                                      # a bad record is the pipeline's to count
            continue
    return False


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """n embedded pictures and their m texts, a picture's texts one after the other."""

    image: Float[np.ndarray, "n e"]
    text: Float[np.ndarray, "m e"]
    tokens: Int[np.ndarray, "m t"]
    record: Int[np.ndarray, "n"]
    """Index in the source."""
    owner: Int[np.ndarray, "m"]
    """Row of the text's picture."""
    picture: Int[np.ndarray, "n"]
    """Equal numbers: the same picture."""
    words: Int[np.ndarray, "m"]
    """Equal numbers: the same words."""
    right: csr_array
    """Whether a picture's number goes with a words' number."""

    def cut(self, start: int, stop: int) -> "Pairs":
        """Pictures from `start` to `stop` and their texts."""
        rows, columns = slice(start, stop), slice(*np.searchsorted(self.owner, (start, stop)).tolist())
        return Pairs(image=self.image[rows], text=self.text[columns], tokens=self.tokens[columns],
                     record=self.record[rows], owner=self.owner[columns] - start, picture=self.picture[rows],
                     words=self.words[columns], right=self.right)


def embed_pairs(
    evaluator: PairEvaluator, source: Source, context: EvalContext, see: Callable[..., Iterator] | None = None
) -> Pairs:
    """The pictures of `source` and their texts, embedded.

    `see` makes (predictions, batch) of parameters and batches, with `image` [b e] and, where a batch has tokens, `text`
    [b e] among the predictions; None: as the task predicts them.
    """
    mesh, params, first = context.mesh, chosen_weights(evaluator, context), evaluator.captions == "first"
    size = padded_batch_size(evaluator.batch_size, mesh)
    if see is None:
        see = partial(outputs, predict_fn(context.task, ("image", "text") if first else ("image",), mesh), mesh=mesh)
    result, batch = joined(see(params, batches=picture_batches(
        source, context, size, context.tokenizer if first else None)))
    image, record = result["image"], batch["index"]
    if first:
        text, words, owner = result["text"], batch, np.arange(len(image))
    else:
        texts = eval_texts(source, context.tokenizer, size)
        result, words = embed(predict_fn(context.task, ("text",), mesh), params, texts, mesh)
        owner = np.minimum(np.searchsorted(record, words["owner"]), len(record) - 1)
        kept = record[owner] == words["owner"]         # the texts of unreadable pictures are left out
        text, owner = result["text"][kept], owner[kept]
        words = {name: words[name][kept] for name in ("tokens", "text_id")}
    picture, number = _numbered(batch["image_id"]), _numbered(words["text_id"])
    return Pairs(image=image, text=text, tokens=words["tokens"], record=record, owner=owner, picture=picture,
                 words=number, right=right_answers(picture, number, owner))


def _numbered(ids: Int[np.ndarray, "n 2"]) -> Int[np.ndarray, "n"]:
    return np.unique(ids, axis=0, return_inverse=True)[1].reshape(-1)


def right_answers(picture: Int[np.ndarray, "n"], words: Int[np.ndarray, "m"], owner: Int[np.ndarray, "m"]
                  ) -> csr_array:
    """[pictures, words] by number, true where some text with these words belongs to that picture."""
    shape = (picture.max(initial=0) + 1, words.max(initial=0) + 1)
    return csr_array((np.ones(len(words), bool), (picture[owner], words)), shape=shape)


def best_rank(queries: Float[np.ndarray, "n e"], items: Float[np.ndarray, "m e"],
              query_id: Int[np.ndarray, "n"], item_id: Int[np.ndarray, "m"], right: csr_array
              ) -> Int[np.ndarray, "q"]:
    """For each query with a right item, how many wrong ones are at least as near as the nearest right one.

    `right` [query ids, item ids] says which items are. Where that similarity is not finite, the rank is worse
    than any k.
    """
    return best_rank_of(lambda rows: queries[rows] @ items.T, query_id, item_id, right, TIE)


def best_rank_of(scores: Callable[[slice], Float[np.ndarray, "r m"]], query_id: Int[np.ndarray, "n"],
                 item_id: Int[np.ndarray, "m"], right: csr_array, tie: np.float32) -> Int[np.ndarray, "q"]:
    """As `best_rank`, by the `scores` of a slice of the queries, a new array; closer than `tie` is equal."""
    ranks = [np.empty(0, np.int64)]
    for rows in chunks(len(query_id), len(item_id)):
        score = scores(rows)
        row, column = right[query_id[rows]][:, item_id].nonzero()
        correct = score[row, column]
        best = np.full(len(score), -np.inf, np.float32)
        np.maximum.at(best, row, np.where(np.isfinite(correct), correct, -np.inf))
        score[row, column] = -np.inf
        above = len(item_id) - np.count_nonzero(score < best[:, None] - tie, axis=1)     # NaN counts as above
        above = np.where(np.isfinite(best), above, np.iinfo(np.int64).max)
        ranks.append(above[np.unique(row)])
    return np.concatenate(ranks)


def chunks(queries: int, items: int) -> Iterator[slice]:
    """The queries, so many at a time that their similarities with all `items` fit into memory."""
    rows = max(1, CHUNK // max(1, items))
    return (slice(start, start + rows) for start in range(0, queries, rows))


def _examples(source: Source, pairs: Pairs, count: int) -> Iterator[RetrievalExample]:
    """Queries in both directions, spread over `pairs`, with the nearest three texts or five pictures."""
    position = np.arange(len(pairs.owner)) - np.searchsorted(pairs.owner, pairs.owner)

    def words(j):
        return record_texts(source, int(pairs.record[pairs.owner[j]]))[position[j]]

    def picture(i):
        return thumbnail(source, int(pairs.record[i]))

    def results(similarity, correct, item, top):
        return tuple(Retrieved(item=item(k), score=float(similarity[k]), right=bool(correct[k]))
                     for k in np.argsort(-similarity, kind="stable")[:top])

    for i in spread(len(pairs.image), count):
        correct = pairs.right[[pairs.picture[i]]].toarray()[0][pairs.words]
        yield RetrievalExample(query=picture(i), results=results(pairs.text @ pairs.image[i], correct, words, 3))
    for j in spread(len(pairs.text), count):
        correct = pairs.right[:, [pairs.words[j]]].toarray()[:, 0][pairs.picture]
        yield RetrievalExample(query=words(j), results=results(pairs.image @ pairs.text[j], correct, picture, 5))
