"""Read the paths that users give: `~` is the home folder, `gs://` and `s3://` are buckets, other addresses are refused.

Every path from a command line, a recipe, a source or a call comes through here. A path in a bucket is a `BucketPath`,
whose module is imported with the first one.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from io import BufferedIOBase
from pathlib import Path

from jaxmm.user_cache import cache_folder
from jaxmm.validation import require

BUCKETS = ("gs://", "s3://")
UNFINISHED = ".unfinished"
"""Name of the object in a folder that lists the files of an upload until all of them are there."""
_NO_PATH = re.compile("[\0\ud800-\udc7f\udd00-\udfff]")  # the others of these halves stand for bytes that are not UTF-8
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # `Path` turns `//` into `/`; one letter is a drive of Windows


def is_address(path: str | os.PathLike) -> bool:
    """Return whether `path` is an address, such as `gs://bucket/run` or `https://host/image.jpg`."""
    return _ADDRESS.match(os.fspath(path)) is not None


def is_bucket(path: str | os.PathLike) -> bool:
    """Return whether `path` is in a bucket."""
    return os.fspath(path).startswith(BUCKETS)


def expand(path: str | os.PathLike, name: str = "path") -> str:
    """Return `path` with the home folder for `~`. Raises `ConfigError` with `name` if it is an address of no bucket, or
    has characters that no path has.
    """
    text = os.fspath(path)
    require(_NO_PATH.search(text) is None, name, text, "a path without NUL and halves of characters")
    if is_bucket(text):
        require(bool(text[5:].strip("/")), name, text, "the name of a bucket behind it")
        return text
    require(not is_address(text), name, text, "a local path, or one in a bucket (gs://, s3://)")
    return os.path.expanduser(text)


def user_path(path: str | os.PathLike, name: str = "path") -> Path:
    """Return what `expand` returns as a `Path`; one in a bucket needs the extra `buckets`."""
    text = expand(path, name)
    if not is_bucket(text):
        return Path(text)
    from jaxmm.buckets import BucketPath

    return BucketPath(text)


def exists(path: str | os.PathLike) -> bool:
    """Return whether there is such a file or folder."""
    return user_path(path).exists() if is_bucket(path) else os.path.exists(path)


def is_taken(folder: Path) -> bool:
    """Return whether something is at `folder`, other than the files of an upload that was interrupted."""
    return folder.exists() and not (is_bucket(folder) and (folder / UNFINISHED).exists())


def local_copy(path: Path, wanted: Callable[[str], bool] = lambda name: True) -> Path:
    """Return `path`, or a copy of a file or folder of a bucket in the local cache, which is downloaded if it is new.

    Of a folder in a bucket only files whose relative paths are `wanted` are downloaded.
    """
    return path.local_copy(wanted) if is_bucket(path) else path


def cache_limit() -> int:
    """Return the largest size of the local cache of buckets, in bytes."""
    from jaxmm.object_cache import limit

    return limit()


def open_data(path: Path) -> BufferedIOBase:
    """Open a file to read, which does not change while this process runs; parts of an object stay in the local cache.
    """
    return path.open_data() if is_bucket(path) else path.open("rb")


def remove_tree(folder: Path, *, missing_ok: bool = False) -> None:
    """Remove a folder with everything in it."""
    if is_bucket(folder):
        folder.rmtree(missing_ok=missing_ok)
    else:
        with contextlib.suppress(FileNotFoundError) if missing_ok else contextlib.nullcontext():
            shutil.rmtree(folder)


@contextlib.contextmanager
def new_folder(folder: Path, last: str | None = None) -> Iterator[Path]:
    """Yield an empty local folder that becomes `folder` when it is complete.

    In a bucket, which has no rename, its file `last` is the one that is uploaded last.
    """
    with contextlib.ExitStack() as removed:
        if is_bucket(folder):
            part = Path(removed.enter_context(tempfile.TemporaryDirectory(prefix="jaxmm-")), folder.name)
        else:
            part = staging_folder(folder)
            shutil.rmtree(part, ignore_errors=True)  # of a call that was interrupted
        part.mkdir(parents=True)
        yield part
        move_folder(part, folder, last)


def staging_folder(folder: Path) -> Path:
    """Return the local folder or file in which `folder` is made: beside it, or in the user's cache for a bucket's.

    Two processes that make the same `folder` get the same one: in a bucket, its parent is to be locked.
    """
    if not is_bucket(folder):
        return folder.with_name(folder.name + ".part")
    digest = hashlib.blake2b(str(folder).encode(), digest_size=16).hexdigest()
    return cache_folder() / "parts" / digest / folder.name


def move_file(part: Path, path: Path) -> None:
    """Give a complete local file its place."""
    if is_bucket(path):
        path.upload(part)
        part.unlink()
    else:
        part.replace(path)


def move_folder(part: Path, folder: Path, last: str | None = None) -> None:
    """Give a complete local folder its place. In a bucket its file `last` is uploaded last.

    The files of an upload to `folder` that was interrupted are removed.
    """
    if not is_bucket(folder):
        part.rename(folder)
        return
    files = {path.relative_to(part).as_posix(): path for path in sorted(part.rglob("*")) if path.is_file()}
    note = folder / UNFINISHED
    if note.exists():
        for name in json.loads(note.read_text()):
            (folder / name).unlink(missing_ok=True)
    note.write_text(json.dumps(list(files)))
    for name in sorted(files, key=lambda name: Path(name).name == last):
        (folder / name).upload(files[name])
    note.unlink()
    shutil.rmtree(part)
