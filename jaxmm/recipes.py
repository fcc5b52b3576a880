"""Recipes: Python files with `get_config()`."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

from jaxmm.config import ConfigError


def load_recipe(path: Path, folder: Path | None = None) -> Any:
    """The configuration that the file at `path` returns. Raises `ConfigError`, which names the recipes in `folder`."""
    if not path.is_file():
        known = ", ".join(sorted(p.name for p in folder.glob("*.py"))) if folder else ""
        raise ConfigError(f"config is {str(path)!r}, which is no file" + (f"; {folder.name}/ holds {known}" if known
                                                                           else ""))
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses that it defines are looked up
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ConfigError(f"config is {str(path)!r}, which has no get_config()")
    return module.get_config()
