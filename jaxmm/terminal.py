"""What the commands of `jaxmm` share: arguments, tables, JSON."""

import json
import sys
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Union

import tyro
from rich.console import Console
from rich.table import Table


def place(metavar: str) -> Any:
    """A positional argument that `--help` calls `metavar`."""
    return tyro.conf.arg(metavar=metavar)


def print_json(value: Any) -> None:
    """One line."""
    print(json.dumps(value))


def print_table(columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
    """A table as wide as the terminal."""
    table = Table(*columns)
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 160).print(table, markup=False)


def choice(**commands: Callable[..., None]) -> Any:
    """The type of one of `commands`, for tyro."""
    return Union[tuple(Annotated[None, tyro.conf.subcommand(name=name, constructor=command)]  # noqa: UP007
                       for name, command in commands.items())]
