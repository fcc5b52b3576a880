"""The commands as `jaxmm --help` lists them, and names that are no command."""

import importlib
import inspect

import pytest

from jaxmm import cli
from jaxmm.cli.parsing import RecipeCommand


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_the_summary_is_the_first_line_of_the_command(name):
    where, summary = cli.COMMANDS[name]
    module, _, function = where.partition(":")
    command = getattr(importlib.import_module(f"jaxmm.cli.{module}"), function)
    command = command.function if isinstance(command, RecipeCommand) else command
    assert inspect.getdoc(command).splitlines()[0] == summary


@pytest.mark.parametrize("name", ["plan", "capfilt bootstrap"])
def test_help_without_a_recipe(name, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([*name.split(), "--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and "With `--config RECIPE`" in out and "--steps" not in out and "--config PATH" in out


@pytest.mark.parametrize("args, status, words", [
    (["--help"], 0, "  search index       Encode"), (["-h"], 0, "usage: jaxmm COMMAND"),
    (["search", "--help"], 0, "usage: jaxmm search COMMAND"), ([], 2, "usage: jaxmm COMMAND"),
    (["data"], 2, "usage: jaxmm data COMMAND"), (["clasify", "a.png"], 2, "'clasify'; did you mean 'classify'?"),
    (["data", "imprt", "x"], 2, "'data imprt'; did you mean 'data import'?"),
    (["data", "zzz"], 2, "expected one of data import, data check, data show"),
    (["capfil"], 2, "did you mean 'capfilt'?"), (["plan"], 2, "error: config is None; expected --config RECIPE"),
    (["--config", "clip_scenes"], 2, "no command '--config'")])
def test_top_level(args, status, words, capsys):
    assert cli.main(args) == status
    out, err = capsys.readouterr()
    assert words in (err if status else out) and (out if status else err) == ""
