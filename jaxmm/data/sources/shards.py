"""Parts of a source that are read, written and judged on their own, by worker processes or hosts."""

import bisect
import glob
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from jaxmm.data.base import DataError, Record, Source, fingerprint, record_key

LARGEST_PICTURE = 64 * 2**20
"""Bytes of an encoded picture in a shard; larger ones are refused as too large."""
LARGEST_TEXT = 4 * 2**20


@dataclass(frozen=True)
class Slice:
    """The records from `start` up to `stop` of a source."""

    source: Source
    start: int
    stop: int

    def __len__(self):
        return self.stop - self.start

    def __getitem__(self, index: int) -> Record:
        """The record of the source."""
        return self.source[self._at(index)]

    def key(self, index: int) -> str:
        """The name of the record in the source."""
        return record_key(self.source, self._at(index))

    def texts(self, index: int) -> tuple[str, ...]:
        """The captions, without reading the picture where the source can."""
        if hasattr(self.source, "texts"):
            return self.source.texts(self._at(index))
        return self[index].get("texts", ())

    @cached_property
    def fingerprint(self) -> str:
        """Of the source, and which of its records these are."""
        return fingerprint([self.source.fingerprint, self.start, self.stop])

    def __getattr__(self, name: str) -> Any:
        if name in ("name", "classes", "pictures", "vary", "most_answers"):
            return getattr(self.source, name)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def _at(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.start + index


@dataclass(frozen=True, kw_only=True)
class Shards:
    """Sources one after the other, of which each is indexed when it is first needed."""

    name: str
    parts: tuple[Source, ...]
    classes: ClassVar[None] = None

    def __bool__(self):
        return any(len(part) for part in self.parts)

    def __len__(self):
        return self._ends[-1]

    def __getitem__(self, index: int) -> Record:
        """The record of the part that holds it."""
        part, inner = self._find(index)
        return part[inner]

    def key(self, index: int) -> str:
        """The part's name and the record's name in it."""
        part, inner = self._find(index)
        return part.key(inner)

    def texts(self, index: int) -> tuple[str, ...]:
        """The captions, read without the picture."""
        part, inner = self._find(index)
        return part.texts(inner)

    def shards(self) -> tuple[Source, ...]:
        """The parts."""
        return self.parts

    @cached_property
    def fingerprint(self) -> str:
        """Of all parts, which reads all their indices."""
        return fingerprint(part.fingerprint for part in self.parts)

    @cached_property
    def _ends(self) -> list[int]:
        return list(itertools.accumulate(map(len, self.parts)))

    def _find(self, index: int) -> tuple[Any, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect.bisect_right(self._ends, index)
        return self.parts[number], index - (self._ends[number - 1] if number else 0)


def shards(source: Source, size: int = 1000) -> list[Source]:
    """The parts that `source` comes in, else runs of `size` of its records."""
    if hasattr(source, "shards"):
        return list(source.shards())
    return [Slice(source, start, min(start + size, len(source))) for start in range(0, len(source), size)]


def shard_fault(shard: Source) -> str | None:
    """What is wrong with a shard as a whole, where it knows."""
    return getattr(shard, "fault", None)


def open_files(spec: str, pattern: str, suffix: str, opener: Callable[[Path, str], Source]) -> Shards:
    """A part a file that `pattern` matches, sorted; a folder stands for the files in it that end with `suffix`.

    Parts are named by their files' stems, or by their paths where two stems are alike. Raises `DataError` where there
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
    """Text that can be written as UTF-8, without NUL; what is no text in it is replaced."""
    if isinstance(text, str):
        text = text.encode("utf-8", "replace")
    return text.decode("utf-8", "replace").replace("\0", "")


def printable(name: str) -> str:
    """A name from outside that can be shown in a terminal."""
    return "".join(c if c.isprintable() else "\ufffd" for c in clean(name))
