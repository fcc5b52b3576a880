"""Recipes: Python files with `get_config()`, found by name or by path."""

import difflib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from jaxmm.paths import user_path
from jaxmm.saved_config import RECIPE
from jaxmm.validation import ConfigError


def recipe_folder() -> Path:
    """Return the folder of jaxmm's own recipes: jaxmm/configs in a wheel, configs/ beside jaxmm/ in a checkout."""
    package = Path(__file__).parent
    shipped = package / "configs"
    return shipped if shipped.is_dir() else package.parent / "configs"


def find_recipe(recipe: str | Path) -> Path:
    """Return the file of a recipe: a path, or the name of one of jaxmm's own (`clip_scenes`, `configs/clip_scenes.py`).

    Raises `ConfigError`, which lists jaxmm's own, if there is none.
    """
    path = user_path(recipe, "config")
    if path.is_file():
        return path
    known = {path.stem: path for path in sorted(recipe_folder().glob("*.py"))}
    if path.parts in ((path.name,), ("configs", path.name)) and path.suffix in ("", ".py") and path.stem in known:
        return known[path.stem]
    close = difflib.get_close_matches(path.stem, known, 1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    raise ConfigError(f"config is {str(recipe)!r}, which is no file and no recipe{hint} Recipes: "
                      f"{', '.join(file.name for file in known.values())}")


def load_recipe(recipe: str | Path) -> Any:
    """Return what the recipe's `get_config()` returns. Raises `ConfigError` if there is no such recipe or function."""
    path = find_recipe(recipe)
    spec = importlib.util.spec_from_file_location(f"{RECIPE}{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses that it defines are looked up
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ConfigError(f"config is {str(path)!r}, which has no get_config()")
    return module.get_config()
