"""Paths in buckets (`gs://`, `s3://`): objects are read, listed, written and removed, and every request is repeated
until it succeeds or cannot.

Errors that may pass (429, 500 to 504, a reset, no answer for `timeout()` seconds) are logged with the object's name and
tried again, each time after a longer wait. What cannot pass is an `OSError` with the object's name. There is no rename
in a bucket: an object appears when all of it is there.
"""

import asyncio
import functools
import glob
import io
import logging
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from etils.epath.gpath import PosixGPath

from jaxmm.object_cache import copy_files, known_version, open_object
from jaxmm.optional import require_extra

log = logging.getLogger(__name__)

TRIES = 6
SLOWEST = 2**20
"""Bytes per second that the slowest transfer is expected to reach."""
LOGIN = {"gs": "gcloud auth application-default login", "s3": "aws configure, or the variables AWS_ACCESS_KEY_ID and "
         "AWS_SECRET_ACCESS_KEY"}
NO_CREDENTIALS = ("RefreshError", "DefaultCredentialsError", "NoCredentialsError", "PartialCredentialsError",
                  "TokenRetrievalError", "UnauthorizedSSOTokenError")
"""Names of the errors of google-auth and botocore about credentials that are missing or have expired."""


def timeout() -> float:
    """Return the number of seconds without an answer after which a request is repeated."""
    return float(os.environ.get("JAXMM_BUCKET_TIMEOUT", "60"))


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
        self.request("pipe_file", data, size=len(data))
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
            if self.read_bytes() != data:  # else an answer was lost, and the repeated request met its own object
                raise

    def upload(self, file: str | os.PathLike) -> None:
        """Write the object from a local file."""
        request(self, "put_file", os.fspath(file), str(self), size=os.path.getsize(file))

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

    def local_copy(self) -> Path:
        """Return a copy of this object or folder on the local disk; only what has changed is downloaded."""
        return copy_files(self)

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


@functools.cache
def _file_system(scheme: str, process: int) -> Any:
    import fsspec

    options = fsspec.config.conf.setdefault({"gs": "gcs"}.get(scheme, scheme), {})  # that of Orbax and TFDS, too
    options.setdefault("use_listings_cache", False)  # other hosts write, too
    if scheme == "gs":
        import aiohttp

        trace = aiohttp.TraceConfig()
        trace.on_request_end.append(_log_answer)
        trace.on_request_exception.append(_log_failure)
        options.setdefault("session_kwargs", {"trace_configs": [trace]})
        options.setdefault("requests_timeout", aiohttp.ClientTimeout(total=None, sock_connect=timeout(),
                                                                     sock_read=timeout()))
        return fsspec.filesystem("gcs", finalize_on_close=True)
    options.setdefault("config_kwargs", {"retries": {"max_attempts": 1}, "read_timeout": timeout(),
                                         "connect_timeout": timeout()})
    fs = fsspec.filesystem("s3")
    fs.retries = 1  # `request` repeats, and says so
    return fs


def file_system(scheme: str) -> Any:
    """Return this process's fsspec file system of `gs` or `s3`."""
    return _file_system(scheme, os.getpid())


async def _log_answer(session: Any, context: Any, params: Any) -> None:
    if params.response.status in (408, 429) or params.response.status >= 500:
        log.warning("%s %s: status %d; trying again", params.method, params.url, params.response.status)


async def _log_failure(session: Any, context: Any, params: Any) -> None:
    if not isinstance(params.exception, asyncio.CancelledError):  # of two requests whose first answer is enough
        log.warning("%s %s: %s; trying again", params.method, params.url, _text(params.exception))


def request(path: BucketPath, operation: str, *args: Any, size: int = 0, **options: Any) -> Any:
    """Call a method of the file system until it succeeds or cannot; it moves `size` bytes. Messages name `path`."""
    wait = timeout() + size / SLOWEST
    for number in range(TRIES):
        try:
            return getattr(file_system(path.scheme), operation)(*args, timeout=wait, **options)
        except Exception as error:
            if (lasting := _lasting_error(path, error)) is not None:
                raise lasting from error
            if number == TRIES - 1:
                raise OSError(f"{path}: {operation} failed {TRIES} times: {_text(error)}") from error
            delay = min(2.0**number, 30.0) * (0.5 + random.random())
            log.warning("%s: %s: %s; trying again in %.1f s", path, operation, _text(error), delay)
            time.sleep(delay)
    raise AssertionError


def _lasting_error(path: BucketPath, error: Exception) -> Exception | None:
    """Return what to raise for an error that will not pass, with the object's name; None if it may pass."""
    chain: list[BaseException] = [error]
    while (before := chain[-1].__cause__ or chain[-1].__context__) is not None and before not in chain:
        chain.append(before)
    status = next((code for code in map(_status, chain) if code is not None), None)
    if isinstance(error, FileNotFoundError) or status == 404:
        return FileNotFoundError(f"{path}: there is no such object or bucket")
    if isinstance(error, FileExistsError) or status == 412:
        return FileExistsError(f"{path}: it exists already")
    if (isinstance(error, PermissionError) or status in (401, 403) or str(error).startswith("Forbidden")
            or any(type(one).__name__ in NO_CREDENTIALS for one in chain)):
        return PermissionError(f"{path}: access denied: {_text(error)}; expected credentials that may use this bucket "
                               f"({LOGIN[path.scheme]})")
    if status is not None and status not in (408, 429) and status < 500:
        return OSError(f"{path}: {_text(error)}")
    return error if isinstance(error, (TypeError, ValueError, AttributeError, NotImplementedError)) else None


def _status(error: BaseException) -> int | None:
    """Return the HTTP status of an error of gcsfs, botocore or aiohttp."""
    response = getattr(error, "response", None)
    code = (response.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(response, dict) else
            getattr(error, "code", None) or getattr(error, "status", None))
    return int(code) if str(code).isdecimal() else None


def _text(error: BaseException) -> str:
    """Return one line about an error."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
