"""Send requests to buckets, each of which is repeated until it succeeds or cannot.

Errors that may pass (429, 500 to 504, a reset, no answer for `timeout()` seconds) are logged with the object's name and
tried again, each time after a longer wait. What cannot pass is an `OSError` with the object's name.
"""

import asyncio
import functools
import json
import logging
import os
import random
import time
import uuid
from pathlib import Path
from typing import Any

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


def request(path: Path, operation: str, *args: Any, size: int = 0, **options: Any) -> Any:
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


def replace_object(path: Path, data: bytes, before: dict[str, Any]) -> None:
    """Write an object if it still is the one that `before` describes. Raises `FileExistsError` or `FileNotFoundError`.
    """
    if path.scheme == "s3":
        request(path, "pipe_file", str(path), data, IfMatch=before["ETag"], size=len(data))
        return
    mark, (bucket, _, name) = uuid.uuid4().hex, str(path).removeprefix("gs://").partition("/")
    start = (f"--{mark}\r\nContent-Type: application/json\r\n\r\n{json.dumps({'name': name})}\r\n"
             f"--{mark}\r\nContent-Type: application/octet-stream\r\n\r\n")
    address = file_system("gs").base.removesuffix("storage/v1/") + "upload/storage/v1/b/{}/o"
    request(path, "call", "POST", address, bucket, uploadType="multipart", ifGenerationMatch=before["generation"],
            headers={"Content-Type": f"multipart/related; boundary={mark}"},
            data=start.encode() + data + f"\r\n--{mark}--".encode(), size=len(data))


def _lasting_error(path: Path, error: Exception) -> Exception | None:
    """Return what to raise for an error that will not pass, with the object's name; None if it may pass."""
    chain: list[BaseException] = [error]
    while (before := chain[-1].__cause__ or chain[-1].__context__) is not None and before not in chain:
        chain.append(before)
    status = next((code for code in map(_status, chain) if code is not None), None)
    if isinstance(error, FileNotFoundError) or status == 404:
        return FileNotFoundError(f"{path}: there is no such object or bucket")
    if isinstance(error, FileExistsError) or status in (409, 412):
        return FileExistsError(f"{path}: it exists already, or has changed")
    if (isinstance(error, PermissionError) or status in (401, 403) or str(error).startswith("Forbidden")
            or any(type(one).__name__ in NO_CREDENTIALS for one in chain)):
        return PermissionError(f"{path}: access denied: {_text(error)}; expected credentials that may use this bucket "
                               f"({LOGIN[path.scheme]})")
    if status is not None and (status == 501 or (status not in (408, 429) and status < 500)):
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
