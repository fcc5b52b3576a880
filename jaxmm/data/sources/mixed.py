"""Several sources as one, each as often in an epoch as it should count: `3*coco:captions.json + tfds:web:train`."""

import bisect
import itertools
import re
from dataclasses import dataclass, field
from typing import Any

from jaxmm.data.base import DataError, Record, Source, fingerprint, record_key, record_texts
from jaxmm.data.sources.registry import open_source

JOINT = re.compile(r"\s\+\s(?=(?:\d+\s*\*\s*)?[a-z]+:)")
_WEIGHT = re.compile(r"(\d+)\s*\*\s*(.*)", re.DOTALL)


@dataclass(frozen=True)
class Mixed:
    """The records of `parts`, one part after the other, each repeated `weights` times."""

    name: str
    parts: tuple[Source, ...] = field(repr=False)
    weights: tuple[int, ...]

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Those of all parts."""
        return self.parts[0].classes

    @property
    def fingerprint(self) -> str:
        """Of all parts and their weights."""
        return fingerprint([*self.weights, *(part.fingerprint for part in self.parts)])

    @property
    def pictures(self) -> int:
        """A record's pictures."""
        return getattr(self.parts[0], "pictures", 1)

    def __len__(self):
        return self._ends[-1]

    @property
    def _ends(self) -> list[int]:
        return list(itertools.accumulate(len(p) * w for p, w in zip(self.parts, self.weights, strict=True)))

    def _find(self, index: int) -> tuple[int, int]:
        ends = self._ends
        index = range(ends[-1])[index]
        number = bisect.bisect_right(ends, index)
        return number, (index - (ends[number - 1] if number else 0)) % len(self.parts[number])

    def __getitem__(self, index: int) -> Record:
        """A record of one of the parts. Its `image_id` is kept apart from other parts' where it is not a digest."""
        number, place = self._find(index)
        record = dict(self.parts[number][place])
        if "image_id" in record and not self.parts[number].name.startswith("tfds:"):
            record["image_id"] = f"{self.parts[number].name}/{record['image_id']}"
        return record

    def key(self, index: int) -> str:
        """The part's own."""
        number, place = self._find(index)
        return record_key(self.parts[number], place)

    def texts(self, index: int) -> tuple[str, ...]:
        """The part's own."""
        number, place = self._find(index)
        return record_texts(self.parts[number], place)


def is_mixed(spec: str) -> bool:
    """Whether `spec` names several sources, or says how often one counts."""
    return bool(JOINT.search(spec) or _WEIGHT.fullmatch(spec))


def open_mixed(spec: str, data_dir: str | None = None) -> Mixed:
    """Opens `WEIGHT*SOURCE + WEIGHT*SOURCE + ...`; a weight is a whole number, 1 where none is said. Raises
    `DataError`."""
    parts: list[Any] = []
    weights = []
    for each in JOINT.split(spec):
        weighted = _WEIGHT.fullmatch(each.strip())
        weight, location = (int(weighted[1]), weighted[2]) if weighted else (1, each.strip())
        if weight < 1:
            raise DataError(f"source {spec!r}: {each.strip()!r} counts {weight} times; wanted 1 or more")
        parts.append(open_source(location, data_dir=data_dir))
        weights.append(weight)
    for part in parts:
        if part.classes != parts[0].classes or getattr(part, "pictures", 1) != getattr(parts[0], "pictures", 1):
            raise DataError(f"source {spec!r}: {part.name!r} has other classes or pictures than {parts[0].name!r}")
        if hasattr(part, "vary") or hasattr(part, "most_answers"):
            raise DataError(f"source {spec!r}: {part.name!r} cannot be mixed with others")
    return Mixed(spec, tuple(parts), tuple(weights))
