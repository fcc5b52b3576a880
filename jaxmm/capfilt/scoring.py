"""The second stage: whether each text belongs to its picture, as the filter sees it.

A picture is encoded once for all of its texts.
"""

from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh
from scipy.special import expit

from jaxmm.capfilt.image_batches import Picture, filled, grouped, placed, read_pictures
from jaxmm.capfilt.synthetic_captions import PICTURES, Done
from jaxmm.capfilt.tables import Texts
from jaxmm.config import require
from jaxmm.data.base import DataError, Source
from jaxmm.inference.batching import predict_fn
from jaxmm.inference.matching import make_image_encoder, match_pairs, power_of_two
from jaxmm.inference.model import Model


def check_filter(model: Model, name: str) -> None:
    """Raises `ConfigError` for a model that does not match."""
    require(model.task.matcher is not None, "filter", name,
            "a model that matches images and texts, such as Salesforce/blip-itm-base-coco")
    model.tokenize([])  # says what is missing


def score_shard(
    source: Source, texts: Texts, model: Model, *, mesh: Mesh | None = None, done: Done = lambda count: None,
) -> Texts:
    """`texts` with two columns more: `itm`, the probability that text and picture belong together, and `itc`, their
    cosine (null where the filter does not compare).

    Raises `DataError` where a picture that was captioned cannot be read any more.
    """
    def refuse(key, reason):
        raise DataError(f"source {source.name!r}: {key} could be read when it was captioned, and now is {reason}")

    record = np.asarray(texts.columns["record"], np.int64)
    starts = np.flatnonzero(np.diff(record, prepend=-1))
    words, rows = texts.columns["text"], dict(zip(record[starts].tolist(), np.split(np.arange(len(record)), starts[1:]),
                                                  strict=True))
    itm, itc = np.full(len(record), np.nan, np.float32), np.full(len(record), np.nan, np.float32)
    pictures = read_pictures(source, [model.prepare], refuse, record[starts].tolist())
    for group in grouped(pictures, PICTURES):
        places = [rows[picture.record] for picture in group]
        found = _scores(model, group, [[words[i] for i in each] for each in places], mesh)
        here = np.concatenate(places)
        itm[here], itc[here] = found
        done(len(group))
    return Texts({**texts.columns, "itm": itm, "itc": itc}, texts.pictures, texts.bad, texts.examples)


def _scores(model: Model, group: Sequence[Picture], texts: Sequence[Sequence[str]], mesh: Mesh | None
            ) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities and cosines of all texts of the pictures, one after the other."""
    picture = np.repeat(np.arange(len(group)), [len(each) for each in texts])
    tokens = model.tokenize([text for each in texts for text in each])
    encode, batch = make_image_encoder(model.task, mesh), placed({"image": filled(group, 0, PICTURES)}, mesh)
    found = {name: np.asarray(value) for name, value in encode(model.params, batch).items()}
    logits = match_pairs(model.task, model.params, found["image_tokens"], tokens, picture, np.arange(len(tokens)), mesh)
    itm = expit(logits[:, 1] - logits[:, 0])
    if "image" not in found:
        return itm, np.full(len(itm), np.nan, np.float32)
    size = max(PICTURES, power_of_two(len(tokens)))
    padded = np.concatenate([tokens, np.repeat(tokens[-1:], size - len(tokens), axis=0)])
    embedded = predict_fn(model.task, ("text",), mesh)(model.params, placed({"tokens": padded}, mesh))["text"]
    return itm, (found["image"][picture] * np.asarray(embedded)[:len(tokens)]).sum(axis=1)
