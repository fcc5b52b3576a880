"""Trains a model: `python run_train.py [--config configs/X.py] [--workdir DIR] [--any.field value]`.

Without arguments it trains BLIP on generated scenes. The same command with the same `--workdir` goes on where the
run was left.
"""

import logging
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import jax
import tyro

from jaxmm import hosts
from jaxmm.checkpoints import CheckpointError
from jaxmm.compiling import use_compilation_cache
from jaxmm.config import ConfigError, TrainConfig
from jaxmm.data.base import DataError
from jaxmm.hosts.startup import HostsConfig
from jaxmm.recipes import parse_recipe
from jaxmm.task import Task, capabilities
from jaxmm.training.loop import TrainError, train
from jaxmm.training.runtime import keep_memory

HERE = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is not part of the recipe."""

    config: Path = HERE / "configs" / "blip_scenes.py"
    """The recipe: a Python file with `get_config()`. Its fields are the options below."""
    workdir: Path | None = None
    """Where everything is written: config.json, metrics.jsonl, checkpoints/, report.html. A folder that holds a run
    is continued. Default: a new folder in runs/."""
    hosts: HostsConfig = field(default_factory=HostsConfig)
    """Several processes that train together need `--workdir`, a folder that all of them share."""
    cache: Path | None = None
    """Where compiled programs are kept between runs. Default: jaxmm/xla in the user's cache folder."""


@dataclass(frozen=True, kw_only=True)
class Command(Run):
    """The whole command line."""

    train: Annotated[TrainConfig, tyro.conf.arg(name="")]


def parse(args: list[str]) -> Command:
    """The command line: first which recipe, then everything with that recipe's values as defaults."""
    return parse_recipe(Command, args, default=Run.config, folder=HERE / "configs", description=__doc__)


def new_workdir(recipe: Path) -> Path:
    """A folder in runs/ named after the recipe and the time."""
    return Path("runs") / f"{recipe.stem}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"


def next_commands(task: Task, workdir: Path) -> list[tuple[str, str]]:
    """(what, command): what can be done with the model that was trained in `workdir`."""
    can, found = capabilities(task), []
    if "answers questions" in can:
        found += [("answer questions", f'jaxmm answer PICTURE "what is this?" --model {workdir}')]
    if "writes captions" in can:
        found += [("caption pictures", f"jaxmm caption PICTURES --model {workdir}")]
    if "matches images and texts" in can:
        found += [("see whether words fit", f'jaxmm match PICTURE "a red circle" --model {workdir}')]
    elif "embeds texts" in can:
        found += [("search a folder", f"jaxmm search index FOLDER INDEX --model {workdir}"),
                  ("classify", f'jaxmm classify PICTURES --labels "a cat,a dog" --model {workdir}')]
    if "classifies images" in can:
        found += [("classify", f"jaxmm classify PICTURES --model {workdir}")]
    return [*found, ("in Python", f'import jaxmm; model = jaxmm.load("{workdir}")'),
            ("train on your own", "README.md, Train on your own data")]


def main(args: list[str]) -> int:
    """Parses, trains, and turns what can go wrong into one line; the exit status."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    keep_memory()
    try:
        command = parse(args)
        with hosts.distributed(command.hosts, command.workdir):
            use_compilation_cache(command.cache)
            workdir = command.workdir or new_workdir(command.config)
            if train(command.train, workdir) and jax.process_index() == 0:
                print("what it can do now:")
                for what, line in next_commands(command.train.task, workdir):
                    print(f"  {what + ':':24}{line}")
    except (ConfigError, DataError, CheckpointError, TrainError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return hosts.exit_status(2 if isinstance(error, ConfigError) else 1)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
