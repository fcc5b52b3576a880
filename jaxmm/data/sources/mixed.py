"""Mix several sources into one, each with a weight: how often its records occur in an epoch."""

import bisect
import itertools
from dataclasses import dataclass, field

from jaxmm.data.base import Record, Source, fingerprint


@dataclass(frozen=True)
class Mixed(Source):
    """The records of `parts`, one part after the other, each repeated `weights` times."""

    name: str
    parts: tuple[Source, ...] = field(repr=False)
    weights: tuple[int, ...]

    @property
    def classes(self) -> tuple[str, ...] | None:
        """The classes, which are the same in all parts."""
        return self.parts[0].classes

    @property
    def fingerprint(self) -> str:
        """A digest of the weights and of the fingerprints of all parts."""
        return fingerprint([*self.weights, *(part.fingerprint for part in self.parts)])

    @property
    def notes(self) -> tuple[str, ...]:
        """The notes of all parts."""
        return tuple(f"{part.name}: {note}" for part in self.parts for note in part.notes)

    @property
    def images_per_record(self) -> int:
        """The number of images per record, which is the same in all parts."""
        return self.parts[0].images_per_record

    @property
    def has_origins(self) -> bool:
        """True if records of a part say where their texts come from."""
        return any(part.has_origins for part in self.parts)

    def __len__(self):
        return self._ends[-1]

    @property
    def _ends(self) -> list[int]:
        return list(itertools.accumulate(len(p) * w for p, w in zip(self.parts, self.weights, strict=True)))

    def _find(self, index: int) -> tuple[Source, int]:
        ends = self._ends
        index = range(ends[-1])[index]
        number = bisect.bisect_right(ends, index)
        part = self.parts[number]
        return part, (index - (ends[number - 1] if number else 0)) % len(part)

    def __getitem__(self, index: int) -> Record:
        """Read a record of one of the parts. An `image_id` that is no digest gets the name of its scope before it."""
        part, inner = self._find(index)
        record = dict(part[inner])
        if "image_id" in record and part.image_id_scope is not None:
            record["image_id"] = f"{part.image_id_scope}/{record['image_id']}"
        return record

    def key(self, index: int) -> str:
        """Return the key of the record in its part."""
        part, inner = self._find(index)
        return part.key(inner)

    def texts(self, index: int) -> tuple[str, ...]:
        """Return the captions of the record in its part."""
        part, inner = self._find(index)
        return part.texts(inner)
