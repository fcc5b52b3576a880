"""List the plain files in a tar, which is untrusted: sizes are checked and damage is named; nothing is extracted."""

import contextlib
import gzip
import os
import tarfile
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path

from jaxmm.data.cleaning import printable
from jaxmm.paths import is_bucket, open_data

LARGEST_HEADER = 2**16
"""Bytes of an extended header, which contains a long name and a few fields."""
LARGEST_UNPACKED = 2**38
"""Bytes of a compressed tar, unpacked."""
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


@contextlib.contextmanager
def open_tar(path: Path) -> Iterator[BufferedIOBase]:
    """Open a tar. One that is compressed stays open in this thread, because it can only be read forwards."""
    with open_data(path) as file:
        if file.read(2) != b"\x1f\x8b":
            file.seek(0)
            yield file
            return
    status = None if is_bucket(path) else path.stat()
    name = path, status and (status.st_mtime_ns, status.st_size)
    if getattr(_compressed, "name", None) != name:
        _compressed.name, _compressed.file = name, gzip.open(open_data(path))  # noqa: SIM115
    yield _compressed.file


_compressed = threading.local()


def tar_size(file: BufferedIOBase) -> int:
    """Return the size of a tar, unpacked. Raises `TarFault`."""
    if not isinstance(file, gzip.GzipFile):
        return file.seek(0, os.SEEK_END)
    try:
        file.seek(0)
        while file.read(2**20):
            if file.tell() > LARGEST_UNPACKED:
                raise TarFault(f"it is compressed and has more than {LARGEST_UNPACKED:,} bytes")
        return file.tell()
    except (EOFError, OSError, zlib.error) as error:
        raise TarFault(f"it is compressed and damaged: {error}") from None


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


def members(file: BufferedIOBase, end: int) -> Iterator[Member]:
    """Yield the plain files in a tar of `end` bytes, by its headers alone; the last one may reach past the end.

    Sparse files, links, devices and folders are skipped. Raises `TarFault` if the archive is damaged.
    """
    at = 0
    try:
        file.seek(0)
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


def _check_end(file: BufferedIOBase, at: int, end: int) -> None:
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
    raise TarFault(f"it is no tar: it begins with {block[:12]!r}")
