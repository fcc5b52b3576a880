"""What jaxmm itself wrote: a saved model's folder, and the work folder of a run."""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax

from jaxmm.checkpoints import CheckpointError, read_weights
from jaxmm.config import ConfigError, ImageConfig, from_dict, to_dict
from jaxmm.data.tokenizers import Tokenizer
from jaxmm.pretrained.checkpoint import Opened
from jaxmm.pretrained.io.files import FileError, open_tensors
from jaxmm.pretrained.io.hub import Files
from jaxmm.pretrained.table import Row, read_params
from jaxmm.sharding import named_leaves
from jaxmm.task import Task

MODEL = "jaxmm.json"


def is_run(path: Path) -> bool:
    """Whether the folder `path` is a run's work folder."""
    return (path / "checkpoints").is_dir() and (path / "config.json").is_file()


def open_model(files: Files) -> Opened:
    """A folder that `Model.save(format="jaxmm")` wrote."""
    described = files.json(MODEL)
    try:
        task, image, labels = (from_dict(described[name], files.folder / MODEL) for name in ("task", "image", "labels"))
    except ConfigError as error:
        raise FileError(str(error)) from None
    except (KeyError, TypeError, AttributeError) as error:
        raise FileError(f"{files.folder / MODEL} is not what jaxmm writes: {error}") from None
    if not isinstance(task, Task) or not isinstance(image, ImageConfig):
        raise FileError(f"{files.folder / MODEL} describes no task with pictures")
    tensors = open_tensors(files.weights)
    return Opened(name=files.name, family="jaxmm", task=task, image=image, labels=labels,
                  tokenizer=_tokenizer(files.folder / "tokenizer"),
                  read=partial(read_params, tensors, identity_rows(task), name=files.name), tensors=tensors)


def open_run(folder: Path, step: str | None) -> Opened:
    """A run's work folder: the newest whole checkpoint, or that of `step`; the moving average where it keeps one."""
    try:
        notes = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config, task = (from_dict(notes[name], folder / "config.json") for name in ("config", "task"))
        labels = None if notes["classes"] is None else tuple(notes["classes"])
    except ConfigError as error:
        raise FileError(str(error)) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileError(f"{folder / 'config.json'} is not what a run writes: {type(error).__name__}: {error}") from None
    if step is not None and not step.isdecimal():
        raise FileError(f"revision is {step!r}; of a work folder it is the number of a step")
    part = "average" if config.optimizer.average else "params"

    def read(like):
        try:
            return read_weights(folder / "checkpoints", part, like, None if step is None else int(step))
        except CheckpointError as error:
            raise FileError(str(error)) from None

    notes = ("the moving average of the parameters is used",) if part == "average" else ()
    return Opened(name=str(folder), family="jaxmm", task=task, image=config.data.image, labels=labels, notes=notes,
                  tokenizer=_tokenizer(folder / "tokenizer"), read=read)


def identity_rows(task: Task) -> list[Row]:
    """Our paths as they are."""
    return [Row(path, path) for path, _ in named_leaves(jax.eval_shape(task.init, jax.random.key(0)))]


def describe(task: Task, image: ImageConfig, labels: tuple[str, ...] | None) -> Mapping[str, Any]:
    """What `jaxmm.json` says."""
    return {"task": to_dict(task), "image": to_dict(image), "labels": to_dict(labels)}


def _tokenizer(folder: Path) -> Tokenizer | None:
    if not folder.exists():
        return None
    try:
        return Tokenizer.load(folder)
    except ValueError as error:
        raise FileError(str(error)) from None
