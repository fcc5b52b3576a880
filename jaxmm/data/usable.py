"""Decide whether a record can be used. Training, `data check`, `data import` and CapFilt all ask here."""

from collections.abc import Collection
from dataclasses import dataclass
from numbers import Integral
from typing import Literal

import numpy as np
from PIL import Image

from jaxmm.data import images
from jaxmm.data.bad_records import BadRecord, read_record
from jaxmm.data.base import Record, Source
from jaxmm.data.cleaning import usable_texts

Need = Literal["text", "answer", "label"]


@dataclass(frozen=True)
class Usable:
    """A record that has what was asked for, and whose images were decoded."""

    record: Record
    texts: tuple[str, ...]
    """The question, or all captions that are not blank."""
    label: int | None
    images: tuple[Image.Image, ...]
    plain: tuple[bool, ...]
    """True for each image whose bytes mean the same to every reader (see `images.read`)."""


def needs(source: Source) -> tuple[Need, ...]:
    """Return what a record needs besides the image: a label if there are classes, a text unless there are tags."""
    if source.tags is not None:
        return ()
    return ("label",) if source.classes is not None else ("text", "answer") if source.most_answers else ("text",)


def read_usable(
    source: Source, index: int, wanted: Collection[Need], rng: np.random.Generator | None = None
) -> Usable:
    """Read and decode a record. Raises `BadRecord` with the reason if it cannot be used.

    It can if it has an image that can be decoded, and what is `wanted`: a caption or question that is not blank, an
    answer to its question, a label of the source's classes. With `rng` the record is varied as training sees it.
    """
    record = read_record(source, index)
    if rng is not None:
        record = source.vary(record, rng)
    texts = usable_texts(record["question"] if "question" in record else record.get("texts", ()))
    if "text" in wanted and not texts:
        raise BadRecord("no text", "it has no caption and no question")
    if "answer" in wanted and "question" in record and not any(map(str.strip, record.get("answers", ()))):
        raise BadRecord("no answer", "its question has no answer")
    label = record.get("label")
    if "label" in wanted and not (isinstance(label, Integral) and 0 <= label < len(source.classes)):
        raise BadRecord("no label", f"label {label} of {len(source.classes)} classes")
    if "image" not in record:
        raise BadRecord("no image", "it has no image")
    encoded = record["image"] if isinstance(record["image"], tuple) else (record["image"],)
    decoded, plain = zip(*map(images.read, encoded), strict=True)
    return Usable(record, texts, None if label is None else int(label), decoded, plain)
