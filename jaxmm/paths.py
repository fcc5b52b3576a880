"""Read the paths that users give: `~` is the home folder, and an address such as `s3://bucket/data` is refused.

Every path from a command line, a recipe, a source or a call comes through here. A supported kind of address would be
opened here, too.
"""

import os
import re
from pathlib import Path

from jaxmm.validation import require

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # `Path` turns `//` into `/`; one letter is a drive of Windows


def is_address(path: str | os.PathLike) -> bool:
    """Return whether `path` is an address, such as `gs://bucket/run` or `https://host/image.jpg`."""
    return _ADDRESS.match(os.fspath(path)) is not None


def expand(path: str | os.PathLike, name: str = "path") -> str:
    """Return `path` with the home folder for `~`. Raises `ConfigError` with `name` if it is an address."""
    require(not is_address(path), name, os.fspath(path), "a local path; addresses are not supported")
    return os.path.expanduser(path)


def user_path(path: str | os.PathLike, name: str = "path") -> Path:
    """Return what `expand` returns as a `Path`."""
    return Path(expand(path, name))
