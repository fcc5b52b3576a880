"""Download files over HTTP. A file is complete or not there; a transfer that breaks off continues where it stopped."""

import errno
import http.client
import io
import time
import urllib.error
import urllib.request
from pathlib import Path

from jaxmm.atomic import atomic_file

WAITS = (1, 2, 4, 8)
"""Seconds before each further attempt."""
TIMEOUT = 60
"""Seconds without data after which an attempt has failed."""
CHUNK = 2**20
LARGEST_TEXT = 4 * 2**20
"""Bytes of a text; larger ones are refused."""
AGAIN = (408, 425, 429)
"""Answers, besides those of broken servers (5xx), after which another attempt may succeed."""


class DownloadError(Exception):
    """A file that cannot be downloaded: its address, and why."""


class NotFound(DownloadError):
    """A file that the server does not have."""


def download(url: str, path: Path) -> None:
    """Write the file at `url` to `path`. Raises `NotFound` and `DownloadError`."""
    with atomic_file(path) as file:
        _transfer(url, file, None)


def read_text(url: str) -> str:
    """Return the text at `url`. Raises `NotFound` and `DownloadError`."""
    file = io.BytesIO()
    _transfer(url, file, LARGEST_TEXT)
    return file.getvalue().decode("utf-8", "replace")


def _transfer(url: str, file: io.BufferedIOBase, most: int | None) -> None:
    """Write all of `url` into `file`, at most `most` bytes, in as many attempts as `WAITS` allows."""
    version = None
    for wait in (*WAITS, None):
        try:
            request = urllib.request.Request(url, headers={"User-Agent": "jaxmm", "Accept-Encoding": "identity"})
            if file.tell() and version is not None:
                request.add_header("Range", f"bytes={file.tell()}-")
                request.add_header("If-Range", version)
            with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
                version = _version(response)
                _receive(url, response, file, most)
            return
        except urllib.error.HTTPError as error:
            if error.code in (404, 410):
                raise NotFound(f"{url} is not there ({error.code} {error.reason})") from None
            if error.code not in AGAIN and error.code < 500:
                raise DownloadError(f"{url} cannot be downloaded: {error.code} {error.reason}") from None
            reason = f"{error.code} {error.reason}"
        except ValueError as error:
            raise DownloadError(f"{url} is no address: {error}") from None
        except (OSError, http.client.HTTPException) as error:
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                raise
            reason = getattr(error, "reason", None) or str(error) or type(error).__name__
        if wait is None:
            raise DownloadError(f"{url} cannot be downloaded: {reason}")
        time.sleep(wait)


def _version(response: http.client.HTTPResponse) -> str | None:
    """Return what tells this content of the address from any other; None if the server does not say."""
    tag = response.headers.get("ETag", "")
    return tag if tag.startswith('"') else response.headers.get("Last-Modified")


def _receive(url: str, response: http.client.HTTPResponse, file: io.BufferedIOBase, most: int | None) -> None:
    """Write a response to `file`, behind what is there if it is the rest. Raises `OSError` if it ends early."""
    start = file.tell()
    if response.status != 206 or not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
        if response.status != 200:
            raise OSError(f"the server answered {response.status} {response.reason}")
        start = 0
        file.seek(0)
        file.truncate()
    length = response.headers.get("Content-Length")
    if length is None and response.headers.get("Transfer-Encoding") is None:
        raise DownloadError(f"{url} cannot be downloaded: the server does not say how large it is")
    while chunk := response.read(CHUNK):
        if most is not None and file.tell() + len(chunk) > most:
            raise DownloadError(f"{url} is larger than {most:,} bytes; at most as many of a text are read")
        file.write(chunk)
    if length is not None and file.tell() - start != int(length):
        raise ConnectionError(f"it ended after {file.tell():,} of {start + int(length):,} bytes")
