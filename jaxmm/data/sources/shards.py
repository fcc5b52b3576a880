"""Divide sources into shards, which worker processes and hosts read, write and check one by one."""

import bisect
import glob
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from jaxmm.data.base import DataError, Record, Source, fingerprint

LARGEST_IMAGE = 64 * 2**20
"""Bytes of an encoded image in a shard; larger ones are refused as too large."""
LARGEST_TEXT = 4 * 2**20


@dataclass(frozen=True)
class Slice(Source):
    """The records from `start` up to `stop` of a source."""

    source: Source
    start: int
    stop: int

    def __len__(self):
        return self.stop - self.start

    def __getitem__(self, index: int) -> Record:
        """Read a record of the source."""
        return self.source[self._at(index)]

    @property
    def name(self) -> str:
        """The name of the source."""
        return self.source.name

    @property
    def classes(self) -> tuple[str, ...] | None:
        """The classes of the source."""
        return self.source.classes

    @property
    def images_per_record(self) -> int:
        """The number of images in one record of the source."""
        return self.source.images_per_record

    @property
    def most_answers(self) -> int:
        """The largest number of different answers to one question of the source."""
        return self.source.most_answers

    @property
    def grades_captions(self) -> bool:
        """True if the source grades captions."""
        return self.source.grades_captions

    @property
    def grades_images(self) -> bool:
        """True if the source grades images."""
        return self.source.grades_images

    @property
    def varies(self) -> bool:
        """True if the source varies records."""
        return self.source.varies

    @property
    def image_id_scope(self) -> str | None:
        """The scope of the source."""
        return self.source.image_id_scope

    @cached_property
    def fingerprint(self) -> str:
        """A digest of the fingerprint of the source and of the range."""
        return fingerprint([self.source.fingerprint, self.start, self.stop])

    def key(self, index: int) -> str:
        """Return the key of the record in the source."""
        return self.source.key(self._at(index))

    def texts(self, index: int) -> tuple[str, ...]:
        """Return the captions of the record."""
        return self.source.texts(self._at(index))

    def answers(self, index: int) -> tuple[str, ...]:
        """Return the answers of the record."""
        return self.source.answers(self._at(index))

    def others(self, index: int, count: int, rng: np.random.Generator) -> list[tuple[str, tuple[str, ...]]]:
        """Return more questions about the image of the record, also of records outside the slice."""
        return self.source.others(self._at(index), count, rng)

    def vary(self, record: Record, rng: np.random.Generator) -> Record:
        """Return the record as the source varies it."""
        return self.source.vary(record, rng)

    def is_true(self, index: int, caption: str) -> bool:
        """Return whether `caption` is true, as the source says."""
        return self.source.is_true(self._at(index), caption)

    def names_largest(self, index: int, caption: str) -> bool:
        """Return whether `caption` names the largest object, as the source says."""
        return self.source.names_largest(self._at(index), caption)

    def shows_largest(self, index: int, images: np.ndarray, part: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """Return whether `images` show the largest object, as the source says."""
        return self.source.shows_largest(self._at(index), images, part)

    def _at(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.start + index


@dataclass(frozen=True, kw_only=True)
class Shards(Source):
    """Sources one after the other. Each reads its index at first use."""

    name: str
    parts: tuple[Source, ...]

    def __bool__(self):
        return any(len(part) for part in self.parts)

    def __len__(self):
        return self._ends[-1]

    def __getitem__(self, index: int) -> Record:
        """Read the record from the part that contains it."""
        part, inner = self._find(index)
        return part[inner]

    def key(self, index: int) -> str:
        """Return the key of the record in its part."""
        part, inner = self._find(index)
        return part.key(inner)

    def texts(self, index: int) -> tuple[str, ...]:
        """Return the captions; images are not read."""
        part, inner = self._find(index)
        return part.texts(inner)

    def shards(self) -> tuple[Source, ...]:
        """Return the parts."""
        return self.parts

    @cached_property
    def fingerprint(self) -> str:
        """A digest of the fingerprints of all parts, which reads all their indices."""
        return fingerprint(part.fingerprint for part in self.parts)

    @cached_property
    def _ends(self) -> list[int]:
        return list(itertools.accumulate(map(len, self.parts)))

    def _find(self, index: int) -> tuple[Source, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect.bisect_right(self._ends, index)
        return self.parts[number], index - (self._ends[number - 1] if number else 0)


def shards(source: Source, size: int = 1000) -> list[Source]:
    """Return the shards of `source`, else slices of `size` records."""
    return list(source.shards()) or [Slice(source, start, min(start + size, len(source)))
                                     for start in range(0, len(source), size)]


def open_files(spec: str, pattern: str, suffix: str, opener: Callable[[Path, str], Source]) -> Shards:
    """Open each file that `pattern` matches as one part, sorted; a folder means its files that end with `suffix`.

    `opener` gets the path and a name: the file's stem, or its path if two stems are equal. Raises `DataError` if there
    are no files.
    """
    if Path(pattern).is_dir():
        pattern = f"{glob.escape(pattern)}/*{suffix}"
    paths = sorted(path for path in map(Path, glob.glob(pattern, recursive=True)) if path.is_file())
    if not paths:
        raise DataError(f"source {spec!r}: no file matches {pattern!r}")
    return Shards(name=spec, parts=tuple(opener(path, stem) for path, stem in zip(paths, _stems(paths), strict=True)))


def _stems(paths: Sequence[Path]) -> list[str]:
    stems = [path.stem for path in paths]
    return stems if len(set(stems)) == len(stems) else [path.as_posix().removeprefix("/") for path in paths]


def clean(text: str | bytes) -> str:
    """Return text that can be written as UTF-8, without NUL; invalid bytes are replaced."""
    if isinstance(text, str):
        text = text.encode("utf-8", "replace")
    return text.decode("utf-8", "replace").replace("\0", "")


def printable(name: str) -> str:
    """Return an untrusted name with the characters replaced that a terminal would interpret."""
    return "".join(c if c.isprintable() else "\ufffd" for c in clean(name))
