"""Read tar shards as img2dataset and WebDataset write them: `KEY.jpg`, `KEY.txt`, `KEY.json`, one after the other.

Shards are untrusted. Headers are read and images are located, nothing is ever extracted; names are only names; members
other than plain files, and files other than images and text (such as pickles), are skipped; every size in a header is
checked against the size of the file.
"""

import json
import logging
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from jaxmm.data.bad_records import BadRecord
from jaxmm.data.base import EXTENSIONS, Record, Source, fingerprint
from jaxmm.data.sources.shards import LARGEST_IMAGE, LARGEST_TEXT, Shards, clean, open_files, printable

log = logging.getLogger(__name__)

LARGEST_HEADER = 2**16
"""Bytes of an extended header, which contains a long name and a few fields."""
_IMAGE, _TEXT, _JSON = range(3)
_EXTENDED = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME,
             tarfile.GNUTYPE_LONGLINK)


class TarFault(Exception):
    """Damage that ends the members of a tar before its end: what is wrong and where."""


@dataclass(frozen=True)
class Member:
    """A plain file in a tar."""

    name: str
    offset: int
    size: int
    checksum: int
    """The checksum of its header."""


@dataclass(frozen=True)
class _Index:
    keys: list[str]
    places: np.ndarray
    """Offset and size of image, text and JSON, int64 [n, 3, 2]; the offset is -1 if there is none."""
    end: int
    fingerprint: str
    fault: str | None


@dataclass(frozen=True)
class Tar(Source):
    """The records of one tar: consecutive members with the same key. Its headers are read at first use."""

    path: Path
    stem: str

    @property
    def name(self) -> str:
        """The spec of this file alone."""
        return f"tars:{self.path}"

    @property
    def fingerprint(self) -> str:
        """A digest of the name and size of the file and the names, sizes and header checksums of its members."""
        return self._index.fingerprint

    @property
    def fault(self) -> str | None:
        """The damage of the tar, if any. The records before it can be used."""
        return self._index.fault

    def __len__(self):
        return len(self._index.keys)

    def __getitem__(self, index: int) -> Record:
        """Read the members of one record. Raises `BadRecord` if they are too large or reach past the end."""
        record: Record = {"key": self.key(index)}
        with self.path.open("rb") as file:
            texts = self._texts(file, index)
            if texts:
                record["texts"] = texts
            image = self._read(file, index, _IMAGE)
        return record if image is None else record | {"image": image}

    def key(self, index: int) -> str:
        """Return the name of the tar without its suffix, and the key of the members."""
        return f"{self.stem}/{self._index.keys[index]}"

    def texts(self, index: int) -> tuple[str, ...]:
        """Return the caption: the text, else `caption` of the JSON. The image is not read."""
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
        what, largest = ("image", LARGEST_IMAGE) if kind == _IMAGE else ("text", LARGEST_TEXT)
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
        used: set[str] = set()
        listed: list[Any] = []
        last = None
        end, fault = 0, None
        try:
            with self.path.open("rb") as file:
                end = os.fstat(file.fileno()).st_size
                for member in members(file, end):
                    listed.append((member.name, member.offset, member.size, member.checksum))
                    key, kind = _split(member.name)
                    if kind is None:
                        continue
                    if key != last:
                        keys.append(_unique(printable(key), used))
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
                      fingerprint([self.path.name, end, *listed]), fault)


def open_tars(spec: str, location: str, data_dir: str | None = None) -> Shards:
    """Open each tar that the pattern `location` matches as one shard. Raises `DataError`."""
    return open_files(spec, location, ".tar", Tar)


class _ExtendedSize(Exception):
    """An extended header that claims to be too large."""


class _Header(tarfile.TarInfo):
    """A header whose size is checked before `tarfile` reads what it describes."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> tarfile.TarInfo:
        """Read a header from its bytes."""
        header = super().frombuf(buf, encoding, errors)
        if header.type in _EXTENDED and not 0 <= header.size <= LARGEST_HEADER:
            raise _ExtendedSize(header.size)
        return header


def members(file: BinaryIO, end: int) -> Iterator[Member]:
    """Yield the plain files in a tar of `end` bytes, by its headers alone; the last one may reach past the end.

    Sparse files, links, devices and folders are skipped. Raises `TarFault` if the archive is damaged.
    """
    at = 0
    try:
        tar = tarfile.TarFile(fileobj=file, tarinfo=_Header, encoding="utf-8", errors="replace")
        while (header := tar.next()) is not None:
            tar.members.clear()  # they would fill the memory
            fields, size, name = header.pax_headers, header.size, printable(header.name)
            plain = header.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not any(
                field.startswith("GNU.sparse.") for field in fields)
            if plain and fields.get("size", str(size)) != str(size):  # tarfile reads an invalid number as 0
                raise TarFault(f"there is no header at byte {tar.offset:,}: {name!r} has the size {fields['size']!r}")
            if not header.offset_data <= tar.offset < 2**62 or (plain and size < 0):
                raise TarFault(f"the header at byte {at:,} claims a size of {size} bytes")
            if plain:
                yield Member(header.name, header.offset_data, size, header.chksum)
            if tar.offset > end:
                raise TarFault(f"it ends at byte {end:,}, inside of {name!r}")
            at = tar.offset
    except _ExtendedSize as error:
        raise TarFault(f"the extended header at byte {at:,} claims {error.args[0]:,} bytes") from None
    except (TarFault, OSError):
        raise
    except Exception:  # damaged headers make tarfile raise nearly anything
        pass
    _check_end(file, at, end)


def _check_end(file: BinaryIO, at: int, end: int) -> None:
    """Raise `TarFault` unless the archive ends at byte `at` with a block of zeros."""
    file.seek(at)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        raise TarFault(f"it ends at byte {end:,} without the mark of its end" if at else f"it is no tar: it has {end} "
                       "bytes")
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "replace")
    except tarfile.EOFHeaderError:
        return
    except (tarfile.HeaderError, ValueError):
        pass
    else:
        raise TarFault(f"the {'extended ' * (header.type in _EXTENDED)}header at byte {at:,} is damaged")
    if at:
        raise TarFault(f"there is no header at byte {at:,}, where a member should begin")
    if block.startswith(b"\x1f\x8b"):
        raise TarFault("it is compressed; expected a plain tar (gunzip it)")
    raise TarFault(f"it is no tar: it begins with {block[:12]!r}")


def _split(name: str) -> tuple[str, int | None]:
    """Return the key, up to the first dot of the last part of the path, and the kind: None for what is not read."""
    folder, slash, base = name.rpartition("/")
    stem, dot, ending = base.partition(".")
    ending = ending.lower()
    kind = _IMAGE if f".{ending}" in EXTENSIONS else {"txt": _TEXT, "json": _JSON}.get(ending)
    return folder + slash + stem, kind if stem and dot else None


def _unique(key: str, used: set[str]) -> str:
    """Return `key`, with a number if it is in `used`, and add it there."""
    name, number = key, 1
    while name in used:
        number += 1
        name = f"{key}#{number}"
    used.add(name)
    return name


def _caption(content: bytes) -> str | None:
    try:
        row = json.loads(content.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return None
    caption = row.get("caption") if isinstance(row, dict) else None
    return caption if isinstance(caption, str) else None
