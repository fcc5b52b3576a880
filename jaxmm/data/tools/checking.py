"""Report what is in a source and which of its records cannot be used, without writing."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from jaxmm.data.bad_records import REASONS, BadRecord
from jaxmm.data.base import Source, digest, record_key
from jaxmm.data.processes import in_order
from jaxmm.data.sources.shards import Slice, shards
from jaxmm.data.usable import Usable, needs, read_usable

EXAMPLES = 5
"""The number of records of each reason that a report names."""
QUANTILES = {"least": 0.0, "5%": 0.05, "median": 0.5, "95%": 0.95, "most": 1.0}


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """The result for one record: can it be used, and if not, why?"""

    key: str
    usable: bool
    reason: str | None
    detail: str | None


@dataclass
class Tally:
    """Numbers of records by the reason why they are bad, and the first few of each reason."""

    records: int = 0
    broken: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    @property
    def usable(self) -> int:
        """The number of records that are not bad."""
        return self.records - self.broken.total()

    def add(self, key: str, reason: str | None) -> None:
        """Count one more record."""
        self.records += 1
        if reason is not None:
            self.broken[reason] += 1
            if len(self.examples.setdefault(reason, [])) < EXAMPLES:
                self.examples[reason].append(key)

    def __add__(self, other: "Tally") -> "Tally":
        examples = {reason: [*self.examples.get(reason, ()), *other.examples.get(reason, ())][:EXAMPLES]
                    for reason in {**self.examples, **other.examples}}
        return Tally(self.records + other.records, self.broken + other.broken, examples)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values, reasons in the order of `REASONS`."""
        reasons = sorted(self.broken, key=REASONS.index)
        return {"records": self.records, "usable": self.usable,
                "broken": {reason: self.broken[reason] for reason in reasons},
                "examples": {reason: self.examples[reason] for reason in reasons}}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Tally":
        """Return the tally that `to_dict` described."""
        return cls(values["records"], Counter(values["broken"]), values["examples"])


def examine(source: Source, index: int) -> tuple[str, Usable]:
    """Read and decode a record; return its key and content. Raises `BadRecord` if training could not use it."""
    usable = read_usable(source, index, needs(source))
    return usable.record.get("key") or record_key(source, index), usable


def pixel_id(image: Image.Image) -> str:
    """Return 32 hex digits that are equal for the same size and pixels, however they were encoded."""
    return digest([f"{image.width} {image.height} ".encode(), image.tobytes()])


@dataclass(frozen=True)
class _Part:
    """A report on one shard."""

    name: str
    fault: str | None
    tally: Tally
    sizes: np.ndarray
    words: np.ndarray
    texts: int
    pixels: np.ndarray
    """The first 60 bits of each image's `pixel_id`."""
    judgements: list[Judgement]


def check(
    source: Source, *, workers: int = 1, shard_records: int = 1000,
    on_record: Callable[[Judgement], None] | None = None, on_shard: Callable[[int], None] = lambda records: None,
) -> dict[str, Any]:
    """Return a report on `source` as JSON values.

    It has `records`, `usable`, `broken` and `examples` by reason, `texts`, `duplicates`, quantiles of `width` and
    `height` in pixels and of `caption_words`, `faults` of damaged shards, and `notes` of the source. `on_record` gets
    the judgement of each record, in order.
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
    different = len(np.unique(np.concatenate([part.pixels for part in parts])))
    return tally.to_dict() | {
        "texts": sum(part.texts for part in parts), "duplicates": len(sizes) - different,
        "width": _quantiles(sizes[:, 0]), "height": _quantiles(sizes[:, 1]),
        "caption_words": _quantiles(np.concatenate([part.words for part in parts])), "faults": faults,
        "notes": list(source.notes)}


def _check_shard(pieces: list[Source], with_judgements: bool, number: int) -> _Part:
    shard = pieces[number]
    tally, sizes, words, pixels, judgements = Tally(), [], [], [], []
    for _, usable in usable_records(shard, tally, judgements if with_judgements else None):
        sizes += [image.size for image in usable.images]
        words += [len(text.split()) for text in usable.texts]
        pixels += [int(pixel_id(image)[:15], 16) for image in usable.images]
    return _Part(_name(shard), shard.fault, tally, np.asarray(sizes, np.int32).reshape(-1, 2),
                 np.asarray(words, np.int32), len(words), np.asarray(pixels, np.int64), judgements)


def usable_records(
    source: Source, tally: Tally, judgements: list[Judgement] | None = None
) -> Iterator[tuple[str, Usable]]:
    """Yield key and content of the usable records of `source`, in order; add all to `tally` and `judgements`."""
    for index in range(len(source)):
        try:
            key, usable = examine(source, index)
            reason, detail = None, None
        except BadRecord as error:
            usable, key, reason, detail = None, record_key(source, index), error.reason, error.detail
        tally.add(key, reason)
        if judgements is not None:
            judgements.append(Judgement(key=key, usable=usable is not None, reason=reason, detail=detail))
        if usable is not None:
            yield key, usable


def _name(shard: Source) -> str:
    return f"{shard.name}[{shard.start}:{shard.stop}]" if isinstance(shard, Slice) else shard.name


def _quantiles(values: np.ndarray) -> dict[str, float] | None:
    if not len(values):
        return None
    return {name: float(np.quantile(values, share)) for name, share in QUANTILES.items()}
