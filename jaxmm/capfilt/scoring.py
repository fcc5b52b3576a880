"""The second stage: score how well each text belongs to its image, by models that match or embed.

An image is decoded once for all filters, and encoded once by each of them for all of its texts.
"""

import keyword
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh
from scipy.special import expit

from jaxmm.capfilt.formulas import QUANTILE
from jaxmm.capfilt.image_batches import BATCH, grouped, padded, read_images
from jaxmm.capfilt.synthetic_captions import Done
from jaxmm.capfilt.tables import COLUMNS, Texts
from jaxmm.data.base import DataError, Source
from jaxmm.inference.batching import power_of_two, predict_fn
from jaxmm.inference.matching import make_image_encoder, match_pairs
from jaxmm.inference.model import Model
from jaxmm.task import capabilities
from jaxmm.validation import require

_NAMED = re.compile(r"([A-Za-z]\w*)=(.+)", re.DOTALL)


class Filter(NamedTuple):
    """A model that scores texts, and the columns of its scores."""

    model: Model
    match: str | None
    """Column of the probability that text and image belong together; None: the model does not match."""
    cosine: str | None
    """Column of the cosine of text and image; None: there is none."""


def split_name(spec: str) -> tuple[str | None, str]:
    """Return the name and the model of NAME=MODEL; a model without a name has the scores itm and itc.

    Raise `ConfigError` for a name that cannot be that of a score.
    """
    named = _NAMED.fullmatch(spec)
    if not named:
        return None, spec
    name, model = named.groups()
    require(name not in COLUMNS and name != QUANTILE and not keyword.iskeyword(name), "filter", spec,
            f"another name than {name}: it is taken")
    return name, model


def make_filter(model: Model, spec: str) -> Filter:
    """Return the filter that `spec` (see `split_name`) names. Raise `ConfigError` for a model that scores no texts."""
    name, _ = split_name(spec)
    offered = capabilities(model.task)
    matches, embeds = "matches images and texts" in offered, {"embeds images", "embeds texts"} <= set(offered)
    require(matches or embeds, "filter", spec,
            "a model that matches images and texts, such as Salesforce/blip-itm-base-coco, or embeds both, such as "
            f"openai/clip-vit-base-patch32; this one {', '.join(offered) or 'offers nothing'}")
    model.tokenize([])  # raises if the vocabulary is missing
    if name is None:
        return Filter(model, "itm" if matches else None, "itc")
    return Filter(model, name if matches else None, None if not embeds else f"{name}_itc" if matches else name)


def score_shard(
    source: Source, texts: Texts, filters: Sequence[Filter], *, embeddings: str | None = None,
    mesh: Mesh | None = None, done: Done = lambda count: None,
) -> tuple[Texts, Texts | None]:
    """Return `texts` with a column for every score: probabilities that text and image belong together, and cosines
    (null if a filter without a name does not embed).

    With the name of a cosine in `embeddings`, also return a table of the embeddings of the images that it compares.
    Raise `DataError` if an image that was captioned cannot be read any more.
    """
    def fail(key, reason):
        raise DataError(f"source {source.name!r}: {key} could be read when it was captioned, and now is {reason}")

    record = np.asarray(texts.columns["record"], np.int64)
    starts = np.flatnonzero(np.diff(record, prepend=-1))
    rows = dict(zip(record[starts].tolist(), np.split(np.arange(len(record)), starts[1:])[:len(starts)], strict=True))
    names = [name for one in filters for name in (one.match, one.cosine) if name is not None]
    scores = {name: np.full(len(record), np.nan, np.float32) for name in names}
    embedded: list[bytes] = []
    images = read_images(source, [one.model.prepare for one in filters], fail, record[starts].tolist())
    for group in grouped(images):
        places = [rows[image.record] for image in group]
        here = np.concatenate(places)
        own = [[texts.columns["text"][i] for i in place] for place in places]
        for number, one in enumerate(filters):
            columns, vectors = _scores(one, [image.views[number] for image in group], own, mesh)
            for name, values in columns.items():
                scores[name][here] = values
            if embeddings is not None and one.cosine == embeddings:
                embedded += [row.astype(np.float16).tobytes() for row in vectors]
        done(len(group))
    scored = Texts({**texts.columns, **scores}, texts.images, texts.bad, texts.examples)
    if embeddings is None:
        return scored, None
    first = {name: [texts.columns[name][i] for i in starts] for name in ("record", "key", "image_id")}
    return scored, Texts({**first, "embedding": embedded}, texts.images)


def _scores(one: Filter, views: Sequence[np.ndarray], texts: Sequence[Sequence[str]], mesh: Mesh | None
            ) -> tuple[Mapping[str, np.ndarray], np.ndarray | None]:
    """Return the scores of all texts of the images, one after the other, and the embeddings of the images."""
    model, encoded = one.model, {}
    owner = np.repeat(np.arange(len(views)), [len(own) for own in texts])
    tokens = model.tokenize([text for own in texts for text in own])
    images, scores = padded({"image": np.stack(views)}, BATCH, mesh), {}
    if one.match is not None:
        encoded = {name: np.asarray(value)
                   for name, value in make_image_encoder(model.task, mesh)(model.params, images).items()}
        logits = match_pairs(model.task, model.params, encoded["image_tokens"], tokens, owner, np.arange(len(tokens)),
                             mesh)
        scores[one.match] = expit(logits[:, 1] - logits[:, 0])
    if one.cosine is None or "embeds texts" not in capabilities(model.task):
        return scores, None
    vectors = encoded["image"] if "image" in encoded else np.asarray(
        predict_fn(model.task, ("image",), mesh)(model.params, images)["image"])
    batch = padded({"tokens": tokens}, max(BATCH, power_of_two(len(tokens))), mesh)
    text = np.asarray(predict_fn(model.task, ("text",), mesh)(model.params, batch)["text"])[:len(tokens)]
    return scores | {one.cosine: (vectors[owner] * text).sum(axis=1)}, vectors[:len(views)]
