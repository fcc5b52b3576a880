"""Load one record as a row of a batch, and stack rows."""

import functools
import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from jaxtyping import Int
from PIL import Image

from jaxmm.config import ImageConfig
from jaxmm.data.bad_records import BadRecord, Batch
from jaxmm.data.base import DataError, Record, Source
from jaxmm.data.sources.vqa import answer_shares
from jaxmm.data.usable import read_usable
from jaxmm.paths import BUCKETS

OriginWeights = tuple[tuple[str, float], ...]
"""Weights of texts by where they come from."""
STREAMS = 32
"""Number of records of a bucket that a process reads at the same time."""
Shard = tuple[int, int]
"""(this host, hosts): host h of H gets the h-th of H equal runs of rows of every batch."""


def load_row(
    source: Source, index: int, with_text: bool, with_label: bool, rng: np.random.Generator | None, captions: int = 1,
    weights: OriginWeights = (),
) -> dict[str, Any]:
    """Read and decode a record and choose `captions` of its texts, at random with `rng` (see `draw_texts`), else the
    first. Raises `BadRecord`."""
    wanted = ("text",) * with_text + ("answer",) * (with_text and rng is not None)
    usable = read_usable(source, index, (*wanted, *("label",) * (with_label and source.classes is not None)), rng)
    record, texts, row = usable.record, usable.texts, {}
    if with_text:
        row["texts"] = texts[:1] if rng is None else draw_texts(texts, captions, rng, record.get("origins"), weights)
        if "question" in record and rng is not None:
            row["answers"] = answer_shares(record.get("answers", ()))
    if with_label and source.classes is not None:
        row["label"] = usable.label
    image = usable.images if isinstance(record["image"], tuple) else usable.images[0]
    return row | {"image": image, "image_id": image_id(record)}


def draw_texts(
    texts: Sequence[str], count: int, rng: np.random.Generator, origins: Sequence[str] | None = None,
    weights: OriginWeights = (),
) -> tuple[str, ...]:
    """Draw `count` of `texts` at random, none twice before all were drawn.

    With `origins` of the texts and `weights`, an origin is drawn by its weight for every text, and the text from those
    of that origin. Raises `BadRecord` if no text is of an origin with a weight.
    """
    if origins is None or not weights:
        if count == 1:
            return (texts[rng.integers(len(texts)) if len(texts) > 1 else 0],)
        return tuple(texts[i] for i in np.resize(rng.permutation(len(texts)), count))
    shares = {name: weight for name, weight in weights if weight and name in origins}
    if not shares:
        raise BadRecord("no text", f"its texts are of {', '.join(sorted(set(origins)))}, without a weight in "
                                   "data.origins")
    places = [itertools.cycle(rng.permutation([i for i, origin in enumerate(origins) if origin == name]))
              for name in shares]
    drawn = rng.choice(len(shares), count, p=np.array([*shares.values()]) / sum(shares.values()))
    return tuple(texts[next(places[i])] for i in drawn)


def load_rows(source: Source, load: Callable[[int], Any], numbers: Iterable[int]) -> list[Any]:
    """Return `load(number)` of all `numbers`, many at the same time if `source` is in a bucket, which answers slowly.
    """
    if any(scheme in source.name for scheme in BUCKETS):
        return list(_streams(os.getpid()).map(load, numbers))
    return list(map(load, numbers))


@functools.cache
def _streams(process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(STREAMS, "bucket")


def transform_images(
    image: Image.Image | tuple[Image.Image, ...], transform: Callable[..., np.ndarray], *args: Any
) -> np.ndarray:
    """Transform an image, or stack several after transforming each of them."""
    if isinstance(image, tuple):
        return np.stack([transform(one, *args) for one in image])
    return transform(image, *args)


def stack_rows(rows: list[dict[str, Any]], tokenizer: Any) -> Batch:
    """Stack rows to a batch and tokenize their texts, all at once.

    `tokens` and `text_id` have another axis, after the first, if rows have several texts.
    """
    batch = {name: np.stack([row[name] for row in rows]) for name in ("image", "image_id")}
    batch |= {name: np.asarray([row[name] for row in rows], np.int32)
              for name in ("label", "index", "drawn", "fault") if name in rows[0]}
    if tokenizer is not None:
        texts = [text for row in rows for text in row["texts"]]
        batch |= {"tokens": tokenizer(texts), "text_id": np.stack([text_id(text) for text in texts])}
        if (count := len(rows[0]["texts"])) > 1:
            batch |= {name: batch[name].reshape(len(rows), count, -1) for name in ("tokens", "text_id")}
    if "mask" in rows[0]:
        batch["mask"] = np.asarray([row["mask"] for row in rows], bool)
    return batch


def image_id(record: Record) -> Int[np.ndarray, "2"]:
    """Return 64 bits that are equal for the same image: a digest of its `image_id`, else of its bytes."""
    if "image_id" in record:
        return _hash(hashlib.blake2b, record["image_id"].encode(errors="replace"))
    return content_id(record)


def content_id(record: Record) -> Int[np.ndarray, "2"]:
    """Return 64 bits that are equal for images of the same bytes, and of the same shape if they are pixels."""
    data = record["image"] if isinstance(record["image"], tuple) else (record["image"],)
    # SHA-1 is twice as fast as BLAKE2 on processors that have it built in
    return _hash(hashlib.sha1, b"".join(
        str(one.shape).encode() + one.tobytes() if isinstance(one, np.ndarray) else one for one in data))


def text_id(text: str) -> Int[np.ndarray, "2"]:
    """Return 64 bits that are equal for the same words, whatever their case and white space."""
    return _hash(hashlib.blake2b, " ".join(text.lower().split()).encode(errors="replace"))


def host_rows(batch_size: int, shard: Shard) -> range:
    """Return the rows of a batch that this host loads. Raises `DataError` if they do not divide over the hosts."""
    host, hosts = shard
    if batch_size % hosts or not 0 <= host < hosts:
        raise DataError(f"a batch of {batch_size} does not divide over host {host} of {hosts}")
    share = batch_size // hosts
    return range(host * share, (host + 1) * share)


def image_shape(source: Source, config: ImageConfig) -> tuple[int, ...]:
    """Return the shape of `image` in one row."""
    count = source.images_per_record
    return (*((count,) if count > 1 else ()), config.size, config.size, 3)


def _hash(function: Callable, data: bytes) -> Int[np.ndarray, "2"]:
    return np.frombuffer(function(data, usedforsecurity=False).digest()[:8], "<i4").astype(np.int32)
