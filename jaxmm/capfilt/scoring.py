"""The second stage: score how well each text belongs to its image, by a model that matches.

An image is encoded once for all of its texts.
"""

from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh
from scipy.special import expit

from jaxmm.capfilt.image_batches import BATCH, WebImage, grouped, padded, read_images
from jaxmm.capfilt.synthetic_captions import Done
from jaxmm.capfilt.tables import Texts
from jaxmm.data.base import DataError, Source
from jaxmm.inference.batching import power_of_two, predict_fn
from jaxmm.inference.matching import make_image_encoder, match_pairs
from jaxmm.inference.model import Model
from jaxmm.task import capabilities
from jaxmm.validation import require


def check_filter(model: Model, name: str) -> None:
    """Raise `ConfigError` for a model that does not match."""
    offered = capabilities(model.task)
    require("matches images and texts" in offered, "filter", name,
            "a model that matches images and texts, such as Salesforce/blip-itm-base-coco; this one "
            f"{', '.join(offered) or 'offers nothing'}")
    model.tokenize([])  # raises if the vocabulary is missing


def score_shard(
    source: Source, texts: Texts, model: Model, *, mesh: Mesh | None = None, done: Done = lambda count: None,
) -> Texts:
    """Return `texts` with two more columns: `itm`, the probability that text and image belong together, and `itc`,
    their cosine (null if the filter does not embed).

    Raise `DataError` if an image that was captioned cannot be read any more.
    """
    def fail(key, reason):
        raise DataError(f"source {source.name!r}: {key} could be read when it was captioned, and now is {reason}")

    record = np.asarray(texts.columns["record"], np.int64)
    starts = np.flatnonzero(np.diff(record, prepend=-1))
    rows = dict(zip(record[starts].tolist(), np.split(np.arange(len(record)), starts[1:]), strict=True))
    itm, itc = (np.full(len(record), np.nan, np.float32) for _ in range(2))
    images = read_images(source, [model.prepare], fail, record[starts].tolist())
    for group in grouped(images):
        places = [rows[image.record] for image in group]
        here = np.concatenate(places)
        itm[here], itc[here] = _scores(model, group, [[texts.columns["text"][i] for i in place] for place in places],
                                       mesh)
        done(len(group))
    return Texts({**texts.columns, "itm": itm, "itc": itc}, texts.images, texts.bad, texts.examples)


def _scores(model: Model, group: Sequence[WebImage], texts: Sequence[Sequence[str]], mesh: Mesh | None
            ) -> tuple[np.ndarray, np.ndarray]:
    """Return the probabilities and cosines of all texts of the images, one after the other."""
    owner = np.repeat(np.arange(len(group)), [len(own) for own in texts])
    tokens = model.tokenize([text for own in texts for text in own])
    images = padded({"image": np.stack([image.views[0] for image in group])}, BATCH, mesh)
    encoded = {name: np.asarray(value)
               for name, value in make_image_encoder(model.task, mesh)(model.params, images).items()}
    logits = match_pairs(model.task, model.params, encoded["image_tokens"], tokens, owner, np.arange(len(tokens)), mesh)
    itm = expit(logits[:, 1] - logits[:, 0])
    if "image" not in encoded or "embeds texts" not in capabilities(model.task):
        return itm, np.full(len(itm), np.nan, np.float32)
    batch = padded({"tokens": tokens}, max(BATCH, power_of_two(len(tokens))), mesh)
    text = np.asarray(predict_fn(model.task, ("text",), mesh)(model.params, batch)["text"])[:len(tokens)]
    return itm, (encoded["image"][owner] * text).sum(axis=1)
