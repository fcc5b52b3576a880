"""Tar shards as img2dataset and WebDataset write them: `KEY.jpg`, `KEY.txt`, `KEY.json`, one after the other.

They come from strangers. Headers are read and pictures are sought, nothing is ever extracted; names are only names;
members other than plain files, and what is neither picture nor text (pickles), are passed over; no size that a header
claims is believed before it is seen to fit the file.
"""

import json
import logging
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np

from jaxmm.data.bad_records import BadRecord
from jaxmm.data.base import EXTENSIONS, Record, fingerprint
from jaxmm.data.sources.shards import LARGEST_PICTURE, LARGEST_TEXT, Shards, clean, open_files, printable

log = logging.getLogger(__name__)

BLOCK = 512
LARGEST_HEADER = 2**16
"""Bytes of an extended header: a long name, a few fields."""
_IMAGE, _TEXT, _JSON = range(3)
_EXTENDED = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME,
             tarfile.GNUTYPE_LONGLINK)
_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE)
_WITHOUT_DATA = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE)


class TarFault(Exception):
    """Where and why the members of a tar end before it does."""


@dataclass(frozen=True)
class Member:
    """A plain file in a tar."""

    name: str
    offset: int
    size: int
    checksum: int
    """Of its header."""


@dataclass(frozen=True)
class _Index:
    keys: list[str]
    places: np.ndarray
    """Offset and size of picture, text and JSON, int64 [n, 3, 2]; an offset of -1 where there is none."""
    end: int
    fingerprint: str
    fault: str | None


@dataclass(frozen=True)
class Tar:
    """The records of one tar: runs of members of one key. Its headers are read at first use, and named if damaged."""

    path: Path
    stem: str
    classes: ClassVar[None] = None

    @property
    def name(self) -> str:
        """The source that this shard alone is."""
        return f"tars:{self.path}"

    @property
    def fingerprint(self) -> str:
        """Of the file's name and size, and of the names, sizes and header checksums of its members."""
        return self._index.fingerprint

    @property
    def fault(self) -> str | None:
        """What is wrong with the tar as a whole; the records before that can be used."""
        return self._index.fault

    def __len__(self):
        return len(self._index.keys)

    def __getitem__(self, index: int) -> Record:
        """Reads the members of one record. Raises `BadRecord` for one that the file cannot hold, or a large one."""
        record: Record = {"key": self.key(index)}
        with self.path.open("rb") as file:
            texts = self._texts(file, index)
            if texts:
                record["texts"] = texts
            image = self._read(file, index, _IMAGE)
        return record if image is None else record | {"image": image}

    def key(self, index: int) -> str:
        """The tar's name without its ending, and the members' key."""
        return f"{self.stem}/{self._index.keys[index]}"

    def texts(self, index: int) -> tuple[str, ...]:
        """The caption: the text, else `caption` of the JSON."""
        with self.path.open("rb") as file:
            return self._texts(file, index)

    def _texts(self, file: BinaryIO, index: int) -> tuple[str, ...]:
        text = self._read(file, index, _TEXT)
        if text is None:
            content = self._read(file, index, _JSON)
            text = None if content is None else _caption(content)
        return () if text is None else (clean(text),)

    def _read(self, file: BinaryIO, index: int, kind: int) -> bytes | None:
        offset, size = self._index.places[index, kind].tolist()
        if offset < 0:
            return None
        what, largest = ("picture", LARGEST_PICTURE) if kind == _IMAGE else ("text", LARGEST_TEXT)
        if offset + size > self._index.end:
            raise BadRecord("truncated", f"its {what} should have {size} bytes and the file ends before")
        if size > largest:
            raise BadRecord("too large", f"its {what} has {size} bytes; at most {largest} are read")
        file.seek(offset)
        return file.read(size)

    @cached_property
    def _index(self) -> _Index:
        keys: list[str] = []
        places: list[list[tuple[int, int]]] = []
        seen: set[str] = set()
        noted: list[Any] = []
        last = None
        end, fault = 0, None
        try:
            with self.path.open("rb") as file:
                end = os.fstat(file.fileno()).st_size
                for member in members(file, end):
                    noted.append((member.name, member.offset, member.size, member.checksum))
                    key, kind = _split(member.name)
                    if kind is None:
                        continue
                    if key != last:
                        keys.append(_unique(printable(key), seen))
                        places.append([(-1, 0)] * 3)
                        last = key
                    if places[-1][kind][0] < 0:
                        places[-1][kind] = (member.offset, member.size)
        except TarFault as error:
            fault = str(error)
        except OSError as error:
            fault = f"it cannot be read: {error.strerror}"
        if fault:
            log.warning("%s: %s; %d records of it are used", self.path, fault, len(keys))
        return _Index(keys, np.asarray(places, np.int64).reshape(-1, 3, 2), end,
                      fingerprint([self.path.name, end, *noted]), fault)


