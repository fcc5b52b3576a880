"""Parse the arguments of one command: a function's parameters, or options together with the fields of a recipe."""

import argparse
import dataclasses
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from jaxmm.paths import user_path
from jaxmm.recipes import load_recipe
from jaxmm.validation import ConfigError, require

PATHS = tyro.constructors.ConstructorRegistry()
"""How arguments become values: every path may start with `~`, and addresses are refused."""


def _to_path(given: list[str]) -> Path:
    try:
        return user_path(given[0])
    except ConfigError as error:
        raise OSError(str(error)) from None  # tyro would print a `ValueError` with a page of help


@PATHS.primitive_rule
def _path_rule(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec | None:
    if info.type is not Path:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1, metavar="PATH", instance_from_str=_to_path,
        is_instance=lambda value: isinstance(value, Path), str_from_instance=lambda path: [str(path)])


def positional(metavar: str) -> tuple[Any, Any]:
    """Return tyro's markers of a positional argument that `--help` calls `metavar`."""
    return tyro.conf.Positional, tyro.conf.arg(metavar=metavar)


@dataclass(frozen=True)
class RecipeCommand:
    """A command whose options include every field of a recipe."""

    function: Callable[[Any, Any], int | None]
    options: type
    """Dataclass of the options that are not in the recipe; its field `config` says which recipe. All other fields have
    defaults."""
    recipe: type
    """Type that the recipe's `get_config()` returns."""

    def parse(self, args: Sequence[str], prog: str | None = None) -> tuple[Any, Any]:
        """Return the options and the recipe: first which recipe (`--config`), then everything with its values.

        Raises `ConfigError` if there is no such recipe.
        """
        chosen = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        [field] = [field for field in dataclasses.fields(self.options) if field.name == "config"]
        default = None if field.default is dataclasses.MISSING else field.default
        chosen.add_argument("--config", type=Path, default=default)
        try:
            path = chosen.parse_known_args(list(args))[0].config
        except argparse.ArgumentError as error:
            raise ConfigError(str(error)) from None
        help_of = {"prog": prog, "description": inspect.getdoc(self.function), "config": (tyro.conf.AvoidSubcommands,)}
        if path is None and {"--help", "-h"} & set(args):
            help_of["description"] += "\n\nWith `--config RECIPE`, `--help` explains the recipe's fields too."
            tyro.cli(self.options, args=["--help"], registry=PATHS, **help_of)
        require(path is not None, "config", path, "--config RECIPE, its name or a Python file with get_config()")
        recipe = load_recipe(path)
        require(isinstance(recipe, self.recipe), "config", str(path),
                f"a recipe whose get_config() gives a {self.recipe.__name__}")
        both = dataclasses.make_dataclass("Arguments", [
            ("options", Annotated[self.options, tyro.conf.arg(name="")]),
            ("recipe", Annotated[self.recipe, tyro.conf.arg(name="")])])
        default = both(self.options(config=path), recipe)
        parsed = tyro.cli(both, args=list(args), default=default, registry=PATHS, **help_of)
        return parsed.options, parsed.recipe


def with_recipe(options: type, recipe: type) -> Callable[[Callable[[Any, Any], int | None]], RecipeCommand]:
    """Make a function of `options` and a `recipe` a command."""
    return lambda function: RecipeCommand(function, options, recipe)


def run(command: RecipeCommand | Callable[..., int | None], args: Sequence[str], prog: str) -> int:
    """Run a command with `args` and return its exit status."""
    if isinstance(command, RecipeCommand):
        return command.function(*command.parse(args, prog)) or 0
    return tyro.cli(command, args=list(args), prog=prog, registry=PATHS) or 0
