"""Find the folder for what jaxmm can make or fetch again."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return jaxmm in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxmm"
