"""The `jaxmm` command. Each command is one file, imported when it is called."""

import difflib
import importlib
import logging
import sys
from collections.abc import Sequence

COMMANDS = {
    "train": ("train:train", "Train a model on a recipe."),
    "eval": ("eval:evaluate", "Evaluate models on data sets, without training."),
    "classify": ("classify:classify", "Classify images."),
    "caption": ("caption:caption", "Caption images."),
    "answer": ("answer:answer", "Answer a question about an image."),
    "match": ("match:match", "Estimate how likely texts and an image belong together."),
    "generate": ("image_grids:generate", "Generate images."),
    "complete": ("image_grids:complete", "Complete images of which a part is kept."),
    "search index": ("image_search:index", "Encode all images in a folder into an index that `search query` reads."),
    "search query": ("image_search:query", "Find the images of an index that are nearest to a text or an image."),
    "serve": ("serve:serve", "Serve a model: a web page and JSON endpoints."),
    "data import": ("data:import_data", "Write a source as a TFDS data set that `tfds:DEST:train` reads."),
    "data check": ("data:check_data", "Report what is in a source and which records cannot be used, and why."),
    "data show": ("data:show_data", "Show the first records of a source: a table, or one HTML file with the images."),
    "capfilt run": ("capfilt:run", "Caption, score, select and merge, and write the report."),
    "capfilt caption": ("capfilt:caption", "Write synthetic captions beside the web's texts: the first stage."),
    "capfilt score": ("capfilt:score", "Score how well each text belongs to its image: the second stage."),
    "capfilt select": ("capfilt:select", "Select the texts that stay: the third stage."),
    "capfilt merge": ("capfilt:merge", "Merge what stays with the human captions: the fourth stage."),
    "capfilt report": ("capfilt:report", "Write OUT/report.html: what was noise, what stays, how captions differ."),
    "capfilt bootstrap": ("capfilt:bootstrap", "Run the whole procedure: train captioner and filter, caption and "
                          "filter the web, train a new model."),
    "convert": ("convert:convert", "Write a model in another format, with nothing missing and nothing left over."),
    "show": ("show:show", "Show the parameters, configuration and warnings of a checkpoint."),
    "parity": ("layer_parity:parity", "Compare every layer with the published implementation."),
    "plan": ("plan:plan", "Compile a recipe's train step for a target topology: does it fit, how fast is it."),
}
"""The module in this folder and the function of every command, and the first line of its help."""


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line `args` and return the exit status; report a user's error in one line."""
    args = list(sys.argv[1:] if args is None else args)
    name = next((name for name in (" ".join(args[:2]), *args[:1]) if name in COMMANDS), None)
    if name is None:
        return _help(args)
    try:
        return _run(name, args[len(name.split()):])
    except user_errors(name) as error:
        from jaxmm import hosts
        from jaxmm.validation import ConfigError
        print(f"error: {error}", file=sys.stderr)
        return hosts.exit_status(2 if isinstance(error, ConfigError) else 1)
    except KeyboardInterrupt:
        from jaxmm import hosts
        print("interrupted", file=sys.stderr)
        return hosts.exit_status(130)


def _run(name: str, args: list[str]) -> int:
    from jaxmm.cli.parsing import run
    from jaxmm.training.runtime import keep_memory

    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    keep_memory()
    module, _, function = COMMANDS[name][0].partition(":")
    return run(getattr(importlib.import_module(f"jaxmm.cli.{module}"), function), args, prog=f"jaxmm {name}")


def user_errors(name: str) -> tuple[type[Exception], ...]:
    """Return the errors that are reported in one line; imported only after something was raised.

    Training runs the user's own code, so a plain `ValueError` keeps its traceback there.
    """
    from jaxmm.checkpoints import CheckpointError
    from jaxmm.data.bad_records import BadRecord
    from jaxmm.data.base import DataError
    from jaxmm.inference.search import SearchError
    from jaxmm.optional import MissingExtra
    from jaxmm.pretrained.io.files import FileError
    from jaxmm.training.loop import TrainError
    from jaxmm.validation import ConfigError
    named = (ConfigError, DataError, FileError, CheckpointError, TrainError, SearchError, BadRecord, MissingExtra,
             OSError)
    return named if name == "train" else (*named, ValueError)


def _help(args: list[str]) -> int:
    """Print the commands, those of a group (`jaxmm search`), or what is wrong with `args`; return the exit status."""
    group = {name: row for name, row in COMMANDS.items() if args and name.startswith(f"{args[0]} ")}
    prefix, rest = (f"{args[0]} ", args[1:]) if group else ("", args)
    asked = rest[:1] in (["--help"], ["-h"])
    if rest and not asked:
        wrong, known = prefix + rest[0], list(group or COMMANDS)
        close = difflib.get_close_matches(wrong, group or [*known, *(name.split()[0] for name in known)], 1)
        hint = f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(known)}"
        print(f"error: jaxmm has no command {wrong!r}; {hint}", file=sys.stderr)
        return 2
    lines = [f"usage: jaxmm {prefix}COMMAND [OPTIONS]", "",
             *(f"  {name:18} {summary}" for name, (_, summary) in (group or COMMANDS).items()), "",
             f"jaxmm {prefix}COMMAND --help explains the options of one command."]
    print("\n".join(lines), file=sys.stdout if asked else sys.stderr)
    return 0 if asked else 2
