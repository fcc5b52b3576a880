"""`jaxmm train`, the same command as `run_train.py`."""

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import jax

from jaxmm import hosts
from jaxmm.cli.parsing import with_recipe
from jaxmm.compiling import use_compilation_cache
from jaxmm.config import TrainConfig
from jaxmm.hosts import HostsConfig
from jaxmm.saved_config import from_dict
from jaxmm.task import Task
from jaxmm.training import loop


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Options of the command that are not part of the recipe."""

    config: Path = Path("blip_scenes")
    """The recipe: the name of one of jaxmm's own, or a Python file with `get_config()`. Its fields are options too."""
    workdir: Path | None = None
    """Folder of the results: config.json, metrics.jsonl, checkpoints/, report.html. A folder that has a run is
    continued. Default: a new folder in runs/."""
    hosts: HostsConfig = field(default_factory=HostsConfig)
    """Processes that train together. They need `--workdir`, a folder that all of them share."""
    cache: Path | None = None
    """Folder of the compiled programs, kept between runs. Default: jaxmm/xla in the user's cache folder."""


@with_recipe(TrainOptions, TrainConfig)
def train(options: TrainOptions, config: TrainConfig) -> None:
    """Train a model on a recipe.

    Without arguments it trains BLIP on generated scenes. The same command with the same `--workdir` continues the run.
    """
    with hosts.distributed(options.hosts, options.workdir):
        use_compilation_cache(options.cache)
        workdir = options.workdir or new_workdir(options.config)
        try:
            metrics = loop.train(config, workdir)
        except loop.OutOfMemory as error:
            raise loop.OutOfMemory(f"{error}\n{memory_advice(options.config, config)}") from error
        if metrics and jax.process_index() == 0:
            print("what to do next:")
            task = from_dict(json.loads((workdir / "config.json").read_text())["task"])  # with classes and vocabulary
            for purpose, line in next_commands(task, workdir):
                print(f"  {purpose + ':':24}{line}")


def memory_advice(recipe: Path, config: TrainConfig) -> str:
    """Return the first changes of a recipe that need less memory, and the command that says which of them fit."""
    from jaxmm.planning.pareto import flags, suggestions  # not needed by a run that ends well
    changes = [f"  {flags(config, change)}" for change in suggestions(config, jax.device_count())[:8]]
    return "\n".join(["these need less memory, from the cheapest:", *changes,
                      f"jaxmm plan --config {recipe} --topology KIND:SHAPE compiles them and says which fit"])


def new_workdir(recipe: Path) -> Path:
    """Return a folder in runs/ named after the recipe and the time."""
    return Path("runs") / f"{recipe.stem}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"


def next_commands(task: Task, workdir: Path) -> list[tuple[str, str]]:
    """Return the purpose and the command line of everything that the model trained in `workdir` can do."""
    commands = []
    if task.answers_questions:
        commands += [("answer questions", f'jaxmm answer IMAGE "what is this?" --model {workdir}')]
    if task.writes_captions:
        commands += [("caption images", f"jaxmm caption IMAGES --model {workdir}")]
    if task.matcher:
        commands += [("match texts", f'jaxmm match IMAGE "a red circle" --model {workdir}')]
    elif task.embedder and task.embedder.text:
        commands += [("search a folder", f"jaxmm search index FOLDER INDEX --model {workdir}"),
                     ("classify", f'jaxmm classify IMAGES --labels "a cat,a dog" --model {workdir}')]
    if task.classifier and not task.classifier.reads_text:
        commands += [("classify", f"jaxmm classify IMAGES --model {workdir}")]
    page = [("on a web page", f"jaxmm serve {workdir}")] if commands else []
    return [*commands, ("in Python", f'import jaxmm; model = jaxmm.load("{workdir}")'),
            ("train on your data", "README.md, Train on your own data"), *page]
