"""Paths in buckets (`gs://`, `s3://`): objects are read, listed, written and removed.

There is no rename in a bucket: an object appears when all of it is there. A request that seemed lost may arrive late;
so what writes an object names the version that it replaces.
"""

import glob
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from etils.epath.gpath import PosixGPath

from jaxmm.bucket_requests import TRIES, replace_object, request
from jaxmm.object_cache import copy_files, known_version, open_object
from jaxmm.optional import require_extra

PART = 2**26
"""Bytes that are compared at a time; larger objects are replaced without a condition."""


class BucketPath(PosixGPath, Path):
    """A file or folder in a bucket, with the methods of `pathlib.Path` that jaxmm uses.

    A folder exists while there is an object in it. Errors are `FileNotFoundError`, `PermissionError` or `OSError`.
    """

    def __init__(self, *parts):
        require_extra("buckets", "a path in a bucket")
        if PosixGPath.__init__ is not object.__init__:  # Python 3.12 and newer parse here, older ones in __new__
            super().__init__(*parts)

    @property
    def scheme(self) -> str:
        """The kind of bucket, `gs` or `s3`."""
        return self.parts[1]

    def request(self, operation: str, *args: Any, **options: Any) -> Any:
        """Call a method of the file system with this path; see `request`."""
        return request(self, operation, str(self), *args, **options)

    def info(self) -> dict[str, Any]:
        """Return what the bucket says about this object or folder. Raises `FileNotFoundError`."""
        return self.request("info")

    def checksum(self) -> str:
        """Return the size and the checksum that the bucket keeps of this object. Raises `FileNotFoundError`."""
        info = self.info()
        return f"{info['size']} {info.get('crc32c') or info.get('md5Hash') or str(info['ETag']).strip(chr(34))}"

    def version(self) -> str:
        """Return a text that changes when the object is written again."""
        info = self.info()
        return f"{info['size']} {info.get('generation') or ''} {info.get('etag') or info.get('ETag')}"

    def exists(self) -> bool:
        """Return whether there is such an object or folder."""
        try:
            self.info()
        except FileNotFoundError:
            return False
        return True

    def is_file(self) -> bool:
        """Return whether there is such an object."""
        return self._type() == "file"

    def is_dir(self) -> bool:
        """Return whether there is such a folder."""
        return self._type() == "directory"

    _listed: str | None = None

    def _type(self) -> str | None:
        if self._listed is None:
            try:
                return self.info()["type"]
            except FileNotFoundError:
                return None
        return self._listed

    def stat(self) -> SimpleNamespace:
        """Return the size and the time of the last change."""
        info = self.info()
        changed = info.get("mtime") or info.get("LastModified")
        seconds = changed.timestamp() if changed else 0.0
        return SimpleNamespace(st_size=info["size"], st_mtime=seconds, st_mtime_ns=int(seconds * 1e9))

    def iterdir(self) -> Iterator["BucketPath"]:
        """Yield what is in this folder. Raises `FileNotFoundError`."""
        for entry in self.request("ls", detail=True):
            path = self._absolute(entry["name"].rstrip("/"))
            if path != self:  # an object that marks the folder
                path._listed = entry["type"]
                yield path

    def glob(self, pattern: str) -> Iterator["BucketPath"]:
        """Yield what matches `pattern` in this folder."""
        yield from map(self._absolute, request(self, "glob", f"{glob.escape(str(self))}/{pattern}"))

    def matches(self) -> list["BucketPath"]:
        """Return the objects that this path matches, as a pattern."""
        entries = self.request("glob", detail=True)
        return sorted(self._absolute(name) for name, entry in entries.items() if entry["type"] == "file")

    def files(self) -> list["BucketPath"]:
        """Return all objects in this folder and its subfolders, sorted."""
        return sorted(map(self._absolute, self.request("find")))

    def _absolute(self, name: str) -> "BucketPath":
        return type(self)(f"{self.scheme}://{name.removeprefix(f'{self.scheme}://')}")

    def read_bytes(self) -> bytes:
        """Return the content."""
        return self.request("cat_file", size=2**26)

    def read_text(self, encoding: str | None = None, errors: str | None = None) -> str:
        """Return the content as text."""
        return self.read_bytes().decode(encoding or "utf-8", errors or "strict").replace("\r\n", "\n")

    def read_range(self, start: int, stop: int) -> bytes:
        """Return the bytes from `start` up to `stop`."""
        data = self.request("cat_file", start=start, end=stop, size=stop - start)
        if len(data) != stop - start:
            raise OSError(f"{self}: {len(data)} bytes came of {stop - start}; has it changed?")
        return data

    def write_bytes(self, data: bytes) -> int:
        """Write the object."""
        self._store(io.BytesIO(data), "pipe_file", str(self), data)
        return len(data)

    def write_text(self, data: str, encoding: str | None = None, errors: str | None = None,
                   newline: str | None = None) -> int:
        """Write the object as text."""
        return self.write_bytes(data.encode(encoding or "utf-8", errors or "strict"))

    def create(self, data: bytes) -> None:
        """Write the object if there is none. Raises `FileExistsError`."""
        try:
            self.request("pipe_file", data, mode="create")
        except FileExistsError:
            if not self._has(io.BytesIO(data)):
                raise

    def upload(self, file: str | os.PathLike) -> None:
        """Write the object from a local file."""
        with open(file, "rb") as content:
            self._store(content, "put_file", os.fspath(file), str(self))

    def _store(self, content: io.BufferedIOBase, operation: str, *args: Any) -> None:
        """Write `content`, which `operation` of the file system does with a new object."""
        size = content.seek(0, io.SEEK_END)
        for _ in range(TRIES):
            before = self._object()
            try:
                if before is None:
                    request(self, operation, *args, mode="create", size=size)
                elif size > PART:
                    request(self, operation, *args, size=size)
                else:
                    content.seek(0)
                    replace_object(self, content.read(), before)
                return
            except FileNotFoundError:  # others have removed it
                if before is None:
                    raise
            except FileExistsError:  # written by others, or by a request whose answer was lost
                if self._has(content):
                    return
        raise OSError(f"{self}: others have written it {TRIES} times meanwhile")

    def _object(self) -> dict[str, Any] | None:
        """Return what the bucket says about this object; None if there is none."""
        try:
            info = self.info()
        except FileNotFoundError:
            return None
        return info if info["type"] == "file" else None

    def _has(self, content: io.BufferedIOBase) -> bool:
        """Return whether the object consists of `content`."""
        size, known = content.seek(0, io.SEEK_END), self._object()
        content.seek(0)
        return known is not None and known["size"] == size and all(
            content.read(PART) == self.read_range(start, min(start + PART, size)) for start in range(0, size, PART))

    def download(self, file: str | os.PathLike) -> None:
        """Write the object to a local file."""
        self.request("get_file", os.fspath(file), size=self.info()["size"])

    def open(self, mode: str = "r", buffering: int = -1, encoding: str | None = None, errors: str | None = None,
             newline: str | None = None) -> Any:
        """Open the object to read, as bytes or text. Writing is `atomic.atomic_file`'s."""
        if mode not in ("r", "rt", "rb"):
            raise ValueError(f"mode is {mode!r}; expected 'r' or 'rb'")
        file = open_object(self, self.version())
        return file if mode == "rb" else io.TextIOWrapper(file, encoding or "utf-8", errors, newline)

    def open_data(self) -> io.BufferedReader:
        """Open the object to read; this process looks only once which version it has."""
        return open_object(self, known_version(self, os.getpid()))

    def local_copy(self, wanted: Callable[[str], bool] = lambda name: True) -> Path:
        """Return a copy of this object, or of this folder's `wanted` files, on the local disk; see `copy_files`."""
        return copy_files(self, wanted)

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Do nothing: a folder is there with the first object in it."""

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove the object."""
        try:
            self.request("rm_file")
        except FileNotFoundError:
            if not missing_ok:
                raise

    def rmtree(self, missing_ok: bool = False) -> None:
        """Remove all objects in this folder."""
        try:
            files = self.files()
        except FileNotFoundError:
            files = []
        if not files and not missing_ok:
            raise FileNotFoundError(str(self))
        for path in files:
            path.unlink(missing_ok=True)

    def rename(self, target: "BucketPath") -> "BucketPath":
        """Move the object, or all objects of a folder one by one, within the buckets."""
        target = self._absolute(str(target))
        for path in [self] if self.is_file() else self.files():
            new = target if path == self else target / path.relative_to(self).as_posix()
            path.request("cp_file", str(new), size=2**30)
            path.unlink(missing_ok=True)
        return target

    replace = rename

    def relative_to(self, *other: Any) -> Path:
        """Return the local path that leads here from the folder `other`."""
        return Path(str(self).removeprefix(f"{self._absolute(str(other[0]))}/"))

    def absolute(self) -> "BucketPath":
        """Return the path."""
        return self

    def resolve(self, strict: bool = False) -> "BucketPath":
        """Return the path."""
        return self

    expanduser = absolute

    def samefile(self, other: Any) -> bool:
        """Return whether `other` is the same path."""
        return str(self) == str(other)