def open_tars(spec: str, location: str) -> Shards:
    """A shard a tar that the pattern `location` matches. Raises `DataError`."""
    return open_files(spec, location, ".tar", Tar)


def members(file: BinaryIO, end: int) -> Iterator[Member]:
    """The plain files in a tar of `end` bytes, by its headers alone; the last may reach past the end.

    Sparse files, links, devices and folders are passed over. Raises `TarFault` where the archive breaks off.
    """
    at, extra, everywhere = 0, {}, {}
    while True:
        block = _block(file, at, end)
        if block.count(0) == BLOCK:
            return
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "replace")
            data, size = at + BLOCK, int((everywhere | extra).get("size", info.size))
        except (tarfile.HeaderError, ValueError):
            raise TarFault(_no_header(block, at)) from None
        if not 0 <= size < 2**62:
            raise TarFault(f"the header at byte {at:,} claims a size of {size} bytes")
        if info.type in _EXTENDED:
            fields = _extended(file, info, data)
            if info.type == tarfile.XGLTYPE:
                everywhere |= fields
            else:
                extra |= fields
            at = data + _padded(info.size)
            continue
        fields, extra = everywhere | extra, {}
        if info.type == tarfile.GNUTYPE_SPARSE:
            more = block[482]
            while more:
                more, data = _block(file, data, end)[504], data + BLOCK
        elif info.type in _FILES and not any(field.startswith("GNU.sparse.") for field in fields):
            yield Member(fields.get("path", info.name), data, size, info.chksum)
        elif info.type in _WITHOUT_DATA:
            size = 0
        if data + size > end:
            raise TarFault(f"it ends at byte {end:,}, inside of {printable(fields.get('path', info.name))!r}")
        at = data + _padded(size)


def _block(file: BinaryIO, at: int, end: int) -> bytes:
    file.seek(at)
    block = file.read(BLOCK)
    if len(block) < BLOCK:
        raise TarFault(f"it ends at byte {end:,} without the mark of its end" if at else "it is no tar: "
                       f"it has {end} bytes")
    return block


def _extended(file: BinaryIO, info: tarfile.TarInfo, data: int) -> dict[str, str]:
    """What an extended header says of the member behind it. Raises `TarFault`."""
    if info.size > LARGEST_HEADER:
        raise TarFault(f"the extended header at byte {data - BLOCK:,} claims {info.size:,} bytes")
    file.seek(data)
    content = file.read(info.size)
    if info.type == tarfile.GNUTYPE_LONGNAME:
        return {"path": content.partition(b"\0")[0].decode("utf-8", "replace")}
    if info.type == tarfile.GNUTYPE_LONGLINK:
        return {}
    fields, start = {}, 0
    try:
        while start < len(content):  # "LENGTH NAME=VALUE\n", the length with itself
            space = content.index(b" ", start)
            stop = start + int(content[start:space])
            name, equals, value = content[space + 1:stop - 1].partition(b"=")
            if not start < stop <= len(content) or not equals:
                raise ValueError
            fields[name.decode("utf-8", "replace")] = value.decode("utf-8", "replace")
            start = stop
    except ValueError:
        raise TarFault(f"the extended header at byte {data - BLOCK:,} is damaged") from None
    return fields


def _no_header(block: bytes, at: int) -> str:
    if at:
        return f"there is no header at byte {at:,}, where a member should begin"
    if block.startswith(b"\x1f\x8b"):
        return "it is compressed; wanted a plain tar (gunzip it)"
    return f"it is no tar: it begins with {block[:12]!r}"


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _split(name: str) -> tuple[str, int | None]:
    """The key, up to the first dot of the last part of the path, and what the member is: None for what is not read."""
    folder, slash, base = name.rpartition("/")
    stem, dot, ending = base.partition(".")
    ending = ending.lower()
    kind = _IMAGE if f".{ending}" in EXTENSIONS else {"txt": _TEXT, "json": _JSON}.get(ending)
    return folder + slash + stem, kind if stem and dot else None


def _unique(key: str, seen: set[str]) -> str:
    """`key`, with a number where it was there before."""
    name, number = key, 1
    while name in seen:
        number += 1
        name = f"{key}#{number}"
    seen.add(name)
    return name


def _caption(content: bytes) -> str | None:
    try:
        row = json.loads(content.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return None
    caption = row.get("caption") if isinstance(row, dict) else None
    return caption if isinstance(caption, str) else None
