"""Recipes: Python files with `get_config()`."""

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

from jaxmm.config import RECIPE, ConfigError, TrainConfig, require

Command = TypeVar("Command")


def load_recipe(path: Path, folder: Path | None = None) -> Any:
    """The configuration that the file at `path` returns. Raises `ConfigError`, which names the recipes in `folder`."""
    if not path.is_file():
        known = ", ".join(sorted(p.name for p in folder.glob("*.py"))) if folder else ""
        raise ConfigError(f"config is {str(path)!r}, which is no file" + (f"; {folder.name}/ holds {known}" if known
                                                                           else ""))
    spec = importlib.util.spec_from_file_location(f"{RECIPE}{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses that it defines are looked up
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ConfigError(f"config is {str(path)!r}, which has no get_config()")
    return module.get_config()


def parse_recipe(
    command: type[Command], args: Sequence[str], *, recipe: type = TrainConfig, name: str = "train",
    default: Path | None = None, folder: Path | None = None, prog: str | None = None, description: str | None = None,
) -> Command:
    """`command`, a dataclass with `config` and, in the field `name`, a `recipe`, from a command line.

    First which recipe (`--config`; else `default`), then everything with that recipe's values as defaults. Raises
    `ConfigError`, which names the recipes in `folder`. All other fields of `command` have defaults.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--config", type=Path, default=default)
    try:
        path = first.parse_known_args(list(args))[0].config
    except argparse.ArgumentError as error:
        raise ConfigError(str(error)) from None
    require(path is not None, "config", path, "--config RECIPE, a Python file with get_config()")
    options = {"args": list(args), "prog": prog, "description": description, "config": (tyro.conf.AvoidSubcommands,)}
    found = load_recipe(path, folder)
    require(isinstance(found, recipe), "config", str(path), f"a recipe whose get_config() gives a {recipe.__name__}")
    return tyro.cli(command, default=command(**{"config": path, name: found}), **options)
