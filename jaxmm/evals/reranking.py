"""Retrieval recall where a model that matches has looked at the best of what the embeddings found."""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, ClassVar, Literal

import numpy as np
from jaxtyping import Float, Int

from jaxmm.config import require
from jaxmm.evals.context import EvalContext, chosen_weights
from jaxmm.evals.retrieval import PairEvaluator, Pairs, best_rank_of, chunks, embed_pairs
from jaxmm.inference.batching import outputs
from jaxmm.inference.matching import make_image_encoder, match_pairs

TIE = np.float32(1e-5)
"""Scores closer than this are equal: what sums in float32, in another order, leave of logits."""


@dataclass(frozen=True, kw_only=True)
class Reranking(PairEvaluator):
    """Yields `i2t_itm_recall@k` and `t2i_itm_recall@k`: the matching head orders what is nearest by cosine.

    What is not among the candidates comes behind all that are (Li et al. 2021, ALBEF, section 3.4, and BLIP's code).
    """

    candidates: int = 16
    """Nearest by cosine of each query that the head looks at. BLIP: 256 on COCO, 128 on Flickr30K."""
    score: Literal["itm+itc", "itm"] = "itm+itc"
    """What orders them: the logit of "belong together", with the cosine added as BLIP does, or alone."""
    kind: ClassVar = "itm_"
    asks: ClassVar = ("image", "text", "match")

    def __post_init__(self):
        """Checks ranges."""
        super().__post_init__()
        require(self.candidates >= max(self.ks), "evals.candidates", self.candidates,
                f"at least the largest of evals.ks = {self.ks}")

    def run(self, context: EvalContext) -> Iterator[tuple[str, float]]:
        """Yields metric names and values."""
        source, task, mesh = self.check(context), context.task, context.mesh
        with tempfile.TemporaryFile() as file:
            kept = Kept(file)
            pairs = embed_pairs(self, source, context, lambda params, batches: kept.taken(
                outputs(make_image_encoder(task, mesh), params, batches, mesh)))
            seen = kept.array()
            yield from self.recalls(self._ranks(pool, seen[i * len(pool.image):], context)
                                    for i, pool in enumerate(self.pools(pairs)))

    def _ranks(self, pool: Pairs, seen: Float[np.ndarray, "n s c"], context: EvalContext
               ) -> tuple[Int[np.ndarray, "q"], Int[np.ndarray, "r"]]:
        """The ranks of the pictures' texts and of the texts' pictures. A pair that both ask for is matched once."""
        texts, i2t_cosine = nearest(pool.image, pool.text, self.candidates)
        pictures, t2i_cosine = nearest(pool.text, pool.image, self.candidates)
        n, m = len(pool.image), len(pool.text)
        number = np.concatenate([(np.arange(n)[:, None] * m + texts).ravel(),
                                 (pictures * m + np.arange(m)[:, None]).ravel()])
        pairs, place = np.unique(number, return_inverse=True)
        logits = match_pairs(context.task, chosen_weights(self, context), seen, pool.tokens, *np.divmod(pairs, m),
                             context.mesh)[:, 1][place]
        i2t, t2i = logits[:texts.size].reshape(texts.shape), logits[texts.size:].reshape(pictures.shape)
        if self.score == "itm+itc":
            i2t, t2i = i2t + i2t_cosine, t2i + t2i_cosine
        return (best_rank_of(lambda rows: scattered(texts[rows], i2t[rows], m), pool.picture, pool.words, pool.right,
                             TIE),
                best_rank_of(lambda rows: scattered(pictures[rows], t2i[rows], n), pool.words, pool.picture,
                             pool.right.T.tocsr(), TIE))


class Kept:
    """Pictures' tokens in a file: they are many times what the pictures are, and the system gives them the memory that
    nobody else needs."""

    def __init__(self, file: BinaryIO):
        self.file, self.dtype, self.shape = file, np.dtype(np.float32), (0, 0, 0)

    def taken(self, found: Iterator[tuple[dict[str, np.ndarray], Any]]) -> Iterator[tuple[dict[str, np.ndarray], Any]]:
        """What is `found`, without `seen` [b s c], which is written down."""
        for result, batch in found:
            seen = result.pop("image_tokens")
            self.file.write(seen.tobytes())
            self.dtype, self.shape = seen.dtype, (self.shape[0] + len(seen), *seen.shape[1:])
            yield result, batch

    def array(self) -> Float[np.ndarray, "n s c"]:
        """All of it."""
        self.file.flush()
        return np.memmap(self.file, self.dtype, "r", shape=self.shape)


def nearest(queries: Float[np.ndarray, "q e"], items: Float[np.ndarray, "m e"], count: int
            ) -> tuple[Int[np.ndarray, "q k"], Float[np.ndarray, "q k"]]:
    """The numbers of the `count` items (or all) with the highest products with each query, unordered; and these."""
    count = min(count, len(items))
    found = np.zeros((len(queries), count), np.int64), np.zeros((len(queries), count), np.float32)
    for rows in chunks(len(queries), len(items)):
        similarity = queries[rows] @ items.T
        if count < len(items):
            found[0][rows] = np.argpartition(-similarity, count - 1, axis=1)[:, :count]     # NaN comes last
        else:
            found[0][rows] = np.arange(count)
        found[1][rows] = np.take_along_axis(similarity, found[0][rows], axis=1)
    return found


def scattered(place: Int[np.ndarray, "q k"], score: Float[np.ndarray, "q k"], items: int) -> Float[np.ndarray, "q m"]:
    """The scores at their places among `items`, below all others where there is none."""
    full = np.full((len(place), items), -np.inf, np.float32)
    np.put_along_axis(full, place, score, axis=1)
    return full


