"""Retrieval recall between images and texts, in both directions."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal

import numpy as np

from jaxmm.config import Evaluator
from jaxmm.data.base import Source, record_texts
from jaxmm.evals.by_image import original_records
from jaxmm.evals.context import EvalContext, RetrievalExample, Retrieved, evenly_spaced, thumbnail
from jaxmm.evals.image_text_pairs import (
    Pairs,
    add_outcomes,
    check_pairs,
    check_ranks,
    embed_pairs,
    recall_names,
    recalls,
)


@dataclass(frozen=True, kw_only=True)
class Retrieval(Evaluator):
    """Measures `i2t_recall@k`, one of an image's texts is among the k nearest, and `t2i_recall@k`, its image is."""

    pool: int | None = None
    """N-way protocol: the images are cut in order into pools of this many, recalls are averaged over the pools, a
    remainder is left out; None: all against all."""
    captions: Literal["first", "all"] = "all"
    """Texts of each image that take part."""
    ks: tuple[int, ...] = (1, 5, 10)
    """Ranks at which the recall is taken."""
    examples: int = 6
    """Queries in each direction added to the report."""
    needs: ClassVar = ("embeds images", "embeds texts")
    reads_text: ClassVar = True

    def __post_init__(self):
        """Check ranges."""
        super().__post_init__()
        check_ranks(self.pool, self.ks)

    def validate(self, context: EvalContext, source: Source) -> None:
        """Raise `ConfigError` if the source has no texts, or fewer images than a pool."""
        check_pairs(self, context, source, self.pool)

    def names(self, source: Source) -> tuple[str, ...]:
        """Return the names of the metrics."""
        return recall_names(self.ks)

    def measure(self, context: EvalContext, source: Source) -> list[float]:
        """Return the recalls."""
        source = context.sources.by_image(source)
        pairs = embed_pairs(self, context, source, self.captions)
        if self.examples:
            context.examples.extend(_examples(source, next(pairs.pools(self.pool)), self.examples))
        ranks = [by_cosine(pool) for pool in pairs.pools(self.pool)]
        add_outcomes(context, ranks, self.ks, self.names(source))
        if len(ranks) == 1 and len(ranks[0][0]) == len(pairs.image):                # every image has a text
            context.outcomes[-2] = replace(context.outcomes[-2], index=original_records(source, pairs.record),
                                           describe=partial(_describe, source, pairs))
        return recalls(ranks, self.ks)


def by_cosine(pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
    """Return the ranks of images' texts and of texts' images by their cosines."""
    return pairs.ranks(lambda rows: pairs.image[rows] @ pairs.text.T, lambda rows: pairs.text[rows] @ pairs.image.T)


def _examples(source: Source, pairs: Pairs, count: int) -> Iterator[RetrievalExample]:
    """Yield evenly spaced queries in both directions, with the nearest three texts or five images."""
    text = partial(_text, source, pairs)

    def image(i):
        return thumbnail(source, int(pairs.record[i]))

    def results(similarity, correct, item, top):
        return tuple(Retrieved(item=item(int(k)), score=float(similarity[k]), right=bool(correct[k]))
                     for k in np.argsort(-similarity, kind="stable")[:top])

    for i in evenly_spaced(len(pairs.image), count):
        correct = pairs.is_match[[pairs.image_number[i]]].toarray()[0][pairs.text_number]
        yield RetrievalExample(query=image(i), results=results(pairs.text @ pairs.image[i], correct, text, 3))
    for j in evenly_spaced(len(pairs.text), count).tolist():
        correct = pairs.is_match[:, [pairs.text_number[j]]].toarray()[:, 0][pairs.image_number]
        yield RetrievalExample(query=text(j), results=results(pairs.image @ pairs.text[j], correct, image, 5))


def _text(source: Source, pairs: Pairs, number: int) -> str:
    """Return a text by its number among `pairs`."""
    owner = pairs.owner[number]
    return record_texts(source, int(pairs.record[owner]))[number - np.searchsorted(pairs.owner, owner)]


def _describe(source: Source, pairs: Pairs, row: int) -> tuple[str, str]:
    """Return the first text of an image, and the text that is nearest to it."""
    return (record_texts(source, int(pairs.record[row]))[0],
            _text(source, pairs, int(np.argmax(pairs.text @ pairs.image[row]))))
