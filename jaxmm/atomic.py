"""Write files that are complete or not there."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from jaxmm.paths import is_bucket


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file that takes the place of `path` when it is complete; a crash or an error leaves the old one."""
    if is_bucket(path):  # which shows an object once it is complete
        with tempfile.NamedTemporaryFile() as file:
            yield file
            file.flush()
            path.upload(file.name)
        return
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """Write `text` so that a crash leaves either the old file or the complete new one."""
    with atomic_file(path) as file:
        file.write(text.encode())
