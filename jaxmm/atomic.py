"""Files that are whole or as they were."""

import os
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Writes `text` so that `path` holds either what it held or all of it, whatever happens."""
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
