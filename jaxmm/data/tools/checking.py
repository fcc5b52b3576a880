"""Is a record usable, and what is in a source: the judgements that importing and training make, without writing."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from jaxmm.data import images
from jaxmm.data.bad_records import REASONS, BadRecord, read_record
from jaxmm.data.base import Source, record_key
from jaxmm.data.processes import in_order
from jaxmm.data.sources.shards import Slice, shard_fault, shards

NAMED = 5
"""Records of each reason that a report names."""
QUANTILES = {"least": 0.0, "5%": 0.05, "median": 0.5, "95%": 0.95, "most": 1.0}


@dataclass(frozen=True)
class Usable:
    """A record whose picture could be decoded and that has what it needs."""

    key: str
    texts: tuple[str, ...]
    """Those that are not blank."""
    label: int | None
    image: Image.Image
    encoded: bytes | None
    """The picture's bytes, where any reader sees `image` in them."""


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """Whether a record is usable, and why not."""

    key: str
    usable: bool
    reason: str | None
    detail: str | None


@dataclass
class Tally:
    """Records by why they are bad, and the first few of each reason."""

    records: int = 0
    broken: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    @property
    def usable(self) -> int:
        """How many are not bad."""
        return self.records - self.broken.total()

    def add(self, key: str, reason: str | None) -> None:
        """One more record."""
        self.records += 1
        if reason is not None:
            self.broken[reason] += 1
            if len(self.examples.setdefault(reason, [])) < NAMED:
                self.examples[reason].append(key)

    def __add__(self, other: "Tally") -> "Tally":
        examples = {reason: [*self.examples.get(reason, ()), *other.examples.get(reason, ())][:NAMED]
                    for reason in {**self.examples, **other.examples}}
        return Tally(self.records + other.records, self.broken + other.broken, examples)

    def to_dict(self) -> dict[str, Any]:
        """As JSON, reasons in the order of `REASONS`."""
        reasons = sorted(self.broken, key=REASONS.index)
        return {"records": self.records, "usable": self.usable,
                "broken": {reason: self.broken[reason] for reason in reasons},
                "examples": {reason: self.examples[reason] for reason in reasons}}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Tally":
        """What `to_dict` gave."""
        return cls(values["records"], Counter(values["broken"]), values["examples"])


def examine(source: Source, index: int) -> Usable:
    """Reads and decodes a record of one picture. Raises `BadRecord` for one that training could not use either."""
    record = read_record(source, index)
    texts = tuple(text for text in record.get("texts", ()) if text.strip())
    label = record.get("label")
    if source.classes is None and not texts:
        raise BadRecord("no text", "it has no caption")
    if source.classes is not None and (label is None or not 0 <= label < len(source.classes)):
        raise BadRecord("no label", f"label {label} of {len(source.classes)} classes")
    if "image" not in record:
        raise BadRecord("no image", "it has no picture")
    image, plain = images.read(record["image"])
    return Usable(record.get("key") or record_key(source, index), texts, label, image,
                  record["image"] if plain else None)


def pixel_id(image: Image.Image) -> str:
    """32 hex digits that are the same for the same size and pixels, however they were encoded."""
    digest = hashlib.blake2b(f"{image.width} {image.height} ".encode(), digest_size=16)
    digest.update(image.tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class _Part:
    """What is in one shard."""

    name: str
    fault: str | None
    tally: Tally
    sizes: np.ndarray
    words: np.ndarray
    texts: int
    pictures: np.ndarray
    judgements: list[Judgement]


def check(
    source: Source, *, workers: int = 1, shard_records: int = 1000,
    on_record: Callable[[Judgement], None] | None = None, on_shard: Callable[[int], None] = lambda records: None,
) -> dict[str, Any]:
    """A report on `source`, as JSON: `records`, `usable`, `broken` and `examples` by reason, `texts`, `duplicates`,
    quantiles of `width` and `height` in pixels and of `caption_words`, and `faults` of shards as a whole.

    `on_record` is given each record's judgement, in order.
    """
    tally, faults, parts = Tally(), [], []
    pieces = shards(source, shard_records)
    run = partial(_check_shard, pieces, on_record is not None)
    for part in in_order(run, range(len(pieces)), workers):
        tally += part.tally
        if part.fault is not None:
            faults.append({"shard": part.name, "fault": part.fault})
        for judgement in part.judgements if on_record else ():
            on_record(judgement)
        part.judgements.clear()
        parts.append(part)
        on_shard(part.tally.records)
    sizes = np.concatenate([part.sizes for part in parts])
    seen = len(np.unique(np.concatenate([part.pictures for part in parts])))
    return tally.to_dict() | {
        "texts": sum(part.texts for part in parts), "duplicates": len(sizes) - seen,
        "width": _quantiles(sizes[:, 0]), "height": _quantiles(sizes[:, 1]),
        "caption_words": _quantiles(np.concatenate([part.words for part in parts])), "faults": faults}


def _check_shard(pieces: list[Source], with_judgements: bool, number: int) -> _Part:
    shard = pieces[number]
    tally, sizes, words, pictures, judgements = Tally(), [], [], [], []
    for usable in usable_records(shard, tally, judgements if with_judgements else None):
        sizes.append(usable.image.size)
        words += [len(text.split()) for text in usable.texts]
        pictures.append(int(pixel_id(usable.image)[:15], 16))
    return _Part(_name(shard), shard_fault(shard), tally, np.asarray(sizes, np.int32).reshape(-1, 2),
                 np.asarray(words, np.int32), len(words), np.asarray(pictures, np.int64), judgements)


def usable_records(source: Source, tally: Tally, judgements: list[Judgement] | None = None) -> Iterator[Usable]:
    """The usable records of `source`, in order; `tally` counts all, and `judgements` gets one of each."""
    for index in range(len(source)):
        try:
            usable = examine(source, index)
            key, reason, detail = usable.key, None, None
        except BadRecord as error:
            usable, key, reason, detail = None, record_key(source, index), error.reason, error.detail
        tally.add(key, reason)
        if judgements is not None:
            judgements.append(Judgement(key=key, usable=usable is not None, reason=reason, detail=detail))
        if usable is not None:
            yield usable


def _name(shard: Source) -> str:
    return f"{shard.name}[{shard.start}:{shard.stop}]" if isinstance(shard, Slice) else shard.name


def _quantiles(values: np.ndarray) -> dict[str, float] | None:
    if not len(values):
        return None
    return {name: float(np.quantile(values, share)) for name, share in QUANTILES.items()}
