"""Divide sources into shards, which worker processes and hosts read, write and check one by one."""

import bisect
import glob
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from operator import attrgetter
from pathlib import Path

import numpy as np

from jaxmm.data.base import DataError, Record, Source, fingerprint
from jaxmm.paths import expand, is_address, is_bucket, user_path

LARGEST_IMAGE = 64 * 2**20
"""Bytes of an encoded image in a shard; larger ones are refused as too large."""
LARGEST_TEXT = 4 * 2**20
MOST_FILES = 1_000_000


def _of_source(name: str) -> property:
    """Return a property of a slice: the attribute `name` of its source."""
    return property(attrgetter(f"source.{name}"))


@dataclass(frozen=True)
class Slice(Source):
    """The records from `start` up to `stop` of a source."""

    source: Source
    start: int
    stop: int
    name, classes, tags, templates, images_per_record, has_origins, has_foils, most_answers = map(_of_source, (
        "name", "classes", "tags", "templates", "images_per_record", "has_origins", "has_foils", "most_answers"))
    grades_captions, grades_images, varies, image_id_scope = map(_of_source, (
        "grades_captions", "grades_images", "varies", "image_id_scope"))

    def __len__(self):
        return self.stop - self.start

    def __getitem__(self, index: int) -> Record:
        """Read a record of the source."""
        return self.source[self._at(index)]

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

    def tags_of(self, index: int) -> tuple[int, ...]:
        """Return the numbers of the record's tags."""
        return self.source.tags_of(self._at(index))

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
    classes: tuple[str, ...] | None = None
    tags: tuple[str, ...] | None = None
    templates: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()

    def __bool__(self):
        return any(len(part) for part in self.parts)

    @property
    def has_origins(self) -> bool:
        """True if records of a part say where their texts come from."""
        return any(part.has_origins for part in self.parts)

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

    def tags_of(self, index: int) -> tuple[int, ...]:
        """Return the numbers of the record's tags; images are not read."""
        part, inner = self._find(index)
        return part.tags_of(inner)

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


def find_files(spec: str, pattern: str, suffixes: tuple[str, ...]) -> list[tuple[Path, str]]:
    """Return each file that `pattern` matches, sorted, with a name: its stem, or its path if two stems are equal.

    A folder means its files that end with `suffixes`. A pattern may contain lists in braces (`{00000..00041}`) and
    several patterns, separated by `::`. Raises `DataError` if there are no files.
    """
    matches: dict[Path, None] = {}
    _entries.cache_clear()
    for part in pattern.split("::"):
        if is_address(part) and not is_bucket(part):
            raise DataError(f"source {spec!r}: {part!r} is no local path or in a bucket (gs://, s3://); expected one: "
                            "other addresses are not supported")
        for one in _braces(spec, expand(part)):
            if is_bucket(one):
                paths = _bucket_files(one, suffixes)
                if not paths:
                    raise DataError(f"source {spec!r}: no object matches {one!r}")
                matches |= dict.fromkeys(paths)
                continue
            patterns = [f"{glob.escape(one)}/*{suffix}" for suffix in suffixes] if Path(one).is_dir() else [one]
            names = [path for form in patterns for path in glob.glob(form, recursive=True)]
            paths = [path for path in map(Path, names) if path.is_file()]
            if not paths:
                raise DataError(f"source {spec!r}: no file matches {one!r}")
            matches |= dict.fromkeys(sorted(paths))
    paths = sorted(matches)
    return list(zip(paths, _stems(paths, suffixes), strict=True))


def _bucket_files(pattern: str, suffixes: tuple[str, ...]) -> list[Path]:
    """Return the objects that a pattern in a bucket matches, or those of a folder."""
    path = user_path(pattern)
    if glob.has_magic(pattern):
        return path.matches()
    entries = _entries(str(path.parent))
    if path.name in entries and entries[path.name].is_file():
        return [path]
    return [file for file in _entries(str(path)).values() if file.name.endswith(suffixes)]


@lru_cache(maxsize=16)
def _entries(folder: str) -> dict[str, Path]:
    """Return what is in a folder of a bucket, by name. It is listed once for many names in braces."""
    try:
        return {path.name: path for path in user_path(folder).iterdir()}
    except FileNotFoundError:
        return {}


def _braces(spec: str, pattern: str) -> list[str]:
    if "{" not in pattern or os.path.exists(pattern):
        return [pattern]
    import bracex

    try:
        return bracex.expand(pattern, keep_escapes=True, limit=MOST_FILES)
    except bracex.ExpansionLimitException:
        raise DataError(f"source {spec!r}: {pattern!r} has more than {MOST_FILES} files") from None


def _stems(paths: Sequence[Path], suffixes: Sequence[str]) -> list[str]:
    stems = [next((path.name.removesuffix(suffix) for suffix in suffixes if path.name.endswith(suffix)), path.stem)
             for path in paths]
    return stems if len(set(stems)) == len(stems) else [path.as_posix().removeprefix("/") for path in paths]
