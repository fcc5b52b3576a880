"""jaxmm's own formats: the folder of a saved model, and the workdir of a run."""

import json
from pathlib import Path

import jax

from jaxmm.checkpoints import CheckpointError, read_weights
from jaxmm.config import ImageConfig
from jaxmm.data.tokenizers import Tokenizer
from jaxmm.pretrained.family import Checkpoint, Export, Family, Opened
from jaxmm.pretrained.io.files import FileError, Tensors
from jaxmm.pretrained.io.hub import Files
from jaxmm.pretrained.table import Row
from jaxmm.saved_config import from_dict, to_dict
from jaxmm.sharding import named_leaves
from jaxmm.task import Task
from jaxmm.validation import ConfigError

MODEL = "jaxmm.json"


def read(files: Files, tensors: Tensors) -> Checkpoint:
    """Describe a folder that `Model.save(format="jaxmm")` wrote."""
    config = files.json(MODEL)
    try:
        task, image, labels = (from_dict(config[name], files.folder / MODEL) for name in ("task", "image", "labels"))
    except ConfigError as error:
        raise FileError(str(error)) from None
    except (KeyError, TypeError, AttributeError) as error:
        raise FileError(f"{files.folder / MODEL} is not what jaxmm writes: {error}") from None
    if not isinstance(task, Task) or not isinstance(image, ImageConfig):
        raise FileError(f"{files.folder / MODEL} describes no task with images")
    return Checkpoint(task=task, rows=identity_rows(task), image=image, labels=labels,
                      tokenizer=_tokenizer(files.folder / "tokenizer"))


def write(task: Task, image: ImageConfig, labels: tuple[str, ...] | None, tokenizer: Tokenizer | None) -> Export:
    """Describe any task."""
    return Export(configs={MODEL: {"task": to_dict(task), "image": to_dict(image), "labels": to_dict(labels)}},
                  rows=identity_rows(task))


def identity_rows(task: Task) -> list[Row]:
    """Return rows that keep our paths as keys."""
    return [Row(path, path) for path, _ in named_leaves(jax.eval_shape(task.init, jax.random.key(0)))]


FAMILY = Family(name="jaxmm", matches=lambda files, tensors: (files.folder / MODEL).is_file(), read=read, write=write,
                save_tokenizer=lambda tokenizer, folder: tokenizer.save(folder / "tokenizer"))


def is_run(path: Path) -> bool:
    """Return whether the folder `path` is the workdir of a run."""
    return (path / "checkpoints").is_dir() and (path / "config.json").is_file()


def open_run(workdir: Path, step: str | None) -> Opened:
    """Open the newest complete checkpoint of a run, or that of `step`; its moving average if it keeps one."""
    try:
        saved = json.loads((workdir / "config.json").read_text(encoding="utf-8"))
        config, task = (from_dict(saved[name], workdir / "config.json") for name in ("config", "task"))
        labels = None if saved["classes"] is None else tuple(saved["classes"])
    except ConfigError as error:  # names the file
        raise FileError(str(error)) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileError(
            f"{workdir / 'config.json'} is not what a run writes: {type(error).__name__}: {error}") from None
    if step is not None and not step.isdecimal():
        raise FileError(f"revision is {step!r}; for a workdir it is the number of a step")
    part = "average" if config.optimizer.average else "params"

    def read(like):
        try:
            return read_weights(workdir / "checkpoints", part, like, None if step is None else int(step))
        except CheckpointError as error:
            raise FileError(str(error)) from None

    notes = ("the moving average of the parameters is used",) if part == "average" else ()
    return Opened(name=str(workdir), family="jaxmm", task=task, image=config.data.image, labels=labels, notes=notes,
                  tokenizer=_tokenizer(workdir / "tokenizer"), read=read)


def _tokenizer(folder: Path) -> Tokenizer | None:
    if not folder.exists():
        return None
    try:
        return Tokenizer.load(folder)
    except ValueError as error:
        raise FileError(str(error)) from None
