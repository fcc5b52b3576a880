"""Write files atomically."""

import os
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Write `text` so that a crash leaves either the old file or the complete new one."""
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
