"""Retrieval recall after a matching head has ordered the nearest candidates by cosine (ITM re-ranking)."""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, ClassVar, Literal

import numpy as np
from jaxtyping import Float, Int

from jaxmm.config import Evaluator
from jaxmm.data.base import Source
from jaxmm.evals.context import Arrays, EvalContext
from jaxmm.evals.image_text_pairs import (
    Pairs,
    add_outcomes,
    check_pairs,
    check_ranks,
    chunks,
    embed_pairs,
    recall_names,
    recalls,
)
from jaxmm.inference.matching import make_image_encoder, match_pairs
from jaxmm.validation import require

TIE = np.float32(1e-5)
"""Scores closer than this are equal: float32 logits differ by as much if they are summed in another order."""


@dataclass(frozen=True, kw_only=True)
class Reranking(Evaluator):
    """Measures `i2t_itm_recall@k` and `t2i_itm_recall@k`: the matching head orders the nearest by cosine.

    Items that are not candidates rank behind all candidates (Li et al. 2021, ALBEF, section 3.4, and BLIP's code).
    """

    pool: int | None = None
    """N-way protocol: the images are cut in order into pools of this many, recalls are averaged over the pools, a
    remainder is left out; None: all against all."""
    captions: Literal["first", "all"] = "all"
    """Texts of each image that take part."""
    ks: tuple[int, ...] = (1, 5, 10)
    """Ranks at which the recall is taken."""
    candidates: int = 16
    """Nearest items by cosine of each query that the head scores. BLIP: 256 on COCO, 128 on Flickr30K."""
    score: Literal["itm+itc", "itm"] = "itm+itc"
    """Order of the candidates: the logit of "belong together", with the cosine added as BLIP does, or alone."""
    needs: ClassVar = ("embeds images", "embeds texts", "matches images and texts")
    reads_text: ClassVar = True

    def __post_init__(self):
        """Check ranges."""
        super().__post_init__()
        check_ranks(self.pool, self.ks)
        require(self.candidates >= max(self.ks), "evals.candidates", self.candidates,
                f"at least the largest of evals.ks = {self.ks}")

    def validate(self, context: EvalContext, source: Source) -> None:
        """Raise `ConfigError` if the source has no texts, or fewer images than a pool."""
        check_pairs(self, context, source, self.pool)

    def names(self, source: Source) -> tuple[str, ...]:
        """Return the names of the metrics."""
        return recall_names(self.ks, "itm_")

    def measure(self, context: EvalContext, source: Source) -> list[float]:
        """Return the recalls."""
        source = context.sources.by_image(source)
        encoder = make_image_encoder(context.task, context.mesh)
        with tempfile.TemporaryFile() as file:
            spilled = SpilledTokens(file)
            pairs = embed_pairs(self, context, source, self.captions,
                                lambda batches: spilled.take(context.outputs(self, encoder, batches)))
            tokens = spilled.array()
            ranks = [self._ranks(pool, tokens[i * len(pool.image):], context)
                     for i, pool in enumerate(pairs.pools(self.pool))]
        add_outcomes(context, ranks, self.ks, self.names(source))
        return recalls(ranks, self.ks)

    def _ranks(self, pool: Pairs, image_tokens: Float[np.ndarray, "n s c"], context: EvalContext
               ) -> tuple[Int[np.ndarray, "q"], Int[np.ndarray, "r"]]:
        """Return the ranks of images' texts and of texts' images. A pair in both lists of candidates is matched once.
        """
        texts, i2t_cosine = top_k(pool.image, pool.text, self.candidates)
        images, t2i_cosine = top_k(pool.text, pool.image, self.candidates)
        n, m = len(pool.image), len(pool.text)
        number = np.concatenate([(np.arange(n)[:, None] * m + texts).ravel(),
                                 (images * m + np.arange(m)[:, None]).ravel()])
        pairs, place = np.unique(number, return_inverse=True)
        logits = match_pairs(context.task, context.weights_of(self), image_tokens, pool.tokens, *np.divmod(pairs, m),
                             context.mesh)[:, 1][place]
        i2t, t2i = logits[:texts.size].reshape(texts.shape), logits[texts.size:].reshape(images.shape)
        if self.score == "itm+itc":
            i2t, t2i = i2t + i2t_cosine, t2i + t2i_cosine
        return pool.ranks(lambda rows: scatter_scores(texts[rows], i2t[rows], m),
                          lambda rows: scatter_scores(images[rows], t2i[rows], n), TIE)


class SpilledTokens:
    """Image tokens spilled to a memory-mapped temporary file; they are much larger than the images."""

    def __init__(self, file: BinaryIO):
        self.file, self.dtype, self.shape = file, np.dtype(np.float32), (0, 0, 0)

    def take(self, outputs: Iterator[tuple[Arrays, Arrays]]) -> Iterator[tuple[Arrays, Arrays]]:
        """Yield `outputs` without `image_tokens` [b s c], which are written to the file."""
        for result, batch in outputs:
            tokens = result.pop("image_tokens")
            self.file.write(tokens.tobytes())
            self.dtype, self.shape = tokens.dtype, (self.shape[0] + len(tokens), *tokens.shape[1:])
            yield result, batch

    def array(self) -> Float[np.ndarray, "n s c"]:
        """Return all tokens, memory-mapped."""
        self.file.flush()
        return np.memmap(self.file, self.dtype, "r", shape=self.shape)


def top_k(queries: Float[np.ndarray, "q e"], items: Float[np.ndarray, "m e"], count: int
          ) -> tuple[Int[np.ndarray, "q k"], Float[np.ndarray, "q k"]]:
    """Return the numbers of the `count` items (or all) with the highest products with each query, unordered, and the
    products."""
    count = min(count, len(items))
    numbers, products = np.zeros((len(queries), count), np.int64), np.zeros((len(queries), count), np.float32)
    for rows in chunks(len(queries), len(items)):
        similarity = queries[rows] @ items.T
        if count < len(items):
            numbers[rows] = np.argpartition(-similarity, count - 1, axis=1)[:, :count]     # NaN comes last
        else:
            numbers[rows] = np.arange(count)
        products[rows] = np.take_along_axis(similarity, numbers[rows], axis=1)
    return numbers, products


def scatter_scores(place: Int[np.ndarray, "q k"], score: Float[np.ndarray, "q k"], items: int
                   ) -> Float[np.ndarray, "q m"]:
    """Return the scores at their places among `items`, -inf elsewhere."""
    full = np.full((len(place), items), -np.inf, np.float32)
    np.put_along_axis(full, place, score, axis=1)
    return full
