"""Retrieval recall between pictures and texts, in both directions."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import csr_array

from jaxmm.config import Evaluator, require
from jaxmm.data.pipeline import eval_batches, eval_texts
from jaxmm.data.sources import Source, record_texts
from jaxmm.evals.common import (
    EvalContext,
    RetrievalExample,
    Retrieved,
    check,
    chosen_weights,
    embed,
    predict_fn,
    spread,
    thumbnail,
    whole_batch,
)

TIE = np.float32(1e-6)
"""Cosines closer than this are equal: what a float32 dot product of unit vectors can tell apart."""
CHUNK = 2**24
"""Similarities held at once."""


@dataclass(frozen=True, kw_only=True)
class Retrieval(Evaluator):
    """Yields `i2t_recall@k`, one of a picture's texts is among the k nearest, and `t2i_recall@k`, its picture is.

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
    examples: int = 6
    """Queries in each direction added to the report."""

    def __post_init__(self):
        """Checks ranges."""
        super().__post_init__()
        require(self.pool is None or self.pool > 1, "evals.pool", self.pool, "2 or more, or None")
        require(len(self.ks) > 0 and min(self.ks) > 0, "evals.ks", self.ks, "one positive number or more")

    def check(self, context: EvalContext) -> Source:
        """The source measured on; raises `ConfigError` where this cannot run."""
        source = check(self, context, "image", "text", tokenizer=True)
        require(_has_texts(source), "Retrieval.source", source.name, "a source whose pictures have texts")
        require(self.pool is None or self.pool <= len(source), "Retrieval.pool", self.pool,
                f"at most the {len(source)} pictures of {source.name!r}")
        return source

    def metrics(self, context: EvalContext) -> tuple[str, ...]:
        """The names that `run` yields."""
        return tuple(f"{self.prefix}/{way}_recall@{k}" for way in ("i2t", "t2i") for k in self.ks)

    def run(self, context: EvalContext) -> Iterator[tuple[str, float]]:
        """Yields metric names and values."""
        source, params = self.check(context), chosen_weights(self, context)
        pairs = _embed(source, params, context, self.batch_size, self.captions)
        count = len(pairs.image)
        pool = count if self.pool is None else min(self.pool, count)
        hits = {(way, k): [] for way in ("i2t", "t2i") for k in self.ks}
        for start in range(0, count - pool + 1, pool):
            part = pairs.cut(start, start + pool)
            ranks = {"i2t": best_rank(part.image, part.text, part.picture, part.words, part.right),
                     "t2i": best_rank(part.text, part.image, part.words, part.picture, part.right.T.tocsr())}
            for way, k in hits:
                if len(ranks[way]):
                    hits[way, k].append(np.mean(ranks[way] < k))
            if start == 0 and self.examples:
                context.examples.extend(_examples(source, part, self.examples))
        for (way, k), shares in hits.items():
            yield f"{self.prefix}/{way}_recall@{k}", float(np.mean(shares)) if shares else float("nan")


def _has_texts(source: Source) -> bool:
    for index in range(min(len(source), 100)):
        try:
            if record_texts(source, index):
                return True
        except Exception:                                      # a bad record is the pipeline's to count
            continue
    return False


@dataclass(frozen=True, kw_only=True)
class _Pairs:
    """n embedded pictures and their m texts, a picture's texts one after the other."""

    image: Float[np.ndarray, "n e"]
    text: Float[np.ndarray, "m e"]
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

    def cut(self, start: int, stop: int) -> "_Pairs":
        """Pictures from `start` to `stop` and their texts."""
        rows, columns = slice(start, stop), slice(*np.searchsorted(self.owner, (start, stop)).tolist())
        return _Pairs(image=self.image[rows], text=self.text[columns], record=self.record[rows],
                      owner=self.owner[columns] - start, picture=self.picture[rows], words=self.words[columns],
                      right=self.right)


def _embed(source, params, context, batch_size, captions) -> _Pairs:
    mesh, size = context.mesh, whole_batch(batch_size, context.mesh)
    if captions == "first":
        batches = eval_batches(source, context.data, size, context.tokenizer)
        result, batch = embed(predict_fn(context.task, ("image", "text"), mesh), params, batches, mesh)
        image, text, text_id, record = result["image"], result["text"], batch["text_id"], batch["index"]
        owner = np.arange(len(image))
    else:
        batches = eval_batches(source, context.data, size)
        result, batch = embed(predict_fn(context.task, ("image",), mesh), params, batches, mesh)
        image, record = result["image"], batch["index"]
        texts = eval_texts(source, context.tokenizer, size)
        result, words = embed(predict_fn(context.task, ("text",), mesh), params, texts, mesh)
        owner = np.minimum(np.searchsorted(record, words["owner"]), len(record) - 1)
        kept = record[owner] == words["owner"]         # the texts of unreadable pictures are left out
        text, text_id, owner = result["text"][kept], words["text_id"][kept], owner[kept]
    picture, words = _numbered(batch["image_id"]), _numbered(text_id)
    return _Pairs(image=image, text=text, record=record, owner=owner, picture=picture, words=words,
                  right=right_answers(picture, words, owner))


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
    ranks, rows = [np.empty(0, np.int64)], max(1, CHUNK // max(1, len(items)))
    for start in range(0, len(queries), rows):
        similarity = queries[start:start + rows] @ items.T
        row, column = right[query_id[start:start + rows]][:, item_id].nonzero()
        correct = similarity[row, column]
        best = np.full(len(similarity), -np.inf, np.float32)
        np.maximum.at(best, row, np.where(np.isfinite(correct), correct, -np.inf))
        similarity[row, column] = -np.inf
        above = len(items) - np.count_nonzero(similarity < best[:, None] - TIE, axis=1)     # NaN counts as above
        above = np.where(np.isfinite(best), above, np.iinfo(np.int64).max)
        ranks.append(above[np.unique(row)])
    return np.concatenate(ranks)


def _examples(source: Source, pairs: _Pairs, count: int) -> Iterator[RetrievalExample]:
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
